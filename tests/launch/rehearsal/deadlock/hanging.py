"""The single finding of logs that hang, and messages of two ranks."""

from shoestring.launch.rehearsal.deadlock.diagnosis import find_hangs
from shoestring.launch.rehearsal.findings import RunFinding
from shoestring.launch.rehearsal.log import RankLog


def only(*logs: RankLog) -> RunFinding:
    (fault,) = find_hangs(logs)
    return fault
