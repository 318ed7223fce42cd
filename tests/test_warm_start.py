import config_files
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from aitok_jax.config import format_workdir, ordered, translated
from aitok_jax.training import checkpoint, warm_start


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
