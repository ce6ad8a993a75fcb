"""Training, top to bottom."""

import contextlib
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from sde_diffusion import config as configs
from sde_diffusion import data, evaluate, report, sharding
from sde_diffusion.bound import bound_gradients, check_values
from sde_diffusion.checkpoint import Checkpoints, like
from sde_diffusion.sde import check
from sde_diffusion.survival import Signals, Stopped
from sde_diffusion.times import AdaptiveTimes, terminal_log_snr

NUM_LEVELS = 8  # of the loss per noise level, equal parts of the log-SNR


class TrainState(NamedTuple):
    """All that a checkpoint holds. The step also fixes the data and the noise: no iterator or key is saved."""

    step: Any  # number of updates so far, int32
    params: Any
    ema: Any
    opt_state: Any
    bad_steps: Any  # updates in a row that were skipped for a non-finite loss or gradient, int32
    times: Any = ()  # the AdaptiveTimes of loss.times="adaptive"


class Totals(NamedTuple):
    """Sums over the updates since the last line of metrics, on the device; the losses are those of updates not skipped."""

    updates: Any
    skipped: Any
    loss: Any
    grad_norm: Any
    level_loss: Any  # (NUM_LEVELS,)
    level_count: Any
    level_bad: Any  # examples whose loss was not finite, (NUM_LEVELS,)
    most_bad_steps: Any  # the longest row of skipped updates so far


def zero_totals() -> Totals:
    """Sums over no updates."""
    zero = np.zeros((), np.float32)
    return Totals(zero, zero, zero, zero, *np.zeros((3, NUM_LEVELS), np.float32), np.zeros((), np.int32))


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Adam with linear warm-up to a constant rate and clipping by the global norm."""
    o = config.optim
    rate = optax.linear_schedule(o.lr / (o.warmup_steps + 1), o.lr, o.warmup_steps) if o.warmup_steps else o.lr
    clip = optax.clip_by_global_norm(o.grad_clip) if o.grad_clip else optax.identity()
    adam = optax.adam(rate, b1=o.beta1, b2=o.beta2, eps=o.eps)
    network = optax.chain(clip, adam)
    if not config.loss.learn_schedule:
        return network
    return optax.partition({"network": network, "schedule": adam}, configs.Learned("network", "schedule"))


def init_state(config: ConfigDict, event_shape: tuple[int, ...]) -> TrainState:
    """The state at step 0; the average of the parameters starts as the parameters."""
    x, c = jnp.zeros((1, *event_shape)), jnp.zeros((1,))
    key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)
    params = configs.build_model(config).init(key, x, c)["params"]
    if config.loss.learn_schedule:
        params = configs.Learned(params, configs.learned_leaves(configs.build_sde(config)))
    # At least float32, whatever the parameters are: 0.9999 is 1 in bfloat16.
    ema = jax.tree.map(lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32)), params)
    zero = jnp.zeros((), jnp.int32)
    times = AdaptiveTimes() if config.loss.times == "adaptive" else ()
    return TrainState(zero, params, ema, make_optimizer(config).init(params), jnp.copy(zero), times)


def log_snr_range(sde):
    """The lowest and the highest log-SNR that a loss looks at."""
    return terminal_log_snr(sde), sde.log_snr(jnp.asarray(sde.t_train, float))


def make_gradients(config: ConfigDict, scaler: data.Scaler, distribute=None):
    """The function `(params, times, key, x0, labels, dropout_keys) -> (losses (B,), times (B,), gradient of their mean)`.

    Of a learned schedule's interior the gradient is that of the estimator's second moment, see `bound.bound_gradients`.
    """
    values = scaler.values()

    def from_loss(params, times, key, x0, labels, dropout_keys):
        sde = configs.build_sde(config)
        loss_fn = configs.build_loss(config, values, times or None)

        def objective(params):
            losses, t = loss_fn(configs.build_score(config, params, labels, dropout_keys, distribute=distribute), sde, key, x0)
            return losses.mean(), (losses, t)

        (_, (losses, t)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return losses, t, grads

    def with_schedule(params, _, key, x0, labels, dropout_keys):
        def make_score(network, sde):
            return configs.build_score(config, network, labels, dropout_keys, sde=sde, distribute=distribute)

        sde = configs.build_sde(config, params)
        terms, t, by_network, by_sde = bound_gradients(make_score, params.network, sde, key, x0, values)
        return terms.total, t, configs.Learned(by_network, configs.learned_leaves(by_sde))

    return _accumulate(with_schedule if config.loss.learn_schedule else from_loss, config.train.accumulate)


def _accumulate(gradients, parts: int):
    """`gradients` of a batch in parts, one after the other; every device keeps its own examples."""

    def accumulated(params, times, key, *batch):
        def part(total, inputs):
            number, batch = inputs
            losses, t, grads = gradients(params, times, jax.random.fold_in(key, number), *batch)
            return jax.tree.map(jnp.add, total, grads), (losses, t)

        split = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), batch)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
        grads, (losses, t) = jax.lax.scan(part, zeros, (jnp.arange(parts), split))
        return losses.T.reshape(-1), t.T.reshape(-1), jax.tree.map(lambda g, p: (g / parts).astype(p.dtype), grads, params)

    return accumulated if parts > 1 else gradients


def make_update(config: ConfigDict, scaler: data.Scaler, distribute=None):
    """The update step `(state, totals, batch) -> (state, totals)`: pure, for `jax.jit` over any mesh, or `jax.pmap`.

    batch: "x" `(B, *event)` integer levels or vectors, and "label" `(B,)` where the data has labels.
    distribute: how the network is applied on several devices: `sharding.fully_sharded(mesh)` where parameters are split,
    `sharding.over_axis(name)` under `jax.pmap(..., axis_name=name, in_axes=(0, 0, None))`.
    """
    gradients = make_gradients(config, scaler, distribute)
    optimizer = make_optimizer(config)
    num_classes = config.model.get("num_classes")

    def update(state: TrainState, totals: Totals, batch):
        # Keys follow from (seed, step), and noise is drawn at the global shape: the same on any number of devices.
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        key_x, key_flip, key_loss, key_dropout, key_label = jax.random.split(key, 5)
        x0 = scaler.encode(batch["x"]) if config.loss.name == "bound" else scaler.dequantize(key_x, batch["x"])
        if config.data.flip:
            x0 = data.random_flip(key_flip, x0)
        labels = None
        if num_classes is not None:
            drop = jax.random.bernoulli(key_label, config.train.label_dropout, batch["label"].shape)
            labels = jnp.where(drop, num_classes, batch["label"])

        dropout_keys = jax.random.split(key_dropout, len(x0)) if config.model.get("dropout") else None
        losses, t, grads = gradients(state.params, state.times, key_loss, x0, labels, dropout_keys)
        loss, sde = losses.mean(), configs.build_sde(config, state.params)
        grad_norm = optax.global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(config.optim.ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda e, p: e + (1 - decay).astype(e.dtype) * (p.astype(e.dtype) - e), state.ema, params)

        # A non-finite loss is an event: the update is skipped and counted.
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        times = state.times.update(sde, t, losses) if state.times else ()
        new, old = (params, ema, opt_state, times), (state.params, state.ema, state.opt_state, state.times)
        params, ema, opt_state, times = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        bad_steps = jnp.where(good, 0, state.bad_steps + 1)

        low, high = log_snr_range(sde)
        place = (sde.log_snr(t) - low) / (high - low)
        level = jnp.clip((place * NUM_LEVELS).astype(int), 0, NUM_LEVELS - 1)
        member = jax.nn.one_hot(level, NUM_LEVELS)
        totals = Totals(
            updates=totals.updates + good,
            skipped=totals.skipped + ~good,
            loss=totals.loss + jnp.where(good, loss, 0.0),
            grad_norm=totals.grad_norm + jnp.where(good, grad_norm, 0.0),
            level_loss=totals.level_loss + jnp.where(good, losses, 0.0) @ member,
            level_count=totals.level_count + good * member.sum(axis=0),
            level_bad=totals.level_bad + ~jnp.isfinite(losses) @ member,
            most_bad_steps=jnp.maximum(totals.most_bad_steps, bad_steps),
        )
        return TrainState(state.step + 1, params, ema, opt_state, bad_steps, times), totals

    return update


def summarize(config: ConfigDict, totals: Totals, params=None) -> dict[str, float]:
    """The means over the updates in `totals`; an empty noise level is left out."""
    low, high = map(float, log_snr_range(configs.build_sde(config, params)))
    updates = max(float(totals.updates), 1.0)
    out = {
        "loss": float(totals.loss) / updates if totals.updates else float("nan"),
        "grad_norm": float(totals.grad_norm) / updates if totals.updates else float("nan"),
        "skipped_updates": int(totals.skipped),
    }
    edges = np.linspace(low, high, NUM_LEVELS + 1)
    for i, (loss, count, bad) in enumerate(zip(totals.level_loss, totals.level_count, totals.level_bad, strict=True)):
        level = f"by_log_snr/{edges[i]:.1f}..{edges[i + 1]:.1f}"
        if count:
            out[f"loss_{level}"] = float(loss / count)
        if bad:
            out[f"non_finite_{level}"] = int(bad)
    return out


def prepare(config: ConfigDict, dataset: data.Dataset, mesh=None):
    """What a run needs before its first compilation, checked: mesh, scaler, and the state's shapes on the mesh.

    mesh: in place of the config's, over all devices.

    Raises:
      ValueError: a training batch that does not divide over the devices, images that do not fit the network, labels missing.
    """
    if mesh is None:
        mesh = sharding.make_mesh(shards=config.train.param_shards)
        sharding.check_batch_size(mesh, config.train.batch_size, "train.batch_size", config.train.accumulate)
    check(
        len(dataset.event_shape) == 3 or not config.data.flip,
        f"data.flip=True needs images, but an example of {dataset.name} has shape {dataset.event_shape}",
    )
    _check_images(config, dataset)
    _check_sizes(config, dataset, mesh)
    if config.model.get("num_classes") is not None:
        check(dataset.train_labels is not None, f"model.num_classes is set, but {dataset.name} has no labels; set it to None")
        top = int(np.max(dataset.train_labels[:], initial=0))
        check(top < config.model.num_classes, f"model.num_classes={config.model.num_classes} but {dataset.name} has label {top}")
    scaler = data.Scaler(dataset.num_levels, config.data.centered)
    if config.loss.name == "bound":
        check_values(configs.build_sde(config), scaler.values())
    return mesh, scaler, abstract_state(config, dataset.event_shape, mesh)


def abstract_state(config: ConfigDict, event_shape: tuple[int, ...], mesh) -> TrainState:
    """The state's shapes, dtypes and places on the mesh, which `Checkpoints.restore` asks for; nothing is computed.

    Raises:
      ValueError: it does not fit on the devices.
    """
    abstract = jax.eval_shape(lambda: init_state(config, event_shape))
    abstract = like(abstract, sharding.layout(mesh, abstract))
    held = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(abstract))
    sharding.check_memory(
        mesh, held, f"the state of model.name={config.model.name!r} (parameters, average and optimizer)",
        "make the network smaller (channels, multipliers, num_blocks, width, depth, num_classes), or split it over more train.param_shards",
    )  # fmt: skip
    return abstract


def _check_images(config: ConfigDict, dataset: data.Dataset) -> None:
    """Raises ValueError for examples that the network does not take."""
    shape = dataset.event_shape
    if config.model.name != "unet":
        return
    check(
        len(shape) == 3,
        f"model.name='unet' needs images, but an example of {dataset.name} has shape {shape}: start from a config of model.name='mlp'",
    )
    levels = len(config.model.multipliers)
    factor = 2 ** (levels - 1)
    check(
        shape[0] % factor == 0 and shape[1] % factor == 0,
        f"model.multipliers={tuple(config.model.multipliers)} halve the images {levels - 1} times, but those of {dataset.name} are "
        f"{shape[0]} x {shape[1]}: give fewer multipliers, or a data.image_size that {factor} divides",
    )
    heights = [shape[0] // 2**i for i in range(levels)]
    for size in config.model.attention:
        check(size in heights, f"model.attention={tuple(config.model.attention)}: no resolution of the network has height {size}; "
              f"it has {', '.join(map(str, heights))}")  # fmt: skip


def _check_sizes(config: ConfigDict, dataset: data.Dataset, mesh) -> None:
    """Raises ValueError for batches that no device can hold; a lower bound, without what the network needs."""
    size = 4 * math.prod(dataset.event_shape)
    devices, c, e = mesh.devices.size, config.sample, config.eval
    few = "take a smaller one"
    image = f", each of shape {dataset.event_shape}"
    parts = devices * config.train.accumulate
    sharding.check_memory(mesh, config.train.batch_size / parts * size, f"train.batch_size={config.train.batch_size} examples{image}", few)
    sharding.check_memory(mesh, c.batch_size / devices * size, f"sample.batch_size={c.batch_size} samples{image}", few)
    check(c.num * size <= sharding.host_memory(), f"sample.num={c.num} samples{image} do not fit in this machine's memory; draw fewer")
    batch = min(e.batch_size, len(dataset.test), e.num_examples or len(dataset.test)) / devices * size
    probes = min(math.prod(dataset.event_shape), 1024) if e.trace == "exact" else e.num_probes
    if e.ode:
        key = "eval.trace='exact'" if e.trace == "exact" else f"eval.num_probes={e.num_probes}"
        sharding.check_memory(mesh, batch * probes, f"eval.batch_size={e.batch_size} with {key}{image}", few)
    sharding.check_memory(mesh, batch * e.bound_draws, f"eval.batch_size={e.batch_size} with eval.bound_draws={e.bound_draws}{image}", few)


def train(config: ConfigDict, workdir: Path, dataset: data.Dataset, signals: Signals | None = None) -> TrainState:
    """Trains to `config.train.num_steps`, from the newest checkpoint of workdir where there is one.

    Writes checkpoints, metrics (JSON lines and TensorBoard) and sample grids. Returns the final state.

    signals: that end the run at the next step (on several hosts, the next line of metrics), with a checkpoint.

    Raises:
      ValueError: a wrong value; nothing has been written then.
      FloatingPointError: `train.max_bad_steps` non-finite losses in a row.
      Stopped: a signal; the checkpoint has been written.
    """
    mesh, scaler, abstract = prepare(config, dataset)
    layout = jax.tree.map(lambda a: a.sharding, abstract)
    num_params = sum(a.size for a in jax.tree.leaves(abstract.params))
    c = config.train
    main_host = jax.process_index() == 0
    say = print if main_host else lambda *args, **options: None

    with signals.waiting() if signals else contextlib.nullcontext(), Checkpoints(workdir, c.keep_checkpoints) as checkpoints:
        if checkpoints.latest_step() is None:
            start = 0
            state = jax.jit(
                lambda: init_state(config, dataset.event_shape),
                out_shardings=layout,
                # It runs once: compiling it with optimization takes longer than many a short run.
                compiler_options={"xla_backend_optimization_level": 0},
            )()
        else:
            start, state = checkpoints.restore(abstract)
        hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        say(
            f"{dataset.name}: {len(dataset.train):,} training and {len(dataset.test):,} held-out examples of shape "
            f"{dataset.event_shape}\n{config.model.name}: {num_params:,} parameters; {config.sde.name} SDE; global batch "
            f"{c.batch_size} on {mesh.devices.size} {jax.devices()[0].platform} device(s){hosts}; "
            f"steps {start:,} to {c.num_steps:,}",
            flush=True,
        )
        if start < c.num_steps:
            say("compiling the first step; a U-Net takes about a minute, once ...", flush=True)
        else:
            say(f"already trained to step {start:,}; raise --config.train.num_steps to go on")
            return state

        update = jax.jit(
            make_update(config, scaler, sharding.fully_sharded(mesh)),
            in_shardings=(layout, sharding.replicated(mesh), sharding.by_batch(mesh)),
            out_shardings=(layout, sharding.replicated(mesh)),
            donate_argnums=(0, 1),
        )
        batches = data.batches(dataset, c.batch_size, config.seed, shard=(jax.process_index(), jax.process_count()))
        fresh_totals = lambda: jax.device_put(zero_totals(), sharding.replicated(mesh))  # noqa: E731
        totals = fresh_totals()
        draw = evaluate.make_sampler(config, mesh, dataset.event_shape)
        with (
            report.Metrics(workdir, resume_step=start) if main_host else contextlib.nullcontext() as metrics,
            tqdm(total=c.num_steps, initial=start, unit="step", disable=not main_host, file=sys.stderr) as bar,
        ):
            ready = None  # totals of a finished interval, read one step later so that the device never waits
            clock = None
            # Data in memory is read faster than any thread hands it over.
            source = iter(batches[start:]) if isinstance(dataset.train, np.ndarray) else iter(data.read_ahead(batches, start))
            for step in range(start, c.num_steps):
                batch = sharding.put_batch(mesh, next(source))
                state, totals = update(state, totals, batch)
                bar.update()
                if ready is not None:
                    clock = _log(config, metrics, bar, *ready, clock, state)
                    ready = None
                    checkpoints.seal()
                done = step + 1
                stop = _stop(signals, done % c.log_every == 0 or done == c.num_steps)
                last = done == c.num_steps or stop is not None
                if done % c.log_every == 0 or last:
                    ready = (done, totals)
                    totals = fresh_totals()
                if last or done % c.sample_every == 0 or done % c.checkpoint_every == 0:
                    if ready is not None:
                        _log(config, metrics, bar, *ready, clock, state)
                        ready = None
                    jax.block_until_ready(state)
                    if done % c.checkpoint_every == 0 or last:
                        checkpoints.save(done, state)
                    if done % c.sample_every == 0 and not last:
                        samples = draw(state.ema, min(100, config.sample.num), config.sample.seed)
                        picture = workdir / "samples" / f"train_{done:08d}.png"
                        evaluate.save_samples(picture, samples, scaler, dataset, metrics, done)
                    clock = (done, time.perf_counter())
                if stop is not None:
                    raise Stopped(stop, agreed=True)
    return state


def _stop(signals: Signals | None, now: bool) -> int | None:
    """The signal to end for, the same on all hosts; several hosts ask each other `now`, or not at all."""
    received = None if signals is None else signals.received
    if jax.process_count() == 1:
        return received
    if signals is None or not now:
        return None
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(received or 0)).max()) or None


def _log(config, metrics, bar, step, totals, clock, state):
    """Writes the line of metrics of the interval that ends at `step`; returns (step, time) for the next one's speed."""
    totals = jax.device_get(totals)
    now = time.perf_counter()
    row = summarize(config, totals, state.params)
    if clock is not None and step > clock[0]:
        row["steps_per_s"] = (step - clock[0]) / (now - clock[1])
        row["examples_per_s"] = row["steps_per_s"] * config.train.batch_size
    row["devices"] = jax.device_count()
    if metrics is not None:
        metrics.write(step, row)
    bar.set_postfix_str(f"loss {row['loss']:.4g}")
    if totals.skipped:
        bad = int(totals.most_bad_steps)
        levels = ", ".join(f"{n} at log-SNR {name.partition('/')[2]}" for name, n in row.items() if name.startswith("non_finite"))
        where = f" (examples: {levels})" if levels else ""
        tqdm.write(f"step {step}: {int(totals.skipped)} update(s) skipped for a non-finite loss or gradient{where}", file=sys.stderr)
        if bad >= config.train.max_bad_steps:
            raise FloatingPointError(
                f"the loss was not finite in {bad} updates in a row up to step {step}: lower optim.lr, or look at the "
                "loss_by_log_snr of the last good lines in metrics.jsonl; checkpoints from before are intact"
            )
    return step, now
