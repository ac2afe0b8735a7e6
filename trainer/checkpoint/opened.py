"""A complete checkpoint, opened for reading. Nothing that is read from it is used before its SHA-256 was checked.

What is wrong with it for good is `Damaged`: a missing file, another size, another hash. A file that cannot be read now,
for want of rights or of a disk, raises `OSError`: it may be whole.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...comm.errors import ConfigError, Problem, refuse_if_any
from ...comm.files.access import read_regular, refusing
from ...comm.files.strict_json import Item, Malformed
from ..model.config import ModelConfig
from .manifest import MANIFEST, CheckpointManifest, Damaged, StoredPiece, read_manifest, wrong_sizes
from .pieces import AVERAGE, MODEL, Piece
from .tensor_file import Declared, TensorFile, as_bytes, read_at

_FIX = "take another checkpoint, or go on with the version of Shoestring that wrote it"


@dataclass(frozen=True)
class Checkpoint:
    """One directory that `save` has finished."""

    path: Path
    manifest: CheckpointManifest

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
        """The shape of the model whose weights these are. Raises `ConfigError` for facts that describe none."""
        with self._refusing():
            model = self.facts["config"]["model"].build(ModelConfig)
        refuse_if_any(
            replace(problem, field=f"{self.path / MANIFEST}: {problem.field}") for problem in model.problems()
        )
        return model

    @property
    def step(self) -> int:
        """Optimizer steps that the weights have seen. Raises `ConfigError` for facts that do not say."""
        with self._refusing():
            return self.facts["step"].whole()

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the run that has saved it, as plain values. Raises `ConfigError` where there is none."""
        with self._refusing():
            return self.facts["config"].mapping()

    @property
    def facts(self) -> Item:
        """What the manifest says beside tensors; who asks for what is not there gets `Malformed`."""
        return Item(self.manifest.facts, "facts")

    @property
    def source(self) -> Mapping[str, Any] | None:
        """The `config.json` that the weights were imported with; None for those of a run."""
        with self._refusing():
            found = self.facts.get("source")
            return None if found is None else found.mapping()

    def setting(self, *keys: str, default: int) -> int:
        """A whole number of at least 1 in the configuration; `default` where it was not configured."""
        with self._refusing():
            found: Item | None = self.facts["config"]
            for key in keys:
                found = None if found is None else found.get(key)
            return default if found is None else found.whole(1)

    def _refusing(self) -> AbstractContextManager[None]:
        return refusing(self.path / MANIFEST, _FIX)

    def attachments(self) -> dict[str, bytes]:
        """All other files by name. Raises `Damaged`."""
        return {entry.file: self.attachment(entry.file) for entry in self.manifest.attachments}

    def attachment(self, file: str) -> bytes:
        """The bytes of another file. Raises `Damaged`, also where there is none of this name."""
        for entry in self.manifest.attachments:
            if entry.file == file:
                raw = self._attached(file)
                if hashlib.sha256(raw).hexdigest() != entry.sha256:
                    raise Damaged(f"{self.path / file}: its SHA-256 is not that in the manifest")
                return raw
        raise Damaged(f"{self.path}: has no {file}")

    def _attached(self, file: str) -> bytes:
        try:
            return read_regular(self.path / file)
        except (FileNotFoundError, Malformed) as error:
            raise Damaged(f"{self.path / file}: {error}") from error

    def damage(self) -> Iterator[str]:
        """Read every byte; what is wrong, a line for each header, piece or file. Raises `OSError`."""
        wrong = dict(wrong_sizes(self.path, self.manifest.sizes))
        yield from wrong.values()
        yield from self._damaged_headers(wrong)
        for name, tensor in self.manifest.tensors.items():
            for piece in (each for each in tensor.pieces if each.file not in wrong):
                try:
                    self._piece(name, piece)
                except (Damaged, OSError) as found:
                    yield str(found)
        for entry in (each for each in self.manifest.attachments if each.file not in wrong):
            try:
                self.attachment(entry.file)
            except (Damaged, OSError) as found:
                yield str(found)

    def _damaged_headers(self, left_out: Container[str]) -> Iterator[str]:
        """Nothing of ours reads them, other libraries do: each must say exactly what the manifest says."""
        expected: dict[str, dict[str, tuple[Declared, int]]] = {file: {} for file in self.manifest.files}
        for name, tensor in self.manifest.tensors.items():
            for piece in tensor.pieces:
                key, shape = name, tensor.shape
                if piece.elements != math.prod(tensor.shape):
                    key, shape = f"{name}[{piece.first}:{piece.first + piece.elements}]", (piece.elements,)
                expected[piece.file][key] = Declared(key, tensor.dtype, shape), piece.begin
        for name, wanted in expected.items():
            if name in left_out:
                continue
            path = self.path / name
            try:
                file = TensorFile(path)
            except (Malformed, OSError) as error:
                yield f"{path}: its header is damaged: {error}"
                continue
            found = {key: (declared, file.begins[key]) for key, declared in file.tensors.items()}
            if found != wanted:
                wrong = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
                yield f"{path}: its header is damaged: it says something else of {wrong[0]} than the manifest"

    def averaged(self) -> Checkpoint:
        """The same with the moving average for weights (report §3.2.3). Routing biases have none and stay.

        Raises `ConfigError` where the run has not kept one.
        """
        tensors = dict(self.manifest.tensors)
        averages = {name: stored for name, stored in tensors.items() if name.startswith(f"{AVERAGE}/")}
        if not averages:
            hint = f"{self.path} holds no average of the weights; a run keeps one with optimizer.ema_decay"
            raise ConfigError([Problem("--average", True, hint)])
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
            raise Damaged(f"{path}: {error}") from error
        if hashlib.sha256(as_bytes(flat)).hexdigest() != piece.sha256:
            raise Damaged(f"{path}: the SHA-256 of {name} is not that in the manifest")
        return flat
