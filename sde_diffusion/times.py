"""How a loss draws its times: importance-sampled and stratified, so that the estimate varies less; never biased."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PRNGKeyArray

from sde_diffusion.sde import SDE, check, known, pytree_dataclass

Levels = Num[Array, "..."] | Num[np.ndarray, "..."]
# alpha is then 5e-5: what is below counts for nothing, and lambda = -inf has no uniform distribution.
LOWEST_LOG_SNR = -20.0


@pytree_dataclass
class AdaptiveTimes:
    """Times drawn where the loss is large: `times=` of a loss, updated from what the loss returned.

    The density in lambda is piecewise constant on equal bins between the log-SNRs of t_train and t_max, proportional to the running
    root mean square of the loss per unit of lambda: of all such densities the one of least variance of a loss at
    independent times. After the adaptive noise schedule of arXiv:2303.00848.

        times = sd.AdaptiveTimes()
        loss, t = sd.weighted_loss(score_fn, sde, key, x0, times=times, return_times=True)
        times = times.update(sde, t, loss)

    A pytree of arrays, and both functions pure: it may be carried through `jax.jit` and saved. Fresh, it is "log_snr".

    Attributes:
      squares, counts: discounted sums of the squared loss per unit of lambda, and of examples, `(bins,)` each.
      decay: what an update leaves of the sums; 0.99 remembers about 100 batches.
      floor: the share of the times that stays uniform in lambda, in (0, 1]: no importance weight exceeds that of "log_snr" by more than
        1 / floor.
    """

    squares: Any = None
    counts: Any = None
    decay: float = dataclasses.field(default=0.99, metadata={"static": True})
    floor: float = dataclasses.field(default=0.05, metadata={"static": True})

    def __post_init__(self):
        for name in ("squares", "counts"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, jnp.zeros(100))
        squares, counts = jnp.shape(self.squares), jnp.shape(self.counts)
        check(
            len(squares) == 1 and squares == counts and squares[0] >= 1,
            f"squares has shape {squares} and counts {counts}; both must be (bins,), as AdaptiveTimes.of(bins) makes them",
        )
        check(0 <= self.decay < 1, f"decay={self.decay} must be in [0, 1); 0.99 remembers about 100 batches")
        check(0 < self.floor <= 1, f"floor={self.floor} must be in (0, 1]: without a share of uniform times a loss may be biased")

    @classmethod
    def of(cls, bins: int = 100, **options) -> "AdaptiveTimes":
        """A fresh one with another number of bins; options: decay, floor."""
        check(isinstance(bins, int) and bins >= 1, f"bins={bins} must be an integer of at least 1; 100 is usual")
        return cls(jnp.zeros(bins), jnp.zeros(bins), **options)

    def shares(self) -> Float[Array, " bins"]:
        """The probability of each bin, from the lowest lambda to the highest, `(bins,)`."""
        everywhere = self.squares.sum() / jnp.maximum(self.counts.sum(), 1e-30)
        # A bin that has seen nothing is average.
        size = jnp.sqrt((self.squares + 1e-3 * everywhere) / (self.counts + 1e-3))
        total = size.sum()
        uniform = 1 / self.squares.shape[0]
        learned = jnp.where(total > 0, size / jnp.where(total > 0, total, 1.0), uniform)
        return (1 - self.floor) * learned + self.floor * uniform

    def sample(self, key: PRNGKeyArray, n: int, sde: SDE, dtype=float) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """n low-discrepancy times and their importance weights, as `sample_times`."""
        shares = self.shares().astype(dtype)
        edges = jnp.concatenate([jnp.zeros(1, dtype), jnp.cumsum(shares)])
        u = low_discrepancy(key, n, dtype) * edges[-1]
        index = jnp.clip(jnp.searchsorted(edges, u, side="right") - 1, 0, len(shares) - 1)
        inside = jnp.clip((u - edges[index]) / shares[index], 0.0, 1.0)
        t = _time_at(sde, (index + inside) / len(shares), dtype)
        return t, _range(sde, dtype) / (shares[index] * len(shares)) / -sde.log_snr_rate(t)

    def update(self, sde: SDE, t: Float[Array, " n"], loss: Float[Array, " n"]) -> "AdaptiveTimes":
        """With the losses of a batch, at times t that this object drew; losses that are not finite are left out."""
        bins = self.squares.shape[0]
        low = terminal_log_snr(sde, t.dtype)
        place = (jnp.maximum(sde.log_snr(t), low) - low) / _range(sde, t.dtype)
        index = jnp.clip((place * bins).astype(int), 0, bins - 1)
        # The loss without its importance weight: per unit of lambda, up to a constant.
        squared = (jax.lax.stop_gradient(loss) * self.shares()[index].astype(loss.dtype)) ** 2
        good = jnp.isfinite(squared)

        def add(total, values):
            return self.decay * total + jax.ops.segment_sum(jnp.where(good, values, 0.0), index, bins).astype(total.dtype)

        return AdaptiveTimes(add(self.squares, squared), add(self.counts, jnp.ones_like(squared)), self.decay, self.floor)


def sample_times(
    key: PRNGKeyArray, n: int, sde: SDE, times: str | Levels | AdaptiveTimes = "uniform", dtype=float
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """n low-discrepancy times and their importance weights (arXiv:2107.00630 appendix I.1).

    One uniform offset is shared by the batch, u_i = (u_0 + i / n) mod 1, so each u_i is uniform and the batch stratified.

    Args:
      times: "uniform" in [t_train, t_max]; "log_snr": uniform in lambda between the same ends (down to lambda = -20 at
        the least), a density in t proportional to g^2 / sigma^2: the smallest variance for the ELBO of nearly uniform errors; an
        `AdaptiveTimes`; or an array of discrete levels.

    Returns:
      t `(n,)` and weight `(n,)`, so that E[weight h(t)] is the integral of h over [t_train, t_max] (for levels: the
      mean of h over the levels, weight 1).
    """
    if isinstance(times, AdaptiveTimes):
        return times.sample(key, n, sde, dtype)
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
        t = _time_at(sde, u, dtype)
        return t, _range(sde, dtype) / -sde.log_snr_rate(t)
    raise ValueError(f"unknown times {times!r}; choose 'uniform', 'log_snr', an AdaptiveTimes or an array of levels")


def low_discrepancy(key: PRNGKeyArray, n: int, dtype=float) -> Float[Array, " n"]:
    """u_i = (u_0 + i / n) mod 1 with one uniform u_0: n numbers, each uniform, that fill [0, 1) evenly."""
    return (jax.random.uniform(key, (), dtype) + jnp.arange(n, dtype=dtype) / n) % 1.0


def terminal_log_snr(sde: SDE, dtype=float) -> Float[Array, ""]:
    """lambda(t_max), or -20 where that is lower."""
    return jnp.maximum(sde.log_snr(jnp.asarray(sde.t_max, dtype)), LOWEST_LOG_SNR)


def lowest_log_snr(sigma_data):
    """-20, and for data of a standard deviation above 1 as much lower as makes it the same beside the noise."""
    return LOWEST_LOG_SNR - 2 * jnp.log(jnp.maximum(sigma_data, 1.0))


def _range(sde, dtype):
    return sde.log_snr(jnp.asarray(sde.t_train, dtype)) - terminal_log_snr(sde, dtype)


def _time_at(sde, u, dtype):
    """The time at a fraction u of the way from the lowest lambda to the highest."""
    t = sde.time(terminal_log_snr(sde, dtype) + _range(sde, dtype) * u)
    return jnp.clip(t, jnp.asarray(sde.t_train, dtype), jnp.asarray(sde.t_max, dtype))


def _check_levels(sde, times):
    check(np.ndim(times) == 1 and len(times), f"times has shape {np.shape(times)}; pass a 1-D array of levels, or a name")
    if known(times, sde.t_train, sde.t_max):
        # As numpy's: inside jax.jit an operation on constants is traced as well.
        low, high = float(np.min(np.asarray(times))), float(np.max(np.asarray(times)))
        check(
            sde.t_train * (1 - 1e-6) <= low and high <= sde.t_max * (1 + 1e-6),
            f"times run from {low:g} to {high:g}, outside the range [{sde.t_train:g}, {sde.t_max:g}] of {type(sde).__name__}; "
            "pass times t, as sde.levels, not the numbers of levels",
        )
