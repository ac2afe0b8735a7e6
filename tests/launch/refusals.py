"""The problems that a configuration is refused for, by field."""

from collections.abc import Callable, Iterable

import pytest

from shoestring.comm.errors import ConfigError, Problem


def refused(call: Callable[..., object], *arguments: object) -> dict[str, str]:
    """Return value and hint by field for all problems that `call(*arguments)` names; fail if it refuses nothing."""
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return by_field(caught.value.problems)


def by_field(problems: Iterable[Problem]) -> dict[str, str]:
    """Return value and hint by field; two problems of one field are joined."""
    found: dict[str, str] = {}
    for problem in problems:
        text = f"{problem.value!r}: {problem.hint}"
        found[problem.field] = f"{found[problem.field]}; {text}" if problem.field in found else text
    return found
