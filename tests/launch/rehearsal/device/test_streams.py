"""Events of a rehearsed rank's streams."""

from shoestring.launch.rehearsal.log import EventRecord, RankLog, StreamWait


def test_events_are_recorded_before_they_are_waited_for(log: RankLog) -> None:
    recorded = set()
    for event in log.events:
        if isinstance(event, EventRecord):
            recorded.add(event.event)
        elif isinstance(event, StreamWait):
            assert event.event in recorded
    streams = {event.stream for event in log.events}
    assert streams == {"compute", "exchange", "p2p next", "p2p prev", "reduce"}
