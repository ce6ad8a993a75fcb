"""Exact log-likelihood by the probability-flow ODE (arXiv:2011.13456 section 4.3; arXiv:1810.01367)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sde_diffusion.prediction import as_pytree, check_process, lookup, score
from sde_diffusion.samplers.grid import check_t_end
from sde_diffusion.sde import SDE, check, derivative
from sde_diffusion.times import terminal_log_snr

PROBES = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}


def log_likelihood(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray | None,
    x: Float[Array, "b ..."],
    *,
    trace: str = "hutchinson",
    probe: str = "rademacher",
    num_probes: int = 1,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    t_end: float | None = None,
    max_steps: int = 4096,
) -> Float[Array, " b"]:
    """log p(x) in nats, `(B,)`: the density that the probability-flow ODE from t_max to t_end transports the prior to.

    Integrates d x / d lambda and the divergence with diffrax's Tsit5 in lambda = log-SNR, in which the flow is smooth,
    with step-size control per example: an example's value does not depend on its neighbours. Computed in
    x's precision, with matrix products in full float32 precision.

    Args:
      score_fn: `(x (B, *event), t (B,)) -> (B, *event)`.
      key: for the probes, drawn once per example; None will do for the exact trace.
      x: points `(B, *event)`.
      trace: "hutchinson": unbiased in log p, one Jacobian product a probe; "exact": D of them.
      probe: "rademacher" or "gaussian"; num_probes: probes averaged, at least 1.
      rtol, atol: tolerances of one step, for x and for the log-density per dimension.
      t_end: where the data is taken to live, in [t_train, t_max); `sde.t_min` by default.
      max_steps: steps after which an example is given up: its value is nan.

    Raises:
      ValueError: unknown trace or probe, num_probes < 1, t_end outside the range, a score of the wrong shape or dtype.
    """
    if trace not in ("hutchinson", "exact"):
        raise ValueError(f"unknown trace {trace!r}; choose 'hutchinson' or 'exact'")
    lookup(PROBES, probe, "probe")
    check(isinstance(num_probes, int) and num_probes >= 1, f"num_probes={num_probes} must be an integer of at least 1")
    check(rtol > 0 and atol > 0, f"rtol={rtol} and atol={atol} must be positive; 1e-4 is usual")
    if trace == "hutchinson" and key is None:
        raise ValueError("trace='hutchinson' draws probes and needs a key; pass one, or trace='exact'")
    check_process(score_fn, sde)
    t_end = check_t_end(sde, t_end)
    key = jax.random.key(0) if key is None else key
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    with jax.default_matmul_precision("float32"):
        return _solve(
            as_pytree(score_fn), sde, key, x.astype(dtype), jnp.asarray(t_end, dtype), rtol, atol,
            trace=trace, probe=probe, num_probes=num_probes, max_steps=max_steps,
        )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("trace", "probe", "num_probes", "max_steps"))
def _solve(score_fn, sde, key, x, t_end, rtol, atol, *, trace, probe, num_probes, max_steps):
    import diffrax  # here, because importing it takes longer than the whole of this library

    event = x.shape[1:]
    num_dims = x[0].size
    log_snr_start = sde.log_snr(t_end).astype(x.dtype)
    log_snr_stop = terminal_log_snr(sde, t_end.dtype).astype(x.dtype)

    def solve(x, probes):
        def rate(log_snr, state, _):
            """d/dlambda of x and of the log-density per dimension."""
            x, _ = state
            t = sde.time(log_snr)
            shrink = (derivative(sde.log_alpha, t) / sde.log_snr_rate(t)).astype(x.dtype)
            half_variance = (0.5 * sde.sigma(t) ** 2).astype(x.dtype)
            # One evaluation gives the value and, by its pullback, all Jacobian products.
            value, pullback = jax.vjp(lambda x: score(score_fn, x[None], t)[0], x)
            products = jax.lax.map(lambda v: jnp.vdot(v, pullback(v)[0]), probes, batch_size=min(len(probes), 256))
            divergence = products.sum() / (num_dims if trace == "exact" else num_probes * num_dims)
            return shrink * x + half_variance * value, shrink + half_variance * divergence

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(rate),
            diffrax.Tsit5(),
            t0=log_snr_start,
            t1=log_snr_stop,
            dt0=None,
            y0=(x, jnp.zeros((), x.dtype)),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, norm=_norm),
            max_steps=max_steps,
            throw=False,
        )
        x, log_det = (leaf[0] for leaf in solution.ys)
        log_prob = sde.prior_log_prob(x[None])[0] + num_dims * log_det
        return jnp.where(solution.result == diffrax.RESULTS.successful, log_prob, jnp.nan)

    if trace == "exact":
        probes = jnp.eye(num_dims, dtype=x.dtype).reshape(num_dims, *event)
        return jax.vmap(solve, in_axes=(0, None))(x, probes)
    return jax.vmap(solve)(x, PROBES[probe](key, (x.shape[0], num_probes, *event), x.dtype))


def _norm(scaled_error) -> Float[Array, ""]:
    """The larger of the two errors, so that the log-density is not one coordinate among the D of x."""
    x, log_det = scaled_error
    return jnp.maximum(jnp.sqrt(jnp.mean(x**2)), jnp.abs(log_det))
