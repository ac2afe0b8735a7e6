"""Write docs/configuration.md from the configuration's dataclasses and from the files under conf/.

    python docs/build_configuration.py

A key's meaning is the first paragraph of the docstring below its field, that of a choice the comment at the head of its
file.
"""

import ast
import inspect
import itertools
import json
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from omegaconf import OmegaConf

from shoestring.comm.files.ranges import field_range
from shoestring.trainer.config import RunConfig
from shoestring.trainer.structured_config import field_default

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration reference

Generated from the code; rewrite it with `python docs/build_configuration.py`.

A run is one choice of each group (`schedule=dualpipe`) and values of its own (`schedule.micro_batch_size=2`). A choice
is a file under `conf/`, or under a directory of yours named by `--config-dir`. A default is that of the code; the file
of a choice may set another value. `shoestring train experiment=quickstart --cfg job` prints all values of a run.
"""


def configuration_page() -> str:
    """Return the text of docs/configuration.md."""
    sections = ["\n\n".join(["## experiment", "Choices and values of a whole run.", *_choices("experiment")])]
    types = typing.get_type_hints(RunConfig)
    for group in fields(RunConfig):
        cls = types[group.name]
        lines = [f"## {group.name}", _first_paragraph(cls.__doc__), *_choices(group.name)]
        rows = [f"| {' | '.join(row)} |" for row in key_rows(cls, f"{group.name}.")]
        table = "\n".join(["| key | type | range | default | meaning |", "|---|---|---|---|---|", *rows])
        sections.append("\n\n".join([*lines, table]))
    return "\n\n".join([INTRODUCTION.rstrip(), *sections]) + "\n"


def field_docstrings(cls: type) -> Mapping[str, str]:
    """Return the docstring below each field of a dataclass, read from its source."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(node.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def key_rows(cls: Any, prefix: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield key, type, range, default and meaning of each field, those of nested dataclasses included."""
    types, meanings = typing.get_type_hints(cls), field_docstrings(cls)
    for field in fields(cls):
        name, kind = f"{prefix}{field.name}", types[field.name]
        nested = next((each for each in (kind, *typing.get_args(kind)) if is_dataclass(each)), None)
        allowed = field_range(field)
        default = "" if nested is kind else _default(field_default(field))
        yield f"`{name}`", _type_name(kind), allowed.text if allowed else "", default, _cell(meanings[field.name])
        if nested is not None:
            yield from key_rows(nested, f"{name}.")


def _type_name(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return "group"
    if NoneType in arguments:
        return " or ".join([*(_type_name(each) for each in arguments if each is not NoneType), "null"])
    if origin is tuple:
        return f"list[{_type_name(arguments[0])}]"
    if origin is dict:
        return f"dict[{', '.join(map(_type_name, arguments))}]"
    return str(kind.__name__)


def _default(value: object) -> str:
    if value is MISSING:
        return "required"
    if isinstance(value, dict):
        return f"`{{{', '.join(f'{key}: {each}' for key, each in value.items())}}}`"
    return f"`{json.dumps(value)}`" if value != "" else "empty"


def _choices(group: str) -> Iterator[str]:
    """Yield the table of the files that the group may be one of; nothing for a group without files."""
    files = sorted((ROOT / "conf" / group).glob("*.yaml"))
    if not files:
        return
    (chosen,) = (item[group] for item in OmegaConf.load(ROOT / "conf" / "config.yaml").defaults if group in item)
    rows = []
    for file in files:
        mark = " (default)" if file.stem == chosen else ""
        rows.append(f"| `{group}={file.stem}`{mark} | {_cell(head_comment(file))} |")
    yield "\n".join(["| choice | meaning |", "|---|---|", *rows])


def head_comment(file: Path) -> str:
    """Return the comment at the head of a YAML file, without Hydra's `@package` line."""
    head = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    return " ".join(line.removeprefix("#").strip() for line in head if not line.startswith("# @package"))


def _first_paragraph(text: str | None) -> str:
    return inspect.cleandoc(text or "").partition("\n\n")[0].replace("\n", " ")


def _cell(text: str) -> str:
    return _first_paragraph(text).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(configuration_page())
