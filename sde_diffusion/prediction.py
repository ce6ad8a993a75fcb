"""The hub between what a network predicts and what everything else uses: the pair (x0, eps) with x = alpha x0 + sigma eps."""

import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sde_diffusion.sde import SDE, Number, check, check_log_snr, check_times, expand, is_number, known, pytree_dataclass, shown

# Each maps x, the network's output F and the per-example alpha, sigma to (x0, eps).
PREDICTIONS: dict[str, Callable] = {
    "eps": lambda x, f, alpha, sigma, _: ((x - sigma * f) / alpha, f),
    "x0": lambda x, f, alpha, sigma, _: (f, (x - alpha * f) / sigma),
    "score": lambda x, f, alpha, sigma, _: ((x + sigma**2 * f) / alpha, -sigma * f),
    # v = alpha eps - sigma x0 (arXiv:2202.00512 appendix D); the divisor is 1 for variance-preserving processes.
    "v": lambda x, f, alpha, sigma, _: (
        (alpha * x - sigma * f) / (alpha**2 + sigma**2),
        (sigma * x + alpha * f) / (alpha**2 + sigma**2),
    ),
    # EDM's preconditioning (arXiv:2206.00364 table 1) with x / alpha and sigma / alpha in place of its x and sigma.
    "edm": lambda x, f, alpha, sigma, std: (
        alpha * std**2 / (sigma**2 + (alpha * std) ** 2) * x + sigma * std / jnp.sqrt(sigma**2 + (alpha * std) ** 2) * f,
        sigma / (sigma**2 + (alpha * std) ** 2) * x - alpha * std / jnp.sqrt(sigma**2 + (alpha * std) ** 2) * f,
    ),
}

# What the network is told about the noise, `(B,)`; of the SDE, t and the standard deviation of the data.
NOISE_LABELS: dict[str, Callable] = {
    "t": lambda sde, t, _: t,
    "log_sigma": lambda sde, t, _: sde.log_sigma(t),
    # At zero terminal SNR lambda = -inf; the network sees the -20 at which everything else stops too.
    "log_snr": lambda sde, t, _: jnp.maximum(sde.log_snr(t), -20.0),
    "data_log_snr": lambda sde, t, std: jnp.maximum(sde.log_snr(t), -20.0) + 2 * jnp.log(std),  # of x: alpha^2 std^2 / sigma^2
    "edm": lambda sde, t, _: -0.125 * jnp.maximum(sde.log_snr(t), -20.0),  # 1/4 log(sigma / alpha)
}


def lookup(table: dict, name: Any, kind: str):
    """`table[name]`, or a ValueError that lists the known names."""
    if not isinstance(name, str) or name not in table:
        close = difflib.get_close_matches(str(name).lower(), list(table), 1, cutoff=0.7)
        hint = f"did you mean {close[0]!r}? It must be" if close else "choose"
        raise ValueError(f"unknown {kind} {shown(name)}; {hint} one of {', '.join(sorted(table))}")
    return table[name]


@pytree_dataclass
class NetworkScore:
    """A network as a score function; made by `as_score`. A pytree: new parameters do not recompile a sampler."""

    network: Any
    sde: SDE
    sigma_data: Number
    prediction: str = dataclasses.field(metadata={"static": True})
    noise_label: str = dataclasses.field(metadata={"static": True})

    def predict(self, x: Float[Array, "b ..."], t: Float[Array, " b"]) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
        """The network's (x0, eps), each of x's shape; finite also at zero terminal SNR (x0, v and EDM predictions)."""
        alpha, sigma = expand(self.sde.alpha(t), x), expand(self.sde.sigma(t), x)
        scale = 1.0
        if self.prediction == "edm":
            scale = 1 / jnp.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2)
        output = self.network(scale * x, NOISE_LABELS[self.noise_label](self.sde, t, self.sigma_data))
        if not hasattr(output, "shape"):
            raise ValueError(f"the network returned a {type(output).__name__}; return one array of shape {x.shape}")
        if output.shape != x.shape:
            raise ValueError(f"the network returned shape {output.shape} for x of shape {x.shape}; they must be equal")
        # alpha and sigma stay in x's precision, whatever the network computes in.
        return PREDICTIONS[self.prediction](x, output.astype(x.dtype), alpha, sigma, self.sigma_data)

    def __call__(self, x: Float[Array, "b ..."], t: Float[Array, " b"]) -> Float[Array, "b ..."]:
        return -self.predict(x, t)[1] / expand(self.sde.sigma(t), x)


def as_score(
    network: Callable,
    sde: SDE,
    *,
    prediction: str = "eps",
    noise_label: str | None = None,
    sigma_data: float = 0.5,
) -> NetworkScore:
    """Turns `network(x, noise_label)` into a score function `score_fn(x, t)`.

    Args:
      network: maps x `(B, *event)` and the noise label `(B,)` to an array of x's shape. A `jax.tree_util.Partial` of
        a module's `apply` and its parameters keeps the parameters out of the compiled program.
      sde: the process that the network was trained on.
      prediction: what the network predicts: "eps", "x0", "v" = alpha eps - sigma x0 (arXiv:2202.00512), "score", or
        "edm": EDM's preconditioning (arXiv:2206.00364 table 1) for any process, input scaling included. The velocity
        u = eps - x0 of rectified flow (alpha = 1 - t, sigma = t) is x0 = x - t u: wrap it so, with "x0".
      noise_label: "t", "log_sigma", "log_snr", "data_log_snr" (log of alpha^2 sigma_data^2 / sigma^2, the SNR of x where data
        has another variance than 1) or "edm" (1/4 log(sigma/alpha)); by default "edm" with EDM, else "t".
      sigma_data: standard deviation of the data about its mean: of "edm", and of the samplers' default method and grid.

    Raises:
      ValueError: unknown name; no SDE; sigma_data not positive; eps- or score-prediction for an SDE with zero terminal SNR,
        which leaves x0 undefined.
    """
    lookup(PREDICTIONS, prediction, "prediction")
    noise_label = noise_label or ("edm" if prediction == "edm" else "t")
    lookup(NOISE_LABELS, noise_label, "noise_label")
    check_sigma_data(sigma_data)
    check_sde(sde, "network, sde")
    if prediction in ("eps", "score") and zero_terminal_snr(sde):
        raise ValueError(
            f"prediction={prediction!r} cannot start from zero terminal SNR (alpha({sde.t_max}) = 0 in {sde}): "
            "use prediction='v' or 'x0', or an SDE with a smaller t_max"
        )
    # Not Partial(network): a Partial in a Partial is one static function, with its parameters as constants.
    return NetworkScore(as_pytree(network), sde, sigma_data, prediction, noise_label)


def as_pytree(fn: Callable) -> Callable:
    """`fn` in a form that can be an argument of a jitted function.

    Functions that are pytrees of arrays (`as_score`, `jax.tree_util.Partial`, the oracle's) stay what they are; any
    other function becomes static: it compiles once per function object and, as under `jax.jit`, keeps the arrays that it
    closed over at that time.
    """
    leaves = jax.tree.leaves(fn)
    # A bool among them (train=False) would be traced, and networks branch on it.
    if all(isinstance(v, (jax.Array, np.ndarray, np.number, int, float)) and not isinstance(v, bool) for v in leaves):
        return fn
    return _Static(fn)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A function as a constant of a program; its attributes (`predict`, `sigma_data`) stay its own."""

    fn: Callable

    def __call__(self, *args, **options):
        return self.fn(*args, **options)

    def __getattr__(self, name):
        # Asked for before `fn` is set, where the object is copied.
        if name == "fn" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.fn, name)


def zero_terminal_snr(sde: SDE, t=None) -> bool:
    """Whether alpha(t) = 0, t_max by default, or too small for float's precision; False where t or the SDE's fields are traced."""
    # Inside jax.jit an operation on constants is traced as well, unless it is asked not to be.
    with jax.ensure_compile_time_eval():
        t = jnp.asarray(sde.t_max if t is None else t, float)
        # The log-SNR first: where it is traced, alpha is not asked for.
        return not isinstance(sde.log_snr(t), jax.core.Tracer) and bool(sde.alpha(t) == 0)


def check_sigma_data(sigma_data) -> None:
    """Raises ValueError for what is no number, not positive or not finite; a traced one passes."""
    check(
        is_number(sigma_data) and (sigma_data > 0) & (sigma_data < np.inf),
        f"sigma_data={sigma_data!r} must be one number, positive and finite: the standard deviation of the data",
    )


def check_sde(sde, order: str = "score_fn, sde, key") -> None:
    """Raises ValueError where `sde` is no process."""
    example = f"an SDE, as sd.{sde.__name__}()" if isinstance(sde, type) else f"an SDE, as sd.VP(); the order of arguments is {order}"
    check(isinstance(sde, SDE), f"sde={shown(sde)} must be {example}")
    check_times(sde)
    fields, kind = getattr(sde, "__dataclass_fields__", {}), type(sde)
    lost = [name for name in vars(sde) if name not in fields and not isinstance(getattr(kind, name, None), functools.cached_property)]
    check(
        not lost,
        f"{kind.__name__} has {', '.join(lost)}, which would be lost under jax.jit: make it a field of a frozen dataclass (help(sd.sde))",
    )


@functools.lru_cache(maxsize=256)
def _check_log_snr(sde, x64: bool) -> None:
    """`check_log_snr`, once for equal processes in a precision."""
    check_log_snr(sde)


def check_process(score_fn, sde) -> None:
    """Raises ValueError where `sde` is no process, or a score function is none or knows its own (`score_fn.sde`) and it is another."""
    check_sde(sde)
    if all(isinstance(leaf, (int, float)) for leaf in jax.tree.leaves(sde)):
        try:
            hash(sde)
        except TypeError:  # of a list, or not frozen
            check_log_snr(sde)
        else:
            _check_log_snr(sde, jax.config.jax_enable_x64)
    check(
        (callable(score_fn) or hasattr(score_fn, "predict")) and not isinstance(score_fn, type),
        f"score_fn={shown(score_fn)} must be a function (x (B, *event), t (B,)) -> (B, *event)",
    )
    other = getattr(score_fn, "sde", None)
    if isinstance(other, SDE) and other is not sde and known(*jax.tree.leaves((other, sde))):
        with jax.ensure_compile_time_eval():
            t = jnp.linspace(0.1, 0.9, 5) * min(float(sde.t_max), float(other.t_max))
            same = all(jnp.allclose(f(t), g(t), rtol=1e-4, atol=1e-4) for f, g in
                       ((sde.log_snr, other.log_snr), (sde.log_alpha, other.log_alpha)))  # fmt: skip
        check(same, f"score_fn is the score of {other}, but sde={sde} was passed; pass the process it was made for")


def _times(t, x):
    """t `(B,)` in x's precision, but at least float32."""
    return jnp.broadcast_to(jnp.asarray(t, jnp.promote_types(x.dtype, jnp.float32)), x.shape[:1])


def score(score_fn, x: Float[Array, "b ..."], t: Float[Array, "..."]) -> Float[Array, "b ..."]:
    """score_fn at a time shared by the batch (scalar t) or per example `(B,)`.

    Raises:
      ValueError: while tracing, so before any compilation, unless the result has x's shape and dtype.
    """
    t = _times(t, x)
    out = score_fn(x, t)
    if not hasattr(out, "shape"):
        raise ValueError(f"score_fn returned a {type(out).__name__}; return one array of shape {x.shape}")
    if out.shape != x.shape:
        raise ValueError(
            f"score_fn returned shape {out.shape} for x of shape {x.shape} and t of shape {t.shape}; return one score for each entry of x"
        )
    if out.dtype != x.dtype:
        raise ValueError(f"score_fn returned {out.dtype} for x of {x.dtype}; end it with .astype(x.dtype)")
    return out


def predict(score_fn, sde: SDE, x: Float[Array, "b ..."], t: Float[Array, "..."]) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """(x0, eps) at x `(B, *event)`, one evaluation: Tweedie's x0 = (x + sigma^2 score) / alpha, eps = -sigma score.

    A score function with its own method `predict(x, t)` (see `as_score`) answers directly, without the division.
    """
    t = _times(t, x)
    if hasattr(score_fn, "predict"):
        return score_fn.predict(x, t)
    alpha, sigma = expand(sde.alpha(t), x), expand(sde.sigma(t), x)
    return PREDICTIONS["score"](x, score(score_fn, x, t), alpha, sigma, None)
