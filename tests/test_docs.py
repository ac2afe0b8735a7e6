"""README and docs: every command runs as written from a clean clone, sizes and links hold."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from shoestring.launch import cli
from shoestring.launch.run import node
from shoestring.tests.tree import ROOT, tree_files

README_LINES, ARCHITECTURE_WORDS, READING_PATH_LINES = 150, 1500, 6500
SECONDS = 900
"""Longest time of one command, on a busy machine."""
QUICKSTART = "./launch/quickstart.sh"

PARSED: Mapping[str, str] = {
    "./launch/test.sh": "it would run these tests again",
    "source .venv/bin/activate": "the tests' stand-in for .venv has no such file",
    **dict.fromkeys(
        (
            "NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 ./launch/torchrun.sh experiment=deepseek_v3_h800",
            "NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 ./launch/torchrun.sh experiment=deepseek_v3_h800",
        ),
        "needs two machines; tests/launch/run start two launchers",
    ),
    "sbatch --nodes=256 launch/slurm/pretrain.sbatch experiment=deepseek_v3_h800": "needs Slurm",
    **dict.fromkeys(
        (
            "docker build --target cpu -t shoestring:cpu .",
            "docker build -t shoestring .",
            "docker build --target deepep -t shoestring:deepep .",
            "docker run --rm shoestring:cpu params model=deepseek_v3",
        ),
        "needs Docker",
    ),
    "shoestring cluster --nodes 2 --gpus-per-node 2 --uplink 200mbit -- experiment=quickstart topology.pp=1 "
    "topology.ep=4 schedule=1f1b schedule.micro_batch_size=4 exchange=two_hop training.tokens=20_480 "
    "training.sample_tokens=0 training.run_dir=runs/two_nodes": "needs root; tests/launch/cluster run it",
}
"""Commands that are only parsed, each with the reason."""

QUICK = frozenset(
    {
        "shoestring params model=deepseek_v3",
        "shoestring schedule dualpipe --pp 8 --micro-batches 20",
        "shoestring doctor",
        "shoestring simulate experiment=deepseek_v3_h800",
        "shoestring train experiment=quickstart --cfg job",
        "shoestring train model.hiden_size=3",
        "./launch/torchrun.sh --help",
        'mkdir -p my_texts && sed -e \'s/["\\\\]/\\\\&/g\' -e \'s/.*/{"content": "&"}/\' '
        "trainer/data/corpus/shakespeare/*.txt >my_texts/a.jsonl",
        "mkdir -p my_conf/data && cat >my_conf/data/mine.yaml <<'EOF'",
        "shoestring data prepare --config-dir my_conf data=mine model.vocab_size=null",
        "shoestring data preview --config-dir my_conf data=mine model.vocab_size=null",
        "mkdir -p my_conf/model && cat >my_conf/model/small.yaml <<'EOF'",
        "shoestring params --config-dir my_conf model=small",
        "shoestring partition --config-dir my_conf model=small --stages 4",
    }
)
"""Commands that need no run and take seconds: those of the default set. The others are slow."""

PARSERS: Mapping[str, Callable[[Sequence[str]], Namespace]] = {
    "shoestring": cli.parse_arguments,
    "shoestring:cpu": cli.parse_arguments,
    "./launch/torchrun.sh": node.parse_arguments,
    "launch/slurm/pretrain.sbatch": node.parse_arguments,
}
"""Parsers of the words that follow a program's name."""


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    text: str
    """The lines as written: comment, continuation lines and here-document included."""

    @property
    def words(self) -> str:
        """The command on one line, without comment and here-document."""
        line = re.sub(r" *\\\n *", " ", self.text).partition("\n")[0]
        return re.split(r"\s+# ", line)[0].rstrip()

    @property
    def code(self) -> int:
        """The exit code that its comment states, else 0."""
        stated = re.search(r"# exits with (\d+)", self.text)
        return int(stated[1]) if stated else 0


def commands_of(page: str) -> Iterator[Command]:
    for block in re.findall(r"^```bash\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
        lines = iter(block.splitlines())
        for line in filter(str.strip, lines):
            text = line
            while text.endswith("\\"):
                text += f"\n{next(lines)}"
            if (document := re.search(r"<<'(\w+)'$", line)) is not None:
                text += "".join(f"\n{each}" for each in iter(lines.__next__, document[1])) + f"\n{document[1]}"
            yield Command(page, text)


PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
COMMANDS = [command for page in PAGES for command in commands_of(page)]
QUICK_COMMANDS = list({each.words: each for each in COMMANDS if each.words in QUICK}.values())
LINKED = (*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a clone's files and a stand-in for .venv: this environment with the clone in it."""
    root = tmp_path_factory.mktemp("clean").resolve() / "clone"
    for file in tree_files():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, root / file, follow_symlinks=False)
    (root / "build" / "typing").mkdir(parents=True)
    (root / "build" / "typing" / "shoestring").symlink_to(root)
    bin_ = root / ".venv" / "bin"
    bin_.mkdir(parents=True)
    for name, arguments in (("python", ""), ("pip", "-m pip"), ("shoestring", "-P -m shoestring.launch.cli")):
        (bin_ / name).write_text(f'#!/bin/sh\n# made by {bin_}/python\nexec "{sys.executable}" {arguments} "$@"\n')
        (bin_ / name).chmod(0o755)
    # launch/environment.sh finds the installation complete, so that no test reaches a package index.
    stamp = "cat setup.cfg pyproject.toml requirements.lock | cksum >.venv/.installed-runtime"
    subprocess.run(["bash", "-c", stamp], cwd=root, check=True)
    return root


@pytest.fixture(scope="module")
def trained(clone: Path) -> Path:
    """Return the clone after README's first command."""
    check_run(clone, next(command for command in COMMANDS if command.words == QUICKSTART))
    return clone


def check_run(clone: Path, command: Command) -> None:
    """Run the command as written; it must exit with the code that the page states."""
    bins = (clone / ".venv" / "bin", Path(sys.executable).parent)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "NNODES")}
    environment |= {
        "PATH": os.pathsep.join((*map(str, bins), os.environ["PATH"])),
        "PYTHONPATH": str(clone / "build" / "typing"),
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-c", command.text],
        cwd=clone,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == command.code, f"{command.page}: {command.text}\n{done.stdout[-4000:]}"


@pytest.mark.parametrize("command", QUICK_COMMANDS, ids=lambda each: each.words)
def test_a_quick_command_runs(clone: Path, command: Command) -> None:
    check_run(clone, command)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", sorted({each.page for each in COMMANDS}))
def test_the_commands_of_a_page_run_in_their_order(trained: Path, page: str) -> None:
    for command in commands_of(page):
        if command.words not in PARSED and command.words != QUICKSTART:
            check_run(trained, command)


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.words in PARSED], ids=lambda each: each.words)
def test_a_command_that_cannot_run_here_is_parsed(command: Command) -> None:
    checked = subprocess.run(["bash", "-n", "-c", command.text], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    words = shlex.split(command.words)
    for program, parse in PARSERS.items():
        if program in words and words[:2] != ["docker", "build"]:
            parse(words[words.index(program) + 1 :])


def test_lists_name_commands_of_the_pages() -> None:
    known = {command.words for command in COMMANDS}
    assert not (QUICK | PARSED.keys() | {QUICKSTART}) - known
    assert not QUICK & PARSED.keys()


def test_sizes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES
    assert len((ROOT / "docs" / "architecture.md").read_text().split()) <= ARCHITECTURE_WORDS


def test_the_reading_path_is_for_one_day() -> None:
    section = (ROOT / "docs" / "architecture.md").read_text().partition("## Reading path")[2]
    files = re.findall(r"\]\(\.\./([\w/]+\.py)\)", section)
    assert len(files) == len(set(files)) > 20
    assert sum(len((ROOT / file).read_text().splitlines()) for file in files) <= READING_PATH_LINES


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page: str) -> None:
    found = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / page).read_text())
    targets = [os.path.normpath(Path(page).parent / link) for link in found if "://" not in link]
    assert not [target for target in targets if not (ROOT / target).exists()]


@pytest.mark.parametrize("page", LINKED)
def test_paths_that_are_named_exist(page: str) -> None:
    """The paths lie below the tree's own folders. `CHANGELOG.md` is exempt: it also names places of the past."""
    text = "" if page == "CHANGELOG.md" else (ROOT / page).read_text()
    folders = "launch|trainer|parallelism|comm|conf|tests|benchmarks|docs|examples"
    named = set(re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]*\w", text))
    assert not [path for path in named if not (ROOT / path).exists()]
