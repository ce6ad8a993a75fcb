"""Time grids: decreasing arrays of times, from the prior to where sampling stops."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sde_diffusion.prediction import check_sigma_data, lookup
from sde_diffusion.samplers.linear import EVENT_SIZE
from sde_diffusion.sde import SDE, Number, check, known
from sde_diffusion.times import lowest_log_snr


def _uniform(sde, t0, t1, u, s, size):
    return t0 + (t1 - t0) * u


def _quadratic(sde, t0, t1, u, s, size):
    return (jnp.sqrt(t0) + (jnp.sqrt(t1) - jnp.sqrt(t0)) * u) ** 2


def _ends(sde, t0, t1, s):
    """The log-SNRs between which a grid lies: from `lowest_log_snr` at the least, but from below where it stops."""
    first, last = sde.log_snr(t0), sde.log_snr(t1)
    return jnp.maximum(first, jnp.minimum(lowest_log_snr(s), last - 1)), last


def _log_snr(sde, t0, t1, u, s, size):
    first, last = _ends(sde, t0, t1, s)
    return sde.time(first + (last - first) * u)


def _edm(sde, t0, t1, u, s, size, rho=7.0):
    first, last = (jnp.exp(-log_snr / (2 * rho)) for log_snr in _ends(sde, t0, t1, s))
    return sde.time(-2 * rho * jnp.log(first + (last - first) * u))


def _early(sde, t1, s):
    # A process that ends early leaves no time in which errors of its last steps could contract: they are shorter.
    return jnp.clip(0.4 * (5.5 - 0.5 * sde.log_snr(t1) - jnp.log(s)), 0.0, 1.0)


def _student_quantiles(sde, t1, s, size):
    """Two functions, log-SNR -> quantile in [-1, 1], falling, and back: of log(sigma / alpha), by Student's distribution."""
    # Data takes shape while sigma is about the distance between its modes, which for the same s grows with the dimensions.
    early = _early(sde, t1, s)
    return _quantiles(jnp.log(0.65 * size**0.2 * (1 - 0.28 * early) * s), 2.0, 2.1 + 0.4 * early)


def few(num: int) -> bool:
    """Whether these are so few evaluations that their grid, and the linear part of `adams`, go further out: up to five."""
    return num < 6


# The dimensions in which images have been measured: the linear part of `adams` grows no further, nor "tapered", but up to twice as many in
# more than 10 steps.
MOST = 3072


def _tapered_quantiles(sde, t1, s, size, num):
    # Of a method that corrects its steps, and errs most where the data is coarsest: up to its radius, s sqrt(D).
    size = jnp.minimum(size, MOST if num <= 10 else 2 * MOST)
    early, more = _early(sde, t1, s), jnp.log(jnp.maximum(size / 64, 1.0))
    if few(num):
        fine = 0.2 * max(0, num - 4)
        return _quantiles(jnp.log(0.4 * size**0.375 * (1 - 0.28 * early) * s), 2.0 + 0.15 * more, 1.85 + 0.4 * early + fine * more)
    centre = jnp.log(size**0.375 / 3 * (1 - 0.28 * early) * s) + 0.75 / num * more
    # Most directions of data in many dimensions are fine: in more than 10 evaluations, the error is theirs, of the last steps.
    fine = max(0.1, 0.6 - 5 / num)
    return _quantiles(centre, 1.5 + 0.4 * more, 1.8 + 0.4 * early + fine * more)


def _quantiles(centre, above, below):
    # With 2 degrees of freedom F(z) = (1 + z / sqrt(2 + z^2)) / 2.
    def width(side):
        return jnp.where(side > 0, above, below)

    def quantile(log_snr):
        z = -0.5 * log_snr - centre
        return z / jnp.sqrt(2 * width(z) ** 2 + z**2)

    return quantile, lambda q: -2 * (centre + width(q) * q * jnp.sqrt(2 / (1 - q**2)))


def _student(sde, t0, t1, u, s, size, quantiles=None):
    quantile, log_snr = quantiles or _student_quantiles(sde, t1, s, size)
    first, last = (quantile(end) for end in _ends(sde, t0, t1, s))
    return sde.time(log_snr(first + (last - first) * u))


def _first_less(num):
    # By what share the first step of "tapered" is less.
    return 0.3 if few(num) else 0.45


def _taper(u, first, last):
    """As u, but the first of its N steps less by this share, the last by one that rises to `last`: by 3/N less."""
    # A multistep method's first step has no history, and nothing corrects its last: both are shorter, the last more so in long runs.
    lengths = np.ones(len(u) - 1)
    lengths[0] -= first
    lengths[-1] -= max(0.0, last - 3 / len(lengths))
    return jnp.asarray(np.concatenate([[0.0], np.cumsum(lengths) / lengths.sum()]), u.dtype)


def _tapered(sde, t0, t1, u, s, size, num=None):
    num = len(u) - 1 if num is None else num
    return _student(sde, t0, t1, _taper(u, _first_less(num), 0.3), s, size, _tapered_quantiles(sde, t1, s, size, num))


def out_of_reach(num_steps: int, size):
    """Whether data of so many dimensions has more scales than so few evaluations, of which the first is at the prior, can follow."""
    return (num_steps in range(5, 9)) & (size > 1000)


def reach(num_steps: int) -> float:
    """How far from the data's standard deviation these few go, beside 5 of them."""
    return math.exp(0.25 * (num_steps - 5))


def _near(sde, t0, t1, u, s, size):
    num, tapered = len(u) - 1, _tapered(sde, t0, t1, u, s, size)
    if not out_of_reach(num, math.inf):
        return tapered
    # So few go by the data's standard deviation, not by its radius.
    early = _early(sde, t1, s)
    quantiles = _quantiles(jnp.log(2.8 * reach(num) ** 0.5 * (1 - 0.28 * early) * s), 3 + 0.15 * (num - 5), 1.55 + 0.4 * early)
    fewer = _student(sde, t0, t1, _taper(u, 0.45, 0.3), s, size, quantiles)
    return jnp.where(out_of_reach(num, size), fewer, tapered)


def _wide(sde, t0, t1, u, s, size):
    # What a network that predicts eps tells at high noise is its own, whose flow has structure at every log-SNR:
    # the more steps, the more even.
    num = len(u) - 1
    return _student(
        sde, t0, t1, _taper(u, 0.3, 0.5), s, size, _quantiles(jnp.log(0.65 * size**0.375 * s), 2.5 + 0.15 * num, 1.8 + 0.09 * num)
    )


def may_ask_ahead(num_steps: int, size):
    """Whether so many steps leave the first time without an evaluation anywhere: 2 to 20, but 6 of more than 3,072 dimensions, and 7 and 8
    of more than 1,536, gain more by it."""
    return (num_steps in range(2, 21)) & (size <= {6: MOST, 7: MOST // 2, 8: MOST // 2}.get(num_steps, math.inf))


def asks_ahead(half_log_snr, num_steps: int, s, size):
    """Whether `adams`, and its grid, leave the first time without an evaluation: where these steps may, and start in noise.

    What that costs goes by (alpha / sigma)^2 there times the largest variance of the data, which grows with its dimensions, whatever the
    number of steps, of which more ask for less. For 5, which gain the most, the least noise grows slower than the data's radius. Where the
    other form is that of scales out of reach, it pays from further out.
    """
    noise = jnp.exp(-jnp.maximum(half_log_snr, 0.5 * lowest_log_snr(s)))
    dimensions = jnp.maximum(1.0, size / 64)
    least = 14 * max(1.0, num_steps / 8) ** 2.5 * dimensions ** (0.4 if num_steps == 5 else 0.5)
    return may_ask_ahead(num_steps, size) & (noise > s * jnp.where(out_of_reach(num_steps, size), 20.8 * dimensions**0.5, least))


def _ahead(sde, t0, t1, u, s, size):
    # Two steps in one, where the method's first evaluation is within its first step.
    num = len(u) - 1
    more = _tapered(sde, t0, t1, jnp.zeros(num + 2, u.dtype), s, size, num)
    return jnp.where(asks_ahead(0.5 * _ends(sde, t0, t1, s)[0], num, s, size), jnp.delete(more, 1), _near(sde, t0, t1, u, s, size))


def within_first(sde: SDE, times: Float[Array, " times"], sigma_data: Number, event_size: int) -> Float[Array, ""]:
    """The time within the first step of a grid that "ahead" leaves out: where "tapered" has it."""
    num = len(times) - 1
    quantile, log_snr = _tapered_quantiles(sde, times[-1], sigma_data, float(event_size), num)
    first, second = (quantile(end) for end in _ends(sde, times[0], times[1], sigma_data))
    least = 1 - _first_less(num)
    return sde.time(log_snr(first + (second - first) * least / (1 + least)))


# (sde, first time, last time, u in [0, 1], standard deviation of the data, size of an event) -> times.
GRIDS = {
    "ahead": _ahead,
    "near": _near,
    "tapered": _tapered,
    "wide": _wide,
    "student": _student,
    "uniform": _uniform,
    "quadratic": _quadratic,
    "log_snr": _log_snr,
    "edm": _edm,
}


def time_grid(
    sde: SDE, num_steps: int, kind: str = "tapered", t_end: float | None = None, sigma_data: Number = 0.5, event_size: int = EVENT_SIZE
) -> Float[Array, " times"]:
    """num_steps + 1 decreasing times from `sde.t_max` to t_end (`sde.t_min` by default).

    kind, for N = num_steps, q = sigma / alpha, s = sigma_data, D = event_size and d = log(D / 64), at least 0:
      "student": log(q) at equal quantiles of Student's t distribution (2 degrees of freedom; scale 2 above and 2.1 below) around
        log(0.65 D^(1/5) s): most steps where the data takes shape. For an end between e^-5.5 s and e^-3 s the centre moves to 0.72 of that
        and the lower scale grows by 0.4.
      "tapered", for the multistep methods of this project: the same around log(D^(3/8) s / 3) + 0.75 d / N, with scales 1.5 + 0.4 d above
        and 1.8 + max(0.1, 0.6 - 5/N) d below (N < 6: around log(0.4 D^(3/8) s), with 2 + 0.15 d and 1.85 + 0.2 max(N - 4, 0) d). Of these
        quantiles the first step covers 0.55 (N < 6: 0.7) of the others' share, the last of N > 10 0.7 + 3/N of it. For an early end as
        "student". Beyond D = 3,072 (N > 10: 6,144) nothing changes any more.
      "near": "tapered", but 5 to 8 steps in more than 1,000 dimensions are around log(2.8 s) + (N - 5)/8, with 3 + 0.15 (N - 5) above and
        1.55 below, whatever D, and the first covers 0.55.
      "ahead", the grid of `adams`: "near", but 2 to 20 steps from noise (not 6 in more than 3,072 dimensions, nor 7 and 8 in more than
        1,536) are those of "tapered" for one step more without its second time.
      "wide", for networks that predict eps: as "student" around log(0.65 D^(3/8) s), with scales 2.5 + 0.15 N above and 1.8 + 0.09 N below,
        wherever it ends; the first step covers 0.7 of the others' share, the last of N > 6 1/2 + 3/N.
      "edm": uniform in q^(1/7) (arXiv:2206.00364 eq. 5, which k-diffusion calls Karras').
      "log_snr": uniform in lambda (arXiv:2206.00927 section 3.2).
      "uniform" in t; "quadratic": uniform in sqrt(t) (arXiv:2010.02502 appendix D.2).
    Those that go by q begin at a lambda of -20 at the lowest (less 2 log s where that is above 1), where nothing is left of the data; t_max
    takes the place of that time.
    sigma_data: the standard deviation of the data. event_size: how many numbers an event holds: its radius grows with the root of that.
    Give it for an array that `sample_ode` shall have: `adams` goes by the size of what it samples.

    Raises:
      ValueError: unknown kind, num_steps < 1, sigma_data not positive, event_size < 1, t_end outside [t_train, t_max), or times that
        are equal in this precision.
    """
    fn = lookup(GRIDS, kind, "grid")
    check(
        isinstance(num_steps, (int, np.integer)) and not isinstance(num_steps, bool) and num_steps >= 1,
        f"num_steps={num_steps!r} must be an integer of at least 1; 10 to 20 is usual for an ODE sampler",
    )
    check_sigma_data(sigma_data)
    whole = isinstance(event_size, (int, np.integer)) and event_size >= 1
    check(whole, f"event_size={event_size!r} must be an integer of at least 1: how many numbers an event holds")
    times = _fill(fn, sde, check_t_end(sde, t_end), sigma_data, float(event_size), num_steps)
    check(
        (times[1:] < times[:-1]).all(),
        f"grid {kind!r} of {num_steps} steps repeats times of {type(sde).__name__} in {times.dtype}: take fewer steps, or pass an array",
    )
    return times


@functools.partial(jax.jit, static_argnames=("fn", "num_steps"))
def _fill(fn, sde, t_end, sigma_data, event_size, num_steps):
    t0, t1 = jnp.asarray(sde.t_max, float), jnp.asarray(t_end, float)
    grid = fn(sde, t0, t1, jnp.linspace(0.0, 1.0, num_steps + 1), sigma_data, event_size)
    # The ends are exact, whatever the map between lambda and t rounds to.
    return grid.at[0].set(t0).at[-1].set(t1)


def check_t_end(sde: SDE, t_end):
    """t_end, or `sde.t_min` for None; a ValueError where it lies outside the SDE's range."""
    if t_end is None:
        return sde.t_min
    check(np.ndim(t_end) == 0 and not isinstance(t_end, str), f"t_end={t_end!r} must be one number, a time of the SDE")
    if known(t_end, sde.t_train, sde.t_max):
        check(
            sde.t_train <= t_end < sde.t_max and np.float32(t_end) < np.float32(sde.t_max),
            f"t_end={t_end} is outside the range of {type(sde).__name__}: choose t_train={sde.t_train} <= t_end < "
            f"t_max={sde.t_max}, or None for t_min={sde.t_min}",
        )
    return t_end


def resolve_grid(
    sde: SDE, grid, num_steps: int | None, t_end: float | None, sigma_data: Number, event_size: int, from_prior: bool, usual_steps: int = 18
) -> Float[Array, " times"]:
    """A grid by name through `time_grid`, or the given array after a check that it decreases within the SDE's range.

    num_steps: of a grid by name, `usual_steps` by default. from_prior: the grid must begin at t_max, where the prior belongs.
    """
    if isinstance(grid, str):
        return time_grid(sde, usual_steps if num_steps is None else num_steps, grid, t_end, sigma_data, event_size)
    times = grid if isinstance(grid, jax.core.Tracer) else np.asarray(grid)
    check(
        times.ndim == 1
        and times.shape[0] >= 2
        and jnp.issubdtype(times.dtype, np.number)
        and not jnp.issubdtype(times.dtype, np.complexfloating),
        f"grid has shape {times.shape} of {times.dtype}; pass a 1-D array of at least 2 decreasing times, or one of {sorted(GRIDS)}",
    )
    if t_end is not None:
        raise ValueError(f"t_end={t_end} and a grid array were both given; the grid's last time is t_end: pass one")
    check(
        num_steps in (None, times.shape[0] - 1),
        f"num_steps={num_steps} and a grid array of {times.shape[0] - 1} steps were both given: pass one",
    )
    if known(times, sde.t_train, sde.t_max):
        check(bool(np.isfinite(times).all()), "grid holds NaN or infinity; all its times must be numbers")
        check(
            bool((np.diff(times.astype(jnp.result_type(float))) < 0).all()),
            "grid must be strictly decreasing from the prior's time to the data's; reverse it, or drop times that are "
            f"repeated in {jnp.result_type(float)}",
        )
        # Times that were rounded to float32 on their way here may miss the range by that rounding.
        check(
            times[0] <= sde.t_max * (1 + 1e-6) and times[-1] >= sde.t_train * (1 - 1e-6),
            f"grid runs from {times[0]:g} to {times[-1]:g}, outside the range [{sde.t_train}, {sde.t_max}] of "
            f"{type(sde).__name__}; t_max={sde.t_max} is the usual start and t_min={sde.t_min} the usual end",
        )
        check(
            not from_prior or times[0] >= sde.t_max * (1 - 1e-6),
            f"grid starts at {times[0]:g}, but the prior belongs to t_max={sde.t_max}: start it there, or pass init to a sampler",
        )
    return jnp.asarray(times, float)
