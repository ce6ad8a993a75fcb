"""Forward processes: each is a pair of functions of time, x_t = alpha(t) x_0 + sigma(t) eps.

Everything else (log-SNR, drift, diffusion, prior, inverse of the log-SNR) follows from the pair and lives in
`SDE`. A new process is a frozen dataclass that defines `log_alpha` and `log_sigma`:

    @dataclasses.dataclass(frozen=True)
    class Flow(sd.SDE):  # x_t = (1 - t) x_0 + t eps
        t_min: float = 1e-3
        t_max: float = 0.999
        t_train: float = 1e-5

        def log_alpha(self, t):
            return jnp.log1p(-t)

        def log_sigma(self, t):
            return jnp.log(t)
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PRNGKeyArray

# A scalar, or an array of any shape.
Times = Num[Array, "*b"] | Num[np.ndarray, "*b"] | float | int

# A float; under a JAX transformation, whatever leaf JAX puts in its place.
Number = Any


@functools.cache
def _register(cls) -> None:
    """Makes a class a pytree, unless it is one; its fields with `metadata={"static": True}` are not leaves.

    Not by `jax.tree_util.register_dataclass`: to it (JAX 0.10 to 0.12) the structures of two classes with as many leaves
    are equal, and where their hashes meet as well, `jax.jit` runs the program compiled for the one with the other's numbers.
    """
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    static = [f.name for f in fields if f.metadata.get("static")]
    leaves = [f.name for f in fields if not f.metadata.get("static")]
    keys = [jax.tree_util.GetAttrKey(name) for name in leaves]

    def flatten(self):
        return [getattr(self, name) for name in leaves], tuple(getattr(self, name) for name in static)

    def flatten_with_keys(self):
        children, fixed = flatten(self)
        return list(zip(keys, children)), fixed

    def unflatten(fixed, children):
        # Without __post_init__: JAX also puts placeholders, tracers and gradients in the leaves' places.
        self = object.__new__(cls)
        for name, value in (*zip(leaves, children), *zip(static, fixed)):
            object.__setattr__(self, name, value)
        return self

    try:
        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    except ValueError as error:  # by flax.struct.dataclass and the like
        if "uplicate" not in str(error):
            raise


def pytree_dataclass(cls):
    """Makes `cls` a frozen dataclass and a pytree; fields with `metadata={"static": True}` are not leaves."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    _register(cls)
    return cls


def expand(coefficient: Times, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Appends axes to a per-example coefficient `(B,)` until it broadcasts against x `(B, *event)`; leaves scalars.

    In x's precision, but at least float32: alpha and sigma round to 1 and 0 in less.
    """
    coefficient = jnp.asarray(coefficient, jnp.promote_types(x.dtype, jnp.float32))
    if coefficient.ndim == 0:
        return coefficient
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


def derivative(fn, t):
    """d fn / dt of an elementwise function, by forward-mode autodiff."""
    t = jnp.asarray(t)
    t = t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(float)
    return jax.jvp(fn, (t,), (jnp.ones_like(t),))[1]


def known(*values) -> bool:
    """Whether all values are plain numbers: not traced, and no placeholders that JAX puts into a pytree."""
    return all(
        isinstance(v, (int, float, np.number)) or isinstance(v, (jax.Array, np.ndarray)) and not isinstance(v, jax.core.Tracer)
        for v in values
    )


def is_number(value) -> bool:
    """Whether a value is one number, traced or not."""
    return np.ndim(value) == 0 and value is not None and not isinstance(value, (str, bool, np.bool_))


def check(condition, message: str):
    """Raises ValueError(message) when the condition is known and false; traced conditions pass."""
    if not isinstance(condition, jax.core.Tracer) and not condition:
        raise ValueError(message)


def shown(value) -> str:
    """A value as an error prints it: on one line, the middle of a long one left out."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:60]}...{text[-20:]}"


def check_key(key) -> None:
    """Raises ValueError for what is not one random key."""
    good = isinstance(key, (jax.Array, np.ndarray)) and (
        key.ndim == 0 and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim == 1 and key.dtype == np.uint32
    )
    check(good, f"key={shown(key)} is not one random key; pass jax.random.key(0)")


def check_log_snr(sde: "SDE") -> None:
    """Raises ValueError where the log-SNR is known, and is not finite or does not fall, in the precision in which it is computed."""
    if not known(*jax.tree.leaves(sde)):
        return
    with jax.ensure_compile_time_eval():
        within = float(sde.t_min) + np.linspace(0.0, 1.0, 17) * (float(sde.t_max) - float(sde.t_min))
        t = np.unique([float(sde.t_train), *within]).astype(jnp.zeros(0).dtype)
        log_snr = np.asarray(sde.log_snr(jnp.asarray(t)))
    # It may end at -inf: zero terminal SNR.
    good = np.isfinite(log_snr[:-1]) & (np.diff(log_snr) < 0)
    if not good.all():
        i = int(np.argmin(good))
        raise ValueError(
            f"the log-SNR of {shown(sde)} goes from {log_snr[i]:g} at t={t[i]:g} to {log_snr[i + 1]:g} at t={t[i + 1]:g}: it must be "
            f"finite and fall from t_train to t_max, in {log_snr.dtype}; choose less extreme values, or, where t runs from noise to data, "
            "turn it round"
        )


def check_times(sde: "SDE") -> None:
    """Raises ValueError for a process without one of its three times."""
    missing = [name for name in ("t_min", "t_max", "t_train") if getattr(sde, name, None) is None]
    check(not missing, f"{type(sde).__name__} lacks {', '.join(missing)}: a process has t_min, t_max and t_train, as 1e-3, 1.0 and 1e-5")


class SDE:
    """dx = f(x, t) dt + g(t) dw with marginals x_t = alpha(t) x_0 + sigma(t) eps (arXiv:2011.13456; arXiv:2107.00630).

    Subclasses define `log_alpha(t)` and `log_sigma(t)`, elementwise in t of any shape. Three times bound every use:
    `t_max` (the prior), `t_min` (where samplers and likelihoods stop) and `t_train` (the shortest time that losses
    draw). Every subclass is a pytree whose leaves are its fields, as of a dataclass: in `jax.jit` another beta_max does not recompile.
    """

    t_min: Number
    t_max: Number
    t_train: Number

    def __new__(cls, *args, **kwargs):
        _register(cls)
        return super().__new__(cls)

    def __post_init__(self):
        check_times(self)
        if known(self.t_min, self.t_max, self.t_train):
            check(
                0 < float(self.t_train) <= float(self.t_min) < float(self.t_max) < math.inf,
                f"{type(self).__name__} needs 0 < t_train <= t_min < t_max < inf, got t_train={self.t_train}, "
                f"t_min={self.t_min}, t_max={self.t_max}; set all three to fit",
            )

    def log_alpha(self, t: Times) -> Float[Array, "*b"]:
        """log alpha(t)."""
        raise NotImplementedError(f"{type(self).__name__} must define log_alpha(t) and log_sigma(t)")

    def log_sigma(self, t: Times) -> Float[Array, "*b"]:
        """log sigma(t)."""
        raise NotImplementedError(f"{type(self).__name__} must define log_alpha(t) and log_sigma(t)")

    def alpha(self, t: Times) -> Float[Array, "*b"]:
        """The factor of the data, alpha(t)."""
        return jnp.exp(self.log_alpha(jnp.asarray(t)))

    def sigma(self, t: Times) -> Float[Array, "*b"]:
        """The standard deviation of the noise, sigma(t)."""
        return jnp.exp(self.log_sigma(jnp.asarray(t)))

    def log_snr(self, t: Times) -> Float[Array, "*b"]:
        """lambda(t) = log(alpha^2 / sigma^2), strictly decreasing in t."""
        t = jnp.asarray(t)
        return 2 * (self.log_alpha(t) - self.log_sigma(t))

    def log_snr_rate(self, t: Times) -> Float[Array, "*b"]:
        """d lambda / dt < 0."""
        return derivative(self.log_snr, jnp.asarray(t))

    def drift(self, x: Float[Array, "..."], t: Times) -> Float[Array, "..."]:
        """f(x, t) = (d log alpha / dt) x, of x's shape `(B, *event)`; t is `(B,)` or a scalar."""
        return expand(derivative(self.log_alpha, jnp.asarray(t)), x) * x

    def diffusion(self, t: Times) -> Float[Array, "*b"]:
        """g(t) >= 0, from g^2 = -sigma^2 d lambda / dt."""
        return self.sigma(t) * jnp.sqrt(-self.log_snr_rate(t))

    def perturb(self, x0: Float[Array, "..."], eps: Float[Array, "..."], t: Times) -> Float[Array, "..."]:
        """x_t = alpha(t) x_0 + sigma(t) eps, of x0's shape; a draw from the marginal when eps ~ N(0, I)."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps

    def prior_std(self) -> Float[Array, ""]:
        """Standard deviation of the Gaussian that stands for the marginal at `t_max`."""
        return self.sigma(jnp.asarray(self.t_max))

    def prior_sample(self, key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = float) -> Float[Array, "..."]:
        """A draw from N(0, prior_std^2 I) of the given shape `(B, *event)`."""
        return self.prior_std().astype(dtype) * jax.random.normal(key, shape, dtype)

    def prior_log_prob(self, x: Float[Array, "b ..."]) -> Float[Array, " b"]:
        """log N(x; 0, prior_std^2 I) in nats, summed over event axes, `(B,)`."""
        std = self.prior_std().astype(x.dtype)
        per_dim = -0.5 * (x / std) ** 2 - jnp.log(std) - 0.5 * math.log(2 * math.pi)
        return per_dim.reshape(x.shape[0], -1).sum(axis=1)

    def time(self, log_snr: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The time at which `log_snr(t)` has the given value: bisection on (0, t_max], then one Newton step.

        The Newton step also carries the derivative, dt/dlambda = 1 / lambda'(t). Values beyond the ends are clipped.
        """
        target = jnp.asarray(log_snr)

        def halve(_, bounds):
            low, high = bounds
            middle = 0.5 * (low + high)
            too_early = self.log_snr(middle) > target
            return jnp.where(too_early, middle, low), jnp.where(too_early, high, middle)

        top = jnp.full_like(target, self.t_max)
        # 64 halvings reach the rounding of float64 as well.
        low, high = jax.lax.fori_loop(0, 64, halve, (jnp.zeros_like(top), top))
        t = jax.lax.stop_gradient(0.5 * (low + high))
        newton = t - (self.log_snr(t) - target) / jax.lax.stop_gradient(self.log_snr_rate(t))
        return jnp.where(jnp.isfinite(newton), jnp.clip(newton, 0.0, top), t)


class _UnitPrior:
    def prior_std(self) -> Float[Array, ""]:
        """1: the marginal at `t_max` is taken as N(0, I)."""
        return jnp.asarray(1.0)


class _LinearBeta(_UnitPrior, SDE):
    def integrated_beta(self, t: Times) -> Float[Array, "*b"]:
        """Integral of beta(s) = beta_min + s (beta_max - beta_min) from 0 to t."""
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def log_alpha(self, t: Times) -> Float[Array, "*b"]:
        """-1/2 int beta."""
        return -0.5 * self.integrated_beta(t)

    def __post_init__(self):
        super().__post_init__()
        if known(self.beta_min, self.beta_max):
            check(
                0 <= float(self.beta_min) < float(self.beta_max) < math.inf,
                f"{type(self).__name__} needs 0 <= beta_min < beta_max < inf, got beta_min={self.beta_min}, "
                f"beta_max={self.beta_max}; 0.1 and 20 are usual",
            )


@pytree_dataclass
class VP(_LinearBeta):
    """Variance-preserving SDE with linear beta(t): alpha^2 = exp(-int beta), sigma^2 = 1 - alpha^2.

    arXiv:2011.13456 eq. 11 and 33; DDPM (arXiv:2006.11239) in continuous time. Prior N(0, I).
    """

    beta_min: Number = 0.1
    beta_max: Number = 20.0
    t_min: Number = 1e-3
    t_max: Number = 1.0
    t_train: Number = 1e-5

    def log_sigma(self, t: Times) -> Float[Array, "*b"]:
        """1/2 log(1 - exp(-int beta)), by expm1 so that small t keeps its digits."""
        return 0.5 * jnp.log(-jnp.expm1(-self.integrated_beta(t)))


@pytree_dataclass
class SubVP(_LinearBeta):
    """Sub-variance-preserving SDE: alpha^2 = exp(-int beta), sigma = 1 - alpha^2 (arXiv:2011.13456 eq. 13, 29, 33).

    The prior is N(0, I).
    """

    beta_min: Number = 0.1
    beta_max: Number = 20.0
    t_min: Number = 1e-3
    t_max: Number = 1.0
    t_train: Number = 1e-5

    def log_sigma(self, t: Times) -> Float[Array, "*b"]:
        """log(1 - exp(-int beta))."""
        return jnp.log(-jnp.expm1(-self.integrated_beta(t)))


@pytree_dataclass
class VE(SDE):
    """Variance-exploding SDE, geometric noise: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t.

    arXiv:2011.13456 eq. 9 and 31; SMLD (arXiv:1907.05600) in continuous time. Prior N(0, sigma_max^2 I): an
    approximation whose error falls with (std of the data / sigma_max)^2.
    """

    sigma_min: Number = 0.01
    sigma_max: Number = 50.0
    t_min: Number = 1e-5
    t_max: Number = 1.0
    t_train: Number = 1e-5

    def __post_init__(self):
        super().__post_init__()
        self._check_sigmas()

    def _check_sigmas(self):
        if known(self.sigma_min, self.sigma_max):
            check(
                0 < float(self.sigma_min) < float(self.sigma_max) < math.inf,
                f"{type(self).__name__} needs 0 < sigma_min < sigma_max < inf, got sigma_min={self.sigma_min}, "
                f"sigma_max={self.sigma_max}; 0.01 and 50 are usual",
            )

    def log_alpha(self, t: Times) -> Float[Array, "*b"]:
        """0."""
        return jnp.zeros_like(t)

    def log_sigma(self, t: Times) -> Float[Array, "*b"]:
        """log sigma_min + t log(sigma_max / sigma_min)."""
        return jnp.log(self.sigma_min) + t * (jnp.log(self.sigma_max) - jnp.log(self.sigma_min))


@pytree_dataclass
class CosineVP(_UnitPrior, SDE):
    """Variance-preserving SDE with the cosine schedule: alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    arXiv:2102.09672 eq. 17 without its offset, as in arXiv:2107.00630 appendix and arXiv:2202.00512. Prior N(0, I).
    The default stops at lambda = -12.9; `t_max=1.0` gives zero terminal SNR, for x0- or v-prediction only.
    """

    t_min: Number = 1e-3
    t_max: Number = 0.999
    t_train: Number = 1e-5

    def __post_init__(self):
        super().__post_init__()
        if known(self.t_max):
            check(float(self.t_max) <= 1, f"CosineVP needs t_max <= 1, got t_max={self.t_max}: alpha(1) = 0 already")

    def log_alpha(self, t: Times) -> Float[Array, "*b"]:
        """log sin(pi (1 - t) / 2): exactly -inf at t = 1, where cos(pi t / 2) would round to a negative number."""
        return jnp.log(jnp.sin(0.5 * math.pi * (1 - t)))

    def log_sigma(self, t: Times) -> Float[Array, "*b"]:
        """log sin(pi t / 2)."""
        return jnp.log(jnp.sin(0.5 * math.pi * t))
