"""Names in backticks exist: classes, functions, members and files that docstrings, comments and docs mention."""

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

from shoestring.launch.cluster.simulated_cluster import SimulatedCluster
from shoestring.tests.tree import ROOT, tree_files

FOREIGN = frozenset(
    {
        *("Tensor.cpu()", "ThreadPoolExecutor.submit"),  # torch and Python
        *("TokenLayout", "WorkspaceLayout"),  # DeepEP's C++
        *("token.py", "v_schedule.py"),  # Python's standard library, Zero Bubble's repository
        "Infinity",  # JSON
    }
)
"""Names of other projects that the tree mentions and does not use."""
EXEMPT = ("CHANGELOG.md", "trainer/data/corpus/shakespeare/SOURCE.md")
"""Pages that name places of the past, or of another project."""

CLASS = re.compile(r"[A-Z]\w*[a-z]{2}\w*")
CALL = re.compile(r"(?:[\w.]*\.)?(\w+)\(\)")
MEMBER = re.compile(r"([A-Z]\w*[a-z]\w*)\.(\w+)(?:\(.*\))?")
DOTTED = re.compile(r"(?:comm|parallelism|trainer|launch|shoestring)\.([\w.]+)")
FILE = re.compile(r"[\w./-]+\.(?:py|md|sh|sbatch|cpp|svg)")


@cache
def trees() -> Mapping[Path, ast.Module]:
    """Return the syntax tree of each Python file."""
    return {file: ast.parse((ROOT / file).read_text()) for file in tree_files(".py")}


@cache
def identifiers() -> frozenset[str]:
    """Return every identifier that code of the tree defines, imports or uses."""
    found: set[str] = set()
    for tree in trees().values():
        for node in ast.walk(tree):
            match node:
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.arg(arg=name):
                    found.add(name)
                case ast.Name(id=name) | ast.Attribute(attr=name):
                    found.add(name)
                case ast.alias(name=name, asname=other):
                    found.update((*name.split("."), other or name))
    return frozenset(found)


@cache
def members() -> Mapping[str, frozenset[str]]:
    """Return the methods, fields and attributes of each class, those of all classes of one name together."""
    found = defaultdict[str, set[str]](set)
    for tree in trees().values():
        for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            for node in ast.walk(owner):
                match node:
                    case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                        found[owner.name].add(name)
                    case ast.Attribute(value=ast.Name(id="self"), attr=name):
                        found[owner.name].add(name)
                    case ast.Name(id=name, ctx=ast.Store()):
                        found[owner.name].add(name)
    return {name: frozenset(each) for name, each in found.items()}


@cache
def file_endings() -> frozenset[str]:
    """Return the path of each file, and each ending of it that begins at a folder or at the file's name."""
    paths = [file.parts for file in tree_files()]
    return frozenset(str(PurePosixPath(*parts[first:])) for parts in paths for first in range(len(parts)))


def exists(name: str) -> bool:
    """Return whether `name`, as it stands in backticks, exists; True for a text that is no such name."""
    if name in FOREIGN or name.removeprefix("./") in file_endings():
        return True
    if FILE.fullmatch(name):
        return False
    if (member := MEMBER.fullmatch(name)) is not None:
        return member[2] in members().get(member[1], ())
    if (called := CALL.fullmatch(name)) is not None:
        return called[1] in identifiers()
    if (dotted := DOTTED.fullmatch(name)) is not None:
        return all(part in identifiers() or Path(part).stem in stems() for part in dotted[1].split("."))
    return CLASS.fullmatch(name) is None or name in identifiers() | {"True", "False", "None"}


@cache
def stems() -> frozenset[str]:
    """Return the names of the tree's modules and packages."""
    return frozenset(part for file in tree_files(".py") for part in file.with_suffix("").parts)


def texts(file: Path) -> Iterator[str]:
    """Yield the docstrings and comments of a Python file, or the whole text of another one."""
    source = (ROOT / file).read_text()
    if file.suffix != ".py":
        yield source
        return
    for node in ast.walk(trees()[file]):
        match node:
            case ast.Expr(value=ast.Constant(value=str() as text)):
                yield text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def in_backticks(text: str) -> list[str]:
    """Return the names in backticks, without fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def test_names_in_backticks_exist() -> None:
    files = [file for file in tree_files() if file.suffix in (".py", ".md") and str(file) not in EXEMPT]
    mentioned = [(str(file), name) for file in files for text in texts(file) for name in in_backticks(text)]
    assert not [f"{file}: {name}" for file, name in mentioned if not exists(name)]
    assert not FOREIGN - {name for _, name in mentioned}, "remove from FOREIGN what is not mentioned"


@pytest.mark.parametrize(
    "name",
    [
        *("StaleChannel", "StaleChannel.send", "Group.not_there", "not_there()", "ranks.not_there()"),
        *("device/not_there.py", "parallelism.zero.optimizer.NotThere", "trainer.not_there.Group"),
    ],
)
def test_a_stale_name_is_found(name: str) -> None:
    assert not exists(name)


def python_blocks() -> Iterator[tuple[str, str]]:
    """Yield the page and text of each `python` block in the docs."""
    for file in tree_files(".md"):
        for block in re.findall(r"^```python\n(.*?)^```$", (ROOT / file).read_text(), re.MULTILINE | re.DOTALL):
            yield str(file), block


def test_python_blocks_compile_and_use_names_that_exist() -> None:
    unknown = []
    for page, block in python_blocks():
        for node in ast.walk(ast.parse(block, page)):
            match node:
                case ast.Attribute(value=ast.Name(id="cluster"), attr=name):
                    known = hasattr(SimulatedCluster, name) or name in members()["SimulatedCluster"]
                case ast.Attribute(attr=name):
                    known = name in identifiers()
                case ast.ImportFrom(module=str() as module) if module.startswith("shoestring."):
                    name = module
                    known = f"{'/'.join(module.split('.')[1:])}.py" in file_endings()
                case _:
                    continue
            if not known:
                unknown.append(f"{page}: {name}")
    assert not unknown
