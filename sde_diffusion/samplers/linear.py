"""Linear samplers: a solver is a table of coefficients, and one `lax.scan` runs any of them.

All fixed-grid solvers of the literature, one-step or multistep, deterministic or not, move the state by a linear
combination of what the network has said so far. So a solver is a function from a grid (`Steps`) to a `Table`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sde_diffusion.prediction import predict
from sde_diffusion.sde import SDE, Number, pytree_dataclass
from sde_diffusion.times import lowest_log_snr

# How many numbers an event holds, where nothing is said of it.
EVENT_SIZE = 64
# How wrong eps_hat is at the prior, of a network that predicts it.
_EPS_ERROR = 0.002
# An array of floats; under a JAX transformation, whatever leaf JAX puts in its place.
Leaf = Any


@pytree_dataclass
class Table:
    """A solver's coefficients: row i is one evaluation, at time t_i.

    It evaluates the network at u_i = scale_i x_i, keeps y_i = x0_i x0_hat + eps_i eps_hat, and moves the state to

        x_{i+1} = state_i u_i + sum_{j<K} history_ij y_{i-j} + first_i y_0 + noise_i z_i,  z_i ~ N(0, I).

    Attributes:
      time: of the evaluations, `(R,)`; there are R / N rows for each of the grid's N steps.
      x0, eps: what is kept of an evaluation, `(R,)` each.
      state: factor of the state, `(R,)`.
      history: factors of this evaluation and those before it, the newest first, `(R, K)`; zero where there is none.
      first: factors of the first evaluation of all, `(R,)`, or None.
      noise: standard deviation of what is added, `(R,)`, or None for a deterministic solver.
      scale: factors of the state before its evaluation, `(R,)`, or None for 1: where that is at another time than the state's.
      stages: R / N, the evaluations of a step.
    """

    time: Leaf
    x0: Leaf
    eps: Leaf
    state: Leaf
    history: Leaf
    first: Leaf = None
    noise: Leaf = None
    scale: Leaf = None
    stages: int = dataclasses.field(default=1, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Steps:
    """A decreasing time grid as a solver sees it: N steps between N + 1 times.

    Attributes:
      sde: the process.
      time, alpha, sigma: of the grid, `(N + 1,)` each.
      half_log_snr: log(alpha / sigma) `(N + 1,)`; at zero terminal SNR, where it is infinite, -10 (less log sigma_data where that is above
        1), or 1/2 less than the next. An SNR that is no number of float32's is zero, and alpha with it.
      sigma_data: standard deviation of the data.
      event_size: D, how many numbers an event holds.
      noise_level: tau, from 0 (the probability-flow ODE) over 1 (the reverse SDE) to beyond; None for a deterministic solver.
    """

    sde: SDE
    time: Float[Array, " times"]
    alpha: Float[Array, " times"]
    sigma: Float[Array, " times"]
    half_log_snr: Float[Array, " times"]
    sigma_data: Number
    event_size: int
    noise_level: Number

    @classmethod
    def of(cls, sde: SDE, time: Float[Array, " times"], sigma_data=0.5, event_size=EVENT_SIZE, noise_level=None) -> "Steps":
        """The steps of a grid of times."""
        log_snr = sde.log_snr(time)
        some = log_snr > -150.0
        log_snr = jnp.where(some, log_snr, jnp.minimum(lowest_log_snr(sigma_data), log_snr[1] - 1))
        return cls(sde, time, jnp.where(some, sde.alpha(time), 0.0), sde.sigma(time), 0.5 * log_snr, sigma_data, event_size, noise_level)

    @property
    def num(self) -> int:
        """N."""
        return self.time.shape[0] - 1

    @property
    def h(self) -> Float[Array, " steps"]:
        """Lengths of the steps in log(alpha / sigma), positive, `(N,)`."""
        return jnp.diff(self.half_log_snr)

    def between(self, fraction: float):
        """(time, alpha, sigma) where each step has done this fraction of its length in log(alpha / sigma), `(N,)` each."""
        time = self.sde.time(2 * (self.half_log_snr[:-1] + fraction * self.h))
        return time, self.sde.alpha(time), self.sde.sigma(time)


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
    """

    x0: Float[Array, " times"]
    eps: Float[Array, " times"]
    factor: Float[Array, " steps"]
    length: Float[Array, " steps"]
    points: Float[Array, "steps points"]
    weights: Float[Array, "steps points"]
    noise: Float[Array, " steps"] | None = None


def _quadrature(length: Float[Array, " steps"]) -> tuple[Float[Array, "steps points"], Float[Array, "steps points"]]:
    """Points from 0 to each length, and their weights, `(N, G)`: Gauss-Legendre, exact to rounding for what is here."""
    nodes, weights = (jnp.asarray(0.5 * a, length.dtype)[None] for a in np.polynomial.legendre.leggauss(24))
    return (0.5 + nodes) * length[:, None], weights * length[:, None]


def data_space(steps: Steps) -> Space:
    """x0 over l = log(alpha / sigma), for any noise level (arXiv:2211.01095 eq. 8; arXiv:2309.05019 eq. 14).

    x_s = sigma_s / sigma_t e^(-tau^2 h) x_t + alpha_s (1 + tau^2) int e^(-(1 + tau^2)(l_s - l)) x0 dl
    + sigma_s sqrt(1 - e^(-2 tau^2 h)) z.
    """
    one, h, shrink = jnp.ones_like(steps.time), steps.h, steps.sigma[1:] / steps.sigma[:-1]
    tau2 = jnp.asarray(0.0 if steps.noise_level is None else steps.noise_level, h.dtype) ** 2
    points, weights = _quadrature(h)
    kernel = steps.alpha[1:, None] * (1 + tau2) * jnp.exp((1 + tau2) * (points - h[:, None]))
    noise = None
    if steps.noise_level is not None:
        # sigma sqrt(1 - e^(-2 tau^2 h)), written so that it has its derivative by tau at 0.
        y = 2 * tau2 * h
        mean_decay = jnp.where(y > 0, -jnp.expm1(-y) / jnp.where(y > 0, y, 1.0), 1.0)
        noise = steps.sigma[1:] * steps.noise_level * jnp.sqrt(2 * h * mean_decay)
    return Space(one, 0 * one, shrink * jnp.exp(-tau2 * h), h, points, weights * kernel, noise)


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

    With theta = arctan(q / scale), c = sqrt(alpha^2 scale^2 + sigma^2) and w = eps - sin(theta) x / c, the ODE is d(x / c) = w dtheta / cos(theta)
    = w dzeta, zeta = asinh(tan theta). No linear part is left, w vanishes on N(0, scale^2 I), and its scale is that of the error of a network that
    predicts eps. Between the scales `fine` and `coarse` (which may be 0 and infinite), where data has its structure, the variable is log(sigma / alpha), of which
    grids take about equal steps. Data that is not centred makes w proportional to cos(theta) at high noise, where it is alpha / sigma, and below all
    structure w is smooth in sigma: a polynomial follows both.
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

    # How far the variable is, at the points and at the end of each step, from where the step begins. q there goes by the end, which is less.
    start, there = q[:-1, None], q[1:, None] + change(slice(1, None), along - length[:, None])
    share = change(slice(-1), along) / (start + fine) * ((1 - fine / coarse) / (1 + there / coarse))
    moved = _log_ratio(share, (there + fine) / (start + fine) * ((1 + start / coarse) / (1 + there / coarse)))
    return Space(x0, eps, c[1:] / c[:-1], moved[:, -1], moved[:, :-1], weights * c[1:, None])


def _weights(space: Space, nodes: Float[Array, "steps nodes"], known) -> Float[Array, "steps nodes"]:
    """The integral of each node's Lagrange polynomial over every step.

    nodes: u_node - u_i of each step i, of which the ones in `known` `(N, K)` count.
    """
    # (u - u_m) / (u_j - u_m) for step, j, m, point; 1 where it does not count.
    other = known[:, None, :] & known[:, :, None] & ~np.eye(nodes.shape[1], dtype=bool)[None]
    apart = jnp.where(other, nodes[:, :, None] - nodes[:, None, :], 1.0)
    factors = jnp.where(
        other[..., None], (space.points[:, None, None, :] - nodes[:, None, :, None]) / apart[..., None], 1.0
    )
    return jnp.where(known, (space.weights[:, None, :] * factors.prod(axis=2)).sum(axis=2), 0.0)


def _nodes(space: Space, num: int) -> Float[Array, "steps num"]:
    """u_{i - j} - u_i for j < num; what lies before the grid is not known, and masked by the caller."""
    length = jnp.concatenate([jnp.zeros(num, space.length.dtype), space.length])
    index = jnp.arange(space.length.shape[0])[:, None] + num - jnp.arange(1, num)[None]
    return jnp.pad(-jnp.cumsum(length[index], axis=1), ((0, 0), (1, 0)))


def orders(num: int, order: int, taper: int = 0) -> np.ndarray:
    """The order of each of `num` steps `(num,)`: rising from 1 at the start; also falling to 1 at the end of runs of fewer
    than `taper` steps, whose last step would extrapolate far (arXiv:2211.01095 section 5)."""
    i = np.arange(num)
    return np.minimum(np.minimum(order, i + 1), num - i if num < taper else order)


def adams_bashforth(space: Space, order: np.ndarray) -> Float[Array, "steps order"]:
    """History factors of the explicit multistep method: y interpolated at the last `order` times, given for each step."""
    num = int(order.max())
    return _weights(space, _nodes(space, num), np.arange(num)[None] < order[:, None])


def adams_moulton(space: Space, order: np.ndarray) -> Float[Array, "steps nodes"]:
    """History factors of the implicit one: y interpolated at the end of the step, which comes first, and at the last
    `order` times. Of order `order` + 1."""
    num = int(order.max())
    nodes = jnp.concatenate([space.length[:, None], _nodes(space, num)], axis=1)
    return _weights(space, nodes, np.arange(num + 1)[None] < order[:, None] + 1)


def midpoint(space: Space, order: np.ndarray) -> Float[Array, "steps 2"]:
    """As `adams_bashforth` of order 2, with y taken half-way through the step: bounded where steps grow."""
    first = adams_bashforth(space, np.ones_like(order))[:, 0]
    slope = 0.5 * space.length[1:] / space.length[:-1]
    slope = jnp.where(order == 2, jnp.pad(slope, (1, 0)), 0.0)
    return first[:, None] * jnp.stack([1 + slope, -slope], axis=1)


def multistep(
    steps: Steps, space: Space, explicit: Float[Array, "steps p"], implicit: Float[Array, "steps q"] | None = None
) -> Table:
    """The table of an explicit method; with an implicit one, every step is redone once its end has been evaluated.

    The corrector costs no evaluation: y at the predicted end serves the correction and the next step (PEC). It moves
    the state by (implicit - explicit) y, which folds into the next row.
    """
    history = explicit
    if implicit is not None:
        num = max(explicit.shape[1] + 1, implicit.shape[1])

        def widen(a, before):
            return jnp.pad(a, ((0, 0), (before, num - before - a.shape[1])))

        # Row i corrects the step that ended at t_i, where y_{i-1} was the explicit method's newest.
        correction = (widen(implicit, 0) - widen(explicit, 1))[:-1]
        history = widen(explicit, 0) + space.factor[:, None] * jnp.pad(correction, ((1, 0), (0, 0)))
    return Table(steps.time[:-1], space.x0[:-1], space.eps[:-1], space.factor, history, noise=space.noise)


def centred(steps: Steps, table: Table, scale) -> Table:
    """A solver in a `residual_space` of this scale s that also integrates what the first evaluation tells of the data's mean: the project's own.

    For N(m, s^2 I), whatever m, w is proportional to g = sin(theta) cos(theta), whose integral over zeta is known. So of every w
    the first one's g / g_0 is left to that integral, and only the rest is interpolated: with weight one the solver is exact for N(m, s^2 I),
    and where the data and the start are moved, the samples move with them.

    An error of eps_hat counts 1 / cos(theta_0) times in such a mean. Hence the weight 1 / (1 + (0.002 / cos(theta_0))^2): for data of
    s = 1/2 0.73 under `VP()`, 0.96 under `VE()`, next to nothing close to zero SNR, but one at zero SNR, from which no network predicts eps.
    """
    share, whole = _told(steps, scale, 0)
    return dataclasses.replace(table, first=whole - (table.history * _before(share, table.history.shape[1])).sum(axis=1))


def ahead(steps: Steps, table: Table, scale) -> Table:
    """As `centred`, without the evaluation at the first time, which tells next to nothing but the mean; one row less: the project's own.

    The state is scaled to the second time, as for N(0, s^2 I), and evaluated there. What that tells of the mean, y_1, stands for the first time's
    evaluation too, as weight g_0 / g_1 y_1; of the rest nothing is known there. With weight one exact for N(m, s^2 I) too: w is the same at every x. Where a direction of the data has a variance v of
    its own, the state evaluated is off by the share alpha^2 (v - s^2) / (2 sigma^2) of it: for few steps, from where sigma is many times alpha s.
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
    """Of the evaluation at one time of the grid: the share of each w that its mean explains, and the integral of that over each step, `(N,)` each."""
    tan = jnp.exp(-steps.half_log_snr) / scale  # of theta: sinh(zeta)
    cosh = jnp.hypot(1.0, tan)  # 1 / cos(theta)
    weight = jnp.where(steps.alpha[at] > 0, 1 / (1 + (_EPS_ERROR * cosh[at]) ** 2), 1.0)
    trusted = weight * cosh[at] * (cosh[at] / tan[at])
    falls = tan[:-1] * jnp.expm1(-steps.h) * ((tan[1:] + tan[:-1]) / (cosh[1:] + cosh[:-1]))  # of cosh, without a difference of large numbers
    c = jnp.hypot(steps.alpha[1:] * scale, steps.sigma[1:])
    return trusted * (tan[:-1] / cosh[:-1]) / cosh[:-1], trusted * (falls / cosh[1:] / cosh[:-1]) * c


def _before(values, num: int):
    """values_{i - j} for j < num, `(R, num)`; 0 before the first."""
    return jnp.pad(values, (num - 1, 0))[np.arange(len(values))[:, None] + np.arange(num)[::-1]]


def one_step(times, kept, moves, noise=None) -> Table:
    """The table of a method of S evaluations a step that starts anew at each step, from its textbook form.

    Args:
      times: of the S evaluations, `(N,)` each.
      kept: (x0, eps) of each: y = x0 x0_hat + eps eps_hat, `(N,)` each.
      moves: S pairs (factor, [coefficients of y_1 ... y_k]): the states of the evaluations 2 to S, and the end of the
        step, as factor x + sum of coefficients times y, where x is the state at the step's beginning.
      noise: standard deviation of what is added at the end of the step, `(N,)`.
    """
    num, zero = len(moves), jnp.zeros_like(times[0])

    def rows(columns):
        return jnp.stack([c + zero for c in columns], axis=1).reshape(-1)

    states, history, factor, before = [], [], 1.0, []
    for total, coefficients in moves:
        # From the state of the evaluation before, not from the step's beginning.
        states.append(total / factor)
        row = [c - states[-1] * b for c, b in zip(coefficients, [*before, 0.0])][::-1]
        history.append(jnp.stack([c + zero for c in row + [0.0] * (num - len(row))], axis=1))
        factor, before = total, coefficients
    x0, eps = zip(*kept)
    noise = None if noise is None else rows([0.0] * (num - 1) + [noise])
    return Table(rows(times), rows(x0), rows(eps), rows(states), jnp.stack(history, axis=1).reshape(-1, num), noise=noise, stages=num)


def moved(x, centre, alpha):
    """x + alpha centre, and x itself where there is no centre."""
    return x if centre is None else (x + jnp.broadcast_to(alpha * centre, x.shape)).astype(x.dtype)


def begin(table: Table, sde, centre, x, t_start):
    """What is carried from row to row, before the first: x less alpha centre, what past evaluations said `(K, B, *event)`, what the first one did."""
    past = jnp.zeros((table.history.shape[1], *x.shape), x.dtype)
    first = None if table.first is None else jnp.zeros_like(x)
    return moved(x, centre, -sde.alpha(t_start)), past, first


def advance(row: Table, index, score_fn, sde, centre, carry):
    """What is carried, after one row of a table: one evaluation and the move, without noise."""
    x, past, first = carry
    if row.scale is not None:
        x = (row.scale * x).astype(x.dtype)
    x0, eps = predict(score_fn, sde, moved(x, centre, sde.alpha(row.time)), row.time)
    x0 = moved(x0, centre, -1.0)
    kept = (row.x0 * x0 + row.eps * eps).astype(x.dtype)
    past = jnp.concatenate([kept[None], past[:-1]])
    y = row.state * x + jnp.tensordot(row.history, past, 1, precision="highest")
    if row.first is not None:
        first = jnp.where(index == 0, kept, first)
        y = y + row.first * first
    return y.astype(x.dtype), past, first


def run(table: Table, score_fn, sde, key, x, t_start, t_end, *, centre=None, correct=None, denoise=True, return_path=False) -> Any:
    """Carries x `(B, *event)` along the rows of a table, with one `lax.scan` over them.

    Args:
      t_start, t_end: the times of x, and of the state that the last row ends with.
      centre: of the data, `event`; the table then moves x - alpha centre, by x0_hat - centre and eps_hat.
      correct: `(key, x, t) -> x`, applied to the state at the end of each step.
      denoise: one evaluation more: the result is x0_hat at t_end.
    """
    if denoise:
        optional = (None if a is None else b for a, b in ((table.first, 0.0), (table.noise, 0.0), (table.scale, 1.0)))
        last = Table(t_end, 1.0, 0.0, 0.0, np.eye(table.history.shape[1])[0], *optional, table.stages)
        table = jax.tree.map(lambda a, b: jnp.concatenate([a, jnp.broadcast_to(jnp.asarray(b, a.dtype), (1, *a.shape[1:]))]), table, last)
    num = table.time.shape[0]
    index = jnp.arange(num)
    step_done = ((index + 1) % table.stages == 0) & (index < num - denoise)

    # Recomputed under grad: the memory of a gradient is that of the states, not of the network's insides.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(carry, inputs):
        row, index, done, s = inputs
        key_noise, key_correct = jax.random.split(jax.random.fold_in(key, index))
        y, past, first = advance(row, index, score_fn, sde, centre, carry)
        if row.noise is not None:
            y = (y + row.noise * jax.random.normal(key_noise, y.shape, y.dtype)).astype(y.dtype)
        if correct is not None:
            alpha = sde.alpha(s)
            y = jax.lax.cond(
                done, lambda y: moved(correct(key_correct, moved(y, centre, alpha), s), centre, -alpha), lambda y: y, y
            )
        return (y, past, first), (moved(y, centre, sde.alpha(s)) if return_path else None)

    inputs = (table, index, step_done, jnp.append(table.time[1:], t_end))
    (end, *_), path = jax.lax.scan(body, begin(table, sde, centre, x, t_start), inputs)
    end = moved(end, centre, 1.0 if denoise else sde.alpha(t_end))
    if not return_path:
        return end
    return end, jnp.concatenate([x[None], path[table.stages - 1 : num - denoise : table.stages]])


@dataclasses.dataclass(frozen=True)
class Solver:
    """A named solver: a function from `Steps` to a `Table`, and its fact sheet.

    Attributes:
      order: of convergence, of stochastic ones at noise level 0; their weak order at higher ones is 1. Of a multistep method, that of its
        steps once its history is full. Its first step is of order 1, so that what the first steps leave falls by order 2 only, by order 3
        with a corrector: little from a prior of much noise, but the most of what is left in very many steps.
      evaluations: of the network, per step; a multistep method needs no more to start up.
      source: the paper, with its equation or algorithm.
      min_steps: fewest steps with which it makes sense: a multistep method's order.
      zero_snr: whether it can start where alpha = 0.
      stochastic: whether it has a noise level.
      grid: the name of its usual grid.
    """

    table: Callable[[Steps], Table]
    order: int
    evaluations: int
    source: str
    min_steps: int = 1
    zero_snr: bool = True
    stochastic: bool = False
    grid: str = "student"

    def __call__(self, steps: Steps) -> Table:
        return self.table(steps)

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return self.table.__doc__.partition("\n")[0]


def register(methods: dict, **facts):
    """A decorator that enters a function from `Steps` to a `Table` into a dict of solvers, under its own name."""

    def enter(table):
        methods[table.__name__] = Solver(table, **facts)
        return table

    return enter
