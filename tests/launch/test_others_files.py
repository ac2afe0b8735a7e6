"""Files from others at the verbs that read them: one clear refusal, exit code 2, nothing left, nothing unsaid."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoestring.comm.errors import ConfigError
from shoestring.launch.cli import main
from shoestring.launch.run.restart_policy import note_end, note_stop
from shoestring.launch.run.run_dir import clear_status, own, read_status, reserve_status, write_config, write_status
from shoestring.launch.verbs.convert import export_command, import_command
from shoestring.tests.launch.report.recorded import record_run
from shoestring.tests.trainer.checkpoint.saved import save_model
from shoestring.trainer.checkpoint.manifest import CheckpointManifest
from shoestring.trainer.data.tokenizer import train_tokenizer
from shoestring.trainer.model.config import ModelConfig, YarnConfig
from shoestring.trainer.model.init import initialize
from shoestring.trainer.model.model import Model

SHAPE = ModelConfig(
    hidden_size=16,
    num_hidden_layers=2,
    vocab_size=300,
    n_routed_experts=8,
    moe_intermediate_size=8,
    intermediate_size=16,
    initializer_range=0.2,
)
TEXT = " ".join(f"word{index * 7919 % 211}" for index in range(2000))
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, `run`, and its export, `hf`."""
    root = tmp_path_factory.mktemp("others")
    model = Model(SHAPE)
    initialize(model, 1)
    attachments = {"tokenizer.json": train_tokenizer([TEXT], 300).to_json().encode()}
    save_model(model, root / "run" / "checkpoints", 4, attachments)
    with pytest.raises(SystemExit):
        main(["export", str(root / "run"), str(root / "hf"), "--dtype", "fp32"])
    return root


@pytest.fixture
def hf(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "hf", tmp_path / "hf"))


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "run", tmp_path / "run"))


def shoestring(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    output, errors = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, output, errors


def refused_import(capsys: pytest.CaptureFixture[str], hf: Path) -> str:
    """The words of a refusal that leaves nothing behind, not even the folder above the target."""
    target = hf.parent / "made" / "for" / "it"
    code, _, errors = shoestring(capsys, "import", hf, target)
    assert code == 2, errors
    assert "Traceback" not in errors
    assert not (hf.parent / "made").exists()
    return errors


def edit_config(hf: Path, **values: object) -> None:
    path = hf / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("self_attn.o_proj.weight", NAN),
        ("e_score_correction_bias", INF),
        ("input_layernorm.weight", -INF),
        ("experts.7.down_proj.weight", NAN),
        ("embed_tokens.weight", INF),
        ("lm_head.weight", NAN),
    ],
)
def test_a_weight_or_bias_that_is_not_finite_is_named(
    name: str, value: float, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(hf / "model.safetensors")
    if name == "embed_tokens.weight":  # the MTP modules repeat it
        keys = [key for key in tensors if key.endswith(name)]
    else:
        keys = [key for key in tensors if key.endswith(name)][:1]
    for key in keys:
        tensors[key].view(-1)[0] = value
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    errors = refused_import(capsys, hf)
    assert keys[0] in errors
    assert "1 of " in errors
    assert "elements not finite" in errors


def test_a_number_too_large_for_fp32_is_not_made_infinite(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(hf / "model.safetensors")
    tensors["model.norm.weight"] = torch.full((16,), 1e300, dtype=torch.float64)
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight" in refused_import(capsys, hf)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.int16])
def test_a_whole_number_is_no_weight(dtype: torch.dtype, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(hf / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(16, dtype=dtype)
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    errors = refused_import(capsys, hf)
    assert "model.norm.weight" in errors
    assert "dtype" in errors


@pytest.mark.parametrize(
    ("values", "gist"),
    [
        ({"hidden_size": "16"}, "hidden_size = '16': must be a whole number"),
        ({"hidden_size": 16.0}, "hidden_size = 16.0: must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True: must be a whole number"),
        ({"vocab_size": None}, "vocab_size = None: must be a whole number"),
        ({"n_routed_experts": [8]}, "n_routed_experts = [8]: must be a whole number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6': must be a number"),
        ({"norm_topk_prob": 1}, "norm_topk_prob = 1: must be true or false"),
        ({"attention_bias": 0}, "attention_bias = 0: cannot be imported"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"type": "yarn", "factor": "2"}}, "factor = '2': must be a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_max_position_embeddings = None: is missing"),
        ({"rope_scaling": {"type": ["yarn"]}}, "type = ['yarn']: must be text"),
        ({"quantization_config": "fp8"}, "only fp8 with weight_block_size"),
        ({"hidden_size": 10**5}, "the longest side of any tensor is 300"),
        ({"n_routed_experts": 4096}, "do not belong together"),
        ({"num_hidden_layers": 4096}, "do not belong together"),
        ({"hidden_size": 10**30}, "must be from 0 to"),
        ({"q_lora_rank": -1}, "q_lora_rank = -1: must be from 0"),
        ({"num_nextn_predict_layers": "1"}, "num_nextn_predict_layers = '1': must be a whole number"),
        ({"eos_token_id": "2"}, "eos_token_id = '2': must be a whole number"),
        ({"eos_token_id": [1, None]}, "eos_token_id[1] = None: must be a whole number"),
        ({"max_position_embeddings": 0}, "max_position_embeddings = 0: must be from 1"),
        ({"rope_interleave": "yes"}, "rope_interleave = 'yes': must be true or false"),
        ({"rope_scaling": YARN | {"factor": 1e308}}, "factor = 1e+308: must be from 0 to"),
        ({"rope_scaling": YARN | {"factor": 2.0**20}}, "makes a context of more than 2147483648 positions"),
        ({"rope_scaling": YARN | {"factor": 10**400}}, "must be a finite number"),
        ({"rope_scaling": YARN | {"mscale": 1e300}}, "mscale = 1e+300: must be from 0 to 1000"),
        ({"routed_scaling_factor": 1e300}, "routed_scaling_factor = 1e+300: must be from 0 to 1e+06"),
        ({"rope_theta": 1e300}, "rope_theta = 1e+300: must be from 0 to 1e+18"),
        ({"architectures": 5}, "architectures = 5: must be a list"),
        ({"architectures": ["LlamaForCausalLM"]}, "our model is DeepseekV3ForCausalLM alone"),
        ({"torch_dtype": 7}, "torch_dtype = 7: must be text"),
        ({"dtype": {"x": 1}}, "dtype = {'x': 1}: must be text"),
        ({"dtype": "int8"}, "dtype = 'int8': must be one of bfloat16"),
        ({"eos_token_id": 999999}, "eos_token_id = 999999: must be from -1 to 299"),
        ({"eos_token_id": [1, 300]}, "eos_token_id[1] = 300: must be from 0 to 299"),
        ({"bos_token_id": 300}, "bos_token_id = 300: must be from -1 to 299"),
    ],
)  # fmt: skip
def test_a_config_json_of_wrong_values_is_refused(
    values: dict[str, object], gist: str, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(hf, **values)
    assert gist in refused_import(capsys, hf)


@pytest.mark.parametrize(
    ("raw", "gist"),
    [
        (b"", "is not JSON"),
        (b"[]", "must be a mapping"),
        (b"\xff\xfe", "is not UTF-8"),
        (b'{"a":' * 50_000, "nested more than 64 deep"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "stands there twice"),
        (b'{"rope_theta": Infinity}', "no number is NaN or infinite"),
        (b'{"not_read": 1e999}', "1e999': is larger than any finite number"),
        (b'{"quantization_config": {"x": [-1e999]}}', "-1e999': is larger than any finite number"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
    ],
)
def test_a_config_json_that_is_none_is_refused(
    raw: bytes, gist: str, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hf / "config.json").write_bytes(raw)
    assert gist in refused_import(capsys, hf)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_entry(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["model.norm.weight"].update(values)


def overlap(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"] = header["lm_head.weight"]["data_offsets"][:1] * 2
    begin = header["lm_head.weight"]["data_offsets"][0]
    header["model.norm.weight"]["data_offsets"] = [begin, begin + 64]


@pytest.mark.parametrize(
    ("edit", "gist"),
    [
        (edit_entry(dtype="F8_E5M2"), "is a dtype that is not read"),
        (edit_entry(dtype=5), "must be text"),
        (edit_entry(shape=[16.0]), "must be a whole number"),
        (edit_entry(shape=[-16]), "must be from 0"),
        (edit_entry(shape=[2**62, 2**62]), f"where dtype F32 and shape [{2**62}, {2**62}] ask for"),
        (edit_entry(dtype="BOOL"), "64 bytes, where dtype BOOL and shape [16] ask for 16"),
        (edit_entry(shape=None), "must be a list"),
        (edit_entry(data_offsets=[0]), "must be two numbers"),
        (edit_entry(data_offsets=[64, 0]), "where dtype F32 and shape [16] ask for 64"),
        (edit_entry(data_offsets=["0", 64]), "must be a whole number"),
        (edit_entry(data_offsets=[10**12, 10**12 + 64]), "must begin at byte"),
        (edit_entry(other=1), "is no key of this format"),
        (overlap, "must begin at byte"),
        (lambda header: header.update(extra=5), "must be a mapping"),
        (lambda header: header.update(__metadata__={"a": 1}), "must be text"),
        (lambda header: header.update(__metadata__=[]), "must be a mapping"),
    ],
)
def test_a_safetensors_header_of_wrong_values_is_refused(
    edit: Callable[[dict[str, Any]], None], gist: str, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header, data = header_of(hf / "model.safetensors")
    edit(header)
    with_header(hf / "model.safetensors", header, data)
    errors = refused_import(capsys, hf)
    assert gist in errors
    assert "model.safetensors" in errors


def no_file(path: Path) -> None:
    path.unlink()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("/not/mounted/file")


@pytest.mark.parametrize("harm", [fifo, folder, device, dangling])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_what_is_no_regular_file_is_refused(
    name: str, harm: Callable[[Path], None], hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(hf / name)
    errors = refused_import(capsys, hf)
    assert name in errors


@pytest.mark.parametrize(
    ("tree", "gist"),
    [
        ({"weight_map": {"a": "/etc/passwd"}}, "must name a file inside the folder"),
        ({"weight_map": {"a": "/dev/zero"}}, "must name a file inside the folder"),
        ({"weight_map": {"a": "../hf/model.safetensors"}}, "must name a file inside the folder"),
        ({"weight_map": {"a": ""}}, "must name a file inside the folder"),
        ({"weight_map": {"a": 5}}, "must be text"),
        ({"weight_map": {}}, "names no tensor"),
        ({"weight_map": ["model.safetensors"]}, "must be a mapping"),
        ({}, "weight_map = None: is missing"),
        ({"weight_map": {"a": "absent.safetensors"}}, "No such file"),
        ({"weight_map": {"no.such.tensor": "model.safetensors"}}, "does not hold no.such.tensor"),
    ],
)
def test_an_index_names_files_of_its_folder(
    tree: object, gist: str, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hf / "model.safetensors.index.json").write_text(json.dumps(tree))
    assert gist in refused_import(capsys, hf)


def test_a_cache_of_links_is_imported(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blobs = hf.parent / "blobs"
    blobs.mkdir()
    for path in list(hf.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert shoestring(capsys, "import", hf, hf.parent / "imported")[0] == 0


@pytest.mark.parametrize("eos", [7, [7, 9]])
def test_import_then_export_keeps_what_the_source_said(
    eos: object, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"bos_token_id": 0, "eos_token_id": eos, "pad_token_id": 3, "max_position_embeddings": 64}
    edit_config(hf, **said, ep_size=1, auto_map={"AutoModel": "code.Class"})
    generation = '{"temperature": 0.6}'
    (hf / "generation_config.json").write_text(generation)
    (hf / "notes.md").touch()
    (hf / "code").mkdir()
    code, output, _ = shoestring(capsys, "import", hf, tmp_path / "ours")
    assert code == 0
    assert "left out, 2 files not read: code, notes.md" in output
    assert "left out, 2 keys of config.json without a meaning here: auto_map, ep_size" in output
    code, output, _ = shoestring(capsys, "export", tmp_path / "ours", tmp_path / "back", "--dtype", "fp32")
    assert code == 0
    assert "auto_map, ep_size" in output
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: back[key] for key in said} == said
    assert (tmp_path / "back" / "generation_config.json").read_text() == generation
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


def part(run: Path) -> Path:
    (found,) = (run / "checkpoints" / "step_00000004").glob("part_*.safetensors")
    return found


@pytest.mark.parametrize("place", [0, 3, 9, 12, 40, 200, 2000])
def test_verify_finds_a_damaged_header(place: int, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = bytearray(part(run).read_bytes())
    raw[place] ^= 1
    part(run).write_bytes(raw)
    code, output, errors = shoestring(capsys, "checkpoint", "verify", run)
    assert (code, errors) == (1, "")
    assert f"{part(run)}: its header is damaged" in output


def test_verify_reads_every_bit_of_a_header(run: Path) -> None:
    """Also where the safetensors library opens the file as if nothing were wrong."""
    from shoestring.trainer.checkpoint.opened import Checkpoint

    checkpoint = Checkpoint.open(part(run).parent)
    assert list(checkpoint.damage()) == []
    whole = part(run).read_bytes()
    opened = 0
    for place in range(8, 8 + int.from_bytes(whole[:8], "little"), 97):
        raw = bytearray(whole)
        raw[place] ^= 1 << place % 8
        part(run).write_bytes(raw)
        assert any("header is damaged" in line for line in checkpoint.damage()), place
        try:
            with safe_open(part(run), "pt"):
                opened += 1
        except (SafetensorError, RuntimeError, UnicodeDecodeError):
            pass
    assert opened > 0


def test_verify_does_not_send_to_itself(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (part(run).parent / "manifest.json").write_text("{}")
    code, output, _ = shoestring(capsys, "checkpoint", "verify", run)
    assert code == 1
    assert "its SHA-256 is not that in complete" in output
    assert "checkpoint verify`" not in output


def reseal(checkpoint: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = checkpoint / "manifest.json"
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))
    (checkpoint / "complete").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


def first_piece(tree: dict[str, Any]) -> list[Any]:
    piece: list[Any] = next(iter(tree["tensors"].values()))[2][0]
    return piece


@pytest.mark.parametrize(
    "edit",
    [
        lambda tree: tree["files"].update({"/etc/passwd": 10}),
        lambda tree: tree["files"].update({"../x": 10}),
        lambda tree: tree["files"].update({"": 10}),
        lambda tree: tree["files"].update(dict.fromkeys(tree["files"], "10")),
        lambda tree: tree["attachments"][0].update(file="/dev/zero", bytes=0),
        lambda tree: tree["attachments"][0].update(file="manifest.json"),
        lambda tree: tree["attachments"][0].update(sha256=None),
        lambda tree: tree["attachments"].append(tree["attachments"][0]),
        lambda tree: tree.update(attachments={}),
        lambda tree: tree.update(tensors=[]),
        lambda tree: tree.update(extra=1),
        lambda tree: tree.pop("facts"),
        lambda tree: first_piece(tree).__setitem__(0, "/etc/passwd"),
        lambda tree: first_piece(tree).__setitem__(1, -8),
        lambda tree: first_piece(tree).__setitem__(1, 10**15),
        lambda tree: first_piece(tree).__setitem__(1, 0.5),
        lambda tree: first_piece(tree).__setitem__(2, 1),
        lambda tree: first_piece(tree).__setitem__(3, True),
        lambda tree: first_piece(tree).__setitem__(3, 10**18),
        lambda tree: first_piece(tree).append(1),
        lambda tree: next(iter(tree["tensors"].values())).__setitem__(0, "F4"),
        lambda tree: next(iter(tree["tensors"].values())).__setitem__(1, [10**9, 10**9]),
        lambda tree: next(iter(tree["tensors"].values())).__setitem__(2, []),
    ],
)
def test_a_resealed_manifest_is_damaged_and_no_other_file_is_opened(
    edit: Callable[[dict[str, Any]], object], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reseal(part(run).parent, edit)
    code, output, _ = shoestring(capsys, "checkpoint", "verify", run)
    assert code == 1
    assert "manifest.json" in output
    for verb in (["export", run, run / "out"], ["generate", run, "--prompt", "word"]):
        code, _, errors = shoestring(capsys, *verb)
        assert code == 2
        assert "manifest.json" in errors
        assert "is damaged" in errors
    code, output, _ = shoestring(capsys, "checkpoint", "ls", run, "--format", "json")
    assert code == 0
    assert json.loads(output)[0]["state"].startswith("damaged: ")


@pytest.mark.parametrize(
    "edit",
    [
        lambda tree: tree["facts"].pop("config"),
        lambda tree: tree["facts"].update(config=5),
        lambda tree: tree["facts"]["config"].update(model=[]),
        lambda tree: tree["facts"]["config"]["model"].update(hidden="16"),
        lambda tree: tree["facts"]["config"]["model"].update(hidden=-1),
        lambda tree: tree["facts"]["config"]["model"].update(color=1),
        lambda tree: tree["facts"]["config"]["training"].update(sequence_length="long"),
    ],
)
def test_resealed_facts_are_refused_where_they_are_needed(
    edit: Callable[[dict[str, Any]], object], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reseal(part(run).parent, edit)
    for verb in (["export", run, run / "out"], ["generate", run, "--prompt", "word"]):
        code, _, errors = shoestring(capsys, *verb)
        assert code == 2, errors
        assert "manifest.json" in errors
    assert not (run / "out").exists()
    assert shoestring(capsys, "checkpoint", "ls", run)[0] == 0


@pytest.mark.parametrize(
    "raw", [b"", b"{", b'{"exit_code": 0, "rea', b"[]", b"{}", b"\0" * 40, b"null",
            b'{"exit_code": "0", "reason": "done"}', b'{"exit_code": true, "reason": "done"}',
            b'{"exit_code": 0, "reason": 5}', b'{"exit_code": 700, "reason": ""}', b"\xff", b"[" * 99999]
)  # fmt: skip
def test_a_status_that_cannot_be_read_counts_as_absent_and_is_told(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "run_status.json").write_bytes(raw)
    said: list[str] = []
    assert read_status(tmp_path, said.append) is None
    assert len(said) == 1
    assert str(tmp_path / "run_status.json") in said[0]
    write_status(tmp_path, 75, "stopped")
    assert read_status(tmp_path, said.append) == {"exit_code": 75, "reason": "stopped"}
    assert len(said) == 1
    clear_status(tmp_path)
    assert read_status(tmp_path, said.append) is None
    assert len(said) == 1


@pytest.mark.parametrize("harm", [fifo, folder, device, dangling])
def test_a_status_that_is_no_file_counts_as_absent(harm: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "run_status.json").touch()
    harm(tmp_path / "run_status.json")
    assert read_status(tmp_path, lambda _: None) is None


def test_state_of_a_run_is_written_through_no_link(tmp_path: Path) -> None:
    from shoestring.trainer.ledger.allocation import Allocation
    from shoestring.trainer.ledger.config import BudgetConfig
    from shoestring.trainer.telemetry.events import EventStream

    treasure = tmp_path / "treasure"
    treasure.write_text("mine")
    run_dir = tmp_path / "run"
    own(run_dir)
    (run_dir / "ledger").mkdir()
    for name in ("config.yaml", "run_status.json", "ledger/heartbeat.new", "ledger/heartbeat.json",
                 "ledger/heartbeat.json.new", "config.yaml.new", "ended", "stops_without_step",
                 "stops_without_step.new", "run_status.reserve"):  # fmt: skip
        (run_dir / name).symlink_to(treasure)
    reserve_status(run_dir)
    note_stop(run_dir, progressed=False)
    note_end(run_dir, "a", 0)
    write_config(run_dir, "a: 1\n")
    write_status(run_dir, 0, "done")
    Allocation(run_dir, ranks=1, attempt="a", budget=BudgetConfig(gpu_hours=1), beat_seconds=1000).close("done")
    assert treasure.read_text() == "mine"
    assert (run_dir / "config.yaml").read_text() == "a: 1\n"
    budget = BudgetConfig(gpu_hours=1)
    for name, make in (
        ("metrics.jsonl", lambda: EventStream(run_dir, [])),
        ("ledger/allocation.jsonl", lambda: Allocation(run_dir, ranks=1, attempt="b", budget=budget)),
    ):
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).symlink_to(treasure)
        with pytest.raises(Exception, match=r"a run writes through no link"):
            make()
    assert treasure.read_text() == "mine"


def corpus(root: Path) -> tuple[Path, list[str]]:
    folder = root / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXT)
    (folder / "v.txt").write_text(TEXT[:300])
    data = [f"data.corpus={folder}", f"data.prepared={root / 'prepared'}", "data.validation=[v]"]
    return folder, ["data", "prepare", *data, "data.vocabulary=300", "model.vocab_size=300"]


def test_prepare_counts_and_names_what_it_does_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, verb = corpus(tmp_path)
    (folder / "sub" / "more.txt").write_text(TEXT)
    (folder / "UPPER.TXT").write_text(TEXT)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"x"))
    (folder / "readme.md").touch()
    os.mkfifo(folder / "p.txt")
    (folder / "d.jsonl").symlink_to("/dev/zero")
    code, output, errors = shoestring(capsys, *verb)
    assert code == 0, errors
    assert "6 entries were not read: UPPER.TXT, b.jsonl.gz, d.jsonl, p.txt, readme.md, sub." in output


@pytest.mark.parametrize("name", ["big.txt", "big.jsonl"])
def test_a_link_of_a_corpus_that_leads_nowhere_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, verb = corpus(tmp_path)
    (folder / name).symlink_to("/not/mounted/big")
    code, _, errors = shoestring(capsys, *verb)
    assert code == 2
    assert f"{folder / name} = '/not/mounted/big': is a link that leads nowhere" in errors
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    ("raw", "gist"),
    [
        (b'{"text": "a", "text": "b"}\n', "a key stands twice"),
        (b"[" * 90_000 + b"\n", "is not JSON"),
        (b'{"text": 5}\n', "must be an object with a string"),
        (b'{"text": "\xff"}\n', "is not UTF-8"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", "is not JSON"),
    ],
)
def test_a_line_of_a_corpus_that_cannot_be_used_is_named(
    raw: bytes, gist: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, verb = corpus(tmp_path)
    (folder / "w.jsonl").write_bytes(raw)
    code, _, errors = shoestring(capsys, *verb)
    assert code == 2
    assert "w.jsonl" in errors
    assert gist in errors


@pytest.mark.parametrize("sign", ["a", "7", "=", " ", "\n", "語"])
def test_a_word_without_end_is_refused(sign: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The time to learn merges grows with the square of the length of a word."""
    folder, verb = corpus(tmp_path)
    (folder / "w.jsonl").write_text(json.dumps({"text": "a word"}) + "\n" + json.dumps({"text": "b" + sign * 100_000}))
    code, _, errors = shoestring(capsys, *verb)
    assert code == 2
    assert "w.jsonl = 'document 2': holds a word of more than 32768 letters, digits, signs or blanks" in errors


def test_a_long_text_without_blanks_is_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, verb = corpus(tmp_path)
    (folder / "w.txt").write_text("a1," * 50_000)
    assert shoestring(capsys, *verb)[0] == 0


def test_a_directory_that_links_to_itself_is_refused(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, verb = corpus(tmp_path)
    (tmp_path / "prepared").symlink_to("prepared")
    for name in ("prepare", "inspect"):
        code, _, errors = shoestring(capsys, "data", name, *verb[2:])
        assert code == 2
        assert "prepared" in errors
    for arguments in (["import", tmp_path / "prepared", tmp_path / "made"], ["budget", tmp_path / "prepared"]):
        assert shoestring(capsys, *arguments)[0] == 2


def test_names_from_others_send_nothing_to_the_terminal(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(hf, **{"\x1b[31mred": 1, "x" * 5000: 2})
    code, output, _ = shoestring(capsys, "import", hf, hf.parent / "made")
    assert code == 0
    assert "\x1b" not in output
    assert len(output) < 2000


def test_a_config_json_or_index_is_read_to_a_bound(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        (hf / name).touch()
        size = (hf / name).stat().st_size
        os.truncate(hf / name, 2**29)
        errors = refused_import(capsys, hf)
        assert f"{name} = 536870912: is too large" in errors
        os.truncate(hf / name, size)


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": []}}, "word"),
        ({"model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}}, "word"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated",
                            "invert": False}}, "x" * 60),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_encode_is_named(
    values: dict[str, object], prompt: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = part(run).parent / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    raw = path.read_bytes()
    entry = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    reseal(path.parent, lambda tree: tree["attachments"][0].update(entry))
    code, _, errors = shoestring(capsys, "generate", run, "--prompt", prompt, "--tokens", "1")
    assert code == 2
    assert "tokenizer.json" in errors
    assert "cannot encode this text" in errors


def test_a_number_of_metrics_without_end_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f'{{"kind": "step", "step": 9, "time": 1, "loss": {10**400}}}\n')
    assert shoestring(capsys, "report", tmp_path, "--out", tmp_path / "made")[0] == 0
    assert shoestring(capsys, "watch", tmp_path, "--once")[0] == 0


def test_a_vocabulary_of_millions_is_refused_before_memory_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, verb = corpus(tmp_path)
    code, _, errors = shoestring(capsys, *verb[:-2], "data.vocabulary=16777216", "model.vocab_size=16777216")
    assert code == 2
    assert "cannot be reached" in errors


@pytest.mark.parametrize(
    ("harm", "gist"),
    [
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": 5, "step": 1, "time": 1}\n'), "must be text"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "a", "step": 1.5, "time": 1}\n'), "a whole number"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "a", "step": 1, "time": 1e99}\n'), "time = 1e+99"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "a", "step": 1, "time": NaN}\n'), "NaN"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b'{"kind": "\xff", "step": 1, "time": 1}\n'), "UTF-8"),
        (lambda run: (run / "metrics.jsonl").write_text("[" * 99999 + "\n"), "nested"),
        (lambda run: folder(run / "metrics.jsonl"), "is a folder"),
        (lambda run: fifo(run / "metrics.jsonl"), "is a FIFO"),
    ],
)
def test_metrics_of_wrong_values_are_refused_by_line(
    harm: Callable[[Path], object], gist: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    record_run(run_dir)
    harm(run_dir)
    for verb in (["report", run_dir], ["watch", run_dir, "--once"]):
        code, _, errors = shoestring(capsys, *verb)
        assert code == 2, errors
        assert "metrics.jsonl" in errors
        assert gist in errors


def test_an_error_of_the_system_names_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, verb = corpus(tmp_path)
    long = tmp_path / ("x" * 300)
    for arguments in (["budget", long], ["report", long], ["checkpoint", "ls", long], ["trace", long]):
        code, _, errors = shoestring(capsys, *arguments)
        assert code == 2, errors
        assert "x" * 300 in errors
    code, _, errors = shoestring(capsys, *verb, f"data.prepared={long}")
    assert code == 2
    assert "x" * 300 in errors


def test_the_same_values_are_still_imported(hf: Path, original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is strict about wrong values lets right ones through: 1 for 1.0, and a null that means none."""
    edit_config(hf, routed_scaling_factor=2, rope_scaling=None, num_key_value_heads=None, eos_token_id=None)
    code, output, errors = shoestring(capsys, "import", hf, hf.parent / "again")
    assert code == 0, errors
    tensors: dict[str, Tensor] = load_file(hf / "model.safetensors")
    assert f"imported to {hf.parent / 'again'}" in output
    assert len(tensors) > 10


def test_a_generation_config_beyond_every_number_is_named(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hf / "generation_config.json").write_text('{"temperature": 1e999}')
    assert "generation_config.json = '1e999': is larger than any finite number" in refused_import(capsys, hf)


def test_a_manifest_is_not_written_with_what_no_reader_takes() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        CheckpointManifest({"loss": INF}, {}, {}, ()).to_json()


@pytest.mark.parametrize("values", [{"routed_scaling_factor": 1e300}, {"rope_scaling": YarnConfig(mscale=1e300)}])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_one_error(
    values: dict[str, Any], temperature: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(replace(SHAPE, **values))
    initialize(model, 1)
    attachments = {"tokenizer.json": train_tokenizer([TEXT], 300).to_json().encode()}
    save_model(model, tmp_path / "checkpoints", 4, attachments)
    how = ["--prompt", "word1", "--tokens", 2, "--temperature", temperature]
    code, _, errors = shoestring(capsys, "generate", tmp_path, *how)
    assert code == 2
    assert "300 of 300 logits are not finite; take another checkpoint" in errors


@pytest.mark.parametrize("temperature", ["nan", "inf", "-1"])
def test_a_temperature_that_is_none_is_refused(
    temperature: str, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = ["generate", original / "run", "--prompt", "word1", "--tokens", 2, f"--temperature={temperature}"]
    code, _, errors = shoestring(capsys, *verb)
    assert (code, "--temperature = " in errors) == (2, True)


def test_a_context_without_end_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(Model(replace(SHAPE, rope_scaling=YarnConfig(factor=1e308))), tmp_path / "checkpoints", 4, {})
    code, _, errors = shoestring(capsys, "export", tmp_path, tmp_path / "out")
    assert code == 2
    assert "model.rope_scaling.factor = 1e+308: cannot be exported" in errors


def test_a_name_with_escape_codes_is_shown_as_text(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(hf / "model.safetensors")
    tensors["\x1b[31mred\x07"] = torch.zeros(1)
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    assert "\\x1b[31mred\\x07 = [1]: is no part of this model" in (errors := refused_import(capsys, hf))
    assert errors.isascii()
    assert "\x1b" not in errors


def test_a_name_of_no_file_is_refused(hf: Path, run: Path) -> None:
    target = hf.parent / "a\0b"
    with pytest.raises(ConfigError, match=r"target = .*holds a NUL"):
        import_command(hf, target)
    with pytest.raises(ConfigError, match=r"source = .*holds a NUL"):
        import_command(target, hf.parent / "made")
    with pytest.raises(ConfigError, match=r"directory = .*holds a NUL"):
        export_command(run, None, target, "fp32", "pairs", "5GB", average=False)


def test_an_import_goes_to_a_directory_outside_its_source(
    hf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(hf.iterdir())
    (hf.parent / "link").symlink_to(hf)
    for target in (hf, hf / "made", hf.parent / "link" / "made"):
        code, _, errors = shoestring(capsys, "import", hf, target)
        assert (code, "or lies inside it; name another" in errors) == (2, True)
    (hf.parent / "file").touch()
    (hf.parent / "dangling").symlink_to(hf.parent / "nowhere")
    for name in ("file", "dangling"):
        for verb in (["import", hf], ["export", hf.parent / "run"]):
            if verb[0] == "export":
                save_model(Model(SHAPE), hf.parent / "run" / "checkpoints", 4, {})
            code, _, errors = shoestring(capsys, *verb, hf.parent / name)
            assert (code, f"{name}': is no directory; name another" in errors) == (2, True), errors
    code, _, errors = shoestring(capsys, "import", hf, hf.parent / "file" / "below")
    assert code == 2
    assert "Not a directory; name another" in errors
    assert "make room" not in errors
    monkeypatch.chdir(hf.parent / "run")
    for verb in (["import", hf, ""], ["export", hf.parent / "run", ""]):
        code, _, errors = shoestring(capsys, *verb)
        assert (code, "an empty name is none" in errors) == (2, True)
    (hf.parent / "empty").mkdir()
    monkeypatch.chdir(hf.parent / "empty")
    code, _, errors = shoestring(capsys, "export", hf.parent / "run", ".")
    assert (code, "has no name of its own" in errors) == (2, True)
    assert sorted(hf.iterdir()) == before


@pytest.mark.parametrize("to", ["nowhere", "config.json"], ids=["dangling", "circular"])
def test_a_config_json_that_leads_nowhere_is_a_link(to: str, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hf / "config.json").unlink()
    (hf / "config.json").symlink_to(to)
    assert f"config.json = 'a link to {to}': leads to no file" in refused_import(capsys, hf)
