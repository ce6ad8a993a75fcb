"""Adams' multistep method with steps of its own for each example of a batch: one evaluation a step, whatever the order."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

ORDER = 3  # of the predictor, whose nodes are the newest; the corrector has one more
BLEND = 0.125  # the part of one order less in the predictor: the two err to opposite sides in log p
GAP = 0.002  # first step, of the whole range
SAFETY = 0.012  # the aimed-at error of a step, of the tolerance
# b of the filter H211b (Soederlind 2003, ACM Trans. Math. Softw. 29, table III): a step changes little, so that an error that is small by
# chance does not lengthen the next, and nodes that lie evenly integrate an oscillation with little error.
FILTER = 4
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
    """Of each example; B is the batch."""

    u: Any
    integral: Any
    times: Any  # (B, 4): of the newest nodes, newest first
    slopes: Any  # (B, ORDER, *event): du/dy there
    densities: Any  # (B, 4, P): the integrand there
    count: Any  # nodes so far
    step: Any
    tried: Any  # evaluations so far
    done: Any
    success: Any
    error: Any  # of the last step that was accepted
    factor: Any  # from that step to the next


def adams(
    rate, u, args, start, stop, rtol, atol, *, max_steps: int, longest=lambda y: jnp.inf, times: Float[Array, " n"] | None = None,
    batch_size: int | None = None,
) -> MultistepSolution:  # fmt: skip
    """du/dy = rate(y, u, args)[0] and the integral of rate(y, u, args)[1], from y = start to stop.

    Predicts by Adams-Bashforth of order 3, an eighth of it of order 2, evaluates once, corrects by Adams-Moulton of order 4. An interval's
    integral is that of the cubic through the two nodes on either side of it. The order is low on purpose: a network is smooth only over
    short distances, and extrapolation of higher order amplifies its roughness.

    Args:
      rate: `(y (B,), u (B, *event), args) -> (du/dy (B, *event), integrand (B, P), weight (B,))`. The error in u counts times weight.
      args: arrays with a first axis of the batch.
      rtol, atol: of one step, against the mean square over u and, five times as large, the mean over the P integrands.
      longest: `(y (B,)) -> (B,)`, the longest step from y.
      times: the nodes after `start`, shared by the batch, in place of steps by tolerance; the last is stop.
      batch_size: B of `rate`, all by default. Where an example is done, the next takes its place; the last ones go on in a quarter of it,
        so that few wait for the slowest.
    """
    from equinox.internal import while_loop  # differentiable in reverse, as diffrax's own

    num, dtype = u.shape[0], u.dtype
    sizes = [num] if batch_size is None else [size for size in (min(batch_size, num), min(batch_size, num) // 4) if size]
    eps = jnp.finfo(dtype).eps
    if times is not None:
        max_steps = len(times)
    # The first evaluation, at the start, is a step of length 0: a program holds the network once.
    y = jnp.full(num, start, dtype)
    _, density, _ = jax.eval_shape(rate, *jax.tree.map(lambda a: a[: sizes[0]], (y, u, args)))
    density = jnp.zeros((num, *density.shape[1:]), density.dtype)
    no, ones, none = jnp.zeros(num, bool), jnp.ones(num, dtype), jnp.zeros(num, int)
    first = _Carry(
        u, density, jnp.tile(y[:, None], 4), jnp.zeros((num, ORDER, *u.shape[1:]), dtype),
        jnp.zeros((num, 4, *density.shape[1:]), density.dtype), none, GAP * (stop - start) * ones, none, no, no, SAFETY * ones, ones,
    )  # fmt: skip

    def advance(c: _Carry, args) -> _Carry:
        y, fresh = c.times[:, 0], c.count == 0
        if times is not None:
            new = times[jnp.clip(c.tried - 1, 0, len(times) - 1)]
            last = c.tried == len(times)
        else:
            left, wanted = stop - y, jnp.minimum(c.step, longest(y))
            # The last two steps are equal: none is a sliver.
            step = jnp.where(2 * wanted > left, 0.5 * left, wanted)
            last = wanted >= 0.99 * left
            new = jnp.where(last, stop, y + step)
        last = last & ~fresh
        # Examples at their start, or done and waiting for the others, are at nodes apart: coinciding ones would spoil the gradient.
        idle = c.done | fresh
        was = jnp.where(idle[:, None], -jnp.arange(4, dtype=dtype)[None], c.times)
        at = jnp.where(idle, 1.0, new)
        used = jnp.clip(c.count, 1, ORDER)
        high, low = (_weights(was[:, :ORDER], order, was[:, 0], at) for order in (used, jnp.maximum(used - 1, 1)))
        predicted = c.u + _combine((1 - BLEND) * high + BLEND * low, c.slopes)
        slope, density, weight = rate(jnp.where(fresh, start, new), predicted, args)
        nodes = jnp.concatenate([at[:, None], was], axis=1)[:, :4]
        slopes = jnp.concatenate([slope[:, None], c.slopes], axis=1)
        densities = jnp.concatenate([density[:, None], c.densities], axis=1)[:, :4]
        high, low = (_weights(nodes[:, : ORDER + 1], used + extra, was[:, 0], at) for extra in (1, 0))
        u = c.u + _combine(high, slopes)
        newest = _combine(high, densities)
        before = _combine(_weights(nodes, jnp.minimum(c.count + 1, 4), was[:, 1], was[:, 0]), densities)
        if times is not None:
            accept, error, factor = ~c.done, c.error, c.factor
        else:
            error_u = weight * _rms(_combine(high - low, slopes) / (atol + rtol * jnp.maximum(jnp.abs(u), jnp.abs(c.u))))
            total = jnp.maximum(jnp.abs(c.integral), jnp.abs(c.integral + newest))
            error_integral = jnp.abs((_combine(high - low, densities) / (atol + rtol * total)).mean(axis=1))
            error = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(error_u, INTEGRAL * error_integral), 1e-8))
            accept = ((error <= 1) | fresh) & ~c.done
            order = used + 1.0
            plain = jnp.clip((SAFETY / error) ** (1 / order), 0.3, 2.0)
            filtered = (SAFETY**2 / (error * c.error)) ** (1 / (FILTER * order)) * c.factor ** (-1 / FILTER)
            factor = jnp.where((c.count < START) | (error > 1), plain, jnp.clip(filtered, 0.5, 1.25))
            factor = jnp.where(fresh, 1.0, jnp.where(jnp.isnan(factor), 0.3, factor))
        moved = accept & ~fresh
        last = last & accept
        # Whether the step has shrunk to nothing beside y: the rate is not finite there.
        lost = ~accept & ~c.done & (c.step * factor < 16 * eps * jnp.maximum(jnp.abs(was[:, 0]), eps * (stop - start)))
        integral = c.integral + jnp.where((c.count > 1)[:, None], before, 0.0) + jnp.where(last[:, None], newest, 0.0)
        chosen = ((moved, u, c.u), (moved, integral, c.integral), (moved, nodes, c.times), (accept, slopes[:, :ORDER], c.slopes),
                  (accept, densities, c.densities), (moved, error, c.error), (accept, factor, c.factor))  # fmt: skip
        u, integral, nodes, slopes, densities, error, kept = (jnp.where(_expand(mask, a), a, b) for mask, a, b in chosen)
        tried = c.tried + ~c.done
        return _Carry(
            u, integral, nodes, slopes, densities, c.count + accept, jnp.where(c.done, c.step, c.step * factor), tried,
            c.done | last | lost | (tried > max_steps), c.success | last, error, kept,
        )  # fmt: skip

    def some(size: int, c: _Carry) -> _Carry:
        """Advances the first that are not done."""
        if size == num:
            return advance(c, args)
        # A number beyond them all reads some example and writes nowhere.
        which = jnp.nonzero(~c.done, size=size, fill_value=num)[0]
        new = advance(*jax.tree.map(lambda a: a[which], (c, args)))
        return jax.tree.map(lambda a, b: a.at[which].set(b, mode="drop"), c, new)

    last = first
    for size, rest in zip(sizes, [*sizes[1:], 0]):
        most = (max_steps + 1) * -(-num // sizes[0])
        last = while_loop(
            lambda c, rest=rest: (~c.done).sum() > rest, functools.partial(some, size), last, max_steps=most, kind="checkpointed"
        )
    return MultistepSolution(last.u, last.integral, last.tried, last.success)


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
    """Sum over k of weights `(B, K)` times values `(B, K, ...)`."""
    return (_expand(weights, values) * values).sum(axis=1)


def _expand(mask, x):
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def _rms(x):
    return jnp.sqrt(jnp.mean(x.reshape(x.shape[0], -1) ** 2, axis=1))
