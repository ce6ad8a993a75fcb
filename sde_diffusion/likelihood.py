"""Exact log-likelihood by the probability-flow ODE (arXiv:2011.13456 section 4.3; arXiv:1810.01367), and its latent space."""

import functools
import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sde_diffusion.prediction import as_pytree, check_process, check_sigma_data, lookup, predict
from sde_diffusion.samplers.adaptive import shortest_step
from sde_diffusion.samplers.grid import check_t_end, resolve_grid
from sde_diffusion.samplers.multistep import adams
from sde_diffusion.score_matching import PROBES
from sde_diffusion.sde import SDE, Number, Times, check, check_key, check_log_snr, expand
from sde_diffusion.times import LOWEST_LOG_SNR, terminal_log_snr

# Evaluations before the first step, and of each step that is tried.
METHODS = {"adams": (1, 1), "tsit5": (1, 6), "dopri8": (1, 13), "heun": (0, 2)}


class Likelihood(NamedTuple):
    """What `log_likelihood` returns with `details=True`."""

    log_prob: Float[Array, " b"]  # in nats
    standard_error: Float[Array, " b"]  # of log_prob over the probes: nan for one probe, 0 for the exact trace
    latent: Float[Array, "b ..."]  # the state at t_max, where the prior is evaluated
    evaluations: Int[Array, " b"]  # of the score together with its Jacobian products, rejected steps included


def log_likelihood(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray | None,
    x: Float[Array, "b ..."],
    *,
    trace: str = "hutchinson",
    probe: str = "rademacher",
    num_probes: int = 1,
    rtol: Number = 1e-4,
    atol: Number = 1e-4,
    t_end: float | None = None,
    max_steps: int = 4096,
    method: str = "adams",
    num_steps: int | None = None,
    grid: str | Float[Array, " times"] | None = None,
    sigma_data: Number | None = None,
    batch_size: int | None = None,
    details: bool = False,
):
    """log p(x) in nats, `(B,)`: the density that the probability-flow ODE from t_max to t_end transports the prior to.

    Integrates x / c, c^2 = alpha^2 sigma_data^2 + sigma^2, and the divergence over theta = arctan(sigma / (alpha sigma_data)), in which
    the flow is smooth and of finite length even at zero SNR, with step-size control per example: an example's value does
    not depend on its neighbours. With num_steps or a grid, on fixed times instead: the cost is known in advance, the error
    is not. Computed in x's precision, with matrix products in full float32 precision.

    Args:
      score_fn: `(x (B, *event), t (B,)) -> (B, *event)`.
      key: for the probes, drawn once per example; None will do for the exact trace.
      x: points `(B, *event)`.
      trace: "hutchinson": unbiased in log p, one Jacobian product a probe; "exact": D of them.
      probe: "rademacher" or "gaussian"; num_probes: probes averaged, at least 1.
      rtol, atol: tolerances of one step, for x / c and for the log-density per dimension.
      t_end: where the data is taken to live, in [t_train, t_max); `sde.t_min` by default.
      max_steps: steps after which an example is given up: its value is nan, as where no step is short enough (a score that is
        not finite).
      method: "adams" (order 3, 1 evaluation a step: the cheapest on networks), "dopri8" (8, 13 evaluations: for tolerances
        below 1e-7), "tsit5" (5, 6) or "heun" (2, 2).
      num_steps, grid: fixed times, as in `sample_ode`; "student" by default. Adams splits the first step, for 4 evaluations more.
      sigma_data: standard deviation of the data; the score function's own (`as_score`), or 0.5, by default.
      batch_size: examples that are solved at once, all of them by default: bounds the memory of score_fn. With it, an example that is
        done makes room for the next ("adams"), and the last ones go on in a batch a quarter as large, so that few wait for the slowest; a
        CPU works on two halves at once. So score_fn is called on batches of several sizes. For a gradient leave it out: it costs several
        times the memory there.
      details: return a `Likelihood`: the value with its standard error, latent and count of evaluations.

    Raises:
      ValueError: unknown name, num_probes < 1, t_end or a grid outside the range, num_steps beside a grid of another length, no random key,
        a score of another SDE, or of the wrong shape or dtype.
    """
    if trace not in ("hutchinson", "exact"):
        raise ValueError(f"unknown trace {trace!r}; choose 'hutchinson' or 'exact'")
    lookup(PROBES, probe, "probe")
    check(isinstance(num_probes, numbers.Integral) and num_probes >= 1, f"num_probes={num_probes!r} must be an integer of at least 1")
    if trace == "hutchinson" and key is None:
        raise ValueError("trace='hutchinson' draws probes and needs a key; pass one, or trace='exact'")
    key = jax.random.key(0) if key is None else key
    check_key(key)
    x = jnp.asarray(x)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if trace == "hutchinson":
        probes = PROBES[probe](key, (x.shape[0], num_probes, *x.shape[1:]), dtype)
    else:
        probes = jnp.eye(math.prod(x.shape[1:]), dtype=dtype).reshape(-1, *x.shape[1:])
    out = _flow(
        score_fn, sde, x, probes, rtol=rtol, atol=atol, t_end=t_end, max_steps=max_steps, method=method, num_steps=num_steps,
        grid=grid, sigma_data=sigma_data, batch_size=batch_size,
    )  # fmt: skip
    return out if details else out.log_prob


def encode(
    score_fn,
    sde: SDE,
    x: Float[Array, "b ..."],
    *,
    rtol: Number = 1e-4,
    atol: Number = 1e-4,
    t_end: float | None = None,
    max_steps: int = 4096,
    method: str = "adams",
    num_steps: int | None = None,
    grid: str | Float[Array, " times"] | None = None,
    sigma_data: Number | None = None,
    batch_size: int | None = None,
) -> Float[Array, "b ..."]:
    """The latent of x `(B, *event)` at t_max, by the probability-flow ODE from t_end (arXiv:2011.13456 section 4.3).

    `sample_adaptive(..., init=latent, denoise=False)` decodes it, up to the tolerances. Options as in `log_likelihood`;
    nan where max_steps were not enough.

    Raises:
      ValueError: as `log_likelihood`.
    """
    return _flow(
        score_fn, sde, x, None, rtol=rtol, atol=atol, t_end=t_end, max_steps=max_steps, method=method, num_steps=num_steps,
        grid=grid, sigma_data=sigma_data, batch_size=batch_size,
    ).latent  # fmt: skip


def slerp(a: Float[Array, "b ..."], b: Float[Array, "b ..."], fraction: Times) -> Float[Array, "b ..."]:
    """Spherical interpolation of latents, per example: a at fraction 0, b at 1 (arXiv:2010.02502 appendix D.5).

    Keeps the norm of two latents of equal norm, as those of a Gaussian nearly are; the straight line leaves that shell.

    Args:
      fraction: a scalar, or one of each example `(B,)`.

    Raises:
      ValueError: a and b of different shapes.
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    check(a.shape == b.shape, f"a has shape {a.shape} and b {b.shape}; make them equal")
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    fraction = jnp.broadcast_to(jnp.asarray(fraction, dtype), a.shape[:1])

    def unit(x):
        flat = x.reshape(x.shape[0], -1).astype(dtype)
        return flat / jnp.maximum(jnp.linalg.norm(flat, axis=1, keepdims=True), jnp.finfo(dtype).tiny)

    # By the half-angle's tangent: the arc cosine of a product near 1 has half of the digits.
    p, q = unit(a), unit(b)
    angle = 2 * jnp.arctan2(jnp.linalg.norm(p - q, axis=1), jnp.linalg.norm(p + q, axis=1))
    # sinc(x) = sin(pi x) / (pi x) is smooth at 0, where the sphere is flat.
    first, second = (f * jnp.sinc(f * angle / math.pi) / jnp.sinc(angle / math.pi) for f in (1 - fraction, fraction))
    return (expand(first, a) * a + expand(second, b) * b).astype(a.dtype)


def _flow(score_fn, sde, x, probes, *, rtol, atol, t_end, max_steps, method, num_steps, grid, sigma_data, batch_size) -> Likelihood:
    """Checks what the public functions share, and runs."""
    x = jnp.asarray(x)
    check(jnp.issubdtype(x.dtype, jnp.floating), f"x has dtype {x.dtype}; scale it to floats first (data.Scaler does, with dequantization)")
    check(x.ndim >= 1 and len(x) > 0, f"x has shape {x.shape}; pass at least one example, (B, *event)")
    check((rtol > 0) & (atol > 0), f"rtol={rtol} and atol={atol} must be positive; 1e-4 is usual")
    check(isinstance(max_steps, numbers.Integral) and max_steps >= 1, f"max_steps={max_steps!r} must be an integer of at least 1")
    whole = batch_size is None or (isinstance(batch_size, numbers.Integral) and batch_size >= 1)
    check(whole, f"batch_size={batch_size} must be an integer of at least 1, or None for all examples at once")
    spec = jax.typeof(x).sharding.spec  # of explicit mesh axes alone
    check(
        batch_size is None or not any(spec),
        f"batch_size={batch_size} picks examples from anywhere, but x is split as {spec} over explicit mesh axes; leave "
        "batch_size out, or make the mesh with axis_types=jax.sharding.AxisType.Auto",
    )
    lookup(METHODS, method, "method")
    check_log_snr(sde)
    check_process(score_fn, sde)
    sigma_data = getattr(score_fn, "sigma_data", 0.5) if sigma_data is None else sigma_data
    check_sigma_data(sigma_data)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    times = None
    if num_steps is not None or grid is not None:
        grid = "student" if grid is None else grid
        times = resolve_grid(sde, grid, num_steps, t_end, sigma_data, math.prod(x.shape[1:]), from_prior=True)
        times, t_end = times.astype(dtype), times[-1]
    t_end = check_t_end(sde, t_end) if times is None else t_end
    # A CPU's products are in full precision anyway, and asking for it makes them slower.
    with jax.default_matmul_precision("float32" if jax.default_backend() != "cpu" else None):
        return _solve(
            as_pytree(score_fn), sde, x.astype(dtype), probes, jnp.asarray(t_end, dtype), times, rtol, atol, sigma_data,
            method=method, max_steps=int(max_steps),
            batch_size=None if batch_size is None else int(batch_size),
        )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("method", "max_steps", "batch_size"))
def _solve(score_fn, sde, x, probes, t_end, times, rtol, atol, s, *, method, max_steps, batch_size):
    dtype, num_dims = x.dtype, math.prod(x.shape[1:])
    rtol, atol = (jnp.asarray(a, dtype) for a in (rtol, atol))

    def angle(log_snr):
        """theta of tan(theta) = sigma / (alpha s): from 0, all data, to pi / 2, all noise."""
        return jnp.arctan(jnp.exp(-0.5 * log_snr) / s).astype(dtype)

    def scale(log_snr, t):
        """c of x = c u."""
        return (sde.sigma(t) * jnp.sqrt(1 + s**2 * jnp.exp(log_snr))).astype(dtype)

    shared = probes is None or probes.ndim == x.ndim  # nothing, or the unit vectors

    def rate(theta, u, own):
        """du/dtheta `(B, *event)` and the divergences per dimension `(B, P)`; theta is `(B,)`, own each example's probes."""
        cos, sin = jnp.cos(theta), jnp.sin(theta)
        log_snr = -2 * jnp.log(s * jnp.tan(theta))
        t = sde.time(log_snr)
        c = scale(log_snr, t)

        def velocity(u):
            """cos(theta) eps - sin(theta) x0 / s, where u = cos(theta) x0 / s + sin(theta) eps."""
            x0, eps = predict(score_fn, sde, expand(c, u) * u, t)
            return (expand(cos, u) * eps - expand(sin / s, u) * x0).astype(dtype)

        if probes is None:
            return velocity(u), jnp.zeros((u.shape[0], 1), dtype)
        if not shared and own.shape[1] == 1:
            value, product = _product(velocity, u, own[:, 0])
            return value, (own[:, 0] * product).reshape(u.shape[0], -1).sum(axis=1)[:, None] / num_dims
        value, product = _linearize(velocity, u)

        def quadratic(v):
            v = jnp.broadcast_to(v, u.shape)
            return (v * product(v)).reshape(u.shape[0], -1).sum(axis=1)

        if shared:
            many = max(1, min(len(probes), 1024 // u.shape[0]))
            total = jax.lax.map(lambda v: quadratic(v[None]), probes, batch_size=many).sum(axis=0)[:, None]
        else:
            total = jax.lax.map(quadratic, jnp.moveaxis(own, 1, 0)).T
        return value, total / num_dims

    first, last = sde.log_snr(t_end), terminal_log_snr(sde, dtype)
    start, stop = angle(first), angle(last)
    nodes = None
    if times is not None:
        nodes = angle(jnp.maximum(sde.log_snr(times[::-1]), LOWEST_LOG_SNR)).at[0].set(start).at[-1].set(stop)
    # Where log-SNR starts below what is integrated (VE with a very large sigma), only the scale changes up to t_max.
    t_max = jnp.asarray(sde.t_max, dtype)
    begin, end = scale(first, t_end), scale(sde.log_snr(t_max), t_max)
    u = x / begin
    solve = _adams if method == "adams" else functools.partial(_runge_kutta, method=method)
    u, log_det, evaluations, success = solve(rate, u, None if shared else probes, start, stop, nodes, rtol, atol, max_steps, batch_size)
    latent = jnp.where(expand(success.astype(dtype), u) > 0, end * u, jnp.nan)
    log_det = num_dims * (log_det + jnp.log(end / begin))
    log_prob = sde.prior_log_prob(latent) + log_det.mean(axis=1)
    if shared:
        standard_error = jnp.zeros_like(log_prob)
    elif log_det.shape[1] == 1:
        standard_error = jnp.full_like(log_prob, jnp.nan)
    else:
        standard_error = log_det.std(axis=1, ddof=1) / math.sqrt(log_det.shape[1])
    return Likelihood(log_prob, standard_error, latent, evaluations)


def _product(fn, u, v):
    """fn(u) and a w with v^T w = v^T J v, in one pass: cheaper than `_linearize` for a single v."""
    if _has_forward_mode(fn, u):
        return jax.jvp(fn, (u,), (v,))
    value, product = _linearize(fn, u)
    return value, product(v)


def _linearize(fn, u):
    """fn(u) and a function from v to a w with v^T w = v^T J v."""
    if _has_forward_mode(fn, u):
        return jax.linearize(fn, u)
    value, pullback = jax.vjp(fn, u)
    return value, lambda v: pullback(v)[0]


def _has_forward_mode(fn, u) -> bool:
    """Forward mode costs least, but a network with a custom backward pass knows reverse only."""
    try:
        # JAX says so where the product is batched or compiled, not before.
        jax.eval_shape(jax.vmap(lambda v: jax.jvp(fn, (u,), (v,))[1]), u[None])
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        return False
    return True


def _adams(rate, u, probes, start, stop, nodes, rtol, atol, max_steps, batch_size):
    if nodes is not None:
        # The method starts with order 1.
        split = nodes[0] + (nodes[1] - nodes[0]) * jnp.asarray([1 / 16, 1 / 8, 1 / 4, 1 / 2], nodes.dtype)
        nodes = jnp.concatenate([split, nodes[1:]])

    def weighted(theta, u, probes):
        # An error of u changes log p by eps / sin(theta) times it, and less where its direction is unrelated to eps.
        return *rate(theta, u, probes), jax.lax.rsqrt(jnp.sin(theta))

    def longest(theta):
        # Towards pi / 2 a network depends on log(pi / 2 - theta); without the limit, the last step takes e-folds of it at once.
        return 0.3 * (0.5 * math.pi + 0.02 - theta)

    # Without batch_size, score_fn may be of just these examples; on several devices, the batch may lie split over them.
    if batch_size is not None and jax.default_backend() == "cpu" and jax.device_count() == 1:
        weighted = _in_halves(weighted)
    return adams(weighted, u, probes, start, stop, rtol, atol, max_steps=max_steps, longest=longest, times=nodes, batch_size=batch_size)


def _in_halves(fn, smallest: int = 128):
    """fn of batched pytrees, by halves for batches from `smallest` examples on.

    A network's operations leave cores of a CPU idle, and XLA works on two halves at once: a fifth less time on two cores.
    """

    def both(*args):
        num = len(jax.tree.leaves(args)[0])
        if num < smallest:
            return fn(*args)
        halves = (fn(*jax.tree.map(lambda a: a[part], args)) for part in (slice(num // 2), slice(num // 2, None)))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *halves)

    return both


def _runge_kutta(rate, u, probes, start, stop, nodes, rtol, atol, max_steps, batch_size, *, method):
    import diffrax  # here, because importing it takes longer than the whole of this library

    solver = {"tsit5": diffrax.Tsit5, "dopri8": diffrax.Dopri8, "heun": diffrax.Heun}[method]()
    if nodes is None:
        controller = diffrax.PIDController(rtol=rtol, atol=atol, norm=_norm, dtmin=shortest_step(start), force_dtmin=False)
    else:
        controller, max_steps = diffrax.StepTo(nodes), len(nodes)

    def one(example):
        u, probes = jax.tree.map(lambda a: a[None], example)

        def slope(theta, state, _):
            value, density = rate(theta[None], state[0][None], probes)
            return value[0], density[0]

        density = jax.eval_shape(rate, start[None], u, probes)[1]
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(slope), solver, t0=start, t1=stop, dt0=None, y0=(u[0], jnp.zeros(density.shape[1:], density.dtype)),
            stepsize_controller=controller, max_steps=max_steps, throw=False,
        )  # fmt: skip
        u, log_det = (leaf[0] for leaf in solution.ys)
        return u, log_det, solution.stats["num_steps"], solution.ts[-1] == stop

    u, log_det, steps, success = jax.lax.map(one, (u, probes), batch_size=min(batch_size or len(u), len(u)))
    before, per_step = METHODS[method]
    return u, log_det, before + per_step * steps, success


def _norm(scaled_error) -> Float[Array, ""]:
    """The larger of the two errors, so that the log-density is not one coordinate among the D of x."""
    x, log_det = scaled_error
    return jnp.maximum(jnp.sqrt(jnp.mean(x**2)), jnp.abs(log_det.mean()))
