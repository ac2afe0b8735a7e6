"""Tables of measured kernel times by shape and role, and the evidence behind a forecast."""

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from functools import cache
from importlib.resources import files
from pathlib import Path

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import config_error_context, read_text
from ...comm.files.strict_json import shorten_for_message
from .recipe import GemmPrecision

_UNITS = ("us", "GB/s", "share", "SMs", "")
_RATES = ("GB/s", "share")
_MOST_BYTES = 2**26


@dataclass(frozen=True)
class KernelMeasurement:
    """One measurement. `tokens`, `inputs` and `outputs` are the shape, as far as the kind has one."""

    kind: str
    """`gemm`, `grouped`, `attention`, `memory`, `launch`, `exchange`, `sync`, `phase`, `edge` (a P2P message), or
    `recipe`: the configured value (`role`) with which whole phases were measured."""
    name: str
    role: str
    dtype: str
    tokens: int
    inputs: int
    outputs: int
    value: float
    unit: str
    """`us`, `GB/s` or `share` (of peak)."""
    evidence: str
    """`measured`, `published` or `assumed`."""
    source: str

    @property
    def seconds(self) -> float:
        """Seconds of a row in microseconds. Raises `ConfigError` for a row in another unit."""
        if self.unit != "us":
            where = f"cluster.tables: {self.kind} {self.name} {self.role}"
            raise ConfigError(
                [Problem(where, self.unit, "must be in us; write the table again with `shoestring calibrate`")]
            )
        return self.value * 1e-6


_COLUMNS = tuple(column.name for column in fields(KernelMeasurement))


@dataclass(frozen=True)
class KernelTable:
    """All rows of one cluster."""

    name: str
    rows: tuple[KernelMeasurement, ...]
    _index: dict[tuple[str, str, str], list[KernelMeasurement]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for row in self.rows:
            self._index[row.kind, row.role, row.dtype].append(row)

    @property
    def measured_recipe(self) -> dict[str, str]:
        """Recipe of a table of whole phases, by configuration key; empty for a table of kernels."""
        return {row.name: row.role for row in self.rows if row.kind == "recipe"}

    @property
    def reserved_sms(self) -> KernelMeasurement | None:
        """Row with the SMs that communicated during the measurements; None if the table does not say."""
        return self.find_row("gemm", "lent_sms", "any")

    def select(self, kind: str, role: str, dtype: str = "any") -> Sequence[KernelMeasurement]:
        """Return the rows of one kind, role and dtype."""
        return self._index.get((kind, role, dtype), ())

    def select_any_format(self, kind: str, role: str) -> list[KernelMeasurement]:
        """Return the rows of one kind and role in every format of GEMMs."""
        return [row for precision in GemmPrecision for row in self.select(kind, role, precision.value)]

    def find_row(self, kind: str, name: str, role: str, dtype: str = "any") -> KernelMeasurement | None:
        """Return the row with this name, or None."""
        return next((row for row in self.select(kind, role, dtype) if row.name == name), None)

    def nearest_row(
        self, kind: str, role: str, dtype: str, shape: tuple[int, int, int]
    ) -> tuple[KernelMeasurement, bool] | None:
        """Return the row with the most similar (tokens, inputs, outputs), and whether it is a hit.

        A hit has the same weight matrix and between half and twice the tokens. None if the table has no such row.
        """
        # Grouped GEMMs are found by total rows too, so the number of experts per rank does not count yet: 64 x 512 rows
        # run at a lower share of peak than 32 x 1,024 (SimuMax's B200 tables).
        rows = [row for row in self.select(kind, role, dtype) if min(row.tokens, row.inputs, row.outputs) > 0]
        if not rows:
            return None
        # Distance in logarithms: twice as large is as far as half as large.
        row = min(rows, key=lambda row: _distance((row.tokens, row.inputs, row.outputs), shape))
        same = (row.inputs, row.outputs) == shape[1:]
        return row, same and 0.5 <= shape[0] / row.tokens <= 2


def _distance(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    return sum(abs(math.log(x / y)) for x, y in zip(a, b, strict=True))


@cache
def read_kernel_table(name: str) -> KernelTable:
    """Read a table shipped with the planner by name, or a CSV file by path. Raises `ConfigError`."""
    shipped = files(__package__).joinpath("tables", f"{name}.csv")
    if shipped.is_file():
        text = shipped.read_text()
    elif Path(name).exists():
        with config_error_context(name, "name a table that `shoestring calibrate` wrote"):
            text = read_text(Path(name), _MOST_BYTES)
    else:
        hint = "is neither a table of the planner nor a file; `shoestring calibrate` writes one for this machine"
        raise ConfigError([Problem("cluster.tables", name, hint)])
    reader = csv.DictReader(text.splitlines())
    try:
        if tuple(reader.fieldnames or ()) != _COLUMNS:
            raise ConfigError([Problem("cluster.tables", name, f"must have the columns {','.join(_COLUMNS)}")])
        return KernelTable(name, tuple(_parse_row(f"{name}:{reader.line_num}", line) for line in reader))
    except csv.Error as error:  # a cell of more than 131,072 characters
        raise ConfigError([Problem(f"{name}:{reader.line_num}", None, f"is not a line of a table: {error}")]) from error


def _parse_row(place: str, line: Mapping[str | None, str | None]) -> KernelMeasurement:
    """Parse one line, at `place`, as `csv.DictReader` gives it. Raises `ConfigError` for a malformed one."""
    cells = [cell for column, cell in line.items() if column is not None and cell is not None]
    try:
        if len(cells) < len(_COLUMNS) or None in line:
            raise ValueError(f"it must have {len(_COLUMNS)} columns")
        kind, name, role, dtype, *shape, value, unit, evidence, source = cells
        tokens, inputs, outputs = (int(cell or 0) for cell in shape)
        row = KernelMeasurement(kind, name, role, dtype, tokens, inputs, outputs, float(value), unit, evidence, source)
        if min(tokens, inputs, outputs) < 0 or not 0 <= row.value < math.inf:
            raise ValueError("a number that is negative or not finite")
        if unit in _RATES and row.value == 0:
            raise ValueError("a rate of 0")
        if unit not in _UNITS or evidence not in EVIDENCE_CLASSES:
            raise ValueError(f"units are {', '.join(_UNITS)}, and evidence {', '.join(EVIDENCE_CLASSES)}")
    except ValueError as error:
        hint = f"is not a row of the table ({error}); write the table again with `shoestring calibrate`"
        raise ConfigError([Problem(place, shorten_for_message(",".join(map(str, line.values()))), hint)]) from error
    return row


def write_kernel_table(path: Path, rows: Sequence[KernelMeasurement]) -> None:
    """Write `rows` to the CSV file `path`, in the format of `read_kernel_table`."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(map(astuple, rows))


EVIDENCE_CLASSES = ("measured", "published", "assumed")
"""Evidence classes from the strongest to the weakest."""


def weakest_evidence(*classes: str) -> str:
    """Return the weakest of `classes`: the class of a price that depends on all of them."""
    return max(classes, key=EVIDENCE_CLASSES.index)


@dataclass
class EvidenceCoverage:
    """Priced time by evidence class, and the operations for which no table has a row."""

    strongest_evidence: str = "measured"
    """Class of the table for this cluster: no price is stronger. H800 times are `assumed` for H100, for example."""

    seconds_by_evidence: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds by evidence class."""
    substituted_rows: dict[str, str] = field(default_factory=dict)
    """Operation to the row used instead."""

    def add_seconds(self, evidence: str, seconds: float) -> None:
        """Count `seconds` of evidence class `evidence`."""
        self.seconds_by_evidence[weakest_evidence(evidence, self.strongest_evidence)] += seconds

    def evidence_shares(self) -> dict[str, float]:
        """Return the fraction of the priced time of each evidence class; they add up to 1."""
        total = sum(self.seconds_by_evidence.values())
        return {name: seconds / total for name, seconds in sorted(self.seconds_by_evidence.items())} if total else {}
