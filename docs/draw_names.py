"""Draw 40 public names of the package at random, with their files and parameters.

    python docs/draw_names.py [SEED]

A reader who knows Megatron-LM explains each of them from the names alone: of the file, the class, the function and its
parameters. A name that such a reader cannot explain is renamed. Without SEED, the script chooses one and prints it.
"""

import argparse
import ast
import random
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ("comm", "parallelism", "trainer", "launch")
NAMES = 40
_PROPERTIES = ("property", "cached_property")


def public_names(source: str) -> Iterator[str]:
    """Yield each public function, class, method and property of a module, with its parameters."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield f"function {node.name}({_parameters(node)})"
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield f"class {node.name}"
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                    yield _member(node.name, member)


def _member(owner: str, member: ast.FunctionDef) -> str:
    decorators = {each.id for each in member.decorator_list if isinstance(each, ast.Name)}
    if decorators.intersection(_PROPERTIES):
        return f"property {owner}.{member.name}"
    return f"method {owner}.{member.name}({_parameters(member)})"


def _parameters(function: ast.FunctionDef) -> str:
    arguments = function.args
    named = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    return ", ".join(each.arg for each in named if each.arg not in ("self", "cls"))


def package_names() -> list[str]:
    """Return every public name of the package as `path: kind name(parameters)`, in the order of files."""
    files = [file for folder in PACKAGE for file in sorted((ROOT / folder).rglob("*.py"))]
    return [f"{file.relative_to(ROOT)}: {name}" for file in files for name in public_names(file.read_text())]


def main() -> None:
    """Print the seed and the names that it draws."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("seed", type=int, nargs="?", metavar="SEED", help="seed of the draw (default: a random one)")
    seed: int | None = parser.parse_args().seed
    if seed is None:
        seed = random.SystemRandom().randrange(10**6)
    names = package_names()
    print(f"seed {seed}, {NAMES} of {len(names)} public names")
    for number, name in enumerate(random.Random(seed).sample(names, NAMES), 1):
        print(f"{number:2} {name}")


if __name__ == "__main__":
    main()
