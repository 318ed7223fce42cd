"""The training loop, for tokenizers and solvers alike; it knows no task, only the protocol in `tasks/base.py`.

A run is validate -> mesh -> task -> data -> state (new or restored) -> compiled step -> loop -> evaluation, and leaves
config.json, env.json, metrics.jsonl, metrics.json, checkpoints/, panels/ and TensorBoard events in its directory. The
randomness of a step is fold_in(key(seed), step) and its batch a function of (seed, step), so a run that was stopped
and started again gives the same bits as one that was not.
"""

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from aitok_jax import checkpoint, config_utils, evaluators, optim, run_dir, sharding, tasks
from aitok_jax.data import pipeline
from aitok_jax.train_state import TrainState

LOG = logging.getLogger(__name__)
Batch = dict[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
_REQUIRED = ("name", "seed", "task", "data", "batch_size", "eval_batch_size", "train_steps", "log_every", "eval_every")
_REQUIRED += ("checkpoint_every", "keep_checkpoints", "optim")
_INIT = 2**32 - 1  # stands for the step in the randomness of the initial parameters


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same during a run. `variants` are tasks with other fields, evaluated at the end."""

    config: ConfigDict
    folder: run_dir.RunDir
    mesh: Mesh
    task: tasks.Task
    variants: dict[str, tasks.Task]
    data: pipeline.Data


def train(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains to `config.train_steps`, going on from the latest checkpoint in `workdir` if there is one, and evaluates.

    Returns:
      The metrics of the final evaluation, also written to metrics.json.

    Raises:
      ValueError: a configuration that cannot work, or that is not the one of the checkpoint.
      FloatingPointError: the loss or the gradient is not finite; such a state is never saved.
    """
    run = prepare(config, workdir)
    with checkpoint.open_manager(workdir, keep=config.keep_checkpoints) as manager:
        start = manager.latest_step() or 0
        batches, example = _batches(run, start)
        optimizer = optim.make_optimizer(config.optim, config.train_steps)
        state, shardings = restore_or_init(run, manager, optimizer, example)
        run.folder.write_json("config.json", config.to_dict())
        run.folder.write_json("env.json", run_dir.environment(run.mesh))
        if start >= config.train_steps:
            return evaluate_all(run, state.inference_params, state.model_state)
        step = _compile(make_step(run, optimizer, shardings), state, example)
        with run.folder.logging(start, config.batch_size):
            state = _loop(run, manager, step, state, batches)
            manager.wait_until_finished()
            metrics = evaluate_all(run, state.inference_params, state.model_state)
            run.folder.evaluation(config.train_steps, metrics)
    return metrics


def evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Evaluates the latest checkpoint in `workdir` without training; returns and writes the metrics as `train` does."""
    _, variables = checkpoint.load_inference(workdir)
    run = prepare(config, workdir)
    variables = _put(variables, sharding.state_shardings(variables, run.mesh))
    return evaluate_all(run, variables["params"], variables["model_state"])


def prepare(config: ConfigDict, workdir: str | Path) -> Run:
    """Mesh, task and data of a configuration. ValueError for all that can be wrong with it, before time is spent."""
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise ValueError(f"config: {', '.join(missing)} must be given")
    least = {"train_steps": 1, "log_every": 1, "keep_checkpoints": 1, "eval_every": 0, "checkpoint_every": 0}
    for key, value in least.items():
        if config[key] < value:
            raise ValueError(f"{key}={config[key]} must be at least {value}")
    if not 0.0 <= config.get("ema_decay", 0.0) < 1.0:
        raise ValueError(f"ema_decay={config.ema_decay} must be in [0, 1); 0 is off")
    mesh = sharding.make_mesh(config.get("fsdp", 1))
    sharding.check_batch_size(config.batch_size, mesh)
    sharding.check_batch_size(config.eval_batch_size, mesh, "eval_batch_size")
    optim.make_optimizer(config.optim, config.train_steps)
    task = tasks.build(config.task)
    if config.data.get("size", task.image_size) != task.image_size:
        raise ValueError(f"data.size={config.data.size} must be task.image_size={task.image_size}; change one of them")
    variants = _variants(task, config.get("eval_variants") or {})
    return Run(config, run_dir.RunDir(workdir), mesh, task, variants, pipeline.build(config.data))


def _variants(task: tasks.Task, changes: Mapping) -> dict[str, tasks.Task]:
    fields = [field.name for field in dataclasses.fields(task)]
    for prefix, values in changes.items():
        for key in values:
            if key not in fields:
                raise ValueError(f"eval_variants.{prefix}: {config_utils.unknown(key, fields)}")
    return {prefix: dataclasses.replace(task, **dict(values.items())) for prefix, values in changes.items()}


def _batches(run: Run, start: int) -> tuple[Iterator[dict], Batch]:
    """Host batches from step `start` on, and the first of them on the devices, to show shapes."""
    batches = pipeline.train_batches(
        run.data.train,
        run.data.train_transform,
        batch_size=run.config.batch_size,
        seed=run.config.seed,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    first = next(batches)
    return itertools.chain([first], batches), sharding.shard_batch(first, run.mesh)


def restore_or_init(
    run: Run, manager: ocp.CheckpointManager, optimizer: optax.GradientTransformation, example: Batch
) -> tuple[TrainState, TrainState]:
    """The state on its devices, from the latest checkpoint or new, and its shardings."""

    def init(batch):
        rng = jax.random.fold_in(jax.random.key(run.config.seed), _INIT)
        params, model_state = run.task.init(rng, batch)
        return {"params": params, "model_state": model_state}

    def create(variables):
        ema_decay = run.config.get("ema_decay", 0.0)
        return TrainState.create(variables["params"], variables["model_state"], optimizer, ema_decay)

    abstract = jax.eval_shape(lambda batch: create(init(batch)), example)
    shardings = sharding.state_shardings(abstract, run.mesh)
    LOG.info("%s parameters", f"{sum(x.size for x in jax.tree.leaves(abstract.params)):,}")
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    state = checkpoint.restore_latest(manager, target, run.config)
    if state is None:
        parts = {"params": shardings.params, "model_state": shardings.model_state}
        variables = _start_from(jax.jit(init, out_shardings=parts)(example), run.config)
        state = jax.jit(create, out_shardings=shardings)(_put(variables, parts))
    return state, shardings


def _start_from(variables: dict, config: ConfigDict) -> dict:
    """Takes over weights of other runs, as `config.start_from` says, and logs what was used."""
    for prefix, path in (config.get("start_from") or {}).items():
        if not path:
            if prefix.startswith("model_state"):
                raise ValueError(f"start_from: {prefix!r} is never trained; give the run directory of its tokenizer")
            continue
        _, source = checkpoint.load_inference(path)
        variables, report = checkpoint.merge(variables, source, prefix)
        LOG.info("start_from %s <- %s: %s", prefix, path, report)
        if prefix.startswith("model_state") and report.missing:
            raise ValueError(f"start_from: {prefix!r} is never trained, but {path} lacks {', '.join(report.missing)}")
    return variables


def _put(tree: Any, shardings: Any) -> Any:
    """Host arrays of the tree onto their devices; arrays that are there stay."""

    def put(x, target):
        if isinstance(x, jax.Array):
            return x
        return jax.make_array_from_callback(x.shape, target, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def make_step(run: Run, optimizer: optax.GradientTransformation, shardings: TrainState) -> Step:
    """The jitted step (state, batch) -> (state, metrics). The state given in is donated."""
    schedule = optim.make_schedule(run.config.optim, run.config.train_steps)
    ema_decay = run.config.get("ema_decay", 0.0)

    def step(state, batch):
        rng = jax.random.fold_in(jax.random.key(run.config.seed), state.step)
        gradient = jax.value_and_grad(run.task.loss, has_aux=True)
        (loss, (metrics, model_state)), grads = gradient(state.params, state.model_state, batch, rng)
        own = {"loss": loss, "learning_rate": schedule(state.step), "grad_norm": optax.global_norm(grads)}
        return state.apply_gradients(grads, model_state, optimizer, ema_decay), metrics | own

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, sharding.batch_sharding(run.mesh)),
        out_shardings=(shardings, sharding.replicated(run.mesh)),
    )


def _compile(step: Any, state: TrainState, example: Batch) -> Step:
    started = time.perf_counter()
    compiled = step.lower(state, example).compile()
    LOG.info("training step compiled in %.1f s", time.perf_counter() - started)
    return compiled


def _loop(
    run: Run, manager: ocp.CheckpointManager, step: Step, state: TrainState, batches: Iterator[dict]
) -> TrainState:
    """All steps that are left. Metrics of a logged step are fetched when the next step is under way."""
    config, start, last = run.config, int(state.step), run.config.train_steps
    hidden = jax.process_index() != 0
    waiting = None
    with tqdm(desc=config.name, unit="step", initial=start, total=last, disable=hidden) as bar:
        for number in range(start + 1, last + 1):
            state, metrics = step(state, sharding.shard_batch(next(batches), run.mesh))
            bar.update()
            if waiting:
                _log(run, bar, *waiting)
            waiting = (number, metrics) if number == last or _due(number, config.log_every) else None
            stop = manager.reached_preemption(number)
            save = number == last or stop or _due(number, config.checkpoint_every)
            evaluate_now = number < last and _due(number, config.eval_every)
            if waiting and (save or evaluate_now):
                _log(run, bar, *waiting)
                waiting = None
            with run.folder.untimed():
                if save:
                    check_finite(number, jax.device_get(metrics))
                    checkpoint.save(manager, state, config)
                if stop and number < last:
                    manager.wait_until_finished()
                    raise SystemExit(f"stopped by a preemption notice; the same command goes on from step {number}")
                if evaluate_now:
                    scores = _evaluate(run, run.task, state.inference_params, state.model_state)
                    run.folder.evaluation(number, scores)
    return state


def _log(run: Run, bar: tqdm, step: int, metrics: dict[str, jax.Array]) -> None:
    metrics = jax.device_get(metrics)
    check_finite(step, metrics)
    run.folder.training(step, metrics)
    bar.set_postfix(loss=f"{float(metrics['loss']):.4g}", refresh=False)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def check_finite(step: int, metrics: dict[str, Any]) -> None:
    """Raises FloatingPointError, which names step and metrics, where loss or gradient norm is not a finite number."""
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        wrong = [f"{name}={float(value)}" for name, value in metrics.items() if not math.isfinite(value)]
        raise FloatingPointError(
            f"step {step}: {', '.join(wrong)}; lower optim.learning_rate, set optim.clip_norm, or look at the data"
        )


def evaluate_all(run: Run, params: Any, model_state: Any) -> dict[str, float]:
    """The final evaluation, of the task and of its variants: flat names to numbers, also written to metrics.json."""
    metrics = _evaluate(run, run.task, params, model_state, baseline=run.config.get("eval_baseline", False))
    for prefix, task in run.variants.items():
        metrics |= _evaluate(run, task, params, model_state, prefix)
    metrics = {name: float(value) for name, value in metrics.items()}
    run.folder.write_json("metrics.json", metrics)
    return metrics


def _evaluate(
    run: Run, task: tasks.Task, params: Any, model_state: Any, variant: str = "", baseline: bool = False
) -> dict[str, float]:
    return evaluators.evaluate(
        task,
        params,
        model_state,
        run.data,
        batch_size=run.config.eval_batch_size,
        mesh=run.mesh,
        prefix=variant or run.config.name,
        baseline=baseline,
        panels_dir=None if variant else run.folder.panels,
    )
