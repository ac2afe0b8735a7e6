"""Strict YAML reader: bounded bytes, depth and number of values after aliases are expanded."""

from io import StringIO
from pathlib import Path

import yaml

from .file_io import read_text
from .strict_json import MAX_DEPTH, MalformedFileError

MAX_YAML_BYTES = 2**18
"""Largest file. A run's whole configuration has 5 kB, and PyYAML reads about 200 kB/s."""
_MAX_NODES = 100_000
"""Most values of a file with every alias expanded."""


def read_yaml(path: Path, *, resolve: bool = True) -> object:
    """Read a YAML file into plain values; `resolve` interpolations. Raises `MalformedFileError` and `OSError`."""
    from omegaconf import OmegaConf  # takes 0.1 s, and most readers of a run directory need no YAML
    from omegaconf.errors import OmegaConfBaseException

    text = read_checked_yaml_text(path)
    try:
        tree: object = OmegaConf.to_container(OmegaConf.load(StringIO(text)), resolve=resolve)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise MalformedFileError("", str(error), "is not a YAML configuration") from error
    except (ValueError, TypeError, OSError) as error:  # a date of no calendar, a document that is one number
        raise MalformedFileError("", f"{type(error).__name__}: {error}", "is not a YAML configuration") from error
    except RecursionError as error:
        raise MalformedFileError("", str(path), "refers to itself") from error
    return tree


def read_checked_yaml_text(path: Path) -> str:
    """Return the text of a YAML file that is safe to load. Raises `MalformedFileError` and `OSError`."""
    text = read_text(path, MAX_YAML_BYTES)
    try:
        _refuse_depth(text)
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f"line {mark.line + 1}"
        raise MalformedFileError(where, str(error.context), f"is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:  # a character that no document may hold
        raise MalformedFileError("", str(error), "is not YAML") from error
    except MalformedFileError:
        raise
    except ValueError as error:  # an escape of no character
        raise MalformedFileError("", str(error), "is not YAML") from error
    if root is not None:
        _count_nodes(root, {}, ())
    return text


def _refuse_depth(text: str) -> None:
    """Raise `MalformedFileError` for more than `MAX_DEPTH` levels."""
    # Events come one by one. `yaml.compose` recurses and would exceed Python's stack first.
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise MalformedFileError("", f"{text[:20]}…", f"is nested more than {MAX_DEPTH} deep")


def _refuse_repeats(node: yaml.MappingNode) -> None:
    keys: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.value in keys:
            raise MalformedFileError(f"line {key.start_mark.line + 1}", key.value, "is a repeated key")
        keys.add(key.value)


def _count_nodes(node: yaml.Node, known: dict[int, int], ancestors: tuple[int, ...]) -> int:
    """Return the number of nodes in and below `node`, counting a node again at each alias."""
    # A few kB of nested aliases can expand to billions of values ("billion laughs").
    if id(node) in ancestors:
        raise MalformedFileError(f"line {node.start_mark.line + 1}", "*", "is an alias for a value that contains it")
    if id(node) not in known:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = list(node.value)
        elif isinstance(node, yaml.MappingNode):
            _refuse_repeats(node)
            inner = [each for pair in node.value for each in pair]
        known[id(node)] = 1 + sum(_count_nodes(each, known, (*ancestors, id(node))) for each in inner)
        if known[id(node)] > _MAX_NODES:
            hint = f"contains more than {_MAX_NODES} values when every alias is expanded"
            raise MalformedFileError(f"line {node.start_mark.line + 1}", known[id(node)], hint)
    return known[id(node)]
