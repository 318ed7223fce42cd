"""Objects as tokens: ids of a known list, the way back, label corruption, what the loss looks at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax.models.decode_objects import CLASS_SLOT
from aitok_jax.tasks import from_scratch, sequences
from aitok_jax.tasks.vocabulary import Vocabulary

PUBLISHED = Vocabulary(num_spare=128)
SMALL = Vocabulary(num_bins=10, num_classes=4, codes=(("mask", 5), ("depth", 3)))


@pytest.fixture(scope="module")
def objects():
    """boxes in an image of 20 pixels, classes (-1 is noise) and mask codes of 3 images of 6 objects."""
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.uniform(0, 20, (3, 6, 2, 2)), 2).reshape(3, 6, 4).astype(np.float32)
    return boxes, rng.integers(-1, 4, (3, 6)), rng.integers(0, 5, (3, 6, 2))


def test_tokens_of_a_known_list():
    """The published windows: coordinates from 0, classes 2001, noise 2082, mask codes 2083."""
    boxes = np.array([[[0, 320, 640, 16], [6.4, 3.2, 639, 480]]], np.float32)
    codes = np.array([[[0, 127], [5, 1]]])
    tokens = sequences.object_tokens(PUBLISHED, boxes, np.array([[79, -1]]), codes, 640)
    assert (tokens.shape, tokens.dtype) == ((1, 2, 7), jnp.int32)
    np.testing.assert_array_equal(tokens[0, 0], [0, 1000, 2000, 50, 2080, 2083, 2210])
    np.testing.assert_array_equal(tokens[0, 1], [20, 10, 1997, 1500, 2082, 2088, 2084])
    detection = sequences.object_tokens(PUBLISHED, boxes, np.array([[0, 1]]), None, 640)
    np.testing.assert_array_equal(detection[0], [[0, 1000, 2000, 50, 2001], [20, 10, 1997, 1500, 2002]])


def test_coordinates_are_rounded_and_clipped():
    """Halves go to the even neighbour; what lies outside the image goes to its border."""
    vocabulary = Vocabulary(num_bins=1000)
    boxes = np.array([[[1, 3, 5, 6.5], [-7, -0.4, 2000, 2001.5]]], np.float32)
    tokens = sequences.object_tokens(vocabulary, boxes, np.zeros((1, 2), int), None, 2000)
    np.testing.assert_array_equal(tokens[0, :, :4], [[0, 2, 2, 3], [0, 0, 1000, 1000]])


def test_boxes_come_back(objects):
    """Every coordinate token survives the way back and forth; a box moves by half a bin at most."""
    every = np.arange(2001)
    boxes = sequences.boxes_of(PUBLISHED, jnp.broadcast_to(every[None, :, None], (1, 2001, 4)), 640)
    assert (boxes.shape, boxes.dtype) == ((1, 2001, 4), jnp.float32)
    np.testing.assert_allclose(boxes[0, :, 2], every * 0.32, rtol=1e-6)
    again = sequences.object_tokens(PUBLISHED, boxes, np.zeros((1, 2001), int), None, 640)
    np.testing.assert_array_equal(again[0, :, :4], np.stack([every] * 4, -1))

    tokens = sequences.object_tokens(SMALL, *objects, 20)
    error = np.abs(sequences.boxes_of(SMALL, tokens[..., :4], 20) - objects[0])
    assert 0.5 < error.max() <= 1 + 1e-5


def test_every_token_lies_in_the_window_of_its_slot(objects):
    tokens, classes = np.asarray(sequences.object_tokens(SMALL, *objects, 20)), objects[1]
    slots = [SMALL.coordinates] * 4 + [SMALL.classes] + [SMALL.codes_of("mask")] * 2
    assert len(slots) == tokens.shape[-1] == 7
    for slot, window in enumerate(slots):
        inside = (tokens[..., slot] >= window.start) & (tokens[..., slot] < window.stop)
        np.testing.assert_array_equal(inside, classes >= 0 if slot == CLASS_SLOT else np.ones((3, 6), bool))
    assert (tokens[classes < 0][:, CLASS_SLOT] == SMALL.noise).all()


def test_objects_do_not_see_each_other(objects):
    order = np.random.default_rng(1).permutation(6)
    tokens, permuted = (sequences.object_tokens(SMALL, *(x[:, o] for x in objects), 20) for o in (np.arange(6), order))
    np.testing.assert_array_equal(permuted, tokens[:, order])


@pytest.fixture(scope="module")
def corrupted():
    """(tokens, inputs) of 3000 images of 8 objects: true labels are the classes in turn, and noise."""
    labels = np.array([*range(SMALL.classes.start, SMALL.classes.stop), SMALL.noise, SMALL.noise, 11, 12])
    tokens = np.random.default_rng(2).integers(0, 20, (3000, 8, 7))
    tokens[..., CLASS_SLOT] = labels
    return tokens, np.asarray(sequences.corrupt_labels(jax.random.key(0), SMALL, jnp.asarray(tokens)))


def test_corruption_leaves_all_but_the_labels(corrupted):
    tokens, inputs = (np.delete(x, CLASS_SLOT, -1) for x in corrupted)
    np.testing.assert_array_equal(inputs, tokens)
    again, other = (sequences.corrupt_labels(jax.random.key(k), SMALL, jnp.asarray(corrupted[0])) for k in (0, 1))
    np.testing.assert_array_equal(again, corrupted[1])
    assert (other != corrupted[1]).any()


def test_half_of_the_labels_become_noise_and_half_a_random_class(corrupted):
    """In every slot, whatever the true label is. Four standard deviations are 0.036 in a slot of 3000 images."""
    labels = corrupted[1][..., CLASS_SLOT]
    assert set(np.unique(labels)) == {*range(SMALL.classes.start, SMALL.classes.stop), SMALL.noise}
    shares = np.stack([(labels == value).mean(0) for value in (SMALL.noise, *range(11, 15))])
    np.testing.assert_allclose(shares, np.broadcast_to([[0.5]] + [[0.125]] * 4, shares.shape), atol=0.036)
    np.testing.assert_allclose(shares.mean(1), [0.5] + [0.125] * 4, atol=0.013)


def test_labels_are_corrupted_independently(corrupted):
    """Two labels agree with probability ¼ + 4 · (⅛)², between objects of one image and between images."""
    labels = corrupted[1][..., CLASS_SLOT]
    for agree in (labels == np.roll(labels, 1, 1), labels == np.roll(labels, 1, 0), labels == np.roll(labels, 3, 1)):
        assert agree.mean() == pytest.approx(0.25 + 4 / 64, abs=0.015)


@pytest.mark.parametrize("length", [5, 7])
def test_real_objects_count_with_all_tokens_and_noise_with_the_label(length):
    mask = np.asarray(sequences.target_mask(jnp.array([[True, False], [False, False]]), length))
    label_only = np.arange(length) == 4
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask[0], [np.ones(length, bool), label_only])
    np.testing.assert_array_equal(mask[1], [label_only, label_only])


def test_cells_show_the_smallest_object_over_them():
    """An image of 8 pixels in 4x4 cells of 2: a large box, a small one on it, one that is no real object."""
    vocabulary = Vocabulary(num_bins=8, num_classes=4)
    boxes = np.array([[[0, 0, 6, 8], [2, 2, 4, 6], [6, 0, 8, 8]]], np.float32)
    tokens = sequences.object_tokens(vocabulary, boxes, np.array([[0, 3, -1]]), None, 8)
    cells, covered = from_scratch.cell_tokens(vocabulary, tokens, jnp.array([[True, True, False]]), 8, 4)
    large, small, none = 0, 3, vocabulary.noise - vocabulary.classes.start
    labels = np.array([[large] * 3 + [none]] * 4)
    labels[1:3, 1] = small
    np.testing.assert_array_equal(cells[0, :, 4].reshape(4, 4) - vocabulary.classes.start, labels)
    np.testing.assert_array_equal(covered[0].reshape(4, 4), labels != none)
    np.testing.assert_array_equal(cells[0, 5, :4], [2, 2, 4, 6])
    np.testing.assert_array_equal(cells[0, 0, :4], [0, 0, 6, 8])


def test_thin_objects_have_a_cell_and_no_objects_none():
    """The box lies between two centres; a grid cell is 4 pixels wide."""
    vocabulary = Vocabulary(num_bins=16, num_classes=4)
    boxes = np.array([[[3, 0, 5, 16]], [[0, 0, 16, 16]]], np.float32)
    tokens = sequences.object_tokens(vocabulary, boxes, np.array([[1], [-1]]), None, 16)
    cells, covered = from_scratch.cell_tokens(vocabulary, tokens, jnp.array([[True], [False]]), 16, 4)
    np.testing.assert_array_equal(covered[0].reshape(4, 4), [[True, True, False, False]] * 4)
    assert not covered[1].any()
    np.testing.assert_array_equal(cells[1, :, 4], vocabulary.noise)
