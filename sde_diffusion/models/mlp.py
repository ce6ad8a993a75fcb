"""A residual network for vectors."""

from math import prod
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sde_diffusion.models.layers import (
    EMBEDDINGS,
    Dropout,
    NoiseEmbedding,
    check_call,
    uniform_init,
)
from sde_diffusion.prediction import lookup


class MLP(nn.Module):
    """Residual network for vectors `(B, D)`; other events are flattened and restored.

    Call: x `(B, *event)` float, c `(B,)` float noise label, labels `(B,)` int or None, dropout_keys
    `(B,)` random keys switch dropout on. Returns an array like x, at least float32,
    zero at initialisation.

    width: hidden size. depth: residual blocks of two layers each. embedding, embedding_scale,
    num_classes: see NoiseEmbedding. dtype: compute type; param_dtype: type of the parameters.

    Raises ValueError for an unknown name at construction, for shapes that do not fit while tracing.
    """

    width: int = 128
    depth: int = 3
    dropout: float | int = 0.0
    embedding: str = "sinusoidal"
    embedding_scale: float | int | None = None
    num_classes: int | None = None
    dtype: Any = "float32"
    param_dtype: Any = "float32"

    def __post_init__(self):
        lookup(EMBEDDINGS, self.embedding, "embedding")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *event"],
        c: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
        dropout_keys: Key[Array, "..."] | None = None,
    ) -> Float[Array, "batch *event"]:
        check_call(x, c, labels, self.num_classes, "MLP")
        types = dict(dtype=jnp.dtype(self.dtype), param_dtype=jnp.dtype(self.param_dtype))
        emb = NoiseEmbedding(
            self.width,
            self.width,
            self.embedding,
            self.embedding_scale,
            self.num_classes,
            self.param_dtype,
        )(c, labels)

        size = prod(x.shape[1:])
        h = nn.Dense(self.width, **types)(x.reshape(x.shape[0], size))
        for _ in range(self.depth):
            r = nn.silu(nn.LayerNorm(**types)(h))
            r = nn.Dense(self.width, **types)(r) + nn.Dense(self.width, **types)(nn.silu(emb))
            r = Dropout(self.dropout)(nn.silu(r), dropout_keys)
            h = h + nn.Dense(self.width, **types)(r)
        h = nn.silu(nn.LayerNorm(**types)(h))
        out = nn.Dense(size, kernel_init=uniform_init(0.0), **types)(h).reshape(x.shape)
        return out.astype(jnp.promote_types(x.dtype, jnp.float32))
