"""Networks by name.

Every network is called as
`apply({"params": params}, x, c, labels=None, dropout_keys=None)`:
x `(B, *event)`, c `(B,)` a noise label whose scale the caller picks (t, log sigma, log-SNR),
labels `(B,)` int or None, dropout_keys `(B,)` in training and None elsewhere: a key an example, so that
dropout does not depend on how the batch lies on devices. It returns an array like x, at least float32.

A network of your own is a Linen module with this call: `MODELS["mine"] = Mine` in the config's file, whose `model` sets its fields.
"""

from dataclasses import fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sde_diffusion.models.mlp import MLP
from sde_diffusion.models.unet import UNet
from sde_diffusion.prediction import lookup
from sde_diffusion.sde import check, shown

MODELS = {"mlp": MLP, "unet": UNet}


def build(name: str, **options: Any) -> nn.Module:
    """The network `name` with its fields set from `options`; lists become tuples.

    Raises ValueError for an unknown name or option and lists the known ones.
    """
    network = lookup(MODELS, name, "model")
    known = [field.name for field in fields(network) if field.name not in ("parent", "name")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown option {', '.join(map(repr, unknown))} of model {name!r}: the known ones are {', '.join(known)}")
    # Flax hashes a module by its fields, and a config may hold lists.
    module = network(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    for key, most in (("channels", 65_536), ("num_blocks", 100), ("width", 1_000_000), ("depth", 1000)):
        value = getattr(module, key, 1)
        check(
            isinstance(value, int) and 1 <= value <= most,
            f"model.{key}={shown(value)} must be an integer of at least 1 and at most {most:,}",
        )
    for key in ("multipliers", "attention", "input_fourier"):
        value = getattr(module, key, ())
        whole = isinstance(value, tuple) and all(isinstance(v, int) for v in value)
        check(whole, f"model.{key}={shown(value)} must be a tuple of integers, as (1, 2, 2)")
    if hasattr(module, "multipliers"):
        few = 0 < len(module.multipliers) <= 16
        check(few and 1 <= min(module.multipliers) and max(module.multipliers) <= 1000,
              f"model.multipliers={shown(module.multipliers)} must be positive, at most 1,000, and 1 to 16 of them")  # fmt: skip
    waves = getattr(module, "input_fourier", ())
    check(len(waves) <= 64 and all(abs(n) <= 32 for n in waves),
          f"model.input_fourier={shown(waves)} must be exponents from -32 to 32, at most 64 of them")  # fmt: skip
    # A rate next to 1 keeps nothing in float32.
    dropout = getattr(module, "dropout", 0.0)
    check(0 <= dropout <= 1 - 2**-24, f"model.dropout={dropout} must be in [0, 1)")
    scale = getattr(module, "embedding_scale", None)
    check(scale is None or 1e-30 < scale < 1e30, f"model.embedding_scale={scale} must be positive, or None for the embedding's usual one")
    classes = getattr(module, "num_classes", None)
    check(classes is None or 1 <= classes < 2**31 - 1, f"model.num_classes={classes} must be at least 1, or None for no classes")
    for key in ("dtype", "param_dtype"):
        value = getattr(module, key, "float32")
        names = {"float32": 0, "bfloat16": 0, "float16": 0, **({"float64": 0} if jax.config.jax_enable_x64 else {})}
        lookup(names, value if isinstance(value, str) else jnp.dtype(value).name, f"model.{key}")
    return module


__all__ = ["MLP", "MODELS", "UNet", "build"]
