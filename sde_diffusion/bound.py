"""The variational bound of VDM: -log p(x) <= prior + diffusion + reconstruction (arXiv:2107.00630 eq. 11 to 18)."""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sde_diffusion.losses import check_floats, noise_error
from sde_diffusion.prediction import check_process, check_sde
from sde_diffusion.schedules import Tangent
from sde_diffusion.sde import SDE, check, check_key, check_log_snr, known
from sde_diffusion.times import LOWEST_LOG_SNR, AdaptiveTimes, low_discrepancy, sample_times

Values = Float[Array, " levels"] | Float[np.ndarray, " levels"] | None


class Bound(NamedTuple):
    """The terms of the bound in nats, `(B,)` each, summed over event axes."""

    prior: Float[Array, " b"]
    diffusion: Float[Array, " b"]
    reconstruction: Float[Array, " b"]

    @property
    def total(self) -> Float[Array, " b"]:
        """Their sum: an unbiased estimate of an upper bound on -log p(x)."""
        return self.prior + self.diffusion + self.reconstruction


def variational_bound(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray,
    x0: Float[Array, "b ..."],
    *,
    values: Values = None,
    num_steps: int | None = None,
    times="log_snr",
    return_times: bool = False,
):
    """An unbiased estimate of the variational bound, of one time and two draws of noise an example.

    The latent variables are z_t for t from t_train to t_max. The decoder p(x | z) at t_train is that of VDM: for values on a
    grid it is proportional to q(z | x) in x (categorical); for continuous x it is N(z / alpha, (sigma / alpha)^2).

    Args:
      score_fn: `(x (B, *event), t (B,)) -> (B, *event)`.
      x0: clean data `(B, *event)`: levels without dequantization (`Scaler.encode`) where `values` are given.
      values: the grid of values that an entry of x0 can take `(L,)`, increasing (`Scaler.values()`); None: continuous.
      num_steps: T of the discrete-time model (eq. 14), whose steps are equal in t; None: continuous time (eq. 17).
      times: how t is drawn in continuous time, "log_snr", "uniform" or an `AdaptiveTimes` (see `sample_times`).

    Returns:
      The terms, `(B,)` each; with `return_times` also the times `(B,)`. -log p is of the discrete level with values, else of
      the density of x0.

    Raises:
      ValueError: integer data, no random key, the score of another SDE, num_steps < 1, values that do not increase, or a log-SNR at
        t_train too low to tell them apart.
    """
    whole = num_steps is None or (isinstance(num_steps, (int, np.integer)) and num_steps >= 1)
    check(whole, f"num_steps={num_steps!r} must be an integer of at least 1, or None for continuous time")
    check(
        isinstance(times, (str, AdaptiveTimes)),
        "times holds levels, whose mean is not the bound: pass num_steps for discrete time, or 'log_snr', 'uniform' or an AdaptiveTimes",
    )
    check_process(score_fn, sde)
    x0 = _checked(sde, values, key, x0)
    key_t, key_eps, key_decoder = jax.random.split(key, 3)
    dtype = x0.dtype
    if num_steps is None:
        t, importance = sample_times(key_t, x0.shape[0], sde, times, dtype)
        weight = 0.5 * importance * -sde.log_snr_rate(t)
    else:
        grid = jnp.linspace(sde.t_train, sde.t_max, num_steps + 1, dtype=dtype)
        end = 1 + jnp.minimum((low_discrepancy(key_t, x0.shape[0], dtype) * num_steps).astype(int), num_steps - 1)
        t = grid[end]
        # The clip is for zero terminal SNR, as everywhere.
        weight = 0.5 * num_steps * jnp.expm1(sde.log_snr(grid[end - 1]) - jnp.maximum(sde.log_snr(t), LOWEST_LOG_SNR))
    diffusion = weight * noise_error(score_fn, sde, key_eps, x0, t)
    bound = Bound(prior_term(sde, x0), diffusion, reconstruction_term(sde, key_decoder, x0, values))
    return (bound, t) if return_times else bound


def prior_term(sde: SDE, x0: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """KL(q(z_1 | x0) || prior) at t_max, both Gaussian, in nats `(B,)`."""
    t = jnp.asarray(sde.t_max, jnp.promote_types(x0.dtype, jnp.float32))
    std = sde.prior_std().astype(t.dtype)
    ratio = (sde.sigma(t) / std) ** 2
    per_dim = 0.5 * (ratio - 1 - jnp.log(ratio) + (sde.alpha(t) * x0 / std) ** 2)
    return per_dim.reshape(x0.shape[0], -1).sum(axis=1)


def reconstruction_term(sde: SDE, key: PRNGKeyArray, x0: Float[Array, "b ..."], values: Values = None) -> Float[Array, " b"]:
    """E[-log p(x0 | z)] at t_train in nats `(B,)`: of levels by one draw of z, of continuous data in closed form."""
    t = jnp.asarray(sde.t_train, jnp.promote_types(x0.dtype, jnp.float32))
    ratio = jnp.exp(-0.5 * sde.log_snr(t))  # sigma / alpha
    if values is None:
        one = 0.5 * (1 + math.log(2 * math.pi)) + jnp.log(ratio)
        return jnp.full(x0.shape[0], x0[0].size * one)
    values = jnp.asarray(values, t.dtype)
    truth = jnp.round((x0 - values[0]) / (values[1] - values[0])).astype(int)
    noisy = x0 + ratio * jax.random.normal(key, x0.shape, t.dtype)
    log_p = jax.nn.log_softmax(-0.5 * (jnp.subtract.outer(noisy, values) / ratio) ** 2, axis=-1)
    per_dim = -jnp.take_along_axis(log_p, truth[..., None], axis=-1)[..., 0]
    return per_dim.reshape(x0.shape[0], -1).sum(axis=1)


def check_values(sde: SDE, values: Values, x0=None) -> None:
    """Raises ValueError for a grid of values that is no grid, or too fine for the noise at t_train, or that x0 is not on."""
    if values is None or not known(values):
        return
    steps = np.diff(np.asarray(values, np.float64))
    if np.ndim(values) != 1 or len(steps) < 1 or not (steps > 0).all() or not np.allclose(steps, steps[0], rtol=1e-3):
        raise ValueError(f"values={values} must be at least two equally spaced, increasing numbers; Scaler.values() gives them")
    if x0 is not None and known(x0):
        off = np.abs((np.asarray(x0, np.float64) - values[0]) / steps[0] - np.round((np.asarray(x0) - values[0]) / steps[0]))
        outside = (x0 < values[0] - 0.01 * steps[0]) | (x0 > values[-1] + 0.01 * steps[0]) | (off > 0.01)
        check(not outside.any(), f"x0 holds {np.asarray(x0)[outside].flat[0] if outside.any() else 0:g}, which is not on the grid "
              f"of values from {values[0]:g} to {values[-1]:g}: pass Scaler.encode(levels), without dequantization")  # fmt: skip
    if known(*jax.tree.leaves(sde)):
        with jax.ensure_compile_time_eval():
            log_snr = float(sde.log_snr(jnp.asarray(sde.t_train, float)))
        needed = 2 * math.log(2 / steps[0])
        check(
            log_snr >= needed,
            f"the log-SNR at t_train={sde.t_train} is {log_snr:.3g}, but levels {steps[0]:.3g} apart need {needed:.3g} or more "
            "to be told apart (half a step is then one standard deviation of the noise): raise log_snr_max, or lower t_train",
        )


def _checked(sde: SDE, values: Values, key, x0) -> Array:
    """x0 in at least float32, in which noise is centred and of variance 1, after the checks of everything."""
    check_key(key)
    x0 = jnp.asarray(x0)
    check_floats(x0)
    check_log_snr(sde)
    check_values(sde, values, x0)
    return x0.astype(jnp.promote_types(x0.dtype, jnp.float32))


def bound_gradients(make_score: Callable, params, sde: SDE, key: PRNGKeyArray, x0: Float[Array, "b ..."], values: Values = None):
    """The bound and its gradients where the schedule is learned as well (arXiv:2107.00630 appendix H).

    The end points of the schedule change the bound, and descend it. Its interior (the leaf `network`) changes only the variance of the
    estimate, and descends E[diffusion^2] / (2 E[diffusion]^2), the variance up to constants; times are uniform in t, so a schedule that has
    spread the loss evenly has made them importance-sampled. One backward pass through the network serves both.

    Args:
      make_score: (params, sde) -> score_fn.
      sde: `LinearLogSNR` or `MonotoneLogSNR`; its leaves log_snr_max and log_snr_min, and `network` if it has one, are learned.
      x0, values: as in `variational_bound`.

    Returns:
      (Bound, t `(B,)`, gradient by params, gradient by sde: an SDE of the same structure).

    Raises:
      ValueError: as `variational_bound`.
    """
    check_sde(sde, "make_score, params, sde")
    x0 = _checked(sde, values, key, x0)
    key_t, key_eps, key_decoder = jax.random.split(key, 3)
    batch = x0.shape[0]
    t, span = sample_times(key_t, batch, sde, "uniform", x0.dtype)

    def schedule(sde):
        return sde.log_snr(t), sde.log_snr_rate(t)

    def diffusion(params, level, rate):
        near = Tangent(level, rate, t)
        return 0.5 * span * -rate * noise_error(make_score(params, near), near, key_eps, x0, t)

    def ends(sde):
        return prior_term(sde, x0), reconstruction_term(sde, key_decoder, x0, values)

    near, pull_schedule = jax.vjp(schedule, sde)
    loss, pull_diffusion = jax.vjp(diffusion, params, *near)
    (prior, reconstruction), pull_ends = jax.vjp(ends, sde)
    mean = jnp.full(batch, 1 / batch, loss.dtype)
    by_params, *by_near = pull_diffusion(mean)
    by_ends = jax.tree.map(jnp.add, pull_schedule(tuple(by_near))[0], pull_ends((mean, mean))[0])
    # Over the squared mean, so that its size does not depend on the loss's.
    by_variance = pull_schedule(tuple(loss / loss.mean() ** 2 * g for g in by_near))[0]
    by_sde = copy.copy(by_ends)
    if hasattr(sde, "network"):
        # A gradient is no process: not by `replace`, which would check it as one.
        object.__setattr__(by_sde, "network", by_variance.network)
    return Bound(prior, loss, reconstruction), t, by_params, by_sde
