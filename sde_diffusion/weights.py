"""Weights w(lambda) of the noise levels in 1/2 E[w(lambda) (-dlambda/dt) |eps - eps_hat|^2] (arXiv:2303.00848).

Where w does not increase with the log-SNR, the loss is the ELBO of data with Gaussian noise of random size added to it, up to
a constant (arXiv:2303.00848 theorem 1). Only the shape of a weight matters for training.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sde_diffusion.prediction import lookup
from sde_diffusion.sde import SDE, Times
from sde_diffusion.times import LOWEST_LOG_SNR, terminal_log_snr


@dataclasses.dataclass(frozen=True)
class Weight:
    """A named weight: a function of lambda, elementwise, and its fact sheet.

    Attributes:
      formula: as printed.
      source: the paper whose loss it is.
    """

    fn: Callable
    formula: str
    source: str

    def __call__(self, log_snr: Times) -> Float[Array, "*b"]:
        return self.fn(log_snr)


def _log_sech(x):
    return math.log(2.0) - jnp.abs(x) - jnp.log1p(jnp.exp(-2 * jnp.abs(x)))


def p2(gamma: float = 1.0) -> Weight:
    """P2 weighting of DDPM's loss under the cosine schedule, |eps - eps_hat|^2 / (1 + SNR)^gamma (arXiv:2204.00227 eq. 8, k = 1)."""
    return Weight(
        lambda l: jnp.exp(_log_sech(l / 2) - gamma * jax.nn.softplus(l)),
        "sech(lambda/2) / (1 + e^lambda)" + (f"^{gamma:g}" if gamma != 1 else ""),
        "arXiv:2204.00227 (P2), cosine schedule",
    )


def min_snr(gamma: float = 5.0) -> Weight:
    """Min-SNR weighting of DDPM's loss under the cosine schedule, min(1, gamma / SNR) |eps - eps_hat|^2 (arXiv:2303.09556)."""
    return Weight(
        lambda l: jnp.exp(_log_sech(l / 2) + jnp.minimum(0.0, math.log(gamma) - l)),
        f"sech(lambda/2) min(1, {gamma:g} e^-lambda)",
        "arXiv:2303.09556 (min-SNR), cosine schedule",
    )


# Each is finite at lambda = +inf, and at -inf unless it is infinite there: products are sums of logarithms.
LOG_SNR_WEIGHTS: dict[str, Weight] = {
    "elbo": Weight(jnp.ones_like, "1", "arXiv:2107.00630 (VDM)"),
    # EDM's loss and its noise levels log sigma ~ N(-1.2, 1.2^2), for data of standard deviation 1/2.
    # N(lambda; 2.4, 2.4^2) (1 + 4 e^-lambda), as the two normal densities that it is: finite at lambda = -inf.
    "edm": Weight(
        lambda l: jax.scipy.stats.norm.pdf(l, 2.4, 2.4) + 4 * math.exp(0.48) * jax.scipy.stats.norm.pdf(l, -3.36, 2.4),
        "N(lambda; 2.4, 2.4^2) (1 + 4 e^-lambda)",
        "arXiv:2206.00364 (EDM)",
    ),
    "sigmoid": Weight(lambda l: jax.nn.sigmoid(2.0 - l), "sigmoid(2 - lambda)", "arXiv:2303.00848 section 4"),
    "simple_cosine": Weight(lambda l: jnp.exp(_log_sech(l / 2)), "sech(lambda/2)", "arXiv:2102.09672 (IDDPM): L_simple, cosine schedule"),
    "p2": p2(),
    "min_snr": min_snr(),
    "v_mse": Weight(lambda l: jnp.exp(-l / 2), "e^(-lambda/2)", "arXiv:2202.00512: |v - v_hat|^2, cosine schedule"),
    "flow_matching": Weight(lambda l: jnp.exp(-l / 2), "e^(-lambda/2)", "arXiv:2210.02747: straight paths, uniform t"),
    # = 4 e^(-lambda/2) / (1 + e^(lambda/2))^2
    "indi": Weight(
        lambda l: jnp.exp(math.log(4.0) - l / 2 - 2 * jax.nn.softplus(l / 2)),
        "e^-lambda sech(lambda/4)^2",
        "arXiv:2303.11435 (InDI)",
    ),
}
# Weights that depend on the process: w(lambda) = (these, of t) / (-dlambda/dt).
TIME_WEIGHTS: dict[str, Callable] = {
    # Unweighted |eps - eps_hat|^2 under uniform t: DDPM's L_simple = sigma^2-weighted score matching.
    "simple": lambda sde, t: jnp.ones_like(t),
    "sigma2": lambda sde, t: jnp.ones_like(t),
    # g^2-weighted score matching (arXiv:2101.09258): g^2 / sigma^2 = -dlambda/dt, the ELBO again.
    "likelihood": lambda sde, t: _above_lowest(sde.log_snr(t), sde.diffusion(t) ** 2 / sde.sigma(t) ** 2),
}


def _above_lowest(log_snr, density):
    """The density, but 0 below lambda = -20, where it may be infinite; a little lower, for times at -20 that were rounded."""
    return jnp.where(log_snr >= LOWEST_LOG_SNR - 0.02, density, 0.0)


def loss_weight(weight: str | Callable) -> Callable:
    """The function (sde, t) -> w(lambda(t)) (-dlambda/dt) of a weight given by name or as a callable of lambda.

    Of a function of lambda it is 0 below lambda = -20, where also a weight like e^(-lambda/2) ends.

    Raises:
      ValueError: unknown name; and, while tracing, a callable whose result has not lambda's shape.
    """
    if not callable(weight):
        weight = lookup({**LOG_SNR_WEIGHTS, **TIME_WEIGHTS}, weight, "weight")
        if weight in TIME_WEIGHTS.values():
            return weight

    def density(sde, t):
        log_snr = sde.log_snr(t)
        w = check_weights(weight(jnp.maximum(log_snr, LOWEST_LOG_SNR)), log_snr, "weight", "lambda")
        return _above_lowest(log_snr, w * -sde.log_snr_rate(t))

    return density


def check_weights(w, argument, kind: str, name: str):
    """w, or a ValueError where it is not one number for each entry of the argument (a constant will do)."""
    if jnp.shape(w) not in ((), argument.shape):
        raise ValueError(f"the {kind} returned shape {jnp.shape(w)} for {name} of shape {argument.shape}; return one number for each entry")
    return w


def is_monotone(weight: str | Callable, sde: SDE | None = None) -> bool:
    """Whether w does not increase with lambda, by its values at 2,001 points, up to 1 part in 1,000.

    Args:
      weight: as in `weighted_loss`.
      sde: the range is that of its losses, from t_train to t_max; None: lambda from -20 to 20.

    Raises:
      ValueError: unknown name, or a weight that depends on the process, without one.
    """
    fn = weight if callable(weight) else lookup({**LOG_SNR_WEIGHTS, **TIME_WEIGHTS}, weight, "weight")
    if fn in TIME_WEIGHTS.values():
        if sde is None:
            raise ValueError(f"the weight {weight!r} depends on the process: pass is_monotone({weight!r}, sde)")
        # Dense at both ends, where the log-SNR changes fast.
        u = np.geomspace(1e-6, 0.5, 1000)
        t = sde.t_max - (sde.t_max - sde.t_train) * jnp.asarray(np.concatenate([u, [0.5], 1 - u[::-1]]), float)
        t = t[sde.log_snr(t) >= LOWEST_LOG_SNR]
        w = fn(sde, t) / -sde.log_snr_rate(t)
    else:
        ends = (-20.0, 20.0) if sde is None else (terminal_log_snr(sde), sde.log_snr(jnp.asarray(sde.t_train, float)))
        log_snr = jnp.linspace(*ends, 2001)
        w = check_weights(fn(log_snr), log_snr, "weight", "lambda")
    w = np.atleast_1d(np.asarray(w, np.float64))
    return bool((w <= 1.001 * np.minimum.accumulate(w)).all())


class _Text(str):
    """Prints itself in a notebook too."""

    __repr__ = str.__str__


def weights() -> str:
    """The named weights of `weighted_loss` as a table: w(lambda), whether it is monotone, source."""
    rows = [("weight", "w(lambda)", "monotone", "source")]
    for name, weight in LOG_SNR_WEIGHTS.items():
        rows.append((name, weight.formula, "yes" if is_monotone(weight) else "no", weight.source))
    rows.append(("simple", "1 / (-dlambda/dt)", "by SDE", "arXiv:2006.11239 (DDPM): L_simple, uniform t; also sigma2"))
    rows.append(("likelihood", "1", "yes", "arXiv:2101.09258: score matching weighted by g^2"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return _Text("\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[3]]) for row in rows))
