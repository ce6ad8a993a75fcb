"""The default sampler on a trained network, beside the library's other solvers and diffusers': error and sample quality.

    python -m experiments.networks [--workdir=runs/digits] [--num=297] [--states=1] [--reference=1000] [--budgets=5,10,20] [--out=FOLDER]

From the same prior draws, at each number of evaluations: the root-mean-square distance of the end points at t_min to those of a
solution of many steps (adams_4), and the energy distance of the end points to as many held-out examples, beside that of the solution of
many steps. Of every other solver the better grid counts, EDM's or uniform log-SNR, in each of the two figures. With the extra `bench`
installed (torch, diffusers), those are diffusers' solvers; without, the library's own of the same names. The ratio's standard
error is a bootstrap over the states. Prints a table, writes networks.json to --out.
"""

import argparse
import importlib.util
import json
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sde_diffusion as sd
from experiments.peers import diffusers_samples
from sde_diffusion import config, data
from sde_diffusion.evaluate import load_run
from sde_diffusion.report import energy_distance
from sde_diffusion.samplers.ode import usual_method

OWN = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc_2", "unipc_3", "deis_2", "deis_3")


def ends(run, start, **options) -> np.ndarray:
    """The end points at t_min, in batches of 128."""
    parts = [
        sd.sample_ode(run.score_fn, run.sde, jax.random.key(0), part.shape, init=jnp.asarray(part), denoise=False, **options)
        for part in np.array_split(start, -(-len(start) // 128))
    ]
    return np.concatenate(parts).astype(np.float64)


def others(run, start, budgets):
    """(solver, budget, grid, end points) of what the default is compared with."""
    if importlib.util.find_spec("diffusers"):
        yield from diffusers_samples(run.sde, run.score_fn.predict, start, budgets)
        return
    for budget in budgets:
        for name in OWN:
            for grid in ("edm", "log_snr"):
                yield name, budget, grid, ends(run, start, method=name, num_steps=budget, grid=grid)


def errors(x, reference) -> np.ndarray:
    """The mean squared distance of each example."""
    return np.mean((x - reference) ** 2, axis=tuple(range(1, x.ndim)))


def ratio(ours, theirs) -> tuple[float, float]:
    """The ratio of the two root-mean-square errors, and its standard error by a bootstrap over the examples."""
    pick = np.random.default_rng(0).integers(len(ours), size=(500, len(ours)))
    spread = np.sqrt(ours[pick].mean(axis=1) / theirs[pick].mean(axis=1)).std()
    return float(np.sqrt(ours.mean() / theirs.mean())), float(spread)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/digits"), help="of a trained run")
    parser.add_argument("--num", type=int, default=297, help="states, and held-out examples")
    parser.add_argument("--states", type=int, default=1, help="which prior draws: another number, other states; none are those of a fit")
    parser.add_argument("--reference", type=int, default=1000, help="steps of the solution that counts as exact")
    parser.add_argument("--budgets", default="5,10,20", help="numbers of evaluations, by commas")
    parser.add_argument("--out", type=Path, default=Path("runs/networks"))
    options = parser.parse_args(argv)
    budgets = [int(n) for n in options.budgets.split(",")]

    run = load_run(options.workdir)
    # Another key than --mode=fit_solver's, which is that of sample.seed: equal keys may give equal states, whatever the shape.
    key = jax.random.fold_in(jax.random.key(run.config.sample.seed), options.states)
    start = np.asarray(run.sde.prior_sample(key, (options.num, *run.event_shape)))
    test = data.load(**config.data_options(run.config), in_memory=False).test
    if len(test) < options.num:
        parser.error(f"--num={options.num}: there are {len(test)} held-out examples")
    # The first ones may be of another kind, as MNIST's are.
    rows = np.sort(np.random.default_rng(0).permutation(len(test))[: options.num])
    held_out = run.scaler.dequantize(jax.random.key(1), np.asarray(test[rows]))
    print(f"{options.workdir}, step {run.step}: {options.num} states, solution of {options.reference} steps; "
          f"{jax.devices()[0].platform}, JAX {jax.__version__}, Python {platform.python_version()}")  # fmt: skip
    rivals = "diffusers'" if importlib.util.find_spec("diffusers") else "the library's own (pip install -e '.[bench]' brings diffusers')"
    print(f"other solvers: {rivals}; this takes minutes", flush=True)
    usual = usual_method(run.score_fn.prediction)
    exact = ends(run, start, method="adams_4", num_steps=options.reference)
    quality = {"many steps": energy_distance(exact, held_out)}

    table, best = {n: {} for n in budgets}, {}
    for name, budget, grid, x in others(run, start, budgets):
        squared, distance = errors(x, exact), energy_distance(x, held_out)[0]
        row = table[budget].setdefault(name, {"rmse": np.inf, "energy distance": np.inf})
        row["rmse"] = min(row["rmse"], float(np.sqrt(squared.mean())))
        row["energy distance"] = min(row["energy distance"], distance)
        if budget not in best or squared.mean() < best[budget][1].mean():
            best[budget] = f"{name}, {grid}", squared

    print(f"energy distance of the solution of many steps {quality['many steps'][0]:.4f} +- {quality['many steps'][1]:.4f}")
    print(f"{'evaluations':>11}{usual:>11}{'best other':>12}{'ratio':>17}   which{'':<19}{'energy distance':>15}{'best other':>12}")
    closest = {n: min(row["energy distance"] for row in table[n].values()) for n in budgets}

    def show(kind, n, x):
        """A line of the table; returns the ratio."""
        squared, (name, theirs) = errors(x, exact), best[n]
        value, spread = ratio(squared, theirs)
        rmse, distance = float(np.sqrt(squared.mean())), energy_distance(x, held_out)[0]
        table[n][kind] = {"rmse": rmse, "energy distance": distance, "ratio": value, "stderr": spread, "best": name}
        print(
            f"{n:>11}{rmse:11.4f}{np.sqrt(theirs.mean()):12.4f}{value:9.3f} +- {spread:.3f}   {name:<24}{distance:15.4f}{closest[n]:12.4f}",
            flush=True,
        )
        return value

    mean = float(np.exp(np.mean([np.log(show(usual, n, ends(run, start, num_steps=n))) for n in budgets])))
    print(f"geometric mean of the ratios {mean:.3f}")
    fitted = {n: path for n in budgets if (path := options.workdir / f"solver_{n}.json").is_file()}
    if fitted:
        print("fitted solvers")
    for n, path in fitted.items():
        show("fitted", n, ends(run, start, method=sd.LearnedSolver.load(path)))
    figures = {"workdir": str(options.workdir), "step": run.step, "jax": jax.__version__, "num": options.num, "table": table, "geometric mean": mean,
               "many steps": quality["many steps"]}  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "networks.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
