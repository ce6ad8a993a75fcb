"""Stochastic samplers: the reverse SDE at any noise level tau,

    dx = (f - (1 + tau^2) / 2 g^2 score) dt + tau g dw,

which has the same marginals for every tau: 0 is the probability-flow ODE, 1 the reverse SDE (arXiv:2011.13456 eq. 6;
arXiv:2206.00364 eq. 6). Each is also a predictor of `sample_pc`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sde_diffusion.samplers.integrate import check_noise_level, integrate
from sde_diffusion.samplers.linear import Solver, Steps, Table, one_step, register
from sde_diffusion.samplers.ode import heun_step
from sde_diffusion.samplers.spaces import (
    adams_bashforth, adams_moulton, data_space, gaussian_space, midpoint, multistep, orders, root_decay,
)  # fmt: skip
from sde_diffusion.sde import SDE, Number, check, derivative

METHODS: dict[str, Solver] = {}
_EPS = [(0.0, 1.0)]
# Steps below which the last ones are of lower order: an extrapolation amplifies the noise of the steps before.
_TAPER = 40
# Up to so many steps order 3 does so throughout.
_FEW = 15
_register = functools.partial(register, METHODS, stochastic=True)


def _transition(steps):
    """x_t | x_s ~ N(a x_s, v I) for s < t: a = alpha_t / alpha_s and v = sigma_t^2 - a^2 sigma_s^2, `(N,)` each."""
    a = steps.alpha[:-1] / steps.alpha[1:]
    return a, -(steps.sigma[:-1] ** 2) * jnp.expm1(-jnp.diff(steps.sde.log_snr(steps.time)))


@_register(order=1, evaluations=1, grid="uniform", zero_snr=False, source="arXiv:2011.13456 eq. 6")
def euler_maruyama(steps: Steps) -> Table:
    """Euler-Maruyama in t. Strong order 1/2, weak order 1."""
    t, length, tau = steps.time[:-1], -jnp.diff(steps.time), steps.noise_level
    variance = steps.sde.diffusion(t) ** 2 * length
    slope = -0.5 * (1 + tau**2) * variance / steps.sigma[:-1]
    return one_step([t], _EPS, [(1 - length * derivative(steps.sde.log_alpha, t), [slope])], noise=tau * jnp.sqrt(variance))


@_register(order=1, evaluations=1, grid="uniform", zero_snr=False, source="arXiv:2011.13456 appendix E, eq. 46")
def reverse_diffusion(steps: Steps) -> Table:
    """The forward transition's own discretization, reversed."""
    (a, variance), tau = _transition(steps), steps.noise_level
    slope = -0.5 * (1 + tau**2) * variance / steps.sigma[:-1]
    return one_step([steps.time[:-1]], _EPS, [(2 - a, [slope])], noise=tau * jnp.sqrt(variance))


@_register(order=1, evaluations=1, grid="uniform", source="arXiv:2006.11239 eq. 6-7; for VE arXiv:2011.13456 eq. 47")
def ancestral(steps: Steps) -> Table:
    """A draw from q(x_s | x_t, x_0 = x0_hat), with its variance sigma_s^2 / sigma_t^2 v; DDIM at noise level 0."""
    space = data_space(steps)
    return multistep(steps, space, adams_bashforth(space, orders(steps.num, 1)))


@_register(order=1, evaluations=1, grid="uniform", source='arXiv:2006.11239 section 3.2, sigma^2 = beta ("fixedlarge")')
def ancestral_large(steps: Steps) -> Table:
    """As `ancestral`, with the forward transition's variance v."""
    space, (_, variance) = data_space(steps), _transition(steps)
    table = multistep(steps, space, adams_bashforth(space, orders(steps.num, 1)))
    return dataclasses.replace(table, noise=steps.noise_level * jnp.sqrt(variance))


@_register(order=2, evaluations=1, min_steps=2, source="arXiv:2211.01095 eq. 18 (SDE-DPM-Solver++(2M))")
def sde_dpmpp_2m(steps: Steps) -> Table:
    """SDE-DPM-Solver++(2M): x0 over log-SNR by the midpoint rule, the noise exact. Last step of order 1 below 40 steps."""
    space = data_space(steps)
    return multistep(steps, space, midpoint(space, orders(steps.num, 2, taper=_TAPER)))


@_register(order=3, evaluations=1, min_steps=3, source="as sde_dpmpp_2m, with three x0")
def sde_dpmpp_3m(steps: Steps) -> Table:
    """SDE-DPM-Solver++(3M): order 3 in x0, the noise exact. Last steps of lower order below 40 steps; below 16 it is sde_dpmpp_2m."""
    space, order = data_space(steps), _orders(steps.num)
    return multistep(steps, space, _predictor(space, order))


@_register(order=4, evaluations=1, min_steps=3, source="arXiv:2309.05019 alg. 1, predictor and corrector of 3 steps")
def sa_solver(steps: Steps) -> Table:
    """SA-Solver: stochastic Adams, predictor of order 3 in x0 and a corrector that keeps the noise.

    Last steps of lower order below 40 steps; below 16 it predicts by the midpoint rule of sde_dpmpp_2m. Evaluations closer together than
    an eighth of a step count as one, as in adams.
    """
    space, order = data_space(steps, corrected=True), _orders(steps.num)
    return multistep(steps, space, _predictor(space, order), adams_moulton(space, order))


@_register(order=3, evaluations=1, source="spaces.gaussian_space")
def sde_adams(steps: Steps) -> Table:
    """Stochastic Adams about a Gaussian: for 10 and more steps; below 4 max(tau, 1)^2 it is sde_dpmpp_2m.

    The reverse SDE of N(m, s^2 I), s the data's standard deviation, is solved in closed form, at any noise level. What the network says
    beyond that (`spaces.gaussian_space`) is predicted by Adams-Bashforth of order 2, and corrected by Adams-Moulton of order 3 once the end
    of the step has been evaluated for the next; the noise is kept.

    Directions of the data far finer than q = sigma / alpha contract by e^(-z) more in a step than the Gaussian, which an explicit method
    turns into noise where z is large. So the slope of the prediction counts 1 / (1 + (z / 1.5)^2), the correction this times that of the
    next step, and what is left, a step of order 1, is about a Gaussian of variance s^2 / (1 + (z / 4)^6 (1 + s / q)^3): of the last steps of
    a few about a point, as in `ancestral`. z is 1 + max(tau, 1)^2 times the step's length less that of the Gaussian's contraction, and more,
    up to log 10, where a step about N(m, s^2 I) would overshoot in such directions, as at noise levels above 1.

    It is for its own grid; on others it gains less. In thousands of dimensions with the spectra of photographs sde_dpmpp_2m on "log_snr" is
    closer below 15 steps.
    """
    s, order, q = steps.sigma_data, orders(steps.num, 2), jnp.exp(-steps.half_log_snr)
    tau = jnp.asarray(steps.noise_level, q.dtype)
    space = gaussian_space(steps, s)
    z = (1 + jnp.maximum(tau, 1.0) ** 2) * jnp.diff(jnp.log(jnp.hypot(1.0, s / q)))
    # What is left of the state: by the Gaussian, and of a point at 0 by a step about the Gaussian; beside it half of the noise at the end.
    said, noise = space.weights.sum(axis=1) / steps.alpha[1:], 0.5 * q[1:] / q[:-1]
    q, alpha, sigma = q[:-1], steps.alpha[:-1], steps.sigma[:-1]
    overshoot = (1 - said - (jnp.sqrt(said) * s / q) ** 2 + noise) / (1 - said + noise)
    z = jnp.maximum(z, -jnp.log(jnp.maximum(overshoot, 0.1)))
    share = 1 / (1 + (z / 1.5) ** 2)
    narrow = s / jnp.sqrt(1 + (z / 4) ** 6 * (1 + s / q) ** 3)
    near = gaussian_space(steps, narrow)
    high, implicit = adams_bashforth(space, order), adams_moulton(space, order)
    constant = jnp.pad(adams_bashforth(space, np.ones_like(order)), ((0, 0), (0, high.shape[1] - 1)))
    slope = share[:, None] * (high - constant)
    correction = (share * jnp.append(share[1:], 0.0))[:, None] * (implicit - jnp.pad(constant + slope, ((0, 0), (1, 0))))
    # The y of `near` is a part of that of `space`, and the rest of the state, which x0_hat and eps_hat make up.
    first, part = near.weights.sum(axis=1), (jnp.hypot(q, narrow) / jnp.hypot(q, s)) ** 2
    explicit = slope.at[:, 0].add(part * first)
    space = dataclasses.replace(space, factor=near.factor, noise=near.noise)
    table = multistep(steps, space, explicit, jnp.pad(explicit, ((0, 0), (1, 0))) + correction)
    rest = alpha * (s - narrow) * (s + narrow) / ((alpha * s) ** 2 + sigma**2)
    table = dataclasses.replace(table, state=table.state + rest * first)
    # There most steps are too long for either, and the point is the better Gaussian.
    point = sde_dpmpp_2m(steps)
    point = dataclasses.replace(point, history=jnp.pad(point.history, ((0, 0), (0, table.history.shape[1] - 2))))
    few = steps.num + 0.5 < 4 * jnp.maximum(tau, 1.0) ** 2
    return jax.tree.map(lambda a, b: jnp.where(few, a, b), point, table)


def _orders(num):
    return orders(num, 3 if num > _FEW else 2, taper=_TAPER)


def _predictor(space, order):
    """Adams-Bashforth; of order 2 the midpoint rule, which amplifies the noise in x0 less."""
    return adams_bashforth(space, order) if order.max() > 2 else midpoint(space, order)


@_register(order=2, evaluations=2, source="arXiv:2206.00364 alg. 2")
def churned_heun(steps: Steps) -> Table:
    """EDM's stochastic sampler: noise is added before a step of Heun's method, which starts from the raised noise.

    log(sigma / alpha) is raised by tau^2 h, h being the step's length, not by a constant: that is the rate at which the SDE of this
    noise level adds noise. Not raised beyond t_max.
    """
    raised = jnp.maximum(steps.half_log_snr[:-1] - steps.noise_level**2 * steps.h, steps.half_log_snr[0])
    t = jnp.where(raised < steps.half_log_snr[:-1], steps.sde.time(2 * raised), steps.time[:-1])
    alpha, sigma = steps.sde.alpha(t), steps.sde.sigma(t)
    stages = heun_step(steps, t, alpha, sigma, steps.half_log_snr[1:] - raised)
    # The end of a step is raised to the beginning of the next; the last one is left.
    lift = jnp.append(alpha[1:], steps.alpha[-1]) / steps.alpha[1:]
    # The root of twice what log(sigma / alpha) is raised by, with its derivative by tau at 0.
    room = steps.half_log_snr[1:-1] - steps.half_log_snr[0]
    raise_by = jnp.append(jnp.minimum(steps.noise_level * jnp.sqrt(2 * steps.h[1:]), jnp.sqrt(2 * room)), 0.0)
    factor, coefficients = stages["moves"][1]
    stages["moves"][1] = (lift * factor, [lift * c for c in coefficients])
    # Its square: the variance of the raised state less that of the lifted one.
    return one_step(**stages, noise=jnp.append(sigma[1:], steps.sigma[-1]) * root_decay(raise_by))


def sample_sde(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    *,
    method="euler_maruyama",
    num_steps: int | None = None,
    grid: str | Float[Array, " times"] | None = None,
    t_end: float | None = None,
    init: Float[Array, "b ..."] | None = None,
    denoise: bool = True,
    return_path: bool = False,
    noise_level: Number = 1.0,
    sigma_data: Number | None = None,
):
    """Samples by the reverse SDE.

    The default is the textbook's, Euler-Maruyama in 1000 steps; `method="sde_adams", num_steps=20` costs far less.

    Args:
      score_fn: `(x (B, *event), t (B,)) -> (B, *event)`; see `as_score` for networks.
      key: draws the prior sample and the noise of all steps, at the global shape.
      shape: `(B, *event)`.
      method: a name that `sd.solvers("sde")` lists, or a function from `Steps` to a `Table` (`samplers.linear` has an example).
      num_steps: steps of the grid, 1,000 by default. Evaluations: num_steps times those of a step, and one more for `denoise`.
      grid, t_end, init, sigma_data: as in `sample_ode`.
      denoise: end with one posterior-mean step E[x_0 | x_{t_end}], which removes the last step's noise. False returns
        a draw from the marginal at t_end, noise included.
      return_path: also return the states at all times of the grid, `(len(grid), B, *event)`; of "churned_heun", at the
        raised noise.
      noise_level: tau >= 0, from the probability-flow ODE (0) over the reverse SDE (1) to beyond; every one has the same
        marginals, as far as the steps are short enough: their number grows with tau^2.

    Returns:
      samples `(B, *event)`, or `(samples, path)`.

    Raises:
      ValueError: as `sample_ode`, before any compilation; also noise_level < 0.
    """
    check_noise_level(noise_level)
    check(not hasattr(method, "times"), "a fitted solver is deterministic: pass it to sample_ode")
    return integrate(
        METHODS, method, score_fn, sde, key, shape, num_steps=num_steps, grid=grid, t_end=t_end, init=init, denoise=denoise,
        return_path=return_path, sigma_data=sigma_data, noise_level=noise_level, usual_steps=1000,
    )  # fmt: skip
