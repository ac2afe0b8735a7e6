"""Packages in the place of DeepEP, for a child process that only imports them."""

from pathlib import Path

GOOD = """
import sys
assert "torch" in sys.modules, "torch comes first, and its NCCL with it"
class ElasticBuffer: ...
def find_cuda_home(): return {cuda!r}
"""


def write_deep_ep(place: Path, source: str) -> Path:
    """Put a torch and a deep_ep of this source into `place`, with an nvcc that it finds; return the package."""
    package = place / "deep_ep"
    (package / "buffers").mkdir(parents=True)
    (package / "buffers" / "elastic.py").touch()
    (package / "__init__.py").write_text(source.format(cuda=str(place / "cuda")))
    (place / "torch.py").touch()
    (place / "cuda" / "bin").mkdir(parents=True)
    (place / "cuda" / "bin" / "nvcc").touch()
    return package
