"""YAML from other programs: bounded in bytes, depth and aliases."""

from pathlib import Path

import pytest

from shoestring.comm.files.strict_json import MalformedFileError
from shoestring.comm.files.strict_yaml import read_yaml


@pytest.mark.parametrize(
    ("text", "gist"),
    [
        ("a: [1", "is not YAML"),
        ("a: &a [*a]", "is an alias for a value that contains it"),
        ("a: &a {b: *a}", "is an alias for a value that contains it"),
        ("\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
                   + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]), "every alias"),
        ("[" * 5000, "nested more than 64 deep"),
        ("a: " + "[" * 80 + "]" * 80, "nested more than 64 deep"),
        ("a: \x00", "is not YAML"),
        ("a: 1\nb:\n  c: 1\n  c: 2", "line 4 = 'c': is a repeated key"),
        ("a: ${b}\nb: ${a}", "is not a YAML configuration|refers to itself"),
        ("a: ${nowhere}", "is not a YAML configuration"),
        ("a: !!python/object:os.system {}", "is not a YAML configuration"),
        ("5", "is not a YAML configuration"),
    ],
)  # fmt: skip
def test_yaml_that_explodes_or_is_none_is_named(text: str, gist: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(MalformedFileError, match=gist):
        read_yaml(tmp_path / "file.yaml")


def test_yaml_with_an_honest_alias_is_read(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("a: &a [1, 2]\nb: *a\nc: ${a}\n")
    assert read_yaml(tmp_path / "file.yaml") == {"a": [1, 2], "b": [1, 2], "c": [1, 2]}
    (tmp_path / "file.yaml").write_bytes(b"a: \xff")
    with pytest.raises(MalformedFileError, match="UTF-8"):
        read_yaml(tmp_path / "file.yaml")
    (tmp_path / "file.yaml").write_text("a: 1\nb: ${a}\n")
    assert read_yaml(tmp_path / "file.yaml", resolve=False) == {"a": 1, "b": "${a}"}
