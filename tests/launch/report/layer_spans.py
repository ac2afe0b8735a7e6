"""Trace spans of a rank that runs pairs of layers."""

from shoestring.comm.trace import EXPOSED_ALL_TO_ALL, TimelineTrack
from shoestring.launch.report.trace_svg import LAYER_PAIR_PHASES
from shoestring.trainer.telemetry.trace import Span

MS = 1_000_000
FORWARD, BACKWARD = "layer_02, micro-batch 3", "layer_05, micro-batch 1"


def pair_spans(start: int, scale: int) -> list[Span]:
    """Return one pair of 60 times `scale` milliseconds, in which attn(F) waits for half of its time."""
    unit, of = scale * MS, {"F": FORWARD, "B": BACKWARD, "W": BACKWARD}
    begins = {name: start + 10 * index * unit for index, name in enumerate(LAYER_PAIR_PHASES)}
    spans = [
        Span(TimelineTrack.COMPUTE, name, of[name[-2]], begin, begin + 10 * unit) for name, begin in begins.items()
    ]
    spans += [
        Span(TimelineTrack.LAUNCH, f"combine_backward of {BACKWARD}", "", start, start),
        Span(TimelineTrack.EXCHANGE, f"combine_backward of {BACKWARD}", "", start, start + 15 * unit),
        Span(TimelineTrack.COMPUTE, EXPOSED_ALL_TO_ALL, BACKWARD, start + 10 * unit, start + 15 * unit),
        Span(TimelineTrack.LAUNCH, f"dispatch of {FORWARD}", "", start + 10 * unit, start + 10 * unit),
        Span(TimelineTrack.EXCHANGE, f"dispatch of {FORWARD}", "", start + 15 * unit, start + 25 * unit),
    ]
    return spans


def trace() -> list[Span]:
    """Return one FB of three pairs, one pair that lacks its end, and a forward alone."""
    pairs = [*pair_spans(0, 1), *pair_spans(60 * MS, 3), *pair_spans(240 * MS, 2)]
    unfinished = [
        Span(TimelineTrack.LAUNCH, f"combine_backward of {BACKWARD}", "", 360 * MS, 360 * MS),
        Span(TimelineTrack.COMPUTE, "attn(W)", BACKWARD, 360 * MS, 370 * MS),
    ]
    unfinished += [  # and a pair with a dense layer
        Span(TimelineTrack.LAUNCH, f"combine_backward of {BACKWARD}", "", 372 * MS, 372 * MS),
        *(Span(TimelineTrack.COMPUTE, name, FORWARD, 373 * MS, 374 * MS) for name in ("dense(F)", *LAYER_PAIR_PHASES)),
        Span(TimelineTrack.LAUNCH, f"combine_backward of {BACKWARD}", "", 378 * MS, 378 * MS),
    ]
    alone = [
        Span(TimelineTrack.INSTRUCTION, "F", "", 400 * MS, 410 * MS),
        Span(TimelineTrack.COMPUTE, "attn(F)", FORWARD, 401 * MS, 402 * MS),
    ]
    return [Span(TimelineTrack.INSTRUCTION, "FB", "FB", 0, 380 * MS), *pairs, *unfinished, *alone]
