"""Continuous data from integer levels: draws from q(x | levels) with their log-density, for bounds on discrete likelihoods.

log P(levels) >= E[log p(x) - log q(x | levels)] for any density p and any q within the levels' cells (arXiv:1902.00275 eq. 5), and
P(levels) = E[p(x) / q(x | levels)]. The widths of the cells come from the scaler.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PRNGKeyArray

from sde_diffusion.samplers.grid import check_t_end
from sde_diffusion.sde import SDE

Levels = Num[Array | np.ndarray, "b ..."]
Draw = tuple[Float[Array, "b ..."], Float[Array, " b"]]


def uniform_dequantize(scaler, key: PRNGKeyArray, levels: Levels) -> Draw:
    """Uniform in each level's cell (arXiv:1511.01844 section 3.1): x in model space and log q in nats, `(B,)`.

    Args:
      scaler: a `data.Scaler` with num_levels.
      levels: integers in 0..num_levels - 1, `(B, *event)`.

    Raises:
      ValueError: a scaler of vectors, levels that it does not have.
    """
    width = _cell_width(scaler, levels)
    return scaler.dequantize(key, levels), jnp.full(len(levels), -_num_dims(levels) * math.log(width))


def truncated_normal_dequantize(scaler, sde: SDE, key: PRNGKeyArray, levels: Levels, t_end: float | None = None) -> Draw:
    """The process's own noise at t_end, cut to the cell (arXiv:2305.03935 section 3.2): x = alpha y + sigma z, y the cell's middle.

    The data is so what training saw at t_end, without a gap between the two. x is a state at t_end, not model space: its
    cells are alpha times as wide. Pass it to `log_likelihood` with the same t_end.

    Args:
      scaler, levels: as in `uniform_dequantize`.
      t_end: in [t_train, t_max), `sde.t_min` by default. Where half a cell is fewer than about 3 sigma / alpha, q is
        nearly uniform.

    Returns:
      x `(B, *event)` and log q in nats `(B,)`.

    Raises:
      ValueError: as `uniform_dequantize`, or t_end outside the range.
    """
    width, t_end = _cell_width(scaler, levels), jnp.asarray(check_t_end(sde, t_end), float)
    alpha, sigma = sde.alpha(t_end), sde.sigma(t_end)
    bound = 0.5 * width * alpha / sigma
    z = jax.random.truncated_normal(key, -bound, bound, jnp.shape(levels))
    log_mass = jnp.log(jax.scipy.special.erf(bound / math.sqrt(2)))
    per_dim = -0.5 * z**2 - 0.5 * math.log(2 * math.pi) - jnp.log(sigma) - log_mass
    return alpha * scaler.encode(levels) + sigma * z, _sum(per_dim)


def variational_dequantize(scaler, network, key: PRNGKeyArray, levels: Levels) -> Draw:
    """A learned place in the cell, sigmoid(mean + std eps) of its width (arXiv:1902.00275 section 3.1, a Gaussian for the flow).

    Differentiable in the network's parameters: descend the mean of log q - log p(x).

    Args:
      scaler, levels: as in `uniform_dequantize`.
      network: of the cells' middles in model space `(B, *event)`; returns (mean, log std), `(B, *event)` each. Mean 0 and log std
        0.5 are nearly uniform.

    Returns:
      x in model space `(B, *event)` and log q in nats `(B,)`.

    Raises:
      ValueError: as `uniform_dequantize`.
    """
    width = _cell_width(scaler, levels)
    middle = scaler.encode(levels)
    mean, log_std = network(middle)
    eps = jax.random.normal(key, middle.shape, middle.dtype)
    logit = mean + jnp.exp(log_std) * eps
    # d sigmoid / d logit = sigmoid(logit) sigmoid(-logit).
    log_slope = jax.nn.log_sigmoid(logit) + jax.nn.log_sigmoid(-logit) + math.log(width)
    per_dim = -0.5 * eps**2 - 0.5 * math.log(2 * math.pi) - log_std - log_slope
    return middle + width * (jax.nn.sigmoid(logit) - 0.5), _sum(per_dim)


def discrete_bits_per_dim(log_p: Float[Array, " b"], log_q: Float[Array, " b"], num_dims: int) -> Float[Array, " b"]:
    """-(log p(x) - log q(x | levels)) / (D log 2), `(B,)`: in expectation an upper bound on the bits of a level."""
    return (log_q - log_p) / (num_dims * math.log(2.0))


def _cell_width(scaler, levels) -> float:
    if scaler.num_levels is None:
        raise ValueError("num_levels=None: the data are vectors, which have no cells; use their density as it is")
    scaler.check_levels(levels)
    values = scaler.values().astype(np.float64)
    return float((values[-1] - values[0]) / (len(values) - 1))


def _num_dims(levels) -> int:
    return math.prod(jnp.shape(levels)[1:])


def _sum(per_dim) -> Float[Array, " b"]:
    return per_dim.reshape(per_dim.shape[0], -1).sum(axis=1)
