"""The package as users install it: built as a wheel, outside of the checkout."""

import shutil
import subprocess
import sys
from pathlib import Path

from shoestring.tests.tree import ROOT, tree_files


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command; return its standard output. A failure shows all its output."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def install_wheel(folder: Path) -> tuple[Path, Path]:
    """Build a wheel from a copy of the tree and install it without dependencies; return it and its `sys.path` entry."""
    copy, wheels, site = folder / "copy", folder / "wheels", folder / "site"
    for path in tree_files():
        (copy / path.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, copy / path)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, cwd=copy)
    (wheel,) = wheels.glob("shoestring-*.whl")
    pip = (sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--target", site, wheel, cwd=folder)
    return wheel, site
