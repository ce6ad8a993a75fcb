"""Every solver's error over its number of network evaluations, on a problem whose solution is known.

    python -m experiments.solvers [--bench=FOLDER] [--out=FOLDER] [--learned]

The problem is a 10-component Gaussian mixture in 64 dimensions, fitted to the handwritten digits, under VE noise from 80 to
0.002; the error is the root-mean-square distance of the end points to those of the exact flow. With --bench the mixture, the
256 start states and their exact end points come from `gmm_digits.npz` and `gmm_digits_x.npy` in that folder; without, a
mixture is fitted by scikit-learn, and an 8th-order adaptive solver gives the end points. With the extra `bench` installed
(torch, diffusers), diffusers' solvers run on the same states. Prints tables, writes solvers.json and solvers.png to --out.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sde_diffusion as sd
from sde_diffusion.samplers import ode
from sde_diffusion.samplers import sde as reverse
from sde_diffusion.samplers.grid import GRIDS

BUDGETS = (5, 6, 8, 10, 15, 20, 30, 50)
SIGMA_MAX, SIGMA_MIN = 80.0, 0.002


def process() -> sd.VE:
    """VE whose times 1 and (all but) 0 are sigma = 80 and 0.002."""
    return sd.VE(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, t_min=1e-9, t_train=1e-9)


def load(bench: Path | None):
    """(mixture, start states (B, 64), end points (B, 64), what it is)."""
    if bench is not None:
        z, x = np.load(bench / "gmm_digits.npz"), np.load(bench / "gmm_digits_x.npy")
        covariances = np.einsum("kij,kj,klj->kil", z["Q"], z["lam"], z["Q"])
        return sd.GaussianMixture(z["w"], z["mu"], covariances), x[0], x[1], str(bench)
    from sklearn.datasets import load_digits
    from sklearn.mixture import GaussianMixture

    rng = np.random.default_rng(0)
    pixels = load_digits().data
    pixels = (pixels + rng.uniform(size=pixels.shape)) / 8.5 - 1
    fit = GaussianMixture(10, reg_covar=1e-3, random_state=0).fit(pixels)
    x = SIGMA_MAX * rng.standard_normal((256, 64))
    with jax.enable_x64(True):
        exact = sd.GaussianMixture(fit.weights_, fit.means_, fit.covariances_)
        ends = sd.sample_adaptive(
            exact.score_fn(process()), process(), jax.random.key(0), x.shape, init=jnp.asarray(x), method="dopri8",
            rtol=1e-9, atol=1e-9, denoise=False,
        ).samples  # fmt: skip
    return sd.GaussianMixture(fit.weights_, fit.means_, fit.covariances_), x, np.asarray(ends), "scikit-learn's mixture of the digits"


def rmse(x, ends) -> float:
    return float(np.sqrt(np.mean((np.asarray(x, np.float64) - ends) ** 2)))


def ours(mixture, x, ends) -> dict[str, dict[int, tuple[float, str]]]:
    """The error of each method at each budget, with the best of its grids."""
    sde = process()
    score_fn, init = mixture.score_fn(sde), jnp.asarray(x, jnp.float32)
    table = {}
    for name, solver in ode.METHODS.items():
        table[name] = {}
        for budget in BUDGETS:
            steps = budget // solver.evaluations
            if steps < solver.min_steps:
                continue
            grids = ("student",) if name == "adams" else tuple(g for g in GRIDS if g != "quadratic")
            errors = {
                grid: rmse(
                    sd.sample_ode(
                        score_fn, sde, jax.random.key(0), init.shape, init=init, method=name, num_steps=steps, grid=grid,
                        denoise=False,
                    ),
                    ends,
                )
                for grid in grids
            }  # fmt: skip
            grid = min(errors, key=errors.get)
            table[name][budget] = (errors[grid], grid)
    return table


def stochastic(mixture) -> dict[str, dict[int, float]]:
    """Of the SDE solvers: how far the covariance of 4,096 samples is off, in the Frobenius norm."""
    sde, table = process(), {}
    exact = np.asarray(mixture.covariance(), np.float64)
    draws = np.cov(np.asarray(mixture.sample(jax.random.key(2), 4096), np.float64).T)
    table["exact draws"] = dict.fromkeys((10, 20, 50, 200), float(np.linalg.norm(draws - exact) / np.linalg.norm(exact)))
    for name, solver in reverse.METHODS.items():
        table[name] = {}
        for budget in (10, 20, 50, 200):
            samples = sd.sample_sde(
                mixture.score_fn(sde), sde, jax.random.key(1), (4096, exact.shape[0]), method=name,
                num_steps=budget // solver.evaluations, grid="student",
            )  # fmt: skip
            gap = np.cov(np.asarray(samples, np.float64).T) - exact
            table[name][budget] = float(np.linalg.norm(gap) / np.linalg.norm(exact))
    return table


def learned(mixture, x, ends) -> dict[int, dict]:
    """Fitted solvers: their error on the start states, which the fit does not see, and the seconds of the fit."""
    sde, out = process(), {}
    init = jnp.asarray(x, jnp.float32)
    for budget in (5, 6, 8, 10, 15, 20):
        began = time.perf_counter()
        solver = sd.fit_solver(mixture.score_fn(sde), sde, jax.random.key(2), init.shape, nfe=budget)
        seconds = time.perf_counter() - began
        end = sd.sample_ode(
            mixture.score_fn(sde), sde, jax.random.key(0), init.shape, init=init, method=solver, denoise=False
        )
        out[budget] = {"rmse": rmse(end, ends), "seconds": seconds, **json.loads(solver.facts)}
    return out


def peers(mixture, x, ends) -> dict[str, dict[int, tuple[float, str]]]:
    """diffusers' solvers on the same states, each with the better of EDM's grid and uniform log sigma."""
    import torch
    from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kinds = {
        "DDIM": (DPMSolverMultistepScheduler, {"solver_order": 1}),
        "DPM-Solver++ 2M": (DPMSolverMultistepScheduler, {"solver_order": 2}),
        "DPM-Solver++ 3M": (DPMSolverMultistepScheduler, {"solver_order": 3}),
        "UniPC-2": (UniPCMultistepScheduler, {"solver_order": 2, "solver_type": "bh2"}),
        "UniPC-3": (UniPCMultistepScheduler, {"solver_order": 3, "solver_type": "bh2"}),
        "DEIS-3": (DEISMultistepScheduler, {"solver_order": 3}),
    }
    grids = {
        "edm": lambda n: np.linspace(SIGMA_MAX ** (1 / 7), SIGMA_MIN ** (1 / 7), n + 1) ** 7,
        "log_snr": lambda n: np.geomspace(SIGMA_MAX, SIGMA_MIN, n + 1),
    }
    sde = process()
    exact = jax.jit(mixture.score_fn(sde).predict)

    def denoise(x_vp, sigma):
        """E[x_0] at the variance-preserving state: diffusers knows sigma / alpha alone, VE's sigma."""
        t = np.log(sigma / SIGMA_MIN) / np.log(SIGMA_MAX / SIGMA_MIN)
        state = jnp.asarray(x_vp.numpy() * np.sqrt(1 + sigma**2), jnp.float32)
        return torch.from_numpy(np.asarray(exact(state, jnp.full(len(state), t, jnp.float32))[0], np.float64))

    table = {}
    for name, (scheduler, options) in kinds.items():
        table[name] = {}
        for budget in BUDGETS:
            errors = {}
            for grid, fill in grids.items():
                sigmas = fill(budget)
                solver = scheduler(prediction_type="sample", **options)
                solver.set_timesteps(budget)
                solver.sigmas = torch.from_numpy(sigmas)
                solver.timesteps = torch.arange(budget)
                solver.num_inference_steps = budget
                solver.model_outputs = [None] * solver.config.solver_order
                state = torch.from_numpy(x / np.sqrt(1 + SIGMA_MAX**2))
                for i in range(budget):
                    state = solver.step(denoise(state, sigmas[i]), solver.timesteps[i], state).prev_sample
                errors[grid] = rmse(state.numpy() * np.sqrt(1 + SIGMA_MIN**2), ends)
            grid = min(errors, key=errors.get)
            table[name][budget] = (errors[grid], grid)
    return table


def show(title, table, best=None):
    print(f"\n{title}\n{'':<20}" + "".join(f"{n:>10}" for n in BUDGETS))
    for name, row in table.items():
        cells = [f"{row[n][0]:10.4f}" if n in row else f"{'-':>10}" for n in BUDGETS]
        print(f"{name:<20}" + "".join(cells))
    if best:
        print(f"{'adams / best peer':<20}" + "".join(f"{ours_:10.3f}" for ours_ in best))


def draw(path, table, others, fits):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.8))
    shown = {"ddim": "C7", "heun": "C5", "dpmpp_2m": "C2", "unipc_3": "C1", "deis_3": "C4", "adams": "C0"}
    for name, colour in shown.items():
        row = table[name]
        axes.plot(list(row), [v[0] for v in row.values()], "o-", color=colour, lw=3 if name == "adams" else 1.2, ms=4, label=name)
    for name, row in others.items():
        axes.plot(list(row), [v[0] for v in row.values()], "x:", lw=1, ms=5, label=f"diffusers {name}")
    if fits:
        axes.plot(list(fits), [v["rmse"] for v in fits.values()], "s--", color="black", lw=2, ms=4, label="fit_solver")
    axes.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="error of the end points (RMSE)", ylim=(None, 1))
    axes.set_xticks(BUDGETS, map(str, BUDGETS), minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bench", type=Path, help="folder with gmm_digits.npz and gmm_digits_x.npy")
    parser.add_argument("--out", type=Path, default=Path("runs/solvers"))
    parser.add_argument("--learned", action="store_true", help="also fit solvers, some minutes each")
    options = parser.parse_args()
    mixture, x, ends, what = load(options.bench)
    print(f"{what}: {len(x)} states; {jax.devices()[0].platform}, JAX {jax.__version__}, Python {platform.python_version()}")

    table = ours(mixture, x, ends)
    try:
        others = peers(mixture, x, ends)
    except ImportError:
        others = {}
    show("RMSE of the end points, best grid of each method (adams: its own)", table)
    if others:
        best = [table["adams"][n][0] / min(row[n][0] for row in others.values()) for n in BUDGETS]
        show("diffusers, better of two grids", others, best)
    else:
        print("\n(diffusers is not installed: pip install -e '.[bench]' runs its solvers here too)")
    variances = stochastic(mixture)
    print("\nreverse SDE: error of the covariance of 4,096 samples over its norm")
    print(f"{'':<20}" + "".join(f"{n:>10}" for n in (10, 20, 50, 200)))
    for name, row in variances.items():
        print(f"{name:<20}" + "".join(f"{v:10.3f}" for v in row.values()))
    fits = learned(mixture, x, ends) if options.learned else {}
    if fits:
        print("\nfitted solvers, on states that the fit did not see")
        for n, row in fits.items():
            print(f"{n:>4} evaluations  RMSE {row['rmse']:.5f}  ({row['rmse'] / table['adams'][n][0]:.2f} of adams)  {row['seconds']:.0f} s")
    options.out.mkdir(parents=True, exist_ok=True)
    figures = {"problem": what, "jax": jax.__version__, "ode": table, "diffusers": others, "sde": variances, "learned": fits}
    (options.out / "solvers.json").write_text(json.dumps(figures, indent=1) + "\n")
    draw(options.out / "solvers.png", table, others, fits)
    print(f"\nfigures in {options.out / 'solvers.json'}, a picture in {options.out / 'solvers.png'}")


if __name__ == "__main__":
    main()
