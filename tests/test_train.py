"""The loop, with a linear model as the task and batches made on the spot."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy_run
from jax.experimental.compilation_cache import compilation_cache
from line_task import TRACES, LinePart, LineTask
from ml_collections import ConfigDict
from PIL import Image

from aitok_jax import main, tasks
from aitok_jax.config import to_json, translated
from aitok_jax.parallel import sharding
from aitok_jax.training import checkpoint, loop, setup
from configs import common

ROOT = Path(__file__).parents[1]


def _batch(seed, step, size):
    rng = np.random.default_rng((seed, step))
    image = rng.random((size, 4, 4, 3), np.float32)
    return {"image": image, "depth": image.sum(-1), "names": np.array(["a"] * size), "id": np.arange(size)}


_BATCH = _batch


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    """Compiles the same step once for all tests of this file."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is options:
            yield


@pytest.fixture
def toy(monkeypatch, compile_cache):
    """Puts the toy task, data and evaluator in place; `steps` lists the data steps read, `fail_at` breaks the data."""
    toy = SimpleNamespace(steps=[], fail_at=None, evaluations=[], examples=64)

    def train_batches(source, transform, *, batch_size, seed, start_step, process_index, process_count, shards):
        step = start_step
        while True:
            if step == toy.fail_at:
                raise OSError("disk gone")
            toy.steps.append(step)
            yield toy_run.fill_up(_batch(seed, step, batch_size), shards)
            step += 1

    def evaluate(part, params, model_state, data, *, batch_size, mesh, prefix, baseline, panels_dir):
        toy.evaluations.append(prefix)
        batch = sharding.shard_batch(_batch(99, 0, batch_size), mesh)
        error = jnp.abs(part.predict(params, model_state, batch)["depth"] - batch["depth"]).mean()
        if panels_dir:
            panels_dir.mkdir(exist_ok=True)
            Image.new("RGB", (8, 4)).save(panels_dir / "a.png")
        return {f"{prefix}/error": float(error)} | ({"baseline/error": 1.0} if baseline else {})

    def build(config):
        ((name, fields),) = config.parts.to_dict().items()
        return LineTask(name, LinePart(**{key: value for key, value in fields.items() if key != "name"}))

    monkeypatch.setattr(tasks, "build", build)

    def build_data(config, modality):
        fingerprint = {"train": {"examples": toy.examples}}
        return SimpleNamespace(train=None, train_transform=None, fingerprint=lambda: fingerprint)

    monkeypatch.setattr(setup.datasets, "build", build_data)
    monkeypatch.setattr(loop.pipeline, "train_batches", train_batches)
    monkeypatch.setattr(loop.evaluators, "evaluate", evaluate)
    monkeypatch.setattr(loop.evaluators, "metric_names", lambda _: ("error",))
    monkeypatch.setattr(loop.evaluators, "check_data", lambda *_: None)
    return toy


def _config(**changes):
    config = {"name": "line", "seed": 3, "batch_size": 16, "eval_batch_size": 8, "ema_decay": 0.9, "fsdp": 1}
    config |= {"train_steps": 8, "log_every": 2, "eval_every": 0, "checkpoint_every": 3, "keep_checkpoints": 2}
    config |= {
        "task": {"name": "line", "image_size": 4, "noise": 0.1, "broken_at": -1},
        "data": {"name": "toy", "size": 4},
        "optim": common.optimizer(
            learning_rate=1e-2,
            weight_decay=0.01,
            clip_norm=10.0,
            warmup_steps=2,
            warmup_ratio=0.1,
            schedule={"name": "linear", "end_factor": 0.5},
        ),
    }
    for key, value in changes.items():
        inner, _, last = key.rpartition("__")
        (config[inner] if inner else config)[last] = value
    return ConfigDict(config).lock()


def _state(workdir, step=None):
    with checkpoint.open_manager(workdir) as manager:
        step = manager.latest_step() if step is None else step
        return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state


def _lines(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("_per_sec")} for line in lines]


def _assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_a_run_trains_logs_evaluates_and_compiles_once(toy, tmp_path):
    TRACES.clear()
    variants = {"double": {"scale": 2.0}}
    intervals = {"train_steps": 30, "eval_every": 15, "log_every": 5}
    config = _config(**intervals, optim__learning_rate=0.05, eval_variants=variants, eval_baseline=True)
    metrics = loop.train(config, tmp_path)
    assert len(TRACES) == 1
    lines = _lines(tmp_path)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [5, 10, 15, 20, 25, 30]
    assert set(training[0]) == {"step", "loss", "error", "learning_rate", "grad_norm"}
    assert training[-1]["loss"] < 0.5 * training[0]["loss"]
    assert training[-1]["learning_rate"] == pytest.approx(0.05 * (1 - 0.5 * 29 / 30), rel=1e-6)
    assert '"images_per_sec"' in (tmp_path / "metrics.jsonl").read_text()
    assert [(line["step"], sorted(line)[0]) for line in lines if "loss" not in line] == [
        (15, "line/error"),
        (30, "baseline/error"),
    ]
    assert toy.evaluations == ["line", "line", "double"]
    assert set(metrics) == {"line/error", "baseline/error", "double/error"}
    assert metrics["line/error"] != metrics["double/error"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(to_json(translated(config)))
    assert (tmp_path / "parameters.txt").read_text().splitlines()[-1].startswith("2 parameters  32 ")
    environment = json.loads((tmp_path / "env.json").read_text())
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False)
    assert head.stdout.startswith((environment["commit"] or "").removesuffix("-dirty"))
    assert bool(environment["commit"]) == (head.returncode == 0)
    assert environment["versions"]["jax"] == jax.__version__
    assert environment["devices"]["count"] == 8
    events = b"".join(file.read_bytes() for file in tmp_path.glob("events.out.tfevents.*"))
    assert b"train/loss" in events
    assert b"panels/a" in events


def test_evaluation_only_repeats_the_final_metrics(toy, tmp_path):
    metrics = loop.train(_config(), tmp_path)
    steps = len(toy.steps)
    (tmp_path / "metrics.json").unlink()
    assert loop.evaluate(_config(), tmp_path) == metrics
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert len(toy.steps) == steps
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        loop.evaluate(_config(), tmp_path / "absent")


@pytest.mark.parametrize("how", ["preemption", "crash", "more steps"])
def test_stopping_and_going_on_gives_the_same_bits(toy, tmp_path, monkeypatch, how):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = _config(optim__schedule={"name": "constant"})
    metrics = loop.train(config, whole)
    expected_steps, toy.steps[:] = list(toy.steps), []
    if how == "preemption":
        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "reached_preemption", lambda self, step: step == 4)
            with pytest.raises(SystemExit, match="goes on from step 4"):
                loop.train(config, parts)
        first = 4
    elif how == "crash":
        toy.fail_at = 5
        with pytest.raises(OSError, match="disk gone"):
            loop.train(config, parts)
        toy.fail_at, first = None, 3
    else:
        loop.train(_config(optim__schedule={"name": "constant"}, train_steps=4, checkpoint_every=0), parts)
        first = 4
    assert (checkpoint.latest_step(parts), toy.steps[:first]) == (first, expected_steps[:first])
    toy.steps[:] = []
    assert loop.train(config, parts) == metrics
    assert toy.steps == expected_steps[first:]
    _assert_same_bits(_state(parts), _state(whole))
    assert int(_state(parts)["model_state"]["seen"]["count"]) == 8
    if how != "more steps":
        assert _lines(parts) == _lines(whole)


def test_64_bit_mode_changes_nothing(toy, tmp_path, monkeypatch):
    seen = []
    for module, name in ((loop, "_compile"), (loop.evaluators, "evaluate")):
        function = getattr(module, name)

        def wrapped(*args, function=function, name=name, **options):
            seen.append((name, str(jnp.arange(1.0).dtype)))
            return function(*args, **options)

        monkeypatch.setattr(module, name, wrapped)
    with jax.enable_x64(True):
        loop.train(_config(), tmp_path / "wide")
        assert loop.evaluate(_config(), tmp_path / "wide") == loop.train(_config(), tmp_path / "usual")
    _assert_same_bits(_state(tmp_path / "wide"), _state(tmp_path / "usual"))
    assert [name for name, _ in seen] == ["_compile", "evaluate", "evaluate", "_compile", "evaluate"]
    assert {dtype for _, dtype in seen} == {"float32"}


def test_a_run_does_not_go_on_with_other_data(toy, tmp_path):
    config = _config(train_steps=4, optim__schedule={"name": "constant"})
    loop.train(config, tmp_path)
    toy.examples, config = 63, _config(optim__schedule={"name": "constant"})
    with pytest.raises(
        ValueError, match=r"trained on to step 4: line\.train\.examples was 64, is 63\. .*delete .*data"
    ):
        loop.train(config, tmp_path)
    assert checkpoint.latest_step(tmp_path) == 4
    (tmp_path / "data.json").unlink()
    loop.train(config, tmp_path)
    assert json.loads((tmp_path / "data.json").read_text()) == {"line": {"train": {"examples": 63}}}


def test_a_finished_run_is_only_evaluated_again(toy, tmp_path):
    metrics = loop.train(_config(), tmp_path)
    lines, state = _lines(tmp_path), _state(tmp_path)
    assert loop.train(_config(), tmp_path) == metrics
    assert _lines(tmp_path) == lines
    _assert_same_bits(_state(tmp_path), state)


@pytest.mark.parametrize(("log_every", "seen_at"), [(1, 5), (100, 6)])
def test_a_loss_that_is_not_finite_stops_and_is_never_saved(toy, tmp_path, log_every, seen_at):
    config = _config(task__broken_at=5, log_every=log_every, checkpoint_every=3)
    with pytest.raises(FloatingPointError, match=rf"step {seen_at}: .*grad_norm=nan.*loss=nan"):
        loop.train(config, tmp_path)
    assert checkpoint.latest_step(tmp_path) == 3
    finite = jax.tree.map(lambda x: bool(np.isfinite(x).all()), _state(tmp_path))
    assert all(jax.tree.leaves(finite))


def test_any_mesh_gives_the_same_result(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_BYTES", 1)
    loop.train(_config(fsdp=4), tmp_path / "eight")
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda fsdp: make_mesh(1, jax.devices()[:1]))
    loop.train(_config(), tmp_path / "one")
    one, eight = _state(tmp_path / "one")["params"], _state(tmp_path / "eight")["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one, eight)


def test_moving_average_follows_the_parameters(toy, tmp_path):  # its second decay is 2 / (2 + 9)
    loop.train(_config(train_steps=2, checkpoint_every=1, ema_decay=0.9), tmp_path)
    first, second = _state(tmp_path, 1), _state(tmp_path, 2)
    expected = jax.tree.map(lambda e, p: 2 / 11 * e + 9 / 11 * p, first["ema_params"], second["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), second["ema_params"], expected)
    _, variables = checkpoint.load_inference(tmp_path)
    _assert_same_bits(variables["params"], second["ema_params"])


def test_start_from_takes_over_weights(toy, tmp_path):
    loop.train(_config(ema_decay=0.0), tmp_path / "a")
    start_from = {"params": str(tmp_path / "a"), "params/absent": ""}
    loop.train(
        _config(train_steps=1, optim__warmup_steps=0, optim__learning_rate=0.0, start_from=start_from), tmp_path / "b"
    )
    _assert_same_bits(_state(tmp_path / "b")["params"], _state(tmp_path / "a")["params"])
    assert int(_state(tmp_path / "b")["model_state"]["seen"]["count"]) == 1

    weights = {"a": np.ones(2), "b": np.full(2, 2.0), "spare": np.ones(1)}
    checkpoint.save_inference(tmp_path / "weights", weights, _config())
    start_from = {"model_state/frozen": str(tmp_path / "weights")}
    loop.train(_config(train_steps=1, optim__warmup_steps=0, start_from=start_from), tmp_path / "c")
    _assert_same_bits(_state(tmp_path / "c")["model_state"]["frozen"], {"a": np.ones(2), "b": np.full(2, 2.0)})


def test_frozen_weights_must_be_complete(toy, tmp_path):
    with pytest.raises(ValueError, match=r"'model_state/frozen' is never trained; give the run directory"):
        loop.train(_config(start_from={"model_state/frozen": ""}), tmp_path / "run")
    checkpoint.save_inference(tmp_path / "weights", {"a": np.ones(2)}, _config())
    with pytest.raises(ValueError, match=r"'model_state/frozen' is never trained, but .* lacks model_state/frozen/b"):
        loop.train(_config(start_from={"model_state/frozen": str(tmp_path / "weights")}), tmp_path / "run")


def test_batches_are_split_over_all_devices():
    mesh = sharding.make_mesh(fsdp=2)
    batch = sharding.shard_batch(_batch(0, 0, 16), mesh)
    assert set(batch) == {"image", "depth", "id"}
    assert {shard.data.shape for shard in batch["image"].addressable_shards} == {(2, 4, 4, 3)}
    assert len(batch["id"].sharding.device_set) == 8
    with pytest.raises(ValueError, match="batch_size=12 must be divisible by 8 devices; use 8 or 16"):
        sharding.shard_batch(_batch(0, 0, 12), mesh)


def test_batches_that_do_not_divide_train_as_those_of_one_device(toy, tmp_path, monkeypatch):
    """The loop fills them up; evaluation takes the next size that divides."""
    sizes, evaluate = [], loop.evaluators.evaluate

    def evaluated(*args, batch_size, **options):
        sizes.append(batch_size)
        return evaluate(*args, batch_size=batch_size, **options)

    monkeypatch.setattr(loop.evaluators, "evaluate", evaluated)
    config = {"batch_size": 12, "eval_batch_size": 5, "train_steps": 3, "log_every": 1}
    loop.train(_config(**config), tmp_path / "all")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(setup.sharding, "make_mesh", lambda fsdp: mesh)
    loop.train(_config(**config), tmp_path / "one")
    assert sizes == [8, 5]
    ours, expected = ([line for line in _lines(tmp_path / name) if "loss" in line] for name in ("all", "one"))
    assert len(expected) == 3
    for a, b in zip(ours, expected, strict=True):
        for name in ("loss", "error", "grad_norm"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-6, err_msg=name)


def test_randomness_changes_from_step_to_step(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "_batch", lambda seed, step, size: _BATCH(0, 0, size))
    loop.train(_config(train_steps=2, log_every=1, optim__learning_rate=0.0), tmp_path)
    first, second = (line["loss"] for line in _lines(tmp_path) if "loss" in line)
    assert first != second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"eval_batch_size": -8}, "eval_batch_size=-8 must be at least 1"),
        ({"batch_size": 12, "accumulate": 2}, "batch_size=12 must be divisible by 8 devices times 2 micro-batches"),
        ({"accumulate": 3}, r"batch_size=16 must be divisible by 8 devices times 3 micro-batches .*; use 24"),
        ({"accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"fsdp": 3}, r"fsdp=3 must divide the 8 devices; use one of \[1, 2, 4, 8\]"),
        ({"train_steps": 0}, "train_steps=0 must be at least 1"),
        ({"log_every": 0}, "log_every=0 must be at least 1"),
        ({"best_mode": "low"}, "best_mode='low' must be 'min' or 'max'"),
        ({"best_metric": "depth/rmse"}, "best_metric='depth/rmse' must begin with line/"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must be in"),
        ({"data__size": 8}, "data.size=8 must be task.image_size=4"),
        ({"eval_variants": {"x": {"nois": 1}}}, "eval_variants.x: 'nois' is unknown; did you mean 'noise'"),
        ({"optim__layer_decay": 0.9}, "layer_decay=0.9 needs parameters named backbone"),
    ],
)
def test_what_cannot_work_is_a_clear_error(toy, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        loop.train(_config(**changes), tmp_path)
    assert checkpoint.latest_step(tmp_path) == -1


def test_missing_keys_are_named(toy, tmp_path):
    config = _config().to_dict()
    del config["seed"], config["optim"]
    with pytest.raises(ValueError, match="config: seed, optim must be given"):
        loop.train(ConfigDict(config), tmp_path)


def test_stages_run_in_order_and_only_once(toy, tmp_path):
    second = _config(name="second", train_steps=2, start_from={"params": "{workdir}/z_first"})
    config = ConfigDict({"stages": {"a_second": second, "z_first": _config(name="first", train_steps=2)}}).lock()
    metrics = main.run(config, tmp_path)
    assert toy.evaluations == ["first", "second"]
    assert set(metrics) == {"first/error", "second/error"}
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert json.loads((tmp_path / "a_second" / "config.json").read_text())["start_from"] == {
        "params": f"{tmp_path}/z_first"
    }
    (tmp_path / "a_second" / "metrics.json").unlink()
    assert main.run(config, tmp_path) == metrics
    assert toy.evaluations == ["first", "second", "second"]
    assert main.run(config, tmp_path, "eval") == metrics
    with pytest.raises(ValueError, match="mode='predict' must be one of"):
        main.run(config, tmp_path, "predict")


def test_a_stage_made_longer_is_finished_when_it_is_evaluated_again(toy, tmp_path, monkeypatch):
    shorter, longer = (ConfigDict({"stages": {"line": _config(train_steps=n)}}).lock() for n in (2, 4))
    main.run(shorter, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_all", None)
        with pytest.raises(TypeError):
            main.run(longer, tmp_path)
    toy.evaluations.clear()
    main.run(longer, tmp_path)
    assert toy.evaluations == ["line"]
