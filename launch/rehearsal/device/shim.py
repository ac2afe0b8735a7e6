"""Library with which a torch without CUDA runs autograd on fake CUDA tensors, compiled once and kept in a cache.

Autograd calls a device guard and hooks, two internal C++ interfaces of torch, before it runs a node of a CUDA tensor.
A CPU build has neither, so `cpp/` registers some that do nothing. They must be loaded before `import torch`.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from ....comm.errors import ConfigError, Problem

_SOURCES = tuple(sorted((Path(__file__).parent / "cpp").glob("*.cpp")))
_TORCH = "2.13"
"""Version for which `cpp/` is written; the two interfaces change about once a year."""
_SECONDS = 300


def build_autograd_shim() -> Path:
    """Return the path of the library; compile it with g++ if the cache has none for this torch.

    Raises `ConfigError` if torch has another version or CUDA, or if g++ is missing or fails.
    """
    _check_torch_version()
    library = _cache() / f"libshim-{_key()}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            compiled = Path(scratch) / library.name
            _compile(compiled)
            compiled.replace(library)  # atomic, since other processes may compile it too
    return library


def _check_torch_version() -> None:
    version = str(torch.__version__)
    if not version.startswith(f"{_TORCH}."):
        hint = f"the rehearsal's device is written for torch {_TORCH}; install that version in a separate environment"
        raise ConfigError([Problem("torch", version, hint)])
    if torch.version.cuda is not None or torch.version.hip is not None:
        hint = f"was built for GPUs; rehearse in an environment with the CPU build of torch {_TORCH}"
        raise ConfigError([Problem("torch", version, hint)])


def _compile(library: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        hint = "is needed to compile the rehearsal's device; install g++ 11 or later, or name a compiler in CXX"
        raise ConfigError([Problem("g++", None, hint)])
    folder = Path(torch.__file__).parent
    command = [compiler, "-shared", "-fPIC", "-O1", "-std=c++20", f"-I{folder / 'include'}", *map(str, _SOURCES)]
    command += ["-o", str(library), f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        output = str(error.stderr or error).strip().splitlines()
        reason = next((line for line in output if "error" in line), output[-1] if output else "")
        hint = f"could not compile the rehearsal's device: {reason}; use g++ 11 or later"
        raise ConfigError([Problem("g++", compiler, hint)]) from error


def _key() -> str:
    """Return a digest of the sources, the torch version and its folder, which is written into the library."""
    digest = hashlib.sha256(f"{torch.__version__}\n{torch.__file__}\n".encode())
    for source in _SOURCES:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shoestring"
