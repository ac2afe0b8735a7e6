"""Configuration section of a report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..answers.blocks import ConfigurationBlock, MissingDataNotice, PageSection
from .run_record import RunRecord


def configuration_section(record: RunRecord) -> PageSection:
    """Return the section with the configuration of the last attempt, by group."""
    if not record.config:
        return PageSection("configuration", "Configuration", [MissingDataNotice("The configuration is not recorded.")])
    groups = [(name, list(_flat(tree))) for name, tree in record.config.items() if isinstance(tree, Mapping)]
    return PageSection("configuration", "Configuration", [ConfigurationBlock(groups)])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) and value.isprintable() else json.dumps(value)
