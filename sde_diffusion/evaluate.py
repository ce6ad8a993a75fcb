"""What a trained network is worth: held-out bits/dim, samples, and how far they are from the data."""

import hashlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from sde_diffusion import config as configs
from sde_diffusion import data, report, samplers, sharding
from sde_diffusion.analytic import GaussianMixture
from sde_diffusion.bound import Bound, variational_bound
from sde_diffusion.checkpoint import Checkpoints
from sde_diffusion.likelihood import log_likelihood
from sde_diffusion.sde import SDE, check


class Run(NamedTuple):
    """A trained run, to sample from or to evaluate in a notebook."""

    score_fn: Any  # `(x (B, *event), t (B,)) -> (B, *event)`, of the averaged parameters
    sde: SDE
    event_shape: tuple[int, ...]
    scaler: data.Scaler  # `scaler.to_uint8(samples)` makes pictures
    step: int
    config: ConfigDict


def load_run(workdir: str | Path, labels=None) -> Run:
    """The newest checkpoint of a workdir that `python -m sde_diffusion.main` wrote. The data need not be here: data.json tells their shape.

    labels: classes of a conditional network (model.num_classes), `(B,)` ints: the score function is given these, for batches of B; None
    for the score without a class.

    Raises:
      ValueError: no config or no checkpoint there, none that can be read, another data.json, or labels that are no classes of the network.
    """
    from sde_diffusion import train

    path = Path(workdir).expanduser().absolute()
    with Checkpoints(path, read_only=True) as checkpoints:
        if checkpoints.latest_step() is None or not (path / "config.json").exists():
            raise ValueError(f"no trained run in {path}; python -m sde_diffusion.main --workdir={workdir} makes one")
        config = configs.load(path / "config.json")
        configs.validate(config)
        labels = None if labels is None else _classes(labels, config.model.get("num_classes"))
        facts = data.read_facts(path / "data.json") or data.load(**configs.data_options(config), in_memory=False).facts
        event_shape, scaler = tuple(facts["shape"]), data.Scaler(facts["levels"], config.data.centered)
        step, state = checkpoints.restore(train.abstract_state(config, event_shape, sharding.make_mesh()))
        params = state.ema
    score_fn = configs.build_score(config, params, labels)
    return Run(score_fn, configs.build_sde(config, params), event_shape, scaler, step, config)


def _classes(labels, num_classes: int | None) -> jax.Array:
    """labels as an array, or a ValueError."""
    labels = np.asarray(labels)
    check(num_classes is not None, "labels were given, but the run has no classes: model.num_classes is None")
    check(
        labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer) and bool(((labels >= 0) & (labels < num_classes)).all()),
        f"labels={labels.tolist()} must be integers from 0 to {num_classes - 1}, one for each example of a batch",
    )
    return jnp.asarray(labels, jnp.int32)


def make_batch_sampler(config: ConfigDict, mesh, event_shape: tuple[int, ...]):
    """A jitted function `(params, key) -> samples (B, *event)` by the config's sampler, split over the mesh.

    B is `sample.batch_size`, rounded up to a multiple of the devices. A conditional network gets the classes in turn.
    """
    sampler = configs.build_sampler(config)
    batch = sharding.round_up(mesh, config.sample.batch_size)
    num_classes = config.model.get("num_classes")
    labels = None if num_classes is None else jnp.arange(batch) % num_classes

    @jax.jit
    def draw_batch(params, key):
        x = sampler(configs.build_score(config, params, labels, distribute=sharding.with_gathered(mesh)), key, (batch, *event_shape))
        return jax.lax.with_sharding_constraint(x, sharding.by_batch(mesh))

    return draw_batch


def make_sampler(config: ConfigDict, mesh, event_shape: tuple[int, ...]):
    """`draw(params, num, seed)`: samples `(num, *event)` in model space by the config's sampler, as a numpy array.

    Compiled once, for batches as of `make_batch_sampler`.
    """
    draw_batch, batch = make_batch_sampler(config, mesh, event_shape), config.sample.batch_size

    def draw(params, num: int, seed: int) -> np.ndarray:
        key = jax.random.key(seed)
        parts = [draw_batch(params, jax.random.fold_in(key, i)) for i in range(-(-num // batch))]
        # More where the batch does not divide over the devices, after those that any number of devices draws.
        return np.concatenate([_to_host(part)[:batch] for part in parts])[:num]

    return draw


def fit_solver(config: ConfigDict, workdir: Path, params, event_shape: tuple[int, ...]) -> Path:
    """Fits a solver of `sample.num_steps` evaluations to the network, on `sample.fit_states` prior draws.

    Returns the file in which it is, `workdir/solver_NFE.json`, and prints its held-out errors.
    """
    c = config.sample
    solver = samplers.fit_solver(
        configs.build_score(config, params), configs.build_sde(config, params), jax.random.key(c.seed),
        (min(c.batch_size, 32), *event_shape), nfe=c.num_steps, t_end=c.t_end, num_states=c.fit_states,
        seconds=c.fit_seconds,
    )  # fmt: skip
    facts = json.loads(solver.facts)
    path = solver.save(workdir / f"solver_{c.num_steps}.json")
    more = f": a larger sample.fit_seconds than {c.fit_seconds:g} may pay" if facts["ended_by"] == "the time limit" else ""
    print(
        f"{c.num_steps} evaluations, on {facts['held_out_states']} held-out states: RMSE {facts['held_out_rmse']:.4g} +- "
        f"{facts['held_out_stderr']:.1g}, median error {facts['held_out_median']:.4g}\n"
        f"the default solver there: RMSE {facts['held_out_rmse_of_the_default']:.4g} +- {facts['held_out_stderr_of_the_default']:.1g}, "
        f"median error {facts['held_out_median_of_the_default']:.4g}\n"
        f"updates: {facts['updates']}, ended by {facts['ended_by']}{more}\n"
        f"in {path}; sample with it: --mode=sample --config.sample.method={path}"
    )
    return path


def _to_host(x: jax.Array) -> np.ndarray:
    if jax.process_count() == 1:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def save_samples(path: Path, samples: np.ndarray, scaler: data.Scaler, dataset: data.Dataset, metrics=None, step=0) -> None:
    """A picture of samples in model space: a grid of images, or a scatter plot over the data for points in the plane."""
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(dataset.event_shape) == 3:
        grid = report.image_grid(np.asarray(scaler.to_uint8(samples[:100])))
        report.save_image(path, grid)
        if metrics is not None:
            metrics.image(step, "samples", grid)
    elif dataset.event_shape == (2,):
        report.save_scatter(path, samples, np.asarray(dataset.test[:2000]))


def bits_per_dim(config: ConfigDict, params, mesh, scaler: data.Scaler, examples, partial: Path | None = None) -> dict[str, float]:
    """Bits/dim of `examples` by the probability-flow ODE down to t_end, with its standard error over the examples.

    Integer levels are dequantized uniformly, one draw each: an upper bound on the discrete code length.
    Covers exactly the given examples, each with a key of its own: the figure does not depend on batches or devices.

    Args:
      partial: a file for the figures of the examples so far, from which a stopped evaluation goes on.

    Raises:
      FloatingPointError: an example whose likelihood is not finite, by number.
    """
    c = config.eval

    def log_prob(params, key, levels):
        key_x, key_probe = jax.random.split(key)
        return log_likelihood(
            configs.build_score(config, params, distribute=sharding.with_gathered(mesh)), configs.build_sde(config, params), key_probe,
            scaler.dequantize(key_x, levels)[None], trace=c.trace, num_probes=c.num_probes, rtol=c.rtol, atol=c.atol,
            t_end=c.t_end,
        )[0]  # fmt: skip

    values = _of_each(config, log_prob, params, mesh, examples, partial)
    bits = scaler.bits_per_dim(values, math.prod(examples.shape[1:]))
    return _mean(bits, "log-likelihood", "loosen eval.rtol and eval.atol, or train longer")


def bound_bits_per_dim(config: ConfigDict, params, mesh, scaler: data.Scaler, examples, partial: Path | None = None) -> dict[str, float]:
    """Bits/dim of `examples` by the variational bound: the total and each term, with standard errors over the examples.

    Of the levels themselves, without dequantization; of vectors, of their density. The mean of `eval.bound_draws` draws of
    each example, at times spread over the whole range. Covers the examples as `bits_per_dim` does, and resumes like it.

    Raises:
      FloatingPointError: a term that is not finite, by its name, and the example.
    """
    num_dims = math.prod(examples.shape[1:])

    def terms(params, key, levels):
        draws = jnp.broadcast_to(scaler.encode(levels), (config.eval.bound_draws, *levels.shape))
        bound = variational_bound(
            configs.build_score(config, params, distribute=sharding.with_gathered(mesh)),
            configs.build_sde(config, params),
            key,
            draws,
            values=scaler.values(),
        )
        return jnp.stack(bound).mean(axis=1)

    bits = _of_each(config, terms, params, mesh, examples, partial) / (num_dims * math.log(2.0))
    means = {}
    for i, name in enumerate(Bound._fields):
        term = _mean(bits[:, i], f"{name} term of the bound", "train longer, or narrow the schedule's range")
        means |= {name: term["bits_per_dim"], f"{name}_stderr": term["stderr"]}
    return {**_mean(bits.sum(axis=1), "bound", "train longer"), **means}


def _of_each(config, fn, params, mesh, examples, partial: Path | None) -> np.ndarray:
    """`fn(params, key, example)` of exactly the given examples, in order, in float64 on the host.

    Keys are of the examples' numbers; the last batch is padded, and the padding masked.
    """
    batch_size = sharding.round_up(mesh, min(config.eval.batch_size, len(examples)))
    key = jax.random.key(config.eval.seed)

    @jax.jit
    def of_batch(params, numbers, batch):
        return jax.vmap(lambda n, x: fn(params, jax.random.fold_in(key, n), x))(numbers, batch)

    one = jax.eval_shape(fn, params, key, jax.ShapeDtypeStruct(examples.shape[1:], examples.dtype)) if _there(partial) else None
    values = _read_partial(partial, one, len(examples))
    shard = (jax.process_index(), jax.process_count())
    done = sum(map(len, values))
    # A part that ends within a batch of now was written by another batch size: begin at the last whole one.
    whole = done // batch_size * batch_size
    values = [np.concatenate(values)[:whole]] if whole else []
    batches = zip(*(data.eval_batches(a[whole:], batch_size, shard=shard) for a in (np.arange(len(examples)), examples)))
    for (numbers, mask), (batch, _) in tqdm(batches, total=-(-(len(examples) - whole) // batch_size), unit="batch", disable=None):
        numbers, batch, mask = sharding.put_batch(mesh, (numbers, batch, mask))
        values.append(_to_host(of_batch(params, numbers, batch))[_to_host(mask)])
        if partial is not None and jax.process_index() == 0:
            temporary = partial.with_suffix(f".{os.getpid()}.tmp.npz")
            np.savez(temporary, values=np.concatenate(values))
            temporary.replace(partial)
    return np.concatenate(values).astype(np.float64)


def _there(path: Path | None) -> bool:
    return path is not None and path.exists()


def _read_partial(path: Path | None, one: Any, most: int) -> list[np.ndarray]:
    """What an evaluation that was stopped has written, the same on all hosts; one: the figures of one example, as shapes."""
    if not _there(path):
        return []
    try:
        values = data.read_npz(path, ("values",)).get("values", np.empty(0))
        if values.dtype != one.dtype or values.shape[1:] != one.shape or not 1 <= len(values) <= most:
            raise data.Unreadable(f"{path} holds {values.dtype} {values.shape}, which are not the figures of this evaluation")
        return [values]
    except data.Unreadable as error:
        print(f"{error}; the evaluation begins again", file=sys.stderr)
        return []


def _mean(bits, name: str, fix: str) -> dict[str, float]:
    """The mean of bits/dim with its standard error; a FloatingPointError names the first example that is not finite."""
    bits = np.asarray(bits, np.float64)
    bad = np.flatnonzero(~np.isfinite(bits))
    if len(bad):
        raise FloatingPointError(f"the {name} of {len(bad)} of {len(bits)} examples is not finite, first of example {bad[0]}: {fix}")
    return {"bits_per_dim": bits.mean(), "stderr": bits.std(ddof=1) / math.sqrt(len(bits)) if len(bits) > 1 else None, "num": len(bits)}


def gaussian_mixture_bits_per_dim(
    dataset: data.Dataset, scaler: data.Scaler, components=(5, 10, 20), draws: int = 4, seed: int = 0
) -> tuple[dict, int]:
    """Held-out bits/dim of the best of scikit-learn's full-covariance Gaussian mixtures, and its number of components.

    Fitted to the training set, dequantized as in `bits_per_dim`; chosen on the held-out set, in the baseline's favour.
    """
    from sklearn.mixture import GaussianMixture as Mixture

    def dequantize(key, levels):
        return np.asarray(scaler.dequantize(key, levels), np.float64).reshape(len(levels), -1)

    # Several draws of the noise for each example: a mixture fitted to one of them overfits it.
    key_train, key_test = jax.random.split(jax.random.key(seed))
    train = dequantize(key_train, np.concatenate([np.asarray(dataset.train)] * draws))
    test = dequantize(key_test, np.asarray(dataset.test))
    bits = {}
    for k in components:
        mixture = Mixture(k, covariance_type="full", reg_covar=1e-3, random_state=seed).fit(train)
        bits[k] = _mean(scaler.bits_per_dim(mixture.score_samples(test), train.shape[1]), "Gaussian mixture", "are the data finite?")
    best = min(bits, key=lambda k: bits[k]["bits_per_dim"])
    return bits[best], best


def evaluate(config: ConfigDict, workdir: Path, params, step: int, dataset: data.Dataset, mesh, scaler) -> dict:
    """Held-out bits/dim and the sample-quality figure, printed and stored in `workdir/eval_STEP.json`."""
    examples = dataset.test[: config.eval.num_examples]
    say = print if jax.process_index() == 0 else lambda *a, **k: None
    say(f"evaluating {len(examples):,} held-out examples and {config.sample.num:,} samples ...", flush=True)
    of = "" if len(examples) == len(dataset.test) else f" of {len(dataset.test):,}"
    discrete = dataset.num_levels is not None
    out, lines = {"step": step}, []
    # Named by all that their figures depend on.
    digest = hashlib.sha256(f"{configs.to_json(config)}{step}".encode()).hexdigest()[:12]

    def partial(name):
        return workdir / f"eval_{step:08d}_{name}_{digest}.partial.npz"

    if config.eval.bound_draws:
        bound = bound_bits_per_dim(config, params, mesh, scaler, examples, partial("bound"))
        out["bound"] = bound
        lines.append(("held-out bits/dim", _with_error(bound["bits_per_dim"], bound["stderr"]),
                      f"variational bound, {bound['num']:,}{of} examples, {config.eval.bound_draws} draws each"))  # fmt: skip
        for term in Bound._fields:
            lines.append(
                (
                    f"  {term}",
                    _with_error(bound[term], bound[f"{term}_stderr"]),
                    "of the levels" if term == "reconstruction" and discrete else "",
                )
            )
    if config.eval.ode:
        ode = bits_per_dim(config, params, mesh, scaler, examples, partial("ode"))
        t_end = config.eval.t_end if config.eval.t_end is not None else configs.build_sde(config, params).t_min
        out |= {**ode, "t_end": float(t_end)}
        dequantized = ", uniform dequantization" if discrete else ""
        lines.append(("held-out bits/dim", _with_error(ode["bits_per_dim"], ode["stderr"]),
                      f"ODE likelihood to t = {t_end:g}{dequantized}, {ode['num']:,}{of} examples"))  # fmt: skip
    # A component needs more examples than dimensions.
    components = [k for k in (5, 10, 20) if k * math.prod(dataset.event_shape) <= len(dataset.train)]
    if config.eval.gaussian_mixture and discrete and components:
        bits, k = gaussian_mixture_bits_per_dim(dataset, scaler, components)
        out |= {f"gaussian_mixture_{name}": value for name, value in bits.items()} | {"gaussian_mixture_components": k}
        lines.append(
            ("  best Gaussian mixture", _with_error(bits["bits_per_dim"], bits["stderr"]), f"{k} full-covariance components, same split")
        )
    if dataset.name == "gaussian_mixture_2d":
        exact = GaussianMixture(*data.gaussian_mixture_2d()).log_prob(jnp.asarray(examples))
        bits = _mean(scaler.bits_per_dim(exact, 2), "exact density", "are the data finite?")
        out |= {f"exact_{name}": value for name, value in bits.items()}
        lines.append(("  exact density", _with_error(bits["bits_per_dim"], bits["stderr"]), "of the mixture itself, same examples"))

    num = config.sample.num
    samples = make_sampler(config, mesh, dataset.event_shape)(params, num, config.sample.seed)
    check_samples(samples)
    distances = quality(samples, dataset, scaler)
    out |= distances
    for title, name, note in (
        ("energy distance", "energy_distance", f"samples to held-out data, {distances['energy_num']:,} each, {_sampler_name(config)}"),
        ("  floor", "energy_distance_floor", "training to held-out data, as many"),
    ):
        lines.append((title, _with_error(distances[name], distances[f"{name}_stderr"], 4), note))

    if jax.process_index() == 0:
        print("\n".join(f"{name:<24}{value:>16}   {note}".rstrip() for name, value, note in lines), flush=True)
        path = workdir / f"eval_{step:08d}.json"
        path.write_text(json.dumps(out, indent=2) + "\n")
        for name in ("bound", "ode"):
            partial(name).unlink(missing_ok=True)
        write_samples(config, workdir, samples, step, dataset, scaler)
        print(f"figures in {path}", flush=True)
    return out


def _with_error(value: float, stderr: float | None, digits: int = 3) -> str:
    return f"{value:.{digits}f}" + ("" if stderr is None else f" +- {stderr:.{digits}f}")


def quality(samples: np.ndarray, dataset: data.Dataset, scaler: data.Scaler, most: int = 2000) -> dict:
    """The energy distance of samples to the held-out set beside that of the training set to it, in equal numbers, with standard errors."""
    num = min(len(samples), len(dataset.test), most)
    pixels = scaler.decode if dataset.num_levels is not None else np.asarray
    # Neighbours in a file may be alike: rows at random.
    rows = np.random.default_rng(0)
    drawn = (a[np.sort(rows.permutation(len(a))[:num])] for a in (dataset.test, dataset.train))
    samples, test, train = (np.asarray(a, np.float64).reshape(num, -1) for a in (pixels(samples[:num]), *drawn))
    scale = 1.0 if dataset.num_levels is None else 2.0 / (dataset.num_levels - 1)
    out = {"energy_num": num}
    for name, examples in (("energy_distance", samples), ("energy_distance_floor", train)):
        out[name], stderr = report.energy_distance(scale * examples, scale * test)
        out[f"{name}_stderr"] = stderr if num > 1 else None
    return out


def _sampler_name(config, separator=" ") -> str:
    """The sampler and its options, as far as they are not the usual ones."""
    c = config.sample
    method = configs.sample_method(config)
    # A fitted solver's file tells its evaluations.
    parts = [c.sampler, *([Path(method).stem] if method.endswith(".json") else [method, f"{c.num_steps}{separator}steps"])]
    parts += [c.grid] if c.grid else []
    parts += [f"t_end{separator}{c.t_end:g}"] if c.t_end is not None else []
    parts += [f"noise{separator}{c.noise_level:g}"] if c.sampler == "sde" and c.noise_level != 1 else []
    parts += [c.corrector, f"snr{separator}{c.snr:g}", f"x{c.corrector_steps}"] if c.sampler == "pc" else []
    parts += [] if c.denoise else ["noisy"]
    return separator.join(parts)


def check_samples(samples: np.ndarray) -> None:
    """Raises FloatingPointError for samples that are not finite."""
    bad = int((~np.isfinite(samples).reshape(len(samples), -1).all(axis=1)).sum())
    if bad:
        raise FloatingPointError(
            f"{bad} of {len(samples)} samples are not finite: take more sample.num_steps, less sample.noise_level or sample.snr, "
            "another sample.method, or train longer"
        )


def write_samples(config: ConfigDict, workdir: Path, samples: np.ndarray, step: int, dataset, scaler) -> Path:
    """Writes samples to `workdir/samples/NAME.npz` and a picture beside it; the name tells step, sampler and seed."""
    stem = workdir / "samples" / f"step{step}_{_sampler_name(config, '_')}_seed{config.sample.seed}_{len(samples)}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    method, num_steps = configs.sample_method(config), config.sample.num_steps
    if method.endswith(".json") and (nfe := samplers.LearnedSolver.load(method).nfe) != num_steps:
        print(f"{method} has {nfe} evaluations of its own: sample.num_steps={num_steps} is for other methods", flush=True)
    images = dataset.num_levels is not None
    np.savez_compressed(f"{stem}.npz", samples=np.asarray(scaler.to_uint8(samples)) if images else samples)
    picture = stem.with_name(stem.name + ".png")
    save_samples(picture, samples, scaler, dataset)
    print(f"{len(samples):,} samples in {stem}.npz" + (f", a picture in {picture}" if picture.exists() else ""), flush=True)
    return picture
