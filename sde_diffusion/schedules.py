"""Variance-preserving processes given by their log-SNR, fixed or learned (arXiv:2107.00630 section 3.2 and appendix H)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sde_diffusion.sde import SDE, Number, Times, _UnitPrior, check, known, pytree_dataclass


class _GivenLogSNR(_UnitPrior, SDE):
    """Defines `log_snr(t)`; alpha^2 = sigmoid(lambda) and sigma^2 = sigmoid(-lambda) follow."""

    def log_alpha(self, t: Times) -> Float[Array, "*b"]:
        """1/2 log sigmoid(lambda)."""
        return 0.5 * jax.nn.log_sigmoid(self.log_snr(t))

    def log_sigma(self, t: Times) -> Float[Array, "*b"]:
        """1/2 log sigmoid(-lambda)."""
        return 0.5 * jax.nn.log_sigmoid(-self.log_snr(t))


class BetweenEnds(_GivenLogSNR):
    """lambda falls from log_snr_max at t = 0, which has noise and may be used like any other time, to log_snr_min at t = 1."""

    def log_snr(self, t: Times) -> Float[Array, "*b"]:
        """lambda(t), from log_snr_max at t = 0 to log_snr_min at t = 1."""
        return self.log_snr_max - (self.log_snr_max - self.log_snr_min) * self.fraction(jnp.asarray(t))

    def fraction(self, t: Times) -> Float[Array, "*b"]:
        """How much of the way to log_snr_min is done at t: 0 at t = 0, 1 at t = 1, increasing."""
        raise NotImplementedError

    def __post_init__(self):
        # Not SDE's own check, which forbids t = 0.
        if known(self.t_min, self.t_max, self.t_train):
            check(
                0 <= float(self.t_train) <= float(self.t_min) < float(self.t_max) <= 1,
                f"{type(self).__name__} needs 0 <= t_train <= t_min < t_max <= 1, got t_train={self.t_train}, "
                f"t_min={self.t_min}, t_max={self.t_max}",
            )
        if known(self.log_snr_max, self.log_snr_min):
            check(
                -math.inf < float(self.log_snr_min) < float(self.log_snr_max) < math.inf,
                f"{type(self).__name__} needs finite log_snr_min < log_snr_max, got {self.log_snr_min} and {self.log_snr_max}: "
                "the log-SNR must fall with t; 13.3 and -5 are usual for 256 grey levels",
            )


@pytree_dataclass
class LinearLogSNR(BetweenEnds):
    """lambda linear in t: VDM's schedule, with fixed or learned end points (arXiv:2107.00630 appendix H).

    With learned end points they are ordinary leaves: differentiate a bound with respect to the SDE.
    """

    log_snr_max: Number = 13.3
    log_snr_min: Number = -5.0
    t_min: Number = 0.0
    t_max: Number = 1.0
    t_train: Number = 0.0

    def fraction(self, t: Times) -> Float[Array, "*b"]:
        """t."""
        return t


def monotone_network(width: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters of `MonotoneLogSNR`'s network: nearly linear at the start, `width` sigmoids at places spread over t."""
    rng = np.random.default_rng(seed)
    return {
        "linear": np.zeros((), np.float32),
        "height": np.full(width, -4.0, np.float32) + 0.1 * rng.standard_normal(width).astype(np.float32),
        "place": np.linspace(0.0, 1.0, width, dtype=np.float32),
        "steepness": np.full(width, np.log(width / 4.0), np.float32),
    }


@pytree_dataclass
class MonotoneLogSNR(BetweenEnds):
    """lambda by a learned monotone network, between learned end points (arXiv:2107.00630 appendix H).

    t plus sigmoids of positive heights and steepnesses, normalised to run from 0 to 1: increasing whatever the
    parameters are. The end points change a bound, what lies between only the variance of its estimate
    (arXiv:2107.00630 section 5.1), so `bound.bound_gradients` treats the two apart.
    """

    log_snr_max: Number = 13.3
    log_snr_min: Number = -5.0
    network: Any = dataclasses.field(default_factory=monotone_network)
    t_min: Number = 0.0
    t_max: Number = 1.0
    t_train: Number = 0.0

    def fraction(self, t: Times) -> Float[Array, "*b"]:
        """The network's value, between its values at 0 and 1."""
        n = self.network

        def raw(t):
            return jnp.exp(n["linear"]) * t + jnp.exp(n["height"]) @ jax.nn.sigmoid(jnp.exp(n["steepness"]) * (t - n["place"]))

        low, high = raw(jnp.zeros(())), raw(jnp.ones(()))
        return (jnp.vectorize(raw)(t) - low) / (high - low)


@pytree_dataclass
class Tangent(_GivenLogSNR):
    """A variance-preserving process near the times of one batch: lambda = level + rate (t - at), arrays `(B,)` each.

    What a loss sees of a process at B given times is its log-SNR and its rate there: as leaves of their own, one backward
    pass gives the derivatives of every example's loss by both.
    """

    level: Any
    rate: Any
    at: Any
    t_min: Number = 0.0
    t_max: Number = 1.0
    t_train: Number = 0.0

    def log_snr(self, t: Times) -> Float[Array, "..."]:
        """level + rate (t - at), `(B,)` for a scalar t too."""
        return self.level + self.rate * (t - self.at)

    def __post_init__(self):
        """Nothing to check: it is made from a process that was checked."""
