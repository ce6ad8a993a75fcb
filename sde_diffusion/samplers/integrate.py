"""What all fixed-grid samplers share: the checks of their input, and the compiled run of a solver's table."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sde_diffusion.prediction import as_pytree, check_process, check_sigma_data, lookup, zero_terminal_snr
from sde_diffusion.samplers.grid import resolve_grid
from sde_diffusion.samplers.linear import Solver, Steps, Table, run
from sde_diffusion.sde import SDE, check, check_key, is_number, shown


def integrate(
    methods: dict[str, Solver], method, score_fn, sde, key, shape, *, num_steps, grid, t_end, init, denoise, return_path,
    sigma_data, noise_level=None, correct=None, kind="method", usual_steps=18,
) -> Any:  # fmt: skip
    """Carries a prior draw, or `init`, along the grid with a solver and, after each step, `correct(score_fn, sde, key, x, t)`."""
    solver = method if callable(method) else find(methods, method, kind)
    check_process(score_fn, sde)
    check_flags(denoise=denoise, return_path=return_path)
    if sigma_data is None:
        sigma_data = getattr(score_fn, "sigma_data", 0.5)
    check_sigma_data(sigma_data)
    if hasattr(solver, "times"):
        solver.check(sde)
        check(
            num_steps in (None, solver.nfe) and grid is None and t_end is None,
            f"a fitted solver has its own times and {solver.nfe} evaluations: leave num_steps, grid and t_end out, or fit another",
        )
        grid = solver.times
    if grid is None:
        grid = getattr(solver, "grid", "student")
    size = math.prod(check_shape(shape)[1:])
    times = resolve_grid(sde, grid, num_steps, t_end, sigma_data, size, from_prior=init is None, usual_steps=usual_steps)
    # A prior draw belongs to t_max; so may a state, where its time is not known.
    t_start = None if init is None or isinstance(times, jax.core.Tracer) else times[0]
    shape, init = check_state(score_fn, sde, key, shape, init, t_start)
    if isinstance(solver, Solver):
        check_start(solver, method, sde, len(times) - 1, t_start)
        noise_level = noise_level if solver.stochastic else None
    if hasattr(solver, "times"):
        solver.check_event(shape[1:])
    steps = _steps(sde, times, sigma_data, event_size=size, noise_level=noise_level)
    table = solver(steps) if isinstance(method, str) else _table(as_pytree(solver), steps)
    return _run(
        table, as_pytree(score_fn), sde, key, times, init, getattr(solver, "centre", None), None if correct is None else as_pytree(correct),
        shape=shape, denoise=denoise, return_path=return_path,
    )  # fmt: skip


def find(methods: dict[str, Solver], method, kind: str) -> Solver:
    """The solver of this name, or a ValueError that lists the known ones, or tells where the name belongs."""
    from sde_diffusion.samplers import ode
    from sde_diffusion.samplers import sde as reverse

    if isinstance(method, str) and method not in methods:
        for sampler, others in (("ode", ode.METHODS), ("sde", reverse.METHODS)):
            check(method not in others, f"{kind} {method!r} is one of sample_{sampler} (of sample.sampler={sampler!r} in a config): use that, or choose "
                  f"one of {', '.join(sorted(methods))}")  # fmt: skip
        check(not method.endswith(".json"), f"{kind} {method!r} is a file: pass sd.LearnedSolver.load({method!r}) to sample_ode")
    return lookup(methods, method, kind)


def check_shape(shape) -> tuple[int, ...]:
    """The shape as a tuple, or a ValueError where it is not (batch, *event)."""
    shape = shape.tolist() if isinstance(shape, np.ndarray) else shape
    good = isinstance(shape, (tuple, list)) and len(shape) >= 2 and all(isinstance(n, (int, np.integer)) and n >= 1 for n in shape)
    check(good, f"shape={shown(shape)} must be (batch, *event) with at least one event axis, all positive integers")
    return tuple(shape)


def check_state(score_fn, sde: SDE, key, shape, init, t_start=None):
    """(shape, init) as a tuple and an array of float32 or wider, or a ValueError: what every sampler asks of its start."""
    shape, init = check_shape(shape), None if init is None else jnp.asarray(init)
    if init is not None and init.shape != shape:
        raise ValueError(f"init has shape {init.shape} but shape={shape} was asked for; make them equal")
    if init is not None:
        if not jnp.issubdtype(init.dtype, jnp.floating):
            raise ValueError(f"init has dtype {init.dtype}; pass floats, of the scale of the prior")
        # The state keeps float32 or wider, whatever the network computes in.
        init = init.astype(jnp.promote_types(init.dtype, jnp.float32))
    if zero_terminal_snr(sde, t_start) and not hasattr(score_fn, "predict"):
        raise ValueError(
            f"a bare score function leaves x0 undefined at zero terminal SNR (alpha({sde.t_max}) = 0): use as_score with "
            "prediction='v' or 'x0', or an SDE with a smaller t_max"
        )
    check_key(key)
    return shape, init


def check_flags(**flags) -> None:
    """Raises ValueError for what is neither True nor False."""
    for name, value in flags.items():
        check(isinstance(value, (bool, np.bool_)), f"{name}={shown(value)} must be True or False: it chooses the program")


def check_noise_level(noise_level) -> None:
    """Raises ValueError for what is no number, negative or not finite; a traced one passes."""
    check(
        is_number(noise_level) and (noise_level >= 0) & (noise_level < np.inf),
        f"noise_level={noise_level!r} must be one number of at least 0, and finite; 0 is the ODE, 1 the reverse SDE",
    )


def check_start(solver: Solver, name: str, sde: SDE, num_steps: int, t_start=None) -> None:
    """Raises ValueError for too few steps, and for a solver that cannot start where alpha = 0 (at t_max by default)."""
    check(
        num_steps >= solver.min_steps,
        f"{name!r} needs at least {solver.min_steps} steps, got {num_steps}: take more, or method={'sde_adams' if solver.stochastic else 'adams'!r}, "
        "which goes with any number of them",
    )
    if not solver.zero_snr and zero_terminal_snr(sde, t_start):
        raise ValueError(
            f"{name!r} needs alpha > 0, but alpha({sde.t_max}) = 0 in {sde} (zero terminal SNR); use 'adams', 'ddim' or 'ancestral'"
        )


# Apart from the run: another score function compiles neither of these again.
_steps = jax.jit(Steps.of, static_argnames="event_size")


@jax.jit
def _table(solver, steps):
    table = solver(steps)
    check(isinstance(table, Table), f"a method must return a samplers.linear.Table, not {type(table).__name__}")
    rows = steps.num * table.stages
    for name in ("time", "x0", "eps", "state", "first", "noise", "scale", "history"):
        column = getattr(table, name)
        good = column is None or np.shape(column)[:1] == (rows,) and np.ndim(column) == 1 + (name == "history")
        wanted = f"({rows}, K)" if name == "history" else f"({rows},)"
        check(
            good, f"a method's Table of {steps.num} steps, {table.stages} rows each, needs {name} of shape {wanted}, not {np.shape(column)}"
        )
    check(table.noise is None or steps.noise_level is not None, "a method of sample_ode adds no noise: pass this one to sample_sde")
    return table


@functools.partial(jax.jit, static_argnames=("shape", "denoise", "return_path"))
def _run(table, score_fn, sde, key, times, init, centre, correct, *, shape, denoise, return_path):
    key_prior, key_steps = jax.random.split(key)
    x = sde.prior_sample(key_prior, shape) if init is None else init
    correct = None if correct is None else functools.partial(correct, score_fn, sde)
    return run(
        table, score_fn, sde, key_steps, x, times[0], times[-1], centre=centre, correct=correct, denoise=denoise, return_path=return_path
    )
