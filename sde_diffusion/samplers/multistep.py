"""Adams' multistep method with steps of its own for each example of a batch: one evaluation a step, whatever the order."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

ORDER = 3  # of the predictor, whose nodes are the newest; the corrector has one more
GAP = 0.002  # first step, of the whole range
SAFETY = 0.012  # the aimed-at error of a step, of the tolerance
# b of the filter H211b (Soederlind 2003, ACM Trans. Math. Softw. 29, table III): a step changes little, so that an error that is small by
# chance does not lengthen the next, and nodes that lie evenly integrate an oscillation with little error.
FILTER = 8
# What the integral's error counts for, beside that of u: its estimate is a single number, noisier than a mean square, and uneven steps
# cost more than they save.
INTEGRAL = 0.2
START = 6  # nodes after which the filter takes over from the plain rule, whose steps grow fast


class MultistepSolution(NamedTuple):
    """What `adams` returns, of each example."""

    state: Float[Array, "b ..."]  # u at the end
    integral: Float[Array, "b p"]  # of the second output of the rate
    evaluations: Int[Array, " b"]  # of the rate, of rejected steps as well
    success: Bool[Array, " b"]


class _Carry(NamedTuple):
    u: Any
    integral: Any
    times: Any  # (B, 4): of the newest nodes, newest first
    slopes: Any  # (ORDER, B, *event): du/dy there
    densities: Any  # (4, B, P): the integrand there
    count: Any  # nodes so far
    step: Any
    tried: Any
    done: Any
    success: Any
    error: Any  # of the last step that was accepted
    factor: Any  # from that step to the next


def adams(
    rate, u, start, stop, rtol, atol, *, max_steps: int, longest=lambda y: jnp.inf, times: Float[Array, " n"] | None = None
) -> MultistepSolution:  # fmt: skip
    """du/dy = rate(y, u)[0] and the integral of rate(y, u)[1], from y = start to stop.

    Predicts by the mean of Adams-Bashforth of orders 2 and 3, evaluates once, corrects by Adams-Moulton of order 4. An interval's integral
    is that of the cubic through the two nodes on either side of it. The order is low on purpose: a network is smooth only over short
    distances, and extrapolation of higher order amplifies its roughness. On an oscillation of a few steps the errors of the two orders
    are a quarter of a period apart, so that of their mean is smaller than either.

    Args:
      rate: `(y (B,), u (B, *event)) -> (du/dy (B, *event), integrand (B, P), weight (B,))`. The error in u counts times weight.
      rtol, atol: of one step, against the mean square over u and, five times as large, the mean over the P integrands.
      longest: `(y (B,)) -> (B,)`, the longest step from y.
      times: the nodes after `start`, shared by the batch, in place of steps by tolerance; the last is stop.
    """
    from equinox.internal import while_loop  # differentiable in reverse, as diffrax's own

    batch, dtype = u.shape[0], u.dtype
    fixed = times is not None
    y = jnp.full(batch, start, dtype)
    slope, density, _ = rate(y, u)
    rounding = 16 * jnp.finfo(dtype).eps * (stop - start)
    no, yes = jnp.zeros(batch, bool), jnp.ones(batch, bool)
    first = _Carry(
        u, jnp.zeros_like(density), jnp.tile(y[:, None], 4), jnp.zeros((ORDER, *u.shape), dtype).at[0].set(slope),
        jnp.zeros((4, *density.shape), dtype).at[0].set(density), jnp.ones(batch, int), jnp.full(batch, GAP * (stop - start), dtype),
        jnp.zeros(batch, int), no, no, jnp.full(batch, SAFETY, dtype), jnp.ones(batch, dtype),
    )  # fmt: skip

    def advance(c: _Carry) -> _Carry:
        y = c.times[:, 0]
        if fixed:
            new = jnp.full(batch, times[jnp.minimum(c.tried[0], len(times) - 1)])
            last = c.tried == len(times) - 1
        else:
            left, wanted = stop - y, jnp.minimum(c.step, longest(y))
            # The last two steps are equal: none is a sliver.
            step = jnp.where(2 * wanted > left, 0.5 * left, wanted)
            last = wanted >= 0.99 * left
            new = jnp.where(last, stop, y + step)
        # Examples that are done wait for the others, at nodes apart: coinciding ones would spoil the gradient.
        was = jnp.where(c.done[:, None], -jnp.arange(4, dtype=dtype)[None], c.times)
        at = jnp.where(c.done, 1.0, new)
        used = jnp.minimum(c.count, ORDER)
        explicit = (_weights(was[:, :ORDER], jnp.maximum(used - less, 1), was[:, 0], at) for less in (0, 1))
        predicted = c.u + _combine(0.5 * sum(explicit), c.slopes)
        slope, density, weight = rate(new, predicted)
        nodes = jnp.concatenate([at[:, None], was], axis=1)[:, :4]
        slopes, densities = jnp.concatenate([slope[None], c.slopes]), jnp.concatenate([density[None], c.densities])[:4]
        high, low = (_weights(nodes[:, : ORDER + 1], used + extra, was[:, 0], at) for extra in (1, 0))
        u = c.u + _combine(high, slopes)
        newest = _combine(high, densities)
        before = _combine(_weights(nodes, jnp.minimum(c.count + 1, 4), was[:, 1], was[:, 0]), densities)
        if fixed:
            accept, error, factor = ~c.done, c.error, c.factor
        else:
            error_u = weight * _rms(_combine(high - low, slopes) / (atol + rtol * jnp.maximum(jnp.abs(u), jnp.abs(c.u))))
            total = jnp.maximum(jnp.abs(c.integral), jnp.abs(c.integral + newest))
            error_integral = jnp.abs((_combine(high - low, densities) / (atol + rtol * total)).mean(axis=1))
            error = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(error_u, INTEGRAL * error_integral), 1e-8))
            accept = (error <= 1) & ~c.done
            order = used + 1.0
            plain = jnp.clip((SAFETY / error) ** (1 / order), 0.3, 2.0)
            filtered = (SAFETY**2 / (error * c.error)) ** (1 / (FILTER * order)) * c.factor ** (-1 / FILTER)
            factor = jnp.where((c.count < START) | (error > 1), plain, jnp.clip(filtered, 0.5, 1.25))
            factor = jnp.where(jnp.isnan(factor), 0.3, factor)
        last = last & accept
        # Whether the step has shrunk to nothing: the rate is not finite there.
        lost = ~accept & ~c.done & (c.step * factor < rounding)
        integral = c.integral + jnp.where((c.count > 1)[:, None], before, 0.0) + jnp.where(last[:, None], newest, 0.0)
        chosen = [(u, c.u), (integral, c.integral), (nodes, c.times)]
        u, integral, nodes = (jnp.where(_expand(accept, a), a, b) for a, b in chosen)
        slopes = jnp.where(_expand(accept, u)[None], slopes[:ORDER], c.slopes)
        densities = jnp.where(accept[None, :, None], densities, c.densities)
        return _Carry(
            u, integral, nodes, slopes, densities, c.count + accept, jnp.where(c.done, c.step, c.step * factor), c.tried + ~c.done,
            c.done | last | lost, c.success | last, jnp.where(accept, error, c.error), jnp.where(accept, factor, c.factor),
        )  # fmt: skip

    def unfinished(c: _Carry):
        return ~c.done.all() & (c.tried.max() < max_steps)

    last = while_loop(unfinished, advance, first, max_steps=max_steps, kind="checkpointed")
    return MultistepSolution(last.u, last.integral, 1 + last.tried, last.success & yes)


def _weights(nodes, count, low, high):
    """Integrals from low to high of the Lagrange polynomials of the first `count` of the nodes, `(B, K)`; 0 for the others."""
    k = nodes.shape[1]
    places, weights = (a.astype(nodes.dtype) for a in np.polynomial.legendre.leggauss(-(-k // 2)))
    at = low[:, None] + (high - low)[:, None] * (0.5 + 0.5 * places)[None]  # (B, Q)
    real = jnp.arange(k)[None] < count[:, None]
    other = real[:, None, :] & ~np.eye(k, dtype=bool)[None]
    apart = jnp.where(other, nodes[:, :, None] - nodes[:, None, :], 1.0)
    factors = jnp.where(other[:, None], at[:, :, None, None] - nodes[:, None, None, :], 1.0) / apart[:, None]
    integrals = (0.5 * weights[None, :, None] * factors.prod(axis=-1)).sum(axis=1) * (high - low)[:, None]
    return jnp.where(real, integrals, 0.0)


def _combine(weights, values):
    """Sum over k of weights `(B, K)` times values `(K, B, ...)`."""
    return jnp.einsum("bk,kb...->b...", weights, values, precision="highest")


def _expand(mask, x):
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def _rms(x):
    return jnp.sqrt(jnp.mean(x.reshape(x.shape[0], -1) ** 2, axis=1))
