"""The tree's rules: imports point down, everything ships, everything is pinned, nothing names one machine."""

import configparser
import re
import sys
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from shoestring.tests.installed import install_wheel, run
from shoestring.tests.tree import ROOT, imports, tree_files

# A folder may import from itself and from those before it.
LAYERS = ("comm", "parallelism", "trainer", "launch")
# Folders no part of the package may import from. conf holds YAML, which is read and not imported.
OUTSIDE = ("conf", "tests", "benchmarks", "docs", "examples")
# Folders outside the package whose Python files import it.
SCRIPTS = ("tests", "benchmarks", "docs", "examples")
# Folders and files of the package that hold data.
DATA = (
    ("py.typed",),
    ("trainer", "data", "corpus"),
    ("launch", "planner", "tables"),
    ("launch", "rehearsal", "device", "cpp"),
    ("launch", "answers", "page.html"),
    ("launch", "answers", "style.css"),
)
# What a machine or its package index leaves behind in text.
TRACES = re.compile(
    r"(?<![\w.}/-])/(?:work|root|home|Users)/"
    r"|pypi\.org|pythonhosted\.org|download\.pytorch\.org|conda\.anaconda\.org|index-url|find-links"
)


def trespass(path: Path, name: tuple[str, ...]) -> str | None:
    """Return why the file `path` must not import `name`, or None."""
    dotted = ".".join(name)
    if name[0] in (*LAYERS, *OUTSIDE):
        return (
            f"{path}: `{dotted}` would load a second copy of a module; write `shoestring.{dotted}` or a relative import"
        )
    folder = path.parts[0]
    if name[0] != "shoestring" or folder in SCRIPTS:
        return None
    target = name[1] if len(name) > 1 else ""
    if path == Path("__init__.py"):  # its functions import when they are called: see the test below
        return None
    if folder not in LAYERS:
        return f"{path}: `{dotted}`, but {folder} imports nothing of the package"
    if target in OUTSIDE:
        return f"{path}: `{dotted}`, but {target} is no code of the package"
    if target in LAYERS and LAYERS.index(target) > LAYERS.index(folder):
        return f"{path}: `{dotted}` points up; imports go {' -> '.join(reversed(LAYERS))}"
    return None


def python_packages() -> set[str]:
    """Return the dotted name of every folder of the package that holds Python files."""
    folders = {path.parent for path in tree_files(".py") if path.parts[0] not in SCRIPTS}
    return {".".join(("shoestring", *folder.parts)) for folder in folders}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("trainer/model/layer.py", "from ...comm.exchange import TokenExchange", True),
        ("trainer/model/layer.py", "from ... import comm", True),
        ("trainer/model/layer.py", "from .norm import RMSNorm\nimport torch.distributed", True),
        ("trainer/loop.py", "from ..launch.cli import main", False),
        ("trainer/loop.py", "def f():\n    from .. import launch", False),
        ("trainer/loop.py", "import shoestring.launch", False),
        ("comm/exchange/flat.py", "from shoestring.parallelism import gradients", False),
        ("comm/exchange/flat.py", "import comm.refusal", False),
        ("comm/exchange/flat.py", "from ...conf import model", False),
        ("launch/cli.py", "from ..tests.processes import World", False),
        ("tests/comm/exchange/test_flat.py", "from shoestring.launch import cli", True),
        ("tests/comm/exchange/test_flat.py", "from trainer import loop", False),
        ("tests/test_x.py", "from .processes import World", True),
        ("__init__.py", "def f():\n    from .launch import cli", True),
        ("conf/__init__.py", "from ..comm import refusal", False),
    ],
)
def test_the_rule_itself(path: str, source: str, allowed: bool) -> None:
    found = [trespass(Path(path), name) for name in imports(source, Path(path))]
    assert any(found) != allowed


def test_imports_point_down() -> None:
    found = [
        problem
        for path in tree_files(".py")
        for name in imports((ROOT / path).read_text(), path)
        if (problem := trespass(path, name)) is not None
    ]
    assert not found, "\n".join(found)


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; held = set(sys.modules); import shoestring; print(*sorted(set(sys.modules) - held))"
    loaded = run(sys.executable, "-c", code, cwd=ROOT).split()
    assert not [name for name in loaded if name.startswith(("shoestring.", "torch", "hydra", "numpy"))], loaded


def test_setup_cfg_lists_every_package() -> None:
    listed = setup_cfg()["options"]["packages"].split()
    assert sorted(listed) == sorted(python_packages())


def test_the_lock_pins_every_requirement() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    locked = {canonicalize_name(name): version for name, version in pins.items()}
    parser = setup_cfg()
    wanted = parser["options"]["install_requires"].split("\n") + parser["options.extras_require"]["dev"].split("\n")
    for requirement in map(Requirement, filter(None, wanted)):
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"requirements.lock lacks {requirement.name}"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} but the lock has {version}"
    assert not [pin for pin in pins.values() if "+" in pin], "a local version is one machine's build"


def test_every_yaml_under_conf_parses() -> None:
    files = [path for path in tree_files(".yaml") if path.parts[0] == "conf"]
    assert files
    for path in files:
        OmegaConf.load(ROOT / path)


def test_no_file_names_a_machine_or_a_package_index() -> None:
    found = []
    for path in tree_files():
        if ROOT / path == Path(__file__).resolve():
            continue
        for number, line in enumerate((ROOT / path).read_text(errors="replace").splitlines(), 1):
            if TRACES.search(line):
                found.append(f"{path}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)


def test_an_installed_wheel_is_whole(tmp_path: Path) -> None:
    wheel, site = install_wheel(tmp_path)

    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("shoestring/")}
    shipped = [
        path
        for path in tree_files()
        if path.parts[0] not in SCRIPTS
        and (path.suffix == ".py" or path.parts[0] == "conf" or any(path.parts[: len(data)] == data for data in DATA))
    ]
    assert held == {f"shoestring/{path.as_posix()}" for path in shipped}

    # The path goes first: the checkout, which is installed editable in this environment, must not answer instead.
    code = f"""
import sys
sys.path.insert(0, {str(site)!r})
import shoestring.conf, shoestring.comm.errors
from importlib.resources import files
assert files("shoestring.conf").joinpath("config.yaml").is_file()
print(shoestring.comm.errors.__file__)
"""
    assert run(sys.executable, "-P", "-c", code, cwd=tmp_path).startswith(str(site))
