"""The library's U-Net and its training step in PyTorch: what `python -m experiments.accelerator` compares with.

Modules bear the names of the Flax network's parameters, so `net.load_state_dict(from_flax(params))` takes those of
`sde_diffusion.models.UNet` over, all of them and no others.
"""

import functools
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def from_flax(params, prefix="") -> dict[str, torch.Tensor]:
    """The parameters of `sde_diffusion.models.UNet` as a state_dict of `UNet`."""
    out = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            out |= from_flax(value, f"{prefix}{name}.")
        else:
            a = torch.tensor(np.asarray(value, np.float32))
            out[prefix + ("bias" if name == "bias" else "weight")] = a.permute(3, 2, 0, 1) if a.ndim == 4 else a.mT if a.ndim == 2 else a
    return out


def _norm(channels):
    return nn.GroupNorm(next(g for g in range(max(min(channels // 4, 32), 1), 0, -1) if channels % g == 0), channels, eps=1e-6)


_conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
RESIZE = {"down": lambda x: F.avg_pool2d(x, 2), "up": lambda x: F.interpolate(x, scale_factor=2), "": lambda x: x}


class ResidualBlock(nn.Module):
    def __init__(self, inside, features, width, resample, dropout, gain):
        super().__init__()
        self.GroupNorm_0, self.Conv_0, self.Dense_0 = _norm(inside), _conv(inside, features), nn.Linear(width, features)
        self.GroupNorm_1, self.Conv_1 = _norm(features), _conv(features, features)
        self.Conv_2 = nn.Conv2d(inside, features, 1) if inside != features or resample else None
        self.resize, self.dropout, self.gain = RESIZE[resample], dropout, gain

    def forward(self, x, emb):
        h, x = self.resize(F.silu(self.GroupNorm_0(x))), self.resize(x)
        h = self.Conv_0(h) + self.Dense_0(F.silu(emb))[:, :, None, None]
        h = self.Conv_1(F.dropout(F.silu(self.GroupNorm_1(h)), self.dropout, self.training))
        return ((x if self.Conv_2 is None else self.Conv_2(x)) + h) * self.gain


class SelfAttention(nn.Module):
    def __init__(self, features, gain):
        super().__init__()
        self.GroupNorm_0, self.gain = _norm(features), gain
        self.q, self.k, self.v, self.out = (nn.Linear(features, features) for _ in range(4))

    def forward(self, x, _):
        h = self.GroupNorm_0(x).permute(0, 2, 3, 1).flatten(1, 2)[:, None]
        h = self.out(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        return (x + h[:, 0].unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)) * self.gain


class UNet(nn.Module):
    """`sde_diffusion.models.UNet` of the same options: x `(B, C, H, W)`, c `(B,)` -> like x, float32; shape: (H, W, C).

    Dropout is on in training mode. Without the options of the Flax network that have no argument here, and for even `channels`.
    """

    def __init__(self, shape, *, channels=64, multipliers=(1, 2), num_blocks=2, attention=(), dropout=0.0, skip_rescale=True,
                 embedding_scale=None, input_fourier=()):  # fmt: skip
        super().__init__()
        width, last = channels, len(multipliers) - 1
        gain, self.waves = 2**-0.5 if skip_rescale else 1.0, tuple(input_fourier)
        frequencies = torch.from_numpy(np.geomspace(1.0, 1e-4, channels // 2)) * (1000.0 if embedding_scale is None else embedding_scale)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        sizes = enumerate((channels // 2 * 2, 4 * channels))
        self.NoiseEmbedding_0 = nn.ModuleDict({f"Dense_{i}": nn.Linear(n, 4 * channels) for i, n in sizes})
        self.Conv_0 = _conv(shape[2] * (1 + 2 * len(self.waves)), channels)
        skips = [channels] + [channels * m for level, m in enumerate(multipliers) for _ in range(num_blocks + (level < last))]
        self.plan = ["push"]  # what the forward pass does, in order

        def add(name, module):
            self.add_module(name, module)
            self.plan.append(name)

        def block(name, level, resample="", skip=0):
            nonlocal width
            inside, width = width + skip, channels * multipliers[level]
            add(name, ResidualBlock(inside, width, 4 * channels, resample, dropout, gain))

        for level in range(last + 1):
            for i in range(num_blocks):
                block(f"encode_{level}_{i}", level)
                if shape[0] >> level in attention:
                    add(f"encode_{level}_{i}_attention", SelfAttention(width, gain))
                self.plan.append("push")
            if level < last:
                block(f"down_{level}", level, "down")
                self.plan.append("push")
        block("middle_0", last)
        add("middle_attention", SelfAttention(width, gain))
        block("middle_1", last)
        for level in range(last, -1, -1):
            for i in range(num_blocks + 1):
                self.plan.append("pop")
                block(f"decode_{level}_{i}", level, skip=skips.pop())
            if shape[0] >> level in attention:
                add(f"decode_{level}_attention", SelfAttention(width, gain))
            if level > 0:
                block(f"up_{level}", level, "up")
        self.GroupNorm_0, self.Conv_1 = _norm(width), _conv(width, shape[2])

    def forward(self, x, c):
        phase, dense = c[:, None] * self.frequencies, list(self.NoiseEmbedding_0.values())
        emb, skips = dense[1](F.silu(dense[0](torch.cat([phase.sin(), phase.cos()], 1)))), []
        damping = -0.5 * c.neg().sigmoid()[:, None, None, None]
        frequencies = [2.0**n * torch.pi for n in self.waves]
        h = self.Conv_0(torch.cat([x] + [(w**2 * damping).exp() * f(w * x) for w in frequencies for f in (torch.sin, torch.cos)], 1))
        for name in self.plan:
            if name == "push":
                skips.append(h)
            else:
                h = torch.cat([h, skips.pop()], 1) if name == "pop" else getattr(self, name)(h, emb)
        return self.Conv_1(F.silu(self.GroupNorm_0(h))).float()


def make_step(net: UNet, optim, *, flip=False, bfloat16=False, compiled=True):
    """The step `images -> loss`, in place: Adam with clipping, an average of the parameters, dropout, as in `sde_diffusion.train`.

    images: uint8 `(B, C, H, W)`, channels last. optim: the config's section. The loss is that of eps, under a cosine schedule.
    """
    params = list(net.train().parameters())
    average = [p.detach().clone() for p in params]
    adam = torch.optim.Adam(params, optim.lr, (optim.beta1, optim.beta2), optim.eps, fused=params[0].is_cuda)
    forward = torch.compile(net) if compiled else net

    def step(images):
        x0 = (images + torch.rand_like(images, dtype=torch.float32)) / 128 - 1
        t, turn = torch.rand(2, len(x0), device=x0.device)
        x0 = torch.where((turn < 0.5)[:, None, None, None], x0.flip(3), x0) if flip else x0
        noise, angle = torch.randn_like(x0), t[:, None, None, None] * torch.pi / 2
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=bfloat16):
            error = forward(angle.cos() * x0 + angle.sin() * noise, t) - noise
        loss = error.square().sum((1, 2, 3)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(params, optim.grad_clip or torch.inf)
        adam.step()
        adam.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - optim.ema_decay)
        return loss.detach()

    return step
