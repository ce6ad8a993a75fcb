"""Samplers that choose their own steps."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import SDES, ZERO_SNR, mixture, moment_z_scores

import sde_diffusion as sd
from sde_diffusion.samplers import adaptive

MEAN, STD = 0.8, 0.6


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
            sd.sample_adaptive(
                score_fn, sde, jax.random.key(0), (6, 2), init=init, method=method, rtol=tol, atol=tol, t_end=s, denoise=False
            )
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
    "options",
    [{"method": m} for m in ("tsit5", "dopri5", "dopri8", "heun")] + [{"method": m, "noise_level": 1.0} for m in ("shark", "sra1")],
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


@pytest.mark.parametrize("options", [{}, {"method": "dopri8"}, {"method": "heun"}, {"noise_level": 1.0}])
def test_a_score_that_is_not_finite_costs_few_evaluations(options):
    """From some time on, and everywhere. 4,096 steps would be 8,192 evaluations at the least."""
    for score_fn in (lambda x, t: jnp.where((t < 0.1)[:, None], jnp.nan, -x), lambda x, t: x * jnp.nan):
        out = sd.sample_adaptive(score_fn, SDES["vp"], jax.random.key(0), (2, 1), **options)
        assert not out.success.any() and np.isnan(out.samples).all() and out.evaluations.max() < 2000


def test_a_last_step_shorter_than_the_shortest_is_none_too_short(monkeypatch):
    """What is left before the end may be next to nothing, as for some of 128 ends: it is gone all the same."""
    sde = sd.VE()
    score_fn = lambda x, t: -x / (0.25 + sde.sigma(t) ** 2)[:, None]  # noqa: E731
    run = lambda t_end: inspect.unwrap(sd.sample_adaptive)(score_fn, sde, jax.random.key(0), (1, 1), t_end=t_end, denoise=False)  # noqa: E731
    ends = jnp.linspace(0.2, 0.5, 128)
    whole = jax.vmap(run)(ends)
    monkeypatch.setattr(adaptive, "shortest_step", lambda size: jnp.full_like(size, 0.5))
    jax.clear_caches()
    out = jax.vmap(run)(ends)
    jax.clear_caches()
    assert whole.success.all() and out.success.all()
    np.testing.assert_allclose(out.samples, whole.samples, rtol=5e-3)


def test_adaptive_steps_are_each_examples_own():
    sde, oracle = SDES["ve"], mixture()
    init = sde.prior_sample(jax.random.key(0), (8, 2))
    run = lambda init: sd.sample_adaptive(oracle.score_fn(sde), sde, jax.random.key(0), init.shape, init=init)  # noqa: E731
    both, one = run(init), run(init.at[1:].mul(0.1))
    np.testing.assert_array_equal(both.samples[0], one.samples[0])
    assert both.evaluations[0] == one.evaluations[0] and len(set(np.asarray(both.evaluations))) > 1


def test_a_failed_example_is_nan_and_its_gradient_too():
    sde, oracle = SDES["ve"], mixture()
    init = sde.prior_sample(jax.random.key(0), (8, 2))
    run = lambda init: sd.sample_adaptive(oracle.score_fn(sde), sde, jax.random.key(0), (8, 2), init=init, max_steps=3)  # noqa: E731
    few, gradient = run(init), jax.grad(lambda init: run(init).samples.sum())(init)
    assert not few.success.any() and np.isnan(few.samples).all() and np.isnan(gradient).all()


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_the_adaptive_sde_recovers_the_mixture(name):
    """Within 4 standard errors of 512 samples."""
    sde, oracle = SDES[name], mixture()
    out = sd.sample_adaptive(oracle.score_fn(sde), sde, jax.random.key(3), (512, 2), noise_level=1.0, rtol=1e-2, atol=1e-2)
    assert out.success.all()
    assert np.abs(moment_z_scores(out.samples, oracle.mean(), oracle.covariance())).max() < 4
