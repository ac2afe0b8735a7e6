"""A complete checkpoint, opened for reading. Nothing that is read from it is used before its SHA-256 was checked.

What is wrong with it for good is `CheckpointDamaged`: a missing file, another size, another hash. A file that cannot be read now,
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

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.files.file_io import config_error_context, read_regular_file
from ...comm.files.strict_json import JsonValue, MalformedFileError
from ..model.config import ModelConfig
from .manifest import (
    MANIFEST_FILE,
    CheckpointDamaged,
    CheckpointManifest,
    StoredPiece,
    find_wrong_file_sizes,
    read_manifest,
)
from .pieces import EMA_STATE, MODEL_STATE, TensorPiece
from .tensor_file import TensorFile, TensorSpec, read_tensor_at, tensor_as_bytes

_FIX = "take another checkpoint, or go on with the version of Shoestring that wrote it"


@dataclass(frozen=True)
class Checkpoint:
    """One directory that `save` has finished."""

    path: Path
    manifest: CheckpointManifest

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """Check what is cheap to check: marker, manifest, and the sizes of all files. Raises `CheckpointDamaged`."""
        return Checkpoint(path, read_manifest(path))

    def read_tensor(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own. Raises `CheckpointDamaged`."""
        stored = self.manifest.tensors[name]
        if len(stored.pieces) == 1:
            return self._piece(name, stored.pieces[0]).view(stored.shape)
        whole = self._piece(name, stored.pieces[0]).new_empty(math.prod(stored.shape))
        self.fill_piece(TensorPiece(name, stored.shape, 0, whole, ()))
        return whole.view(stored.shape)

    def fill_piece(self, piece: TensorPiece) -> None:
        """Copy the piece's elements into it. Raises `CheckpointDamaged`, also where there is no such tensor of this shape."""
        stored = self.manifest.tensors.get(piece.name)
        if stored is None:
            raise CheckpointDamaged(f"{self.path}: holds no tensor {piece.name}")
        if (stored.shape, stored.dtype) != (piece.shape, piece.flat.dtype):
            wanted = f"{piece.flat.dtype} {list(piece.shape)}"
            raise CheckpointDamaged(
                f"{self.path}: {piece.name} is {stored.dtype} {list(stored.shape)} instead of {wanted}"
            )
        end = piece.element_offset + piece.flat.numel()
        for source in stored.pieces:
            begin, stop = (
                max(piece.element_offset, source.element_offset),
                min(end, source.element_offset + source.num_elements),
            )
            if begin < stop:
                found = self._piece(piece.name, source)[begin - source.element_offset : stop - source.element_offset]
                piece.flat[begin - piece.element_offset : stop - piece.element_offset].copy_(found)

    @property
    def model_config(self) -> ModelConfig:
        """The shape of the model whose weights these are. Raises `ConfigError` for facts that describe none."""
        with self._refusing():
            model = self.metadata["config"]["model"].as_dataclass(ModelConfig)
        raise_if_any(
            replace(problem, field=f"{self.path / MANIFEST_FILE}: {problem.field}") for problem in model.problems()
        )
        return model

    @property
    def step(self) -> int:
        """Optimizer steps that the weights have seen. Raises `ConfigError` for facts that do not say."""
        with self._refusing():
            return self.metadata["step"].as_integer()

    @property
    def run_config(self) -> Mapping[str, Any]:
        """The configuration of the run that has saved it, as plain values. Raises `ConfigError` where there is none."""
        with self._refusing():
            return self.metadata["config"].as_mapping()

    @property
    def metadata(self) -> JsonValue:
        """What the manifest says beside tensors; who asks for what is not there gets `MalformedFileError`."""
        return JsonValue(self.manifest.metadata, "metadata")

    @property
    def imported_config(self) -> Mapping[str, Any] | None:
        """The `config.json` that the weights were imported with; None for those of a run."""
        with self._refusing():
            found = self.metadata.get("source")
            return None if found is None else found.as_mapping()

    def config_value(self, *keys: str, default: int) -> int:
        """A whole number of at least 1 in the configuration; `default` where it was not configured."""
        with self._refusing():
            found: JsonValue | None = self.metadata["config"]
            for key in keys:
                found = None if found is None else found.get(key)
            return default if found is None else found.as_integer(1)

    def _refusing(self) -> AbstractContextManager[None]:
        return config_error_context(self.path / MANIFEST_FILE, _FIX)

    def read_attachments(self) -> dict[str, bytes]:
        """All other files by name. Raises `CheckpointDamaged`."""
        return {entry.file: self.read_attachment(entry.file) for entry in self.manifest.attachments}

    def read_attachment(self, file: str) -> bytes:
        """The bytes of another file. Raises `CheckpointDamaged`, also where there is none of this name."""
        for entry in self.manifest.attachments:
            if entry.file == file:
                raw = self._attached(file)
                if hashlib.sha256(raw).hexdigest() != entry.sha256:
                    raise CheckpointDamaged(f"{self.path / file}: its SHA-256 is not that in the manifest")
                return raw
        raise CheckpointDamaged(f"{self.path}: has no {file}")

    def _attached(self, file: str) -> bytes:
        try:
            return read_regular_file(self.path / file)
        except (FileNotFoundError, MalformedFileError) as error:
            raise CheckpointDamaged(f"{self.path / file}: {error}") from error

    def find_damage(self) -> Iterator[str]:
        """Read every byte; what is wrong, a line for each header, piece or file. Raises `OSError`."""
        wrong = dict(find_wrong_file_sizes(self.path, self.manifest.file_sizes))
        yield from wrong.values()
        yield from self._damaged_headers(wrong)
        for name, tensor in self.manifest.tensors.items():
            for piece in (each for each in tensor.pieces if each.file not in wrong):
                try:
                    self._piece(name, piece)
                except (CheckpointDamaged, OSError) as found:
                    yield str(found)
        for entry in (each for each in self.manifest.attachments if each.file not in wrong):
            try:
                self.read_attachment(entry.file)
            except (CheckpointDamaged, OSError) as found:
                yield str(found)

    def _damaged_headers(self, left_out: Container[str]) -> Iterator[str]:
        """Nothing of ours reads them, other libraries do: each must say exactly what the manifest says."""
        expected: dict[str, dict[str, tuple[TensorSpec, int]]] = {file: {} for file in self.manifest.tensor_files}
        for name, tensor in self.manifest.tensors.items():
            for piece in tensor.pieces:
                key, shape = name, tensor.shape
                if piece.num_elements != math.prod(tensor.shape):
                    key, shape = (
                        f"{name}[{piece.element_offset}:{piece.element_offset + piece.num_elements}]",
                        (piece.num_elements,),
                    )
                expected[piece.file][key] = TensorSpec(key, tensor.dtype, shape), piece.byte_offset
        for name, wanted in expected.items():
            if name in left_out:
                continue
            path = self.path / name
            try:
                file = TensorFile(path)
            except (MalformedFileError, OSError) as error:
                yield f"{path}: its header is damaged: {error}"
                continue
            found = {key: (declared, file.byte_offsets[key]) for key, declared in file.tensor_specs.items()}
            if found != wanted:
                wrong = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
                yield f"{path}: its header is damaged: it says something else of {wrong[0]} than the manifest"

    def with_ema_weights(self) -> Checkpoint:
        """The same with the moving average for weights (report §3.2.3). Routing biases have none and stay.

        Raises `ConfigError` where the run has not kept one.
        """
        tensors = dict(self.manifest.tensors)
        averages = {name: stored for name, stored in tensors.items() if name.startswith(f"{EMA_STATE}/")}
        if not averages:
            hint = f"{self.path} holds no average of the weights; a run keeps one with optimizer.ema_decay"
            raise ConfigError([Problem("--average", True, hint)])
        tensors |= {MODEL_STATE + name.removeprefix(EMA_STATE): stored for name, stored in averages.items()}
        return replace(self, manifest=replace(self.manifest, tensors=tensors))

    def missing_tensors(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are no tensors here."""
        return [name for name in names if name not in self.manifest.tensors]

    def _piece(self, name: str, piece: StoredPiece) -> Tensor:
        path = self.path / piece.file
        try:
            flat = read_tensor_at(path, piece.byte_offset, self.manifest.tensors[name].dtype, (piece.num_elements,))
        except (FileNotFoundError, ValueError) as error:
            raise CheckpointDamaged(f"{path}: {error}") from error
        if hashlib.sha256(tensor_as_bytes(flat)).hexdigest() != piece.sha256:
            raise CheckpointDamaged(f"{path}: the SHA-256 of {name} is not that in the manifest")
        return flat
