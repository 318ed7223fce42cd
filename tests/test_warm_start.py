import dataclasses

import chex
import config_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from aitok_jax import tasks
from aitok_jax.config import format_workdir, ordered, translated
from aitok_jax.tasks.base import variable_shapes
from aitok_jax.tasks.vocabulary import Vocabulary, same_meaning
from aitok_jax.training import checkpoint, warm_start
from aitok_jax.training.state import TrainState


def _variables():
    return {
        "params": {"head": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}},
        "model_state": {"tokenizer": {"params": {"conv": jnp.zeros(4)}, "model_state": {}}},
    }


def test_merge_takes_the_same_path_or_the_whole_source():
    source = {"params": {"conv": np.ones(4)}, "model_state": {}}
    merged, report = warm_start.merge(_variables(), source, "model_state/tokenizer")
    np.testing.assert_array_equal(merged["model_state"]["tokenizer"]["params"]["conv"], np.ones(4))
    assert report == warm_start.MergeReport(("model_state/tokenizer/params/conv",), (), ())

    solver = {"params": {"head": {"kernel": np.ones((2, 3)), "gate": np.ones(1)}}, "model_state": source}
    merged, report = warm_start.merge(_variables(), solver, "params")
    np.testing.assert_array_equal(merged["params"]["head"]["kernel"], np.ones((2, 3)))
    np.testing.assert_array_equal(merged["params"]["head"]["bias"], np.zeros(3))
    assert report.used == ("params/head/kernel",)
    assert report.unused == ("params/head/gate",)
    assert report.missing == ("params/head/bias",)
    assert "1 used, 1 unused, 1 missing" in str(report)
    assert merged["params"]["head"]["kernel"].dtype == jnp.float32


def test_merge_errors_name_the_parameter():
    with pytest.raises(ValueError, match=r"params/head/bias is of shape \(4,\) in the source but of shape \(3,\) here"):
        warm_start.merge(_variables(), {"params": {"head": {"bias": np.ones(4)}}})
    with pytest.raises(ValueError, match=r"the state has no 'params/tail'; it has .*params/head"):
        warm_start.merge(_variables(), {"params": {}}, "params/tail")
    with pytest.raises(
        ValueError, match=r"nothing of the source fits 'params'; the source has params/other, the state "
    ):
        warm_start.merge(_variables(), {"params": {"other": np.ones(1)}}, "params")
    with pytest.raises(ValueError, match=r"fits 'model_state/tokenizer'; the source has params/head, the state "):
        warm_start.merge(_variables(), {"params": {"head": np.ones(1)}}, "model_state/tokenizer")
    with pytest.raises(ValueError, match=r"params/head is an array in the source, where the other has a group"):
        warm_start.merge(_variables(), {"params": {"head": np.ones(1)}})
    with pytest.raises(ValueError, match=r"params/head/bias is an array in the state, where the other has a group"):
        warm_start.merge(_variables(), {"params": {"head": {"bias": {"a": np.ones(3)}}}})


def _solver(value):
    weights = {"backbone": {"kernel": np.full(2, value)}, "transformer": {"kernel": np.full(2, value)}}
    return {"params": {name: dict(part) for name, part in weights.items()}, "model_state": {}}


@pytest.mark.parametrize(
    ("order", "backbone"), [(("params/backbone", "params"), 2.0), (("params", "params/backbone"), 1.0)]
)
def test_entries_are_taken_in_their_order_and_the_later_one_wins(tmp_path, order, backbone):
    """After all that happens to a configuration between its file and the run."""
    sources = {"params/backbone": tmp_path / "backbone", "params": tmp_path / "detection"}
    for value, path in enumerate(sources.values(), 1):
        checkpoint.save_inference(path, _solver(float(value)), ConfigDict({"task": {"name": "depth"}}))
    start_from = {prefix: f"{{workdir}}/{sources[prefix].name}" for prefix in order}
    config = ordered({"name": "depth", "task": {"name": "depth"}, "start_from": start_from})
    run = translated(format_workdir(config, str(tmp_path)))
    params = warm_start.start_from(_solver(0.0), run)["params"]
    np.testing.assert_array_equal(params["backbone"]["kernel"], backbone)
    np.testing.assert_array_equal(params["transformer"]["kernel"], 2.0)


def test_instances_take_the_detector_after_the_backbone():
    """So that `detection`, which holds a backbone too, is what counts where both are given."""
    config = config_files.load("coco")
    assert list(config.start_from) == ["params/backbone", "params", "model_state/mask_tokenizer"]
    config.backbone, config.detection = "b", "d"
    assert list(translated(config).start_from.items())[:2] == [("params/backbone", "b"), ("params", "d")]


OLD = Vocabulary(num_bins=4, num_classes=3, codes=(("mask", 4), ("depth", 2)))


def test_tokens_of_the_same_meaning():
    new = Vocabulary(num_bins=4, num_classes=2, codes=(("depth", 2), ("mask", 8)))
    pairs = same_meaning(OLD, new, ["cat", "dog", "mug"], ["mug", "sofa"])
    assert pairs == {**{i: i for i in range(5)}, 5: 7, new.noise: OLD.noise, 7: 8, 9: 14, 10: 15}
    assert 6 not in pairs, "a sofa is none of the old classes"
    assert same_meaning(OLD, OLD) == {i: i for i in range(OLD.size)}
    assert same_meaning(dataclasses.replace(OLD, num_bins=8), OLD)[3] == 6


def test_a_table_of_the_vocabulary_takes_the_rows_that_mean_the_same():
    target = {
        "params": {"voc_embed": jnp.zeros((3, 2)), "dec_embed": jnp.zeros((1, 3, 2)), "kernel": jnp.zeros((2, 9))}
    }
    source = {"voc_embed": np.arange(8.0).reshape(4, 2), "dec_embed": np.ones((1, 2, 2)), "kernel": np.ones((2, 9))}
    merged, report = warm_start.merge(target, {"params": source | {"bias": np.ones(1)}}, "params", {0: 3, 2: 1})
    np.testing.assert_array_equal(merged["params"]["voc_embed"], [[6, 7], [0, 0], [2, 3]])
    np.testing.assert_array_equal(merged["params"]["dec_embed"], [[[1, 1], [1, 1], [0, 0]]])
    assert report.partly == {
        "params/voc_embed": "2 of 3 tokens",
        "params/dec_embed": "the first 2 of 3 places",
    }
    assert "in part  params/voc_embed: 2 of 3 tokens" in str(report)
    assert "unused   params/bias" in str(report)


def test_what_does_not_fit_is_left_out_unless_it_is_most():
    target = {"params": {"head": jnp.zeros((2, 3)), "body": jnp.zeros(10)}}
    merged, report = warm_start.merge(target, {"params": {"head": np.ones((2, 4)), "body": np.ones(10)}})
    np.testing.assert_array_equal(merged["params"]["head"], np.zeros((2, 3)))
    np.testing.assert_array_equal(merged["params"]["body"], np.ones(10))
    assert report.unfit == {"params/head": "of shape (2, 4) in the source but of shape (2, 3) here"}
    assert "left out params/head: of shape (2, 4)" in str(report)
    with pytest.raises(
        ValueError, match=r"most of the source does not fit, .*params/body is of shape \(9,\) in the source"
    ):
        warm_start.merge(target, {"params": {"head": np.ones((2, 3)), "body": np.ones(9)}})


def builtin_variables(**changes):
    """Fresh variables of the built-in model's task, with other fields, and its configuration."""
    saved, _ = checkpoint.load_inference("builtin")
    plain = saved.to_dict()
    plain["task"]["parts"] = {"instances": plain["task"]["parts"]["instances"]}
    plain["task"]["shared"]["vocabulary"] |= changes
    config = translated(plain | {"start_from": "builtin", "categories": [{"id": 3, "name": "sofa"}]})
    variables = variable_shapes(tasks.build(config.task))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables), config


def test_other_classes_start_from_the_built_in_weights(caplog):
    caplog.set_level("INFO")
    variables, config = builtin_variables(num_classes=1)
    taken = warm_start.start_from(variables, config)
    _, builtin = checkpoint.load_inference("builtin")
    old, new = (tree["params"]["transformer"]["voc_embed"] for tree in (builtin, taken))
    np.testing.assert_array_equal(new[:65], old[:65])  # coordinates
    np.testing.assert_array_equal(new[65], old[65 + 6])  # the seventh of its classes is the sofa
    assert len(new) == len(old) - 8
    np.testing.assert_array_equal(new[-128:], old[-128:])  # codes of depth come last in both
    assert np.any(jax.tree.leaves(taken["model_state"]["mask_tokenizer"]["params"])[0])
    assert "in part  params/transformer/voc_embed" in caplog.text


def test_a_tokenizer_that_the_weights_lack_is_named():
    variables, config = builtin_variables()
    variables["model_state"]["normals_tokenizer"] = {"kernel": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"--config\.start_from\.model_state/normals_tokenizer=RUN"):
        warm_start.start_from(variables, config)


def test_a_tokenizer_starts_from_that_of_a_solver():
    saved, weights = checkpoint.load_inference("builtin")
    fields = saved.task.parts.depth.tokenizer.to_dict()
    task = {"name": "depth_tokenizer", "image_size": 64, "tokenizer": fields}
    config = translated({"name": "tokenizer", "task": task, "start_from": "builtin"})
    variables = variable_shapes(tasks.build(config.task))
    blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    taken = warm_start.start_from(blank, config)
    chex.assert_trees_all_equal(taken["params"], weights["model_state"]["depth_tokenizer"]["params"])


def test_the_moving_average_forgets_the_start():
    optimizer = optax.sgd(1.0)
    state = TrainState.create({"x": jnp.zeros(())}, {}, optimizer, 0.999)
    step = jax.jit(lambda state: state.apply_gradients({"x": -jnp.ones(())}, {}, optimizer, 0.999))
    for _ in range(140):
        state = step(state)
    kept = 1.0  # what the average holds of the start
    for n in range(1, 141):
        kept *= min(0.999, n / (n + 9))
    assert kept < 1e-6
    assert 120 < float(state.ema_params["x"]) < 140
    np.testing.assert_allclose(
        state.apply_gradients({"x": jnp.zeros(())}, {}, optimizer, 0.0).ema_params["x"], state.ema_params["x"]
    )
