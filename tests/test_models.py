import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.signal

from sde_diffusion.models import MLP, MODELS, UNet, build
from sde_diffusion.models.layers import (
    SelfAttention,
    fir_blur,
    fir_down,
    fir_up,
    fourier_features,
    input_waves,
    norm,
    sinusoidal_features,
)

# These programs run once or twice: LLVM's optimisation costs more than it saves.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

TINY = dict(channels=8, multipliers=(1, 2), num_blocks=1)
TINIEST = dict(channels=8, multipliers=(2,), num_blocks=1)


def batch(shape, seed=0):
    key_x, key_c = jax.random.split(jax.random.key(seed))
    return jax.random.normal(key_x, shape), jax.random.uniform(key_c, shape[:1])


def random_params(network, x, c, seed=1):
    """Parameters without the zeros of initialisation, so that everything reaches the output."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, c)["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        fan_in = max(np.prod(leaf.shape[:-1]), 1) if leaf.ndim > 1 else 25
        mean = float("scale" in jax.tree_util.keystr(path))
        return jnp.asarray(mean + rng.normal(size=leaf.shape) * fan_in**-0.5, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def count(network, shape):
    x, c = jnp.zeros(shape), jnp.zeros(shape[:1])
    variables = jax.eval_shape(network.init, jax.random.key(0), x, c)
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def test_parameter_counts_of_the_published_cifar_networks():
    published = dict(channels=128, multipliers=(1, 2, 2, 2), num_blocks=4, attention=(16,))
    assert count(UNet(**published), (1, 32, 32, 3)) == 61_804_419
    ncsnpp = UNet(**published, resampling="fir", progressive_input="residual", embedding="fourier")
    # The published count is 128 larger: there the fixed Fourier frequencies are stored too.
    assert count(ncsnpp, (1, 32, 32, 3)) == 62_758_787


@pytest.mark.parametrize(
    "network, shape",
    [(MLP(width=16), (3, 2)), (MLP(width=16), (3, 4, 4, 1)), (UNet(**TINY), (3, 4, 6, 1))],
)
def test_output_is_zero_at_initialisation(network, shape):
    x, c = batch(shape)
    out, variables = jit(network.init_with_output)(jax.random.key(0), x, c)
    assert set(variables) == {"params"}
    assert out.shape == x.shape and out.dtype == jnp.float32
    assert not np.any(np.asarray(out))


@pytest.mark.parametrize("network", [MLP(width=16), UNet(**TINIEST)])
def test_bfloat16_computes_in_bfloat16_around_float32_parameters_and_times(network):
    x, c = batch((2, 4, 4, 1))
    network = network.clone(dtype="bfloat16", embedding="fourier")
    params = random_params(network, x, c)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    apply = jit(network.apply)
    assert "bf16" in str(jax.make_jaxpr(network.apply)({"params": params}, x, c))
    # 0.5 and 0.501 are one number in bfloat16.
    near, other = (apply({"params": params}, x, jnp.full(2, t)) for t in (0.5, 0.501))
    assert near.dtype == jnp.float32
    assert np.abs(np.asarray(near - other)).max() > 0.01 * np.abs(np.asarray(near)).max()


def test_float64_input_gives_float64_output():
    with jax.enable_x64(True):
        x, c = jnp.zeros((2, 4, 4, 1), "float64"), jnp.zeros(2, "float64")
        for network in (MLP(width=8), UNet(**TINY, dtype="float64", param_dtype="float64")):
            out, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), x, c)
            assert out.dtype == jnp.float64
            types = {leaf.dtype.name for leaf in jax.tree.leaves(variables)}
            assert types == {network.param_dtype}


def shape_of_gradient(network, shape, labels=None):
    x, c = jnp.zeros(shape), jnp.zeros(shape[:1])
    keys = jax.random.split(jax.random.key(1), len(x))

    def loss(params):
        out = network.apply({"params": params}, x, c, labels, keys)
        assert out.shape == x.shape and out.dtype == jnp.float32
        return jnp.sum(out)

    params = jax.eval_shape(network.init, jax.random.key(0), x, c)["params"]
    gradient = jax.eval_shape(jax.grad(loss), params)
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("log_snr", [2.0, 4.0, 8.0])
def test_input_waves_are_the_best_linear_guess_of_the_waves_without_noise(log_snr):
    """Least squares of sin and cos of w times the signal on those of w x, over signals of many periods.

    Standard error of the 4 slopes at most 1 / sqrt(40,000) = 0.005.
    """
    rng, num, noise = np.random.default_rng(0), 40_000, 1 / (1 + np.exp(log_snr))
    signal = rng.uniform(-16, 16, num)
    x = signal + np.sqrt(noise) * rng.standard_normal(num)
    image, c = jnp.asarray(x, jnp.float32).reshape(1, 200, 200, 1), jnp.asarray([log_snr])
    got = np.asarray(input_waves(image, c, (0, 1))).reshape(num, 4)
    for waves, w in ((got[:, :2], np.pi), (got[:, 2:], 2 * np.pi)):
        seen, clean = (np.stack([np.sin(w * v), np.cos(w * v)], axis=1) for v in (x, signal))
        slopes = np.linalg.lstsq(seen, clean)[0]
        np.testing.assert_allclose(waves, seen @ slopes, atol=4 * 2 * 0.005)


OTHER_OPTIONS = (
    dict(),
    dict(num_classes=3, input_fourier=(2, 3), remat=True, embedding_scale=1),
    dict(dropout=0.1, attention=(4, 2), skip_rescale=False, dtype="bfloat16"),
)


@pytest.mark.parametrize(
    "number, names",
    list(enumerate(itertools.product(("plain", "fir"), ("none", "residual"), ("sinusoidal", "fourier")))),
)
def test_options_combine(number, names):
    rest = OTHER_OPTIONS[number % 3]
    names = dict(zip(("resampling", "progressive_input", "embedding"), names, strict=True))
    labels = jnp.array([0, 3]) if "num_classes" in rest else None
    shape_of_gradient(UNet(**TINY, **names, **rest), (2, 4, 4, 1), labels)


@pytest.mark.parametrize(
    "options, shape",
    [
        (dict(channels=7, multipliers=(1, 3)), (2, 8, 6, 5)),
        (dict(channels=5, multipliers=(1,), resampling="fir"), (1, 3, 5, 1)),
        (dict(channels=32, multipliers=(1, 2)), (2, 8, 8, 1)),
        (dict(channels=1, multipliers=(2,)), (2, 1, 1, 2)),
    ],
)
def test_odd_widths_and_rectangles(options, shape):
    shape_of_gradient(UNet(**options), shape)


@pytest.mark.parametrize(
    "network",
    [
        MLP(width=16, depth=2, num_classes=2),
        UNet(
            **TINY,
            attention=(4,),
            resampling="fir",
            progressive_input="residual",
            embedding="fourier",
            num_classes=2,
            input_fourier=(1,),
        ),
    ],
    ids=["mlp", "unet"],
)
def test_every_parameter_reaches_the_output(network):
    x, c = batch((4, 4, 4, 2))
    labels = jnp.arange(4) % 3
    params = random_params(network, x, c)

    @jit
    def gradient(params, x, c, labels):
        return jax.grad(lambda p: jnp.sum(network.apply({"params": p}, x, c, labels) * jnp.sin(9 * x)))(params)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params, x, c, labels)):
        leaf = np.asarray(leaf)
        assert np.all(np.isfinite(leaf)), path
        # The bias of the keys shifts every logit of a query alike, so softmax removes it.
        if "['k']['bias']" not in jax.tree_util.keystr(path):
            assert np.abs(leaf).max() > 1e-6, path


def test_remat_changes_neither_parameters_nor_gradient():
    x, c = batch((2, 4, 4, 1))
    network = UNet(**TINIEST)
    params = random_params(network, x, c)

    def gradient(network):
        def loss(params, x, c):
            return jnp.mean(network.apply({"params": params}, x, c) ** 2)

        return jit(jax.grad(loss))(params, x, c)

    plain, saved = gradient(network), gradient(network.clone(remat=True))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(saved), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)


def test_vmap_over_examples_equals_the_batch():
    x, c = batch((3, 4, 4, 1))
    labels = jnp.array([0, 1, 2])
    for network in (MLP(width=16, num_classes=2), UNet(**TINIEST, num_classes=2)):
        params = random_params(network, x, c)

        def single(params, x, c, label):
            return network.apply({"params": params}, x[None], c[None], label[None])[0]

        together = jit(network.apply)({"params": params}, x, c, labels)
        one_by_one = jit(jax.vmap(single, (None, 0, 0, 0)))(params, x, c, labels)
        np.testing.assert_allclose(together, one_by_one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("network", [MLP(width=16, num_classes=3), UNet(**TINIEST, num_classes=3)])
def test_labels(network):
    x, c = batch((2, 4, 4, 1))
    params = random_params(network, x, c)
    apply = jit(network.apply)
    first, second, none = (np.asarray(apply({"params": params}, x, c, jnp.full(2, k))) for k in (0, 1, 3))
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(first - none).max() > 1e-3
    np.testing.assert_allclose(apply({"params": params}, x, c), none, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="num_classes is None"):
        shape_of_gradient(network.clone(num_classes=None), x.shape, jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"labels of shape \(3,\)"):
        shape_of_gradient(network, x.shape, jnp.zeros(3, int))


@pytest.mark.parametrize("network", [MLP(width=16, dropout=0.5), UNet(**TINIEST, dropout=0.5)])
def test_dropout_acts_in_training_alone(network):
    x, c = batch((2, 4, 4, 1))
    params = random_params(network, x, c)

    @jit
    def dropped(params, key):
        return network.apply({"params": params}, x, c, dropout_keys=jax.random.split(key, len(x)))

    outputs = [np.asarray(dropped(params, jax.random.key(k))) for k in (0, 0, 1)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-3
    kept = jit(network.apply)({"params": params}, x, c)
    without = jit(network.clone(dropout=0.0).apply)({"params": params}, x, c)
    np.testing.assert_array_equal(kept, without)


def test_fir_resampling_against_scipy():
    x = np.random.default_rng(0).normal(size=(2, 6, 4, 3)).astype("float32")
    kernel = np.array([1, 3, 3, 1]) / 8

    def convolved(up, gain):
        full = x
        for axis in (1, 2):
            full = scipy.signal.upfirdn(gain * kernel, full, up=up, axis=axis)
        return full

    full = convolved(1, 1)
    np.testing.assert_allclose(fir_down(jnp.asarray(x)), full[:, 2:-1:2, 2:-1:2], atol=1e-6)
    np.testing.assert_allclose(fir_blur(jnp.asarray(x)), full[:, 1:-1, 1:-1], atol=1e-6)
    np.testing.assert_allclose(fir_up(jnp.asarray(x)), convolved(2, 2)[:, 1:-1, 1:-1], atol=1e-6)


def test_fir_keeps_a_constant_away_from_the_border():
    ones = jnp.ones((1, 8, 8, 1))
    np.testing.assert_allclose(fir_down(ones)[:, 1:-1, 1:-1], 1, rtol=1e-6)
    np.testing.assert_allclose(fir_up(ones)[:, 1:-1, 1:-1], 1, rtol=1e-6)


def test_self_attention_commutes_with_a_permutation_of_the_pixels():
    x = batch((2, 3, 4, 8))[0]
    network = SelfAttention()
    shapes = jax.eval_shape(network.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), shapes)
    apply = jit(network.apply)
    order = np.random.default_rng(0).permutation(12)

    def permuted(x):
        return x.reshape(2, 12, 8)[:, order].reshape(x.shape)

    out = apply(params, x)
    assert float(jnp.abs(out - x * 2**-0.5).max()) > 0.1
    np.testing.assert_allclose(apply(params, permuted(x)), permuted(out), atol=1e-4)


def test_group_counts():
    groups = {c: norm(c, None, "float32").num_groups for c in (128, 256, 384, 64, 32, 30, 7, 1)}
    assert groups == {128: 32, 256: 32, 384: 32, 64: 16, 32: 8, 30: 6, 7: 1, 1: 1}


def test_noise_features_tell_times_apart():
    t = jnp.linspace(0, 1, 1001)
    for features in (sinusoidal_features(t, 32, 1000.0), fourier_features(t, 32, 16.0)):
        steps = np.linalg.norm(np.diff(np.asarray(features), axis=0), axis=1)
        assert steps.min() > 0.1
    odd = sinusoidal_features(t, 5, 1000.0)
    assert odd.shape == (1001, 5)
    np.testing.assert_allclose(odd[0], [0, 0, 1, 1, 0])


def test_mlp_learns_the_noise_of_two_points():
    # x0 = +-(1, -1) gives E[x0 | x] = mode * tanh(alpha <mode, x> / sigma^2) in closed form.
    mode = jnp.array([1.0, -1.0])
    network = MLP(width=64, depth=2)
    optimizer = optax.adam(3e-3)

    def draw(key, n):
        keys = jax.random.split(key, 3)
        t = jax.random.uniform(keys[0], (n,))
        alpha, sigma = jnp.cos(t * jnp.pi / 2)[:, None], jnp.sin(t * jnp.pi / 2)[:, None]
        x0 = jax.random.rademacher(keys[1], (n, 1)) * mode[None, :]
        eps = jax.random.normal(keys[2], (n, 2))
        return t, alpha, sigma, eps, alpha * x0 + sigma * eps

    @jax.jit
    def train(params, key):
        def step(carry, key):
            def loss(params):
                t, _, _, eps, x = draw(key, 256)
                return jnp.mean((network.apply({"params": params}, x, t) - eps) ** 2)

            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        carry = params, optimizer.init(params)
        return jax.lax.scan(step, carry, jax.random.split(key, 500))[0][0]

    params = jit(network.init)(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1))["params"]
    params = train(params, jax.random.key(1))
    t, alpha, sigma, _, x = draw(jax.random.key(2), 20_000)
    x0 = mode[None, :] * jnp.tanh(alpha * (x @ mode)[:, None] / sigma**2)
    exact = (x - alpha * x0) / sigma
    error = jnp.mean((jit(network.apply)({"params": params}, x, t) - exact) ** 2)
    assert float(error) < 0.03


def test_build():
    network = build("unet", channels=16, multipliers=[1, 2], attention=[4])
    assert network == UNet(channels=16, multipliers=(1, 2), attention=(4,))
    assert hash(network) == hash(UNet(channels=16, multipliers=(1, 2), attention=(4,)))
    assert {type(build(name)) for name in MODELS} == {MLP, UNet}
    with pytest.raises(ValueError, match="unknown model 'resnet'; choose one of mlp, unet"):
        build("resnet")
    with pytest.raises(ValueError, match="unknown option 'chanels' of model 'unet'.*channels"):
        build("unet", chanels=3)


@pytest.mark.parametrize("field", ["resampling", "embedding", "progressive_input"])
def test_unknown_names_are_refused_at_construction(field):
    with pytest.raises(ValueError, match=f"unknown {field} 'cubic'; choose one of .*, "):
        UNet(**{field: "cubic"})


@pytest.mark.parametrize(
    "shape, c_shape, message",
    [
        ((2, 28, 28, 1), (2,), "28 x 28.*divisible by 8"),
        ((2, 8, 12, 1), (2,), "8 x 12.*divisible by 8"),
        ((2, 8, 8), (2,), r"expected \(batch, height, width, channels\)"),
        ((2, 8, 8, 1), (), r"noise labels c of shape \(\).*expected one label an example, \(2,\)"),
        ((2, 8, 8, 1), (3,), r"c of shape \(3,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_while_tracing(shape, c_shape, message):
    network = UNet(channels=8, multipliers=(1, 1, 1, 1))
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(c_shape))
    assert "\n" not in str(error.value)


def test_a_network_of_ones_own_needs_the_call_alone(monkeypatch):
    class Mine(nn.Module):
        width: int = 8

        @nn.compact
        def __call__(self, x, c, labels=None, dropout_keys=None):
            return nn.Dense(x.shape[-1])(nn.silu(nn.Dense(self.width)(jnp.concatenate([x, c[:, None]], axis=1))))

    monkeypatch.setitem(MODELS, "mine", Mine)
    network, x = build("mine", width=4), jnp.ones((3, 2))
    params = network.init(jax.random.key(0), x, jnp.ones(3))["params"]
    assert network.apply({"params": params}, x, jnp.ones(3)).shape == (3, 2)
    assert params["Dense_0"]["kernel"].shape == (4, 2)
    with pytest.raises(ValueError, match="unknown option 'dropout' of model 'mine': the known ones are width"):
        build("mine", dropout=0.1)
