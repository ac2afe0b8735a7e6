"""Import of released weights into a checkpoint of weights and routing biases, some tensors at a time."""

import math
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
from ...comm.errors import ConfigError, Problem, collect_problems, raise_if_any
from ...comm.files.file_io import (
    config_error_context,
    os_error_to_problem,
    read_json,
    read_regular_file,
    unwritable_directory_hint,
)
from ...comm.files.ranges import RELATIVE_PATH
from ...comm.files.strict_json import parse_json, shorten_for_message
from ..checkpoint.pieces import MODEL_STATE, TensorPiece
from ..checkpoint.saver import write_rank_file
from ..checkpoint.store import CheckpointExtras, CheckpointStore
from ..checkpoint.tensor_file import TensorFile, TensorSpec
from ..data.files import split_by_size
from ..data.tokenizer import TOKENIZER_FILE
from ..data.unfinished_directory import WriterLiveness, check_writer_liveness, lock_directory, remove_lock
from ..model.config import ModelConfig
from ..precision.fp8_tensors import Fp8Weight, dequantize_weight
from .config import ignored_config_keys, parse_config_json
from .export import WEIGHT_INDEX_FILE
from .tensor_names import SCALE_SUFFIX, TensorMapping, make_tensor_mappings, reorder_rope_rows
from .tokenizer import COPIED_FILES, special_token_ids

_BATCH_BYTES = 256 * 2**20
"""Most bytes of FP32 weights per file of the checkpoint; a larger tensor gets its own file."""
_MOST_PROBLEMS = 8
_MISMATCH = "config.json and files do not belong together"
_SIZES = frozenset(
    {
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank"),
        *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size", "n_routed_experts"),
        *("n_shared_experts", "num_nextn_predict_layers"),
    }
)
"""Model fields that are a dimension of some tensor, or never exceed the largest one."""
_IGNORED = ("rotary_emb.inv_freq",)
"""Name endings of tensors in old files that follow from the configuration."""
_FETCH = "download it again"
_WEIGHTS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn})
"""Dtypes that a weight may have."""
_ATTACHMENT_BYTES = 2**28
_SCALES = _WEIGHTS | {torch.float8_e8m0fnu}
_CONFIG_BYTES, _INDEX_BYTES = 2**24, 2**28
"""Largest files that are read; DeepSeek-V3's have 2 kB and 9 MB."""
_LISTED = 12
"""Most names in a line about ignored items."""


@dataclass(frozen=True)
class HuggingFaceWeights:
    """Tensors of a directory by name, across its files."""

    directory: Path
    files: Mapping[str, TensorFile]
    """File of each tensor, by the tensor's name."""

    @staticmethod
    def open(directory: Path) -> "HuggingFaceWeights":
        """Read the headers. Raises `ConfigError` for files that are missing or no safetensors files."""
        index = _weight_map(directory)
        names = ["model.safetensors"] if index is None else sorted(set(index.values()))
        problems: list[Problem] = []
        files: dict[str, TensorFile] = {}
        for path in (directory / name for name in names):
            unreadable = config_error_context(path, f"cannot be read; {_FETCH}", unreadable_fix=_FETCH)
            with collect_problems(problems), unreadable:
                file = TensorFile(path)
                for name in file.tensor_specs:
                    if name in files:
                        hint = f"is also in {files[name].path.name}; remove one of the files"
                        problems.append(Problem(name, path.name, hint))
                    files[name] = file
        for name, where in (index or {}).items():
            if not problems and (name not in files or files[name].path != directory / where):
                hint = f"does not hold {name}, which {WEIGHT_INDEX_FILE} says; {_FETCH}"
                problems.append(Problem(str(directory / where), None, hint))
        _raise_first_problems(problems, directory)
        return HuggingFaceWeights(directory, files)

    def tensor_spec(self, name: str) -> TensorSpec | None:
        """Return dtype and shape of a tensor, or None if it does not exist."""
        return self.files[name].tensor_specs[name] if name in self.files else None

    def read_weight(self, name: str) -> Tensor:
        """Return a weight in FP32, dequantized if it is stored in FP8. Raises `ConfigError` for NaN or Inf."""
        tensor = self._raw(name)
        if name + SCALE_SUFFIX in self.files:
            scales = self._raw(name + SCALE_SUFFIX).to(torch.float32)
            weight = dequantize_weight(Fp8Weight(tensor, scales), torch.float32)
        else:
            weight = tensor.to(torch.float32)
        if not torch.isfinite(weight).all():
            count = int((~torch.isfinite(weight)).sum())
            where = f"{self.files[name].path}: {name}"
            what = f"{count:,} of {weight.numel():,} elements not finite"
            raise ConfigError([Problem(where, what, "weights and biases must be finite; download it again")])
        return weight

    def _raw(self, name: str) -> Tensor:
        file = self.files[name]
        with config_error_context(file.path, _FETCH):
            return file.read_tensor(name)


def import_huggingface_weights(source: Path, target: Path, say: Callable[[str], None]) -> Path:
    """Write the weights of `source` to `target` as the checkpoint of step 0; return its path.

    Raises `ConfigError`, before anything is written, with all tensors that are missing, unknown or of another shape.
    """
    _check_paths(source, target)
    store = CheckpointStore(target, keep_last=1)
    if store.steps():
        raise ConfigError([Problem("target", str(target), "holds checkpoints already; name another directory")])
    tree = _config_json(source)
    released = HuggingFaceWeights.open(source)
    config = _without_missing_mtp(parse_config_json(tree, Path(os.path.realpath(source)).name), released, say)
    _check_sizes(config, released)
    planned = make_tensor_mappings(config)
    _raise_first_problems(list(_misfits(planned, released)), source)
    attachments = _attachments(source)
    _report_ignored(source, tree, planned, released, say)
    rope_interleave = tree.get("rope_interleave", True) is not False
    _clear_partial(store.partial_path(0), say)
    with _cleanup_on_error(store):
        target.mkdir(parents=True, exist_ok=True)
        store.prepare_save(0)
        with lock_directory(store.partial_path(0)):
            batches = split_by_size(planned, lambda entry: 4 * math.prod(entry.shape), _BATCH_BYTES)
            for number, batch in enumerate(batches):
                pieces = [_piece(entry, released, rope_interleave=rope_interleave) for entry in batch]
                write_rank_file(store.partial_path(0), f"part_{number:05d}", pieces)
                size = sum(piece.nbytes for piece in pieces)
                say(f"read {size / 1e6:,.1f} MB (last tensor: {batch[-1].name.removeprefix(f'{MODEL_STATE}/')})")
            remove_lock(store.partial_path(0))
        metadata = {"version": __version__, "step": 0, "config": {"model": asdict(config)}, "source": tree}
        return store.commit_save(0, CheckpointExtras(metadata, attachments, frozenset(entry.name for entry in planned)))


def _clear_partial(partial: Path, say: Callable[[str], None]) -> None:
    """Remove the leftovers of a killed import. Raises `ConfigError` if another one is running."""
    if check_writer_liveness(partial) is WriterLiveness.ALIVE:
        hint = "another import is writing it; wait for its end, or name another directory"
        raise ConfigError([Problem("target", str(partial), hint)])
    if partial.is_dir():
        say(f"{partial} was left by a process that was killed; it is removed.")
        shutil.rmtree(partial)


@contextmanager
def _cleanup_on_error(store: CheckpointStore) -> Iterator[None]:
    """Remove the target and the folders created above it if the import fails."""
    target = store.directory
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        yield
    except BaseException as error:
        store.discard_partial_save(0)
        for folder in made:  # innermost first; a folder that holds anything else stays
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise ConfigError([os_error_to_problem(error, target, unwritable_directory_hint(error))]) from error
        raise


def _check_paths(source: Path, target: Path) -> None:
    """Raise `ConfigError` for a target that cannot be written, or that lies inside the source."""
    places = {"source": str(source), "target": str(target)}
    nul = "holds a NUL character, which no name of a file has"
    raise_if_any(Problem(key, name, nul) for key, name in places.items() if "\0" in name)
    if os.path.lexists(target) and not target.is_dir():
        raise ConfigError([Problem("target", str(target), "is no directory; name another")])
    if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(source)):
        raise ConfigError([Problem("target", str(target), f"is the source {source}, or lies inside it; name another")])


def _config_json(source: Path) -> dict[str, Any]:
    """Return the contents of `config.json`. Raises `ConfigError`."""
    path = source / "config.json"
    if not os.path.lexists(path):
        hint = "holds no config.json; name a directory of released weights"
        raise ConfigError([Problem("source", str(source), hint)])
    if path.is_symlink() and not path.exists():
        raise ConfigError([Problem(str(path), f"a link to {path.readlink()}", f"leads to no file; {_FETCH}")])
    with config_error_context(path, _FETCH):
        return read_json(path, _CONFIG_BYTES).as_mapping()


def _weight_map(directory: Path) -> dict[str, str] | None:
    """Return the file of each tensor by the index, or None without an index. Raises `ConfigError`."""
    path = directory / WEIGHT_INDEX_FILE
    if not path.exists():
        return None
    with config_error_context(path, _FETCH):
        tree = read_json(path, _INDEX_BYTES)
        found = {name: file.as_text_in(RELATIVE_PATH) for name, file in tree["weight_map"].items()}
        if not found:
            raise tree["weight_map"].malformed_error("names no tensor")
        return found


def _attachments(source: Path) -> dict[str, bytes]:
    """Return the files that are copied with the weights. Raises `ConfigError` for a malformed one."""
    found = {}
    for name in COPIED_FILES:
        path = source / name
        if path.exists() or path.is_symlink():
            with config_error_context(path, "download it again, or remove it"):
                found[name] = read_regular_file(path, _ATTACHMENT_BYTES)
                if name == TOKENIZER_FILE:
                    special_token_ids({name: found[name]})
                elif name.endswith(".json"):
                    parse_json(found[name]).as_mapping()
    return found


def _report_ignored(
    source: Path,
    tree: Mapping[str, Any],
    planned: Sequence[TensorMapping],
    released: HuggingFaceWeights,
    say: Callable[[str], None],
) -> None:
    """Report the files, keys and tensors of the source that are not imported, one line each."""
    weights = {file.path.relative_to(source).parts[0] for file in released.files.values()}
    read = {"config.json", WEIGHT_INDEX_FILE, *COPIED_FILES, *weights}
    shared = {name for entry in planned for name in entry.hf_duplicates if name in released.files}
    ignored = [name for name in released.files if name.endswith(_IGNORED)]
    for what, names in (
        ("files not read", sorted(path.name for path in source.iterdir() if path.name not in read)),
        ("unsupported keys of config.json", ignored_config_keys(tree)),
        ("tensors that follow from config.json", sorted(ignored)),
        ("tensors that repeat the main model's", sorted(shared)),
    ):
        if names:
            more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            shown = ", ".join(ascii(name)[1:-1] for name in map(str, map(shorten_for_message, names[:_LISTED])))
            say(f"left out, {len(names)} {what}: {shown}{more}")


def _check_sizes(config: ModelConfig, released: HuggingFaceWeights) -> None:
    """Raise `ConfigError` if `config` has more or larger tensors than the files."""
    # Checked before the model is built: a wrong number may ask for more than any memory holds.
    tensors = len(released.files)
    least = config.num_hidden_layers + 3 * max(0, config.num_moe_layers) * config.n_routed_experts
    largest = max((max(file.tensor_specs[name].shape, default=0) for name, file in released.files.items()), default=0)
    sizes = {name: value for name, value in asdict(config).items() if name in _SIZES and value is not None}
    problems = [
        Problem(f"config.json: {name}", value, f"the largest dimension of any tensor is {largest}; {_MISMATCH}")
        for name, value in sizes.items()
        if value > largest
    ]
    if least > 2 * tensors + 1000:
        hint = f"asks for at least {least:,} tensors, and the files hold {tensors:,}; {_MISMATCH}"
        problems.append(Problem("config.json", least, hint))
    raise_if_any(problems)


def _without_missing_mtp(config: ModelConfig, released: HuggingFaceWeights, say: Callable[[str], None]) -> ModelConfig:
    """Return `config` without MTP if the files hold no MTP weights: transformers writes only their number."""
    depth, layers = config.num_nextn_predict_layers, config.num_hidden_layers
    beyond = tuple(f"model.layers.{number}." for number in range(layers, layers + depth))
    if depth and not any(name.startswith(beyond) for name in released.files):
        say(f"config.json has {depth} MTP modules, but no file holds their weights: imported without them")
        return replace(config, num_nextn_predict_layers=0)
    return config


def _raise_first_problems(problems: list[Problem], source: Path) -> None:
    """Raise `ConfigError` with the first `_MOST_PROBLEMS` of `problems`, if any."""
    # A large model has a hundred thousand tensors, and one wrong number in config.json may make all of them wrong.
    if len(problems) > _MOST_PROBLEMS:
        hint = f"problems of the same kind: {_MISMATCH}"
        problems = [*problems[:_MOST_PROBLEMS], Problem(str(source), f"{len(problems) - _MOST_PROBLEMS} more", hint)]
    raise_if_any(problems)


def _misfits(planned: list[TensorMapping], released: HuggingFaceWeights) -> Iterator[Problem]:
    for entry in planned:
        for name in entry.all_hf_names:
            yield from _weight_misfits(name, entry, released)
        yield from _different_copies(entry, released)
    known = {name + suffix for entry in planned for name in entry.all_hf_names for suffix in ("", SCALE_SUFFIX)}
    for name, file in released.files.items():
        if name not in known and not name.endswith(_IGNORED):
            yield Problem(name, list(file.tensor_specs[name].shape), "is no part of this model by config.json")


def _weight_misfits(name: str, entry: TensorMapping, released: HuggingFaceWeights) -> Iterator[Problem]:
    """Yield a problem for each way in which a weight and its scales do not fit `entry` or each other."""
    scale_name = name + SCALE_SUFFIX
    weight, scale = released.tensor_spec(name), released.tensor_spec(scale_name)
    is_fp8 = weight is not None and weight.dtype == torch.float8_e4m3fn
    if weight is None and name in entry.hf_names:
        yield Problem(name, None, "is in no file of the directory")
    elif weight is not None and weight.shape != entry.hf_shape:
        yield Problem(name, list(weight.shape), f"must have the shape {list(entry.hf_shape)} by config.json")
    if scale is not None and len(entry.hf_shape) != 2:
        yield Problem(scale_name, list(scale.shape), f"is no part of this model: {name} is no matrix")
    elif scale is not None and scale.shape != entry.hf_scale_shape:
        hint = f"must have the shape {list(entry.hf_scale_shape)}, a scale for each block"
        yield Problem(scale_name, list(scale.shape), hint)
    if weight is not None and weight.dtype not in _WEIGHTS:
        yield Problem(name, str(weight.dtype), "is no dtype of a weight: a weight is a floating-point number")
    if is_fp8 and scale is None:
        yield Problem(scale_name, None, "is in no file of the directory, and the weight is FP8")
    if scale is not None and not is_fp8:
        hint = f"belongs to an FP8 weight, and {name} is {weight and weight.dtype}"
        yield Problem(scale_name, list(scale.shape), hint)
    if scale is not None and scale.dtype not in _SCALES:
        yield Problem(scale_name, str(scale.dtype), "is no dtype of a scale: a scale is a floating-point number")


def _different_copies(entry: TensorMapping, released: HuggingFaceWeights) -> Iterator[Problem]:
    """Yield a problem for each copy of embedding or head in MTP modules that differs from the main model's."""

    def is_readable(name: str) -> bool:
        found = released.tensor_spec(name)
        if found is None or found.shape != entry.hf_shape or found.dtype not in _WEIGHTS:
            return False
        scale, is_fp8 = released.tensor_spec(name + SCALE_SUFFIX), found.dtype == torch.float8_e4m3fn
        return (scale is None or scale.shape == entry.hf_scale_shape) and is_fp8 == (scale is not None)

    main, copies = entry.hf_names[0], [name for name in entry.hf_duplicates if is_readable(name)]
    if copies and is_readable(main):
        weight = released.read_weight(main)
        for name in copies:
            if not torch.equal(released.read_weight(name), weight):
                yield Problem(name, "other values", f"must equal {main}: MTP modules share it")


def _piece(entry: TensorMapping, released: HuggingFaceWeights, *, rope_interleave: bool) -> TensorPiece:
    tensor = torch.cat([released.read_weight(name) for name in entry.hf_names])
    if entry.rope_rows is not None and not rope_interleave:
        tensor = reorder_rope_rows(tensor, entry.rope_rows, to_halves=False)
    return TensorPiece(entry.name, entry.shape, 0, tensor.reshape(-1), (0,))
