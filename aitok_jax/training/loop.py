"""The training loop, for tokenizers and solvers alike; it knows no task, only the protocols in `tasks/base.py`.

A run is validate -> mesh -> task -> data -> state (new or restored) -> compiled step -> loop -> evaluation, and leaves
config.json, env.json, parameters.txt, metrics.jsonl, metrics.json, checkpoints/, panels/ and TensorBoard events in its
directory. The randomness of a step is fold_in(key(seed), step) and its batch a function of (seed, step), so a run that
was stopped and started again gives the same bits as one that was not.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from tqdm import tqdm

from aitok_jax import evaluators
from aitok_jax.command_line.progress import progress_bar
from aitok_jax.data import pipeline
from aitok_jax.parallel import overview, sharding
from aitok_jax.tasks.base import variable_shapes
from aitok_jax.tasks.solver import part_prefix
from aitok_jax.training import accumulate, checkpoint, checks, lock, optim, preemption, warm_start
from aitok_jax.training.setup import Run, set_up
from aitok_jax.training.state import TrainState

LOG = logging.getLogger(__name__)
Batch = dict[str, jax.Array]
Step = Callable[[TrainState, Batch, np.ndarray], tuple[TrainState, dict[str, jax.Array]]]
_INIT = 2**32 - 1  # stands for the step in the randomness of the initial parameters


def train(
    config: ConfigDict, workdir: str | Path, changed: Mapping[str, tuple[Any, Any]] | None = None
) -> dict[str, float]:
    """Trains to `config.train_steps`, going on from the latest checkpoint in `workdir` if there is one, and evaluates.

    Args:
      changed: key -> (value in the configuration's file, value now), shown in TensorBoard.

    Returns:
      The metrics of the final evaluation, also written to metrics.json.

    Raises:
      ValueError: a configuration that cannot work, or that is not the one of the checkpoint; a folder that another
        process uses, or that is no run's.
      FloatingPointError: the loss or the gradient is not finite; such a state is never saved.
      OSError: the directory cannot be written to, or no checkpoint in it can be read.
      preemption.Stopped: a signal came; the state is saved.
    """
    with lock.held(workdir), jax.enable_x64(False):
        return _train(config, workdir, changed or {})


def _train(config: ConfigDict, workdir: str | Path, changed: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    run = set_up(config, workdir)
    config = run.config
    checks.check_disk(run.folder.path, checks.checkpoint_bytes(run.task, config, run.folder.path))
    with checkpoint.open_manager(workdir, keep=config.keep_checkpoints) as manager:
        start = manager.latest_step() or 0
        run.folder.check_data({name: data.fingerprint() for name, data in run.data.items()}, start)
        batches, example = first_batches(run, start)
        optimizer = optim.make_optimizer(config.optim, config.train_steps)
        state, shardings = restore_or_init(run, manager, optimizer, example)
        if int(state.step) != start:  # a damaged checkpoint was passed over
            start = int(state.step)
            batches, _ = first_batches(run, start)
        run.folder.write_json("config.json", config.to_dict())
        run.folder.write_environment(run.mesh, start)
        with run.folder.logging(start, sum(config.batch_size.values())):
            if changed or not start:
                run.folder.configuration(start, config, changed)
            if start < config.train_steps:
                run.folder.remove("metrics.json")  # of a shorter run; while it is there, a stage counts as finished
                if config.eval_first and not start:
                    _evaluate_between(run, manager, state)
                step = _compile(make_step(run, optimizer, shardings), state, example, random_key(config))
                state = _loop(run, manager, step, state, batches)
            metrics = evaluate_all(run, state.inference_params, state.model_state)
            _record(run, state, metrics)
        if config.eval_first:
            metrics |= {f"before/{name}": value for name, value in run.folder.evaluations()[0].items()}
        run.folder.write_json("metrics.json", metrics)
    return metrics


def evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Evaluates the latest checkpoint in `workdir` without training; returns and writes the metrics as `train` does.

    Raises:
      ValueError: the configuration is of another model than the run.
    """
    with lock.held(workdir), jax.enable_x64(False):
        return _evaluate_run(config, workdir)


def _evaluate_run(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    saved, variables = checkpoint.load_inference(workdir)
    checkpoint.check_same_parts(saved, config, workdir)
    run = set_up(config, workdir)
    checkpoint.check_shapes(variables, variable_shapes(run.task), workdir)
    variables = _put(variables, sharding.state_shardings(variables, run.mesh))
    metrics = evaluate_all(run, variables["params"], variables["model_state"])
    run.folder.write_json("metrics.json", metrics)
    return metrics


def first_batches(run: Run, start: int) -> tuple[Iterator[dict], Batch]:
    """Host batches from step `start` on, and the first of them on the devices, to show shapes."""

    def part_batches(name, batch_size):
        return pipeline.train_batches(
            run.data[name].train,
            run.data[name].train_transform,
            batch_size=batch_size,
            seed=run.config.seed,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            shards=run.mesh.size,
        )

    each = {name: part_batches(name, run.config.batch_size[name]) for name in run.task.parts}
    batches = (dict(zip(each, rows, strict=True)) for rows in zip(*each.values(), strict=True))
    first = next(batches)
    return itertools.chain([first], batches), sharding.shard_batch(first, run.mesh)


def trial(run: Run, steps: int = 3) -> tuple[float, float]:
    """Seconds that the training step takes to compile, and to run; from random weights, and nothing is written."""
    batches, example = first_batches(run, 0)
    optimizer, key = optim.make_optimizer(run.config.optim, run.config.train_steps), random_key(run.config)
    state, shardings = restore_or_init(run, None, optimizer, example)
    started = time.perf_counter()
    step = _compile(make_step(run, optimizer, shardings), state, example, key)
    compiled = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, sharding.shard_batch(next(batches), run.mesh), key)
    jax.block_until_ready(metrics)
    return compiled - started, (time.perf_counter() - compiled) / steps


def restore_or_init(
    run: Run, manager: ocp.CheckpointManager | None, optimizer: optax.GradientTransformation, example: Batch
) -> tuple[TrainState, TrainState]:
    """The state on its devices, from the latest checkpoint or new, and its shardings; without a manager, random."""

    def init(batch, key):
        rng = jax.random.fold_in(jax.random.wrap_key_data(key), _INIT)
        params, model_state = run.task.init(rng, batch)
        return {"params": params, "model_state": model_state}

    def create(variables):
        return TrainState.create(variables["params"], variables["model_state"], optimizer, run.config.ema_decay)

    key = random_key(run.config)
    abstract = jax.eval_shape(create, jax.eval_shape(init, example, key))
    shardings = sharding.state_shardings(abstract, run.mesh)
    count, memory = overview.parameter_count(abstract.params), overview.state_memory(abstract, shardings)
    where = "" if manager is None else f"; each in {run.folder.path / 'parameters.txt'}"
    LOG.info("%s parameters; on each device: %s%s", f"{count:,}", overview.describe(memory), where)
    if manager is not None:
        run.folder.write_text("parameters.txt", overview.parameter_table(abstract.params, shardings.params))
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    state = None if manager is None else checkpoint.restore_latest(manager, target, run.config)
    if state is None:
        parts = {"params": shardings.params, "model_state": shardings.model_state}
        variables = jax.jit(init, out_shardings=parts)(example, key)
        variables = variables if manager is None else warm_start.start_from(variables, run.config)
        state = jax.jit(create, out_shardings=shardings, donate_argnums=0)(_put(variables, parts))
    return state, shardings


def _put(tree: Any, shardings: Any) -> Any:
    """Host arrays of the tree onto their devices; arrays that are there stay."""

    def put(x, target):
        if isinstance(x, jax.Array):
            return x
        return jax.make_array_from_callback(x.shape, target, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def make_step(run: Run, optimizer: optax.GradientTransformation, shardings: TrainState) -> Step:
    """The jitted step (state, batch, `random_key`) -> (state, metrics). The state given in is donated."""
    schedule = optim.make_schedule(run.config.optim, run.config.train_steps)
    gradient = accumulate.value_and_grad(run.task, run.config.accumulate, run.mesh, shardings.params)

    def step(state, batch, key):
        rng = jax.random.fold_in(jax.random.wrap_key_data(key), state.step)
        with jax.sharding.use_abstract_mesh(run.mesh.abstract_mesh):  # what window attention is split by
            (loss, (metrics, model_state)), grads = gradient(state.params, state.model_state, batch, rng)
        own = {"loss": loss, "learning_rate": schedule(state.step), "grad_norm": optax.global_norm(grads)}
        return state.apply_gradients(grads, model_state, optimizer, run.config.ema_decay), metrics | own

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, sharding.batch_sharding(run.mesh), sharding.replicated(run.mesh)),
        out_shardings=(shardings, sharding.replicated(run.mesh)),
    )


def random_key(config: ConfigDict) -> np.ndarray:
    """What `seed` stands for; an argument of the compiled programs, so that runs of all seeds share them."""
    return np.asarray(jax.random.key_data(jax.random.key(config.seed)))


def _compile(step: Any, state: TrainState, example: Batch, key: np.ndarray) -> Step:
    started = time.perf_counter()
    compiled = step.lower(state, example, key).compile()
    seconds, memory = time.perf_counter() - started, overview.describe(overview.step_memory(compiled))
    LOG.info("training step compiled in %.1f s; on each device: %s", seconds, memory)
    return compiled


def _loop(
    run: Run, manager: ocp.CheckpointManager, step: Step, state: TrainState, batches: Iterator[dict]
) -> TrainState:
    """All steps that are left, their checkpoints and evaluations between them.

    At most two steps are under way, so that batches do not pile up on the devices (and so that the collectives of many
    steps cannot block each other on simulated devices). Metrics of a logged step are fetched when the next step is
    under way. An evaluation comes after a checkpoint, so that it may be interrupted at any time.
    """
    config, start, last = run.config, int(state.step), run.config.train_steps
    hidden = jax.process_index() != 0
    waiting, before, key = None, {}, random_key(config)
    progress = progress_bar(desc=config.name, unit="step", initial=start, total=last, disable=hidden)
    with progress as bar, preemption.deferred():
        if start and _due(start, config.eval_every):
            _evaluate_between(run, manager, state)
        for number in range(start + 1, last + 1):
            state, metrics = step(state, sharding.shard_batch(next(batches), run.mesh), key)
            jax.block_until_ready(before)
            before = metrics
            bar.update()
            if waiting:
                _log(run, bar, *waiting)
            waiting = (number, metrics) if number == last or _due(number, config.log_every) else None
            stop = preemption.requested() or manager.reached_preemption(number)
            evaluate_now = number < last and not stop and _due(number, config.eval_every)
            save = number == last or stop or evaluate_now or _due(number, config.checkpoint_every)
            if waiting and save:
                _log(run, bar, *waiting)
                waiting = None
            with run.folder.untimed():
                if save:
                    check_finite(number, jax.device_get(metrics))
                    run.folder.flush()
                    checkpoint.save(manager, state, config)
                if stop or number == last:
                    checkpoint.finish(manager)
                if stop:
                    raise preemption.Stopped(f"stopped by a signal; the same command goes on from step {number}")
                if evaluate_now:
                    _evaluate_between(run, manager, state)
    return state


def _evaluate_between(run: Run, manager: ocp.CheckpointManager, state: TrainState) -> None:
    """A periodic evaluation of a state that is saved, or is being saved: a signal ends it as soon as that is done."""
    if run.folder.evaluated(int(state.step)):
        return
    with preemption.deferred(lambda: checkpoint.finish(manager)):
        metrics = {}
        for name in run.task.parts:
            metrics |= _evaluate(run, name, state.inference_params, state.model_state)
        _record(run, state, metrics)


def _record(run: Run, state: TrainState, metrics: dict[str, float]) -> None:
    """Logs an evaluation, once the weights are kept where it is the best."""
    step = int(state.step)
    if not run.folder.evaluated(step):
        checkpoint.save_best(run.folder.path, step, metrics, state, run.config)
        run.folder.evaluation(step, metrics)


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
    """The final evaluation, of the task and of its variants: flat names to numbers."""
    metrics = {}
    for name in run.task.parts:
        metrics |= _evaluate(run, name, params, model_state, baseline=run.config.eval_baseline)
        for variant in run.variants[name]:
            metrics |= _evaluate(run, name, params, model_state, variant)
    return {name: float(value) for name, value in metrics.items()}


def _evaluate(
    run: Run, part: str, params: Any, model_state: Any, variant: str = "", baseline: bool = False
) -> dict[str, float]:
    return evaluators.evaluate(
        run.variants[part][variant] if variant else run.task.parts[part],
        params,
        model_state,
        run.data[part],
        batch_size=pipeline.full_size(run.config.eval_batch_size[part], run.mesh.size),
        mesh=run.mesh,
        prefix=variant or part,
        baseline=baseline,
        panels_dir=None if variant else run.folder.panels / part_prefix(run.task, part),
    )
