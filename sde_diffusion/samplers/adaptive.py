"""Samplers that choose their own steps, per example, by diffrax: the probability-flow ODE and the reverse SDE."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sde_diffusion.prediction import as_pytree, check_process, check_sigma_data, lookup, predict
from sde_diffusion.samplers.grid import check_t_end
from sde_diffusion.samplers.integrate import check_flags, check_noise_level, check_state
from sde_diffusion.sde import SDE, Number, check, known
from sde_diffusion.times import lowest_log_snr

# Evaluations before the first step, and of each step that is tried.
ODE_METHODS = {"tsit5": (1, 6), "dopri5": (1, 6), "dopri8": (1, 13), "heun": (0, 2)}
SDE_METHODS = {"shark": (0, 2), "sra1": (0, 2)}


def shortest_step(size):
    """Below this a step is given up, as where the score is not finite: 16 times the rounding of a number of this size."""
    return 16 * jnp.finfo(jnp.result_type(size)).eps * jnp.abs(size)


class AdaptiveSamples(NamedTuple):
    """What `sample_adaptive` returns."""

    samples: Float[Array, "b ..."]
    evaluations: Int[Array, " b"]  # of the network, for each example, rejected steps and `denoise` included
    success: Bool[
        Array, " b"
    ]  # False where max_steps were not enough, or no step was short enough, as where the score is not finite; the sample is then nan


def sample_adaptive(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    *,
    method: str | None = None,
    rtol: float = 1e-3,
    atol: float = 1e-3,
    noise_level: float = 0.0,
    t_end: float | None = None,
    init: Float[Array, "b ..."] | None = None,
    denoise: bool = True,
    max_steps: int = 4096,
    sigma_data: Number | None = None,
) -> AdaptiveSamples:
    """Samples to a tolerance: each example takes the steps that it needs, and does not depend on its neighbours.

    Integrates x / c, c^2 = alpha^2 sigma_data^2 + sigma^2, which has unit variance at every noise level: over
    asinh(sigma / (alpha sigma_data)) for the ODE, where no linear part is left, over log-SNR for the SDE, whose noise is additive.
    Under `vmap` all examples of a batch wait for the slowest.

    Args:
      score_fn, key, shape, init, t_end, denoise, sigma_data: as in `sample_ode`; the score function sees one example at a time, B = 1.
      method: for the ODE "tsit5" (the default, order 5), "dopri5" (5), "dopri8" (8) or "heun" (2); for the SDE "shark" (the
        default, strong order 1.5) or "sra1" (1.5).
      rtol, atol: tolerance of one step, of x / c, in (0, 1); plain numbers. The larger also bounds the ODE's steps, to 1 up to 1.7e-4 and
        2.3 at 1e-2.
      noise_level: tau of `sample_sde`; 0 is the ODE.
      max_steps: steps tried after which an example is given up.

    Raises:
      ValueError: unknown method, a tolerance or noise level out of range, and as `sample_ode`.
    """
    plain = known(noise_level, rtol, atol) and not any(np.ndim(v) for v in (noise_level, rtol, atol))
    check(plain, "noise_level, rtol and atol of sample_adaptive must be plain numbers: they choose the program")
    noise_level, rtol, atol = (np.asarray(v).item() for v in (noise_level, rtol, atol))
    check_noise_level(noise_level)
    methods = ODE_METHODS if noise_level == 0 else SDE_METHODS
    method = next(iter(methods)) if method is None else method
    lookup(methods, method, f"adaptive {'ODE' if noise_level == 0 else 'SDE'} method")
    check(0 < rtol < 1 and 0 < atol < 1, f"rtol={rtol} and atol={atol} must be in (0, 1), as x / c has unit variance; 1e-3 is usual")
    check(
        isinstance(max_steps, (int, np.integer)) and not isinstance(max_steps, bool) and max_steps >= 1,
        f"max_steps={max_steps} must be an integer of at least 1",
    )
    check_process(score_fn, sde)
    check_flags(denoise=denoise)
    t_end = check_t_end(sde, t_end)
    sigma_data = getattr(score_fn, "sigma_data", 0.5) if sigma_data is None else sigma_data
    check_sigma_data(sigma_data)
    # It begins where alpha > 0, whatever it is at t_max.
    shape, init = check_state(score_fn, sde, key, shape, init, t_end)
    return _solve(
        as_pytree(score_fn), sde, key, init, jnp.asarray(t_end, float), rtol, atol, noise_level, sigma_data, shape=shape,
        method=method, denoise=denoise, max_steps=int(max_steps), stochastic=noise_level != 0,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("shape", "method", "denoise", "max_steps", "stochastic"))
def _solve(
    score_fn, sde, key, init, t_end, rtol, atol, tau, s, *, shape, method, denoise, max_steps, stochastic
):  # fmt: skip
    import diffrax  # here, because importing it takes longer than the whole of this library
    import lineax

    key_prior, key_noise = jax.random.split(key)
    x = sde.prior_sample(key_prior, shape) if init is None else init
    start = jnp.maximum(sde.log_snr(jnp.asarray(sde.t_max, float)), lowest_log_snr(s))
    first, last = (jnp.asarray(0.5 * v, x.dtype) for v in (start, sde.log_snr(t_end)))

    # At high noise the rate is next to nothing: steps that the error estimate allows there would leap over all that follows. This long, the
    # fifth-order methods are off by about the tolerance on N(m, s^2 I), m a few s; higher tolerances than 1e-4 allow longer ones.
    longest_ode = jnp.maximum(1.0, 0.9 * (1e4 * jnp.maximum(rtol, atol)) ** 0.2)

    def scale(t):
        return jnp.sqrt((sde.alpha(t) * s) ** 2 + sde.sigma(t) ** 2).astype(x.dtype)

    def network(t, u):
        """(x0, eps) of one example at u = x / c."""
        return (a[0].astype(x.dtype) for a in predict(score_fn, sde, (scale(t) * u)[None], t))

    def ode(zeta, u, _):
        """du / dzeta = w = eps - sin(theta) u, see `spaces.residual_space`."""
        _, eps = network(sde.time(-2 * jnp.log(s * jnp.sinh(zeta))), u)
        return eps - jnp.tanh(zeta).astype(x.dtype) * u

    def drift(half_log_snr, u, _):
        """du / dl = -(cos^2 + tau^2) u + (1 + tau^2) cos(theta) x0 / s, over l = log(alpha / sigma)."""
        t = sde.time(2 * half_log_snr)
        cosine = (sde.alpha(t) * s / scale(t)).astype(x.dtype)
        x0, _ = network(t, u)
        return -(cosine**2 + tau**2) * u + (1 + tau**2) * cosine / s * x0

    def diffusion(half_log_snr, u, _):
        """sqrt(2) tau sin(theta): of l alone."""
        t = sde.time(2 * half_log_snr)
        deviation = math.sqrt(2) * tau * sde.sigma(t) / scale(t)
        return lineax.DiagonalLinearOperator(jnp.full(u.shape, deviation, u.dtype))

    def one(u, key):
        if stochastic:
            solver = {"shark": diffrax.ShARK, "sra1": diffrax.SRA1}[method]()
            path = diffrax.VirtualBrownianTree(
                first, last, tol=(last - first) / 2**14, shape=jax.ShapeDtypeStruct(u.shape, u.dtype), key=key,
                levy_area=diffrax.SpaceTimeLevyArea,
            )  # fmt: skip
            terms = diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path))
            # diffrax cannot choose an SDE's first step.
            t0, t1, dt0, longest = first, last, 0.01 * (last - first), None
            shortest = shortest_step(last - first)
        else:
            kinds = {"tsit5": diffrax.Tsit5, "dopri5": diffrax.Dopri5, "dopri8": diffrax.Dopri8, "heun": diffrax.Heun}
            solver, terms = kinds[method](), diffrax.ODETerm(ode)
            t0, t1 = (jnp.arcsinh(jnp.exp(-half_log_snr) / s).astype(x.dtype) for half_log_snr in (first, last))
            dt0, longest = None, longest_ode
            shortest = shortest_step(t1)  # the end is where the numbers, and what the data has of structure, are smallest
        solution = diffrax.diffeqsolve(
            terms, solver, t0=t0, t1=t1, dt0=dt0, y0=u, max_steps=max_steps, throw=False,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, dtmin=shortest, dtmax=longest, force_dtmin=False),
        )  # fmt: skip
        # Not by `solution.result`: the last step, cut off at the end, may be shorter than the shortest.
        success = solution.ts[-1] == t1
        # The factor makes the gradient nan too.
        return solution.ys[0] * jnp.where(success, 1.0, jnp.nan).astype(u.dtype), solution.stats["num_steps"], success

    start, per_step = (SDE_METHODS if stochastic else ODE_METHODS)[method]
    u, steps, success = jax.vmap(one)(x / scale(sde.t_max), jax.random.split(key_noise, shape[0]))
    x = scale(t_end) * u
    if denoise:
        x = predict(score_fn, sde, x, t_end)[0].astype(x.dtype)
    return AdaptiveSamples(x, start + per_step * steps + denoise, success)
