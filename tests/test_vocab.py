"""The token windows: published offsets, and no token in two windows or in none."""

import pytest

from aitok_jax.tasks.vocabulary import Vocabulary, Window


def owners(vocabulary: Vocabulary) -> list[int]:
    """Number of windows that every token below the spare codes belongs to."""
    counts = [0] * (vocabulary.size - vocabulary.num_spare)
    for window in (vocabulary.coordinates, vocabulary.classes, vocabulary.mask_codes, vocabulary.depth_codes):
        for token in range(window.start, window.stop):
            counts[token] += 1
    for token in (vocabulary.end_of_sequence, vocabulary.noise):
        counts[token] += 1
    return counts


def test_published_offsets():
    v = Vocabulary()
    starts = (v.coordinates.start, v.classes.start, v.end_of_sequence, v.noise, v.mask_codes.start, v.depth_codes.start)
    assert starts == (0, 2001, 2081, 2082, 2083, 2211)
    assert (v.depth_codes.stop, v.size, Vocabulary(num_spare=128).size) == (2339, 2339, 2467)


@pytest.mark.parametrize("sizes", [(), (3, 2, 5, 7, 4), (1, 1, 1, 1, 0)])
def test_windows_are_disjoint_and_complete(sizes):
    assert set(owners(Vocabulary(*sizes))) == {1}


def test_window_as_a_slice():
    window = Window(3, 4)
    assert window.stop == 7
    assert list(range(10))[window.slice] == [3, 4, 5, 6]
