"""Deterministic samplers: the probability-flow ODE dx/dt = f - 1/2 g^2 score (arXiv:2011.13456 eq. 13)."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sde_diffusion.samplers.grid import MOST, asks_ahead, few, may_ask_ahead, out_of_reach, reach, within_first
from sde_diffusion.samplers.integrate import integrate
from sde_diffusion.samplers.linear import Solver, Steps, Table, one_step, register
from sde_diffusion.samplers.spaces import (
    adams_bashforth, adams_moulton, ahead, centred, data_space, midpoint, multistep, noise_space, orders, residual, residual_space, sigma_space,
    with_origin,
)  # fmt: skip
from sde_diffusion.sde import SDE, Number, derivative, known

METHODS: dict[str, Solver] = {}

# Adams-Bashforth as predictor and Adams-Moulton as corrector, for w over log sigma between the scales of the data
# (`spaces.residual_space`), less what a mean of the data explains (`spaces.centred`): the project's own.

_ADAMS = dict(evaluations=1, grid="tapered")
# Evaluations from which fewer of the last steps of `adams` are of low order (`_between_orders`).
_MANY = 15


def _redone_again(evaluations, size):
    """Whether every step but the last two is redone a second time: in more dimensions the coarsest directions lose by it,
    in 65 to 128 from about 25 evaluations on."""
    return evaluations >= _MANY and size <= (128 if evaluations <= 20 else 64)


def _relative_radius(size):
    """The radius of data of these dimensions over that in 64, at least 1."""
    return max(1.0, math.sqrt(size) / 8)


def _scales(steps, num=None):
    """(scale, fine, coarse) of `spaces.residual_space` for `num` evaluations.

    Data has structure from far below its standard deviation s to its radius s sqrt(D), and what is coarsest moves it the furthest. Four or
    fewer evaluations cannot follow that: theirs are next to s, and a polynomial in s / sigma or sigma / s.
    """
    num = steps.num if num is None else num
    s, size = steps.sigma_data, steps.event_size
    # Never 0, which would leave nothing of the variable.
    many = min(1.0, max(0.01, (num - 4) / 6))
    # In more dimensions the coarsest directions are most of the error. In few evaluations, whose grid goes further out, the linear part
    # follows; else the coarse scale comes earlier. Beyond that of ten evaluations, mixtures fitted to images lose a tenth.
    if few(num):
        linear, far = min(1.0, many + 0.08 * math.log(_relative_radius(min(size, MOST)))), many
    else:
        linear, far = many, min(1.0, many + 0.3 * math.log(_relative_radius(size)))
    return s * _relative_radius(min(size, MOST)) ** linear, s * 0.1**many, s * (0.25 * math.sqrt(size)) ** far


def _near_scales(steps):
    """As `_scales`; where the data's are out of reach they begin above its standard deviation, further apart with every evaluation."""
    if not out_of_reach(steps.num, steps.event_size):
        return _scales(steps)
    s, further = steps.sigma_data, reach(steps.num)
    fine = 2.5 * s / further**0.5
    return 1.8 * further * s, fine, fine + 2 * further**3 * s


def _adams(steps, order):
    scales = _scales(steps)
    space = residual_space(steps, *scales)
    return centred(steps, multistep(steps, space, adams_bashforth(space, order), adams_moulton(space, order)), scales[0])


def _between_orders(steps, scales, corrected=True, evaluations=0, origin=False):
    """evaluations: of `adams`. From `_MANY` on the last steps are short: two are then of order 2, not three, and of that alone;
    and in few dimensions steps are redone a second time (`_redone_again`). origin: see `spaces.with_origin`."""
    many = evaluations >= _MANY
    left = steps.num - np.arange(steps.num)
    order = np.minimum(orders(steps.num, 4), 1 + (left + 1) // 2 if many else np.maximum(2, left - 1))
    space = residual_space(steps, *scales)
    if origin:
        space = with_origin(steps, space, *scales[1:])
    high, low = adams_bashforth(space, order), adams_bashforth(space, np.maximum(order - 1, 1))
    share = jnp.where(many & (left <= 2), 1.0, 0.75)[:, None].astype(high.dtype)
    explicit = share * high + (1 - share) * jnp.pad(low, ((0, 0), (0, high.shape[1] - low.shape[1])))
    later = adams_moulton(space, order, later=True) if _redone_again(evaluations, steps.event_size) else None
    return multistep(steps, space, explicit, adams_moulton(space, order) if corrected else None, later)


def from_the_prior(steps: Steps) -> Table:
    """The rule of `adams` with an evaluation at the first time, as in many steps."""
    scales = _near_scales(steps)
    return centred(steps, _between_orders(steps, scales, evaluations=steps.num, origin=True), scales[0])


def from_within(steps: Steps) -> Table:
    """The rule of `adams` without an evaluation at the first time, as in few steps; one row less."""
    scales = _scales(steps, steps.num - 1)
    return ahead(steps, _between_orders(steps, scales, evaluations=steps.num - 1), scales[0])


@functools.partial(jax.jit, static_argnums=1)
def _rule(steps: Steps, within: bool) -> Table:
    """Either of these, told the grid without the time within its first step; both in the form of the widest: one program runs them."""
    if within:
        inner = within_first(steps.sde, steps.time, steps.sigma_data, steps.event_size)
        table = from_within(Steps.of(steps.sde, jnp.insert(steps.time, 1, inner), steps.sigma_data, steps.event_size))
    else:
        table = from_the_prior(steps)
        table = dataclasses.replace(table, scale=jnp.ones_like(table.time))
    return dataclasses.replace(table, history=jnp.pad(table.history, ((0, 0), (0, max(0, 5 - table.history.shape[1])))))


@jax.jit
def _asks_ahead(steps: Steps):
    return asks_ahead(steps.half_log_snr[0], steps.num, steps.sigma_data, steps.event_size)


@register(METHODS, compiled=False, order=3, source="as adams_4; spaces.ahead", evaluations=1, grid="ahead")
def adams(steps: Steps) -> Table:
    """The default, for any number of evaluations: as adams_4, with a predictor between two orders.

    It is told the data's standard deviation s and the dimensions D, as the grid is: up to 4 evaluations go by little but s, 10 and more by
    the radius s sqrt(D) too, whose coarse scale comes earlier in more than 64 dimensions (`spaces.residual_space`; exact for N(0, s^2 I) up
    to 64 dimensions). Of more than 1,000 dimensions 5 to 8 evaluations from the prior cannot follow all scales, and go by s; beyond 3,072
    (the grid of more than 10 evaluations: 6,144) only the coarse scale grows.

    It predicts by three quarters of Adams-Bashforth of order 4 and one of order 3: networks are less smooth than exact scores, and high
    orders amplify that. The last three steps are of orders 2 and 1 below 15 evaluations; from there on the last two are of order 2 alone,
    the two before of orders 3 and 2: they are long beside the finest structure of the data, and the network's own error outweighs what
    higher orders gain. The order, 3, is that of what the last step, which is not corrected, leaves in many steps.

    From 15 evaluations on in up to 64 dimensions, and from 15 to 20 in up to 128, the corrector redoes each step but the last two once
    more, by the evaluation at the end of the next. That gains on the rule's own grid, in few dimensions the most; in more the coarsest
    directions, where the first steps err, lose by it. On other grids it can lose. Of evaluations closer together than an eighth of a step
    one counts (`spaces._distinct`): a grid may have further times anywhere.

    In 2 to 20 steps (but 6 in more than 3,072 dimensions, and 7 and 8 in more than 1,536) from noise, the first evaluation is within the
    first step instead of at its beginning, where it would tell the mean of the data and little else (`spaces.ahead`). Noise is sigma > 14
    alpha s in up to 8 steps and 140 alpha s in 20, of more than 64 dimensions times sqrt(D / 64), in 5 steps times (D / 64)^0.4; 5 to 8
    steps of more than 1,000 dimensions: sigma > 2.6 alpha s sqrt(D). Else, from within ten times the data's radius, the first three steps,
    but for the last of all, count infinite noise as a node (`spaces.with_origin`).
    """
    if not may_ask_ahead(steps.num, steps.event_size):
        return _rule(steps, False)
    noise = _asks_ahead(steps)
    if known(noise):  # then one of the two is compiled
        return _rule(steps, bool(noise))
    return jax.tree.map(lambda a, b: jnp.where(noise, a, b), _rule(steps, True), _rule(steps, False))


@register(METHODS, order=2, source="as adams_4; spaces.residual_space", evaluations=1, grid="wide", zero_snr=False)
def adams_eps(steps: Steps) -> Table:
    """The default for networks that predict eps or the score: as adams, over log-SNR, and with every evaluation where the state is.

    Such a network's x0_hat is off, at high noise, by its error in eps times sigma / alpha: of one that is 0.02 off by three at sigma /
    alpha = 150. This is a flow of its own, with structure at every log-SNR, which neither tells a mean of the data nor may be left out. So
    w is that of three times the data's standard deviation s (of less in fewer than 8 steps, of more above 64 dimensions in 6 steps and
    more), interpolated over log-SNR (in few steps by polynomials that end between the scales of the data, as those of adams), on a grid
    that is the more even the more steps it has. Two steps are too long to correct the first. For an exact eps, adams is closer.
    """
    s, wide = steps.sigma_data, 1.0 if few(steps.num) else _relative_radius(min(steps.event_size, MOST)) ** 0.4
    scale = min(3.0, max(1.0, 0.5 * steps.num - 1)) * wide * s
    decades = min(6.0, max(0.01, max(0, steps.num - 4) ** 2 / 8))  # below and above s
    return _between_orders(steps, (scale, s * 0.1**decades, s * 10.0**decades), corrected=steps.num > 2)


def usual_method(prediction: str | None) -> str:
    """The default solver's name, by what the network predicts (see `as_score`), None where that is not known."""
    return "adams_eps" if isinstance(prediction, str) and prediction in ("eps", "score") else "adams"


@register(METHODS, order=3, min_steps=2, source="as adams_4", **_ADAMS)
def adams_2(steps: Steps) -> Table:
    """As adams_4, predictor of order 2 and corrector of order 3."""
    return _adams(steps, orders(steps.num, 2))


@register(METHODS, order=4, min_steps=3, source="as adams_4", **_ADAMS)
def adams_3(steps: Steps) -> Table:
    """As adams_4, predictor of order 3 and corrector of order 4."""
    return _adams(steps, orders(steps.num, 3))


@register(METHODS, order=5, min_steps=4, source="spaces.residual_space, spaces.centred", **_ADAMS)
def adams_4(steps: Steps) -> Table:
    """Multistep predictor and corrector for w over log sigma between the data's scales: for many steps and small errors.

    Adams-Bashforth of order 4 predicts a step, Adams-Moulton of order 5 redoes it once its end has been evaluated for the next (PEC).
    Orders rise from 1 at the start; the last step is not corrected. What a mean of the data explains is integrated exactly, as far as the
    first evaluation is trusted (`spaces.centred`). Needs the data's standard deviation s, roughly.
    """
    return _adams(steps, orders(steps.num, 4))


# Exponential integrators of the literature.


@register(METHODS, order=1, evaluations=1, source="arXiv:2010.02502 eq. 12; DPM-Solver(++) of order 1")
def ddim(steps: Steps) -> Table:
    """x_s = alpha_s x0 + sigma_s eps: exact where x0 is a point."""
    space = data_space(steps)
    return multistep(steps, space, adams_bashforth(space, orders(steps.num, 1)))


@register(METHODS, order=2, evaluations=1, min_steps=2, source="arXiv:2211.01095 alg. 2")
def dpmpp_2m(steps: Steps) -> Table:
    """DPM-Solver++(2M): x0 over log-SNR, by the midpoint rule. Last step of order 1 below 15 steps."""
    space = data_space(steps)
    return multistep(steps, space, midpoint(space, orders(steps.num, 2, taper=15)))


@register(METHODS, order=3, evaluations=1, min_steps=3, source="arXiv:2211.01095 section 4.2")
def dpmpp_3m(steps: Steps) -> Table:
    """DPM-Solver++(3M): x0 over log-SNR, order 3. Last steps of lower order below 15 steps.

    With the exact integral of the quadratic through three x0; the widely used code halves its second difference and
    is of order 2.
    """
    space = data_space(steps)
    return multistep(steps, space, adams_bashforth(space, orders(steps.num, 3, taper=15)))


@register(METHODS, order=2, evaluations=2, source="arXiv:2211.01095 alg. 1 with r = 1/2")
def dpmpp_2s(steps: Steps) -> Table:
    """DPM-Solver++(2S), singlestep: no history, so it may be mixed with other moves of the state."""
    middle, factors, coefficients = _fractions(steps, 0.5)
    (a, end), (b, e) = factors, coefficients
    return _singlestep(steps, [middle], [(a, [b]), (end, [0.0, e])])


@register(METHODS, order=3, evaluations=3, source="arXiv:2206.00927 alg. 2 for x0, with r = 1/3 and 2/3")
def dpmpp_3s(steps: Steps) -> Table:
    """DPM-Solver++(3S), singlestep."""
    h = steps.h
    one_third, two_thirds, factors, coefficients = _fractions(steps, 1 / 3, 2 / 3)
    (a, b, end), (p, q, e) = factors, coefficients
    # The integrals of the slope: alpha ((e^-h - 1) / h + 1) for a step of length h.
    bend = 2 * (two_thirds[1] - q / (2 / 3 * h))
    slope = 1.5 * (steps.alpha[1:] - e / h)
    return _singlestep(steps, [one_third, two_thirds], [(a, [p]), (b, [q - bend, bend]), (end, [e - slope, 0.0, slope])])


def _fractions(steps, *fractions):
    """Points inside of each step, then the factors of x and the coefficients of a constant x0 up to them and to the end."""
    points = [steps.between(f) for f in fractions]
    ends = [*((a, s) for _, a, s in points), (steps.alpha[1:], steps.sigma[1:])]
    factors = [sigma / steps.sigma[:-1] for _, sigma in ends]
    return *points, factors, [-a * jnp.expm1(-f * steps.h) for (a, _), f in zip(ends, [*fractions, 1.0])]


def _singlestep(steps, points, moves):
    times = [steps.time[:-1], *(time for time, _, _ in points)]
    return one_step(times, [(1.0, 0.0)] * len(times), moves)


def _unipc(steps, order):
    space, order = data_space(steps, corrected=True), orders(steps.num, order, taper=15)
    explicit, implicit = adams_bashforth(space, order), adams_moulton(space, order)
    # With B(h) = e^h - 1 the paper replaces the solutions of the smallest systems by 1/2.
    if order.max() > 1:
        half = jnp.pad(midpoint(space, order), ((0, 0), (0, explicit.shape[1] - 2)))
        explicit = jnp.where(order[:, None] == 2, half, explicit)
    trapezoid = 0.5 * adams_bashforth(space, np.ones_like(order))
    trapezoid = jnp.pad(jnp.tile(trapezoid, (1, 2)), ((0, 0), (0, implicit.shape[1] - 2)))
    return multistep(steps, space, explicit, jnp.where(order[:, None] == 1, trapezoid, implicit))


@register(METHODS, order=2, evaluations=1, source="as unipc_3")
def unipc_1(steps: Steps) -> Table:
    """UniPC-1: DDIM, each step corrected by the trapezoidal rule."""
    return _unipc(steps, 1)


@register(METHODS, order=3, evaluations=1, min_steps=2, source="as unipc_3")
def unipc_2(steps: Steps) -> Table:
    """UniPC-2: dpmpp_2m with a corrector of order 3."""
    return _unipc(steps, 2)


@register(METHODS, order=4, evaluations=1, min_steps=3, source="arXiv:2302.04867 alg. 1, 2 with B_2(h) = e^h - 1")
def unipc_3(steps: Steps) -> Table:
    """UniPC-3: predictor of order 3 and corrector of order 4 for x0 over log-SNR. Last steps of lower order below 15.

    Evaluations closer together than an eighth of a step count as one, as in adams: by the paper's formula grids that have such diverge.
    """
    return _unipc(steps, 3)


def _deis(steps, order):
    space = noise_space(steps)
    return multistep(steps, space, adams_bashforth(space, orders(steps.num, order, taper=15)))


_DEIS = dict(evaluations=1, zero_snr=False)


@register(METHODS, order=2, min_steps=2, source="as deis_4", **_DEIS)
def deis_2(steps: Steps) -> Table:
    """DEIS of order 2."""
    return _deis(steps, 2)


@register(METHODS, order=3, min_steps=3, source="as deis_4", **_DEIS)
def deis_3(steps: Steps) -> Table:
    """DEIS of order 3."""
    return _deis(steps, 3)


@register(METHODS, order=4, min_steps=4, source="arXiv:2204.13902 eq. 15, with polynomials in log(sigma / alpha)", **_DEIS)
def deis_4(steps: Steps) -> Table:
    """DEIS: exponential Adams-Bashforth for eps over log-SNR. Last steps of lower order below 15 steps."""
    return _deis(steps, 4)


# Classical methods.


@register(METHODS, order=1, evaluations=1, zero_snr=False, grid="uniform", source="arXiv:2011.13456 eq. 13")
def euler(steps: Steps) -> Table:
    """Euler's method in t."""
    t, length = steps.time[:-1], jnp.diff(steps.time)
    slope = 0.5 * steps.sde.diffusion(t) ** 2 / steps.sigma[:-1]
    return one_step([t], [(0.0, 1.0)], [(1 + length * derivative(steps.sde.log_alpha, t), [length * slope])])


@register(METHODS, order=4, evaluations=1, min_steps=4, zero_snr=False, source="Adams-Bashforth for arXiv:2206.00364 eq. 4")
def lms(steps: Steps) -> Table:
    """Linear multistep of order 4: eps over sigma / alpha. For uniform steps; unstable where they shrink fast."""
    space = sigma_space(steps)
    return multistep(steps, space, adams_bashforth(space, orders(steps.num, 4)))


@register(METHODS, order=2, evaluations=2, source="arXiv:2206.00364 alg. 1")
def heun(steps: Steps) -> Table:
    """The trapezoidal rule for eps over sigma / alpha. A step from above the data's scale that divides that by more than 8 is DDIM's."""
    return one_step(**heun_step(steps, steps.time[:-1], steps.alpha[:-1], steps.sigma[:-1], steps.h))


# Longest step of Heun's method in log(sigma / alpha); EDM's 18 steps are shorter.
_LONGEST = math.log(8.0)


def heun_step(steps: Steps, t, alpha, sigma, h):
    """The arguments of `one_step` for a step of Heun's method from times t, h away from the end in log(alpha / sigma)."""
    alpha_s, sigma_s = steps.alpha[1:], steps.sigma[1:]
    # Not from zero SNR, nor in long steps from above the data's scale, where an error of x0_hat at the end counts by the ratio of the
    # step's two sigma / alpha: these are DDIM's, written by x0, which leaves no difference of large numbers.
    whole = (alpha > 0) & ((h < _LONGEST) | (sigma < alpha * steps.sigma_data))
    # alpha_s times the step in sigma / alpha.
    length = sigma_s * -jnp.expm1(jnp.where(whole, h, 0.0))
    factor = jnp.where(whole, alpha_s / jnp.where(whole, alpha, 1.0), sigma_s / sigma)
    first = jnp.where(whole, length, alpha_s * jnp.where(alpha > 0, -jnp.expm1(-h), 1.0))
    kept = [(jnp.where(whole, 0.0, 1.0), jnp.where(whole, 1.0, 0.0)), (0.0, 1.0)]
    end = [first - 0.5 * length, 0.5 * length]
    return dict(times=[t, steps.time[1:]], kept=kept, moves=[(factor, [first]), (factor, end)])


@register(METHODS, order=4, evaluations=4, source="Kutta 1901; spaces.residual_space")
def rk4(steps: Steps) -> Table:
    """The classical Runge-Kutta method, for d(x / c) = w dzeta as in adams_4."""
    s, zeta = steps.sigma_data, jnp.arcsinh(jnp.exp(-steps.half_log_snr) / steps.sigma_data)
    middle = steps.sde.time(-2 * jnp.log(s * jnp.sinh(0.5 * (zeta[1:] + zeta[:-1]))))
    start, end = residual(steps.alpha[:-1], steps.sigma[:-1], s), residual(steps.alpha[1:], steps.sigma[1:], s)
    inside = residual(steps.sde.alpha(middle), steps.sde.sigma(middle), s)
    c, a, b, d = start[1], inside[1], end[1], jnp.diff(zeta)
    return one_step(
        times=[steps.time[:-1], middle, middle, steps.time[1:]],
        kept=[start[0], inside[0], inside[0], end[0]],
        moves=[
            (a / c, [a * d / 2]),
            (a / c, [0.0, a * d / 2]),
            (b / c, [0.0, 0.0, b * d]),
            (b / c, [b * d / 6, b * d / 3, b * d / 3, b * d / 6]),
        ],
    )


def sample_ode(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    *,
    method=None,
    num_steps: int | None = None,
    grid: str | Float[Array, " times"] | None = None,
    t_end: float | None = None,
    init: Float[Array, "b ..."] | None = None,
    denoise: bool = True,
    return_path: bool = False,
    sigma_data: Number | None = None,
):
    """Samples by the probability-flow ODE: deterministic given the prior draw.

    Args:
      score_fn: `(x (B, *event), t (B,)) -> (B, *event)`; see `as_score` for networks.
      key: a random key, of the prior sample; with `init` nothing depends on it.
      shape: `(B, *event)`.
      method: a name that `sd.solvers()` lists, a solver of `fit_solver`, or a function from `Steps` to a `Table` (`samplers.linear` has an
        example), whose grid is "student". The default, of one evaluation a step, suits every number of them: "adams_eps" where the score
        function says that its network predicts eps or the score (`as_score`), else "adams".
      num_steps: steps of the grid, 18 by default. Evaluations: num_steps times those of a step, and one more for
        `denoise`.
      grid: "ahead" (the default of adams), "near" (the same with the first evaluation at the prior), "wide" (of adams_eps), "tapered" (of
        adams_2 to 4), "student" (of most others), "edm", "log_snr", "uniform" or "quadratic" (see `time_grid`), or an array of decreasing
        times, instead of num_steps and t_end: other values do not recompile, and traced ones are not checked.
      t_end: where the grid stops, in [t_train, t_max); `sde.t_min` by default.
      init: the state at the first time `(B, *event)` instead of a prior draw.
      denoise: end with one posterior-mean step E[x_0 | x_{t_end}].
      return_path: also return the states at all times of the grid, `(len(grid), B, *event)`.
      sigma_data: standard deviation of the data, which the default method and grid look at; by default what the
        score function says of itself (`score_fn.sigma_data`), else 0.5.

    Returns:
      samples `(B, *event)`, or `(samples, path)`. Its gradient keeps the states, not the network's activations.

    Raises:
      ValueError: before any compilation, for an unknown method or grid, num_steps < 1 or too few for the method, a
        grid or t_end outside the SDE's range, t_end or another num_steps beside a grid array, a score of the wrong shape or
        dtype, a method that cannot start from zero terminal SNR, or a `Table` of the wrong shapes or with noise.
    """
    if method is None:
        method = usual_method(getattr(score_fn, "prediction", None))
    return integrate(
        METHODS, method, score_fn, sde, key, shape, num_steps=num_steps, grid=grid, t_end=t_end, init=init, denoise=denoise,
        return_path=return_path, sigma_data=sigma_data,
    )  # fmt: skip
