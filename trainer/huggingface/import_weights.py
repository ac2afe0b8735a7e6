"""From a directory of released weights to a checkpoint of weights and routing biases, some tensors at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import __version__
from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.files.file_io import (
    config_error_context,
    os_error_to_problem,
    read_json,
    read_regular_file,
    unwritable_directory_hint,
)
from ...comm.files.strict_json import MalformedFileError, parse_json, shorten_for_message
from ..checkpoint.pieces import TensorPiece
from ..checkpoint.saver import write_rank_file
from ..checkpoint.store import CheckpointExtras, CheckpointStore
from ..checkpoint.tensor_file import TensorFile
from ..data.unfinished_directory import WriterState, find_writer_state, lock_directory, remove_lock
from ..model.config import ModelConfig
from .config import ignored_config_keys, parse_config_json
from .export import WEIGHT_INDEX_FILE
from .fp8_weights import dequantize_fp8_weight, scale_shape
from .tensor_names import SCALE_SUFFIX, TensorMapping, make_tensor_mappings, rope_to_interleaved
from .tokenizer import COPIED_FILES, TOKENIZER_FILE, special_token_ids

_BATCH_BYTES = 256 * 2**20
"""Of FP32 weights that are collected for one file of the checkpoint."""
_MOST_PROBLEMS = 8
_APART = "config.json and files do not belong together"
_SIZES = frozenset(
    {
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank"),
        *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size", "n_routed_experts"),
        *("n_shared_experts", "num_nextn_predict_layers"),
    }
)
"""Fields of a model that are the side of some tensor, or never more than the longest one."""
_IGNORED = ("rotary_emb.inv_freq",)
"""Ends of names that old files hold and that follow from the configuration."""
_FETCH = "fetch it again"
_WEIGHTS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn})
"""Dtypes that a weight may have; whole numbers are none."""
_ATTACHMENT_BYTES = 2**28
_SCALES = _WEIGHTS | {torch.float8_e8m0fnu}
_CONFIG_BYTES, _INDEX_BYTES = 2**24, 2**28
"""Most that is read; those of DeepSeek-V3 have 2 kB and 9 MB."""
_LISTED = 12
"""Names in a line about what is left out."""


@dataclass(frozen=True)
class HuggingFaceWeights:
    """The tensors of a directory, by name, in whichever files they are."""

    directory: Path
    files: Mapping[str, TensorFile]
    """By the name of a tensor."""

    @staticmethod
    def open(directory: Path) -> HuggingFaceWeights:
        """Read the headers. Raises `ConfigError` for files that are missing or no safetensors."""
        index = _weight_map(directory)
        names = ["model.safetensors"] if index is None else sorted(set(index.values()))
        problems: list[Problem] = []
        files: dict[str, TensorFile] = {}
        for path in (directory / name for name in names):
            try:
                file = TensorFile(path)
            except MalformedFileError as error:
                problems.append(error.to_problem(path, f"cannot be read; {_FETCH}"))
                continue
            except OSError as error:
                problems.append(os_error_to_problem(error, path, _FETCH))
                continue
            for name in file.tensor_specs:
                if name in files:
                    hint = f"is in {files[name].path.name}, too; remove one of the files"
                    problems.append(Problem(name, path.name, hint))
                files[name] = file
        for name, where in (index or {}).items():
            if not problems and (name not in files or files[name].path != directory / where):
                hint = f"does not hold {name}, which {WEIGHT_INDEX_FILE} says; {_FETCH}"
                problems.append(Problem(str(directory / where), None, hint))
        _refuse_briefly(problems, directory)
        return HuggingFaceWeights(directory, files)

    def tensor_shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor, or None where there is none."""
        return self.files[name].tensor_specs[name].shape if name in self.files else None

    def tensor_dtype(self, name: str) -> torch.dtype | None:
        """Of a tensor, or None where there is none."""
        return self.files[name].tensor_specs[name].dtype if name in self.files else None

    def read_weight(self, name: str) -> Tensor:
        """A weight in FP32, whatever it is stored in. Raises `ConfigError` where an element is not finite."""
        tensor = self._raw(name)
        if name + SCALE_SUFFIX in self.files:
            weight = dequantize_fp8_weight(tensor, self._raw(name + SCALE_SUFFIX))
        else:
            weight = tensor.to(torch.float32)
        if not torch.isfinite(weight).all():
            count = int((~torch.isfinite(weight)).sum())
            where = f"{self.files[name].path}: {name}"
            what = f"{count:,} of {weight.numel():,} elements not finite"
            raise ConfigError([Problem(where, what, "no weight and no bias is NaN or infinite; fetch it again")])
        return weight

    def _raw(self, name: str) -> Tensor:
        file = self.files[name]
        with config_error_context(file.path, _FETCH):
            return file.read_tensor(name)


def import_huggingface_weights(source: Path, target: Path, say: Callable[[str], None]) -> Path:
    """Make `target` hold the weights of `source` as the checkpoint of step 0; return its path.

    Raises `ConfigError`, before anything is written, with all that is missing, has another shape, or is not known.
    """
    _refuse_places(source, target)
    store = CheckpointStore(target, keep_last=1)
    if store.steps():
        raise ConfigError([Problem("target", str(target), "holds checkpoints already; name another directory")])
    tree = _config_json(source)
    released = HuggingFaceWeights.open(source)
    config = _with_the_mtp_that_is_there(parse_config_json(tree, Path(os.path.realpath(source)).name), released, say)
    _refuse_other_sizes(config, released)
    planned = make_tensor_mappings(config)
    _refuse_briefly(list(_misfits(planned, released)), source)
    attachments = _attachments(source)
    _say_what_is_left_out(source, tree, planned, released, say)
    rope_interleave = tree.get("rope_interleave", True) is not False
    _clear_partial(store.partial_path(0), say)
    with _nothing_left(store):
        target.mkdir(parents=True, exist_ok=True)
        store.prepare_save(0)
        with lock_directory(store.partial_path(0)):
            for number, batch in enumerate(_batches(planned)):
                pieces = [_piece(entry, released, rope_interleave=rope_interleave) for entry in batch]
                write_rank_file(store.partial_path(0), f"part_{number:05d}", pieces)
                say(f"{sum(piece.nbytes for piece in pieces):,} bytes, up to {batch[-1].name}")
            remove_lock(store.partial_path(0))
        metadata = {"version": __version__, "step": 0, "config": {"model": asdict(config)}, "source": tree}
        return store.commit_save(0, CheckpointExtras(metadata, attachments, frozenset(entry.name for entry in planned)))


def _clear_partial(partial: Path, say: Callable[[str], None]) -> None:
    """Remove what an import that was killed has left. Raises `ConfigError` where another one is under way."""
    if find_writer_state(partial) is WriterState.ALIVE:
        hint = "another import is writing it; wait for its end, or name another directory"
        raise ConfigError([Problem("target", str(partial), hint)])
    if partial.is_dir():
        say(f"{partial} was left by a process that was killed; it is removed.")
        shutil.rmtree(partial)


@contextmanager
def _nothing_left(store: CheckpointStore) -> Iterator[None]:
    """Remove what has been made of the target, and of the folders above it, when the import fails."""
    target = store.directory
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        yield
    except BaseException as error:
        store.discard_partial_save(0)
        for folder in made:  # from the inside out; one that holds anything else stays
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise ConfigError([os_error_to_problem(error, target, unwritable_directory_hint(error))]) from error
        raise


def _refuse_places(source: Path, target: Path) -> None:
    """Before anything is read: a target that cannot be written, or in which a checkpoint would damage the source."""
    places = {"source": str(source), "target": str(target)}
    nul = "holds a NUL character, which no name of a file has"
    raise_if_any(Problem(key, name, nul) for key, name in places.items() if "\0" in name)
    if os.path.lexists(target) and not target.is_dir():
        raise ConfigError([Problem("target", str(target), "is no directory; name another")])
    if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(source)):
        raise ConfigError([Problem("target", str(target), f"is the source {source}, or lies inside it; name another")])


def _config_json(source: Path) -> dict[str, Any]:
    """The tree of the file. Raises `ConfigError`."""
    path = source / "config.json"
    if not os.path.lexists(path):
        raise ConfigError(
            [Problem("source", str(source), "holds no config.json; name a directory of released weights")]
        )
    if path.is_symlink() and not path.exists():
        raise ConfigError([Problem(str(path), f"a link to {path.readlink()}", f"leads to no file; {_FETCH}")])
    with config_error_context(path, _FETCH):
        return read_json(path, _CONFIG_BYTES).as_mapping()


def _weight_map(directory: Path) -> dict[str, str] | None:
    """In which file the index says each tensor is; None where there is no index. Raises `ConfigError`."""
    path = directory / WEIGHT_INDEX_FILE
    if not path.exists():
        return None
    with config_error_context(path, _FETCH):
        tree = read_json(path, _INDEX_BYTES)
        found = {name: file.as_relative_path() for name, file in tree["weight_map"].items()}
        if not found:
            raise tree["weight_map"].malformed_error("names no tensor")
        return found


def _attachments(source: Path) -> dict[str, bytes]:
    """The files that are carried beside the weights. Raises `ConfigError` for one that cannot be what its name says."""
    found = {}
    for name in COPIED_FILES:
        path = source / name
        if path.exists() or path.is_symlink():
            with config_error_context(path, "fetch it again, or remove it"):
                found[name] = read_regular_file(path, _ATTACHMENT_BYTES)
                if name == TOKENIZER_FILE:
                    special_token_ids({name: found[name]})
                elif name.endswith(".json"):
                    parse_json(found[name]).as_mapping()
    return found


def _say_what_is_left_out(
    source: Path,
    tree: Mapping[str, Any],
    planned: Sequence[TensorMapping],
    released: HuggingFaceWeights,
    say: Callable[[str], None],
) -> None:
    """Files, keys and tensors of the source that the checkpoint does not have, a line each."""
    weights = {file.path.relative_to(source).parts[0] for file in released.files.values()}
    read = {"config.json", WEIGHT_INDEX_FILE, *COPIED_FILES, *weights}
    shared = {name for entry in planned for name in entry.hf_duplicates if name in released.files}
    ignored = [name for name in released.files if name.endswith(_IGNORED)]
    for what, names in (
        ("files not read", sorted(path.name for path in source.iterdir() if path.name not in read)),
        ("keys of config.json without a meaning here", ignored_config_keys(tree)),
        ("tensors that follow from config.json", sorted(ignored)),
        ("tensors that repeat the main model's", sorted(shared)),
    ):
        if names:
            more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            shown = ", ".join(ascii(name)[1:-1] for name in map(str, map(shorten_for_message, names[:_LISTED])))
            say(f"left out, {len(names)} {what}: {shown}{more}")


def _refuse_other_sizes(config: ModelConfig, released: HuggingFaceWeights) -> None:
    """Before the model is laid out: a wrong number may ask for more tensors, or larger ones, than fit anywhere."""
    tensors = len(released.files)
    least = config.num_hidden_layers + 3 * max(0, config.num_moe_layers) * config.n_routed_experts
    largest = max((max(file.tensor_specs[name].shape, default=0) for name, file in released.files.items()), default=0)
    sizes = {name: value for name, value in asdict(config).items() if name in _SIZES and value is not None}
    problems = [
        Problem(f"config.json: {name}", value, f"the longest side of any tensor is {largest}; {_APART}")
        for name, value in sizes.items()
        if value > largest
    ]
    if least > 2 * tensors + 1000:
        hint = f"asks for at least {least:,} tensors, and the files hold {tensors:,}; {_APART}"
        problems.append(Problem("config.json", least, hint))
    raise_if_any(problems)


def _with_the_mtp_that_is_there(
    config: ModelConfig, released: HuggingFaceWeights, say: Callable[[str], None]
) -> ModelConfig:
    """Transformers writes the number of MTP modules and not their weights."""
    beyond = tuple(
        f"model.layers.{config.num_hidden_layers + depth}." for depth in range(config.num_nextn_predict_layers)
    )
    if config.num_nextn_predict_layers and not any(name.startswith(beyond) for name in released.files):
        depth = config.num_nextn_predict_layers
        say(f"config.json tells of {depth} MTP modules and no file holds their weights: imported without")
        return replace(config, num_nextn_predict_layers=0)
    return config


def _refuse_briefly(problems: list[Problem], source: Path) -> None:
    """A large model has a hundred thousand tensors, and a wrong number in config.json may make all of them wrong."""
    if len(problems) > _MOST_PROBLEMS:
        hint = f"problems of the same kind: {_APART}"
        problems = [*problems[:_MOST_PROBLEMS], Problem(str(source), f"{len(problems) - _MOST_PROBLEMS} more", hint)]
    raise_if_any(problems)


def _misfits(planned: list[TensorMapping], released: HuggingFaceWeights) -> Iterator[Problem]:
    known = set()
    for entry in planned:
        for name in (*entry.hf_names, *entry.hf_duplicates):
            known |= {name, name + SCALE_SUFFIX}
            shape = released.tensor_shape(name)
            if shape is None and name in entry.hf_names:
                yield Problem(name, None, "is in no file of the directory")
            elif shape not in (None, entry.hf_shape):
                yield Problem(name, list(shape or ()), f"must have the shape {list(entry.hf_shape)} by config.json")
            scale = released.tensor_shape(name + SCALE_SUFFIX)
            if scale is not None and len(entry.hf_shape) != 2:
                yield Problem(name + SCALE_SUFFIX, list(scale), f"is no part of this model: {name} is no matrix")
            elif scale is not None and scale != scale_shape(entry.hf_shape):
                hint = f"must have the shape {list(scale_shape(entry.hf_shape))}, a scale for each block"
                yield Problem(name + SCALE_SUFFIX, list(scale), hint)
            dtype = released.tensor_dtype(name)
            if dtype is not None and dtype not in _WEIGHTS:
                yield Problem(name, str(dtype), "is no dtype of a weight: a weight is a floating-point number")
            is_fp8 = dtype == torch.float8_e4m3fn
            if is_fp8 and scale is None:
                yield Problem(name + SCALE_SUFFIX, None, "is in no file of the directory, and the weight is FP8")
            if scale is not None and not is_fp8:
                yield Problem(name + SCALE_SUFFIX, list(scale), f"belongs to an FP8 weight, and {name} is {dtype}")
            if scale is not None and released.tensor_dtype(name + SCALE_SUFFIX) not in _SCALES:
                hint = "is no dtype of a scale: a scale is a floating-point number"
                yield Problem(name + SCALE_SUFFIX, str(released.tensor_dtype(name + SCALE_SUFFIX)), hint)
        yield from _different_copies(entry, released)
    for name in released.files:
        if name not in known and not name.endswith(_IGNORED):
            yield Problem(name, list(released.tensor_shape(name) or ()), "is no part of this model by config.json")


def _different_copies(entry: TensorMapping, released: HuggingFaceWeights) -> Iterator[Problem]:
    """MTP modules share embedding and head with the main model; the files repeat them."""
    names = (entry.hf_names[0], *entry.hf_duplicates)
    fit = [
        name
        for name in names
        if released.tensor_shape(name) == entry.hf_shape and released.tensor_dtype(name) in _WEIGHTS
    ]
    fit = [
        name
        for name in fit
        if released.tensor_dtype(name) != torch.float8_e4m3fn or name + SCALE_SUFFIX in released.files
    ]
    here = [name for name in fit if name != entry.hf_names[0]]
    if here and entry.hf_names[0] in fit:
        main = released.read_weight(entry.hf_names[0])
        for name in here:
            if not torch.equal(released.read_weight(name), main):
                yield Problem(name, "other values", f"must equal {entry.hf_names[0]}: our MTP modules share it")


def _batches(planned: list[TensorMapping]) -> Iterator[list[TensorMapping]]:
    batch: list[TensorMapping] = []
    size = 0
    for entry in planned:
        batch.append(entry)
        size += 4 * torch.Size(entry.shape).numel()
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _piece(entry: TensorMapping, released: HuggingFaceWeights, *, rope_interleave: bool) -> TensorPiece:
    tensor = torch.cat([released.read_weight(name) for name in entry.hf_names])
    if entry.rope_rows is not None and not rope_interleave:
        tensor = rope_to_interleaved(tensor, entry.rope_rows)
    return TensorPiece(entry.name, entry.shape, 0, tensor.reshape(-1), (0,))
