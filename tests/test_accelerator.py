"""The accelerator experiment: its figures on a CPU, its count of FLOPs, and PyTorch's U-Net beside the library's."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import accelerator
from sde_diffusion.models import MLP, UNet

TINY = ["--config.model.channels=8", "--config.model.multipliers=(1,)", "--config.model.num_blocks=1", "--config.model.attention=(8,)"]


def random_params(network, x, c):
    """Parameters without the zeros of initialisation."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, c)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) * max(np.prod(a.shape[:-1]), 25.0) ** -0.5, shapes)


def numbers(tree):
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else [tree]
    for value in values:
        if isinstance(value, (dict, list)):
            yield from numbers(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield value


@pytest.mark.slow
def test_every_figure_of_a_tiny_network_is_finite_and_positive(tmp_path, capsys):
    out = tmp_path / "figures" / "accelerator.json"
    accelerator.main([*TINY, "--batch=8", "--shape=8,8,1", "--rounds=2", f"--out={out}"])
    figures = json.loads(out.read_text())
    found = list(numbers(figures))
    assert len(found) > 15 and all(math.isfinite(n) and n > 0 for n in found), figures
    assert figures["devices"] == jax.device_count() and figures["jax"] == jax.__version__
    assert figures["step_flops"] > 2.5 * figures["evaluation_flops"]
    table = capsys.readouterr().out
    for word in ("training step", "MFU", "sampler", "compilation", "peak memory", "PyTorch"):
        assert word in table


def test_wrong_options_are_told(capsys):
    for words, message in ((["--config.model.chanels=8"], "chanels"), (["--config=configs/none.py"], "none.py"), (["8"], "'8'")):
        with pytest.raises(SystemExit):
            accelerator.parse(words)
        assert message in capsys.readouterr().err


def test_flops_of_an_mlp_are_those_of_its_products():
    batch, dim, width, depth = 16, 32, 256, 2
    network, x, c = MLP(width=width, depth=depth), jnp.zeros((batch, dim)), jnp.zeros(batch)
    params = jax.eval_shape(network.init, jax.random.key(0), x, c)
    # Two products embed the noise, one takes in x, three make a block, one gives the result.
    products = 2 * batch * (2 * width**2 + dim * width + depth * 3 * width**2 + width * dim)
    assert accelerator.flops(network.apply, params, x, c) == pytest.approx(products, rel=0.03)


def test_flops_of_a_convolution():
    x, kernel = jnp.zeros((4, 8, 8, 32)), jnp.zeros((1, 1, 32, 64))
    count = accelerator.flops(lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")), x, kernel)  # fmt: skip
    assert count == pytest.approx(2 * 4 * 64 * 32 * 64, rel=1e-6)


@pytest.fixture
def torch_unet():
    pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[bench]' for the comparison with PyTorch")
    from experiments import torch_unet

    return torch_unet


@pytest.mark.parametrize(
    "options",
    [
        dict(channels=8, multipliers=(1, 2), num_blocks=1, attention=(4,), dropout=0.1),
        dict(channels=6, multipliers=(1, 3, 2), num_blocks=2, attention=(8, 2), skip_rescale=False),
        dict(channels=8, multipliers=(2,), num_blocks=1, embedding_scale=10.0, input_fourier=(1, 3)),
    ],
)
def test_the_network_of_torch_is_that_of_flax(torch_unet, options):
    import torch

    network, rng = UNet(**options), np.random.default_rng(0)
    x, c = rng.normal(size=(3, 8, 8, 2)).astype(np.float32), rng.uniform(0, 8, size=3).astype(np.float32)
    params = random_params(network, x, c)
    expected = np.asarray(jax.jit(network.apply)({"params": params}, jnp.asarray(x), jnp.asarray(c)))

    other = torch_unet.UNet((8, 8, 2), **options).eval()
    other.load_state_dict(torch_unet.from_flax(params))
    with torch.no_grad():
        got = other(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(c)).permute(0, 2, 3, 1).numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    assert sum(p.numel() for p in other.parameters()) == sum(a.size for a in jax.tree.leaves(params))


def test_the_cifar_network_of_torch_has_as_many_parameters(torch_unet):
    import torch

    with torch.device("meta"):
        net = torch_unet.UNet((32, 32, 3), channels=128, multipliers=(1, 2, 2, 2), num_blocks=4, attention=(16,), dropout=0.1)
    assert sum(p.numel() for p in net.parameters()) == 61_804_419


def test_a_step_of_torch_learns(torch_unet):
    import torch

    _, config = accelerator.parse(["--config.optim.lr=0.003"])
    torch.manual_seed(0)
    net = torch_unet.UNet((8, 8, 1), channels=8, multipliers=(1,), num_blocks=1)
    step = torch_unet.make_step(net, config.optim, flip=True, compiled=False)
    images = torch.full((32, 1, 8, 8), 128, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    losses = [float(step(images)) for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
