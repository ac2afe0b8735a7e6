"""torchrun as the launcher starts it: ranks meet at the loopback address, and failed ranks are named."""

from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters

from shoestring.launch.run.torchrun_agent import LoopbackRendezvous, describe_rank_failure


def test_ranks_of_one_machine_meet_at_its_loopback_address_alone() -> None:
    rendezvous = LoopbackRendezvous(RendezvousParameters("loopback", "127.0.0.1", "run", 1, 1))
    info = rendezvous.next_rendezvous()
    assert (info.rank, info.world_size, rendezvous.use_agent_store) == (0, 1, True)
    store = info.bootstrap_store_info
    assert store is not None
    port = f"{store.master_port:04X}"
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    assert {row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port}")} == {f"0100007F:{port}"}


def test_failed_ranks_in_a_line() -> None:
    def failure(rank: int, code: int) -> ProcessFailure:
        made = ProcessFailure(local_rank=rank, pid=10 + rank, exitcode=code, error_file="<N/A>")
        made.timestamp = rank
        return made

    killed = ChildFailedError("rank", {0: failure(0, -9), 3: failure(3, 1)})
    assert describe_rank_failure(killed) == "rank 0 was killed by SIGKILL, then 1 more on this machine"
    assert describe_rank_failure(ChildFailedError("rank", {1: failure(1, 7)})) == "rank 1 exited with 7"
