"""Solvers of the reverse SDE: marginals at every noise level, and errors in closed form on Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import SDES, ZERO_SNR, mixture, moment_z_scores

import sde_diffusion as sd
from experiments.stochastic import deviations, distance, gaussian_error, power_law
from sde_diffusion.samplers import sde as reverse
from sde_diffusion.samplers import spaces
from sde_diffusion.samplers.linear import Steps


@pytest.mark.parametrize("level", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("method", ["ancestral", "churned_heun", "sa_solver", "sde_adams", "sde_dpmpp_2m", "sde_dpmpp_3m"])
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
@pytest.mark.parametrize("method", ["sa_solver", "sde_adams", "sde_dpmpp_2m", "sde_dpmpp_3m"])
def test_a_multistep_method_does_not_amplify_its_noise_at_few_steps(method, num_steps):
    """Of structure from 1 down to 0.01: too smooth is what few steps may leave, several times too wide is not."""
    stds = np.array([1.0, 0.3, 0.1, 0.03, 0.01])
    oracle = sd.GaussianMixture([1.0], np.zeros((1, 5)), np.diag(stds**2)[None])
    x = sd.sample_sde(
        oracle.score_fn(SDES["ve"]), SDES["ve"], jax.random.key(1), (1024, 5), method=method, num_steps=num_steps, grid="student"
    )
    # A variance of 1,024 draws has relative standard error sqrt(2 / 1024) = 0.044; high orders up to the end came to 2.3 to 4.3.
    assert (np.asarray(x).var(axis=0) / stds**2).max() < 1.6 + 4 * 0.044


def sde_steps(sde, num_steps, level, s=0.5, size=64, grid="student"):
    return Steps.of(sde, sd.time_grid(sde, num_steps, grid, sigma_data=s, event_size=size), s, size, jnp.float32(level))


def about_a_gaussian(order):
    """The multistep method of this order in `gaussian_space`, and no more."""

    def method(steps):
        space, orders = spaces.gaussian_space(steps, steps.sigma_data), spaces.orders(steps.num, order)
        return spaces.multistep(steps, space, spaces.adams_bashforth(space, orders), spaces.adams_moulton(space, orders))

    return method


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("name", ["ve", "vp", "zero snr"])
def test_gaussian_space_is_exact_for_a_gaussian(name, num_steps, level):
    """For N(m, s^2 I): every variance is right in any number of steps, at any noise level; a mean m moves samples by alpha m."""
    sde, mean = {**SDES, "zero snr": ZERO_SNR}[name], np.array([15.0, -0.7])
    end, sigma = float(sde.alpha(sde.t_min)), float(sde.sigma(sde.t_min))
    table = about_a_gaussian(2)(sde_steps(sde, num_steps, level))
    np.testing.assert_allclose(deviations(table, sde, np.array([0.25])), np.sqrt(end**2 * 0.25 + sigma**2), rtol=2e-4)
    init = jax.random.normal(jax.random.key(0), (5, 2)) * sde.prior_std()
    at, moved = (
        sd.sample_sde(
            sd.GaussianMixture.gaussian(m, 0.25 * np.eye(2)).score_fn(sde), sde, jax.random.key(1), (5, 2), init=init + sde.alpha(sde.t_max) * m[None],
            method=about_a_gaussian(2), num_steps=num_steps, noise_level=level, denoise=False, sigma_data=0.5,
        )
        for m in (np.zeros(2), mean)
    )  # fmt: skip
    np.testing.assert_allclose(moved - at, np.tile(end * mean, (5, 1)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("level", [0.0, 1.0, 1.5])
def test_gaussian_space_about_a_point_is_data_space(level):
    """As s goes to 0: the same moves, noise and integrals."""
    steps = sde_steps(SDES["vp"], 9, level)
    ours, theirs = spaces.gaussian_space(steps, 1e-9), spaces.data_space(steps)
    for name in ("x0", "eps", "factor", "length", "points", "weights", "noise"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", ["sde_adams", "sde_dpmpp_2m", "sa_solver"])
def test_deviations_are_those_of_samples(method):
    """The closed form by which the tests below judge, against 16,384 samples: within 4 standard errors, 1 / sqrt(2 x 16384) each."""
    sde, variance = SDES["ve"], np.array([1.0, 0.09, 0.01, 1e-4])
    oracle = sd.GaussianMixture([1.0], np.zeros((1, 4)), np.diag(variance)[None])
    s = float(np.sqrt(variance.mean()))
    x = sd.sample_sde(
        oracle.score_fn(sde), sde, jax.random.key(1), (16384, 4), method=method, num_steps=9, grid="student", denoise=False, sigma_data=s
    )
    exact = deviations(reverse.METHODS[method](sde_steps(sde, 9, 1.0, s, 4)), sde, variance)
    assert np.abs(np.asarray(x).std(axis=0) / exact - 1).max() < 4 / np.sqrt(2 * 16384)


def spectra():
    """(process, variances of mean 1/4) of Gaussians: powers of the rank, and an even one."""
    even = 0.25 * np.linspace(0.5, 1.5, 16)
    return [(SDES["vp"], power_law(16, 1.0)), (SDES["ve"], power_law(64, 1.0)), (SDES["vp"], power_law(8, 2.0)), (SDES["cosine"], even)]


def test_sde_adams_is_ahead_of_the_published_ones():
    """Nearer than the best of three others on three grids each."""
    for num, least in ((8, 0.4), (10, 0.3), (15, 0.1), (20, 0.1), (30, 0.3)):
        ratios = []
        for sde, variance in spectra():
            others = (
                gaussian_error(method, sde, variance, num, grid=grid)
                for method in ("sde_dpmpp_2m", "sde_dpmpp_3m", "sa_solver")
                for grid in ("student", "log_snr", "edm")
            )
            ratios.append(gaussian_error("sde_adams", sde, variance, num) / min(others))
        assert np.exp(np.log(ratios).mean()) < least and max(ratios) < 0.8, (num, ratios)


@pytest.mark.parametrize(("level", "most"), [(0.5, 0.6), (1.5, 0.5), (2.0, 0.4), (3.0, 0.9)])
def test_sde_adams_is_not_behind_at_any_noise_level(level, most):
    """On the same grid sde_dpmpp_2m is never closer: below 4 max(tau, 1)^2 steps they are one, and from half as many more on it is ahead."""
    fewest = int(4 * level**2)
    for num in sorted({3, max(3, fewest - 1), max(10, fewest * 3 // 2)}):
        for sde, variance in spectra():
            ours, theirs = (gaussian_error(method, sde, variance, num, level) for method in ("sde_adams", "sde_dpmpp_2m"))
            assert ours == pytest.approx(theirs, rel=1e-4) if num < max(4, fewest) else ours < most * theirs, (num, ours, theirs)


@pytest.mark.parametrize("num_steps", [5, 9])  # fewer are sde_dpmpp_2m's
@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_sde_adams_survives_any_grid(num_steps, scale):
    """Of 80 random grids 19 of 20 leave an error of less than the data's deviation, none of twice that, told it wrongly by 4 or not."""
    sde, variance = SDES["ve"], np.array([0.5, 0.25, 0.1, 1e-6])
    s, rng, errors = float(np.sqrt(variance.mean())), np.random.default_rng(num_steps), []
    for level in (0.0, 1.0):
        for _ in range(40):
            log_snr = np.sort(rng.uniform(float(sde.log_snr(sde.t_max)), float(sde.log_snr(sde.t_min)), num_steps - 1))
            inner = np.asarray(sde.time(jnp.asarray(log_snr, jnp.float32)))
            grid = jnp.asarray(np.concatenate([[sde.t_max], inner, [sde.t_min]]), jnp.float32)
            table = reverse.METHODS["sde_adams"](Steps.of(sde, grid, scale * s, 4, jnp.float32(level)))
            errors.append(distance(deviations(table, sde, variance), sde, variance))
    assert np.quantile(errors, 0.95) < 1 and max(errors) < 2, np.sort(errors)[-8:]


@pytest.mark.parametrize("level", [30.0, 1000.0])
def test_sde_adams_is_finite_at_large_noise_levels(level):
    sde, oracle = SDES["vp"], mixture()

    def draw(level, num_steps):
        return sd.sample_sde(
            oracle.score_fn(sde), sde, jax.random.key(0), (4, 2), method="sde_adams", num_steps=num_steps, noise_level=level, denoise=False
        )

    for num_steps in (1, 5, 50):
        assert np.isfinite(draw(level, num_steps)).all() and np.abs(draw(level, num_steps)).max() < 5
    assert np.isfinite(jax.grad(lambda level: draw(level, 5).sum())(level))


@pytest.mark.parametrize("level", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_sde_adams_leaves_little_noise_in_what_is_fine(level):
    """Directions of variances from 0 to (0.06 s)^2: off by at most 0.05 s. Without its shares of z, 0.1 to 7 s."""
    variance = np.append([0.0, 1e-6, 1e-5, 1e-4, 1e-3], np.full(59, 0.25 * 64 / 59))
    for sde in (SDES["ve"], SDES["vp"]):
        for num in (8, 10, 15, 20, 30, 40, 60, 100):
            exact = np.sqrt(float(sde.alpha(sde.t_min)) ** 2 * variance + float(sde.sigma(sde.t_min)) ** 2)
            off = deviations(reverse.METHODS["sde_adams"](sde_steps(sde, num, level)), sde, variance) - exact
            assert np.abs(off[:5]).max() < 0.05 * 0.5, (num, off)


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


def test_below_16_steps_order_3_is_the_midpoint_rule():
    """Order 3 amplifies the noise there: sde_dpmpp_3m is sde_dpmpp_2m, from 16 steps on it is another."""
    sde, score_fn = SDES["vp"], mixture().score_fn(SDES["vp"])
    for num, same in ((3, True), (15, True), (16, False)):
        a, b = (sd.sample_sde(score_fn, sde, jax.random.key(0), (8, 2), method=m, num_steps=num) for m in ("sde_dpmpp_3m", "sde_dpmpp_2m"))
        assert np.array_equal(a, b) == same
