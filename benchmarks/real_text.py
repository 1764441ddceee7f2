"""A corpus of English from the package index: the manual of Django 5.2, BSD-3-Clause, as a folder of text files.

    python -m benchmarks.real_text                   fetches it, and prints its path and size in tokens
    python -m benchmarks.real_text --model DIRECTORY with the tokenizer of this model, by default that of `make real`

It is prose with reST mark-up: 618 documents, 6 MB. It goes to OA_TRAIN_CACHE, else to `.cache` of the checkout.
`--data Text --data.path FOLDER` reads it.
"""

import argparse
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from benchmarks.real_model import cache_folder, download, real_model
from oa_train import LMSpec, Text

REQUIREMENT = "Django==5.2"
SHA256 = "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89"


def real_text() -> Path:
    """Path of the folder of documents, which are fetched at the first call."""
    folder = cache_folder() / "django-5.2-docs"
    if not folder.exists():
        _fetch(folder)
    return folder


def _fetch(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unpacked = Path(scratch, folder.name)
        # The documents are in the source distribution alone.
        source = download(REQUIREMENT, SHA256, Path(scratch), "--no-binary", "django")
        with tarfile.open(source) as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                content = archive.extractfile(member)
                # Folders that begin with an underscore hold licences of what the pages are made with.
                if content is None or path.parts[1] != "docs" or path.suffix != ".txt":
                    continue
                if not path.parts[2].startswith("_"):
                    file = unpacked.joinpath(*path.parts[2:])
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(content.read())
        unpacked.replace(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=None)
    model = parser.parse_args().model or str(real_model())
    print(real_text())
    print("\n".join(Text(lm=LMSpec(model), path=str(real_text())).remarks))
