import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import SDES, mixture, perturbed, standard_error

import sde_diffusion as sd

NAMES = sorted(SDES)
KINDS = {
    "implicit": sd.implicit_loss,
    "sliced": sd.sliced_loss,
    "sliced_plain": functools.partial(sd.sliced_loss, probes=4, probe="gaussian", variance_reduced=False),
}


@pytest.mark.parametrize("name", NAMES)
def test_they_are_denoising_score_matching_less_a_constant(name):
    """E[dsm - loss] = E_t[w D / sigma^2], of a wrong score too, whatever the weighting; the same key draws the same t."""
    sde, oracle, n = SDES[name], mixture(), 20_000
    x0 = oracle.sample(jax.random.key(0), n)

    def weighting(t):
        return sde.sigma(t) ** 2 * (1 + 2 * jnp.sin(3 * t) ** 2)

    @jax.jit
    def values(key):
        score_fn = perturbed(oracle.score_fn(sde), sde, 0.5)
        losses = {"dsm": sd.dsm_loss, **KINDS}
        return {k: f(score_fn, sde, key, x0, weighting=weighting, return_times=True) for k, f in losses.items()}

    values = values(jax.random.key(1))
    dsm, t = values.pop("dsm")
    constant = 2 * (1 + 2 * np.sin(3 * np.asarray(t, np.float64)) ** 2)
    for kind, (loss, times) in values.items():
        np.testing.assert_array_equal(times, t)
        gap = np.asarray(dsm - loss, np.float64) - constant
        assert abs(gap.mean()) < 4 * standard_error(gap) < 0.05 * constant.mean(), kind


def test_the_divergence_is_the_trace_of_the_jacobian(x64):
    """A linear score A x + b: |s|^2 + 2 tr A, written out in numpy, at events of two axes and more coordinates than a block of 64."""
    sde, batch, event = SDES["vp"], 3, (10, 7)
    rng = np.random.default_rng(0)
    a, b = 0.1 * rng.standard_normal((70, 70)), rng.standard_normal(70)
    x0 = jnp.asarray(rng.standard_normal((batch, *event)))

    def score_fn(x, t):
        # Shaped by t, as a network's is.
        return ((x.reshape(len(x), -1) @ a.T + b[None]) * (1 + t[:, None])).reshape(x.shape)

    key = jax.random.key(0)
    implicit, t = sd.implicit_loss(score_fn, sde, key, x0, return_times=True)
    # The noise is drawn as that of dsm_loss, whose error shows it: eps + sigma score, squared.
    eps = jax.random.normal(jax.random.split(key)[1], x0.shape)
    s = np.asarray(score_fn(sde.perturb(x0, eps, t), t)).reshape(batch, -1)
    trace = np.trace(a) * (1 + np.asarray(t))
    np.testing.assert_allclose(implicit, np.asarray(sde.sigma(t)) ** 2 * ((s**2).sum(1) + 2 * trace), rtol=1e-9)
    # Rademacher probes see the diagonal exactly: none is left to chance where the Jacobian is diagonal.
    sliced, implicit = (f(lambda x, t: -2 * x, sde, key, x0).sum() for f in (sd.sliced_loss, sd.implicit_loss))
    assert sliced.shape == () and np.isfinite(sliced) and np.isfinite(implicit)


def test_their_gradients_train():
    """Gradient descent on the sliced loss finds the score of a Gaussian: -x / (alpha^2 s^2 + sigma^2) at one level."""
    sde = SDES["ve"]
    level = jnp.asarray([0.5])
    x0 = 0.7 * jax.random.normal(jax.random.key(0), (5000, 3))
    target = 1 / (0.49 + float(sde.sigma(level[0])) ** 2)

    def objective(theta, key):
        return sd.sliced_loss(lambda x, t: -theta * x, sde, key, x0, times=level, weighting=jnp.ones_like).mean()

    slope, curvature = jax.jit(lambda key: (jax.grad(objective)(0.0, key), jax.grad(jax.grad(objective))(0.0, key)))(jax.random.key(1))
    # theta^2 E|x|^2 - 2 theta D: the minimum by one Newton step; |x|^2 has relative standard error sqrt(2 / 15,000).
    assert abs(-float(slope / curvature) / target - 1) < 4 * np.sqrt(2 / 15_000)


def test_the_published_ncsn_loss():
    """1/L sum of sigma_i^2 / 2 E|s + (x~ - x) / sigma_i^2|^2 (arXiv:1907.05600 eq. 2, 5 and 6) is `simple`, half of `dsm_loss`."""
    sde = sd.SMLD(sigma_min=0.01, sigma_max=1.0, num_levels=10)
    point, n = np.array([0.5, -1.0]), 20_000
    score_fn = lambda x, t: -x / (1 + t[:, None])  # noqa: E731
    x0 = jnp.tile(jnp.asarray(point, jnp.float32), (n, 1))
    simple = sd.weighted_loss(score_fn, sde, jax.random.key(0), x0, weight="simple", times=sde.levels)
    dsm = sd.dsm_loss(score_fn, sde, jax.random.key(0), x0, times=sde.levels)
    np.testing.assert_allclose(simple, 0.5 * dsm, rtol=1e-6)
    rng, terms = np.random.default_rng(0), []
    for i, sigma in enumerate(np.geomspace(0.01, 1.0, 10)):
        noisy = point + sigma * rng.standard_normal((n // 10, 2))
        error = -noisy / (1 + i / 9) + (noisy - point) / sigma**2
        terms.append(0.5 * sigma**2 * (error**2).sum(1))
    theirs = np.concatenate(terms)
    assert abs(float(simple.mean()) - theirs.mean()) < 4 * np.hypot(standard_error(simple), standard_error(theirs))
