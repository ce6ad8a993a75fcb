"""Building blocks that the networks share.

Convolutions are channels-last. Noise embeddings, norm statistics and the softmax of attention are
at least float32 whatever the compute dtype is.
"""

import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from sde_diffusion.prediction import lookup


def check_call(x: Array, c: Array, labels: Array | None, num_classes: int | None, network: str) -> None:
    """Raises ValueError where x, c and labels do not make one batch. Reads shapes alone."""
    batch = x.shape[:1]
    if c.shape != batch:
        raise ValueError(
            f"{network} got noise labels c of shape {c.shape} with x of shape {x.shape}: "
            f"expected one label an example, {batch}; use jnp.full({batch}, c)"
        )
    if labels is None:
        return
    if num_classes is None:
        raise ValueError(f"{network} got class labels but num_classes is None: set num_classes or drop labels")
    if labels.shape != batch:
        raise ValueError(
            f"{network} got labels of shape {labels.shape} with x of shape {x.shape}: expected one integer an example, {batch}"
        )


def uniform_init(scale: float = 1.0) -> Callable[..., Array]:
    """DDPM's kernel init (arXiv:2006.11239): uniform with variance scale / mean(fan in, fan out).

    scale=0 gives zeros.
    """
    if scale == 0:
        return nn.initializers.zeros_init()
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


def sinusoidal_features(c: Float[Array, " batch"], features: int, scale: float | int) -> Float[Array, "batch features"]:
    """sin and cos of scale * c at geometric frequencies 1 ... 1e-4 (arXiv:1706.03762, sec. 3.5)."""
    half = max(features // 2, 1)
    frequencies = np.geomspace(1.0, 1e-4, half)
    phase = scale * c[:, None] * jnp.asarray(frequencies, c.dtype)[None, :]
    waves = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
    return jnp.pad(waves, ((0, 0), (0, max(features - 2 * half, 0))))[:, :features]


def fourier_features(c: Float[Array, " batch"], features: int, scale: float | int) -> Float[Array, "batch twice_features"]:
    """sin and cos of 2 pi w c with w ~ N(0, scale^2) (arXiv:2006.10739): 2 * features numbers.

    The frequencies are constants, not parameters: weight decay and parameter counts pass them by.
    """
    # NumPy keeps the stream of RandomState frozen; jax.random's may change with a release and
    # would then change what a stored network computes.
    frequencies = scale * np.random.RandomState(0).standard_normal(features)
    phase = c[:, None] * jnp.asarray(2 * np.pi * frequencies, c.dtype)[None, :]
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


EMBEDDINGS = {"sinusoidal": sinusoidal_features, "fourier": fourier_features}
EMBEDDING_SCALES = {"sinusoidal": 1000.0, "fourier": 16.0}


def input_waves(
    x: Float[Array, "batch height width channels"],
    c: Float[Array, " batch"],
    exponents: tuple[int, ...],
) -> Float[Array, "batch height width waves"]:
    """sin and cos of w x for w = 2^n pi (arXiv:2107.00630 app. C), times exp(-w^2 v / 2).

    v = sigmoid(-c) is the variance of the noise in x, which has a log-SNR of c and variance 1 in
    all. So damped, a wave of x is the best linear guess of that of x without noise. Plain waves say
    nothing at high noise but change fast along the path of a sample, and a network that sees them
    is rough: samplers and likelihoods then need more evaluations.
    """
    noise = jax.nn.sigmoid(-c).reshape(-1, 1, 1, 1)
    frequencies = [2.0**n * np.pi for n in exponents]
    waves = [jnp.exp(-0.5 * w**2 * noise) * f(w * x) for w in frequencies for f in (jnp.sin, jnp.cos)]
    return jnp.concatenate(waves, axis=-1)


class NoiseEmbedding(nn.Module):
    """Embedding `(B, width)` of the noise label c `(B,)` and, with num_classes, of a class label.

    features: size of the fixed features (twice that for "fourier"). scale: None means 1000 for
    "sinusoidal" (fits c in [0, 1]) and 16 for "fourier" (fits c = log sigma, arXiv:2011.13456
    app. H). labels: integers in [0, num_classes]; num_classes, or None, means "no label".
    """

    features: int
    width: int
    kind: str = "sinusoidal"
    scale: float | int | None = None
    num_classes: int | None = None
    param_dtype: Any = "float32"

    @nn.compact
    def __call__(self, c: Float[Array, " batch"], labels: Int[Array, " batch"] | None = None) -> Float[Array, "batch width"]:
        c = c.astype(jnp.promote_types(c.dtype, jnp.float32))
        scale = EMBEDDING_SCALES[self.kind] if self.scale is None else self.scale
        dense = dict(dtype=c.dtype, param_dtype=jnp.dtype(self.param_dtype))
        h = lookup(EMBEDDINGS, self.kind, "embedding")(c, self.features, scale)
        h = nn.Dense(self.width, kernel_init=uniform_init(), **dense)(h)
        h = nn.Dense(self.width, kernel_init=uniform_init(), **dense)(nn.silu(h))
        if self.num_classes is not None:
            if labels is None:
                labels = jnp.full(c.shape, self.num_classes, jnp.int32)
            h = h + nn.Embed(self.num_classes + 1, self.width, **dense)(labels)
        return h


def norm(channels: int, dtype: Any, param_dtype: Any) -> nn.GroupNorm:
    """Group norm with the most groups that divide `channels`, at most min(channels // 4, 32)."""
    most = max(min(channels // 4, 32), 1)
    groups = next(g for g in range(most, 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, param_dtype=param_dtype)


def mean_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Mean of each 2 x 2 square."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def repeat_pixels(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Nearest-neighbour upsampling by 2."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


FIR_KERNEL = (1 / 8, 3 / 8, 3 / 8, 1 / 8)


def _fir(x: Array, pad: tuple[int, int], stride: int = 1) -> Array:
    for axis in (1, 2):
        widths = [(0, 0)] * x.ndim
        widths[axis] = pad
        padded = jnp.pad(x, widths)
        size = padded.shape[axis] - len(FIR_KERNEL) + 1
        x = sum(tap * jax.lax.slice_in_dim(padded, k, k + size, stride, axis) for k, tap in enumerate(FIR_KERNEL))
    return x


def fir_blur(x: Float[Array, "b h w c"]) -> Float[Array, "b h1 w1 c"]:
    """Kernel (1, 3, 3, 1) with a zero border of 2: one pixel more a side than x.

    A 3 x 3 convolution of stride 2 without border then halves x.
    """
    return _fir(x, (2, 2))


def fir_down(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Halves the image after the kernel (1, 3, 3, 1) (arXiv:1904.11486, zero border)."""
    return _fir(x, (1, 1), stride=2)


def fir_up(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Doubles the image with zeros between pixels and the kernel (1, 3, 3, 1), zero border."""
    for axis in (1, 2):
        zeros = jnp.zeros_like(x)
        shape = [size * (2 if i == axis else 1) for i, size in enumerate(x.shape)]
        x = jnp.stack([2 * x, zeros], axis + 1).reshape(shape)
    return _fir(x, (2, 1))


DOWNSAMPLING = {"plain": mean_pool, "fir": fir_down}
UPSAMPLING = {"plain": repeat_pixels, "fir": fir_up}


class Dropout(nn.Module):
    """Zeroes a share `rate` of the entries and divides the others by 1 - rate.

    x `(B, ...)`; keys `(B,)`, one an example, or None for x as it is. Each layer makes its own noise of them.
    """

    rate: float | int

    @nn.compact
    def __call__(self, x: Array, keys: Key[Array, "..."] | None = None) -> Array:
        if keys is None or self.rate == 0:
            return x
        layer = zlib.crc32("/".join(self.path).encode())

        def mask(key):
            return jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - self.rate, x.shape[1:])

        return jnp.where(jax.vmap(mask)(keys), x / (1 - self.rate), 0)


class ResidualBlock(nn.Module):
    """BigGAN's residual block (arXiv:1809.11096; arXiv:2011.13456 app. H).

    x `(B, H, W, C)`, emb `(B, E)` -> `(B, H', W', features)`. resample: "none", "down" or "up",
    done inside the block on both branches. skip_rescale divides the sum by sqrt 2. The second
    convolution starts at zero.
    """

    features: int
    resample: str = "none"
    resampling: str = "plain"
    dropout: float | int = 0.0
    skip_rescale: bool = True
    dtype: Any = "float32"
    param_dtype: Any = "float32"

    @nn.compact
    def __call__(self, x: Array, emb: Array, dropout_keys: Key[Array, "..."] | None = None) -> Array:
        types = dict(dtype=jnp.dtype(self.dtype), param_dtype=jnp.dtype(self.param_dtype))
        h = nn.silu(norm(x.shape[-1], **types)(x))
        if self.resample != "none":
            resize = {"down": DOWNSAMPLING, "up": UPSAMPLING}[self.resample][self.resampling]
            x, h = resize(x), resize(h)
        h = nn.Conv(self.features, (3, 3), kernel_init=uniform_init(), **types)(h)
        shift = nn.Dense(self.features, kernel_init=uniform_init(), **types)(nn.silu(emb))
        h = h + shift[:, None, None, :]
        h = nn.silu(norm(self.features, **types)(h))
        h = Dropout(self.dropout)(h, dropout_keys)
        h = nn.Conv(self.features, (3, 3), kernel_init=uniform_init(0.0), **types)(h)
        if x.shape[-1] != self.features or self.resample != "none":
            x = nn.Conv(self.features, (1, 1), kernel_init=uniform_init(), **types)(x)
        return (x + h) * (2**-0.5 if self.skip_rescale else 1.0)


class SelfAttention(nn.Module):
    """One head of self-attention over the pixels of `(B, H, W, C)`, with its residual sum."""

    skip_rescale: bool = True
    dtype: Any = "float32"
    param_dtype: Any = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        types = dict(dtype=jnp.dtype(self.dtype), param_dtype=jnp.dtype(self.param_dtype))
        b, height, width, c = x.shape
        h = norm(c, **types)(x).reshape(b, height * width, c)
        q, k, v = (nn.Dense(c, kernel_init=uniform_init(0.1), name=n, **types)(h) for n in "qkv")
        wide = jnp.promote_types(q.dtype, jnp.float32)
        logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=wide) * c**-0.5
        h = jnp.einsum("bqk,bkc->bqc", nn.softmax(logits).astype(v.dtype), v)
        h = nn.Dense(c, kernel_init=uniform_init(0.0), name="out", **types)(h).reshape(x.shape)
        return (x + h) * (2**-0.5 if self.skip_rescale else 1.0)
