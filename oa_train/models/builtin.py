"""Folders of the models and dictionaries that come with the package."""

from pathlib import Path


def builtin_folders(file: str) -> dict[str, Path]:
    """Built-in folders that contain this file, by name: in the wheel, or in `checkpoints/` of a source tree."""
    package = Path(__file__).parent.parent
    folders: dict[str, Path] = {}
    for parent in (package.parent / "checkpoints", package / "_builtin"):
        if parent.is_dir():
            folders |= {folder.name: folder for folder in parent.iterdir() if (folder / file).is_file()}
    return folders
