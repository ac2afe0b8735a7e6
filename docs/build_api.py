"""Build the API pages from the docstrings of the package. A warning of pdoc is an error.

    python docs/build_api.py [DIRECTORY]     # default: build/api; open index.html there

Packages of the extra `hopper` are replaced by mocks where they are not installed, so that every module is documented.
"""

import importlib.util
import sys
import warnings
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


def mock_missing_packages() -> None:
    """Let modules be imported whose packages are not installed."""
    if importlib.util.find_spec("transformer_engine") is None:
        sys.modules.update((name, MagicMock()) for name in MOCKED)


def build_api(package: str, directory: Path) -> None:
    """Write the pages of `package`; raise the first warning."""
    pdoc.render.configure(docformat="markdown", show_source=False, math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        pdoc.pdoc(package, output_directory=directory)


if __name__ == "__main__":
    mock_missing_packages()
    build_api("shoestring", Path(sys.argv[1]) if sys.argv[1:] else ROOT / "build" / "api")
