"""Solvers fitted to a model: the coefficients and times of a linear solver, against the model's own fine solutions.

The family is that of Bespoke Non-Stationary solvers (arXiv:2403.01329): any times, any factors of all evaluations so far. It contains every
solver of `sample_ode` with one evaluation a step. It is taken about the mean of the data. The first evaluation too may be at a free time:
at t_max it would tell next to nothing but that mean. Also in this literature: arXiv:2405.15506 (LD3), arXiv:2502.17423 (S4S),
arXiv:2404.14507 (Align Your Steps).
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PRNGKeyArray

from sde_diffusion.prediction import as_pytree, check_process
from sde_diffusion.samplers.grid import check_t_end, time_grid
from sde_diffusion.samplers.integrate import check_state
from sde_diffusion.samplers.linear import Steps, Table, advance, begin, moved, run
from sde_diffusion.samplers.ode import METHODS, from_the_prior, from_within, sample_ode, usual_method
from sde_diffusion.sde import SDE, check, known, pytree_dataclass

# Random directions of each end point in which its derivatives are taken.
_PROBES = 2
# Updates of each start of a fit before the better one goes on alone.
_TRIAL = 4
# States that the first updates look at, and held-out ones, in whole batches.
_FIRST = 32
# Errors of the states count by their squares up to about this many times the median square, and by their size beyond.
_LIMIT = 10
# Times at which the log-SNR tells one SDE from another.
_POINTS = 9


_TABLE = tuple(f.name for f in dataclasses.fields(Table) if f.name not in ("noise", "stages"))
_ARRAYS = {*_TABLE, "times", "process", "centre"}
# What files of before may lack: factors of the first evaluation, of the state before it, and a centre.
_NEWER = {"first", "scale", "centre"}


@pytree_dataclass
class LearnedSolver:
    """A fitted solver, for `sample_ode(..., method=solver)`; made by `fit_solver` or `LearnedSolver.load`.

    Attributes:
      table: its coefficients, one row an evaluation. `table.time[0]` is where the state at t_max is taken to for the first evaluation.
      times: of the states, `(nfe + 1,)`: t_max first, t_end last.
      process: log-SNR and log alpha at some times, by which another SDE is told.
      facts: what it was fitted to, and how well, as a JSON string: `json.loads(solver.facts)`.
      centre: mean of the data, `event`: the table moves x - alpha centre. Zero for any event.
    """

    table: Table
    times: Any
    process: Any
    facts: str = dataclasses.field(metadata={"static": True})
    centre: Any = 0.0

    def __call__(self, steps: Steps) -> Table:
        return self.table

    @property
    def nfe(self) -> int:
        """Evaluations, without the one of `denoise`."""
        return len(self.times) - 1

    def __repr__(self):
        facts = json.loads(self.facts)
        return f"LearnedSolver({', '.join(f'{k}={v:.3g}' if isinstance(v, float) else f'{k}={v}' for k, v in facts.items())})"

    def check_event(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError for events of another shape than it was fitted to."""
        fitted = np.shape(self.centre)
        check(fitted in ((), shape), f"this solver was fitted to events of shape {fitted}, not {shape}: fit_solver makes one for them")

    def check(self, sde: SDE) -> None:
        """Raises ValueError for another SDE than it was fitted to."""
        if not known(self.process, self.times, *jax.tree.leaves(sde)):
            return
        # Inside jax.jit an operation on constants is traced as well, unless it is asked not to be.
        with jax.ensure_compile_time_eval():
            same = bool(jnp.allclose(jnp.asarray(self.process), _process(sde), rtol=1e-3, atol=1e-3))
        check(
            same,
            f"this solver was fitted to {json.loads(self.facts)['sde'][:200]}, not to {sde}: fit_solver makes one for it",
        )
        first, last = np.asarray(self.times)[[0, -1]].tolist()
        check(
            abs(first - sde.t_max) <= 1e-6 * sde.t_max and last >= sde.t_train * (1 - 1e-6),
            f"this solver runs from t={first:g} to {last:g}, but {type(sde).__name__} from t_max={sde.t_max} to t_train={sde.t_train} "
            "at the least: fit it again",
        )

    def save(self, path: str | Path) -> Path:
        """Writes it as a small JSON file."""
        arrays = {name: getattr(self.table, name) for name in _TABLE}
        arrays |= {"times": self.times, "process": self.process, "centre": self.centre}
        # The fewest digits that are this float.
        arrays = {k: np.vectorize(lambda a: float(str(a)))(np.asarray(v)).tolist() for k, v in arrays.items() if v is not None}
        path = Path(path)
        lines = (f'"{k}": {json.dumps(v)}' for k, v in {"facts": json.loads(self.facts), **arrays}.items())
        path.write_text("{" + ",\n ".join(lines) + "}\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "LearnedSolver":
        """The solver that `save` wrote.

        Raises:
          ValueError: not such a file, or arrays that do not fit together.
        """
        try:
            check(Path(path).stat().st_size <= 2**28, "more than 256 MiB")
            plain = json.loads(Path(path).read_text())
            needed = {"facts", *_ARRAYS} - _NEWER
            check(isinstance(plain, dict) and plain.keys() - _NEWER == needed, f"it needs {', '.join(sorted(needed))}")
            facts = plain.pop("facts")
            check(isinstance(facts, dict) and isinstance(facts.get("sde"), str), "its facts do not tell the SDE")
            arrays = {k: np.asarray(v, np.float64) for k, v in plain.items()}
            check(all((np.abs(v) < 3e38).all() for v in arrays.values()), "a number is not finite")
            n, width = len(arrays["times"]) - 1, arrays["history"].shape[-1]
            arrays.setdefault("centre", np.zeros(()))
            event = arrays["centre"].shape and tuple(facts["event_shape"])
            shapes = {**dict.fromkeys(arrays, (n,)), "times": (n + 1,), "history": (n, width), "process": (2, _POINTS), "centre": event}
            fits = n >= 1 and 1 <= width <= n and all(v.shape == shapes[k] for k, v in arrays.items())
            check(fits and (np.diff(arrays["times"]) < 0).all(), "its arrays do not fit together")
        except (OSError, KeyError, TypeError, ValueError, IndexError, RecursionError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is not a solver that LearnedSolver.save wrote ({reason}); fit and save it again") from None
        arrays = {k: jnp.asarray(v, float) for k, v in arrays.items()}
        rest = {name: arrays.pop(name) for name in ("times", "process", "centre")}
        return cls(Table(**arrays), **rest, facts=json.dumps(facts))


def _process(sde):
    # Up to t_max, where alpha may be 0.
    t = jnp.linspace(0.02, 0.98, _POINTS) * sde.t_max
    return jnp.stack([sde.log_snr(t), sde.log_alpha(t)])


def fit_solver(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    *,
    nfe: int = 8,
    t_end: float | None = None,
    sigma_data: float | None = None,
    num_states: int = 4096,
    fine_steps: int = 100,
    max_updates: int = 80,
    seconds: float = 240.0,
    progress: bool = True,
) -> LearnedSolver:
    """Fits a solver of `nfe` evaluations to a score function: the smallest end-point error |x - x_fine|.

    Fitted are the times, and factors of the state and of all evaluations so far (the last 6 where nfe > 10), for x and x0_hat about the
    mean of the data, so that no factor is spent on where the data lies. Levenberg-Marquardt does it, against solutions of `adams_4` in
    `fine_steps` steps from `num_states` prior draws, of which the first updates look at some. It starts twice, and goes on with the better
    one: from the rule of `adams` in 2 to 20 steps from noise (the grid "tapered" of a step more, the first evaluation at a free time within
    the first step), and from that of more steps (the first evaluation at t_max). For a network that predicts eps or the score it starts
    from `adams_eps` alone, which also gives the solutions.

    The objective is the pseudo-Huber mean of the states' errors: a state that ends in another mode of the data is far off by chance, and
    would rule a mean square. A quarter of the states is held out: the best solver on as many of these as the updates look at is returned,
    whose held-out error, on all of them, is a little optimistic for it, and fitting ends when they stop improving.
    Family: arXiv:2403.01329.

    A few states near the divide between two modes make most of what a fit leaves: compare `held_out_rmse` with `held_out_median`.

    Args:
      score_fn: `(x (B, *event), t (B,)) -> (B, *event)`; it also sees one example at a time, B = 1, and others of its batches.
      shape: `(B, *event)`; B is how many states are solved at once.
      nfe: evaluations, at least 2; `denoise` adds one when sampling.
      t_end: where it stops; `sde.t_min` by default.
      sigma_data: as in `sample_ode`.
      num_states: prior draws, at least 16, in whole batches of B; more are better.
      fine_steps: steps of a fine solution, one evaluation each.
      max_updates, seconds: limits of the fit; fine solutions not counted.
      progress: show a bar with the median held-out error over that of the default solver.

    Returns:
      The solver, for `sample_ode(..., method=solver)`. `solver.facts` holds the held-out errors, median and RMSE with its standard
      error, the number of updates and what ended them.

    Raises:
      ValueError: nfe < 2 or not below fine_steps, t_end outside the SDE's range, too few states, a score that is not finite or whose
        derivatives are not.
    """
    import time

    from tqdm import tqdm

    check(isinstance(nfe, (int, np.integer)) and nfe >= 2, f"nfe={nfe!r} must be an integer of at least 2; 5 to 20 is usual")
    check(
        isinstance(num_states, (int, np.integer)) and num_states >= 16,
        f"num_states={num_states!r} must be an integer of at least 16; 4096 is usual",
    )
    check(
        isinstance(max_updates, (int, np.integer)) and max_updates >= 1,
        f"max_updates={max_updates!r} must be an integer of at least 1; 80 is usual",
    )
    check(
        isinstance(fine_steps, (int, np.integer)) and fine_steps > nfe,
        f"fine_steps={fine_steps!r} must be an integer of more than nfe={nfe}; 100 is usual",
    )
    check_process(score_fn, sde)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((key, sde, score_fn, t_end, sigma_data)))
    check(not traced, "fit_solver compiles what it needs by itself, and cannot run inside jax.jit, vmap or grad: call it outside")
    shape, _ = check_state(score_fn, sde, key, shape, None)
    t_end = check_t_end(sde, t_end)
    sigma_data = getattr(score_fn, "sigma_data", 0.5) if sigma_data is None else sigma_data
    usual = usual_method(getattr(score_fn, "prediction", None))
    score_fn = as_pytree(score_fn)

    # States and their fine solutions, `(batches, B, *event)`; a quarter of them is held out.
    num_batches = max(2, -(-num_states // shape[0]))
    x = sde.prior_sample(key, (num_batches, *shape))
    fine = functools.partial(
        sample_ode, score_fn, sde, key, shape, method="adams_4" if usual == "adams" else usual, num_steps=fine_steps, t_end=t_end, denoise=False,
        sigma_data=sigma_data,
    )  # fmt: skip
    target = jnp.stack([fine(init=part) for part in tqdm(x, desc="fine solutions", disable=not progress)])
    # Where the network is: other devices, or the same ones by another name, would mean to compile all once more.
    x = jax.device_put(x, target.sharding)
    check(bool(jnp.isfinite(target).all()), "the fine solutions are not finite: score_fn gives NaN or infinity at some state and time")
    num_held = max(1, num_batches // 4)
    held_out, data = (x[:num_held], target[:num_held]), (x[num_held:], target[num_held:])

    centre = _mean(*data) / sde.alpha(jnp.asarray(t_end, float))
    default = functools.partial(
        sample_ode, score_fn, sde, key, shape, method=usual, num_steps=nfe, t_end=t_end, denoise=False, sigma_data=sigma_data
    )
    of_default = np.concatenate([_of_each(default(init=x), target) for x, target in zip(*held_out)])
    size = math.prod(shape[1:])
    grid = functools.partial(time_grid, sde, t_end=t_end, sigma_data=sigma_data, event_size=size)
    starts = [grid(nfe + 1), grid(nfe, "near")] if usual == "adams" else [grid(nfe, METHODS[usual].grid)]
    families = [_Family(sde, nfe, sigma_data, size, times, usual) for times in starts]
    fits = [_descend(family, score_fn, centre, data, held_out, jax.random.fold_in(key, 1), max_updates) for family in families]
    found, trial = [None] * len(fits), _TRIAL * len(fits)
    updates, ended_by, began = 0, "max_updates", time.monotonic()
    with tqdm(total=max_updates, desc=f"fit nfe={nfe}, at most {seconds:g} s", disable=not progress) as bar:
        for updates in range(1, max_updates + 1):
            turn = (updates - 1) % len(fits) if updates <= trial else turn
            found[turn] = next(fits[turn])
            if updates == trial:
                turn = _best(found)
            bar.update()
            best = found[turn if updates >= trial else _best(found)][0]
            bar.set_postfix_str(
                f"median held-out error {np.sqrt(np.median(best) / np.median(of_default[: len(best)])):.3f} of the default's"
            )
            if updates >= trial and found[turn][2] >= 8:
                ended_by = "no more gain"
                break
            if time.monotonic() - began > seconds:
                ended_by = "the time limit"
                break
    # By all held-out states, of which a start that was left looked at few.
    solvers = [each[1] for each in found if each]
    errors = [*(_of_states(*each, score_fn, sde, centre, held_out) for each in solvers), of_default]
    chosen = _best([(each,) for each in errors])
    best = errors[chosen]
    if chosen < len(solvers):
        table, times = solvers[chosen]
    else:
        # Too few updates, or a sigma_data that is far off: nothing better than the default was found.
        times, centre = grid(nfe, METHODS[usual].grid), jnp.zeros(())
        table = METHODS[usual](Steps.of(sde, times, sigma_data, size))
        table = dataclasses.replace(table, history=table.history[:, :nfe])  # of fewer steps than columns the rest is zero
    facts = {
        "sde": repr(sde), "nfe": int(nfe), "t_end": float(t_end), "sigma_data": float(sigma_data), "event_shape": list(shape[1:]),
        "updates": updates, "ended_by": ended_by, "held_out_states": len(best), **_errors("", best), **_errors("_of_the_default", of_default),
    }  # fmt: skip
    return LearnedSolver(table, times, _process(sde), json.dumps(facts), centre)


def _best(found) -> int:
    """Which of some solvers has the smallest held-out errors: the first entry of each, if any; of as many states as all have."""
    num = min(len(each[0]) for each in found if each)
    found = [each and (each[0][:num],) for each in found]
    limit = _LIMIT * min(np.median(each[0]) for each in found if each)
    return int(np.argmin([_pseudo_huber(each[0], limit) if each else np.inf for each in found]))


def _descend(family, score_fn, centre, data, held_out, key, max_updates):
    """Levenberg-Marquardt from the start of a family: after each update the held-out errors `(states,)` of the best solver so far, itself
    as its table and times, and for how many updates there was no gain. The errors are those of as many held-out states as
    the next update looks at, or of all."""
    theta, unravel = ravel_pytree(family.start())
    sde, size = family.sde, data[0].shape[1]
    build = jax.jit(lambda theta: family.build(unravel(theta)))
    jacobian = jax.jit(jax.jacrev(lambda theta: _numbers(build(theta)[0], 1)))

    def of_states(theta, parts):
        return _of_states(*build(theta), score_fn, sde, centre, parts)

    def first(num):
        return [a[:num] for a in data], [a[:num] for a in held_out]

    def equations(theta, limit, parts, key):
        numbers = *build(theta), jacobian(theta), limit, score_fn, sde, centre
        totals = [_normal_equations(*numbers, *part) for part in zip(*parts, jax.random.split(key, len(parts[0])))]
        return (sum(np.asarray(a, np.float64) for a in each) for each in zip(*totals))

    best_theta, damping, idle = theta, 1e-3, 0
    # The first updates are rough: they look at a batch or a few, and later ones at twice as many wherever the gain ends.
    some, others = first(-(-_FIRST // size))
    here, better = of_states(theta, some), True
    held = best = of_states(theta, others)
    for key_probes in jax.random.split(key, max_updates):
        if better:
            limit = max(_LIMIT * np.median(here), 1e-30)
            gradient, matrix = equations(theta, limit, some, key_probes)
            check(bool(np.isfinite(matrix).all()), "the derivatives of score_fn are not finite at some state and time: a fit needs them")
        # Two dampings at once; the errors choose among them.
        dampings = damping * np.array([0.2, 4.0])
        scale = np.diag(np.diag(matrix) + 1e-9 * np.trace(matrix))
        moves = [np.linalg.solve(matrix + d * scale, -gradient) for d in dampings]
        candidates = [theta + jnp.asarray(move, theta.dtype) for move in moves]
        there = np.stack([of_states(each, some) for each in candidates])
        values = _pseudo_huber(there, limit)
        winner = int(values.argmin())
        better = bool(values[winner] < _pseudo_huber(here, limit))
        if better:
            theta, damping, here = candidates[winner], dampings[winner], there[winner]
            held = of_states(theta, others)
        else:
            damping = 100 * damping
        gain = _pseudo_huber(held, limit) / _pseudo_huber(best, limit)
        idle = 0 if gain < 0.98 else idle + 1
        if gain < 1:
            best, best_theta = held, theta
        if gain > 0.94 and len(some[0]) < len(data[0]) and (better or idle >= 3):
            (some, others), idle, damping = first(2 * len(some[0])), 0, 1e-3
            here, better = of_states(theta, some), True
            if len(others[0]) * size > len(held):
                held, best = of_states(theta, others), of_states(best_theta, others)
                if _pseudo_huber(held, limit) < _pseudo_huber(best, limit):
                    best, best_theta = held, theta
        yield best, build(best_theta), idle


@dataclasses.dataclass(frozen=True)
class _Family:
    """The default rule at free times, plus free factors, in the scale of the state's marginal; for x less alpha centre. Given times of
    nfe + 1 steps, the rule is that of `adams` without its first evaluation, as in few steps (`spaces.ahead`)."""

    sde: SDE
    nfe: int
    sigma_data: Any
    event_size: int
    times: Any  # of nfe or nfe + 1 steps
    usual: str = "adams"  # or adams_eps

    def start(self):
        """Zeros: of that rule itself, about the centre; that of `adams` is exact for N(centre, sigma_data^2 I) up to 64 dimensions."""
        n = self.nfe
        lengths = jnp.zeros(len(self.times) - 1)
        return {"lengths": lengths, "scale": jnp.zeros(()), "state": jnp.zeros(n), "history": jnp.zeros(len(self._places()[0]))}

    def _places(self):
        """Rows and columns of the free factors: all evaluations so far, the last 6 of long solvers."""
        return np.tril_indices(self.nfe, m=self.nfe if self.nfe <= 10 else 6)

    def build(self, parameters):
        """The table, and the times of the states."""
        n = self.nfe
        plain = Steps.of(self.sde, self.times, self.sigma_data, self.event_size)
        lengths = plain.h * jnp.exp(parameters["lengths"])
        inner = plain.half_log_snr[0] + jnp.cumsum(lengths * (plain.h.sum() / lengths.sum()))[:-1]
        steps = Steps.of(
            self.sde, jnp.concatenate([self.times[:1], self.sde.time(2 * inner), self.times[-1:]]), self.sigma_data, self.event_size
        )
        less = steps.num - n
        if less:
            table = from_within(steps)
        else:
            table = from_the_prior(steps) if self.usual == "adams" else METHODS[self.usual](steps)
            first = jnp.zeros(n) if table.first is None else table.first
            table = dataclasses.replace(table, first=first, scale=jnp.ones(n))
        c = jnp.sqrt((steps.alpha * self.sigma_data) ** 2 + steps.sigma**2)[-n:]
        rows, columns = self._places()
        history = jnp.zeros((n, columns.max() + 1)).at[rows, columns].set(parameters["history"]) * c[:, None]
        history = history.at[:, : table.history.shape[1]].add(table.history[:, : history.shape[1]])
        table = dataclasses.replace(
            table, state=table.state * (1 + parameters["state"]), history=history, scale=table.scale.at[0].multiply(1 + parameters["scale"])
        )
        return table, jnp.delete(steps.time, 1) if less else steps.time


def _mean(x, target):
    """The mean of the targets, of which x, of mean zero, explains a share: in each coordinate a control variate, `event`."""
    mean = functools.partial(jnp.mean, axis=(0, 1))
    share = (mean(x * target) - mean(x) * mean(target)) / mean(x**2)
    return mean(target) - share * mean(x)


def _of_states(table, times, score_fn, sde, centre, parts):
    """As `_of_each`, of all states of some batches, `(states,)`."""
    return np.concatenate([np.asarray(_squares(table, times, score_fn, sde, centre, *part), np.float64) for part in zip(*parts)])


def _of_each(x, target):
    """The mean squared error of each state of a batch, `(B,)`; infinite where it is not a number."""
    squares = jnp.mean((x - target) ** 2, axis=tuple(range(1, x.ndim)))
    return jnp.where(jnp.isnan(squares), jnp.inf, squares)


def _pseudo_huber(squares, limit):
    """Mean over the last axis, of squares where they are small against limit, of 2 sqrt(limit square) where they are large."""
    return (2 * limit * (np.sqrt(1 + squares / limit) - 1)).mean(axis=-1)


def _errors(of: str, squares) -> dict[str, float]:
    """The median error; the root of the mean square, and its standard error."""
    squares = np.asarray(squares, np.float64)
    rmse = math.sqrt(squares.mean())
    spread = float(squares.std() / math.sqrt(len(squares)) / (2 * rmse)) if rmse else 0.0
    return {f"held_out_median{of}": float(np.sqrt(np.median(squares))), f"held_out_rmse{of}": rmse, f"held_out_stderr{of}": spread}


_begin, _advance = jax.jit(begin), jax.jit(advance)
# Where the states of a batch are, in each part of what is carried.
_AXES = (0, 1, 0)


@jax.jit
def _squares(table, times, score_fn, sde, centre, x, target):
    """As `_of_each`, of where a solver takes the states of a batch, `(B,)`."""
    return _of_each(run(table, score_fn, sde, jax.random.key(0), x, times[0], times[-1], centre=centre, denoise=False), target)


def _normal_equations(table, times, jacobian, limit, score_fn, sde, centre, x, target, key):
    """J^T w r of the residuals r of a batch of states, and an unbiased J^T w J: E[(J^T v) (J^T v)^T], v = +-sqrt(w).

    w = 1 / sqrt(1 + mean(r^2) / limit) of each state makes them those of the pseudo-Huber mean. Reverse mode: some cotangents of
    each state's end point, whatever the number of parameters. Row by row and not by one scan: in a loop, what XLA makes of the
    derivative of a convolution is many times slower on a CPU (github.com/jax-ml/jax/issues/12868).

    jacobian: of the rows' numbers by the parameters, `(nfe, W, P)`.
    """
    rows = [jax.tree.map(lambda a: a[i], table) for i in range(len(jacobian))]
    carries = [_begin(table, sde, centre, x, times[0])]
    for i, row in enumerate(rows):
        carries.append(_advance(row, i, score_fn, sde, centre, carries[-1]))
    residual = moved(carries.pop()[0], centre, sde.alpha(times[-1])) - target
    weight = jax.lax.rsqrt(1 + jnp.mean(residual**2, axis=tuple(range(1, x.ndim))) / limit)
    probes = jax.random.rademacher(key, (_PROBES, *x.shape), x.dtype)
    cotangents = _cotangents(jnp.stack([residual, *probes], axis=1), carries[0])
    parts = 0.0
    for i, row in reversed(list(enumerate(rows))):
        of_row, cotangents = _pull(row, i, score_fn, sde, centre, carries.pop(), cotangents)
        # At zero SNR a score may have no derivative by the time, t_max, which no parameter moves.
        numbers = jnp.where((jacobian[i] != 0).any(axis=-1), _numbers(of_row, 2), 0.0)
        parts = parts + jnp.matmul(numbers, jacobian[i], precision="highest")
    gradients, probed = parts[:, 0], jnp.sqrt(weight)[:, None, None] * parts[:, 1:]
    probed = probed.reshape(-1, probed.shape[-1])
    return weight @ gradients, jnp.matmul(probed.T, probed, precision="highest") / _PROBES


@jax.jit
def _cotangents(of_x, carry):
    """Of what is carried, where all is of x: `(B, C, ...)`."""
    _, past, first = (jnp.moveaxis(a, axis, 0) for a, axis in zip(carry, _AXES))
    return of_x, *(jnp.zeros((*of_x.shape[:2], *a.shape[1:]), a.dtype) for a in (past, first))


def _numbers(table, axes):
    """All numbers of a table after the first axes, side by side."""
    leaves = jax.tree.leaves(table)
    return jnp.concatenate([a.reshape(*a.shape[:axes], -1) for a in leaves], axis=-1)


@jax.jit
def _pull(row, index, score_fn, sde, centre, carry, cotangents):
    """Cotangents `(B, C, ...)` of a row's numbers and of what was carried to it, for each state, from C of what it carried on."""

    def one(carry, cotangents):
        def move(row, carry):
            many = jax.tree.map(jnp.expand_dims, carry, _AXES)
            return jax.tree.map(jnp.squeeze, advance(row, index, score_fn, sde, centre, many), _AXES)

        return jax.vmap(jax.vjp(move, row, carry)[1])(cotangents)

    return jax.vmap(one, in_axes=(_AXES, 0))(carry, cotangents)
