import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax.training import warm_start


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
    with pytest.raises(ValueError, match="nothing of the source fits 'params'"):
        warm_start.merge(_variables(), {"params": {"other": np.ones(1)}}, "params")
