"""`shoestring import` of files of other programs: one clear refusal, exit code 2, nothing left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoestring.comm.errors import ConfigError
from shoestring.tests.launch.command_line import run_verb, shoestring
from shoestring.tests.launch.small_checkpoint import SHAPE, dangling, device, fifo, folder
from shoestring.tests.launch.verbs.refused_import import edit_config, refused_import
from shoestring.tests.trainer.checkpoint.saved import save_model
from shoestring.trainer.model.model import Model

NAN, INF = float("nan"), float("inf")


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
        (edit_entry(dtype="F8_E5M2"), "is an unsupported dtype"),
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
        (edit_entry(other=1), "is not a key of this format"),
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
    assert "left out, 2 unsupported keys of config.json: auto_map, ep_size" in output
    code, output, _ = shoestring(capsys, "export", tmp_path / "ours", tmp_path / "back", "--dtype", "fp32")
    assert code == 0
    assert "auto_map, ep_size" in output
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: back[key] for key in said} == said
    assert (tmp_path / "back" / "generation_config.json").read_text() == generation
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


def test_names_from_others_send_nothing_to_the_terminal(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(hf, **{"\x1b[31mred": 1, "x" * 5000: 2})
    code, output, _ = shoestring(capsys, "import", hf, hf.parent / "made")
    assert code == 0
    assert "\x1b" not in output
    assert len(output) < 2000


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
        run_verb("import", hf, target)
    with pytest.raises(ConfigError, match=r"source = .*holds a NUL"):
        run_verb("import", target, hf.parent / "made")
    with pytest.raises(ConfigError, match=r"directory = .*holds a NUL"):
        run_verb("export", run, target)


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
        assert (code, "it is empty" in errors) == (2, True)
    (hf.parent / "empty").mkdir()
    monkeypatch.chdir(hf.parent / "empty")
    code, _, errors = shoestring(capsys, "export", hf.parent / "run", ".")
    assert (code, "does not name a directory" in errors) == (2, True)
    assert sorted(hf.iterdir()) == before
