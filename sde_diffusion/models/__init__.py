"""Networks by name.

Every network is called as
`apply({"params": params}, x, c, labels=None, train=False, rngs={"dropout": key})`:
x `(B, *event)`, c `(B,)` a noise label whose scale the caller picks (t, log sigma, log-SNR),
labels `(B,)` int or None. It returns an array like x, at least float32.
"""

from dataclasses import fields
from typing import Any

import flax.linen as nn

from sde_diffusion.models.mlp import MLP
from sde_diffusion.models.unet import UNet
from sde_diffusion.prediction import lookup

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
    return network(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


__all__ = ["MLP", "MODELS", "UNet", "build"]
