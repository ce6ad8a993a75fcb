"""Deterministic samplers: the probability-flow ODE dx/dt = f - 1/2 g^2 score (arXiv:2011.13456 eq. 13)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sde_diffusion.prediction import predict, score
from sde_diffusion.samplers.integrate import integrate, resolve
from sde_diffusion.sde import SDE


def euler(score_fn, sde, key, x, t, s):
    """Euler's method in t. Order 1, one evaluation."""
    slope = sde.drift(x, t) - 0.5 * sde.diffusion(t) ** 2 * score(score_fn, x, t)
    return x + (s - t) * slope


def ddim(score_fn, sde, key, x, t, s):
    """x_s = alpha_s x0 + sigma_s eps: exact where x0 is a point (arXiv:2010.02502 eq. 12). Order 1, one evaluation."""
    x0, eps = predict(score_fn, sde, x, t)
    return sde.alpha(s) * x0 + sde.sigma(s) * eps


def heun(score_fn, sde, key, x, t, s):
    """The trapezoidal rule for d(x/alpha) = eps d(sigma/alpha) (arXiv:2206.00364 alg. 1). Order 2, two evaluations."""
    x0, eps = predict(score_fn, sde, x, t)
    x_s = sde.alpha(s) * x0 + sde.sigma(s) * eps
    _, eps_s = predict(score_fn, sde, x_s, s)
    # alpha_s times the step in sigma/alpha; at zero terminal SNR it is infinite, and the first step stays DDIM's.
    alpha_t = sde.alpha(t)
    safe = jnp.where(alpha_t > 0, alpha_t, 1.0)
    length = jnp.where(alpha_t > 0, sde.sigma(s) - sde.alpha(s) * sde.sigma(t) / safe, 0.0)
    return x_s + 0.5 * length * (eps_s - eps)


METHODS = {"euler": euler, "ddim": ddim, "heun": heun}


def sample_ode(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    *,
    method: str = "heun",
    num_steps: int = 18,
    grid: str | Float[Array, " times"] = "edm",
    t_end: float | None = None,
    init: Float[Array, "b ..."] | None = None,
    denoise: bool = True,
    return_path: bool = False,
):
    """Samples by the probability-flow ODE: deterministic given the prior draw.

    Args:
      score_fn: `(x (B, *event), t (B,)) -> (B, *event)`; see `as_score` for networks.
      key: draws the prior sample; unused with `init`.
      shape: `(B, *event)`.
      method: "heun" (order 2, two evaluations a step), "ddim" (order 1, one) or "euler" (order 1 in t, one).
      num_steps: steps of the grid. Evaluations: num_steps times those of a step, and one more for `denoise`.
      grid: "edm", "log_snr", "uniform" or "quadratic" (see `time_grid`), or an array of decreasing times, which
        replaces num_steps and t_end and does not recompile when its values change.
      t_end: where the grid stops, in [t_train, t_max); `sde.t_min` by default.
      init: the state at the first time `(B, *event)` instead of a prior draw.
      denoise: end with one posterior-mean step E[x_0 | x_{t_end}].
      return_path: also return the states at all times of the grid, `(len(grid), B, *event)`.

    Returns:
      samples `(B, *event)`, or `(samples, path)`.

    Raises:
      ValueError: before any compilation, for an unknown method or grid, num_steps < 1, a grid or t_end outside the
        SDE's range, a score of the wrong shape or dtype, or "euler" from zero terminal SNR.
    """
    return integrate(
        resolve(METHODS, method, "method", sde), score_fn, sde, key, shape, num_steps=num_steps, grid=grid, t_end=t_end, init=init,
        denoise=denoise, return_path=return_path,
    )  # fmt: skip
