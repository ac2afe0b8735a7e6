"""Check that an answer's terminal text, JSON and page hold the same numbers."""

import html
import json
import math
from collections.abc import Iterator

from shoestring.launch.answers.blocks import Answer, Block, Quantity, TableBlock
from shoestring.launch.answers.page import html_page
from shoestring.launch.answers.terminal import terminal_text


def check_renderings(answer: Answer, *, smallest_number_of_quantities: int = 1) -> None:
    """Each quantity of the answer is printed in the terminal and on the page, and its value stands in the JSON."""
    in_terminal = terminal_text(answer, width=1000, colors=False)
    on_page = html.unescape(html_page(answer, "shoestring test"))
    in_json = list(_numbers(json.loads(json.dumps(answer.data))))
    quantities = [each for section in answer.sections for block in section.blocks for each in _quantities(block)]
    assert len(quantities) >= smallest_number_of_quantities
    for quantity in quantities:
        assert quantity.text in in_terminal, quantity
        assert quantity.text in on_page, quantity
        assert any(math.isclose(quantity.value, number, rel_tol=1e-9, abs_tol=1e-12) for number in in_json), quantity
    for card in answer.cards:
        assert card.value in in_terminal
        assert card.value in on_page


def _quantities(block: Block) -> Iterator[Quantity]:
    if isinstance(block, TableBlock):
        yield from (cell for row in block.rows for cell in row.cells if isinstance(cell, Quantity))


def _numbers(tree: object) -> Iterator[float]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _numbers(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _numbers(value)
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield float(tree)
