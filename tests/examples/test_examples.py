"""Each example, alone in an empty folder, under an installed wheel; and the page that tells of it."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoestring.tests.installed import install_wheel, run
from shoestring.tests.tree import ROOT

SECONDS, MOST_LINES_OF_A_STEP = 30, 25
PRINTED = {
    "two_hop_moe.py": r"step 0: loss 1.*\nstep 19: loss 0.*\nbytes that dispatch sent .*'infiniband': [1-9]",
    "dualpipev_modules.py": r"rank 0: loss (0\.\d+) over 8 micro-batches\none process: loss \1",
    "zero1_optimizer.py": r"step 0: loss 1(.|\n)*step 49: loss 0\.0(.|\n)*masters and moments of 4,224 of 8,352",
    "plan_run.py": r"layouts considered(.|\n)* s per step, .* GB at the peak, .* GPU-hours",
    "train_step.py": r"step 0: loss \d.*, MTP .*\nstep 1: loss \d",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    found = install_wheel(folder)[1]
    code = f"import sys; sys.path.insert(0, {str(found)!r}); import shoestring; print(shoestring.__file__)"
    assert run(sys.executable, "-P", "-c", code, cwd=folder).startswith(str(found))
    return found


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_an_example_runs_from_an_empty_folder(name: str, site: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples" / name, tmp_path)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, name],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=4 * SECONDS,  # a busy machine
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(PRINTED[name], done.stdout), done.stdout
    assert time.perf_counter() - began < SECONDS
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_every_example_has_a_section() -> None:
    page = (ROOT / "docs" / "library.md").read_text()
    sections = re.findall(r"^## .*`examples/(\w+\.py)`$", page, re.MULTILINE)
    assert sorted(sections) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_a_training_step_is_short_and_of_public_names() -> None:
    source = (ROOT / "examples" / "train_step.py").read_text()
    assert len(source.splitlines()) <= MOST_LINES_OF_A_STEP
    for path in (ROOT / "examples").glob("*.py"):
        assert not re.search(r"(\.|import )_[a-z]", path.read_text()), f"{path.name} uses a private name"
