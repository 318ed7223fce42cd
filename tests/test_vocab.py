"""The token windows: published offsets, and no token in two windows or in none."""

import pytest

from aitok_jax.tasks.vocabulary import Vocabulary, Window, with_codes


def owners(vocabulary: Vocabulary) -> list[int]:
    """Number of windows that every token below the spare codes belongs to."""
    counts = [0] * (vocabulary.size - vocabulary.num_spare)
    for window in (
        vocabulary.coordinates,
        vocabulary.classes,
        *(vocabulary.codes_of(name) for name, _ in vocabulary.codes),
    ):
        for token in range(window.start, window.stop):
            counts[token] += 1
    for token in (vocabulary.end_of_sequence, vocabulary.noise):
        counts[token] += 1
    return counts


def test_published_offsets():
    v = Vocabulary()
    masks, depth = v.codes_of("mask"), v.codes_of("depth")
    starts = (v.coordinates.start, v.classes.start, v.end_of_sequence, v.noise, masks.start, depth.start)
    assert starts == (0, 2001, 2081, 2082, 2083, 2211)
    assert (depth.stop, v.size, Vocabulary(num_spare=128).size) == (2339, 2339, 2467)


@pytest.mark.parametrize(
    "sizes",
    [(), (3, 2, (("mask", 5), ("depth", 7)), 4), (1, 1, (("a", 1), ("b", 0), ("c", 1)), 0), (1, 1, ())],
)
def test_windows_are_disjoint_and_complete(sizes):
    assert set(owners(Vocabulary(*sizes))) == {1}


def test_window_as_a_slice():
    window = Window(3, 4)
    assert window.stop == 7
    assert list(range(10))[window.slice] == [3, 4, 5, 6]


def test_new_windows_come_last_and_old_ones_stay():
    """So that the rows of trained weights keep their meaning."""
    before = Vocabulary(num_bins=3, num_classes=2, codes=(("depth", 4), ("mask", 5)))
    after = with_codes(before, {"normals": 7, "mask": 5})
    assert after.codes == (("depth", 4), ("mask", 5), ("normals", 7))
    for name in ("depth", "mask"):
        assert after.codes_of(name) == before.codes_of(name)
    assert after.codes_of("normals") == Window(before.size, 7)


def test_codes_have_one_name_each_and_others_are_refused():
    with pytest.raises(ValueError, match=r"must have each name once"):
        Vocabulary(codes=(("mask", 2), ("mask", 3)))
    with pytest.raises(ValueError, match=r"no codes named 'normals', only mask, depth"):
        Vocabulary().codes_of("normals")
