"""Solvers against closed forms: orders, noise levels, the default rule, and the published errors of others."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from oracle import SDES, ZERO_SNR, eps_network, mixture, order

import sde_diffusion as sd
from sde_diffusion.samplers import ode, spaces
from sde_diffusion.samplers import sde as reverse
from sde_diffusion.samplers.grid import within_first
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
    # Another standard deviation than the data's, for which the default's linear part would be the whole of the flow. Half the data's
    # would put a zero of the default's error between these steps. That of sde_adams, whose shares add an error of order 4, is at 300.
    scale, sigma_data = (8, 0.9) if method == "sde_adams" else (1, 1.2)
    steps, errors = scale * np.array([40, 80, 160]), []
    for num in steps:
        x = deterministic(
            method, score_fn, sde, jax.random.key(0), (8, 1), init=init, num_steps=int(num), grid="log_snr", t_end=t_end,
            denoise=False, sigma_data=sigma_data,
        )  # fmt: skip
        errors.append(np.abs(np.asarray(x) - exact).max())
    # Superconvergence on a linear problem is no fault.
    assert METHODS[method].order - 0.35 < order(steps, errors) < METHODS[method].order + 0.8, errors


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
    """A rule with all trust in the first evaluation; as a new function, for which nothing is compiled, nor kept for other tests."""
    monkeypatch.setattr(spaces, "_EPS_ERROR", 0.0)

    def method(steps):
        with jax.disable_jit():
            return rule(steps)

    return method


@pytest.mark.parametrize("num_steps", [1, 2, 5, 12])
@pytest.mark.parametrize("name", ["ve", "vp", "zero snr"])
def test_the_default_s_rule_is_exact_for_any_mean(name, num_steps, monkeypatch):
    """On N(m, s^2 I) with sigma_data = s, for m up to 30 s, in any number of steps, wherever it starts."""
    sde, mean = {**SDES, "zero snr": ZERO_SNR}[name], np.array([15.0, -0.7])
    score_fn = sd.GaussianMixture.gaussian(mean, 0.25 * np.eye(2)).score_fn(sde)
    for first in (sde.t_max, 0.6 * sde.t_max):
        grid = jnp.linspace(first, sde.t_min, num_steps + 1)
        (a, b), (start, end) = (
            sde.alpha(grid[::num_steps]),
            (jnp.sqrt((sde.alpha(t) * 0.5) ** 2 + sde.sigma(t) ** 2) for t in grid[::num_steps]),
        )
        init = (a * mean)[None] + start * jax.random.normal(jax.random.key(0), (5, 2))
        x = sd.sample_ode(
            score_fn,
            sde,
            jax.random.key(0),
            (5, 2),
            init=init,
            grid=grid,
            method=trusting(monkeypatch, ode.adams),
            denoise=False,
            sigma_data=0.5,
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
    """Nothing is damped where no network predicts eps: off-centre data in 5 steps from zero SNR, against DDIM, exact for points."""
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


@pytest.mark.parametrize("num_steps", [4, 8, 30])
@pytest.mark.parametrize("method", ["adams", "adams_4", "rk4"])
def test_sigma_over_alpha_whose_square_is_infinite(method, num_steps):
    """At log-SNRs down to -140 float32 holds sigma / alpha, 10^30, and not its square: the flow of N(0, s^2 I) is followed exactly.

    Within 1e-4 of the standard deviation: t_max leaves that many digits.
    """
    sde = sd.VP(beta_max=280.0)
    score_fn = sd.GaussianMixture.gaussian(np.zeros(2), 0.25 * np.eye(2)).score_fn(sde)
    init = sde.prior_sample(jax.random.key(0), (64, 2))
    x = sd.sample_ode(
        score_fn, sde, jax.random.key(0), (64, 2), init=init, method=method, num_steps=num_steps, sigma_data=0.5, denoise=False
    )
    end = np.hypot(0.5 * float(sde.alpha(sde.t_min)), float(sde.sigma(sde.t_min)))
    np.testing.assert_allclose(x, end * np.asarray(init), atol=1e-4)
    heun = sd.sample_ode(score_fn, sde, jax.random.key(0), (64, 2), init=init, method="heun", num_steps=num_steps)
    assert np.abs(heun).max() < 3


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
        np.exp(oracle.log_weights),
        oracle.means + by[None],
        np.einsum("kij,kj,klj->kil", oracle.eigenvectors, oracle.eigenvalues, oracle.eigenvectors),
    )
    noise, method = sde.prior_sample(jax.random.key(0), (64, 2)), trusting(monkeypatch, ode.from_the_prior)
    x, y = (
        sd.sample_ode(
            of.score_fn(sde), sde, jax.random.key(0), (64, 2), init=noise + shift, num_steps=num_steps, method=method, sigma_data=0.8
        )
        for of, shift in ((oracle, 0.0 * by[None]), (moved, by[None]))
    )
    np.testing.assert_allclose(y - by[None], x, atol=1e-3)


@pytest.mark.parametrize(
    "sde", [sd.VE(0.01, 80.0), sd.VE(0.01, 1e3), sd.VE(0.01, 1e5), sd.VP(beta_max=60.0)], ids=["80", "1e3", "1e5", "vp"]
)
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
        (20, 1024, 4.9765, 2.609, 2.7704, 0.55, 0.85),
        (10, 1024, 5.5218, 2.609, 2.0773, 0.55, 1.0),
        (8, 1024, 5.8166, 2.609, 2.0773, 0.55, 1.0),
        (5, 64, 1.9027, 2.0, 1.85, 0.7, 1.0),
        (5, 1024, 5.3817, 2.4159, 2.4045, 0.7, 1.0),
        (3, 1024, 5.3817, 2.4159, 1.85, 0.7, 1.0),
        (20, 196608, 10.4205, 3.3257, 3.3975, 0.55, 0.85),
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
    """In 2 to 20 steps the first evaluation is within the first step, if that starts from noise: for 20, 100 deviations are too few."""
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
        options = {"init": jnp.ones((3, 2)), "grid": times, "denoise": False, "return_path": True}
        _, path = sd.sample_ode(score_fn, sde, jax.random.key(0), (3, 2), **options)
        jax.effects_barrier()
        assert path.shape[0] == num_steps + 1 and np.array_equal(path[0], jnp.ones((3, 2)))
        within = num_steps in (2, 5, 20) and times[0] == sde.t_max and (name, num_steps) != ("ve", 20)
        assert times[1] < asked[0] < times[0] if within else asked[0] == times[0]
        np.testing.assert_allclose(asked[1:], times[1:-1], rtol=1e-6)


@pytest.mark.parametrize("num_steps", [6, 20])
def test_the_default_of_a_traced_process_is_that_of_a_known_one(num_steps):
    """Where it is not known whether a process starts in noise, one program holds the rule for both: here 6 steps do, 20 do not."""
    oracle, init = mixture(), SDES["ve"].prior_sample(jax.random.key(0), (4, 2))

    def sample(sigma_max):
        sde = dataclasses.replace(SDES["ve"], sigma_max=sigma_max)
        grid = sde.time(jnp.linspace(-2 * jnp.log(sigma_max), 8.0, num_steps + 1))
        return sd.sample_ode(oracle.score_fn(sde), sde, jax.random.key(0), (4, 2), init=init, grid=grid, return_path=True)[1]

    sigma_max = float(SDES["ve"].sigma_max)
    np.testing.assert_allclose(jax.jit(sample)(sigma_max), sample(sigma_max), rtol=1e-4, atol=1e-4)


def test_one_step_more_is_no_other_rule_where_the_prior_is_of_little_noise():
    """The error of 21 steps, which all start with an evaluation, is not far below that of 20, for sigma_max = 12 deviations of the data."""
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
    """On an anisotropic Gaussian in 32 dimensions, 5 steps err less than the middle of 5 and 6 with an evaluation at the prior."""
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
    """Gaussians in 192 dimensions whose variances fall by a power, as those of photographs: closer to the closed form than the usual
    solvers on their better grid, in the geometric mean over three powers."""
    sde, ratios = SDES[name], []
    for power in (0.8, 1.1, 1.4):
        variance = np.arange(1, 193.0) ** -power
        variance = 0.25 * variance / variance.mean() + 1e-5
        score_fn = sd.GaussianMixture.gaussian(np.zeros(192), np.diag(variance)).score_fn(sde)
        init = np.asarray(sde.prior_sample(jax.random.key(0), (16, 192)), np.float64)
        (a, b), (c, d) = ((float(sde.alpha(t)), float(sde.sigma(t))) for t in (sde.t_max, sde.t_min))
        exact = init * np.sqrt((c**2 * variance + d**2) / (a**2 * variance + b**2))[None]

        def error(**options):
            x = sd.sample_ode(
                score_fn,
                sde,
                jax.random.key(0),
                init.shape,
                init=jnp.asarray(init, jnp.float32),
                num_steps=num_steps,
                denoise=False,
                **options,
            )
            return np.sqrt(np.mean((np.asarray(x, np.float64) - exact) ** 2))

        ratios.append(
            error() / min(error(method=m, grid=g) for m in ("dpmpp_2m", "unipc_2", "unipc_3", "deis_3") for g in ("edm", "log_snr"))
        )
    assert np.exp(np.mean(np.log(ratios))) < 1, ratios


@pytest.mark.parametrize("num_steps", [2, 3, 5, 10, 15, 20])
def test_a_network_of_eps_is_followed_through_the_noise(num_steps):
    """Where eps is 0.02 off, x0_hat is 3 off at the prior of VP. Over four such networks, the usual solvers on their better grid are
    further from the solution of 400 steps of another one; and a score function that says what it predicts has this default by itself."""
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
    """Its first step is e^20 long and more, of which float32 keeps no difference to 1; of N(1.5, 1/4 I), whose moments the samples keep."""
    exact = sd.GaussianMixture.gaussian(np.full(2, 1.5), 0.25 * np.eye(2)).score_fn(sde)
    score_fn = sd.as_score(lambda x, t: exact.predict(x, t)[1], sde, prediction="eps")
    x = sd.sample_ode(score_fn, sde, jax.random.key(0), (64, 2), num_steps=num_steps)
    assert np.isfinite(x).all() and (num_steps < 18 or np.abs(x - 1.5).max() < 6 * 0.5)


@pytest.mark.parametrize(
    ("prediction", "method"),
    [("eps", "adams_eps"), ("score", "adams_eps"), ("v", "adams"), ("x0", "adams"), ("edm", "adams"), (None, "adams")],
)
def test_the_default_goes_by_what_the_network_predicts(prediction, method):
    sde = SDES["vp"]
    score_fn = mixture().score_fn(sde) if prediction is None else sd.as_score(lambda x, t: 0.3 * x, sde, prediction=prediction)
    draw = functools.partial(sd.sample_ode, score_fn, sde, jax.random.key(0), (4, 2), num_steps=5)
    np.testing.assert_array_equal(draw(), draw(method=method))


@pytest.mark.parametrize(
    ("num_steps", "dim", "factor"),
    [(1, 3, 1.0), (2, 3, 1.0), (4, 3, 1.0), (6, 3, 2.0), (8, 3, 3.0), (30, 3, 3.0), (5, 256, 1.5), (6, 256, 2.639), (8, 256, 3.9585)],
)
def test_adams_eps_is_exact_for_its_linear_part(num_steps, dim, factor):
    """On N(0, (factor sigma_data)^2 I); sigma_data = 1/2."""
    sde, variance = SDES["ve"], (0.5 * factor) ** 2
    init = sde.prior_sample(jax.random.key(0), (8, dim))
    score_fn = sd.GaussianMixture.gaussian(np.zeros(dim), variance * np.eye(dim)).score_fn(sde)
    draw = functools.partial(sd.sample_ode, score_fn, sde, jax.random.key(0), (8, dim), init=init, denoise=False, sigma_data=0.5)
    x = draw(method="adams_eps", num_steps=num_steps)
    gain = np.sqrt((variance + float(sde.sigma(sde.t_min)) ** 2) / (variance + float(sde.sigma(sde.t_max)) ** 2))
    np.testing.assert_allclose(x, gain * np.asarray(init), rtol=2e-4)


# Steps in t are unstable on geometric noise, whoever takes them.
@pytest.mark.parametrize("method", sorted(set(ode.METHODS) - {"euler"}))
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
    a, b = (sd.sample_ode(oracle.score_fn(sde), sde, jax.random.key(0), (4, 2), method=m, num_steps=9, grid="edm") for m in (mine, "ddim"))
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

    sizes = [jax.jit(jax.grad(loss), static_argnums=1).lower(weights, n).compile().memory_analysis().temp_size_in_bytes for n in (20, 200)]
    history = 6
    assert sizes[1] - sizes[0] < 1.5 * 180 * (1 + history) * 64 * 8 * 4 < 180 * 64 * width * 4 / 10


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
    [
        ("DDIM", "ddim"),
        ("DPM-Solver++ 2M", "dpmpp_2m"),
        ("UniPC-2 bh2", "unipc_2"),
        ("UniPC-3 bh2", "unipc_3"),
        ("DEIS-3", "deis_3"),
        ("LMS-4", "lms"),
    ],
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


@pytest.mark.parametrize("rule", [spaces.adams_bashforth, spaces.adams_moulton])
def test_the_first_steps_integrate_one_power_more_with_a_node_at_infinite_noise(rule, x64):
    """Polynomials that vanish at infinite noise, of one degree more than the evaluations could tell; from far out, none."""
    s, fine, coarse = 0.8, 0.08, 3.0
    near, far = (Steps.of(SDES["ve"], sd.time_grid(SDES["ve"], 15, sigma_data=a, event_size=192), a, 192) for a in (s, 0.1 * s))
    order = spaces.orders(15, 4)
    plain = spaces.residual_space(near, s, fine, coarse)
    space = spaces.with_origin(near, plain, fine, coarse)
    q = np.exp(-np.asarray(near.half_log_snr))
    u = np.log((q + fine) / (q + coarse))  # 0 at infinite noise
    implicit = int(rule is spaces.adams_moulton)
    with_node, without = np.asarray(rule(space, order)), np.asarray(rule(plain, order))
    for i in range(3):
        degree = i + 1 + implicit
        nodes = u[[i + implicit - j for j in range(degree)]]
        exact = (np.asarray(space.weights)[i] * (u[i] + np.asarray(space.points)[i]) ** degree).sum()
        np.testing.assert_allclose(with_node[i, :degree] @ nodes**degree, exact, rtol=1e-9)
        assert abs(without[i, :degree] @ nodes**degree / exact - 1) > 1e-3
    np.testing.assert_array_equal(with_node[3:], without[3:])
    space = spaces.residual_space(far, s, fine, coarse)
    np.testing.assert_array_equal(rule(spaces.with_origin(far, space, fine, coarse), order), rule(space, order))


def test_a_step_that_is_redone_integrates_one_power_more(x64):
    """Polynomials in the variable of the space, of the degree that the evaluations up to the end of the next step can tell."""
    sde = SDES["vp"]
    steps = Steps.of(sde, sd.time_grid(sde, 15), 0.5)
    space, order = spaces.residual_space(steps, 0.5, 0.05, 2.0), spaces.orders(15, 4)
    u = np.concatenate([[0.0], np.cumsum(space.length)])
    once, again = (np.asarray(spaces.adams_moulton(space, order, later)) for later in (False, True))
    for i in range(13):
        for factors, newest in ((once, i + 1), (again, i + 2)):
            nodes = u[newest::-1] - u[i]
            degree = order[i] + newest - i - 1
            for power in range(degree + 2):
                exact = (np.asarray(space.weights)[i] * np.asarray(space.points)[i] ** power).sum()
                found = factors[i, : degree + 1] @ nodes[: degree + 1] ** power
                assert (abs(found / exact - 1) < 1e-7) == (power <= degree)


@pytest.mark.parametrize(
    ("within", "num_steps", "size"), [(False, 20, 2), (True, 20, 2), (True, 30, 2), (True, 20, 128), (True, 20, 129), (False, 21, 65)]
)
def test_steps_redone_by_later_evaluations_halve_the_error_of_smooth_scores(within, num_steps, size, monkeypatch):
    """N(m, C) with variances above and below sigma_data, where the flow is known; the rule with and without; in more dimensions there is one."""
    sde, variance, mean = SDES["ve"], np.geomspace(0.6, 0.02, size), np.linspace(0.3, -0.5, size)
    gaussian = sd.GaussianMixture.gaussian(mean, np.diag(variance))
    start = np.asarray(sde.prior_sample(jax.random.key(0), (64, size)))
    first, last = (float(sde.sigma(t)) ** 2 + variance for t in (sde.t_max, sde.t_min))
    exact = mean + np.sqrt(last / first) * (start - mean)

    def error():
        def rule(steps):
            if not within:
                return ode.from_the_prior(steps)
            inner = within_first(sde, steps.time, steps.sigma_data, steps.event_size)
            return ode.from_within(Steps.of(sde, jnp.insert(steps.time, 1, inner), steps.sigma_data, steps.event_size))

        options = {"method": rule, "num_steps": num_steps, "grid": "tapered"}
        end = sd.sample_ode(gaussian.score_fn(sde), sde, jax.random.key(0), start.shape, init=jnp.asarray(start), denoise=False, **options)
        return np.sqrt(np.mean((np.asarray(end) - exact) ** 2))

    redone = error()
    monkeypatch.setattr(ode, "_redone_again", lambda evaluations, size: False)
    assert redone == error() if (num_steps, size) in ((20, 129), (21, 65)) else redone < 0.5 * error()


def test_a_grid_whose_first_step_is_many_times_the_others_does_not_diverge():
    """In log-SNR: the first two nodes after it are so close that a step redone by both would amplify what each is off."""
    sde, lengths = SDES["vp"], np.ones(25)
    lengths[0] = 64
    low, high = (float(sde.log_snr(t)) for t in (sde.t_max, sde.t_min))
    inner = sde.time(jnp.asarray(low + (high - low) * np.cumsum(lengths)[:-1] / lengths.sum(), float))
    grid = jnp.concatenate([jnp.asarray([sde.t_max]), inner, jnp.asarray([sde.t_min])])
    covariances = [[[0.05, 0.0], [0.0, 0.01]], [[0.04, 0.01], [0.01, 0.02]], [[0.02, 0.0], [0.0, 0.03]]]
    mixture = sd.GaussianMixture([0.5, 0.3, 0.2], [[0.6, -0.3], [-0.5, 0.4], [0.1, 0.9]], covariances)
    score_fn, init = mixture.score_fn(sde), sde.prior_sample(jax.random.key(1), (32, 2))

    def sample(**options):
        return sd.sample_ode(score_fn, sde, jax.random.key(0), init.shape, init=init, denoise=False, **options)

    end = sample(method="adams_4", num_steps=400)
    adams, dpmpp_2m = (float(jnp.sqrt(jnp.mean((sample(method=m, grid=grid) - end) ** 2))) for m in ("adams", "dpmpp_2m"))
    assert adams < dpmpp_2m


@pytest.mark.parametrize("method", ["adams", "adams_4", "adams_eps", "unipc_2", "unipc_3", "sa_solver", "sde_adams"])
@pytest.mark.parametrize("ratio", [0.2, 0.01])
def test_further_times_just_before_those_of_a_grid_do_no_harm(method, ratio):
    """`ratio` of a step before the end of every third: a step that counts one evaluation less is of one order less, and no more."""
    sde, rng = SDES["ve"], np.random.default_rng(0)
    mixture = sd.GaussianMixture(
        [0.5, 0.3, 0.2], 0.7 * rng.standard_normal((3, 16)), np.stack([np.diag(0.3 * rng.uniform(0.1, 1, 16))] * 3)
    )
    score_fn, init = mixture.score_fn(sde), sde.prior_sample(jax.random.key(1), (64, 16))
    grid = sd.time_grid(sde, 18, "tapered", event_size=16)
    log_snr = sde.log_snr(grid)
    more = sde.time(log_snr[3::3] - ratio * jnp.diff(log_snr)[2::3])
    sampler = functools.partial(sd.sample_sde, noise_level=0.0) if method in reverse.METHODS else sd.sample_ode
    exact = sd.sample_ode(score_fn, sde, jax.random.key(0), init.shape, init=init, denoise=False, method="adams_4", num_steps=400)
    once, again = (
        sampler(score_fn, sde, jax.random.key(0), init.shape, init=init, denoise=False, method=method, grid=times)
        for times in (grid, jnp.sort(jnp.concatenate([grid, more]), descending=True))
    )
    before, after = (float(jnp.sqrt(jnp.mean((x - exact) ** 2))) for x in (once, again))
    assert after < 3 * before


@pytest.mark.parametrize(
    ("process", "size", "power", "num_steps"),
    [*(("ve", 3 * 128**2, 1.0, n) for n in (5, 6, 8, 10, 15, 20)), ("vp", 3 * 64**2, 1.5, 8), ("vp", 3 * 64**2, 1.5, 10), ("vp", 3 * 128**2, 1.5, 15),
     ("ve", 3072, 1.5, 5), ("ve", 3072, 1.5, 6), ("ve", 3072, 1.0, 8), ("vp", 3072, 1.0, 8)],
)  # fmt: skip
def test_the_default_is_ahead_of_the_published_ones_in_many_dimensions(process, size, power, num_steps):
    """As of photographs, the variances fall as a power of their rank: the widest direction is 19 to 137 times the mean."""
    sde, s = {"ve": sd.VE(sigma_max=50.0), "vp": sd.VP()}[process], 0.5
    variance = np.arange(1, size + 1) ** -power
    variance = jnp.asarray(variance * (s**2 / variance.mean()), jnp.float32)[None]

    def score_fn(x, t):
        alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        return -x / (alpha**2 * variance + sigma**2)

    def deviation(t):
        return jnp.sqrt(sde.alpha(t) ** 2 * variance + sde.sigma(t) ** 2)

    init = sde.prior_sample(jax.random.key(0), (2, size))
    end = init * deviation(sde.t_min) / deviation(sde.t_max)

    def error(**options):
        x = sd.sample_ode(
            score_fn, sde, jax.random.key(0), init.shape, init=init, denoise=False, num_steps=num_steps, sigma_data=s, **options
        )
        return float(jnp.sqrt(jnp.mean((x - end) ** 2)))

    methods = ["dpmpp_2m", "dpmpp_3m", "unipc_2", "unipc_3", "deis_3"]
    assert error() < min(error(method=m, grid=grid) for m in methods for grid in ("edm", "log_snr"))


@pytest.mark.parametrize(
    ("sigma_max", "num_steps", "event_size", "ahead"),
    # 2.6 * 0.5 * sqrt(1480) = 50.01 is the least noise of 5 to 8 steps, 14 * 0.5 * sqrt(1000 / 64) = 27.67 in up to 1,000 dimensions, in
    # 5 steps of 1,000 and 192 dimensions 14 * 0.5 * (D / 64)^0.4 = 21.02 and 10.86, in 10 of 1,000 27.67 * (10 / 8)^2.5 = 48.34.
    [(150, 6, 3072, True), (150, 6, 3073, False), (150, 7, 1536, True), (150, 7, 1537, False), (150, 8, 1536, True), (150, 8, 1537, False), (150, 5, 3073, True),
     (150, 9, 3073, True), (50, 5, 1470, True), (50, 5, 1490, False), (50, 6, 1470, True), (50, 6, 1490, False), (28, 6, 1000, True), (28, 6, 1001, False),
     (21.2, 5, 1000, True), (20.8, 5, 1000, False), (28, 5, 1001, False), (27, 6, 1000, False), (27, 8, 1000, False),
     (11, 5, 192, True), (10.7, 5, 192, False), (50, 8, 1470, True), (50, 8, 1490, False), (49, 10, 1000, True), (47.5, 10, 1000, False),
     (7.1, 5, 64, True), (6.9, 5, 64, False), (7.1, 5, 3, True)],
)  # fmt: skip
def test_where_few_steps_of_many_dimensions_begin_at_the_prior(sigma_max, num_steps, event_size, ahead):
    sde, asked = sd.VE(sigma_max=float(sigma_max)), []

    def score_fn(x, t):
        jax.debug.callback(lambda t: asked.append(float(t[0])), t)
        return -x / (0.25 + sde.sigma(t)[:, None] ** 2)

    sd.sample_ode(score_fn, sde, jax.random.key(0), (1, event_size), num_steps=num_steps, denoise=False).block_until_ready()
    jax.effects_barrier()
    assert len(asked) == num_steps
    assert (max(asked) < sde.t_max) == ahead


def test_the_default_grid_has_a_gradient_in_a_thousand_steps_and_is_there_for_three_thousand():
    def mean(s):
        return sd.time_grid(sd.VP(), 1000, "ahead", sigma_data=s).mean()

    np.testing.assert_allclose(jax.grad(mean)(0.5), (mean(0.55) - mean(0.45)) / 0.1, rtol=0.02)
    assert len(sd.time_grid(sd.VP(), 3000, "ahead")) == 3001


@pytest.mark.parametrize(
    ("num_steps", "event_size", "same"), [(5, 1000, True), (5, 1001, False), (8, 3072, False), (4, 3072, True), (9, 3072, True)]
)
def test_the_near_grid_is_around_the_standard_deviation_where_the_scales_are_out_of_reach(num_steps, event_size, same):
    sde = sd.VE(sigma_min=0.001, sigma_max=80.0, t_min=1e-6, t_train=1e-6)
    near, tapered = (sd.time_grid(sde, num_steps, kind, sigma_data=0.5, event_size=event_size) for kind in ("near", "tapered"))
    assert bool((near == tapered).all()) == same
    if not same:
        z = -0.5 * np.asarray(sde.log_snr(near), np.float64) - np.log(2.8 * 0.5) - (num_steps - 5) / 8
        steps = -np.diff(scipy.stats.t.cdf(z / np.where(z > 0, 3 + 0.15 * (num_steps - 5), 1.55), df=2))
        np.testing.assert_allclose(steps / steps[1], [0.55, *[1.0] * (num_steps - 1)], rtol=1e-3)


@pytest.mark.parametrize("num", [2, 3, 4])
def test_a_few_steps_from_within_the_radius_are_ahead_of_the_published_ones(num):
    """From so little noise the first evaluation is at the prior. The last step is long: it must not go by infinite noise."""
    sde, deviations = sd.VE(sigma_max=8.0), np.logspace(-1, 0.4, 64)
    deviations *= 0.7 / np.sqrt((deviations**2).mean())
    score_fn = sd.GaussianMixture.gaussian(np.zeros(64), np.diag(deviations**2)).score_fn(sde)
    x = sde.prior_sample(jax.random.key(0), (64, 64))
    first, last = (float(sde.sigma(t)) for t in (sde.t_max, sde.t_min))
    end = np.asarray(x) * np.sqrt((deviations**2 + last**2) / (deviations**2 + first**2))

    def error(**options):
        samples = sd.sample_ode(score_fn, sde, jax.random.key(0), x.shape, init=x, num_steps=num, denoise=False, **options)
        return float(jnp.sqrt(jnp.mean((samples - end) ** 2)))

    others = (error(method=m, grid=g) for m in ("ddim", "dpmpp_2m", "unipc_2") for g in ("edm", "log_snr"))
    assert error() < min(others)
