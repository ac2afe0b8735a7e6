"""The walk of a stage: which parts in which order, forward and backward."""

from dataclasses import dataclass, field

from typing_extensions import override

from shoestring.parallelism.pipeline.chunk_walk import (
    ChunkInterpreter,
    ExchangeOperation,
    LayerPart,
    MoELayerInterpreter,
    StageShape,
    walk_backward,
    walk_forward,
)
from shoestring.parallelism.pipeline.instruction import Resumable, interleave, run_to_completion

WHOLE = StageShape(dense_layers=1, moe_layers=1, is_first=True, is_last=True)
MIDDLE = StageShape(dense_layers=0, moe_layers=2, is_first=False, is_last=False)
MOE_FORWARD = "attn, launch dispatch, shared, wait dispatch, mlp, launch combine, wait combine, merge"
MOE_BACKWARD = (
    "launch combine_backward, flush attn, shared, wait combine_backward, mlp, launch dispatch_backward, flush mlp, "
    "wait dispatch_backward, attn"
)


@dataclass
class Layer(MoELayerInterpreter):
    diary: list[str]

    @override
    def compute(self, part: LayerPart) -> None:
        self.diary.append(str(part))

    @override
    def launch(self, exchange: ExchangeOperation) -> None:
        self.diary.append(f"launch {exchange}")

    @override
    def launch_second_part(self) -> None:
        self.diary.append("launch second part")

    @override
    def wait(self, exchange: ExchangeOperation) -> None:
        self.diary.append(f"wait {exchange}")

    @override
    def flush_weight_gradients(self, part: LayerPart) -> None:
        self.diary.append(f"flush {part}")


@dataclass
class Diary(ChunkInterpreter):
    """Interpreter that writes down what it is told."""

    entries: list[str] = field(default_factory=list)

    @override
    def compute(self, part: LayerPart, index: int) -> None:
        self.entries.append(f"{part} {index}")

    @override
    def moe_layer(self, place: int) -> MoELayerInterpreter:
        self.entries.append(f"layer {place}:")
        return Layer(self.entries)

    @override
    def flush_weight_gradients(self, part: LayerPart) -> None:
        self.entries.append(f"flush {part}")

    @property
    def text(self) -> str:
        return ", ".join(self.entries)


def walked(steps: Resumable[None], diary: Diary) -> str:
    run_to_completion(steps)
    return diary.text


def test_the_forward_of_a_whole_model() -> None:
    assert walked(walk_forward(WHOLE, 1, diary := Diary()), diary) == (
        f"embedding 0, dense 0, layer 1:, {MOE_FORWARD}, norm 0, loss 0, mtp 1, layer 2:, {MOE_FORWARD}, norm 1, loss 1"
    )


def test_the_backward_of_a_whole_model_begins_with_all_losses() -> None:
    assert walked(walk_backward(WHOLE, 1, diary := Diary()), diary) == (
        f"loss 0, loss 1, norm 1, layer 2:, {MOE_BACKWARD}, mtp 1, norm 0, layer 1:, {MOE_BACKWARD}, dense 0, "
        "embedding 0, flush attn"
    )


def test_a_middle_stage_has_only_layers() -> None:
    assert (
        walked(walk_forward(MIDDLE, 1, diary := Diary()), diary) == f"layer 0:, {MOE_FORWARD}, layer 1:, {MOE_FORWARD}"
    )
    assert walked(walk_backward(MIDDLE, 1, diary := Diary()), diary) == (
        f"layer 1:, {MOE_BACKWARD}, layer 0:, {MOE_BACKWARD}, flush attn"
    )


def test_interleaved_the_second_part_of_a_dispatch_follows_the_other_halfs_experts() -> None:
    both = Diary()
    interleave(walk_backward(MIDDLE, 0, both), walk_forward(MIDDLE, 0, both))
    halves = (
        "launch dispatch, shared, wait combine_backward, mlp, launch second part, launch dispatch_backward, flush mlp, "
        "shared, wait dispatch, mlp, launch combine, wait dispatch_backward, attn"
    )
    assert both.text == (
        f"layer 1:, launch combine_backward, flush attn, layer 0:, attn, {halves}, "
        f"layer 0:, launch combine_backward, flush attn, wait combine, merge, layer 1:, attn, {halves}, "
        "flush attn, wait combine, merge"
    )
