"""Random numbers of a document: its own, uniform, and the same on every machine."""

import numpy as np

from shoestring.trainer.data.document_random import document_key, uniform_fraction, uniform_fractions


def test_numbers_never_change() -> None:
    """Prepared data relies on it: other numbers would shuffle and cut its documents otherwise."""
    assert document_key(0, "order", "a.jsonl", 7) == 17699966032120006589
    assert uniform_fractions(5, 3).tolist() == [0.386768045983934, 0.7523070158382239, 0.2327091656774618]


def test_keys_differ_by_seed_purpose_file_and_place() -> None:
    keys = {
        document_key(seed, purpose, file, place)
        for seed in (0, 1)
        for purpose in ("order", "fim")
        for file in ("a", "b")
        for place in (0, 1)
    }
    assert len(keys) == 16


def test_fractions_are_uniform() -> None:
    found = np.array([uniform_fraction(document_key(0, "order", "a", place)) for place in range(4000)])
    many = uniform_fractions(document_key(0, "split", "a", 0), 4000)
    for each in (found, many):
        assert ((each >= 0) & (each < 1)).all()
        counts = np.histogram(each, bins=10, range=(0, 1))[0]
        assert np.abs(counts - 400).max() < 4.5 * (4000 * 0.1 * 0.9) ** 0.5
