"""The configuration of the budget: all its problems."""

from shoestring.tests.trainer.ledger.small_ledger import BUDGET
from shoestring.trainer.ledger.config import BudgetConfig


def test_the_configuration_lists_all_its_problems() -> None:
    assert [problem.field for problem in BudgetConfig(gpu_hours=0, phase="nap").problems()] == ["gpu_hours", "phase"]
    assert not list(BUDGET.problems())
