"""The U-Net of DDPM++ and NCSN++."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sde_diffusion.models.layers import (
    DOWNSAMPLING,
    EMBEDDINGS,
    NoiseEmbedding,
    ResidualBlock,
    SelfAttention,
    check_call,
    fir_blur,
    input_waves,
    norm,
    uniform_init,
)
from sde_diffusion.prediction import lookup

PROGRESSIVE_INPUTS = {"none": False, "residual": True}


class UNet(nn.Module):
    """U-Net for images, channels last (arXiv:2011.13456 app. H; arXiv:2006.11239 app. B).

    Call: x `(B, H, W, C)` float, c `(B,)` float noise label, labels `(B,)` int or None, dropout_keys
    `(B,)` random keys switch dropout on. Returns an image like x, at least float32,
    zero at initialisation. H and W are divisible by 2**(len(multipliers) - 1).

    channels: width at full resolution. multipliers: the width of each resolution over `channels`,
    each resolution half the one before. num_blocks: residual blocks a resolution on the way down,
    one more on the way up. attention: the image heights with self-attention (the middle of the
    network always has it). skip_rescale: divide residual sums by sqrt 2. resampling: "plain" (mean,
    nearest neighbour) or "fir" (kernel 1, 3, 3, 1). progressive_input: "residual" adds a
    downsampled input at each resolution. embedding, embedding_scale, num_classes: see
    NoiseEmbedding. input_fourier: exponents n of further input channels sin and cos of 2^n pi x,
    damped by the noise in x, for which c has to be the log-SNR of x; see input_waves. remat:
    recompute the residual blocks in the backward pass, less memory for about a third more time.
    dtype: compute type; param_dtype: type of the parameters.

    DDPM++ of CIFAR-10: channels=128, multipliers=(1, 2, 2, 2), num_blocks=4, attention=(16,),
    dropout=0.1; NCSN++ in addition resampling="fir", progressive_input="residual",
    embedding="fourier" with c = log sigma.

    Raises ValueError for an unknown name at construction, for shapes that do not fit while tracing.
    """

    channels: int = 64
    multipliers: tuple[int, ...] = (1, 2)
    num_blocks: int = 2
    attention: tuple[int, ...] = ()
    dropout: float | int = 0.0
    skip_rescale: bool = True
    resampling: str = "plain"
    progressive_input: str = "none"
    embedding: str = "sinusoidal"
    embedding_scale: float | int | None = None
    num_classes: int | None = None
    input_fourier: tuple[int, ...] = ()
    remat: bool = False
    dtype: Any = "float32"
    param_dtype: Any = "float32"

    def __post_init__(self):
        lookup(DOWNSAMPLING, self.resampling, "resampling")
        lookup(PROGRESSIVE_INPUTS, self.progressive_input, "progressive_input")
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
        self._check_image(x)
        check_call(x, c, labels, self.num_classes, "UNet")
        types = dict(dtype=jnp.dtype(self.dtype), param_dtype=jnp.dtype(self.param_dtype))
        block_type = nn.remat(ResidualBlock) if self.remat else ResidualBlock

        # Explicit names: the parameter tree is the same with and without remat.
        def block(h, name, level, resample="none"):
            return block_type(
                self.channels * self.multipliers[level],
                resample,
                self.resampling,
                self.dropout,
                self.skip_rescale,
                **types,
                name=name,
            )(h, emb, dropout_keys)

        def attend(h, name):
            return SelfAttention(self.skip_rescale, **types, name=name)(h)

        emb = NoiseEmbedding(
            self.channels,
            4 * self.channels,
            self.embedding,
            self.embedding_scale,
            self.num_classes,
            self.param_dtype,
        )(c, labels)

        h = x
        if self.input_fourier:
            h = jnp.concatenate([x, input_waves(x, c, self.input_fourier)], axis=-1)
        h = nn.Conv(self.channels, (3, 3), kernel_init=uniform_init(), **types)(h)
        pyramid = x
        skips = [h]
        last = len(self.multipliers) - 1
        for level in range(last + 1):
            for i in range(self.num_blocks):
                h = block(h, f"encode_{level}_{i}", level)
                if h.shape[1] in self.attention:
                    h = attend(h, f"encode_{level}_{i}_attention")
                skips.append(h)
            if level < last:
                h = block(h, f"down_{level}", level, "down")
                if PROGRESSIVE_INPUTS[self.progressive_input]:
                    pyramid = self._halve(pyramid, h.shape[-1], types)
                    h = (pyramid + h) * (2**-0.5 if self.skip_rescale else 1.0)
                    pyramid = h
                skips.append(h)

        h = block(h, "middle_0", last)
        h = attend(h, "middle_attention")
        h = block(h, "middle_1", last)

        for level in range(last, -1, -1):
            for i in range(self.num_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), f"decode_{level}_{i}", level)
            if h.shape[1] in self.attention:
                h = attend(h, f"decode_{level}_attention")
            if level > 0:
                h = block(h, f"up_{level}", level, "up")

        h = nn.silu(norm(h.shape[-1], **types)(h))
        h = nn.Conv(x.shape[-1], (3, 3), kernel_init=uniform_init(0.0), **types)(h)
        return h.astype(jnp.promote_types(x.dtype, jnp.float32))

    def _halve(self, pyramid, features, types):
        fir = self.resampling == "fir"
        padding = "VALID" if fir else ((0, 1), (0, 1))
        conv = nn.Conv(features, (3, 3), strides=2, padding=padding, kernel_init=uniform_init(), **types)
        return conv(fir_blur(pyramid) if fir else pyramid)

    def _check_image(self, x):
        if x.ndim != 4:
            raise ValueError(
                f"UNet got x of shape {x.shape}: expected (batch, height, width, channels); add the missing axis or use the network 'mlp'"
            )
        factor = 2 ** (len(self.multipliers) - 1)
        height, width = x.shape[1:3]
        if height % factor or width % factor or min(height, width) < factor:
            raise ValueError(
                f"UNet got images of {height} x {width}, but {len(self.multipliers)} multipliers "
                f"need height and width divisible by {factor}: pad or crop the images, or give "
                "fewer multipliers"
            )
