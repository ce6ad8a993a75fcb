"""What the library adds to the bare network, as ratios: python -m experiments.benchmark.

Three rows: a 50-evaluation sampler against 50 calls of the network; the training loop against the bare update
step; compiling a 1000-step sampler against a 10-step one. Each ratio is the median over rounds in which the two are
measured in turn, so that a machine that changes speed changes both.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import sde_diffusion as sd
from sde_diffusion import config as configs
from sde_diffusion import data, sharding, train
from sde_diffusion.config import experiment

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved rounds of each measurement.")
_BATCH = flags.DEFINE_integer("batch", 64, "Batch of the sampler.")


def _seconds(fn):
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def _paired(first, second, rounds):
    """Medians of both times and of the ratio first / second over interleaved rounds, after one warm-up each."""
    first(), second()
    pairs = [(_seconds(first), _seconds(second)) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio


def _digits():
    return experiment(model=dict(name="unet", channels=16, multipliers=(1, 2), num_blocks=1), train=dict(batch_size=64, log_every=50))


def sampler_overhead(rounds):
    """50 evaluations inside `sample_ode` against 50 calls of the jitted network on the same batch."""
    config = _digits()
    state = jax.jit(lambda: train.init_state(config, (8, 8, 1)))()
    score_fn, shape = configs.build_score(config, state.ema), (_BATCH.value, 8, 8, 1)
    x, t = jax.random.normal(jax.random.key(0), shape), jnp.full(shape[:1], 0.5)
    network = jax.jit(lambda score_fn, x, t: score_fn.network(x, t))

    def fifty_calls():
        for _ in range(50):
            out = network(score_fn, x, t)
        return out

    def sampler():
        return sd.sample_ode(score_fn, score_fn.sde, jax.random.key(0), shape, num_steps=49)

    return _paired(sampler, fifty_calls, rounds)


def loop_overhead(rounds):
    """Time of one step in `train` (data, metrics, EMA, progress) against one bare update on a fixed batch."""
    config = _digits()
    dataset = data.load("digits")
    mesh, scaler, _ = train.prepare(config, dataset)
    update = jax.jit(train.make_update(config, scaler), donate_argnums=(0, 1))
    batch = sharding.put_batch(mesh, data.batches(dataset, 64, 0)[0])
    steps = 250

    def bare():
        state, totals = jax.jit(lambda: train.init_state(config, (8, 8, 1)))(), jax.device_put(train.zero_totals())
        state, totals = jax.block_until_ready(update(state, totals, batch))
        start = time.perf_counter()
        for _ in range(steps):
            state, totals = update(state, totals, batch)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / steps

    def loop():
        config.train.num_steps = config.train.sample_every = config.train.checkpoint_every = steps
        with tempfile.TemporaryDirectory() as workdir:
            train.train(config, Path(workdir), dataset)
            rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
        return statistics.mean(1 / row["steps_per_s"] for row in rows if "steps_per_s" in row)

    pairs = [(loop(), bare()) for _ in range(rounds)]
    return *(statistics.median(column) for column in zip(*pairs, strict=True)), statistics.median(a / b for a, b in pairs)


def compile_time(rounds):
    """Compiling (not tracing alone) a 1000-step sampler against a 10-step one, with the cache off."""
    jax.config.update("jax_enable_compilation_cache", False)
    config = _digits()
    state = jax.jit(lambda: train.init_state(config, (8, 8, 1)))()
    score_fn = configs.build_score(config, state.ema)

    def compile_sampler(num_steps):
        jax.clear_caches()
        fn = jax.jit(lambda s, k: sd.sample_ode(s, s.sde, k, (_BATCH.value, 8, 8, 1), num_steps=num_steps))
        fn.lower(score_fn, jax.random.key(0)).compile()

    return _paired(lambda: compile_sampler(1000), lambda: compile_sampler(10), rounds)


def main(_):
    """Prints the table."""
    logging.set_verbosity(logging.ERROR)
    # The training loop is compiled anew in every round; only the last row is about compiling.
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        _table()


def _table():
    rows = [
        ("50-evaluation sample_ode / 50 network calls", sampler_overhead(_ROUNDS.value), "at most 1.05"),
        ("train step in the loop / bare update", loop_overhead(_ROUNDS.value), "at most 1/0.95 = 1.05"),
        ("compile 1000 steps / 10 steps", compile_time(_ROUNDS.value), "at most 1.2"),
    ]
    device = jax.devices()[0]
    print(f"{device.device_kind} x {jax.device_count()}, JAX {jax.__version__}, NumPy {np.__version__}, {_ROUNDS.value} rounds")
    print(f"{'':<46}{'first':>10}{'second':>10}{'ratio':>8}   aim")
    for name, (first, second, ratio), aim in rows:
        print(f"{name:<46}{first * 1e3:>8.1f}ms{second * 1e3:>8.1f}ms{ratio:>8.3f}   {aim}")


if __name__ == "__main__":
    app.run(main)
