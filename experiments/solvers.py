"""Every solver's error over its number of network evaluations, on problems whose solutions are known.

    python -m experiments.solvers [--bench=FOLDER] [--out=FOLDER] [--learned] [--mixtures=N] [--sdes] [--fields=N] [--first=100] [--plane]
    [--tables] [--images] [--large] [--states=256]

The main problem is a 10-component Gaussian mixture in 64 dimensions, fitted to the handwritten digits, under VE noise from 80 to
0.002; the error is the root-mean-square distance of the end points to those of the exact flow. With --bench the mixture, the
256 start states and their exact end points come from `gmm_digits.npz` and `gmm_digits_x.npy` in that folder; without, a
mixture is fitted by scikit-learn, and an 8th-order adaptive solver gives the end points. With the extra `bench` installed
(torch, diffusers), diffusers' solvers run on the same states.

Other problems instead (with --bench: as well), for the default solver, and with --learned fitted ones, beside the best of diffusers': with
--mixtures N random mixtures in 2 to 128 dimensions under VE and VP noise, with --sdes under other SDEs, of seeds from --first on; with
--fields N mixtures whose variances fall by a power of the frequency, as those of photographs do; with --plane small tight clusters in one
and two dimensions; with --tables mixtures fitted to the data sets inside scikit-learn; with --images mixtures fitted to MNIST and CIFAR-10,
which TensorFlow Datasets has to hold; with --large Gaussians in the dimensions of large images. Prints tables, writes solvers.json, and of
the main problem solvers.png, to --out.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sde_diffusion as sd
from experiments.peers import diffusers_samples
from experiments.stochastic import BUDGETS, gaussian_error
from sde_diffusion import data
from sde_diffusion.samplers import ode
from sde_diffusion.samplers import sde as reverse
from sde_diffusion.samplers.grid import GRIDS

SIGMA_MAX, SIGMA_MIN = 80.0, 0.002


@dataclasses.dataclass(frozen=True)
class Problem:
    """A distribution, start states `(B, D)` of its probability-flow ODE, and their exact end points."""

    name: str
    sde: sd.SDE
    mixture: "sd.GaussianMixture | Independent"
    start: np.ndarray
    end: np.ndarray

    @property
    def score_fn(self):
        return self.mixture.score_fn(self.sde)

    def error(self, **options) -> float:
        """The root-mean-square error of `sample_ode` with these options."""
        init = jnp.asarray(self.start, jnp.float32)
        end = sd.sample_ode(self.score_fn, self.sde, jax.random.key(0), init.shape, init=init, denoise=False, **options)
        return rmse(end, self.end)


def solve(name, sde, weights, means, covariances, start) -> Problem:
    """The problem of these parameters; its end points by an adaptive solver of order 8 in float64."""
    with jax.enable_x64(True):
        exact = sd.GaussianMixture(weights, means, covariances)
        solution = sd.sample_adaptive(
            exact.score_fn(sde), sde, jax.random.key(0), start.shape, init=jnp.asarray(start), method="dopri8", rtol=1e-9,
            atol=1e-9, denoise=False,
        )  # fmt: skip
        assert solution.success.all()
        end = np.asarray(solution.samples)
    return Problem(name, sde, sd.GaussianMixture(weights, means, covariances), start, end)


def ve(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX) -> sd.VE:
    """VE whose times 1 and (all but) 0 are sigma_max and sigma_min."""
    return sd.VE(sigma_min=sigma_min, sigma_max=sigma_max, t_min=1e-9, t_train=1e-9)


def digits(bench: Path | None) -> Problem:
    """The mixture of the digits: that of the benchmark's folder, or one fitted here."""
    if bench is not None:
        z, x = np.load(bench / "gmm_digits.npz"), np.load(bench / "gmm_digits_x.npy")
        covariances = np.einsum("kij,kj,klj->kil", z["Q"], z["lam"], z["Q"])
        return Problem(str(bench), ve(), sd.GaussianMixture(z["w"], z["mu"], covariances), x[0], x[1])
    from sklearn.mixture import GaussianMixture

    pixels, rng = _pixels()
    fit = GaussianMixture(10, reg_covar=1e-3, random_state=0).fit(pixels)
    start = SIGMA_MAX * rng.standard_normal((256, 64))
    return solve("scikit-learn's mixture of the digits", ve(), fit.weights_, fit.means_, fit.covariances_, start)


def _pixels():
    """The digits, dequantized, `(1797, 64)`, and the generator that has done it."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(0)
    pixels = load_digits().data
    return (pixels + rng.uniform(size=pixels.shape)) / 8.5 - 1, rng


def tables(num: int = 256):
    """Problems of `num` states: mixtures fitted to the data sets inside scikit-learn, in 4 to 64 dimensions, under all kinds of noise."""
    from sklearn import datasets
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    pixels, _ = _pixels()

    def main(dim):
        return PCA(dim, random_state=0).fit_transform(pixels)

    def scaled(load):
        x = load().data
        return 0.5 * (x - x.mean(axis=0)) / x.std(axis=0)

    kinds = {
        "digits, 10, VP": (pixels, 10, sd.VP()), "digits, 10, sub-VP": (pixels, 10, sd.SubVP()), "digits, 3, VE": (pixels, 3, ve()),
        "digits, 1, VE": (pixels, 1, ve()), "digits in 32d, 5, VE": (main(32), 5, ve()), "digits in 16d, 10, VP": (main(16), 10, sd.VP()),
        "digits in 8d, 10, cosine": (main(8), 10, sd.CosineVP()), "breast cancer, 4, VP": (scaled(datasets.load_breast_cancer), 4, sd.VP()),
        "wine, 3, VE": (scaled(datasets.load_wine), 3, ve()), "iris, 3, VP": (scaled(datasets.load_iris), 3, sd.VP()),
    }  # fmt: skip
    for name, (x, components, sde) in kinds.items():
        fit = GaussianMixture(components, reg_covar=1e-3, random_state=0).fit(x)
        start = np.asarray(sde.prior_sample(jax.random.key(11), (num, x.shape[1])), np.float64)
        yield solve(name, sde, fit.weights_, fit.means_, fit.covariances_, start)


def random_mixture(seed: int, num: int = 256, others: bool = False) -> Problem:
    """A random problem of `num` states: 2 to 128 dimensions, 1 to 20 components, power-law spectra, under VE and VP or other SDEs."""
    rng = np.random.default_rng(seed)
    dim, components = int(rng.choice([2, 4, 8, 16, 32, 64, 128])), int(rng.choice([1, 2, 3, 5, 10, 20]))
    decay, inside, scale = rng.uniform(0, 2), rng.uniform(0.05, 0.8), np.exp(rng.uniform(-1, 0.5))
    spectrum = np.arange(1.0, dim + 1) ** -decay
    spectrum *= inside / spectrum.mean()
    bases = np.linalg.qr(rng.standard_normal((components, dim, dim)))[0]
    sizes = np.exp(0.3 * rng.standard_normal((components, 1)))
    covariances = scale**2 * np.einsum("kij,kj,klj->kil", bases, sizes * spectrum + 1e-4, bases)
    means = scale * np.sqrt(1 - inside) * rng.standard_normal((components, dim))
    weights = rng.dirichlet(np.full(components, 3.0))
    sdes = [sd.SubVP(), sd.CosineVP(), sd.LinearLogSNR(), sd.VP(beta_max=10.0)] if others else [ve(), ve(0.01, 50.0), sd.VP()]
    sde = sdes[int(rng.integers(len(sdes)))]
    start = np.asarray(sde.prior_sample(jax.random.key(seed), (num, dim)), np.float64)
    name = f"{seed}: {components} in {dim}d, {type(sde).__name__}"
    return solve(name, sde, weights, means, covariances, start)


def random_field(seed: int, num: int = 64) -> Problem:
    """A random mixture of `num` images of three colours in the basis of cosines: 1 to 10 components, whose variances fall by a power of the
    frequency over three to five decades, with means that fall faster, VE and VP. The solvers know nothing of a basis."""
    rng = np.random.default_rng(seed)
    size, components = int(rng.choice([8, 16])), int(rng.choice([1, 3, 5, 10]))
    decay, inside, scale, floor = rng.uniform(1.6, 2.8), rng.uniform(0.4, 0.95), np.exp(rng.uniform(-1, 0.5)), 10 ** rng.uniform(-5, -3)
    frequency = np.tile(np.hypot(*np.meshgrid(np.arange(size), np.arange(size))).ravel(), 3) + 0.5
    spectrum = np.repeat([1.0, 0.15, 0.05], size**2) * frequency**-decay
    octave = np.log2(2 * frequency).astype(int)
    variances = spectrum * np.exp(0.5 * rng.standard_normal((components, octave.max() + 1)))[:, octave]
    weights = rng.dirichlet(np.full(components, 3.0))
    means = np.sqrt(spectrum / frequency) * rng.standard_normal((components, len(spectrum)))
    means -= weights @ means
    if components == 1:
        inside = 1.0
    variances *= inside / (weights @ variances).mean()
    means *= np.sqrt((1 - inside) / max((weights @ means**2).mean(), 1e-30))
    means[:, 0] += 0.3 * np.sqrt(len(spectrum)) * rng.standard_normal()  # the mean brightness
    covariances = scale**2 * (variances + floor)[:, :, None] * np.eye(len(spectrum))
    sde = [ve(), ve(0.01, 50.0), sd.VP()][int(rng.integers(3))]
    start = np.asarray(sde.prior_sample(jax.random.key(seed), (num, len(spectrum))), np.float64)
    name = f"{seed}: {components} fields, {size}x{size}x3, {type(sde).__name__}"
    return solve(name, sde, weights, scale * means, covariances, start)


def clusters_in_the_plane(num: int = 256):
    """Problems of `num` states: tight clusters on circles, lattices, a spiral and a line, under VE and VP noise."""

    def circle(k, radius):
        angle = 2 * np.pi * np.arange(k) / k
        return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)

    def lattice(k, apart):
        return apart * (np.stack(np.meshgrid(np.arange(k), np.arange(k)), axis=-1).reshape(-1, 2) - (k - 1) / 2)

    turn = np.linspace(1, 3 * np.pi, 24)
    places = {
        "circle of 6": (circle(6, 1.5), 0.15), "circle of 8": (circle(8, 4.0), 0.3), "circle of 8, tight": (circle(8, 2.0), 0.05),
        "lattice of 9": (lattice(3, 2.0), 0.2), "lattice of 25": (lattice(5, 1.0), 0.1),
        "spiral": (turn[:, None] / 5 * np.stack([np.cos(turn), np.sin(turn)], axis=1), 0.1), "two on a line": (np.array([[-1.0], [1.0]]), 0.1),
    }  # fmt: skip
    for (name, (means, deviation)), sde in itertools.product(places.items(), (ve(), sd.VP())):
        k, dim = means.shape
        start = np.asarray(sde.prior_sample(jax.random.key(0), (num, dim)), np.float64)
        yield solve(f"{name}, {type(sde).__name__}", sde, np.full(k, 1 / k), means, np.tile(deviation**2 * np.eye(dim), (k, 1, 1)), start)


@dataclasses.dataclass(frozen=True)
class Independent:
    """A Gaussian of mean 0, each of whose numbers has a variance of its own, `(D,)`."""

    variance: np.ndarray

    def score_fn(self, sde):
        def x0(x, t):
            alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
            return alpha * self.variance / (alpha**2 * self.variance + sigma**2) * x

        return sd.as_score(x0, sde, prediction="x0", sigma_data=float(np.sqrt(self.variance.mean())))

    def end(self, sde, start):
        """Where the probability-flow ODE takes these states."""
        first, last = (float(sde.alpha(t)) ** 2 * self.variance + float(sde.sigma(t)) ** 2 for t in (sde.t_max, sde.t_min))
        return start * np.sqrt(last / first)


def large(num: int = 4):
    """Problems of `num` states: Gaussians in the dimensions of large images, whose variances fall by a power of their rank."""
    for size, power, sde in itertools.product((64, 128, 256), (1.0, 1.5), (sd.VE(), sd.VP())):
        variance = np.arange(1.0, 3 * size**2 + 1) ** -power
        gaussian = Independent((0.25 / variance.mean() * variance).astype(np.float32))
        start = np.asarray(sde.prior_sample(jax.random.key(0), (num, 3 * size**2)), np.float64)
        yield Problem(f"{size}x{size}x3, {power:g}, {type(sde).__name__}", sde, gaussian, start, gaussian.end(sde, start))


def images(num: int = 64):
    """Problems of `num` states: mixtures fitted to MNIST and CIFAR-10 in 49 to 3,072 dimensions, a Gaussian to each cluster of k-means."""
    from sklearn.cluster import MiniBatchKMeans

    cifar, mnist = (np.asarray(data.load(name).train[:]).astype(np.float32) / 127.5 - 1 for name in ("cifar10", "mnist"))

    def at(size, x):
        by = x.shape[1] // size
        return x.reshape(len(x), size, by, size, by, x.shape[-1]).mean(axis=(2, 4))

    grey = cifar.mean(axis=-1, keepdims=True)
    kinds = {
        "MNIST at 7x7": (at(7, mnist), 10, 1e-4, sd.VP()), "MNIST at 14x14": (at(14, mnist), 10, 1e-4, ve()), "MNIST": (mnist, 10, 1e-4, sd.VP()),
        "CIFAR-10 at 8x8": (at(8, cifar), 10, 1e-5, sd.VP()), "CIFAR-10 in grey at 16x16": (at(16, grey), 20, 1e-5, ve()),
        "CIFAR-10 in grey": (grey, 1, 1e-5, sd.VP()), "CIFAR-10 at 16x16": (at(16, cifar), 6, 1e-5, sd.VE()), "CIFAR-10": (cifar, 5, 1e-5, sd.VP()),
    }  # fmt: skip
    for name, (x, components, floor, sde) in kinds.items():
        x = x.reshape(len(x), -1)
        cluster = MiniBatchKMeans(components, random_state=0, n_init=3).fit_predict(x)
        parts = [x[cluster == k] for k in range(components)]
        covariances = np.stack([np.cov(part.T) + floor * np.eye(x.shape[1]) for part in parts])
        start = np.asarray(sde.prior_sample(jax.random.key(3), (num, x.shape[1])), np.float64)
        means = np.stack([part.mean(axis=0) for part in parts])
        yield solve(f"{name}, {type(sde).__name__}", sde, np.array([len(part) / len(x) for part in parts]), means, covariances, start)


def rmse(x, ends) -> float:
    return float(np.sqrt(np.mean((np.asarray(x, np.float64) - ends) ** 2)))


def ours(problem: Problem) -> dict[str, dict[int, tuple[float, str]]]:
    """The error of each method at each budget, with the best of its grids."""
    table = {}
    for name, solver in ode.METHODS.items():
        grids = (solver.grid,) if name in ("adams", "adams_eps") else tuple(g for g in GRIDS if g != "quadratic")
        table[name] = {}
        for budget in BUDGETS:
            steps = budget // solver.evaluations
            if steps >= solver.min_steps:
                table[name][budget] = min((problem.error(method=name, num_steps=steps, grid=grid), grid) for grid in grids)
    return table


def stochastic(problem: Problem) -> dict[str, dict[int, float]]:
    """`gaussian_error` of each SDE solver on the better of two grids, for the covariance of the problem."""
    variance = np.linalg.eigvalsh(np.asarray(problem.mixture.covariance(), np.float64))
    table = {}
    for name, solver in reverse.METHODS.items():
        table[name] = {}
        for budget in BUDGETS:
            if (steps := budget // solver.evaluations) >= solver.min_steps:
                grids = ("student",) if name == "sde_adams" else ("student", "log_snr")
                table[name][budget] = min(gaussian_error(name, problem.sde, variance, steps, grid=grid) for grid in grids)
    return table


def learned(problem: Problem) -> dict[int, dict]:
    """Fitted solvers: their error on the start states, which the fit does not see, and the seconds of the fit."""
    out = {}
    for budget in (5, 6, 8, 10, 15, 20):
        began = time.perf_counter()
        solver = sd.fit_solver(problem.score_fn, problem.sde, jax.random.key(2), (256, *problem.start.shape[1:]), nfe=budget)
        seconds = time.perf_counter() - began
        out[budget] = {"rmse": problem.error(method=solver), "seconds": seconds, **json.loads(solver.facts)}
    return out


def peers(problem: Problem) -> dict[str, dict[int, tuple[float, str]]]:
    """The error of diffusers' solvers on the same states, each with the better of its grids."""
    table = {}
    for name, budget, grid, end in diffusers_samples(problem.sde, problem.score_fn.predict, problem.start, BUDGETS):
        row, found = table.setdefault(name, {}), (rmse(end, problem.end), grid)
        row[budget] = min(row.get(budget, found), found)
    return table


def best_peer(table, budget: int) -> float:
    return min(row[budget][0] for row in table.values())


def generality(problems, fit: bool) -> dict[str, dict]:
    """Ratios to the best peer on each problem, printed a line each.

    A few states that end in another cluster rule the error where clusters are far: of 256 states it is a matter of luck, of thousands not.
    """
    out = {}
    print("\nerror over that of the best peer")
    print(f"{'default solver':<28}" + "".join(f"{n:>8}" for n in BUDGETS), flush=True)
    for problem in problems:
        jax.clear_caches()  # of the problems before, whose shapes differ: a process has room for so many programs only
        best = peers(problem)
        row = {"default": {n: problem.error(num_steps=n) / best_peer(best, n) for n in BUDGETS}}
        print(f"{problem.name:<28}" + "".join(f"{v:8.2f}" for v in row["default"].values()), flush=True)
        if fit:
            row["learned"] = {n: v["rmse"] / best_peer(best, n) for n, v in learned(problem).items()}
            print(f"{'    fitted':<28}" + "".join(f"{v:8.3f}" for v in row["learned"].values()), flush=True)
        out[problem.name] = row
    for kind in row:
        ratios = np.array([list(r[kind].values()) for r in out.values()])
        print(f"{kind + ', geometric mean':<28}" + "".join(f"{v:8.2f}" for v in np.exp(np.log(ratios).mean(0))))
        print(f"{'  at most 1':<28}" + "".join(f"{v:8.0%}" for v in (ratios <= 1).mean(0)))
    return out


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


def on_the_digits(bench: Path | None, fit: bool, picture: Path) -> dict:
    """All solvers on the main problem: prints tables, draws the picture, and returns the figures."""
    problem = digits(bench)
    print(f"{problem.name}: {len(problem.start)} states")
    table = ours(problem)
    try:
        others = peers(problem)
    except ImportError:
        others = {}
    show("RMSE of the end points, best grid of each method (adams: its own)", table)
    if others:
        best = [table["adams"][n][0] / best_peer(others, n) for n in BUDGETS]
        show("diffusers, better of two grids", others, best)
    else:
        print("\n(diffusers is not installed: pip install -e '.[bench]' runs its solvers here too)")
    variances = stochastic(problem)
    print("\nreverse SDE: Wasserstein's distance to a Gaussian of the same covariance, over its deviation (sde_adams: its own grid)")
    print(f"{'':<20}" + "".join(f"{n:>10}" for n in BUDGETS))
    for name, row in variances.items():
        print(f"{name:<20}" + "".join(f"{row[n]:10.4f}" if n in row else f"{'-':>10}" for n in BUDGETS))
    fits = learned(problem) if fit else {}
    if fits:
        print("\nfitted solvers, on states that the fit did not see")
        for n, row in fits.items():
            print(
                f"{n:>4} evaluations  RMSE {row['rmse']:.5f}  ({row['rmse'] / table['adams'][n][0]:.2f} of adams)  {row['seconds']:.0f} s"
            )
    draw(picture, table, others, fits)
    print(f"\npicture in {picture}")
    return {"problem": problem.name, "ode": table, "diffusers": others, "sde": variances, "learned": fits}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bench", type=Path, help="folder with gmm_digits.npz and gmm_digits_x.npy")
    parser.add_argument("--out", type=Path, default=Path("runs/solvers"))
    parser.add_argument("--learned", action="store_true", help="also fit solvers, a minute or two each")
    others = parser.add_argument_group("problems instead of the digits (with --bench: as well); they need the extra bench")
    others.add_argument("--mixtures", type=int, default=0, help="this many random mixtures")
    others.add_argument(
        "--sdes", action="store_true", help="the random mixtures under sub-VP, cosine, linear log-SNR and a slower VP, not VE and VP"
    )
    others.add_argument("--fields", type=int, default=0, help="this many mixtures with the spectra of photographs")
    others.add_argument("--first", type=int, default=100, help="seed of the first of each of these")
    others.add_argument("--plane", action="store_true", help="clusters in one and two dimensions")
    others.add_argument("--tables", action="store_true", help="mixtures fitted to the data sets inside scikit-learn")
    others.add_argument(
        "--images", action="store_true", help="mixtures fitted to MNIST and CIFAR-10, which are read by TensorFlow Datasets"
    )
    others.add_argument("--large", action="store_true", help="Gaussians in the dimensions of large images, without fits")
    others.add_argument(
        "--states",
        type=int,
        default=256,
        help="of each of them; a few states, near the divide of far clusters, rule the error of a mixture",
    )
    options = parser.parse_args()
    few = min(options.states, 64)
    kinds = {
        "mixtures": (random_mixture(seed, options.states, options.sdes) for seed in range(options.first, options.first + options.mixtures)),
        "fields": (random_field(seed, few) for seed in range(options.first, options.first + options.fields)),
        "plane": clusters_in_the_plane(options.states), "tables": tables(options.states), "images": images(few), "large": large(),
    }  # fmt: skip
    asked = [kind for kind in kinds if getattr(options, kind) > 0]
    if options.sdes and not options.mixtures:
        parser.error("--sdes says under which SDEs the random mixtures are: give --mixtures=N with it")
    if asked and importlib.util.find_spec("diffusers") is None:
        parser.error(
            "--mixtures, --fields, --plane, --tables, --images and --large compare with diffusers, which is not installed: pip install -e '.[bench]'"
        )
    if options.images:
        try:  # before the minutes that the others take
            for name in ("cifar10", "mnist"):
                data.load(name, in_memory=False)
        except (OSError, ValueError, ImportError) as error:
            parser.error(f"--images: {error}")
    print(f"{jax.devices()[0].platform}, JAX {jax.__version__}, Python {platform.python_version()}")
    options.out.mkdir(parents=True, exist_ok=True)
    figures = {"jax": jax.__version__}
    if options.bench or not asked:
        figures |= on_the_digits(options.bench, options.learned, options.out / "solvers.png")
    for kind in asked:
        figures[kind] = generality(kinds[kind], options.learned and kind != "large")
    (options.out / "solvers.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\nfigures in {options.out / 'solvers.json'}")


if __name__ == "__main__":
    main()
