"""A complete checkpoint, opened for reading. Every tensor and file is checked against its SHA-256 before use.

A missing file, a wrong size or a wrong hash raises `CheckpointDamaged`. A file that cannot be read now (permissions,
a missing disk) raises `OSError`: it may be intact.
"""

import hashlib
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
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
from .pieces import EMA_STATE, MODEL_STATE, TensorPiece, piece_in_file
from .tensor_file import TensorFile, TensorSpec, read_tensor_at, tensor_as_bytes

_FIX = "use another checkpoint, or the version of Shoestring that wrote this one"


@dataclass(frozen=True)
class Checkpoint:
    """Directory of a save that has completed."""

    path: Path
    manifest: CheckpointManifest

    @staticmethod
    def open(path: Path) -> "Checkpoint":
        """Open a checkpoint after checking its marker, manifest and file sizes. Raises `CheckpointDamaged`."""
        return Checkpoint(path, read_manifest(path))

    def read_tensor(self, name: str) -> Tensor:
        """Return a copy of a whole tensor. Raises `CheckpointDamaged`."""
        stored = self.manifest.tensors[name]
        if len(stored.pieces) == 1:
            return self._piece(name, stored.pieces[0]).view(stored.shape)
        whole = self._piece(name, stored.pieces[0]).new_empty(math.prod(stored.shape))
        self.fill_piece(TensorPiece(name, stored.shape, 0, whole, ()))
        return whole.view(stored.shape)

    def fill_piece(self, piece: TensorPiece) -> None:
        """Copy stored elements into `piece.flat`. Raises `CheckpointDamaged`, also for another name, shape or dtype."""
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
            begin = max(piece.element_offset, source.element_offset)
            stop = min(end, source.element_offset + source.num_elements)
            if begin < stop:
                found = self._piece(piece.name, source)[begin - source.element_offset : stop - source.element_offset]
                piece.flat[begin - piece.element_offset : stop - piece.element_offset].copy_(found)

    @property
    def model_config(self) -> ModelConfig:
        """Configuration of the model. Raises `ConfigError` if the metadata has no valid one."""
        with self._metadata_errors():
            model = self.metadata["config"]["model"].as_dataclass(ModelConfig)
        raise_if_any(
            replace(problem, field=f"{self.path / MANIFEST_FILE}: {problem.field}") for problem in model.problems()
        )
        return model

    @property
    def step(self) -> int:
        """Optimizer steps done. Raises `ConfigError` if the metadata has none."""
        with self._metadata_errors():
            return self.metadata["step"].as_integer()

    @property
    def metadata(self) -> JsonValue:
        """Metadata of the manifest; reading a missing key raises `MalformedFileError`."""
        return JsonValue(self.manifest.metadata, "metadata")

    @property
    def imported_config(self) -> Mapping[str, Any] | None:
        """The Hugging Face `config.json` of imported weights; None for those of a run."""
        with self._metadata_errors():
            found = self.metadata.get("source")
            return None if found is None else found.as_mapping()

    @property
    def run_eos_token_id(self) -> int | None:
        """Token after each document of the run's data; None for an import."""
        with self._metadata_errors():
            found = self.metadata.get("eos_token_id")
            return None if found is None else found.as_integer()

    def config_value(self, *keys: str, default: int) -> int:
        """Return a whole number of at least 1 from the configuration; `default` if it was not configured."""
        with self._metadata_errors():
            found: JsonValue | None = self.metadata["config"]
            for key in keys:
                found = None if found is None else found.get(key)
            return default if found is None else found.as_integer(1)

    def _metadata_errors(self) -> AbstractContextManager[None]:
        return config_error_context(self.path / MANIFEST_FILE, _FIX)

    def read_attachments(self) -> dict[str, bytes]:
        """Return the contents of all attachments by file name. Raises `CheckpointDamaged`."""
        return {entry.file: self.read_attachment(entry.file) for entry in self.manifest.attachments}

    def read_attachment(self, file: str) -> bytes:
        """Return the bytes of an attachment. Raises `CheckpointDamaged`, also if there is none of this name."""
        entry = next((each for each in self.manifest.attachments if each.file == file), None)
        if entry is None:
            raise CheckpointDamaged(f"{self.path}: has no {file}")
        try:
            raw = read_regular_file(self.path / file)
        except (FileNotFoundError, MalformedFileError) as error:
            raise CheckpointDamaged(f"{self.path / file}: {error}") from error
        if hashlib.sha256(raw).hexdigest() != entry.sha256:
            raise CheckpointDamaged(f"{self.path / file}: its SHA-256 is not that in the manifest")
        return raw

    def find_damage(self) -> Iterator[str]:
        """Read every byte and yield one line per damaged header, piece or file. Raises `OSError`."""
        wrong = dict(find_wrong_file_sizes(self.path, self.manifest.file_sizes))
        yield from wrong.values()
        yield from self._damaged_headers(wrong)
        for file, read in self._reads():
            if file not in wrong:
                try:
                    read()
                except (CheckpointDamaged, OSError) as found:
                    yield str(found)

    def _reads(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Yield for each piece and attachment the name of its file, and a function that reads and checks it."""
        for name, tensor in self.manifest.tensors.items():
            yield from ((piece.file, partial(self._piece, name, piece)) for piece in tensor.pieces)
        for entry in self.manifest.attachments:
            yield entry.file, partial(self.read_attachment, entry.file)

    def _damaged_headers(self, skipped: Container[str]) -> Iterator[str]:
        """Yield each tensor file whose header differs from the manifest."""
        # Shoestring reads by the manifest alone; other libraries read the safetensors headers.
        expected: dict[str, dict[str, tuple[TensorSpec, int]]] = {file: {} for file in self.manifest.tensor_files}
        for name, tensor in self.manifest.tensors.items():
            for piece in tensor.pieces:
                whole = TensorSpec(name, tensor.dtype, tensor.shape)
                declared = piece_in_file(whole, piece.element_offset, piece.num_elements)
                expected[piece.file][declared.name] = declared, piece.byte_offset
        for name, wanted in expected.items():
            if name in skipped:
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
                yield f"{path}: its header is damaged: it differs from the manifest in {wrong[0]}"

    def with_ema_weights(self) -> "Checkpoint":
        """Return this checkpoint with the moving average (report §3.2.3) as weights; routing biases have no average.

        Raises `ConfigError` if the run has no average.
        """
        tensors = dict(self.manifest.tensors)
        averages = {name: stored for name, stored in tensors.items() if name.startswith(f"{EMA_STATE}/")}
        if not averages:
            hint = f"{self.path} holds no average of the weights; a run keeps one with optimizer.ema_decay"
            raise ConfigError([Problem("--average", True, hint)])
        tensors |= {MODEL_STATE + name.removeprefix(EMA_STATE): stored for name, stored in averages.items()}
        return replace(self, manifest=replace(self.manifest, tensors=tensors))

    def missing_tensors(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` that the checkpoint does not hold."""
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
