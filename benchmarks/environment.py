"""Facts about a machine, and the packages that training imports and that are missing.

    python benchmarks/environment.py             facts; exit code 1 if a package is missing
    python benchmarks/environment.py --missing   only the missing packages, one per line

It needs only torch, so that it runs before anything else is installed.
"""

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch

IMPORTED = {
    "antlr4": "antlr4-python3-runtime",
    "hydra": "hydra-core",
    "markupsafe": "MarkupSafe",
    "numpy": "numpy",
    "omegaconf": "omegaconf",
    "packaging": "packaging",
    "rich": "rich",
    "tokenizers": "tokenizers",
    "yaml": "PyYAML",
}
"""Modules that training, `doctor` and `memory` import besides torch, and their packages. FP8 also needs Triton."""
_PREFIXES = ("CUDA_", "NCCL_", "PYTORCH_", "TORCH_", "TRITON_", "NVTE_", "OMP_")


def missing() -> list[str]:
    """Return the packages that are not installed."""
    return [package for module, package in IMPORTED.items() if importlib.util.find_spec(module) is None]


def facts() -> Iterator[tuple[str, str]]:
    """Yield name and value of everything that a result may depend on."""
    yield "python", f"{platform.python_version()} {sys.executable}"
    yield "machine", f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {platform.release()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    yield "triton", _version_of("triton")
    yield "nvcc", _output("nvcc", "--version").splitlines()[-1]
    if torch.cuda.is_available():
        nccl: tuple[int, ...] = torch.cuda.nccl.version()
        yield "NCCL", ".".join(map(str, nccl))
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            memory = f"{gpu.total_memory / 2**30:.1f} GiB, {gpu.multi_processor_count} processors"
            yield f"GPU {index}", f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}"
    else:
        yield "GPU", "torch sees none"
    for name, value in sorted(os.environ.items()):
        if name.startswith(_PREFIXES):
            yield name, value


def _version_of(module: str) -> str:
    if importlib.util.find_spec(module) is None:
        return "not installed"
    return str(importlib.import_module(module).__version__)


def _output(program: str, *arguments: str) -> str:
    if shutil.which(program) is None:
        return f"no {program} here"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() or f"{program} exited with {done.returncode}"


def main() -> int:
    """Print the facts or the missing packages; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", action="store_true", help="print only the missing packages")
    lacking = missing()
    if parser.parse_args().missing:
        print("\n".join(lacking))
        return 0
    for name, value in facts():
        print(f"{name:12} {value}")
    print(_output("nvidia-smi"))
    if lacking:
        print(f"missing: {' '.join(lacking)}; install them with pip, or provide their wheels in a folder (--wheels)")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
