"""A fault of several ranks and instructions is one finding."""

from shoestring.launch.rehearsal.log import RankFinding
from shoestring.tests.launch.rehearsal.judged import judged
from shoestring.tests.launch.rehearsal.logs import log


def test_a_line_that_several_instructions_run_is_one_finding() -> None:
    each = [RankFinding("host read", "the host waits", f"instruction {number}: a.py:3 f") for number in range(5)]
    (fault,) = judged(log(0, findings=each), log(1, findings=each)).findings
    assert (fault.ranks, fault.code_locations) == ((0, 1), ("instruction 0: a.py:3 f",))
    assert fault.text == "the host waits; 10 times"
