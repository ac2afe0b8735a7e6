"""The text and tables of a result agree with its JSON."""

from dataclasses import replace

import pytest

from shoestring.launch.rehearsal.answer import rehearsal_answer
from shoestring.launch.rehearsal.log import HostWait
from shoestring.tests.launch.rehearsal.judged import ENDS, MIDDLE, judged, printed, tree
from shoestring.tests.launch.rehearsal.logs import batch, collective, log, message
from shoestring.tests.launch.renderings import check_renderings


def test_the_tables_say_what_the_tree_says() -> None:
    read = HostWait(None, "compute", "read", "F: comm/exchange/two_hop.py:9 sizes")
    result = judged(replace(log(0, read, collective("x"), batch([message("a", 3)])), launches=ENDS[:1] + MIDDLE[2:3]))
    (rank,) = tree(result)["ranks"]
    assert (rank["collectives"], rank["p2p_batches"], rank["host_waits"], rank["group_creations"]) == (1, 1, 1, 14)
    assert rank["peak_relative_error"] == pytest.approx(70 / 71 - 1)
    text = printed(result, operations=1)
    assert "75.16 │ mlp(B) │     76.24 │      -1.4% │        81.60 │" in text
    assert "│ comm/exchange/two_hop.py:9 sizes │ read   │ no" in text
    assert "│ MoE layer, total │ without weight gradients │ exchange │      1.5 │" in text
    assert "│ MoE layer, total │ without weight gradients │ all      │      7.5 │" in text
    assert not tree(result)["moe_layer_totals_have_weight_gradients"]
    whole = judged(replace(log(0), launches=ENDS), replace(log(1), launches=MIDDLE))
    assert "│ MoE layer, total │ forward + backward │ exchange │" in printed(whole, operations=0)
    assert "comm/exchange/permutation.py:spread" in text
    assert "attention.py" not in text
    assert "comm/exchange/permutation.py:spread" not in printed(result)


def test_three_renderings_show_the_same_numbers() -> None:
    wait = HostWait(None, "compute", "read", "F: comm/exchange/two_hop.py:9 sizes")
    result = judged(replace(log(0, wait), launches=ENDS), replace(log(1), launches=MIDDLE))
    check_renderings(rehearsal_answer(result, operations=2), smallest_number_of_quantities=60)
