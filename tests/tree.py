"""The files of this repository, for tests about the tree itself."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tree_files(suffix: str = "") -> list[Path]:
    """Return every file that git does not ignore, relative to the root. Plain copies work too: it reads .gitignore."""
    lines = (ROOT / ".gitignore").read_text().split()
    anchored = {line.strip("/") for line in lines if line.startswith("/")}
    anywhere = {line.rstrip("/") for line in lines if not line.startswith("/")} | {".git"}
    return sorted(path.relative_to(ROOT) for path in _walk(ROOT, anchored, anywhere) if path.name.endswith(suffix))


def _walk(folder: Path, anchored: set[str], anywhere: set[str]) -> Iterator[Path]:
    for path in folder.iterdir():
        if any(fnmatch(path.name, pattern) for pattern in anywhere) or (folder == ROOT and path.name in anchored):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, anchored, anywhere)
        else:
            yield path


def imports(source: str, path: Path) -> Iterator[tuple[str, ...]]:
    """Every module or name that `source`, the text of the file `path` (relative to the root), imports, in full."""
    package = ("shoestring", *path.parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            assert base or not node.level, f"{path}:{node.lineno} reaches above the package"
            module = tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, *module, alias.name) for alias in node.names)
