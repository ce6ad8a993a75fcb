"""Score matching without a denoising target: from x_t and the divergence of the score alone, per example.

|score|^2 + 2 div score has the mean of |score - grad log p_t|^2 less a constant (Hyvarinen 2005, theorem 1). Against `dsm_loss`, the
mean is lower by E_t[w(t) D / sigma^2], whatever the score.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sde_diffusion.losses import score_matching_weight, weighted_error
from sde_diffusion.prediction import lookup, score
from sde_diffusion.sde import SDE, check
from sde_diffusion.times import AdaptiveTimes, Levels

PROBES = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}


def implicit_loss(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray,
    x0: Float[Array, "b ..."],
    *,
    weighting: str | Callable = "sigma2",
    times: str | Levels | AdaptiveTimes = "uniform",
    return_times: bool = False,
):
    """Implicit score matching at the marginals, E_t[w(t) (|score|^2 + 2 div score)] (Hyvarinen 2005 eq. 4, twice it).

    The divergence is exact: one evaluation and D products with its Jacobian, at most 64 at a time.

    Args:
      score_fn, x0, weighting, times: as in `dsm_loss`.

    Returns:
      The loss of each example `(B,)`, of either sign; with `return_times` also the times `(B,)`.

    Raises:
      ValueError: as `dsm_loss`.
    """

    def error(score_fn, sde, key, x0, t):
        basis = jnp.eye(x0[0].size, dtype=x0.dtype).reshape(-1, 1, *x0.shape[1:])
        value, products = _value_and_products(score_fn, sde, key, x0, t, basis)
        return sde.sigma(t) ** 2 * (_dot(value, value) + 2 * products.sum(axis=0))

    return weighted_error(score_fn, sde, key, x0, times, score_matching_weight(sde, weighting, times), return_times, error)


def sliced_loss(
    score_fn,
    sde: SDE,
    key: PRNGKeyArray,
    x0: Float[Array, "b ..."],
    *,
    weighting: str | Callable = "sigma2",
    times: str | Levels | AdaptiveTimes = "uniform",
    probes: int = 1,
    probe: str = "rademacher",
    variance_reduced: bool = True,
    return_times: bool = False,
):
    """Sliced score matching at the marginals, E_t[w(t) (|score|^2 + 2 v . J v)] over random v (arXiv:1905.07088 eq. 9, twice it).

    Its mean is that of `implicit_loss`. One evaluation and one product with its Jacobian a probe.

    Args:
      score_fn, x0, weighting, times: as in `dsm_loss`.
      probes: vectors v an example, averaged, at least 1.
      probe: "rademacher" or "gaussian".
      variance_reduced: False: (v . score)^2 in place of |score|^2, the paper's eq. 8.

    Returns:
      The loss of each example `(B,)`, of either sign; with `return_times` also the times `(B,)`.

    Raises:
      ValueError: as `dsm_loss`; unknown probe, probes < 1.
    """
    draw = lookup(PROBES, probe, "probe")
    check(isinstance(probes, int) and probes >= 1, f"probes={probes} must be an integer of at least 1; 1 is usual")

    def error(score_fn, sde, key, x0, t):
        key_eps, key_v = jax.random.split(key)
        v = draw(key_v, (probes, *x0.shape), x0.dtype)
        value, products = _value_and_products(score_fn, sde, key_eps, x0, t, v)
        norm = _dot(value, value) if variance_reduced else (jax.vmap(_dot, (0, None))(v, value) ** 2).mean(axis=0)
        return sde.sigma(t) ** 2 * (norm + 2 * products.mean(axis=0))

    return weighted_error(score_fn, sde, key, x0, times, score_matching_weight(sde, weighting, times), return_times, error)


def _value_and_products(score_fn, sde, key, x0, t, probes):
    """The score `(B, *event)` at a draw of x_t, and v . J v `(K, B)` of probes that broadcast to `(K, B, *event)`."""
    x = sde.perturb(x0, jax.random.normal(key, x0.shape, x0.dtype), t)
    value, push = jax.linearize(lambda x: score(score_fn, x, t), x)

    def product(v):
        v = jnp.broadcast_to(v, x.shape)
        return _dot(v, push(v))

    return value, jax.lax.map(product, probes, batch_size=min(len(probes), 64))


def _dot(a, b):
    return (a * b).reshape(a.shape[0], -1).sum(axis=1)
