"""Build the API pages from the docstrings of the package. A warning of pdoc is an error.

    python docs/build_api.py [DIRECTORY]     # default: build/api; open index.html there

Packages of the extra `hopper` are replaced by mocks where they are not installed, so that every module is documented.
"""

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import MagicMock

import pdoc

ROOT = Path(__file__).resolve().parents[1]
MOCKED = (
    "transformer_engine",
    "transformer_engine.pytorch",
    "transformer_engine.pytorch.cpp_extensions",
    "transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage",
)


LAYERS = ("comm", "parallelism", "trainer", "launch")


def mock_missing_packages() -> None:
    """Let modules be imported whose packages are not installed."""
    if importlib.util.find_spec("transformer_engine") is None:
        sys.modules.update((name, MagicMock()) for name in MOCKED)


def module_names() -> list[str]:
    """Return what pdoc must be told: of a package with `__all__` it finds only the modules that are named there."""
    names = ["shoestring", *(f"shoestring.{layer}" for layer in LAYERS)]
    for init in sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("__init__.py")):
        if "__all__" in init.read_text():
            package = ".".join(("shoestring", *init.parent.relative_to(ROOT).parts))
            names += [f"{package}.{path.stem}" for path in sorted(init.parent.glob("*.py")) if path != init]
    return names


def build_api(modules: Sequence[str], directory: Path) -> None:
    """Write the pages of `modules`; raise the first warning."""
    pdoc.render.configure(docformat="markdown", show_source=False, math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        pdoc.pdoc(*modules, output_directory=directory)


if __name__ == "__main__":
    mock_missing_packages()
    build_api(module_names(), Path(sys.argv[1]) if sys.argv[1:] else ROOT / "build" / "api")
