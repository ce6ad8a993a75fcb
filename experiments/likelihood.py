"""How far the ODE likelihood is from the truth, and what it costs beside the usual way.

    python -m experiments.likelihood [--workdir=runs/digits] [--out=FOLDER] [--repeats=N]

Mixtures in 2, 16 and 64 dimensions with the exact score: the error of log p per dimension, for VP, sub-VP and VE, in float32 at the
default tolerance and in float64 at a tight one. The truth is the mixture's own log-density at t_end, plus the mismatch of the
prior and the marginal at t_max, log prior(z) - log p_tmax(z) at the latent z, which belongs to the process and not to the solver,
and is stated. Hutchinson's estimate over 1,000 examples against the exact trace.

With the workdir of a network trained on the digits (python -m sde_diffusion.main --workdir=runs/digits): the error and the wall time of 297
held-out digits over the tolerance, by `log_likelihood` and by the usual way: scipy's RK45 on the host, in t, one vector and one error norm
for the batch, the score and the divergence evaluated one after the other, with a copy to the device and back each time
(as arXiv:2011.13456's code does). Same probes; the error is the root-mean-square, over examples, of the difference in log p to a
solution of order 8 at tolerance 1e-5. Prints tables, writes likelihood.json and likelihood.png to --out.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

import sde_diffusion as sd

SDES = {"VP": sd.VP(), "sub-VP": sd.SubVP(), "VE": sd.VE()}
# The batches of `log_likelihood`.
BATCH = 297
USUAL = 1e-5


def mixture(dim: int) -> sd.GaussianMixture:
    """Three Gaussians, their standard deviations from 0.1 to 1 along random axes."""
    rng = np.random.default_rng(dim)
    bases = np.linalg.qr(rng.standard_normal((3, dim, dim)))[0]
    covariances = np.einsum("kij,j,klj->kil", bases, np.geomspace(0.01, 1.0, dim), bases)
    return sd.GaussianMixture(np.array([1.0, 2.0, 3.0]), rng.standard_normal((3, dim)), covariances)


def accuracy(dim: int, sde: sd.SDE, num: int, **options) -> dict[str, float]:
    """The error of log p per dimension over `num` draws, without the prior's mismatch, and that mismatch."""
    exact = mixture(dim)
    x = exact.sample(jax.random.key(0), num)
    out = sd.log_likelihood(exact.score_fn(sde), sde, None, x, trace="exact", details=True, **options)
    mismatch = np.asarray(sde.prior_log_prob(out.latent) - exact.log_prob(out.latent, sde, sde.t_max), np.float64)
    error = np.abs(np.asarray(out.log_prob, np.float64) - mismatch - np.asarray(exact.log_prob(x, sde, sde.t_min))) / dim
    return {
        "max": error.max(), "mean": error.mean(), "mismatch": mismatch.mean() / dim, "evaluations": float(out.evaluations.mean()),
        "t_end": float(sde.t_min),
    }  # fmt: skip


def hutchinson(num: int = 1000) -> dict[str, float]:
    """The z-score of the mean difference between Hutchinson's estimate and the exact trace, for both probes."""
    exact, sde = mixture(16), sd.VP()
    x = exact.sample(jax.random.key(1), num)
    truth = np.asarray(sd.log_likelihood(exact.score_fn(sde), sde, None, x, trace="exact"), np.float64)
    out = {}
    for probe in ("rademacher", "gaussian"):
        error = np.asarray(sd.log_likelihood(exact.score_fn(sde), sde, jax.random.key(2), x, probe=probe), np.float64) - truth
        out[probe] = float(error.mean() / (error.std(ddof=1) / math.sqrt(num)))
    return out


class Digits:
    """The held-out digits, a network and the probes; likelihoods of them, with evaluations of the network."""

    def __init__(self, workdir):
        from sde_diffusion import config, data
        from sde_diffusion.evaluate import load_run

        self.run = load_run(workdir)
        test = np.asarray(data.load(**config.data_options(self.run.config), in_memory=False).test)
        self.x = self.run.scaler.dequantize(jax.random.key(0), test[: len(test) // BATCH * BATCH])
        self.keys = jax.random.split(jax.random.key(1), len(self.x) // BATCH)
        self.num_dims = math.prod(self.run.event_shape)
        shape = (BATCH, 1, *self.run.event_shape)
        # As `log_likelihood` draws them.
        self.probes = jnp.concatenate([jax.random.rademacher(key, shape, self.x.dtype)[:, 0] for key in self.keys])

        def drift(score_fn, x, t):
            half_squared = 0.5 * self.run.sde.diffusion(t) ** 2
            return self.run.sde.drift(x, t) - half_squared.reshape(-1, 1, 1, 1) * score_fn(x, t)

        def divergence(score_fn, x, t, v):
            gradient = jax.grad(lambda x: jnp.sum(drift(score_fn, x, t) * v))(x)
            return jnp.sum(gradient * v, axis=tuple(range(1, x.ndim)))

        self.drift, self.divergence = jax.jit(drift), jax.jit(divergence)

    def ours(self, tolerance: float, method: str = "adams"):
        parts = [
            sd.log_likelihood(
                self.run.score_fn, self.run.sde, key, self.x[i * BATCH : (i + 1) * BATCH], rtol=tolerance, atol=tolerance,
                method=method, details=True, batch_size=BATCH,
            )
            for i, key in enumerate(self.keys)
        ]  # fmt: skip
        evaluations = np.mean([part.evaluations.max() for part in parts])
        return np.concatenate([part.log_prob for part in parts]).astype(np.float64), float(evaluations)

    def usual(self, tolerance: float):
        sde, shape, batch = self.run.sde, self.x.shape, len(self.x)

        def right_hand_side(t, state):
            x = jnp.asarray(state[:-batch].reshape(shape), jnp.float32)
            times = jnp.full(batch, t, jnp.float32)
            slope = np.asarray(self.drift(self.run.score_fn, x, times)).reshape(-1)
            return np.concatenate([slope, np.asarray(self.divergence(self.run.score_fn, x, times, self.probes))])

        start = np.concatenate([np.asarray(self.x, np.float64).reshape(-1), np.zeros(batch)])
        end = solve_ivp(right_hand_side, (sde.t_min, sde.t_max), start, rtol=tolerance, atol=tolerance, method="RK45")
        latent = jnp.asarray(end.y[:-batch, -1].reshape(shape), jnp.float32)
        return np.asarray(sde.prior_log_prob(latent), np.float64) + end.y[-batch:, -1], end.nfev


def clock(fn, *args):
    """What fn returns, and its seconds."""
    began = time.perf_counter()
    out = fn(*args)
    return out, time.perf_counter() - began


def speed(digits: Digits, repeats: int) -> dict:
    """Error and seconds over the tolerance, and the ratio of seconds at the error of the usual tolerance."""
    reference = digits.ours(1e-5, "dopri8")[0]

    def error(log_prob):
        return float(np.sqrt(np.mean((log_prob - reference) ** 2)))

    # Compiles.
    digits.ours(1.0)
    digits.usual(1.0)
    curves = {"ours": {}, "usual": {}}

    def measure(name, tolerance):
        (log_prob, evaluations), seconds = clock(getattr(digits, name), tolerance)
        row = curves[name][tolerance] = {"error": error(log_prob), "evaluations": evaluations, "seconds": seconds}
        print(f"{name:<8}{tolerance:>10.1e}{row['error']:>12.4f}{evaluations:>14.0f}{seconds:>10.1f} s", flush=True)
        return row["error"]

    for tolerance in (1e-3, 1e-4, USUAL, 1e-6):
        measure("usual", tolerance)
    target = curves["usual"][USUAL]["error"]
    tolerances = (1e-2, 7e-3, 5e-3, 3e-3, 2e-3, 1e-3, 1e-4)
    errors = [measure("ours", tolerance) for tolerance in tolerances]
    # The largest tolerance whose error is at most the usual way's.
    first = next(i for i, each in enumerate(errors) if each <= target)
    loose, matched = tolerances[max(first - 1, 0)], tolerances[first]
    for _ in range(3):
        middle = math.sqrt(loose * matched)
        loose, matched = (loose, middle) if measure("ours", middle) <= target else (middle, matched)
    seconds = {"ours": [], "usual": []}
    for _ in range(repeats):
        seconds["usual"].append(clock(digits.usual, USUAL)[1])
        seconds["ours"].append(clock(digits.ours, matched)[1])
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    ratios = np.array(seconds["ours"]) / np.array(seconds["usual"])
    bits = digits.run.scaler.bits_per_dim(reference, digits.num_dims)
    return {
        "curves": curves, "matched": matched, "seconds": seconds, "ratios": ratios.tolist(),
        "ratio": float(np.median(ratios)), **medians,
        "bits_per_dim": float(bits.mean()), "stderr": float(bits.std() / math.sqrt(len(bits))), "t_end": float(digits.run.sde.t_min),
        "num": len(bits),
    }  # fmt: skip


def draw(path, curves):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    labels = {"ours": "log_likelihood", "usual": "scipy RK45 on the host"}
    for name, rows in curves.items():
        rows = sorted(rows.values(), key=lambda row: row["error"])
        axes.plot([r["seconds"] for r in rows], [r["error"] for r in rows], "o-", label=labels[name])
    axes.set(xscale="log", yscale="log", xlabel="seconds, of 297 digits", ylabel="error of log p (RMS, nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/digits"), help="of a network trained on the digits")
    parser.add_argument("--out", type=Path, default=Path("runs/likelihood"))
    parser.add_argument("--repeats", type=int, default=5, help="of the timed comparison, interleaved; the median of the ratios counts")
    options = parser.parse_args()
    figures = {"jax": jax.__version__, "python": platform.python_version(), "device": jax.devices()[0].platform}

    print(
        f"{'mixture, exact trace':<24}{'max |error|':>14}{'mean |error|':>14}{'mismatch':>12}{'evaluations':>13}{'t_end':>9}   nats per dimension"
    )
    for precision, x64, solver in (
        ("float32", False, {}), ("float64", True, {"method": "dopri8", "rtol": 1e-9, "atol": 1e-9}),
    ):  # fmt: skip
        with jax.enable_x64(x64):
            for dim in (2, 16, 64):
                for name, sde in SDES.items():
                    row = figures[f"{dim}d {name} {precision}"] = accuracy(dim, sde, 256 if not x64 else 64, **solver)
                    print(f"{f'{dim}d {name}, {precision}':<24}{row['max']:14.1e}{row['mean']:14.1e}{row['mismatch']:12.1e}"
                          f"{row['evaluations']:13.0f}{row['t_end']:9.0e}", flush=True)  # fmt: skip
    figures["hutchinson"] = hutchinson()
    print(
        "Hutchinson against the exact trace, 1,000 examples in 16d: "
        + ", ".join(f"{p} z = {z:.2f}" for p, z in figures["hutchinson"].items())
    )

    options.out.mkdir(parents=True, exist_ok=True)
    if (options.workdir / "config.json").exists():
        print(f"\n{'digits':<8}{'tolerance':>10}{'RMS error':>12}{'evaluations':>14}{'time':>12}", flush=True)
        figures["digits"] = row = speed(Digits(options.workdir), options.repeats)
        print(f"at the usual way's error: {row['ours']:.1f} s (tolerance {row['matched']:.2g}) against {row['usual']:.1f} s; "
              f"ratio {row['ratio']:.3f}, the median of {min(row['ratios']):.3f} to {max(row['ratios']):.3f}")  # fmt: skip
        print(
            f"{row['num']} held-out digits: {row['bits_per_dim']:.3f} +- {row['stderr']:.3f} bits/dim, ODE likelihood to t = {row['t_end']:g}, uniform dequantization"
        )
        draw(options.out / "likelihood.png", row["curves"])
    else:
        print(
            f"\nno network in {options.workdir}: python -m sde_diffusion.main --workdir={options.workdir} trains one, for the table of wall times"
        )
    (options.out / "likelihood.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"figures in {options.out / 'likelihood.json'}")


if __name__ == "__main__":
    main()
