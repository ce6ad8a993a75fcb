"""Linear samplers: a solver is a table of coefficients, and one `lax.scan` runs any of them.

All fixed-grid solvers of the literature, one-step or multistep, deterministic or not, move the state by a linear
combination of what the network has said so far. So a solver is a function from a grid (`Steps`) to a `Table`. One-step methods
write theirs by `one_step`, multistep ones by the polynomials of `samplers.spaces`. Adams-Bashforth of order 2 for x0 over log-SNR:

    from sde_diffusion.samplers.spaces import adams_bashforth, data_space, multistep, orders

    def mine(steps):
        space = data_space(steps)
        return multistep(steps, space, adams_bashforth(space, orders(steps.num, 2)))

    sample_ode(score_fn, sde, key, shape, method=mine)
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
from sde_diffusion.sde import SDE, pytree_dataclass
from sde_diffusion.times import lowest_log_snr

# How many numbers an event holds, where nothing is said of it.
EVENT_SIZE = 64
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


@pytree_dataclass
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
    time: Leaf
    alpha: Leaf
    sigma: Leaf
    half_log_snr: Leaf
    sigma_data: Leaf
    event_size: int = dataclasses.field(metadata={"static": True})
    noise_level: Leaf

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
    """What is carried to the first row: x less alpha centre, what past evaluations said, `(K, B, *event)`, and the first."""
    zero = jnp.zeros_like(x)  # under shard_map as varied as x is
    past = jnp.stack([zero] * table.history.shape[1])
    first = None if table.first is None else zero
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
            y = jax.lax.cond(done, lambda y: moved(correct(key_correct, moved(y, centre, alpha), s), centre, -alpha), lambda y: y, y)
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


def register(methods: dict, compiled: bool = True, **facts):
    """A decorator that enters a function from `Steps` to a `Table` into a dict of solvers, under its own name; compiled by default."""

    def enter(table):
        methods[table.__name__] = Solver(jax.jit(table) if compiled else table, **facts)
        return table

    return enter
