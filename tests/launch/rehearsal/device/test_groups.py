"""Process groups of a rehearsed rank: their log records, and the number of calls that create them."""

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

from shoestring.comm.communicator import Collectives
from shoestring.comm.groups import ProcessGroups
from shoestring.launch.rehearsal.log import CollectiveRecord, P2PBatchRecord, RankLog
from shoestring.tests.launch.rehearsal.rehearsed_rank import BF16_RANK, config_of
from shoestring.trainer.build import build_stage_layout


def test_communication_says_what_with_whom_and_how_much(log: RankLog) -> None:
    config = config_of(log)
    collectives = [event for event in log.events if isinstance(event, CollectiveRecord) and not event.is_warm_up]
    assert {each.group for each in collectives} >= {"world", "ep", "dense gradients"}
    assert Counter(each.group for each in collectives)["world"] == 2
    for each in collectives:
        assert log.rank in each.ranks
        if each.operation == "all_to_all":
            assert len(each.sends) == len(each.receives) == len(each.ranks)
    tokens = config.schedule.micro_batch_size * config.training.sequence_length
    if log.rank == BF16_RANK:
        copies = [each for each in collectives if each.purpose.startswith("dispatch of")]
        assert all(
            sum(each.sends) == sum(each.receives) == tokens * config.model.num_experts_per_tok for each in copies
        )
    batches = [event for event in log.events if isinstance(event, P2PBatchRecord) and not event.is_warm_up]
    messages = [message for batch in batches for message in (*batch.sends, *batch.receives)]
    assert {message.shape for message in messages} == {(1, config.training.sequence_length, config.model.hidden_size)}
    assert {message.dtype for message in messages} == {"bfloat16"}
    assert {message.peer for message in messages} == {(log.rank + config.topology.dp) % log.world_size}
    assert all(" of micro-batch " in message.purpose and ";" not in message.purpose for message in messages)


class Counting:
    """A factory that creates no group and counts the calls."""

    creation_calls = 1

    def create_world_cpu(self, ranks: tuple[int, ...], world: Collectives | None) -> Collectives | None:
        self.creation_calls += 1
        return None

    def split_group(self, name: str, parts: Sequence[tuple[int, ...]], max_ctas: int | None) -> Collectives | None:
        self.creation_calls += 1
        return None


def test_a_split_is_one_creation_of_groups(log: RankLog) -> None:
    config, counting = config_of(log), Counting()
    holders = build_stage_layout(config).replica_pp_groups()
    ProcessGroups.create(config.topology, log.rank, timedelta(seconds=1), holders, counting)
    assert log.group_creations == counting.creation_calls
    assert 5 < log.group_creations <= 20
