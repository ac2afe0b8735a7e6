"""Each module's test is found by its path, no test imports from another, and no folder is crowded."""

import re
from functools import cache
from pathlib import Path

import pytest

from shoestring.tests.tree import ROOT, imports, tree_files

PACKAGE = ("comm", "parallelism", "trainer", "launch")
MIRRORED = (*PACKAGE, "benchmarks", "docs", "examples")
# Folders of tests that cut across the tree.
ACROSS = ("parity", "reference", "fuzz")
MOST_FILES = 18
MOST_LOOSE_FILES = {"trainer": 5, "launch": 5}


def modules() -> list[Path]:
    """Return the package's Python files, relative to the root, without `__init__`."""
    return [path for path in tree_files(".py") if path.parts[0] in PACKAGE and path.stem != "__init__"]


def mirrored_tests() -> list[Path]:
    """Return test modules that stand for a module or a folder, relative to `tests/`."""
    tests = [path.relative_to("tests") for path in tree_files(".py") if path.parts[0] == "tests"]
    tests = [test for test in tests if test.name.startswith("test_") and len(test.parts) > 1]
    return [test for test in tests if test.parts[0] not in ACROSS]


def subject_of(test: Path) -> Path | None:
    """Return the subject of a test by the longest part of its name: a module, a script, a folder or its own folder."""
    words = test.stem.removeprefix("test_").split("_")
    for count in range(len(words), 0, -1):
        subject = test.parent / "_".join(words[:count])
        if any((ROOT / f"{subject}{suffix}").exists() for suffix in (".py", ".sh", "")):
            return subject
        if subject.name == test.parent.name:
            return test.parent
    return None


@cache
def named_in(path: Path) -> frozenset[Path]:
    """Return the tree's files that a file imports or names: as a module to run, or as a file in its folder."""
    source = (ROOT / path).read_text()
    names = {name[1:] for name in imports(source, path) if name[0] == "shoestring"}
    names |= {tuple(name.split(".")[1:]) for name in re.findall(r"shoestring(?:\.\w+)+", source)}
    files = {Path(*name[:count]).with_suffix(".py") for name in names for count in range(1, len(name) + 1)}
    files |= {path.with_name(name) for name in re.findall(r'"(\w+\.py)"', source)}
    return frozenset(file for file in files if (ROOT / file).is_file())


def reached(path: Path) -> set[Path]:
    """Return the files that a file names, directly or through others."""
    found, waiting = {path}, [path]
    while waiting:
        new = named_in(waiting.pop()) - found
        found |= new
        waiting.extend(new)
    return found


@pytest.mark.parametrize(
    ("test", "subject"),
    [
        ("trainer/test_loop.py", "trainer/loop"),
        ("trainer/test_loop_resume.py", "trainer/loop"),
        ("trainer/test_checkpoint.py", "trainer/checkpoint"),
        ("trainer/ledger/test_ledger_full_disk.py", "trainer/ledger"),
        ("launch/run/test_run_dir.py", "launch/run/run_dir"),
        ("launch/run/test_run_slurm.py", "launch/run"),
        ("launch/test_quickstart.py", "launch/quickstart"),
        ("trainer/test_resume.py", None),
        ("trainer/checkpoint/test_loop.py", None),
    ],
)
def test_the_rule_itself(test: str, subject: str | None) -> None:
    assert subject_of(Path(test)) == (None if subject is None else Path(subject))


def test_no_test_imports_from_another() -> None:
    found = [
        f"tests/{path}: imports `{'.'.join(name)}`; what tests share belongs in a module that is not a test_*.py"
        for path in (path.relative_to("tests") for path in tree_files(".py") if path.parts[0] == "tests")
        for name in imports((ROOT / "tests" / path).read_text(), "tests" / path)
        if name[:2] == ("shoestring", "tests") and any(part.startswith("test_") for part in name[2:])
    ]
    assert not found, "\n".join(found)


def test_each_test_is_named_for_what_it_tests() -> None:
    found = [
        f"tests/{test}: neither {test.parent} nor a module or folder in it has this name; "
        f"expected tests/{test.parent}/test_MODULE.py, test_MODULE_ASPECT.py or test_{test.parent.name}_ASPECT.py"
        for test in mirrored_tests()
        if test.parts[0] not in MIRRORED or subject_of(test) is None
    ]
    assert not found, "\n".join(found)


def test_each_module_has_a_test_by_its_path() -> None:
    subjects = {test: subject_of(test) for test in mirrored_tests()}
    of_folders: dict[Path, set[Path]] = {}
    for test, subject in subjects.items():
        if subject in (test.parent, test.parent / test.parent.name):  # trainer/model/ has a model.py
            of_folders.setdefault(test.parent, set()).update(reached("tests" / test))
    found = [
        f"{module}: expected tests/{module.parent}/test_{module.stem}.py, or a tests/{module.parent}/"
        f"test_{module.parent.name}.py for the folder that runs it"
        for module in modules()
        if module.with_suffix("") not in subjects.values() and module not in of_folders.get(module.parent, ())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", sorted({path.parent for path in modules()}), ids=str)
def test_no_folder_is_crowded(folder: Path) -> None:
    count = sum(path.parent == folder for path in modules())
    most = MOST_LOOSE_FILES.get(str(folder), MOST_FILES)
    assert count <= most, (
        f"{folder}/: {count} Python files without __init__.py, at most {most}; move some into a folder"
    )
