"""Training objectives: weighted squared errors of the predicted noise, at random times, per example.

All of them are denoising score matching (Vincent 2011) and differ in the weight of each noise level alone
(arXiv:2011.13456 eq. 7; arXiv:2107.00630 eq. 17; arXiv:2303.00848).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PRNGKeyArray

from sde_diffusion.prediction import lookup, score
from sde_diffusion.sde import SDE, check, expand, known

Levels = Num[Array, "..."] | Num[np.ndarray, "..."]

# w(lambda) of 1/2 E[w(lambda) (-dlambda/dt) |eps - eps_hat|^2]. Only the shape matters for training.
LOG_SNR_WEIGHTS: dict[str, Callable] = {
    "elbo": jnp.ones_like,
    # EDM's loss and its noise levels log sigma ~ N(-1.2, 1.2^2), for data of standard deviation 1/2
    # (arXiv:2206.00364 table 1, in the form of arXiv:2303.00848 appendix D.1).
    # N(lambda; 2.4, 2.4^2) (1 + 4 e^-lambda), as the two normal densities that it is: finite at lambda = -inf.
    "edm": lambda log_snr: (
        jax.scipy.stats.norm.pdf(log_snr, 2.4, 2.4) + 4 * math.exp(0.48) * jax.scipy.stats.norm.pdf(log_snr, -3.36, 2.4)
    ),
    # arXiv:2303.00848 section 4: emphasises the noisier levels, monotone.
    "sigmoid": lambda log_snr: jax.nn.sigmoid(2.0 - log_snr),
}
# Weights that depend on the process: w(lambda) = (these, of t) / (-dlambda/dt).
TIME_WEIGHTS: dict[str, Callable] = {
    # Unweighted |eps - eps_hat|^2 under uniform t: DDPM's L_simple = sigma^2-weighted score matching.
    "simple": lambda sde, t: jnp.ones_like(t),
    "sigma2": lambda sde, t: jnp.ones_like(t),
    # g^2-weighted score matching (arXiv:2101.09258): g^2 / sigma^2 = -dlambda/dt, the ELBO again.
    "likelihood": lambda sde, t: sde.diffusion(t) ** 2 / sde.sigma(t) ** 2,
}


def sample_times(
    key: PRNGKeyArray, n: int, sde: SDE, times: str | Levels = "uniform", dtype=float
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """n low-discrepancy times and their importance weights (arXiv:2107.00630 appendix I.1).

    One uniform offset is shared by the batch, u_i = (u_0 + i / n) mod 1, so each u_i is uniform and the batch stratified.

    Args:
      times: "uniform" in [t_train, t_max]; "log_snr": uniform in lambda between the same ends (down to lambda = -20 at
        the least), the smallest variance for the ELBO of nearly uniform errors; or an array of discrete levels.

    Returns:
      t `(n,)` and weight `(n,)`, so that E[weight h(t)] is the integral of h over [t_train, t_max] (for levels: the
      mean of h over the levels, weight 1).
    """
    u = low_discrepancy(key, n, dtype)
    if not isinstance(times, str):
        _check_levels(sde, times)
        levels = jnp.asarray(times, dtype)
        index = jnp.minimum((u * levels.shape[0]).astype(int), levels.shape[0] - 1)
        return levels[index], jnp.ones_like(u)
    t0, t1 = jnp.asarray(sde.t_train, dtype), jnp.asarray(sde.t_max, dtype)
    if times == "uniform":
        return t0 + (t1 - t0) * u, jnp.full_like(u, 1.0) * (t1 - t0)
    if times == "log_snr":
        high, low = sde.log_snr(t0), terminal_log_snr(sde, dtype)
        t = jnp.clip(sde.time(low + (high - low) * u), t0, t1)
        return t, (high - low) / -sde.log_snr_rate(t)
    raise ValueError(f"unknown times {times!r}; choose 'uniform', 'log_snr' or an array of levels")


def low_discrepancy(key: PRNGKeyArray, n: int, dtype=float) -> Float[Array, " n"]:
    """u_i = (u_0 + i / n) mod 1 with one uniform u_0: n numbers, each uniform, that fill [0, 1) evenly."""
    return (jax.random.uniform(key, (), dtype) + jnp.arange(n, dtype=dtype) / n) % 1.0


def _check_levels(sde, times):
    check(np.ndim(times) == 1 and len(times), f"times has shape {np.shape(times)}; pass a 1-D array of levels, or a name")
    if known(times, sde.t_train, sde.t_max):
        low, high = float(np.min(times)), float(np.max(times))
        check(
            sde.t_train * (1 - 1e-6) <= low and high <= sde.t_max * (1 + 1e-6),
            f"times run from {low:g} to {high:g}, outside the range [{sde.t_train:g}, {sde.t_max:g}] of {type(sde).__name__}; "
            "pass times t, as sde.levels, not the numbers of levels",
        )


def terminal_log_snr(sde: SDE, dtype=float) -> Float[Array, ""]:
    """lambda(t_max), or -20 where that is lower: alpha is then 5e-5, and lambda = -inf has no uniform distribution."""
    return jnp.maximum(sde.log_snr(jnp.asarray(sde.t_max, dtype)), -20.0)


def noise_error(
    score_fn, sde: SDE, key: PRNGKeyArray, x0: Float[Array, "b ..."], t: Float[Array, " b"]
) -> Float[Array, " b"]:
    """|eps - eps_hat|^2 at x_t = alpha x_0 + sigma eps, with eps_hat = -sigma score, summed over event axes, `(B,)`."""
    eps = jax.random.normal(key, x0.shape, x0.dtype)
    error = eps + expand(sde.sigma(t), x0) * score(score_fn, sde.perturb(x0, eps, t), t)
    return (error**2).reshape(x0.shape[0], -1).sum(axis=1)


def check_floats(x0) -> None:
    """Raises ValueError for data of integers."""
    if not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(f"x0 has dtype {x0.dtype}; scale it to floats first (data.Scaler does, with dequantization)")


def _loss(score_fn, sde, key, x0, times, weigh, return_times):
    check_floats(x0)
    dtype = jnp.promote_types(x0.dtype, jnp.float32)
    key_t, key_eps = jax.random.split(key)
    t, importance = sample_times(key_t, x0.shape[0], sde, times, dtype)
    loss = weigh(t, importance) * noise_error(score_fn, sde, key_eps, x0, t)
    return (loss, t) if return_times else loss


def dsm_loss(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray,
    x0: Float[Array, "b ..."],
    *,
    weighting: str | Callable = "sigma2",
    times: str | Levels = "uniform",
    return_times: bool = False,
):
    """Denoising score matching, E_t[w(t) |score(x_t, t) + eps / sigma|^2] (arXiv:2011.13456 eq. 7).

    Args:
      score_fn: `(x (B, *event), t (B,)) -> (B, *event)`.
      x0: clean data `(B, *event)`, floating point.
      weighting: "sigma2" (w = sigma^2: the unweighted error of eps), "likelihood" (w = g^2, arXiv:2101.09258), or
        a callable w(t) of t `(B,)`.
      times: how t is drawn, see `sample_times`; "uniform" and "log_snr" estimate the same number, the mean over
        uniform t in [t_train, t_max]. An array gives the mean over those levels: DDPM's and SMLD's losses.

    Returns:
      The loss of each example `(B,)`, summed over event axes; with `return_times` also the times `(B,)`.

    Raises:
      ValueError: unknown name, integer data, or a score of the wrong shape or dtype.
    """
    if callable(weighting):
        def w(t):
            return weighting(t) / sde.sigma(t) ** 2
    else:
        known = {name: TIME_WEIGHTS[name] for name in ("sigma2", "likelihood")}
        def w(t):
            return lookup(known, weighting, "weighting")(sde, t)
        lookup(known, weighting, "weighting")
    span = sde.t_max - sde.t_train if isinstance(times, str) else 1.0
    return _loss(score_fn, sde, key, x0, times, lambda t, i: w(t) * i / span, return_times)


def weighted_loss(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray,
    x0: Float[Array, "b ..."],
    *,
    weight: str | Callable = "elbo",
    times: str | Levels = "uniform",
    return_times: bool = False,
):
    """1/2 of the integral over t of w(lambda) (-dlambda/dt) E|eps - eps_hat|^2 (arXiv:2303.00848 eq. 2).

    With w = 1 it is the diffusion term of the ELBO in nats, between t_train and t_max (arXiv:2107.00630 eq. 17).

    Args:
      score_fn: `(x (B, *event), t (B,)) -> (B, *event)`.
      x0: clean data `(B, *event)`, floating point.
      weight: "elbo" (1), "edm", "sigmoid", or a callable w(lambda); "simple" = "sigma2" (1/2 |eps - eps_hat|^2 under
        uniform t) and "likelihood" (g^2; equal to "elbo").
      times: how t is drawn, see `sample_times`; "uniform" and "log_snr" estimate the same number.

    Returns:
      The loss of each example `(B,)`, summed over event axes; with `return_times` also the times `(B,)`.

    Raises:
      ValueError: unknown name, integer data, or a score of the wrong shape or dtype.
    """
    density = loss_weight(weight)
    return _loss(score_fn, sde, key, x0, times, lambda t, i: 0.5 * density(sde, t) * i, return_times)


def loss_weight(weight: str | Callable) -> Callable:
    """The function (sde, t) -> w(lambda(t)) (-dlambda/dt) of a weight given by name or as a callable of lambda."""
    if not callable(weight):
        weight = lookup({**LOG_SNR_WEIGHTS, **TIME_WEIGHTS}, weight, "weight")
        if weight in TIME_WEIGHTS.values():
            return weight
    return lambda sde, t: weight(sde.log_snr(t)) * -sde.log_snr_rate(t)
