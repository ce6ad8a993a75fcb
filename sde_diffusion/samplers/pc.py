"""Predictor-corrector sampling: a step of the reverse SDE, then Langevin steps at the new time (arXiv:2011.13456 alg. 1)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sde_diffusion.prediction import lookup, score
from sde_diffusion.samplers import ode, sde as reverse
from sde_diffusion.samplers.integrate import integrate
from sde_diffusion.sde import SDE, Number, check, is_number, pytree_dataclass


def langevin(sde, t, gradient, noise, snr):
    """Step 2 (snr sigma_t)^2: of t alone, so a sample does not depend on its neighbours.

    What the published rule gives where |score| = sqrt(D) / sigma, and the published annealed Langevin rule
    (arXiv:1907.05600 alg. 1) for steps proportional to sigma^2.
    """
    return 2 * (snr * sde.sigma(t)) ** 2


def langevin_norm(sde, t, gradient, noise, snr):
    """The published rule 2 (snr |z| / |score|)^2 with norms averaged over the batch (arXiv:2011.13456 alg. 4).

    For VP alg. 5 has one more factor, alpha_i = 1 - beta_i of its N levels, which tends to 1.
    """

    def mean_norm(a):
        return jnp.sqrt((a**2).reshape(a.shape[0], -1).sum(axis=1)).mean()

    return 2 * (snr * mean_norm(noise) / mean_norm(gradient)) ** 2


CORRECTORS = {"langevin": langevin, "annealed_langevin": langevin, "langevin_norm": langevin_norm}
PREDICTORS = {**reverse.METHODS, **ode.METHODS}


@pytree_dataclass
class Langevin:
    """`steps` Langevin steps at time t, with step sizes by the rule."""

    snr: Number
    rule: Callable = dataclasses.field(metadata={"static": True})
    steps: int = dataclasses.field(metadata={"static": True})

    def __call__(self, score_fn, sde, key, x, t):
        def step(x, key):
            gradient = score(score_fn, x, t)
            noise = jax.random.normal(key, x.shape, x.dtype)
            size = self.rule(sde, t, gradient, noise, self.snr)
            return (x + size * gradient + jnp.sqrt(2 * size) * noise).astype(x.dtype), None

        return jax.lax.scan(step, x, jax.random.split(key, self.steps))[0]


def sample_pc(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    *,
    predictor="reverse_diffusion",
    corrector: str | None = "langevin",
    snr: Number = 0.16,
    corrector_steps: int = 1,
    num_steps: int | None = None,
    grid: str | Float[Array, " times"] | None = None,
    t_end: float | None = None,
    init: Float[Array, "b ..."] | None = None,
    denoise: bool = True,
    return_path: bool = False,
    sigma_data: Number | None = None,
):
    """Samples by predictor-corrector (arXiv:2011.13456 alg. 1 and appendix G).

    Args:
      score_fn, key, shape, t_end, init, denoise, return_path, sigma_data: as in `sample_sde`.
      predictor: any method of `sample_sde` or `sample_ode`; or a solver of `fit_solver`.
      corrector: "langevin" = "annealed_langevin" (step 2 (snr sigma)^2), "langevin_norm" (the published rule with
        batch-mean norms, which couples the samples of a batch), or None.
      snr: signal-to-noise ratio r of a Langevin step. The stationary variance is off by a factor of about 1 + snr^2.
      corrector_steps: Langevin steps at each time, at least 0.
      num_steps: steps of the grid, 1,000 by default. Evaluations: num_steps times (those of the predictor + corrector_steps), and one
        more for `denoise`.
      grid: as in `sample_sde`, "uniform" by default. A solver of `fit_solver` has its own steps and times: leave both out.

    Returns:
      samples `(B, *event)`, or `(samples, path)`.

    Raises:
      ValueError: as `sample_ode`; also snr outside (0, 1) and corrector_steps < 0.
    """
    check(
        isinstance(corrector_steps, (int, np.integer)) and corrector_steps >= 0,
        f"corrector_steps={corrector_steps} must be an integer of at least 0; 1 is usual",
    )
    check(
        corrector is None or is_number(snr) and (snr > 0) & (snr < 1),
        f"snr={snr} must be in (0, 1), where Langevin steps are stable; 0.16 is usual",
    )
    rule = None if corrector is None else lookup(CORRECTORS, corrector, "corrector")
    correct = Langevin(snr, rule, int(corrector_steps)) if rule and corrector_steps else None
    if grid is None and not hasattr(predictor, "times"):
        grid = "uniform"
    return integrate(
        PREDICTORS, predictor, score_fn, sde, key, shape, num_steps=num_steps, grid=grid, t_end=t_end, init=init,
        denoise=denoise, return_path=return_path, sigma_data=sigma_data, noise_level=1.0, correct=correct, kind="predictor", usual_steps=1000,
    )  # fmt: skip
