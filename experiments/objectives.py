"""Objectives: how much less a loss varies by the choice of its times, and two identities of arXiv:2303.00848, on mixtures.

    python -m experiments.objectives [--out=runs/objectives]

1. The variance of the batch mean of the ELBO loss (`weighted_loss`) at the exact score, at batch 128, of mixtures in 2, 16 and 64
   dimensions: plain times (uniform in t, independent) over each other way to draw them, so larger is better. "strat" shares one
   offset over the batch (all that the library draws), "control" subtracts a term of |eps|^2 of known mean.
   The mean and variance of the loss at each log-SNR are measured; the variance of any way to draw times follows by quadrature,
   which a direct measurement of the last column checks (the plain one, with few times of most of its variance, cannot be measured so).
2. Theorem 1: a monotone weight's loss from `weighted_loss` against the ELBO of data with Gaussian noise, from log-densities.
3. The loss under five noise schedules with the same end points.

Prints tables, writes objectives.json and objectives.png to --out; about four minutes on two cores.
"""

import argparse
import dataclasses
import json
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sde_diffusion as sd
from sde_diffusion.losses import noise_error
from sde_diffusion.weights import LOG_SNR_WEIGHTS

BATCH, LEVELS = 128, 257
SDES = {"VP": sd.VP(), "sub-VP": sd.SubVP(), "VE": sd.VE(), "cosine": sd.CosineVP()}
COLUMNS = ("uniform strat", "log_snr", "log_snr strat", "adaptive", "adaptive strat", "and control")


def mixture(dim: int, seed: int = 0) -> sd.GaussianMixture:
    """Five components of power-law spectra, of mean variance 1 in all."""
    rng = np.random.default_rng(seed)
    bases = np.linalg.qr(rng.standard_normal((5, dim, dim)))[0]
    spectrum = np.arange(1.0, dim + 1) ** -1.0
    covariances = np.einsum("kij,j,klj->kil", bases, 0.4 * spectrum / spectrum.mean() + 1e-4, bases)
    means = np.sqrt(0.6) * rng.standard_normal((5, dim))
    weights = rng.dirichlet(np.full(5, 3.0))
    centred = means - weights @ means
    total = np.trace(np.einsum("k,kij->ij", weights, covariances)) + (weights @ centred**2).sum()
    scale = np.sqrt(dim / total)
    return sd.GaussianMixture(weights, scale * centred, scale**2 * covariances)


# 1. Variance.


def moments(score_fn, sde, x0, control):
    """(lambda, mean, mean square) of 1/2 |eps - eps_hat|^2 at LEVELS log-SNRs from the lowest to the highest."""
    ends = sde.log_snr(jnp.asarray([sde.t_max, sde.t_train], float))
    log_snr = jnp.linspace(ends[0], ends[1], LEVELS)

    @jax.jit
    def measure(times, key):
        def level(at):
            t, key = at
            error = 0.5 * noise_error(score_fn, sde, key, x0, jnp.full(len(x0), t), control)
            return error.mean(), (error**2).mean()

        return jax.lax.map(level, (times, jax.random.split(key, LEVELS)))

    times = jnp.clip(sde.time(log_snr), sde.t_train, sde.t_max)
    return tuple(np.asarray(a, np.float64) for a in (log_snr, *measure(times, jax.random.key(1))))


def variance_of_mean(log_snr, mean, square, density, stratified):
    """Of the mean of BATCH losses at times whose density in lambda is given at the nodes.

    Independent: var / BATCH. Stratified, with u_i = (u_0 + i) / BATCH: the mean over u of the variance at u, over BATCH, plus the
    variance over u_0 of the rectangle rule of the mean.
    """
    cdf = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]) * np.diff(log_snr))])
    cdf, density = cdf / cdf[-1], density / cdf[-1]
    if not stratified:
        return (np.trapezoid(square / density, log_snr) - np.trapezoid(mean, log_snr) ** 2) / BATCH
    # u_0 is dense at both ends: of times uniform in t most of the variance is in the last 1e-5 of them.
    near = np.geomspace(1e-8, 0.5, 600)
    edges = np.unique(np.concatenate([[0.0], near, 1 - near, [1.0]]))
    u = (0.5 * (edges[1:] + edges[:-1]) + np.arange(BATCH)[:, None]) / BATCH
    at = np.interp(u, cdf, log_snr)
    rule = (np.interp(at, log_snr, mean) / np.exp(np.interp(at, log_snr, np.log(density)))).mean(axis=0)
    over_u0 = np.diff(edges) @ rule**2 - (np.diff(edges) @ rule) ** 2
    return np.trapezoid((square - mean**2) / density, log_snr) / BATCH + over_u0


def adapted(score_fn, sde, x0, control, updates=400):
    """An AdaptiveTimes after `updates` batches."""

    @jax.jit
    def update(times, key):
        key_x, key_loss = jax.random.split(key)
        batch = jax.random.choice(key_x, x0, (BATCH,))
        loss, t = sd.weighted_loss(score_fn, sde, key_loss, batch, times=times, control=control, return_times=True)
        return times.update(sde, t, loss)

    times = sd.AdaptiveTimes()
    for i in range(updates):
        times = update(times, jax.random.key(i))
    return times


def measured(score_fn, sde, x0, times, control, batches=500):
    """(variance of the batch mean by `weighted_loss` itself, its relative standard error)."""

    @jax.jit
    def means(key):
        def one(key):
            key_x, key_loss = jax.random.split(key)
            batch = jax.random.choice(key_x, x0, (BATCH,))
            return sd.weighted_loss(score_fn, sde, key_loss, batch, times=times, control=control).mean()

        return jax.lax.map(one, jax.random.split(key, batches))

    m = np.asarray(means(jax.random.key(7)), np.float64)
    z = (m - m.mean()) / m.std()
    return m.var(), np.sqrt(((z**4).mean() - 1) / batches)


def ratios(sde, dim):
    """Variance of plain uniform times over that of each column; and of the last column, measured over predicted."""
    data = mixture(dim)
    score_fn, x0 = data.score_fn(sde), data.sample(jax.random.key(0), 4096)
    log_snr, mean, square = moments(score_fn, sde, x0, None)
    # dt = dlambda / rate: uniform t.
    times = jnp.clip(sde.time(jnp.asarray(log_snr, jnp.float32)), sde.t_train, sde.t_max)
    uniform = 1 / -np.asarray(sde.log_snr_rate(times), np.float64)
    even = np.ones_like(log_snr)

    def shares(times):
        places = np.minimum((np.arange(LEVELS) + 0.5) / LEVELS * 100, 99).astype(int)
        return np.asarray(times.shares(), np.float64)[places]

    plain = variance_of_mean(log_snr, mean, square, uniform, False)
    learned = shares(adapted(score_fn, sde, x0, None))
    out = {
        "uniform strat": variance_of_mean(log_snr, mean, square, uniform, True),
        "log_snr": variance_of_mean(log_snr, mean, square, even, False),
        "log_snr strat": variance_of_mean(log_snr, mean, square, even, True),
        "adaptive": variance_of_mean(log_snr, mean, square, learned, False),
        "adaptive strat": variance_of_mean(log_snr, mean, square, learned, True),
    }
    times = adapted(score_fn, sde, x0, 1.0)
    out["and control"] = variance_of_mean(*moments(score_fn, sde, x0, 1.0), shares(times), True)
    variance, error = measured(score_fn, sde, x0, times, 1.0)
    check = variance / out["and control"], error * variance / out["and control"]
    return {name: plain / v for name, v in out.items()}, check


# 2. and 3. Identities.


def standard_error(values):
    values = np.asarray(values, np.float64)
    return float(values.std() / np.sqrt(len(values)))


def augmentation(sde, data, model, names, n=40_000, nodes=201):
    """Rows (weight, loss, its error, ELBO of noisy data, its error): data of one mixture, a model that is another.

    Right: [w KL] at the highest lambda, less that at the lowest, plus the sum over cells of lambda of p_w = -dw times KL, with
    KL = E[log q(z_t|x) - log p_t(z_t)] by the mixture's log-densities.
    """
    x0 = data.sample(jax.random.key(0), n)
    log_snr = np.linspace(*(float(sde.log_snr(jnp.asarray(t))) for t in (sde.t_max, sde.t_train)), nodes)
    score_fn, dim = model.score_fn(sde), x0.shape[1]
    losses = jax.jit(lambda key: [sd.weighted_loss(score_fn, sde, key, x0, weight=w, times="log_snr", control=1.0) for w in names])

    @jax.jit
    def divergences(times, key):
        def one(at):
            t, key = at
            eps = jax.random.normal(key, x0.shape)
            log_q = -0.5 * (eps**2).sum(axis=1) - dim * (jnp.log(sde.sigma(t)) + 0.5 * jnp.log(2 * jnp.pi))
            kl = log_q - model.log_prob(sde.alpha(t) * x0 + sde.sigma(t) * eps, sde, t)
            return kl.mean(), kl.var() / n

        return jax.lax.map(one, (times, jax.random.split(key, nodes)))

    times = sde.time(jnp.asarray(log_snr, jnp.float32))
    kl, variance = (np.asarray(v, np.float64) for v in divergences(times, jax.random.key(2)))
    rows = []
    for name, loss in zip(names, losses(jax.random.key(1))):
        w = np.asarray(LOG_SNR_WEIGHTS[name](jnp.asarray(log_snr)), np.float64)
        p_w = -np.diff(w)
        coefficient = 0.5 * (np.append(p_w, 0) + np.insert(p_w, 0, 0))
        coefficient[-1] += w[-1]
        coefficient[0] -= w[0]
        right, error = float(coefficient @ kl), float(np.sqrt(coefficient**2 @ variance))
        rows.append((name, float(np.asarray(loss, np.float64).mean()), standard_error(loss), right, error))
    return rows


def schedules(high=9.0, low=-8.0) -> dict[str, sd.SDE]:
    """Five processes whose log-SNR falls from high to low."""

    def cut(sde):
        ends = {name: float(sde.time(jnp.asarray(value))) for name, value in (("t_train", high), ("t_max", low))}
        return dataclasses.replace(sde, t_min=ends["t_train"], **ends)

    return {
        "VP": cut(sd.VP()),
        "sub-VP": cut(sd.SubVP()),
        "cosine": cut(sd.CosineVP()),
        "linear log-SNR": sd.LinearLogSNR(log_snr_max=high, log_snr_min=low),
        "VE": sd.VE(sigma_min=float(np.exp(-high / 2)), sigma_max=float(np.exp(-low / 2))),
    }


def invariance(data, model, names, n=40_000):
    """{process: [(loss, standard error) of each weight]}."""
    x0, out = data.sample(jax.random.key(0), n), {}
    for i, (label, sde) in enumerate(schedules().items()):
        score_fn = model.score_fn(sde)
        losses = jax.jit(
            lambda key, f=score_fn, sde=sde: [sd.weighted_loss(f, sde, key, x0, weight=w, times="log_snr", control=1.0) for w in names]
        )(jax.random.key(10 + i))
        out[label] = [(float(np.asarray(v, np.float64).mean()), standard_error(v)) for v in losses]
    return out


def draw(path, table):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    labels = [f"{name}\n{dim}-d" for dim, name in table]
    for i, column in enumerate(COLUMNS):
        axes.bar(np.arange(len(labels)) + (i - 2.5) * 0.13, [row[column] for row in table.values()], 0.13, label=column)
    axes.axhline(4, color="black", lw=1, ls=":")
    axes.set(yscale="log", ylabel="variance of plain uniform times over this one's")
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.legend(fontsize=8, ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    options = parser.parse_args()
    print(f"{jax.devices()[0].platform}, JAX {jax.__version__}, Python {platform.python_version()}; batches of {BATCH}")

    print("\nvariance of the batch mean of the ELBO loss at the exact score: plain uniform t over ...")
    print(f"{'':<12}" + "".join(f"{c:>16}" for c in COLUMNS) + "   measured / predicted", flush=True)
    table, checks = {}, {}
    for dim in (2, 16, 64):
        for name, sde in SDES.items():
            row, check = ratios(sde, dim)
            table[dim, name], checks[dim, name] = row, check
            print(f"{name:<7}{dim:>3}-d" + "".join(f"{row[c]:16.1f}" for c in COLUMNS) + f"   {check[0]:.2f} +- {check[1]:.2f}", flush=True)

    data, model = mixture(2), mixture(2, seed=1)
    monotone = [name for name in LOG_SNR_WEIGHTS if sd.is_monotone(name) and name != "flow_matching"]
    rows = augmentation(sd.VP(), data, model, monotone)
    print("\ntheorem 1: the loss, and the ELBO of data with noise (VP; data of one mixture, model another, 2-d)")
    for name, left, left_error, right, right_error in rows:
        z = (left - right) / np.hypot(left_error, right_error)
        print(f"{name:<16}{left:10.4f} +- {left_error:.4f}{right:12.4f} +- {right_error:.4f}   z = {z:+.2f}")

    names = ["elbo", "sigmoid", "edm", "min_snr", "indi"]
    same = invariance(data, model, names)
    print("\none loss, five noise schedules from log-SNR 9 to -8")
    print(f"{'':<16}" + "".join(f"{n:>20}" for n in names))
    for label, values in same.items():
        print(f"{label:<16}" + "".join(f"{v:11.4f} +- {e:.4f}" for v, e in values))

    options.out.mkdir(parents=True, exist_ok=True)
    figures = {
        "jax": jax.__version__, "batch": BATCH, "schedules": same, "theorem 1": rows,
        "variance": {f"{name} {dim}": {**row, "measured / predicted": checks[dim, name]} for (dim, name), row in table.items()},
    }  # fmt: skip
    (options.out / "objectives.json").write_text(json.dumps(figures, indent=1) + "\n")
    draw(options.out / "objectives.png", table)
    print(f"\nfigures in {options.out / 'objectives.json'}, a picture in {options.out / 'objectives.png'}")


if __name__ == "__main__":
    main()
