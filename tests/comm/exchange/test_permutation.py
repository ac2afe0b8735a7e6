"""Permutations: rows copied out, and the copies summed back."""

import pytest
import torch

from shoestring.comm.exchange.permutation import Permutation, bincount_on_device, build_destination_mask


def test_a_permutation_copies_by_member_and_sums_by_row() -> None:
    visits_XM = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    permutation = Permutation.from_destination_mask(visits_XM, copies=5)
    assert permutation.row_of_copy_C.tolist() == [0, 2, 2, 0, 2]
    rows = torch.tensor([[1.0], [10.0], [100.0]], dtype=torch.float64)
    assert permutation.permute(rows).flatten().tolist() == [1, 100, 100, 1, 100]
    copies = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    assert permutation.unpermute_and_sum(copies).flatten().tolist() == [9, 0, 22]


def test_sums_of_bf16_copies_are_fp32() -> None:
    permutation = Permutation.from_row_indices(torch.zeros(3, dtype=torch.int64), torch.tensor([3]))
    copies = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # in BF16, 256 + 1 is 256
    assert permutation.unpermute_and_sum(copies) == 258
    assert permutation.unpermute_and_sum(copies).dtype == torch.float32


@pytest.mark.parametrize("width", [0, 3])
def test_a_fan_without_copies(width: int) -> None:
    permutation = Permutation.from_destination_mask(torch.zeros(2, 4, dtype=torch.bool), copies=0)
    assert permutation.permute(torch.ones(2, width)).shape == (0, width)
    assert torch.equal(permutation.unpermute_and_sum(torch.ones(0, width)), torch.zeros(2, width))


def test_visits_pass_over_choices_elsewhere() -> None:
    assert build_destination_mask(torch.tensor([[0, 2, 2], [-1, -1, 1], [-1, -1, -1]]), 3).tolist() == [
        [True, False, True],
        [False, True, False],
        [False, False, False],
    ]


def test_choices_are_counted() -> None:
    choices = torch.randint(0, 9, (50, 3))
    assert torch.equal(bincount_on_device(choices, 12), torch.bincount(choices.flatten(), minlength=12))
