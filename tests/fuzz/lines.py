"""The lines of the readers that were run."""

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

READERS = (
    *("comm/files/strict_json.py", "comm/files/strict_yaml.py", "comm/files/file_io.py"),
    *(
        "trainer/checkpoint/tensor_file.py",
        "trainer/checkpoint/manifest.py",
        "trainer/checkpoint/checkpoint.py",
    ),
    *("trainer/data/manifest.py", "trainer/data/formats.py", "trainer/data/tokenizer.py", "trainer/data/shards.py"),
    *(
        "trainer/huggingface/config.py",
        "trainer/huggingface/import_weights.py",
        "trainer/huggingface/tokenizer.py",
    ),
    *("trainer/ledger/records.py", "trainer/ledger/journal.py"),
    *(
        "comm/files/line_reader.py",
        "trainer/telemetry/events.py",
        "trainer/telemetry/history.py",
        "trainer/structured_config.py",
    ),
)
"""Files that read what other programs may have written."""
_NO_READERS = (
    # These write, for runs that resume.
    *("JournalWriter.", "truncate_partial_line", "replace_file_atomically", "raise_if_not_regular_file"),
    *("make_rank_record", "merge_rank_records", "TensorFileWriter.", "SplitPartWriter."),
    *("Event.kind", "Event.values", "Event.to_json_line", "_strict"),
    *("_header", "Checkpoint.with_ema_weights", "DataManifest.to_json", "DataPart.to_json"),
    *("train_tokenizer", "to_config_json", "_unknown_there"),
)
"""Prefixes of functions in these files that write, or create a file, and read none of others."""


def lines_of(path: Path) -> set[int]:
    """Return the first lines of the statements in a file's functions."""
    return {
        statement.lineno
        for body in _bodies(ast.parse(path.read_text()), _NO_READERS)
        for statement in body
        if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
    }


def _module(name: str) -> str:
    return "shoestring." + name.removesuffix(".py").replace("/", ".")


class Lines:
    """The lines of `READERS` that have run, as the modules themselves note them.

    `install` before the readers are imported: each is then compiled with a note before every statement of a function.
    The interpreter's own trace would stop at every call of every module, and take three times as long.
    """

    def __init__(self) -> None:
        self.run: dict[str, set[int]] = {name: set() for name in READERS}

    def install(self) -> None:
        """Have the readers note their lines from their import on. Raises `RuntimeError` where one is imported."""
        names = {_module(name): name for name in READERS}
        if early := sorted(names.keys() & sys.modules.keys()):
            raise RuntimeError(f"{early[0]} was imported before its lines could be counted")
        sys.meta_path.insert(0, _Finder({module: self.run[name] for module, name in names.items()}))

    def clear(self) -> None:
        """Forget the lines that have run so far."""
        for lines in self.run.values():
            lines.clear()

    @property
    def seen(self) -> set[tuple[str, int]]:
        """Return each file and line that has run."""
        return {(name, line) for name, lines in self.run.items() for line in lines}


class _Finder(MetaPathFinder):
    """An import hook that finds the readers in place and loads them with notes."""

    def __init__(self, lines: Mapping[str, set[int]]) -> None:
        self._lines = lines

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname not in self._lines:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _Loader(fullname, spec.origin, self._lines[fullname])
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, lines: set[int]) -> None:
        super().__init__(fullname, path)
        self._run = lines

    def get_code(self, fullname: str) -> CodeType:
        """Return the module's code with its notes; never read from a cache or written to one."""
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        for body in _bodies(tree):
            body[:] = [each for statement in body for each in (_note(statement.lineno), statement)]
        code: CodeType = compile(ast.fix_missing_locations(tree), path, "exec")
        return code

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__[_NOTE] = self._run.add
        super().exec_module(module)


_NOTE = "__note_line__"


def _note(line: int) -> ast.stmt:
    call = ast.Call(ast.Name(_NOTE, ast.Load(), lineno=line, col_offset=0), [ast.Constant(line)], [])
    return ast.Expr(call, lineno=line, col_offset=0)


def _bodies(tree: ast.AST, left_out: tuple[str, ...] = (), name: str = "", *, inside: bool = False) -> Iterator[Any]:
    """Yield lists of statements in the functions of a module, without functions whose names start with a `left_out`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            full = f"{name}{child.name}"
            is_function = not isinstance(child, ast.ClassDef)
            if not (is_function and full.startswith(left_out)):
                yield from _bodies(child, left_out, f"{full}.", inside=is_function)
        else:
            yield from _bodies(child, left_out, name, inside=inside)
    if inside:
        for part in ("body", "orelse", "finalbody"):
            statements = getattr(tree, part, None)
            if isinstance(statements, list):
                yield statements


def coverage(seen: set[tuple[str, int]]) -> dict[str, tuple[int, int, list[int]]]:
    """Return, for each reader, the lines run, the lines there, and the line numbers that were not run."""
    found = {}
    for name in READERS:
        lines = lines_of(ROOT / name)
        missed = sorted(line for line in lines if (name, line) not in seen)
        found[name] = len(lines) - len(missed), len(lines), missed
    return found
