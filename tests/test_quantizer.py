"""The codebook: assignment, losses, gradients, EMA update on one device and on eight, restart of dead codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from aitok_jax.models.quantizer import Quantizer, nearest_codes

K, D = 6, 4


@pytest.fixture(scope="module")
def z():
    return np.random.default_rng(0).normal(size=(8, 3, 2, D)).astype(np.float32)


@pytest.fixture(scope="module")
def codebook():
    """A codebook with a history: not the start, where the sizes are 0."""
    rng = np.random.default_rng(1)
    size = rng.uniform(1, 9, K).astype(np.float32)
    embedding = rng.normal(size=(K, D)).astype(np.float32)
    return {"embedding": embedding, "cluster_size": size, "ema_w": embedding * size[:, None]}


def train(quantizer, codebook, z, rng=None):
    rngs = None if rng is None else {"restart": rng}
    result, state = quantizer.apply({"codebook": codebook}, z, train=True, mutable=["codebook"], rngs=rngs)
    return result, state["codebook"]


def nearest(z, embedding):
    return np.square(z[..., None, :].astype(np.float64) - embedding).sum(-1).argmin(-1)


def test_nearest_codes(z, codebook):
    np.testing.assert_array_equal(nearest_codes(z, codebook["embedding"]), nearest(z, codebook["embedding"]))
    assert nearest_codes(z[0, 0, 0], codebook["embedding"]).dtype == jnp.int32


def test_ema_update_against_numpy(z, codebook):
    decay, epsilon = 0.9, 1e-2
    result, new = train(Quantizer(K, D, decay=decay, epsilon=epsilon), codebook, z)
    codes = nearest(z, codebook["embedding"])
    flat, size, sums = z.reshape(-1, D), codebook["cluster_size"].copy(), codebook["ema_w"].copy()
    for k in range(K):
        chosen = flat[codes.ravel() == k]
        size[k] = decay * size[k] + (1 - decay) * len(chosen)
        sums[k] = decay * sums[k] + (1 - decay) * chosen.sum(0)
    smoothed = (size + epsilon) / (size.sum() + K * epsilon) * size.sum()
    assert np.abs(smoothed - size).max() > 1e-3
    np.testing.assert_allclose(new["cluster_size"], smoothed, rtol=1e-5)
    np.testing.assert_allclose(new["ema_w"], sums, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new["embedding"], sums / smoothed[:, None], rtol=1e-4, atol=1e-5)
    counts = np.bincount(codes.ravel(), minlength=K)
    share = counts[counts > 0] / counts.sum()
    np.testing.assert_allclose(result.perplexity, np.exp(-(share * np.log(share)).sum()), rtol=1e-4)


def test_codes_and_loss_are_of_the_codebook_before_the_update(z, codebook):
    quantizer = Quantizer(K, D, decay=0.1, commitment_cost=0.7)
    result, new = train(quantizer, codebook, z)
    codes = nearest(z, codebook["embedding"])
    assert (codes != nearest(z, np.asarray(new["embedding"]))).any()
    np.testing.assert_array_equal(result.codes, codes)
    np.testing.assert_allclose(result.z, codebook["embedding"][codes], atol=1e-6)
    np.testing.assert_allclose(result.loss, 0.7 * np.square(z - codebook["embedding"][codes]).mean(), rtol=1e-5)


def test_no_update_outside_training(z, codebook):
    quantizer = Quantizer(K, D)
    _, state = quantizer.apply({"codebook": codebook}, z, mutable=["codebook"])
    jax.tree.map(np.testing.assert_array_equal, state["codebook"], codebook)
    start = quantizer.init(jax.random.key(0), z, train=True)["codebook"]
    np.testing.assert_array_equal(start["cluster_size"], 0)
    for name in ("embedding", "ema_w"):
        assert 0.5 < np.std(start[name]) < 1.5


def test_straight_through_gradient(z, codebook):
    weight = np.random.default_rng(2).normal(size=z.shape).astype(np.float32)
    quantizer = Quantizer(K, D)

    def apply(z):
        return quantizer.apply({"codebook": codebook}, z)

    np.testing.assert_allclose(jax.grad(lambda z: jnp.sum(apply(z).z * weight))(z), weight, rtol=1e-6)
    pull = 0.25 * 2 * (z - codebook["embedding"][nearest(z, codebook["embedding"])]) / z.size
    np.testing.assert_allclose(jax.grad(lambda z: apply(z).loss)(z), pull, rtol=1e-4, atol=1e-8)


def test_soft_lookup_is_an_expectation(codebook):
    quantizer = Quantizer(K, D)
    probabilities = np.random.default_rng(3).dirichlet(np.ones(K), (2, 5)).astype(np.float32)
    expected = quantizer.apply({"codebook": codebook}, probabilities, method="expect")
    np.testing.assert_allclose(expected, probabilities @ codebook["embedding"], rtol=1e-5, atol=1e-6)
    codes = np.array([[0, 5], [2, 2]])
    hard = quantizer.apply({"codebook": codebook}, np.eye(K, dtype=np.float32)[codes], method="expect")
    np.testing.assert_allclose(hard, quantizer.apply({"codebook": codebook}, codes, method="lookup"), atol=1e-6)


@pytest.fixture(scope="module")
def half_dead(codebook):
    """Codes 3, 4, 5 are far from every input and have hardly ever been chosen."""
    dead = np.arange(K) >= 3
    embedding = np.where(dead[:, None], 1e4, codebook["embedding"]).astype(np.float32)
    size = np.where(dead, 1e-3, codebook["cluster_size"]).astype(np.float32)
    return {"embedding": embedding, "cluster_size": size, "ema_w": embedding * size[:, None]}


def test_dead_codes_stay_dead_unless_restart_is_on(z, half_dead):
    result, new = train(Quantizer(K, D), half_dead, z)
    assert result.usage == 0.5
    assert np.abs(new["embedding"][3:]).min() > 1e3
    restarting = Quantizer(K, D, restart_threshold=0.05)
    _, revived = train(restarting, half_dead, z, jax.random.key(0))
    flat = z.reshape(-1, D)
    for code, size, total in zip(*(revived[k][3:] for k in ("embedding", "cluster_size", "ema_w")), strict=True):
        assert (np.asarray(code) == flat).all(-1).any()
        np.testing.assert_allclose(total, size * code, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:3], b[:3]), revived, new)
    assert restarting.apply({"codebook": revived}, z).usage > 0.5


@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_eight_devices_have_the_codebook_of_one(z, half_dead, threshold):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    quantizer = Quantizer(K, D, restart_threshold=threshold)
    step = jax.jit(lambda codebook, z: train(quantizer, codebook, z, jax.random.key(0)))
    alone_result, alone = step(half_dead, z)
    split = jax.device_put(z, NamedSharding(mesh, PartitionSpec("data")))
    assert len(split.sharding.device_set) == 8
    result, together = step(jax.device_put(half_dead, NamedSharding(mesh, PartitionSpec())), split)
    np.testing.assert_array_equal(result.codes, alone_result.codes)
    for name, array in together.items():
        np.testing.assert_allclose(array, alone[name], rtol=1e-5, atol=1e-6, err_msg=name)
        copies = [np.asarray(shard.data) for shard in array.addressable_shards]
        assert len(copies) == 8
        for copy in copies:
            np.testing.assert_array_equal(copy, array, err_msg=name)


@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_micro_batches_move_the_codebook_once_by_their_sums(z, codebook, threshold):
    quantizer = Quantizer(K, D, decay=0.9, restart_threshold=threshold)
    rng, mutable = jax.random.key(0), ["codebook", "pending"]
    _, whole = train(quantizer, codebook, z, rng)
    variables = {"codebook": codebook}
    variables |= quantizer.apply(variables, method="open_step", mutable=["pending"])[1]
    for part in (z[:5], z[5:]):
        _, variables = quantizer.apply(variables, part, train=True, mutable=mutable, rngs={"restart": rng})
        jax.tree.map(np.testing.assert_array_equal, variables["codebook"], codebook)
    moved = quantizer.apply(variables, method="close_step", mutable=["codebook"])[1]["codebook"]
    alive = np.asarray(whole["cluster_size"]) != 1.0
    assert alive.all() == (threshold == 0)
    for name, value in moved.items():
        np.testing.assert_allclose(value[alive], whole[name][alive], rtol=1e-5, atol=1e-6)
    rows = z[5:].reshape(-1, D)  # what dead codes start anew from
    for code in np.flatnonzero(~alive):
        assert moved["cluster_size"][code] == 1
        assert (rows == np.asarray(moved["embedding"][code])).all(1).any()
