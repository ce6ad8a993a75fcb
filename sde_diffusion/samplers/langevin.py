"""Annealed Langevin dynamics (arXiv:1907.05600 algorithm 1): no reverse process, Langevin steps at one noise level after another."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sde_diffusion.prediction import as_pytree, check_process, check_sigma_data, predict, score
from sde_diffusion.samplers.grid import resolve_grid
from sde_diffusion.samplers.integrate import check_flags, check_shape, check_state
from sde_diffusion.sde import SDE, Number, check, is_number


def sample_langevin(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    *,
    num_levels: int = 10,
    steps_per_level: int = 100,
    step_size: Number = 0.2,
    grid: str | Float[Array, " levels"] = "log_snr",
    t_end: float | None = None,
    init: Float[Array, "b ..."] | None = None,
    denoise: bool = True,
    return_path: bool = False,
    sigma_data: Number | None = None,
):
    """Samples by Langevin steps x <- x + a_i / 2 score(x, t_i) + sqrt(a_i) z, a_i = step_size sigma_i^2, from the noisiest level on.

    Two biases remain. Of the steps' length: where the data is narrower than sigma_i, the variance at a level is too large by the factor
    1 / (1 - step_size / 4), less where it is wider. Of their number: the variance of a direction of variance v still has what
    was taken off sigma^2 between levels, times about exp(-step_size steps_per_level sigma_i^2 / (v + sigma_i^2)).

    Args:
      score_fn, key, shape, init, sigma_data: as in `sample_sde`.
      num_levels: L, of a grid by name; at least 2. NCSN has 10, from sigma = 1 to 0.01.
      steps_per_level: T. Evaluations: L T, and one more for `denoise`.
      step_size: the paper's epsilon / sigma_L^2, in (0, 4); NCSN's 2e-5 at sigma_L = 0.01 is 0.2. From 4 on the steps diverge.
      grid: the levels: a name of `time_grid` ("log_snr" is geometric in sigma / alpha, as NCSN's), or L decreasing times, as
        `sde.levels[::-1]` of `SMLD`.
      t_end: the last level of a grid by name; None: `sde.t_min`.
      denoise: end with E[x_0 | x] at the last level.
      return_path: also return the start and the state after each level, `(L + 1, B, *event)`.

    Returns:
      samples `(B, *event)`, or `(samples, path)`.

    Raises:
      ValueError: as `sample_sde`; also num_levels < 2, steps_per_level < 1 and step_size outside (0, 4).
    """
    check(
        isinstance(num_levels, (int, np.integer)) and num_levels >= 2,
        f"num_levels={num_levels} must be an integer of at least 2; 10 is usual",
    )
    check(
        isinstance(steps_per_level, (int, np.integer)) and steps_per_level >= 1,
        f"steps_per_level={steps_per_level} must be an integer of at least 1; 100 is usual",
    )
    check(
        is_number(step_size) and (step_size > 0) & (step_size < 4),
        f"step_size={step_size} must be in (0, 4), in units of sigma^2; 0.2 is usual",
    )
    check_process(score_fn, sde)
    check_flags(denoise=denoise, return_path=return_path)
    if sigma_data is None:
        sigma_data = getattr(score_fn, "sigma_data", 0.5)
    check_sigma_data(sigma_data)
    num_steps, size = num_levels - 1 if isinstance(grid, str) else None, math.prod(check_shape(shape)[1:])
    times = resolve_grid(sde, grid, num_steps, t_end, sigma_data, size, from_prior=init is None)
    t_start = None if init is None or isinstance(times, jax.core.Tracer) else times[0]
    shape, init = check_state(score_fn, sde, key, shape, init, t_start)
    return _run(
        as_pytree(score_fn), sde, key, times, init, step_size, shape=shape, steps=steps_per_level, denoise=denoise,
        return_path=return_path,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("shape", "steps", "denoise", "return_path"))
def _run(score_fn, sde, key, times, init, step_size, *, shape, steps, denoise, return_path):
    key_prior, key_steps = jax.random.split(key)
    x = sde.prior_sample(key_prior, shape) if init is None else init

    def level(x, inputs):
        t, key = inputs
        size = step_size * sde.sigma(t) ** 2

        def step(x, key):
            noise = jax.random.normal(key, x.shape, x.dtype)
            return (x + 0.5 * size * score(score_fn, x, t) + jnp.sqrt(size) * noise).astype(x.dtype), None

        x, _ = jax.lax.scan(step, x, jax.random.split(key, steps))
        return x, (x if return_path else None)

    end, path = jax.lax.scan(level, x, (times, jax.random.split(key_steps, len(times))))
    samples = predict(score_fn, sde, end, times[-1])[0].astype(end.dtype) if denoise else end
    return (samples, jnp.concatenate([x[None], path])) if return_path else samples
