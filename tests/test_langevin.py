import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import SDES, ZERO_SNR, mixture, moment_z_scores

import sde_diffusion as sd


def test_the_state_follows_algorithm_1(x64):
    """Of a Gaussian every level's mean and variance obey a recursion, in float64: x <- x + a/2 s + sqrt(a) z,
    a = eps sigma_i^2 / sigma_L^2.

    Step sizes and numbers as published: 10 levels from 1 to 0.01, 100 steps each, eps = 2e-5.
    """
    sde, n = sd.SMLD(sigma_min=0.01, sigma_max=1.0, num_levels=10), 20_000
    mean, std = 0.8, 0.6
    oracle = sd.GaussianMixture.gaussian(np.array([mean]), np.array([[std**2]]))
    # NCSN starts from uniform noise.
    start = jax.random.uniform(jax.random.key(0), (n, 1))
    _, path = sd.sample_langevin(oracle.score_fn(sde), sde, jax.random.key(1), (n, 1), grid=sde.levels[::-1], init=start, return_path=True)
    assert path.shape == (11, n, 1)
    m, v = float(start.mean()), float(start.var())
    for i, sigma in enumerate(np.geomspace(1.0, 0.01, 10)):
        step = 2e-5 * sigma**2 / 0.01**2
        for _ in range(100):
            shrink = 1 - 0.5 * step / (std**2 + sigma**2)
            m, v = mean + shrink * (m - mean), shrink**2 * v + step
        # The start's own moments are given: both errors are those of n draws of variance v at most.
        x = np.asarray(path[i + 1])
        assert abs(x.mean() - m) < 4 * np.sqrt(v / n)
        assert abs(x.var() / v - 1) < 4 * np.sqrt(2 / n)


@pytest.mark.parametrize("name", ["ve", "vp", "zero_snr"])
def test_the_mixture_is_recovered(name):
    """Mean and covariance within 4 standard errors of 4,096 samples, each 2% of a variance.

    20 steps of 0.5 at each of 100 levels leave a bias of 2% of a variance at most, below one of these standard errors (200,000 samples).
    """
    sde, oracle = {**SDES, "zero_snr": ZERO_SNR}[name], mixture()
    x = sd.sample_langevin(oracle.score_fn(sde), sde, jax.random.key(2), (4096, 2), num_levels=100, steps_per_level=20, step_size=0.5)
    assert np.abs(moment_z_scores(x, oracle.mean(), oracle.covariance())).max() < 4


@pytest.mark.parametrize("denoise", [True, False])
def test_evaluations_are_counted(denoise):
    sde, oracle, calls = SDES["vp"], mixture(), []

    def score_fn(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return oracle.score_fn(sde)(x, t)

    jax.block_until_ready(sd.sample_langevin(score_fn, sde, jax.random.key(0), (4, 2), num_levels=5, steps_per_level=7, denoise=denoise))
    jax.effects_barrier()
    assert len(calls) == 5 * 7 + denoise


def test_too_long_steps_bias_the_variance_as_stated():
    """Data at a point: the variance at every level is sigma^2 / (1 - step / 4), for long steps as well."""
    sde = sd.VE(sigma_min=0.99, sigma_max=1.0)
    flat = sd.GaussianMixture.gaussian(np.zeros(1), np.zeros((1, 1)))
    x = sd.sample_langevin(
        flat.score_fn(sde), sde, jax.random.key(3), (20_000, 1), num_levels=2, steps_per_level=50, step_size=1.0, denoise=False
    )
    assert abs(float(x.var()) / (0.99**2 / (1 - 0.25)) - 1) < 4 * np.sqrt(2 / 20_000)


def test_a_start_below_zero_snr_and_a_traced_step():
    """Only the levels that are used count: the SDE has zero SNR at t_max, where this does not begin."""
    sample = lambda step, sde=SDES["vp"]: sd.sample_langevin(  # noqa: E731
        lambda x, t: -x,
        sde,
        jax.random.key(0),
        (4, 2),
        init=jnp.ones((4, 2)),
        grid=jnp.array([0.5, 0.1]),
        steps_per_level=2,
        step_size=step,
    )
    assert np.isfinite(sample(0.2, ZERO_SNR)).all()
    np.testing.assert_allclose(jax.jit(sample)(0.2), sample(0.2), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_levels": 1}, ["num_levels=1", "at least 2"]),
        ({"steps_per_level": 0}, ["steps_per_level=0", "at least 1"]),
        ({"step_size": 4.0}, ["step_size=4.0", "(0, 4)"]),
        ({"shape": (4,)}, ["shape=(4,)", "event"]),
        ({"grid": jnp.linspace(0.1, 0.9, 5)}, ["decreasing"]),
        ({"init": jnp.zeros((3, 2))}, ["(3, 2)", "(4, 2)"]),
    ],
)
def test_bad_input_is_refused(options, words):
    options = {"shape": (4, 2), **options}
    with pytest.raises(ValueError) as error:
        sd.sample_langevin(lambda x, t: -x, SDES["vp"], jax.random.key(0), options.pop("shape"), **options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
