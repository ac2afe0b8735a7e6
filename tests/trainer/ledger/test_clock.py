"""Times that processes can compare."""

from pathlib import Path

from shoestring.trainer.ledger.clock import Instant


def test_instants_of_different_boots_compare_by_the_wall(tmp_path: Path) -> None:
    start = Instant(wall_ns=100, monotonic_ns=9000, boot="one")
    assert Instant(wall_ns=50, monotonic_ns=9400, boot="one").ns_since(start) == 400
    assert Instant(wall_ns=700, monotonic_ns=10, boot="two").ns_since(start) == 600
    assert Instant(wall_ns=50, monotonic_ns=10, boot="two").ns_since(start) == 0
