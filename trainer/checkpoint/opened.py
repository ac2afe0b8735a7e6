"""A complete checkpoint, opened for reading. Nothing that is read from it is used before its SHA-256 was checked.

What is wrong with it for good is `Damaged`: a missing file, another size, another hash. A file that cannot be read now,
for want of rights or of a disk, raises `OSError`: it may be whole.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...comm.refusal import Problem, Refused
from ..model.config import ModelConfig, YarnConfig
from .manifest import Damaged, Manifest, StoredPiece, read_manifest
from .pieces import AVERAGE, MODEL, Piece
from .tensor_file import as_bytes, read_at


@dataclass(frozen=True)
class Checkpoint:
    """One directory that `save` has finished."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """Check what is cheap to check: marker, manifest, and the sizes of all files. Raises `Damaged`."""
        return Checkpoint(path, read_manifest(path))

    def read(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own. Raises `Damaged`."""
        stored = self.manifest.tensors[name]
        if len(stored.pieces) == 1:
            return self._piece(name, stored.pieces[0]).view(stored.shape)
        whole = self._piece(name, stored.pieces[0]).new_empty(math.prod(stored.shape))
        self.fill(Piece(name, stored.shape, 0, whole, ()))
        return whole.view(stored.shape)

    def fill(self, piece: Piece) -> None:
        """Copy the piece's elements into it. Raises `Damaged`, also where there is no such tensor of this shape."""
        stored = self.manifest.tensors.get(piece.name)
        if stored is None:
            raise Damaged(f"{self.path}: holds no tensor {piece.name}")
        if (stored.shape, stored.dtype) != (piece.shape, piece.flat.dtype):
            wanted = f"{piece.flat.dtype} {list(piece.shape)}"
            raise Damaged(f"{self.path}: {piece.name} is {stored.dtype} {list(stored.shape)} instead of {wanted}")
        end = piece.first + piece.flat.numel()
        for source in stored.pieces:
            begin, stop = max(piece.first, source.first), min(end, source.first + source.elements)
            if begin < stop:
                found = self._piece(piece.name, source)[begin - source.first : stop - source.first]
                piece.flat[begin - piece.first : stop - piece.first].copy_(found)

    @property
    def model(self) -> ModelConfig:
        """The shape of the model whose weights these are."""
        tree: dict[str, Any] = dict(self.manifest.facts["config"]["model"])
        if tree["yarn"] is not None:
            tree["yarn"] = YarnConfig(**tree["yarn"])
        return ModelConfig(**tree)

    @property
    def step(self) -> int:
        """Optimizer steps that the weights have seen."""
        return int(self.manifest.facts["step"])

    def attachments(self) -> dict[str, bytes]:
        """All other files by name. Raises `Damaged`."""
        return {entry.file: self.attachment(entry.file) for entry in self.manifest.attachments}

    def attachment(self, file: str) -> bytes:
        """The bytes of another file. Raises `Damaged`, also where there is none of this name."""
        for entry in self.manifest.attachments:
            if entry.file == file:
                raw = (self.path / file).read_bytes()
                if hashlib.sha256(raw).hexdigest() != entry.sha256:
                    raise Damaged(f"{self.path / file}: its SHA-256 is not that in the manifest")
                return raw
        raise Damaged(f"{self.path}: has no {file}")

    def damage(self) -> Iterator[str]:
        """Read every byte; what is wrong, a line for each piece or file."""
        for name, tensor in self.manifest.tensors.items():
            for piece in tensor.pieces:
                try:
                    self._piece(name, piece)
                except (Damaged, OSError) as found:
                    yield str(found)
        for entry in self.manifest.attachments:
            try:
                self.attachment(entry.file)
            except (Damaged, OSError) as found:
                yield str(found)

    def averaged(self) -> Checkpoint:
        """The same with the moving average for weights (report §3.2.3). Routing biases have none and stay.

        Raises `Refused` where the run has not kept one.
        """
        tensors = dict(self.manifest.tensors)
        averages = {name: stored for name, stored in tensors.items() if name.startswith(f"{AVERAGE}/")}
        if not averages:
            remedy = f"{self.path} holds no average of the weights; a run keeps one with optimizer.ema_decay"
            raise Refused([Problem("--average", True, remedy)])
        tensors |= {MODEL + name.removeprefix(AVERAGE): stored for name, stored in averages.items()}
        return replace(self, manifest=replace(self.manifest, tensors=tensors))

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are no tensors here."""
        return [name for name in names if name not in self.manifest.tensors]

    def _piece(self, name: str, piece: StoredPiece) -> Tensor:
        path = self.path / piece.file
        try:
            flat = read_at(path, piece.begin, self.manifest.tensors[name].dtype, (piece.elements,))
        except (FileNotFoundError, ValueError) as error:
            raise Damaged(str(error)) from error
        if hashlib.sha256(as_bytes(flat)).hexdigest() != piece.sha256:
            raise Damaged(f"{path}: the SHA-256 of {name} is not that in the manifest")
        return flat
