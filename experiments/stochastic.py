"""The solvers of the reverse SDE on Gaussians, whose error needs no samples, beside diffusers'.

    python -m experiments.stochastic [--levels=0.5,1,1.5,2]

Of a Gaussian's score a solver is linear in its start and in the noise of each step, so that the law of its samples is known. The error is
Wasserstein's distance (2) of that to the Gaussian at t_min, from its exact marginal at t_max, over its standard deviation. Prints, for
Gaussians whose variances fall as a power of their rank and each noise level, the error of `sde_adams` and its ratio to the best of the
published solvers, the library's own (SDE-DPM-Solver++ 2M and 3M, SA-Solver) and with the extra `bench` installed diffusers' (SDE-DPM-Solver++
2M, of both types, at noise level 1, and SA-Solver), each on the best of three grids (EDM's, uniform log-SNR, and that of `sde_adams`).
"""

import argparse
import importlib.util
import itertools
import platform
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import sde_diffusion as sd
from experiments.peers import on_times
from sde_diffusion.samplers.linear import Steps, Table
from sde_diffusion.samplers.sde import METHODS

BUDGETS = (5, 6, 8, 10, 15, 20, 30, 50)
PUBLISHED = ("sde_dpmpp_2m", "sde_dpmpp_3m", "sa_solver")
GRIDS = ("edm", "log_snr", "student")


def power_law(size: int, power: float) -> np.ndarray:
    """Variances `(size,)` that fall as this power of their rank, of mean 1/4."""
    variance = np.arange(1.0, size + 1) ** -power
    return 0.25 * variance / variance.mean()


def marginal(sde, t, variance) -> tuple[float, float, np.ndarray]:
    """alpha, sigma, and the variances at time t."""
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    return alpha, sigma, alpha**2 * variance + sigma**2


def impulses(sde, variance, num: int) -> np.ndarray:
    """`(num + 1, D)`: the start alone, and no start for each of `num` noises to stand alone."""
    return np.concatenate([np.sqrt(marginal(sde, sde.t_max, variance)[2])[None], np.zeros((num, len(variance)))])


def deviations(table: Table, sde, variance: np.ndarray) -> np.ndarray:
    """Standard deviations `(D,)` of what an SDE solver makes of a Gaussian of these variances, from its exact marginal at t_max.

    The variance at the end is the sum of the squares of what the start, and the noise of each step, come to on their own.
    """
    table = jax.tree.map(lambda a: np.asarray(a, np.float64), table)
    rows, kept = table.history.shape
    x = impulses(sde, variance, rows)
    past = np.zeros((kept, *x.shape))
    for i in range(rows):
        alpha, sigma, total = marginal(sde, table.time[i], variance)
        said = (table.x0[i] * alpha * variance + table.eps[i] * sigma) / total * x
        past = np.concatenate([said[None], past[:-1]])
        x = table.state[i] * x + np.tensordot(table.history[i], past, 1)
        x[i + 1] += table.noise[i]
    return np.sqrt((x**2).sum(axis=0))


def distance(deviation: np.ndarray, sde, variance: np.ndarray) -> float:
    """Of Gaussians of these deviations and of the exact ones at t_min, over the deviation of the data."""
    exact = np.sqrt(marginal(sde, sde.t_min, variance)[2])
    return float(np.sqrt(np.mean((deviation - exact) ** 2) / variance.mean()))


def times(sde, variance, num_steps: int, grid: str):
    return sd.time_grid(sde, num_steps, grid, sigma_data=float(np.sqrt(variance.mean())), event_size=len(variance))


def gaussian_error(method: str, sde, variance: np.ndarray, num_steps: int, level: float = 1.0, grid: str = "student") -> float:
    """The error of one of the library's solvers."""
    s = float(np.sqrt(variance.mean()))
    steps = Steps.of(sde, times(sde, variance, num_steps, grid), s, len(variance), jnp.float32(level))
    return distance(deviations(METHODS[method](steps), sde, variance), sde, variance)


def diffusers_error(name: str, sde, variance: np.ndarray, num_steps: int, level: float, grid: str) -> float:
    """The error of diffusers' "SDE-DPM-Solver++ 2M", by either formula, or "SA-Solver", whose noise is set to one step's at a time."""
    import torch
    from diffusers.schedulers import scheduling_dpmsolver_multistep as dpm
    from diffusers.schedulers import scheduling_sasolver as sa

    if name == "SA-Solver":
        solver = sa.SASolverScheduler(prediction_type="sample", tau_func=lambda t: level, predictor_order=3, corrector_order=3)
        solver.timestep_list = [None] * len(solver.timestep_list)
    else:
        solver = dpm.DPMSolverMultistepScheduler(
            prediction_type="sample", algorithm_type="sde-dpmsolver++", solver_order=2, solver_type=name.rpartition(", ")[2]
        )
    t = np.asarray(times(sde, variance, num_steps, grid))
    scale = on_times(solver, sde, t)
    state = torch.from_numpy(impulses(sde, variance, num_steps) / scale[0])
    for i in range(num_steps):
        noise = torch.zeros_like(state)
        noise[i + 1] = 1.0
        alpha, _, total = marginal(sde, t[i], variance)
        x0 = state * torch.from_numpy(scale[i] * alpha * variance / total)
        with mock.patch.object(dpm, "randn_tensor", lambda *_, noise=noise, **__: noise):
            with mock.patch.object(sa, "randn_tensor", lambda *_, noise=noise, **__: noise):
                state = solver.step(x0, solver.timesteps[i], state).prev_sample
    return distance(np.sqrt(((scale[-1] * state.numpy()) ** 2).sum(axis=0)), sde, variance)


def best_published(sde, variance, num_steps: int, level: float) -> float:
    errors = [gaussian_error(method, sde, variance, num_steps, level, grid) for method, grid in itertools.product(PUBLISHED, GRIDS)]
    if importlib.util.find_spec("diffusers"):
        names = ("SA-Solver", *(("SDE-DPM-Solver++ 2M, midpoint", "SDE-DPM-Solver++ 2M, heun") if level == 1 else ()))
        errors += [diffusers_error(name, sde, variance, num_steps, level, grid) for name, grid in itertools.product(names, GRIDS)]
    return min(errors)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--levels", default="0.5,1,1.5,2", help="noise levels, by commas")
    levels = [float(level) for level in parser.parse_args().levels.split(",")]
    print(f"{jax.devices()[0].platform}, JAX {jax.__version__}, Python {platform.python_version()}")
    problems = list(itertools.product((16, 64, 768, 3072), (0.0, 1.0, 1.5), (sd.VE(), sd.VP())))
    for level in levels:
        print(f"\nnoise level {level:g}: error of sde_adams (over that of the best published)")
        print(f"{'':<24}" + "".join(f"{n:>15}" for n in BUDGETS))
        ratios = []
        for size, power, sde in problems:
            variance = power_law(size, power) if power else 0.25 * np.linspace(0.5, 1.5, size)
            own = [gaussian_error("sde_adams", sde, variance, n, level) for n in BUDGETS]
            ratios.append([error / best_published(sde, variance, n, level) for error, n in zip(own, BUDGETS)])
            name = f"{size}, {f'power {power:g}' if power else 'even'}, {type(sde).__name__}"
            print(f"{name:<24}" + "".join(f"{error:8.4f} ({ratio:4.2f})" for error, ratio in zip(own, ratios[-1])), flush=True)
        print(f"{'geometric mean':<24}" + "".join(f"{ratio:15.2f}" for ratio in np.exp(np.log(ratios).mean(axis=0))))
        print(f"{'at most 1':<24}" + "".join(f"{share:15.0%}" for share in (np.array(ratios) <= 1).mean(axis=0)))


if __name__ == "__main__":
    main()
