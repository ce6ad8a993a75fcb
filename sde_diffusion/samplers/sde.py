"""Stochastic samplers: the reverse SDE dx = (f - g^2 score) dt + g dw (arXiv:2011.13456 eq. 6), from t to s < t.

Each is also a predictor of `sample_pc`. All take one evaluation a step.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sde_diffusion.prediction import predict, score
from sde_diffusion.samplers.integrate import integrate, resolve
from sde_diffusion.sde import SDE


def _noise(key, x):
    return jax.random.normal(key, x.shape, x.dtype)


def _transition(sde, t, s):
    """x_t | x_s ~ N(a x_s, v I), for s < t: a = alpha_t / alpha_s and v = sigma_t^2 - a^2 sigma_s^2."""
    return sde.alpha(t) / sde.alpha(s), -(sde.sigma(t) ** 2) * jnp.expm1(sde.log_snr(t) - sde.log_snr(s))


def euler_maruyama(score_fn, sde, key, x, t, s):
    """Euler-Maruyama on the reverse SDE. Strong order 1/2, weak order 1."""
    variance = sde.diffusion(t) ** 2 * (t - s)
    mean = x - sde.drift(x, t) * (t - s) + variance * score(score_fn, x, t)
    return mean + jnp.sqrt(variance) * _noise(key, x)


def reverse_diffusion(score_fn, sde, key, x, t, s):
    """The forward transition's own discretization, reversed (arXiv:2011.13456 appendix E, eq. 46). Weak order 1."""
    a, variance = _transition(sde, t, s)
    return (2 - a) * x + variance * score(score_fn, x, t) + jnp.sqrt(variance) * _noise(key, x)


def _posterior_mean(score_fn, sde, x, t, s):
    a, variance = _transition(sde, t, s)
    x0, _ = predict(score_fn, sde, x, t)
    mean = a * (sde.sigma(s) / sde.sigma(t)) ** 2 * x + sde.alpha(s) * variance / sde.sigma(t) ** 2 * x0
    return mean, variance


def ancestral(score_fn, sde, key, x, t, s):
    """A draw from q(x_s | x_t, x_0 = x0_hat), with its variance sigma_s^2 / sigma_t^2 v (arXiv:2006.11239 eq. 6-7).

    SMLD's ancestral sampler for VE (arXiv:2011.13456 eq. 47). Weak order 1.
    """
    mean, variance = _posterior_mean(score_fn, sde, x, t, s)
    return mean + jnp.sqrt(variance) * sde.sigma(s) / sde.sigma(t) * _noise(key, x)


def ancestral_large(score_fn, sde, key, x, t, s):
    """As `ancestral`, with the forward transition's variance v ("fixedlarge", sigma^2 = beta, arXiv:2006.11239 3.2)."""
    mean, variance = _posterior_mean(score_fn, sde, x, t, s)
    return mean + jnp.sqrt(variance) * _noise(key, x)


METHODS = {
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "ancestral": ancestral,
    "ancestral_large": ancestral_large,
}


def sample_sde(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    *,
    method: str = "euler_maruyama",
    num_steps: int = 1000,
    grid: str | Float[Array, " times"] = "uniform",
    t_end: float | None = None,
    init: Float[Array, "b ..."] | None = None,
    denoise: bool = True,
    return_path: bool = False,
):
    """Samples by the reverse SDE.

    Args:
      score_fn: `(x (B, *event), t (B,)) -> (B, *event)`; see `as_score` for networks.
      key: draws the prior sample and the noise of all steps, at the global shape.
      shape: `(B, *event)`.
      method: "euler_maruyama", "reverse_diffusion", "ancestral" or "ancestral_large"; one evaluation a step each.
      num_steps: steps of the grid. Evaluations: num_steps, and one more for `denoise`.
      grid, t_end, init, return_path: as in `sample_ode`.
      denoise: end with one posterior-mean step E[x_0 | x_{t_end}], which removes the last step's noise. False returns
        a draw from the marginal at t_end, noise included.

    Returns:
      samples `(B, *event)`, or `(samples, path)`.

    Raises:
      ValueError: as `sample_ode`, before any compilation.
    """
    return integrate(
        resolve(METHODS, method, "method", sde), score_fn, sde, key, shape, num_steps=num_steps, grid=grid, t_end=t_end,
        init=init, denoise=denoise, return_path=return_path,
    )  # fmt: skip
