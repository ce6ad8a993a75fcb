"""The discrete-time DDPM and SMLD models, as a continuous process and the list of times at which it is read.

Their training loss is `dsm_loss(..., weighting="sigma2", times=sde.levels)` (DDPM's L_simple, and SMLD's loss), their
sampler `sample_sde(..., method="ancestral", grid=sde.levels[::-1])`, whose last step returns the posterior mean.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sde_diffusion.sde import SDE, VE, Number, Times, _UnitPrior, check, pytree_dataclass


def linear_betas(num_levels: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> Float[Array, " n"]:
    """DDPM's betas, linear in the level, `(num_levels,)` (arXiv:2006.11239 section 4)."""
    check(num_levels >= 1, f"num_levels={num_levels} must be at least 1; DDPM has 1000")
    return jnp.linspace(beta_min, beta_max, num_levels)


def cosine_betas(num_levels: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Float[Array, " n"]:
    """Betas of the cosine schedule, clipped at max_beta, `(num_levels,)` (arXiv:2102.09672 eq. 17)."""
    check(num_levels >= 1, f"num_levels={num_levels} must be at least 1; 1000 is usual")
    edges = np.linspace(0.0, 1.0, num_levels + 1)
    # In float64 on the host: 1 - ratio of neighbours is 4e-5 at the first level, and float32 would miss it by 0.2%.
    f = np.sin(0.5 * math.pi * (1.0 - edges) / (1 + offset)) ** 2
    return jnp.asarray(np.minimum(1 - f[1:] / f[:-1], max_beta), float)


@pytree_dataclass
class DDPM(_UnitPrior, SDE):
    """DDPM's marginals alpha_i^2 = prod(1 - beta_j) at t = i / N, i = 1..N (arXiv:2006.11239 eq. 4).

    Between the levels beta is constant, so this is an SDE for all t in (0, 1]: every sampler of the project accepts it.
    """

    betas: Any = dataclasses.field(default_factory=linear_betas)
    t_min: Number = None
    t_max: Number = 1.0
    t_train: Number = None

    def __post_init__(self):
        # t_min is given where JAX rebuilds the pytree, with leaves of its own.
        if self.t_min is None and isinstance(self.betas, (list, tuple, jax.Array, np.ndarray)):
            check(
                np.ndim(self.betas) == 1 and hasattr(self.betas, "shape"),
                f"betas is a {type(self.betas).__name__} of shape {np.shape(self.betas)}; pass an array (N,)",
            )
        if isinstance(self.betas, (jax.Array, np.ndarray)) and not isinstance(self.betas, jax.core.Tracer):
            low, high = np.min(self.betas), np.max(self.betas)
            check(
                0 < low and high < 1,
                f"betas run from {low:g} to {high:g}; each must lie inside (0, 1): beta = 1 (zero terminal SNR) has no "
                "continuous process, use CosineVP(t_max=1.0)",
            )
        for name in ("t_min", "t_train"):
            if getattr(self, name) is None and hasattr(self.betas, "shape"):
                object.__setattr__(self, name, 1.0 / self.betas.shape[0])

    @property
    def levels(self) -> Float[Array, " n"]:
        """The N times i / N in increasing order."""
        num = self.betas.shape[0]
        return jnp.arange(1, num + 1) / num

    def integrated_beta(self, t: Times) -> Float[Array, "*b"]:
        """-log alpha^2, piecewise linear in t."""
        num = self.betas.shape[0]
        total = jnp.concatenate([jnp.zeros(1), jnp.cumsum(-jnp.log1p(-self.betas))])
        return jnp.interp(jnp.asarray(t) * num, jnp.arange(num + 1.0), total)

    def log_alpha(self, t: Times) -> Float[Array, "*b"]:
        """-1/2 int beta."""
        return -0.5 * self.integrated_beta(t)

    def log_sigma(self, t: Times) -> Float[Array, "*b"]:
        """1/2 log(1 - alpha^2)."""
        return 0.5 * jnp.log(-jnp.expm1(-self.integrated_beta(t)))


@pytree_dataclass
class SMLD(VE):
    """NCSN's geometric noise levels sigma_i = sigma_min (sigma_max / sigma_min)^(i / (N - 1)), i = 0..N-1.

    arXiv:1907.05600 section 4.2, arXiv:2011.13456 section 3.1: the levels of `VE` at N equally spaced times.
    """

    t_min: Number = 0.0
    t_train: Number = 0.0
    num_levels: int = dataclasses.field(default=1000, metadata={"static": True})

    def __post_init__(self):
        check(self.num_levels >= 2, f"num_levels={self.num_levels} must be at least 2; NCSN++ has 1000")
        # VE's own check of the times does not apply: at t = 0 the noise is sigma_min, and SMLD uses it.
        self._check_sigmas()

    @property
    def levels(self) -> Float[Array, " n"]:
        """The N times i / (N - 1) in increasing order."""
        return jnp.linspace(0.0, 1.0, self.num_levels)
