"""What multistep methods integrate, and their tables: polynomials through what past evaluations said."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sde_diffusion.samplers.linear import Steps, Table
from sde_diffusion.sde import Number

# How wrong eps_hat is at the prior, of a network that predicts it.
_EPS_ERROR = 0.002


@dataclasses.dataclass(frozen=True)
class Space:
    """What a multistep method integrates: x_s = factor x_t + integral of y over the step + noise z.

    y is one linear combination of x0_hat and eps_hat, interpolated by a polynomial in a variable u.

    Attributes:
      x0, eps: y = x0 x0_hat + eps eps_hat at each time of the grid, `(N + 1,)`.
      factor: of the state in each step, `(N,)`.
      length: u_{i+1} - u_i, `(N,)`.
      points: u - u_i at the quadrature points of each step, `(N, G)`.
      weights: of the points, with the measure of the integral, `(N, G)`.
      noise: standard deviation of what each step adds, `(N,)`, or None.
      origin: u - u_i where y is known to vanish, before the first time, `(N,)`, infinite where that may not count, or None: a node without
        an evaluation, as long as the history is short.
      h: steps in log(alpha / sigma), `(N,)`, for methods with a corrector: nodes that are too close do not count (`_distinct`). Or None.
    """

    x0: Float[Array, " times"]
    eps: Float[Array, " times"]
    factor: Float[Array, " steps"]
    length: Float[Array, " steps"]
    points: Float[Array, "steps points"]
    weights: Float[Array, "steps points"]
    noise: Float[Array, " steps"] | None = None
    origin: Float[Array, " steps"] | None = None
    h: Float[Array, " steps"] | None = None


def _quadrature(length: Float[Array, " steps"]) -> tuple[Float[Array, "steps points"], Float[Array, "steps points"]]:
    """Points from 0 to each length, and their weights, `(N, G)`: Gauss-Legendre, exact to rounding for what is here."""
    nodes, weights = (jnp.asarray(0.5 * a, length.dtype)[None] for a in np.polynomial.legendre.leggauss(24))
    return (0.5 + nodes) * length[:, None], weights * length[:, None]


def root_decay(y):
    """sqrt(1 - e^(-y^2)), with its derivative at 0, 1."""
    square = y**2
    return y * jnp.sqrt(jnp.where(square > 0, -jnp.expm1(-square) / jnp.where(square > 0, square, 1.0), 1.0))


def data_space(steps: Steps, corrected: bool = False) -> Space:
    """x0 over l = log(alpha / sigma), for any noise level (arXiv:2211.01095 eq. 8; arXiv:2309.05019 eq. 14).

    x_s = sigma_s / sigma_t e^(-tau^2 h) x_t + alpha_s (1 + tau^2) int e^(-(1 + tau^2)(l_s - l)) x0 dl
    + sigma_s sqrt(1 - e^(-2 tau^2 h)) z. corrected: for a method with a corrector, see `Space.h`.
    """
    one, h, shrink = jnp.ones_like(steps.time), steps.h, steps.sigma[1:] / steps.sigma[:-1]
    tau2 = jnp.asarray(0.0 if steps.noise_level is None else steps.noise_level, h.dtype) ** 2
    points, weights = _quadrature(h)
    kernel = steps.alpha[1:, None] * (1 + tau2) * jnp.exp((1 + tau2) * (points - h[:, None]))
    noise = None
    if steps.noise_level is not None:
        noise = steps.sigma[1:] * root_decay(steps.noise_level * jnp.sqrt(2 * h))
    return Space(one, 0 * one, shrink * jnp.exp(-tau2 * h), h, points, weights * kernel, noise, h=h if corrected else None)


def gaussian_space(steps: Steps, scale: Number | Float[Array, " steps"]) -> Space:
    """y = x0_hat - s^2 eps_hat / q over l = log(alpha / sigma), q = sigma / alpha, for any noise level: the project's own.

    Where the data is N(m, s^2 I), y is m whatever x and t: a method of any order is exact there, in any number of steps and for any tau.
    With P^2 = s^2 + q^2, c = alpha P and r the ratio of P at the end of the step to P at its beginning

    x_s = c_s / c_t r^(tau^2) x_t + alpha_s (1 + tau^2) int (P_s / P)^(1 + tau^2) (q / P)^2 y dl + c_s sqrt(1 - r^(2 tau^2)) z.

    scale: s, one for all steps or one for each, `(N,)`; towards 0 this is `data_space`.
    """
    h, q = steps.h, jnp.exp(-steps.half_log_snr)
    s = jnp.broadcast_to(jnp.asarray(scale, h.dtype), h.shape)
    tau2 = jnp.asarray(0.0 if steps.noise_level is None else steps.noise_level, h.dtype) ** 2
    # At zero SNR as at the one by which the steps count.
    alpha = jnp.where(steps.alpha > 0, steps.alpha, steps.sigma * jnp.exp(steps.half_log_snr))
    before, after = jnp.hypot(q[:-1], s), jnp.hypot(q[1:], s)
    shrink = 0.5 * _log_ratio((q[:-1] / before) ** 2 * jnp.expm1(-2 * h), (after / before) ** 2)  # log r
    points, weights = _quadrature(h)
    there = q[:-1, None] * jnp.exp(-points)
    around = jnp.hypot(there, s[:, None])
    # Their sum in closed form: in a step of many powers of e the kernel is too steep for the quadrature.
    kernel = jax.nn.softmax(jnp.log(weights) + 2 * jnp.log(there / around) - (1 + tau2) * jnp.log(around), axis=1)
    weights = -steps.alpha[1:, None] * jnp.expm1((1 + tau2) * shrink)[:, None] * kernel
    factor = steps.alpha[1:] / alpha[:-1] * jnp.exp((1 + tau2) * shrink)
    noise = None if steps.noise_level is None else steps.alpha[1:] * after * root_decay(steps.noise_level * jnp.sqrt(-2 * shrink))
    s = jnp.append(s, s[-1])
    return Space(jnp.ones_like(q), -s * (s / q), factor, h, points, weights, noise, h=h)


def noise_space(steps: Steps) -> Space:
    """eps over l = log(alpha / sigma): x_s / alpha_s = x_t / alpha_t - int e^(-l) eps dl (arXiv:2206.00927 eq. 3.4)."""
    one, h = jnp.ones_like(steps.time), steps.h
    points, weights = _quadrature(h)
    kernel = -steps.sigma[1:, None] * jnp.exp(h[:, None] - points)
    return Space(0 * one, one, steps.alpha[1:] / steps.alpha[:-1], h, points, weights * kernel)


def sigma_space(steps: Steps) -> Space:
    """eps over sigma / alpha: d(x / alpha) = eps d(sigma / alpha) (arXiv:2206.00364 eq. 4)."""
    one, ratio = jnp.ones_like(steps.time), steps.sigma / steps.alpha
    length = ratio[:-1] * jnp.expm1(-steps.h)
    points, weights = _quadrature(length)
    return Space(0 * one, one, steps.alpha[1:] / steps.alpha[:-1], length, points, weights * steps.alpha[1:, None])


def residual(alpha, sigma, s):
    """(x0, eps) of w = eps - sin(theta) x / c, what eps is more than for N(0, s^2 I), and c = sqrt(alpha^2 s^2 + sigma^2).

    theta = arctan(sigma / (alpha s)); w = cos(theta)^2 eps - sin(theta) cos(theta) x0 / s.
    """
    c = jnp.sqrt((alpha * s) ** 2 + sigma**2)
    sine, cosine = sigma / c, alpha * s / c
    return (-sine * cosine / s, cosine**2), c


def _log_ratio(share, ratio):
    """log(ratio), by share = ratio - 1 where that has the more digits: not near -1, after a step of many powers of e."""
    return jnp.where(share > -0.5, jnp.log1p(jnp.maximum(share, -0.5)), jnp.log(ratio))


def residual_space(steps: Steps, scale, fine, coarse) -> Space:
    """w of `residual` for the standard deviation `scale`, over log((q + fine) / (q + coarse)), q = sigma / alpha: the project's own.

    With theta = arctan(q / scale), c = sqrt(alpha^2 scale^2 + sigma^2) and w = eps - sin(theta) x / c, the ODE is
    d(x / c) = w dtheta / cos(theta) = w dzeta, zeta = asinh(tan theta). No linear part is left, w vanishes on N(0, scale^2 I),
    and its scale is that of the error of a network that predicts eps. Between the scales `fine` and `coarse` (which may be 0 and infinite),
    where data has its structure, the variable is log(sigma / alpha), of which grids take about equal steps. Data that is not centred makes
    w proportional to cos(theta) at high noise, where it is alpha / sigma, and below all structure w is smooth in sigma: a polynomial
    follows both.
    """
    # At zero SNR as at the one by which the steps count: what is kept would vanish there, and the first move with it.
    alpha = jnp.where(steps.alpha > 0, steps.alpha, steps.sigma * jnp.exp(steps.half_log_snr))
    (x0, eps), c = residual(alpha, steps.sigma, scale)
    q = jnp.exp(-steps.half_log_snr)
    radius = jnp.hypot(q, scale)  # whose square may be infinite
    up, down = 0.5 * (q + radius), 0.5 * scale * (scale / (q + radius))  # q = up - down, and zeta = log(2 up / scale)
    grows = q[:-1] * jnp.expm1(-steps.h) * (1 + (q[1:] + q[:-1]) / (radius[1:] + radius[:-1]))  # q + radius, by that
    length = _log_ratio(grows / (q + radius)[:-1], up[1:] / up[:-1])
    points, weights = _quadrature(length)
    along = jnp.concatenate([points, length[:, None]], axis=1)

    def change(times, by):
        """Of q where zeta changes by that: two terms of one sign."""
        return up[times, None] * jnp.expm1(by) - down[times, None] * jnp.expm1(-by)

    # How far the variable is, at the points and at the end of each step, from where the step begins. q there goes by the lesser end.
    start, there = q[:-1, None], q[1:, None] + change(slice(1, None), along - length[:, None])
    share = change(slice(-1), along) / (start + fine) * ((1 - fine / coarse) / (1 + there / coarse))
    moved = _log_ratio(share, (there + fine) / (start + fine) * ((1 + start / coarse) / (1 + there / coarse)))
    return Space(x0, eps, c[1:] / c[:-1], moved[:, -1], moved[:, :-1], weights * c[1:, None], h=steps.h)


# In a step this many times as long as what lies between two nodes one of them does not count: the slope between these is their errors'.
_CLOSE = 8
# Steps that count the origin, unless they are the last: after them the history of order 4 is full.
_SHORT = 3


def with_origin(steps: Steps, space: Space, fine, coarse) -> Space:
    """A `residual_space` of these scales with a node that is known of old: w vanishes at infinite noise. The project's own.

    So the first steps, whose history is short, are of one order more, which in the directions of the largest variances is most of the
    error. Only from within ten times the data's radius s sqrt(D) (of 64 dimensions, where it has fewer): from further out these steps leave
    less, and of two nodes so close a network is not exact enough to tell a slope.
    """
    q, length = jnp.exp(-steps.half_log_snr[0]), space.length
    near = q < 10 * steps.sigma_data * max(8.0, math.sqrt(steps.event_size))
    to_first = jnp.log1p((coarse - fine) / (q + fine))
    return dataclasses.replace(space, origin=jnp.where(near, to_first + length - jnp.cumsum(length), jnp.inf))


def _weights(space: Space, nodes: Float[Array, "steps nodes"], known) -> Float[Array, "steps nodes"]:
    """The integral of each node's Lagrange polynomial over every step.

    nodes: u_node - u_i of each step i, of which the ones in `known` `(N, K)` count.
    """
    # (u - u_m) / (u_j - u_m) for step, j, m, point; 1 where it does not count.
    other = known[:, None, :] & known[:, :, None] & ~np.eye(nodes.shape[1], dtype=bool)[None]
    apart = jnp.where(other, nodes[:, :, None] - nodes[:, None, :], 1.0)
    factors = jnp.where(other[..., None], (space.points[:, None, None, :] - nodes[:, None, :, None]) / apart[..., None], 1.0)
    return jnp.where(known, (space.weights[:, None, :] * factors.prod(axis=2)).sum(axis=2), 0.0)


def _interpolated(space: Space, nodes, known):
    """As `_weights`, with the space's origin, if any, among the nodes of the first steps."""
    if space.origin is None:
        return _weights(space, nodes, known)
    # Not in the last step, which is long where there are so few, and which nothing corrects.
    counts = (np.arange(len(known)) < min(_SHORT, len(known) - 1)) & jnp.isfinite(space.origin)
    nodes = jnp.concatenate([nodes, jnp.where(counts, space.origin, 0.0)[:, None]], axis=1)
    return _weights(space, nodes, jnp.concatenate([known, counts[:, None]], axis=1))[:, :-1]


def _nodes(length: Float[Array, " steps"], num: int) -> Float[Array, "steps num"]:
    """u_{i - j} - u_i for j < num, of these steps in u; what lies before the grid is not known, and masked by the caller."""
    index = jnp.arange(len(length))[:, None] + num - jnp.arange(1, num)[None]
    length = jnp.concatenate([jnp.zeros(num, length.dtype), length])
    return jnp.pad(-jnp.cumsum(length[index], axis=1), ((0, 0), (1, 0)))


def orders(num: int, order: int, taper: int = 0) -> np.ndarray:
    """The order of each of `num` steps `(num,)`: rising from 1 at the start; also falling to 1 at the end of runs of fewer
    than `taper` steps, whose last step would extrapolate far (arXiv:2211.01095 section 5)."""
    i = np.arange(num)
    return np.minimum(np.minimum(order, i + 1), num - i if num < taper else order)


def _distinct(space: Space, num: int):
    """Which of the last `num` nodes count, `(N, num)`: those far enough from the newer ones that do, in the space's variable or log-SNR.

    Grids by name, whose steps change slowly in one of these, lose none, but in the last step of a few. Arrays may: where the end of a
    long step was predicted, then corrected, and is followed by a short step, the slope over that is the correction's, and a long step next
    would multiply it.
    """
    if space.h is None:
        return np.ones((len(space.length), num), bool)

    def far(length):
        newest, counts = 0.0, [np.ones(len(length), bool)]
        for node in _nodes(length, num).T[1:]:
            counts.append(jnp.abs(node - newest) >= jnp.abs(length) / _CLOSE)
            newest = jnp.where(counts[-1], node, newest)
        return jnp.stack(counts, axis=1)

    return far(space.length) | far(space.h)


def adams_bashforth(space: Space, order: np.ndarray) -> Float[Array, "steps order"]:
    """History factors of the explicit multistep method: y interpolated at the last `order` times, given for each step."""
    num = int(order.max())
    return _interpolated(space, _nodes(space.length, num), (np.arange(num)[None] < order[:, None]) & _distinct(space, num))


def adams_moulton(space: Space, order: np.ndarray, later: bool = False) -> Float[Array, "steps nodes"]:
    """History factors of the implicit one: y interpolated at the end of the step, which comes first, and at the last
    `order` times. Of order `order` + 1. With `later` also at the end of the next step, before these, unless that is far shorter,
    and of one order more; the last row, which has no next, means nothing then."""
    num = int(order.max())
    nodes = jnp.concatenate([space.length[:, None], _nodes(space.length, num)], axis=1)
    known = jnp.pad((np.arange(num)[None] < order[:, None]) & _distinct(space, num), ((0, 0), (1, 0)), constant_values=True)
    if later:
        following = jnp.append(space.length[1:], 1.0)
        counts = jnp.abs(following) >= jnp.abs(space.length) / _CLOSE
        nodes = jnp.concatenate([(space.length + following)[:, None], nodes], axis=1)
        known = jnp.concatenate([counts[:, None], known], axis=1)
    return _interpolated(space, nodes, known)


def midpoint(space: Space, order: np.ndarray) -> Float[Array, "steps 2"]:
    """As `adams_bashforth` of order 2, with y taken half-way through the step: bounded where steps grow."""
    first = adams_bashforth(space, np.ones_like(order))[:, 0]
    slope = 0.5 * space.length[1:] / space.length[:-1]
    slope = jnp.where((order == 2) & _distinct(space, 2)[:, 1], jnp.pad(slope, (1, 0)), 0.0)
    return first[:, None] * jnp.stack([1 + slope, -slope], axis=1)


def multistep(
    steps: Steps, space: Space, explicit: Float[Array, "steps p"], implicit: Float[Array, "steps q"] | None = None,
    late: Float[Array, "steps r"] | None = None,
) -> Table:  # fmt: skip
    """The table of an explicit method; with an implicit one, every step is redone once its end has been evaluated.

    The corrector costs no evaluation: y at the predicted end serves the correction and the next step (PEC). It moves
    the state by (implicit - explicit) y, which folds into the next row. By `late`, factors of `adams_moulton(later=True)`,
    which need implicit ones, every step but the last two is redone again once the end of the next has been evaluated.
    """
    history = explicit
    if implicit is not None:
        num = max(explicit.shape[1] + 1, implicit.shape[1], 0 if late is None else late.shape[1])

        def widen(a, before):
            return jnp.pad(a, ((0, 0), (before, num - before - a.shape[1])))

        # Row i corrects the step that ended at t_i, where y_{i-1} was the explicit method's newest.
        correction = (widen(implicit, 0) - widen(explicit, 1))[:-1]
        history = widen(explicit, 0) + space.factor[:, None] * jnp.pad(correction, ((1, 0), (0, 0)))
        if late is not None:
            # And, where it has two, the step before that.
            again = (widen(late, 0) - widen(implicit, 1))[:-2]
            history = history.at[2:].add((space.factor[1:-1] * space.factor[2:])[:, None] * again)
    return Table(steps.time[:-1], space.x0[:-1], space.eps[:-1], space.factor, history, noise=space.noise)


def centred(steps: Steps, table: Table, scale) -> Table:
    """A solver in a `residual_space` of this scale s that also integrates what the first evaluation tells of the mean: the project's own.

    For N(m, s^2 I), whatever m, w is proportional to g = sin(theta) cos(theta), whose integral over zeta is known. So of every w the first
    one's g / g_0 is left to that integral, and only the rest is interpolated: with weight one the solver is exact for N(m, s^2 I), and
    where the data and the start are moved, the samples move with them.

    An error of eps_hat counts 1 / cos(theta_0) times in such a mean. Hence the weight 1 / (1 + (0.002 / cos(theta_0))^2): for data
    of s = 1/2 0.73 under `VP()`, 0.96 under `VE()`, next to nothing close to zero SNR, but one at zero SNR, from which no
    network predicts eps.
    """
    share, whole = _told(steps, scale, 0)
    return dataclasses.replace(table, first=whole - (table.history * _before(share, table.history.shape[1])).sum(axis=1))


def ahead(steps: Steps, table: Table, scale) -> Table:
    """As `centred`, without the evaluation at the first time, which tells next to nothing but the mean; one row less: the project's own.

    The state is scaled to the second time, as for N(0, s^2 I), and evaluated there. What that tells of the mean, y_1, stands for the first
    time's evaluation too, as weight g_0 / g_1 y_1; of the rest nothing is known there. With weight one exact for N(m, s^2 I) too: w is the
    same at every x. Where a direction of the data has a variance v of its own, the state evaluated is off by the share alpha^2 (v - s^2) /
    (2 sigma^2) of it: for few steps, from where sigma is many times alpha s.
    """
    share, whole = _told(steps, scale, 1)
    # Nothing of the first time.
    known = np.arange(steps.num)[:, None] > np.arange(table.history.shape[1])[None]
    history = jnp.where(known, table.history, 0.0)
    first = whole - (history * _before(share, history.shape[1])).sum(axis=1)
    first = first.at[1].add(table.state[1] * first[0])
    before = jnp.ones_like(table.state).at[1].set(table.state[0])
    return jax.tree.map(lambda a: a[1:], dataclasses.replace(table, history=history, first=first, scale=before))


def _told(steps: Steps, scale, at: int):
    """Of the evaluation at one time: the share of each w that its mean explains, and its integral over each step, `(N,)` each."""
    tan = jnp.exp(-steps.half_log_snr) / scale  # of theta: sinh(zeta)
    cosh = jnp.hypot(1.0, tan)  # 1 / cos(theta)
    weight = jnp.where(steps.alpha[at] > 0, 1 / (1 + (_EPS_ERROR * cosh[at]) ** 2), 1.0)
    trusted = weight * cosh[at] * (cosh[at] / tan[at])
    # Of cosh, without a difference of large numbers.
    falls = tan[:-1] * jnp.expm1(-steps.h) * ((tan[1:] + tan[:-1]) / (cosh[1:] + cosh[:-1]))
    c = jnp.hypot(steps.alpha[1:] * scale, steps.sigma[1:])
    return trusted * (tan[:-1] / cosh[:-1]) / cosh[:-1], trusted * (falls / cosh[1:] / cosh[:-1]) * c


def _before(values, num: int):
    """values_{i - j} for j < num, `(R, num)`; 0 before the first."""
    return jnp.pad(values, (num - 1, 0))[np.arange(len(values))[:, None] + np.arange(num)[::-1]]
