"""Pieces of a long study, each written when it is done, so that an interruption loses at most one piece.

    <study folder>/pieces/about.json      identity of the study; pieces of another study are rejected
    <study folder>/pieces/<N>.safetensors

Under torch.distributed the pieces are distributed over the processes, which share the folder.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from oa_train.errors import ArtefactError
from oa_train.files import read_json, replace_file, write_json
from oa_train.shapes import Tensor
from oa_train.studies.run_folder import PIECES

ABOUT = "about.json"
Piece = dict[str, Tensor]


class Pieces:
    """Pieces of the results of a study.

    Args:
        folder: study folder, or None to keep the pieces in memory.
        about: identity of the study, as plain values.

    Raises:
        ArtefactError: the folder holds pieces of another study, or there are several processes and no folder.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else folder / PIECES
        self._rank, self._n_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if self._folder is None:
            if self._n_ranks > 1:
                raise ArtefactError("Several processes need a shared folder for their pieces.")
            return
        self._folder.mkdir(exist_ok=True)
        file = self._folder / ABOUT
        if file.exists():
            changed = [name for name, value in read_json(file).items() if about.get(name) != value]
            if changed:
                raise ArtefactError(
                    f"{self._folder} holds pieces of another study: {', '.join(changed)} differ. Resume with the "
                    "options that it was started with, or start a new one without --resume."
                )
        elif self._rank == 0:
            write_json(file, about)

    def all(self, n_pieces: int, compute: Callable[[int], Piece], first: int = 0) -> Iterator[Piece]:
        """Pieces `first` to `n_pieces - 1` in order: missing ones are computed, then all are read.

        Raises:
            ArtefactError: the file of a piece is damaged.
        """
        if self._folder is None:
            yield from map(compute, range(first, n_pieces))
            return
        for number in range(first + self._rank, n_pieces, self._n_ranks):
            if not self._file(number).exists():
                tensors = {name: tensor.contiguous().cpu() for name, tensor in compute(number).items()}
                replace_file(self._file(number), save(tensors))
        if self._n_ranks > 1:
            dist.barrier()
        for number in range(first, n_pieces):
            yield self._read(number)

    def missing(self, n_pieces: int) -> list[int]:
        """Indices of the pieces that this process has yet to compute."""
        own = range(self._rank, n_pieces, self._n_ranks)
        return [number for number in own if self._folder is None or not self._file(number).exists()]

    def _file(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{number:04d}.safetensors"

    def _read(self, number: int) -> Piece:
        try:
            return load_file(self._file(number))
        except (OSError, SafetensorError) as problem:
            raise ArtefactError(
                f"The piece {self._file(number)} cannot be read: {problem}. Delete it and resume to compute it again."
            ) from problem
