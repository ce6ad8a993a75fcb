"""Solvers against closed forms: orders, noise levels, adaptive and fitted ones, and the published errors of others."""

import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.flatten_util import ravel_pytree
from oracle import SDES, ZERO_SNR, mixture, moment_z_scores, order

import sde_diffusion as sd
from sde_diffusion.samplers import learned, linear, ode
from sde_diffusion.samplers import sde as reverse
from sde_diffusion.samplers.grid import time_grid
from sde_diffusion.samplers.linear import Steps, Table

MEAN, STD = 0.8, 0.6
METHODS = {**ode.METHODS, **reverse.METHODS}
BENCH = Path(os.environ.get("TFDS_DATA_DIR", "/no/prepared/data")).parent.parent / "bench"


def deterministic(method, *args, **options):
    """The method of whichever function owns it, as an ODE solver."""
    if method in ode.METHODS:
        return sd.sample_ode(*args, method=method, **options)
    return sd.sample_sde(*args, method=method, noise_level=0.0, **options)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_convergence_orders(method, x64):
    """The flow of one Gaussian from marginal to marginal: the slope of the error over 40, 80 and 160 steps, sigma_max = 50."""
    sde, t_end = SDES["ve"], 0.3
    score_fn = sd.GaussianMixture.gaussian(np.array([MEAN]), np.array([[STD**2]])).score_fn(sde)
    init = sde.prior_sample(jax.random.key(7), (8, 1))
    start, end = (np.sqrt(STD**2 + (0.01 * 5000.0**t) ** 2) for t in (1.0, t_end))
    exact = MEAN + end / start * (np.asarray(init) - MEAN)
    steps, errors = np.array([40, 80, 160]), []
    for num in steps:
        # Another standard deviation than the data's, for which the default's linear part would be the whole of the flow.
        x = deterministic(
            method, score_fn, sde, jax.random.key(0), (8, 1), init=init, num_steps=int(num), grid="log_snr", t_end=t_end,
            denoise=False, sigma_data=0.3,
        )  # fmt: skip
        errors.append(np.abs(np.asarray(x) - exact).max())
    # Superconvergence on a linear problem is no fault.
    assert METHODS[method].order - 0.35 < order(steps, errors) < METHODS[method].order + 0.8, errors


@pytest.mark.parametrize("level", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("method", ["ancestral", "churned_heun", "sa_solver", "sde_dpmpp_2m", "sde_dpmpp_3m"])
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_every_noise_level_keeps_the_marginals(name, method, level):
    """Mean and covariance at a noisy time and at the data, within 4 standard errors of 4096 samples."""
    sde, oracle, t_end = SDES[name], mixture(), 0.3
    options = {"method": method, "noise_level": level, "num_steps": 400 if method == "ancestral" else 150, "grid": "student"}
    noisy, x = (
        sd.sample_sde(oracle.score_fn(sde), sde, jax.random.key(1), (4096, 2), **options, **more)
        for more in ({"t_end": t_end, "denoise": False}, {})
    )
    alpha, sigma = float(sde.alpha(t_end)), float(sde.sigma(t_end))
    marginal = alpha**2 * np.asarray(oracle.covariance()) + sigma**2 * np.eye(2)
    assert np.abs(moment_z_scores(noisy, alpha * np.asarray(oracle.mean()), marginal)).max() < 4
    assert np.abs(moment_z_scores(x, oracle.mean(), oracle.covariance())).max() < 4


@pytest.mark.parametrize("num_steps", [10, 15, 20])
@pytest.mark.parametrize("method", ["sa_solver", "sde_dpmpp_2m", "sde_dpmpp_3m"])
def test_a_multistep_method_does_not_amplify_its_noise_at_few_steps(method, num_steps):
    """Of structure from 1 down to 0.01: too smooth is what few steps may leave, several times too wide is not."""
    deviations = np.array([1.0, 0.3, 0.1, 0.03, 0.01])
    oracle = sd.GaussianMixture([1.0], np.zeros((1, 5)), np.diag(deviations**2)[None])
    x = sd.sample_sde(
        oracle.score_fn(SDES["ve"]), SDES["ve"], jax.random.key(1), (1024, 5), method=method, num_steps=num_steps, grid="student"
    )
    # A variance of 1,024 draws has relative standard error sqrt(2 / 1024) = 0.044; high orders up to the end came to 2.3 to 4.3.
    assert (np.asarray(x).var(axis=0) / deviations**2).max() < 1.6 + 4 * 0.044


def test_the_noise_level_is_what_moves_a_sample():
    """At 0 the key does not matter; the larger the level, the less of the start is left."""
    sde, oracle = SDES["vp"], mixture()
    init = jnp.repeat(sde.prior_sample(jax.random.key(0), (256, 2)), 8, axis=0)
    spread = []
    for level in (0.0, 0.3, 1.0, 3.0):
        x = np.asarray(
            sd.sample_sde(
                oracle.score_fn(sde), sde, jax.random.key(1), init.shape, init=init, method="sa_solver", num_steps=60, noise_level=level
            )
        )
        # Variance among the 8 that start at one point, over that of all.
        spread.append(x.reshape(256, 8, 2).var(axis=1, ddof=1).mean() / x.var(axis=0).mean())
    assert spread[0] < 1e-9 and spread[0] < spread[1] < spread[2] - 0.05
    # All forgotten: a ratio of variances of 256 x 7 degrees of freedom is known to sqrt(2 / 1792) = 3%.
    assert abs(spread[3] - 1) < 0.15


@pytest.mark.parametrize("num_steps", [1, 2, 6, 9])
def test_a_linear_score_of_the_datas_own_scale_costs_no_steps(num_steps):
    """On N(0, s^2 I) with sigma_data = s the default has nothing to integrate: exact in a single step, at any scale."""
    for sde, s in ((SDES["ve"], 0.5), (SDES["vp"], 1.7), (ZERO_SNR, 0.3)):
        score_fn = sd.GaussianMixture.gaussian(np.zeros(2), s**2 * np.eye(2)).score_fn(sde)
        init = sde.prior_sample(jax.random.key(0), (5, 2))
        x = sd.sample_ode(score_fn, sde, jax.random.key(0), (5, 2), init=init, denoise=False, num_steps=num_steps)
        start, end = (jnp.sqrt((sde.alpha(t) * s) ** 2 + sde.sigma(t) ** 2) for t in (sde.t_max, sde.t_min))
        np.testing.assert_allclose(x, init * end / start, rtol=2e-4, atol=1e-6)


def trusting(monkeypatch, rule):
    """A rule with all trust in the first evaluation; as a new function, for which nothing is compiled."""
    monkeypatch.setattr(linear, "_EPS_ERROR", 0.0)
    return lambda steps: rule(steps)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 12])
@pytest.mark.parametrize("name", ["ve", "vp", "zero snr"])
def test_the_default_s_rule_is_exact_for_any_mean(name, num_steps, monkeypatch):
    """On N(m, s^2 I) with sigma_data = s, for m up to 30 s, in any number of steps, wherever it starts."""
    sde, mean = {**SDES, "zero snr": ZERO_SNR}[name], np.array([15.0, -0.7])
    score_fn = sd.GaussianMixture.gaussian(mean, 0.25 * np.eye(2)).score_fn(sde)
    for first in (sde.t_max, 0.6 * sde.t_max):
        grid = jnp.linspace(first, sde.t_min, num_steps + 1)
        (a, b), (start, end) = sde.alpha(grid[::num_steps]), (jnp.sqrt((sde.alpha(t) * 0.5) ** 2 + sde.sigma(t) ** 2) for t in grid[::num_steps])
        init = (a * mean)[None] + start * jax.random.normal(jax.random.key(0), (5, 2))
        x = sd.sample_ode(
            score_fn, sde, jax.random.key(0), (5, 2), init=init, grid=grid, method=trusting(monkeypatch, ode.adams), denoise=False, sigma_data=0.5
        )
        # float32; at zero SNR the steps start from alpha = e^-10.
        np.testing.assert_allclose(x, (b * mean)[None] + (init - (a * mean)[None]) * end / start, rtol=2e-4, atol=4e-3 * end)


@pytest.mark.parametrize(("name", "most"), [("vp", 1e-2), ("ve", 2e-3)])
def test_the_default_on_a_mean_far_from_zero(name, most):
    """N(m, s^2 I) with m = 6 s in 8 steps, with the trust that the first evaluation has; errors in units of s."""
    sde, mean, shape = SDES[name], np.array([3.0, -0.9]), (64, 2)
    score_fn = sd.GaussianMixture.gaussian(mean, 0.25 * np.eye(2)).score_fn(sde)
    init = sde.prior_sample(jax.random.key(0), shape)
    (a, start), (b, end) = ((sde.alpha(t), jnp.hypot(0.5 * sde.alpha(t), sde.sigma(t))) for t in (sde.t_max, sde.t_min))
    x = sd.sample_ode(score_fn, sde, jax.random.key(0), shape, init=init, num_steps=8, denoise=False)
    assert np.abs(x - (b * mean)[None] - (init - (a * mean)[None]) * end / start).max() < most * 0.5


def test_few_steps_from_zero_snr_use_the_first_evaluation():
    """Nothing is damped where no network predicts eps: off-centre data in 5 steps from zero SNR, against DDIM, which is exact for points."""
    oracle, shape = mixture(), (256, 2)
    oracle.means += np.float32(6.0)
    init, score_fn = ZERO_SNR.prior_sample(jax.random.key(0), shape), oracle.score_fn(ZERO_SNR)
    draw = functools.partial(sd.sample_ode, score_fn, ZERO_SNR, jax.random.key(0), shape, init=init, denoise=False)
    exact = draw(method="adams_4", num_steps=200)
    adams, ddim = (float(jnp.sqrt(jnp.mean((draw(method=m, num_steps=5) - exact) ** 2))) for m in ("adams", "ddim"))
    assert adams < 0.5 * ddim


@pytest.mark.parametrize("sde", [sd.VP(beta_max=400.0), sd.LinearLogSNR(log_snr_min=-180.0)], ids=["vp", "linear"])
@pytest.mark.parametrize("method", ["adams", "adams_4", "rk4"])
def test_an_snr_below_float32_is_zero(sde, method):
    score_fn = sd.GaussianMixture.gaussian(np.full(2, 1.5), 0.25 * np.eye(2)).score_fn(sde)
    x = sd.sample_ode(score_fn, sde, jax.random.key(0), (1024, 2), method=method, num_steps=8)
    # Their own errors are below 0.03; 2,048 draws know the mean to 0.5 / sqrt(2048) = 0.011.
    assert abs(float(x.mean()) - 1.5) < 0.03 + 4 * 0.011


def test_zero_terminal_snr_does_not_matter_from_a_middle_time():
    grid, init = jnp.array([0.5, 0.3, 0.001]), jnp.ones((3, 2))
    for options in ({}, {"method": "deis_2"}):
        x = sd.sample_ode(lambda x, t: -x, ZERO_SNR, jax.random.key(0), (3, 2), init=init, grid=grid, denoise=False, **options)
        assert np.isfinite(x).all()


def test_a_grid_that_repeats_times_is_refused():
    with pytest.raises(ValueError, match="'tapered' of 1000 steps repeats times of CosineVP in float32: take fewer"):
        sd.time_grid(ZERO_SNR, 1000, sigma_data=500.0)


@pytest.mark.parametrize("num_steps", [3, 8])
def test_samples_move_with_the_data(num_steps, monkeypatch):
    """The samples of a mixture that is moved by m, from the noise moved by alpha_T m, are those of the mixture, moved."""
    sde, oracle, by = SDES["ve"], mixture(), np.array([10.0, -4.0])
    moved = sd.GaussianMixture(
        np.exp(oracle.log_weights), oracle.means + by[None], np.einsum("kij,kj,klj->kil", oracle.eigenvectors, oracle.eigenvalues, oracle.eigenvectors)
    )
    noise, method = sde.prior_sample(jax.random.key(0), (64, 2)), trusting(monkeypatch, ode.from_the_prior)
    x, y = (
        sd.sample_ode(of.score_fn(sde), sde, jax.random.key(0), (64, 2), init=noise + shift, num_steps=num_steps, method=method, sigma_data=0.8)
        for of, shift in ((oracle, 0.0 * by[None]), (moved, by[None]))
    )
    np.testing.assert_allclose(y - by[None], x, atol=1e-3)


@pytest.mark.parametrize("sde", [sd.VE(0.01, 80.0), sd.VE(0.01, 1e3), sd.VE(0.01, 1e5), sd.VP(beta_max=60.0)], ids=["80", "1e3", "1e5", "vp"])
def test_a_network_s_error_is_not_taken_for_a_mean(sde):
    """An error of 0.02 in eps_hat is one of 3 to 10^5 in x0_hat at the prior, but moves the samples of 6 steps as it does those of 100."""
    exact = mixture().score_fn(sde)
    init, moved = sde.prior_sample(jax.random.key(0), (512, 2)), []
    for num_steps in (6, 100):
        x, y = (
            sd.sample_ode(f, sde, jax.random.key(0), (512, 2), init=init, num_steps=num_steps, denoise=False, sigma_data=0.8)
            for f in (exact, lambda x, t: exact(x, t) - 0.02 / sde.sigma(t)[:, None])
        )
        moved.append(float(jnp.sqrt(jnp.mean((x - y) ** 2))))
    # With all trust in it, 3.4 to 1,300 times as far, but for sigma_max = 80.
    assert moved[0] < 2 * moved[1]


@pytest.mark.parametrize(
    ("num_steps", "event_size", "centre", "above", "below", "first", "last"),
    [
        (20, 1, 1 / 3, 1.5, 1.8, 0.55, 0.85),
        (20, 64, 1.585, 1.5, 1.8, 0.55, 0.85),
        (20, 1024, 4.9765, 2.609, 2.0773, 0.55, 0.85),
        (8, 1024, 5.8166, 2.609, 2.0773, 0.55, 1.0),
        (5, 64, 1.9027, 2.0, 1.85, 0.7, 1.0),
        (5, 1024, 5.3817, 2.8318, 1.9886, 0.7, 1.0),
    ],
)
def test_the_tapered_grid_s_first_and_last_steps_are_shorter(num_steps, event_size, centre, above, below, first, last):
    """Its steps are uniform quantiles of Student's distribution, but the first, and the last of many; five go further out."""
    sde = sd.VE(sigma_min=0.001, sigma_max=80.0, t_min=1e-6, t_train=1e-6)
    times = sd.time_grid(sde, num_steps, sigma_data=0.5, event_size=event_size)
    z = -0.5 * np.asarray(sde.log_snr(times), np.float64) - np.log(centre * 0.5)
    steps = -np.diff(scipy.stats.t.cdf(z / np.where(z > 0, above, below), df=2))
    np.testing.assert_allclose(steps / steps[1], [first, *[1.0] * (num_steps - 2), last], rtol=1e-3)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 20, 21])
@pytest.mark.parametrize("name", ["vp", "ve", "zero snr"])
def test_in_few_steps_the_default_asks_nothing_of_the_prior(name, num_steps):
    """In 2 to 20 steps the first evaluation is within the first step, if that starts from noise: for 20, 100 standard deviations of the data are too few."""
    sde, oracle = {**SDES, "zero snr": ZERO_SNR}[name], mixture()
    exact, asked = oracle.score_fn(sde), []

    def score_fn(x, t):
        return exact(x, t)

    def predict(x, t):
        jax.debug.callback(lambda t: asked.append(float(t)), t[0])
        return exact.predict(x, t)

    score_fn.predict = predict
    for times in (sd.time_grid(sde, num_steps, "ahead"), sde.time(jnp.linspace(1.0, 9.0, num_steps + 1))):
        asked.clear()
        path = sd.sample_ode(score_fn, sde, jax.random.key(0), (3, 2), init=jnp.ones((3, 2)), grid=times, denoise=False, return_path=True)[1]
        jax.effects_barrier()
        assert path.shape[0] == num_steps + 1 and np.array_equal(path[0], jnp.ones((3, 2)))
        within = num_steps in (2, 5, 20) and times[0] == sde.t_max and (name, num_steps) != ("ve", 20)
        assert times[1] < asked[0] < times[0] if within else asked[0] == times[0]
        np.testing.assert_allclose(asked[1:], times[1:-1], rtol=1e-6)


def test_one_step_more_is_no_other_rule_where_the_prior_is_of_little_noise():
    """The error of 21 steps, which all start with an evaluation, is not far below that of 20, for sigma_max = 12 standard deviations of the data."""
    sde, variance = sd.VE(sigma_max=6.0), np.array([0.25, 0.25 / 9])
    score_fn = sd.GaussianMixture.gaussian(np.zeros(2), np.diag(variance)).score_fn(sde)
    init = sde.prior_sample(jax.random.key(0), (256, 2))
    exact = np.asarray(init) * np.sqrt((variance + float(sde.sigma(sde.t_min)) ** 2) / (variance + 6.0**2))[None]
    errors = []
    for num in (20, 21):
        x = sd.sample_ode(score_fn, sde, jax.random.key(0), init.shape, init=init, num_steps=num, denoise=False)
        errors.append(np.sqrt(np.mean((np.asarray(x) - exact) ** 2)))
    assert errors[0] < 1.5 * errors[1], errors


def test_the_evaluation_that_is_not_spent_on_the_prior_is_worth_most_of_one():
    """On an anisotropic Gaussian in 32 dimensions, the error of 5 steps is below the middle of those of 5 and 6 with an evaluation at the prior."""
    sde = sd.VE()
    mean, scale = np.tile([0.4, -0.2], 16), np.diag(np.tile([0.2, 0.05], 16))
    score_fn = sd.GaussianMixture.gaussian(mean, scale).score_fn(sde)
    init = sde.prior_sample(jax.random.key(0), (64, 32))
    draw = functools.partial(sd.sample_ode, score_fn, sde, jax.random.key(0), init.shape, init=init, denoise=False, sigma_data=0.35)
    gain = [np.sqrt((v + float(sde.sigma(sde.t_min)) ** 2) / (v + float(sde.sigma(sde.t_max)) ** 2)) for v in np.diag(scale)]
    exact = mean[None] + (np.asarray(init) - mean[None]) * np.array(gain)[None]
    error = lambda **o: float(np.sqrt(np.mean((np.asarray(draw(**o)) - exact) ** 2)))  # noqa: E731
    for num in (3, 5, 8):
        more, most = (error(num_steps=n, method=ode.from_the_prior, grid="tapered") for n in (num, num + 1))
        assert error(num_steps=num) < 0.5 * (more + most)


@pytest.mark.parametrize("name", ["vp", "ve"])
@pytest.mark.parametrize("num_steps", [5, 8, 10, 15])
def test_variances_over_many_decades_are_followed(name, num_steps):
    """Gaussians in 192 dimensions whose variances fall by a power, as those of photographs: closer to the closed form than the usual solvers on their better grid,
    in the geometric mean over three powers."""
    sde, ratios = SDES[name], []
    for power in (0.8, 1.1, 1.4):
        variance = np.arange(1, 193.0) ** -power
        variance = 0.25 * variance / variance.mean() + 1e-5
        score_fn = sd.GaussianMixture.gaussian(np.zeros(192), np.diag(variance)).score_fn(sde)
        init = np.asarray(sde.prior_sample(jax.random.key(0), (16, 192)), np.float64)
        (a, b), (c, d) = ((float(sde.alpha(t)), float(sde.sigma(t))) for t in (sde.t_max, sde.t_min))
        exact = init * np.sqrt((c**2 * variance + d**2) / (a**2 * variance + b**2))[None]

        def error(**options):
            x = sd.sample_ode(score_fn, sde, jax.random.key(0), init.shape, init=jnp.asarray(init, jnp.float32), num_steps=num_steps, denoise=False, **options)
            return np.sqrt(np.mean((np.asarray(x, np.float64) - exact) ** 2))

        ratios.append(error() / min(error(method=m, grid=g) for m in ("dpmpp_2m", "unipc_2", "unipc_3", "deis_3") for g in ("edm", "log_snr")))
    assert np.exp(np.mean(np.log(ratios))) < 1, ratios


def _eps_with_error(exact, inside, outside, sde, x, t):
    return -sde.sigma(t)[:, None] * exact(x, t) + 0.02 * jnp.sin(0.75 * sde.log_snr(t)[:, None] + x @ inside) @ outside


def eps_network(sde, seed=3, dim=16):
    """The exact eps of a mixture, 0.02 off by what depends on x and on the log-SNR and has no place in any data; and the data's standard deviation."""
    random = np.random.default_rng(seed)
    oracle = sd.GaussianMixture(np.full(4, 0.25), 0.5 * random.normal(size=(4, dim)), np.tile(0.05 * np.eye(dim), (4, 1, 1)))
    inside, outside = (jnp.asarray(random.normal(size=(dim, dim)) / np.sqrt(dim), jnp.float32) for _ in range(2))
    network = jax.tree_util.Partial(_eps_with_error, oracle.score_fn(sde), inside, outside, sde)
    return network, float(np.sqrt(np.trace(oracle.covariance()) / dim))


@pytest.mark.parametrize("num_steps", [2, 3, 5, 10, 15, 20])
def test_a_network_of_eps_is_followed_through_the_noise(num_steps):
    """Where eps is 0.02 off, x0_hat is 3 off at the prior of VP. Over four such networks, the usual solvers on their better grid are further from
    the solution of 400 steps of another one; and a score function that says what it predicts has this default by itself."""
    sde = SDES["vp"]
    names = [m for m in ("ddim", "dpmpp_2m", "unipc_2", "deis_3") if METHODS[m].min_steps <= num_steps]
    others, ours = {(m, g): 0.0 for m in names for g in ("edm", "log_snr")}, 0.0
    for seed in range(3, 7):
        network, std = eps_network(sde, seed)
        score_fn = sd.as_score(network, sde, sigma_data=std)
        draw = functools.partial(sd.sample_ode, score_fn, sde, jax.random.key(seed), (128, 16), denoise=False)
        exact = draw(method="rk4", num_steps=400, grid="log_snr")
        off = lambda **o: float(jnp.mean((draw(**o) - exact) ** 2))  # noqa: E731
        ours += off(num_steps=num_steps)
        for m, g in others:
            others[m, g] += off(method=m, grid=g, num_steps=num_steps)
    assert ours < min(others.values()), (ours, others)


@pytest.mark.parametrize("sde", [sd.VP(beta_max=100.0), sd.VE(0.01, 1e8), sd.LinearLogSNR(log_snr_min=-50.0)], ids=["vp", "ve", "linear"])
@pytest.mark.parametrize("num_steps", [2, 3, 5, 18])
def test_a_network_of_eps_from_next_to_no_snr(sde, num_steps):
    """Its first step is e^20 long and more, of which float32 keeps no difference to 1; exact eps of N(1.5, 1/4 I), whose mean and size samples keep."""
    exact = sd.GaussianMixture.gaussian(np.full(2, 1.5), 0.25 * np.eye(2)).score_fn(sde)
    score_fn = sd.as_score(lambda x, t: exact.predict(x, t)[1], sde, prediction="eps")
    x = sd.sample_ode(score_fn, sde, jax.random.key(0), (64, 2), num_steps=num_steps)
    assert np.isfinite(x).all() and (num_steps < 18 or np.abs(x - 1.5).max() < 6 * 0.5)


@pytest.mark.parametrize(("prediction", "method"), [("eps", "adams_eps"), ("score", "adams_eps"), ("v", "adams"), ("x0", "adams"), ("edm", "adams"), (None, "adams")])
def test_the_default_goes_by_what_the_network_predicts(prediction, method):
    sde = SDES["vp"]
    score_fn = mixture().score_fn(sde) if prediction is None else sd.as_score(lambda x, t: 0.3 * x, sde, prediction=prediction)
    draw = functools.partial(sd.sample_ode, score_fn, sde, jax.random.key(0), (4, 2), num_steps=5)
    np.testing.assert_array_equal(draw(), draw(method=method))


def test_a_fit_to_a_network_of_eps_starts_from_its_default_and_goes_on():
    """Its first table is that of `adams_eps`; fitted in a few updates, other states end a third closer."""
    sde = SDES["vp"]
    network, std = eps_network(sde)
    times = time_grid(sde, 6, "wide", sigma_data=std, event_size=16)
    family = learned._Family(sde, 6, std, 16, times, "adams_eps")
    table, _ = family.build(family.start())
    rule = ode.METHODS["adams_eps"](Steps.of(sde, times, std, 16))
    np.testing.assert_allclose(table.time, rule.time, rtol=1e-5)
    np.testing.assert_allclose(table.state, rule.state, rtol=1e-4)
    np.testing.assert_allclose(table.history[:, : rule.history.shape[1]], rule.history, rtol=2e-3, atol=2e-3)
    score_fn = sd.as_score(network, sde, sigma_data=std)
    solver = sd.fit_solver(score_fn, sde, jax.random.key(0), (64, 16), nfe=6, num_states=256, max_updates=12, progress=False)
    draw = functools.partial(sd.sample_ode, score_fn, sde, jax.random.key(1), (128, 16), denoise=False)
    exact = draw(method="rk4", num_steps=400, grid="log_snr")
    fitted, default = (float(jnp.sqrt(jnp.mean((draw(**o) - exact) ** 2))) for o in ({"method": solver}, {"num_steps": 6}))
    assert fitted < 0.67 * default


@pytest.mark.parametrize(("num_steps", "factor"), [(1, 1.0), (2, 1.0), (4, 1.0), (6, 2.0), (8, 3.0), (30, 3.0)])
def test_adams_eps_is_exact_for_its_linear_part(num_steps, factor):
    """On N(0, (factor sigma_data)^2 I); sigma_data = 1/2."""
    sde, variance = SDES["ve"], (0.5 * factor) ** 2
    init = sde.prior_sample(jax.random.key(0), (8, 3))
    score_fn = sd.GaussianMixture.gaussian(np.zeros(3), variance * np.eye(3)).score_fn(sde)
    draw = functools.partial(sd.sample_ode, score_fn, sde, jax.random.key(0), (8, 3), init=init, denoise=False, sigma_data=0.5)
    x = draw(method="adams_eps", num_steps=num_steps)
    gain = np.sqrt((variance + float(sde.sigma(sde.t_min)) ** 2) / (variance + float(sde.sigma(sde.t_max)) ** 2))
    np.testing.assert_allclose(x, gain * np.asarray(init), rtol=2e-4)


# Steps in t are unstable on geometric noise, whoever takes them, and Heun's where sigma falls more than threefold.
@pytest.mark.parametrize("method", sorted(set(ode.METHODS) - {"euler", "heun"}))
def test_few_steps_do_not_blow_up(method):
    """At the fewest steps that they accept, or 4: within 10 standard deviations."""
    sde, num_steps = SDES["ve"], max(ode.METHODS[method].min_steps, 4)
    x = sd.sample_ode(mixture().score_fn(sde), sde, jax.random.key(0), (64, 2), method=method, num_steps=num_steps)
    assert np.isfinite(x).all() and np.abs(x).max() < 10


def test_a_solver_of_ones_own():
    """A function from Steps to a Table is a method: here DDIM, written out."""

    def mine(steps: Steps) -> Table:
        shrink = steps.sigma[1:] / steps.sigma[:-1]
        keep = (steps.alpha[1:] - steps.alpha[:-1] * shrink)[:, None]
        one = jnp.ones(steps.num)
        return Table(steps.time[:-1], one, 0 * one, shrink, keep)

    sde, oracle = SDES["vp"], mixture()
    a, b = (
        sd.sample_ode(oracle.score_fn(sde), sde, jax.random.key(0), (4, 2), method=m, num_steps=9, grid="edm") for m in (mine, "ddim")
    )
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["adams", "rk4", "unipc_3"])
def test_transformations(method):
    """jit, vmap over keys, pmap over 8 devices and grad give what the plain calls give."""
    sde, oracle = SDES["vp"], mixture()

    def sample(key):
        return sd.sample_ode(oracle.score_fn(sde), sde, key, (4, 2), method=method, num_steps=6)

    keys = jax.random.split(jax.random.key(0), 8)
    plain = np.stack([sample(key) for key in keys])
    for transformed in (jax.jit(jax.vmap(sample)), jax.pmap(sample)):
        np.testing.assert_allclose(transformed(keys), plain, rtol=1e-3, atol=1e-4)

    def total(shift):
        init = sde.prior_sample(jax.random.key(1), (4, 2)) + shift
        return sd.sample_ode(oracle.score_fn(sde), sde, keys[0], (4, 2), init=init, method=method, num_steps=6).sum()

    slope = (total(1e-2) - total(-1e-2)) / 2e-2
    np.testing.assert_allclose(jax.grad(total)(0.0), slope, rtol=0.02)


def test_the_memory_of_a_gradient_is_that_of_the_states():
    """Ten times the steps keep ten times the states, 2 KiB each, and not the 2 MiB that the network uses inside."""
    sde, width = SDES["vp"], 8192
    weights = jax.random.normal(jax.random.key(0), (8, width)) / width

    def network(weights, x, t):
        return -x + jnp.tanh(x @ weights) @ weights.T

    def loss(weights, num_steps):
        score_fn = jax.tree_util.Partial(network, weights)
        return sd.sample_ode(score_fn, sde, jax.random.key(0), (64, 8), num_steps=num_steps).sum()

    sizes = [
        jax.jit(jax.grad(loss), static_argnums=1).lower(weights, n).compile().memory_analysis().temp_size_in_bytes for n in (20, 200)
    ]
    history = 6
    assert sizes[1] - sizes[0] < 1.5 * 180 * (1 + history) * 64 * 8 * 4 < 180 * 64 * width * 4 / 10


# Adaptive.


@pytest.mark.parametrize("name", ["vp", "ve", "zero_snr"])
def test_adaptive_solvers_reach_the_exact_flow(name, x64):
    """Every method at a tight tolerance, on the flow of one Gaussian; a looser one costs less."""
    sde = {**SDES, "zero_snr": ZERO_SNR}[name]
    score_fn = sd.GaussianMixture.gaussian(np.full(2, MEAN), STD**2 * np.eye(2)).score_fn(sde)
    # Zero SNR stands for lambda = -20 inside: the flow is followed from there.
    t, s = (float(sde.time(jnp.asarray(-20.0))) if name == "zero_snr" else 1.0 if name != "cosine" else 0.999), 0.1
    init = sde.prior_sample(jax.random.key(0), (6, 2))
    a, b = ((float(sde.alpha(u)), np.sqrt(float(sde.alpha(u)) ** 2 * STD**2 + float(sde.sigma(u)) ** 2)) for u in (t, s))
    exact = b[0] * MEAN + b[1] / a[1] * (np.asarray(init) - a[0] * MEAN)
    for method in ("tsit5", "dopri5", "dopri8", "heun"):
        fine, rough = (
            sd.sample_adaptive(score_fn, sde, jax.random.key(0), (6, 2), init=init, method=method, rtol=tol, atol=tol, t_end=s, denoise=False)
            for tol in (1e-6, 1e-2)
        )
        assert fine.success.all()
        np.testing.assert_allclose(fine.samples, exact, atol=2e-4 if name == "zero_snr" else 2e-5)
        assert (rough.evaluations < fine.evaluations).all()


@pytest.mark.parametrize(
    ("sde", "std", "mean"), [(sd.VE(), 0.5, 1.5), (sd.VP(), 0.5, 1.5), (sd.VE(0.01, 1000.0), 1.0, 3.0), (sd.VE(0.01, 1e5), 100.0, 300.0)],
    ids=["ve", "vp", "wide", "large"],
)  # fmt: skip
def test_adaptive_steps_do_not_leap_over_a_mean(sde, std, mean):
    """Within 5 tolerances of the exact flow, in standard deviations of data whose mean is three of them.

    Bound by the error estimate alone, steps grew at high noise, where the rate is next to nothing, until one passed all that it
    became: half a standard deviation off at a tolerance of 1e-3.
    """
    score_fn = sd.GaussianMixture.gaussian(np.full(2, mean), std**2 * np.eye(2)).score_fn(sde)
    init = sde.prior_sample(jax.random.key(3), (64, 2))
    ends = [[np.float64(f(jnp.asarray(t, float))) for f in (sde.alpha, sde.sigma)] for t in (sde.t_max, sde.t_min)]
    scale = [np.hypot(a * std, s) for a, s in ends]
    exact = ends[1][0] * mean + scale[1] / scale[0] * (np.asarray(init, np.float64) - ends[0][0] * mean)
    for method in ("tsit5", "dopri5", "dopri8"):
        for tolerance in (1e-2, 1e-3, 1e-4):
            out = sd.sample_adaptive(
                score_fn, sde, jax.random.key(0), init.shape, init=init, method=method, rtol=tolerance, atol=tolerance, denoise=False
            )
            assert out.success.all() and np.abs(out.samples - exact).max() < 5 * tolerance * std


@pytest.mark.parametrize(
    "options", [{"method": m} for m in ("tsit5", "dopri5", "dopri8", "heun")] + [{"method": m, "noise_level": 1.0} for m in ("shark", "sra1")]
)
@pytest.mark.parametrize("denoise", [False, True])
def test_adaptive_evaluations_are_counted_right(options, denoise):
    calls = []

    def score_fn(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return -x

    out = sd.sample_adaptive(score_fn, SDES["vp"], jax.random.key(0), (1, 2), denoise=denoise, rtol=0.05, atol=0.05, **options)
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert len(calls) == int(out.evaluations[0])


def test_adaptive_steps_are_each_examples_own():
    sde, oracle = SDES["ve"], mixture()
    init = sde.prior_sample(jax.random.key(0), (8, 2))
    run = lambda init: sd.sample_adaptive(oracle.score_fn(sde), sde, jax.random.key(0), init.shape, init=init)  # noqa: E731
    both, one = run(init), run(init.at[1:].mul(0.1))
    np.testing.assert_array_equal(both.samples[0], one.samples[0])
    assert both.evaluations[0] == one.evaluations[0] and len(set(np.asarray(both.evaluations))) > 1
    few = sd.sample_adaptive(oracle.score_fn(sde), sde, jax.random.key(0), (8, 2), init=init, max_steps=3)
    assert not few.success.any() and np.isnan(few.samples).all()


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_the_adaptive_sde_recovers_the_mixture(name):
    """Within 4 standard errors of 512 samples."""
    sde, oracle = SDES[name], mixture()
    out = sd.sample_adaptive(oracle.score_fn(sde), sde, jax.random.key(3), (512, 2), noise_level=1.0, rtol=1e-2, atol=1e-2)
    assert out.success.all()
    assert np.abs(moment_z_scores(out.samples, oracle.mean(), oracle.covariance())).max() < 4


# Fitted.


@pytest.fixture(scope="module")
def fitted():
    sde, oracle = sd.VE(), mixture()
    solver = sd.fit_solver(
        oracle.score_fn(sde), sde, jax.random.key(0), (64, 2), nfe=5, num_states=1024, max_updates=12, progress=False
    )
    return sde, oracle, solver


def test_a_fitted_solver_beats_the_default_on_new_states(fitted):
    sde, oracle, solver = fitted
    init = sde.prior_sample(jax.random.key(99), (2000, 2))
    sample = lambda **o: np.asarray(sd.sample_ode(oracle.score_fn(sde), sde, jax.random.key(0), init.shape, init=init, denoise=False, **o))  # noqa: E731
    exact = np.asarray(
        sd.sample_adaptive(
            oracle.score_fn(sde), sde, jax.random.key(0), init.shape, init=init, method="dopri8", rtol=1e-6, atol=1e-6, denoise=False
        ).samples
    )
    mine, default = (np.sqrt(((sample(**o) - exact) ** 2).mean()) for o in ({"method": solver}, {"num_steps": 5}))
    assert mine < 0.7 * default
    facts = json.loads(solver.facts)
    # 256 held-out states: their error is that of 2000 others, within the spread of a few far ones.
    assert 0.4 < facts["held_out_rmse"] / mine < 2.5
    assert 0 < facts["held_out_stderr"] < 0.5 * facts["held_out_rmse"]
    assert abs(facts["held_out_rmse_of_the_default"] - default) < 4 * facts["held_out_stderr_of_the_default"]


def test_a_fitted_solver_spends_what_it_says(fitted):
    sde, _, solver = fitted
    calls = []

    def score_fn(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return -x

    for denoise in (False, True):
        calls.clear()
        jax.block_until_ready(sd.sample_ode(score_fn, sde, jax.random.key(0), (3, 2), method=solver, denoise=denoise))
        jax.effects_barrier()
        assert len(calls) == 5 + denoise


def test_saving_and_refusing(fitted, tmp_path):
    sde, oracle, solver = fitted
    again = sd.LearnedSolver.load(solver.save(tmp_path / "solver.json"))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(solver), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (tmp_path / "solver.json").stat().st_size < 3000
    key = jax.random.key(1)
    draw = lambda s: sd.sample_ode(oracle.score_fn(sde), sde, key, (4, 2), method=s)  # noqa: E731
    np.testing.assert_allclose(draw(again), draw(solver), rtol=1e-5, atol=1e-6)
    # As a constant of a program that is compiled around it too.
    np.testing.assert_allclose(jax.jit(lambda: draw(again))(), draw(solver), rtol=1e-5, atol=1e-6)
    assert json.loads(again.facts)["nfe"] == 5 and "VE" in json.loads(again.facts)["sde"]
    for other in (sd.VP(), sd.VE(sigma_max=80.0)):
        with pytest.raises(ValueError, match="fitted to VE.*not to .*fit_solver"):
            sd.sample_ode(oracle.score_fn(other), other, key, (4, 2), method=again)
    with pytest.raises(ValueError, match="pass it to sample_ode"):
        sd.sample_sde(oracle.score_fn(sde), sde, key, (4, 2), method=again)
    assert again.nfe == 5
    np.testing.assert_array_equal(sd.sample_ode(oracle.score_fn(sde), sde, key, (4, 2), method=again, num_steps=5), draw(again))
    for options in ({"num_steps": 6}, {"grid": "edm"}, {"t_end": 0.1}):
        with pytest.raises(ValueError, match="own times"):
            sd.sample_ode(oracle.score_fn(sde), sde, key, (4, 2), method=again, **options)
    for content in ("", "{}", "[1]", '{"facts": {}, "times": [1, 0], "time": [1], "process": []}', "\x00\xff"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="bad.json is not a solver"):
            sd.LearnedSolver.load(tmp_path / "bad.json")
    plain = json.loads((tmp_path / "solver.json").read_text())
    # A table without factors of the first evaluation is one too, and one for data about zero.
    (tmp_path / "older.json").write_text(json.dumps({k: v for k, v in plain.items() if k not in ("first", "scale", "centre")}))
    older = sd.LearnedSolver.load(tmp_path / "older.json")
    assert older.table.first is None and np.isfinite(draw(older)).all()
    for key, wrong in (("state", plain["state"][:-1]), ("centre", [0.0])):
        (tmp_path / "bad.json").write_text(json.dumps({**plain, key: wrong}))
        with pytest.raises(ValueError, match="do not fit together"):
            sd.LearnedSolver.load(tmp_path / "bad.json")


def test_a_fitted_solver_refuses_other_events(fitted):
    sde, _, solver = fitted
    with pytest.raises(ValueError, match=r"events of shape \(2,\), not \(3,\): fit_solver"):
        sd.sample_ode(lambda x, t: -x, sde, jax.random.key(0), (4, 3), method=solver)


def test_a_fit_moves_with_the_data():
    """From zero terminal SNR the prior says nothing of the data: a fit to data moved by m is the fit to the data, and its samples move by m.

    Rounded differently, the two agree within 1e-3; without a centre they are 1e-2 apart.
    """
    by, key, shape = np.array([5.0, -2.0], np.float32), jax.random.key(0), (64, 2)
    ends = []
    for m in (0 * by, by):
        oracle = mixture()
        oracle.means += m[None]
        score_fn = oracle.score_fn(ZERO_SNR)
        solver = sd.fit_solver(score_fn, ZERO_SNR, key, shape, nfe=4, num_states=128, max_updates=3, progress=False)
        ends.append(sd.sample_ode(score_fn, ZERO_SNR, key, shape, method=solver, denoise=False) - m[None])
        end, path = sd.sample_ode(score_fn, ZERO_SNR, key, shape, method=solver, return_path=True, denoise=False)
        np.testing.assert_array_equal(path[-1], end)
        np.testing.assert_allclose(path[0], ZERO_SNR.prior_sample(jax.random.split(key)[0], shape), atol=1e-6)
    assert np.abs(ends[1] - ends[0]).max() < 1e-3


@pytest.mark.parametrize("nfe", [2, 5, 11])
@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(), ZERO_SNR], ids=["vp", "ve", "zero snr"])
@pytest.mark.parametrize("less", [1, 0])
def test_the_start_of_a_fit_is_exact_for_a_gaussian(sde, nfe, less):
    """N(m, s^2 I): x_t - alpha m goes as the standard deviation of the marginal; so too where the first evaluation is away from t_max."""
    mean, s, shape = np.array([3.0, -1.0], np.float32), 0.4, (8, 2)
    oracle = sd.GaussianMixture.gaussian(mean, s**2 * np.eye(2))
    family = learned._Family(sde, nfe, s, 64, time_grid(sde, nfe + less, sigma_data=s))
    table, times = family.build(family.start())
    assert len(table.time) == nfe and float(times[0]) == sde.t_max and (float(table.time[0]) < 0.999 * sde.t_max) == bool(less)
    x = sde.prior_sample(jax.random.key(0), shape)
    alpha, sigma = (np.asarray(f(times), np.float64)[[0, -1]] for f in (sde.alpha, sde.sigma))
    std = np.hypot(alpha * s, sigma)
    exact = alpha[1] * mean + std[1] / std[0] * (np.asarray(x) - alpha[0] * mean)
    solver = sd.LearnedSolver(table, times, learned._process(sde), json.dumps({"sde": repr(sde)}), jnp.asarray(mean))
    for denoise in (False, True):
        out = sd.sample_ode(oracle.score_fn(sde), sde, jax.random.key(0), shape, method=solver, init=x, denoise=denoise)
        # The posterior mean of N(m, s^2 I) from there.
        wanted = mean + alpha[1] * s**2 / std[1] ** 2 * (exact - alpha[1] * mean) if denoise else exact
        np.testing.assert_allclose(out, wanted, atol=3e-5)


@pytest.mark.parametrize("less", [1, 0])
def test_the_equations_of_a_fit_are_those_of_the_whole_sampler(less):
    """Taken row by row, they are those of the derivative through the scan: the gradient to rounding, the matrix in the mean over its
    random probes. Of 20 x 21 / 2 numbers, 5 standard errors of 100 draws are exceeded once in 10,000 tests."""
    sde, oracle, num, limit = sd.VP(), mixture(), 4, 1e-3
    score_fn, centre = oracle.score_fn(sde), jnp.asarray(oracle.mean(), jnp.float32)
    family = learned._Family(sde, num, 0.5, 64, time_grid(sde, num + less))
    theta, unravel = ravel_pytree(family.start())
    theta = theta + 0.05 * jax.random.normal(jax.random.key(0), theta.shape)
    x = sde.prior_sample(jax.random.key(1), (8, 2))
    target = 0.9 * sd.sample_ode(score_fn, sde, jax.random.key(0), x.shape, init=x, num_steps=50, denoise=False)

    @jax.jit
    def build(theta):
        return family.build(unravel(theta))

    def ends(theta):
        table, times = build(theta)
        return linear.run(table, score_fn, sde, jax.random.key(0), x, times[0], times[-1], centre=centre, denoise=False)

    numbers = jax.jit(jax.jacobian(lambda theta: learned._numbers(build(theta)[0], 1)))(theta)
    draws = [learned._normal_equations(*build(theta), numbers, limit, score_fn, sde, centre, x, target, key) for key in jax.random.split(jax.random.key(2), 100)]
    gradients, matrices = (np.asarray(a, np.float64) for a in zip(*draws))
    # The gradient of half the sum of pseudo-Huber losses; mean(r^2) = |r|^2 / 2 here.
    loss = lambda theta: (2 * limit * (jnp.sqrt(1 + ((ends(theta) - target) ** 2).mean(axis=1) / limit) - 1)).sum()  # noqa: E731
    np.testing.assert_allclose(gradients[0], jax.jit(jax.grad(loss))(theta), rtol=1e-3, atol=1e-4 * np.abs(gradients[0]).max())
    weight = (1 + ((ends(theta) - target) ** 2).mean(axis=1) / limit) ** -0.5
    jacobian = np.asarray(jax.jit(jax.jacobian(ends))(theta), np.float64)
    exact = np.einsum("b,bdp,bdq->pq", weight, jacobian, jacobian)
    error = matrices.std(axis=0) / np.sqrt(len(matrices))
    assert np.all(np.abs(matrices.mean(axis=0) - exact) < 5 * error + 1e-4 * np.abs(exact).max())


@pytest.mark.parametrize(("options", "words"), [({"nfe": 1}, "nfe=1.*at least 2"), ({"num_states": 3}, "num_states=3.*4096"), ({"t_end": 2.0}, "t_end=2.0"), ({"fine_steps": 8}, "fine_steps=8.*more than nfe=8")])
def test_a_fit_that_makes_no_sense_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        sd.fit_solver(lambda x, t: -x, sd.VP(), jax.random.key(0), (4, 2), progress=False, **options)


def test_a_fit_to_a_score_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="score_fn gives NaN"):
        sd.fit_solver(lambda x, t: x * jnp.nan, sd.VP(), jax.random.key(0), (16, 2), num_states=32, progress=False)


def test_a_fit_to_a_score_without_finite_derivatives_is_refused():
    @jax.custom_jvp
    def score_fn(x, t):
        return -x

    score_fn.defjvp(lambda primals, tangents: (-primals[0], jnp.nan * tangents[0]))
    with pytest.raises(ValueError, match="derivatives of score_fn are not finite"):
        sd.fit_solver(score_fn, sd.VP(), jax.random.key(0), (16, 2), num_states=32, progress=False)


def test_a_fit_goes_on_with_the_better_of_two_starts(monkeypatch):
    sde, taken = sd.VP(), []

    def descend(family, *_):
        """A start from t_max that is the better one, as errors are told here."""
        ahead = len(family.times) == 6
        for update in range(1, 20):
            taken.append(ahead)
            yield np.full(8, 1e-9 / update * (2 if ahead else 1)), family.build(family.start()), 0

    monkeypatch.setattr(learned, "_descend", descend)
    solver = sd.fit_solver(mixture().score_fn(sde), sde, jax.random.key(0), (16, 2), nfe=4, num_states=32, max_updates=20, progress=False)
    trial = learned._TRIAL
    assert taken == [True, False] * trial + [False] * (20 - 2 * trial)
    assert float(solver.table.time[0]) == sde.t_max
    np.testing.assert_allclose(json.loads(solver.facts)["held_out_median"] ** 2, 1e-9 / (20 - trial), rtol=1e-6)


@pytest.mark.parametrize(("nfe", "sigma_data"), [(5, 0.5), (9, 0.1)])
def test_a_fit_that_finds_nothing_better_is_the_default(nfe, sigma_data, tmp_path):
    """Data of 6 and 30 times the standard deviation that is said, and next to no time: what is returned samples as the default does."""
    sde = sd.VE()
    oracle = sd.GaussianMixture([0.5, 0.5], np.array([[-3.0, 0.0], [3.0, 1.0]], np.float32), np.stack([0.1 * np.eye(2)] * 2))
    options = dict(nfe=nfe, num_states=32, seconds=0.0, sigma_data=sigma_data, progress=False)
    solver = sd.fit_solver(oracle.score_fn(sde), sde, jax.random.key(0), (16, 2), **options)
    facts = json.loads(solver.facts)
    assert facts["held_out_rmse"] == facts["held_out_rmse_of_the_default"]
    solver = sd.LearnedSolver.load(solver.save(tmp_path / "solver.json"))
    draw = functools.partial(sd.sample_ode, oracle.score_fn(sde), sde, jax.random.key(1), (64, 2), sigma_data=sigma_data)
    np.testing.assert_allclose(draw(method=solver), draw(num_steps=nfe), rtol=1e-4, atol=1e-4)


def test_a_fit_where_the_default_is_exact_already_stays_there():
    """N(0, sigma_data^2 I): errors are those of rounding, so the equations must not divide by them."""
    sde, oracle = SDES["vp"], sd.GaussianMixture.gaussian(np.zeros(2), 0.25 * np.eye(2))
    options = dict(nfe=6, num_states=32, max_updates=3, progress=False)
    facts = json.loads(sd.fit_solver(oracle.score_fn(sde), sde, jax.random.key(0), (16, 2), **options).facts)
    assert facts["held_out_rmse"] < 1e-5 and (facts["updates"], facts["ended_by"]) == (3, "max_updates")
    facts = json.loads(sd.fit_solver(oracle.score_fn(sde), sde, jax.random.key(0), (16, 2), **options, seconds=0.0).facts)
    assert (facts["updates"], facts["ended_by"]) == (1, "the time limit")


def test_below_16_steps_order_3_is_the_midpoint_rule():
    """Order 3 amplifies the noise there: sde_dpmpp_3m is sde_dpmpp_2m, from 16 steps on it is another."""
    sde, score_fn = SDES["vp"], mixture().score_fn(SDES["vp"])
    for num, same in ((3, True), (15, True), (16, False)):
        a, b = (sd.sample_sde(score_fn, sde, jax.random.key(0), (8, 2), method=m, num_steps=num) for m in ("sde_dpmpp_3m", "sde_dpmpp_2m"))
        assert np.array_equal(a, b) == same


def test_the_table_of_solvers():
    text = str(sd.solvers())
    for name in METHODS:
        assert any(line.startswith(name + " ") for line in text.splitlines())
    assert "euler_maruyama" not in sd.solvers("ode")
    with pytest.raises(ValueError, match="kind of solver 'odes'; did you mean 'ode'.* one of ode, sde"):
        sd.solvers("odes")


# The measured errors of diffusers' solvers, and the default rule beside them.


@pytest.fixture(scope="module")
def bench():
    if not (BENCH / "gmm_digits.npz").exists():
        pytest.skip("no bench/gmm_digits.npz beside the TFDS data: the exact problem with measured errors of diffusers")
    z, x = np.load(BENCH / "gmm_digits.npz"), np.load(BENCH / "gmm_digits_x.npy")
    oracle = sd.GaussianMixture(z["w"], z["mu"], np.einsum("kij,kj,klj->kil", z["Q"], z["lam"], z["Q"]))
    sde = sd.VE(sigma_min=0.002, sigma_max=80.0, t_min=1e-9, t_train=1e-9)

    def error(**options):
        end = sd.sample_ode(
            oracle.score_fn(sde), sde, jax.random.key(0), x[0].shape, init=jnp.asarray(x[0], jnp.float32), denoise=False, **options
        )
        return np.sqrt(np.mean((np.asarray(end, np.float64) - x[1]) ** 2))

    return error, json.loads((BENCH / "gmm_digits_peers.json").read_text())


@pytest.mark.parametrize(
    ("theirs", "method"),
    [("DDIM", "ddim"), ("DPM-Solver++ 2M", "dpmpp_2m"), ("UniPC-2 bh2", "unipc_2"), ("UniPC-3 bh2", "unipc_3"), ("DEIS-3", "deis_3"), ("LMS-4", "lms")],
)
def test_the_published_solvers_are_the_published_ones(bench, theirs, method):
    """To the digits that float32 leaves: the same error as diffusers' own on 256 states of the exact problem."""
    error, peers = bench
    for budget in ("8", "10"):
        measured, grid = peers[budget][theirs]
        mine = error(method=method, num_steps=int(budget), grid={"karras": "edm", "log_uniform": "log_snr"}[grid])
        np.testing.assert_allclose(mine, measured, rtol=5e-3)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_the_default_is_ahead_on_clusters_in_the_plane(name):
    """Six tight clusters on a circle divide at less noise, for their standard deviation, than images do."""
    sde, angles = SDES[name], np.pi / 3 * np.arange(6)
    means = 1.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    score_fn = sd.GaussianMixture(np.ones(6) / 6, means, np.tile(0.15**2 * np.eye(2), (6, 1, 1))).score_fn(sde)
    init = sde.prior_sample(jax.random.key(0), (512, 2))
    draw = functools.partial(sd.sample_ode, score_fn, sde, jax.random.key(0), init.shape, init=init, denoise=False)
    exact = draw(method="adams_4", num_steps=500)
    error = lambda **options: float(jnp.sqrt(jnp.mean((draw(**options) - exact) ** 2)))  # noqa: E731
    for num in (5, 15):
        others = (error(method=m, num_steps=num, grid=g) for m in ("dpmpp_2m", "unipc_2", "deis_3") for g in ("edm", "log_snr"))
        assert error(num_steps=num) < min(others)


def test_the_default_is_ahead_of_every_peer(bench):
    error, peers = bench
    for budget in (5, 6, 8, 10, 15, 20, 30, 50):
        best = min(measured for measured, _ in peers[str(budget)].values())
        assert error(num_steps=budget) <= (0.5 if budget in (10, 15, 20, 30) else 1.0) * best
