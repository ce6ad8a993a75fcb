"""The oracle: Gaussian mixtures, whose marginals under every SDE are Gaussian mixtures in closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sde_diffusion.sde import SDE, pytree_dataclass


@jax.tree_util.register_pytree_node_class
class GaussianMixture:
    """A mixture of K Gaussians in D dimensions; one component is a Gaussian.

    Args:
      weights: `(K,)`, positive; normalised to sum 1.
      means: `(K, D)`.
      covariances: `(K, D, D)`, symmetric positive semi-definite. Diagonalised once, on the host: at any noise level
        alpha^2 lam + sigma^2 in the eigenbasis is then all that a density or score needs.

    Raises:
      ValueError: shapes that disagree, weights that are not positive, covariances that are not symmetric PSD.
    """

    def __init__(self, weights, means, covariances):
        weights, means, covariances = (np.asarray(a) for a in (weights, means, covariances))
        k, d = means.shape if means.ndim == 2 else (-1, -1)
        if weights.shape != (k,) or covariances.shape != (k, d, d):
            raise ValueError(
                "GaussianMixture needs weights (K,), means (K, D) and covariances (K, D, D); got "
                f"{weights.shape}, {means.shape}, {covariances.shape}"
            )
        if not (weights > 0).all():
            raise ValueError(f"weights {weights} must be positive; drop the components of weight 0")
        if not np.allclose(covariances, covariances.transpose(0, 2, 1), atol=1e-6):
            raise ValueError("covariances must be symmetric; pass (C + C^T) / 2")
        eigenvalues, eigenvectors = np.linalg.eigh(covariances.astype(np.float64))
        if eigenvalues.min() < -1e-6 * max(eigenvalues.max(), 1e-12):
            raise ValueError(f"covariances must be positive semi-definite; the smallest eigenvalue is {eigenvalues.min():.2g}")
        dtype = jnp.zeros(()).dtype
        self.log_weights = jnp.asarray(np.log(weights / weights.sum()), dtype)
        self.means = jnp.asarray(means, dtype)
        self.eigenvalues = jnp.asarray(np.maximum(eigenvalues, 0), dtype)  # (K, D)
        self.eigenvectors = jnp.asarray(eigenvectors, dtype)  # (K, D, D), in columns

    @classmethod
    def gaussian(cls, mean, covariance) -> "GaussianMixture":
        """A single Gaussian with mean `(D,)` and covariance `(D, D)`."""
        return cls(np.ones(1), np.asarray(mean)[None], np.asarray(covariance)[None])

    def mean(self) -> Float[Array, " d"]:
        """E[x], `(D,)`."""
        return jnp.exp(self.log_weights) @ self.means

    def covariance(self) -> Float[Array, "d d"]:
        """Cov[x], `(D, D)`."""
        q, lam = self.eigenvectors, self.eigenvalues
        centred = self.means - self.mean()[None]
        within = jnp.einsum("kij,kj,klj->kil", q, lam, q)
        return jnp.einsum("k,kij->ij", jnp.exp(self.log_weights), within + centred[:, :, None] * centred[:, None, :])

    def log_prob(self, x: Float[Array, "b d"], sde: SDE | None = None, t: Float[Array, "*b"] | float | None = None) -> Float[Array, " b"]:
        """log p_t(x) in nats, `(B,)`: of the data, or of the marginal of `sde` at t (scalar or `(B,)`)."""
        return jax.nn.logsumexp(self._log_joint(x, *self._marginal(x, sde, t))[0], axis=1)

    def score_fn(self, sde: SDE) -> "ExactScore":
        """The exact score function of the marginals of `sde`, `(x (B, D), t (B,)) -> (B, D)`."""
        return ExactScore(self, sde)

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, "n d"]:
        """n draws from the data distribution, `(n, D)`."""
        key_k, key_z = jax.random.split(key)
        component = jax.random.categorical(key_k, self.log_weights, shape=(n,))
        z = jax.random.normal(key_z, (n, self.means.shape[1]), self.means.dtype)
        z = z * jnp.sqrt(self.eigenvalues)[component]
        return self.means[component] + jnp.einsum("nij,nj->ni", self.eigenvectors[component], z)

    def _marginal(self, x, sde, t):
        one = jnp.ones(x.shape[:1], x.dtype)
        if sde is None:
            return one, 0 * one
        t = jnp.broadcast_to(jnp.asarray(t), x.shape[:1])
        return sde.alpha(t), sde.sigma(t)

    def _log_joint(self, x, alpha, sigma):
        """log(w_k N_k(x)) `(B, K)`; the residual over the variance, in the eigenbasis `(B, K, D)`."""
        variance = (alpha**2)[:, None, None] * self.eigenvalues[None] + (sigma**2)[:, None, None]
        residual = x[:, None, :] - alpha[:, None, None] * self.means[None]
        y = jnp.einsum("kij,bki->bkj", self.eigenvectors, residual, precision="highest")
        log_n = -0.5 * (y**2 / variance + jnp.log(variance) + math.log(2 * math.pi)).sum(axis=2)
        return self.log_weights[None] + log_n, y / variance

    def tree_flatten(self):
        return (self.log_weights, self.means, self.eigenvalues, self.eigenvectors), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        self = object.__new__(cls)
        self.log_weights, self.means, self.eigenvalues, self.eigenvectors = leaves
        return self


@pytree_dataclass
class ExactScore:
    """The score function of a mixture under an SDE, with the exact posterior mean for zero terminal SNR too."""

    mixture: GaussianMixture
    sde: SDE

    @property
    def sigma_data(self) -> Float[Array, ""]:
        """The standard deviation of the data, sqrt(trace(Cov[x]) / D), at least 1e-3: samplers ask a score function for it."""
        variance = jnp.trace(self.mixture.covariance()) / self.mixture.means.shape[1]
        return jnp.maximum(jnp.sqrt(variance), 1e-3)

    def __call__(self, x: Float[Array, "b d"], t: Float[Array, " b"]) -> Float[Array, "b d"]:
        return self._solve(x, t)[0]

    def predict(self, x: Float[Array, "b d"], t: Float[Array, " b"]) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
        """(E[x_0 | x_t], -sigma score), each `(B, D)`."""
        score, x0 = self._solve(x, t)
        return x0, -self.sde.sigma(t)[:, None] * score

    def _solve(self, x, t):
        mixture = self.mixture
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        log_joint, y = mixture._log_joint(x, alpha, sigma)
        posterior = jax.nn.softmax(log_joint, axis=1)
        q = mixture.eigenvectors

        def mean_over_components(z):
            return jnp.einsum("kij,bkj->bi", q, posterior[:, :, None] * z, precision="highest").astype(x.dtype)

        # E[x0 | x, k] = mu_k + alpha Q lam / (alpha^2 lam + sigma^2) Q^T (x - alpha mu_k)
        shift = mean_over_components(alpha[:, None, None] * mixture.eigenvalues[None] * y)
        return -mean_over_components(y), posterior.astype(x.dtype) @ mixture.means.astype(x.dtype) + shift
