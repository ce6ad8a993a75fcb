"""Networks by name.

Every network is called as
`apply({"params": params}, x, c, labels=None, dropout_keys=None)`:
x `(B, *event)`, c `(B,)` a noise label whose scale the caller picks (t, log sigma, log-SNR),
labels `(B,)` int or None, dropout_keys `(B,)` in training and None elsewhere: a key an example, so that
dropout does not depend on how the batch lies on devices. It returns an array like x, at least float32.
"""

from dataclasses import fields
from typing import Any

import flax.linen as nn

from sde_diffusion.models.mlp import MLP
from sde_diffusion.models.unet import UNet
from sde_diffusion.prediction import lookup
from sde_diffusion.sde import check

MODELS = {"mlp": MLP, "unet": UNet}


def build(name: str, **options: Any) -> nn.Module:
    """The network `name` with its fields set from `options`; lists become tuples.

    Raises ValueError for an unknown name or option and lists the known ones.
    """
    network = lookup(MODELS, name, "model")
    known = [field.name for field in fields(network) if field.name not in ("parent", "name")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"unknown option {', '.join(map(repr, unknown))} of model {name!r}: "
            f"the known ones are {', '.join(known)}"
        )
    # Flax hashes a module by its fields, and a config may hold lists.
    module = network(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    for key in ("channels", "num_blocks", "width", "depth"):
        value = getattr(module, key, 1)
        check(isinstance(value, int) and value >= 1, f"model.{key}={value!r} must be an integer of at least 1")
    for key in ("multipliers", "attention", "input_fourier"):
        value = getattr(module, key, ())
        whole = isinstance(value, tuple) and all(isinstance(v, int) for v in value)
        check(whole, f"model.{key}={value!r} must be a tuple of integers, as (1, 2, 2)")
    if hasattr(module, "multipliers"):
        check(len(module.multipliers) > 0 and min(module.multipliers) >= 1, f"model.multipliers={module.multipliers} must be positive")
    check(0 <= module.dropout < 1, f"model.dropout={module.dropout} must be in [0, 1)")
    return module


__all__ = ["MLP", "MODELS", "UNet", "build"]
