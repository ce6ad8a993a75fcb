"""Training objectives: weighted squared errors of the predicted noise, at random times, per example.

All of them are denoising score matching (Vincent 2011) and differ in the weight of each noise level alone
(arXiv:2011.13456 eq. 7; arXiv:2107.00630 eq. 17; arXiv:2303.00848).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sde_diffusion.prediction import check_process, lookup, score
from sde_diffusion.sde import SDE, Number, check, check_key, check_log_snr, expand
from sde_diffusion.times import AdaptiveTimes, Levels, sample_times
from sde_diffusion.weights import TIME_WEIGHTS, check_weights, loss_weight


def noise_error(
    score_fn, sde: SDE, key: PRNGKeyArray, x0: Float[Array, "b ..."], t: Float[Array, " b"], control: Number | None = None
) -> Float[Array, " b"]:
    """|eps - eps_hat|^2 at x_t = alpha x_0 + sigma eps, with eps_hat = -sigma score, summed over event axes, `(B,)`.

    control: the standard deviation s of the data; c (|eps|^2 - D) is subtracted then, which has mean 0. c = sigmoid(lambda + 2 log s)^2
    leaves least where the data is Gaussian: |eps|^2 is most of the error's noise where x_t hardly shows eps.
    """
    eps = jax.random.normal(key, x0.shape, x0.dtype)
    error = eps + expand(sde.sigma(t), x0) * score(score_fn, sde.perturb(x0, eps, t), t)
    total = (error**2).reshape(x0.shape[0], -1).sum(axis=1)
    if control is None:
        return total
    share = jax.nn.sigmoid(sde.log_snr(t) + 2 * jnp.log(control)) ** 2
    return total - share * (eps**2 - 1).reshape(x0.shape[0], -1).sum(axis=1)


def check_floats(x0) -> None:
    """Raises ValueError for data of integers."""
    if not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(f"x0 has dtype {x0.dtype}; scale it to floats first (data.Scaler does, with dequantization)")


def weighted_error(score_fn, sde, key, x0, times, weigh, return_times, error=noise_error):
    """weigh(t, importance) error(score_fn, sde, key, x0, t) at random times, `(B,)`; with return_times, (that, t)."""
    check_process(score_fn, sde)
    check_key(key)
    x0 = jnp.asarray(x0)
    check_floats(x0)
    check_log_snr(sde)
    # Noise of half precision is neither centred nor of variance 1.
    dtype = jnp.promote_types(x0.dtype, jnp.float32)
    x0 = x0.astype(dtype)
    key_t, key_eps = jax.random.split(key)
    t, importance = sample_times(key_t, x0.shape[0], sde, times, dtype)
    loss = weigh(t, importance) * error(score_fn, sde, key_eps, x0, t)
    return (loss, t) if return_times else loss


def score_matching_weight(sde: SDE, weighting: str | Callable, times) -> Callable:
    """The factor of sigma^2 |score error|^2 in E_t[w(t) |score error|^2], of (t, importance); weighting: as in `dsm_loss`."""
    if callable(weighting):

        def w(t):
            return check_weights(weighting(t), t, "weighting", "t") / sde.sigma(t) ** 2
    else:
        by_name = lookup({name: TIME_WEIGHTS[name] for name in ("sigma2", "likelihood")}, weighting, "weighting")

        def w(t):
            return by_name(sde, t)

    span = sde.t_max - sde.t_train if isinstance(times, (str, AdaptiveTimes)) else 1.0
    return lambda t, importance: w(t) * importance / span


def dsm_loss(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray,
    x0: Float[Array, "b ..."],
    *,
    weighting: str | Callable = "sigma2",
    times: str | Levels | AdaptiveTimes = "uniform",
    return_times: bool = False,
):
    """Denoising score matching, E_t[w(t) |score(x_t, t) + eps / sigma|^2] (arXiv:2011.13456 eq. 7).

    Args:
      score_fn: `(x (B, *event), t (B,)) -> (B, *event)`.
      x0: clean data `(B, *event)`, floating point.
      weighting: "sigma2" (w = sigma^2: the unweighted error of eps), "likelihood" (w = g^2, arXiv:2101.09258), or
        a callable w(t) of t `(B,)`.
      times: how t is drawn, see `sample_times`; "uniform", "log_snr" and an `AdaptiveTimes` estimate the same number, the
        mean over uniform t in [t_train, t_max]. An array gives the mean over those levels: DDPM's and SMLD's losses.

    Returns:
      The loss of each example `(B,)`, summed over event axes; with `return_times` also the times `(B,)`.

    Raises:
      ValueError: unknown name, integer data, no random key, the score of another SDE, or a weighting or score of the wrong shape or dtype.
    """
    weigh = score_matching_weight(sde, weighting, times)
    return weighted_error(score_fn, sde, key, x0, times, weigh, return_times)


def weighted_loss(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray,
    x0: Float[Array, "b ..."],
    *,
    weight: str | Callable = "elbo",
    times: str | Levels | AdaptiveTimes = "uniform",
    control: Number | None = None,
    return_times: bool = False,
):
    """1/2 of the integral over t of w(lambda) (-dlambda/dt) E|eps - eps_hat|^2 (arXiv:2303.00848 eq. 2).

    With w = 1 it is the diffusion term of the ELBO in nats, between t_train and t_max (arXiv:2107.00630 eq. 17). With w a function of
    lambda its mean depends on the process through the log-SNRs of its two ends alone.

    Args:
      score_fn: `(x (B, *event), t (B,)) -> (B, *event)`.
      x0: clean data `(B, *event)`, floating point.
      weight: a name that `sd.weights()` lists ("elbo", "edm", "sigmoid", "min_snr", "flow_matching" ...; "simple" = "sigma2" is
        1/2 |eps - eps_hat|^2 under uniform t), or a callable w(lambda), elementwise.
      times: how t is drawn, see `sample_times`; "uniform", "log_snr" and an `AdaptiveTimes` estimate the same number; a weight that does
        not fall with lambda, as "elbo", leaves "uniform" a heavy tail: for it "log_snr" has far less variance.
      control: the data's standard deviation, to evaluate: a term of mean 0 that takes out most of the noise of eps is
        subtracted, see `noise_error`. Neither the mean nor the gradient by the score's parameters changes.

    Returns:
      The loss of each example `(B,)`, summed over event axes; with `return_times` also the times `(B,)`.

    Raises:
      ValueError: unknown name, integer data, a weight or a score of the wrong shape or dtype, control <= 0.
    """
    check(control is None or control > 0, f"control={control} must be positive: the standard deviation of the data, or None")
    density = loss_weight(weight)

    def error(*args):
        return noise_error(*args, control)

    return weighted_error(score_fn, sde, key, x0, times, lambda t, i: 0.5 * density(sde, t) * i, return_times, error)
