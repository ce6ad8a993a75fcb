"""The same numbers however arrays lie on the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sde_diffusion import config as configs
from sde_diffusion import data, evaluate, sharding, train
from sde_diffusion.config import experiment

BATCH = 16
SCALER = data.Scaler(17)


def tiny(**options):
    """With dropout, whose noise must not depend on devices either."""
    return experiment(
        model=dict(name="mlp", width=16, depth=1, dropout=0.2),
        optim=dict(lr=1e-3, warmup_steps=5),
        train=dict(batch_size=BATCH, num_steps=20, **options),
        sample=dict(num=8, batch_size=8, num_steps=2),
        eval=dict(batch_size=8, num_examples=8, ode=False, bound_draws=2),
    )


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def trained(config, digits, devices, steps=20):
    """The state after some steps on a mesh of the devices, and the compiled step."""
    mesh = sharding.make_mesh(devices, config.train.param_shards)
    init = lambda: train.init_state(config, digits.event_shape)  # noqa: E731
    layout = sharding.layout(mesh, jax.eval_shape(init))
    whole, split = sharding.replicated(mesh), sharding.by_batch(mesh)
    state, totals = jax.jit(init, out_shardings=layout)(), jax.device_put(train.zero_totals(), whole)
    update = jax.jit(
        train.make_update(config, SCALER, sharding.fully_sharded(mesh)),
        in_shardings=(layout, whole, split), out_shardings=(layout, whole),
    )  # fmt: skip
    batches = data.batches(digits, BATCH, 0)
    compiled = update.lower(state, totals, sharding.put_batch(mesh, batches[0])).compile()
    for step in range(steps):
        state, totals = compiled(state, totals, sharding.put_batch(mesh, batches[step]))
    return mesh, state, totals, compiled


def close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def one(digits):
    return trained(tiny(), digits, jax.devices()[:1])


@pytest.mark.parametrize("count, shards", [(2, 1), (4, 1), (8, 1), (8, 8), (8, 4)])
def test_training_agrees_with_one_device(one, digits, count, shards):
    """Losses, parameters, samples and bits/dim, data-parallel and fully sharded."""
    config = tiny(param_shards=shards)
    mesh, state, totals, _ = trained(config, digits, jax.devices()[:count])
    np.testing.assert_allclose(totals.loss, one[2].loss, rtol=1e-5)
    np.testing.assert_allclose(totals.grad_norm, one[2].grad_norm, rtol=1e-5)
    close(state.params, one[1].params, 1e-5)
    draw = lambda config, mesh, state: evaluate.make_sampler(config, mesh, digits.event_shape)(state.ema, 8, 0)  # noqa: E731
    np.testing.assert_allclose(draw(config, mesh, state), draw(tiny(), one[0], one[1]), atol=1e-4)
    bits = [evaluate.bound_bits_per_dim(config, s.ema, m, SCALER, digits.test[:8])["bits_per_dim"] for m, s in ((mesh, state), one[:2])]
    np.testing.assert_allclose(*bits, rtol=1e-5)


def test_pmap_trains_to_the_same_parameters(one, digits):
    update = jax.pmap(train.make_update(tiny(), SCALER, sharding.over_axis("devices")), axis_name="devices", in_axes=(0, 0, None))
    copies = lambda tree: jax.tree.map(lambda a: jnp.broadcast_to(a, (8, *a.shape)), tree)  # noqa: E731
    state, totals = copies(train.init_state(tiny(), digits.event_shape)), copies(train.zero_totals())
    batches = data.batches(digits, BATCH, 0)
    for step in range(20):
        state, totals = update(state, totals, batches[step])
    close(jax.tree.map(lambda a: a[3], state.params), one[1].params, 1e-5)
    np.testing.assert_allclose(totals.grad_norm[0], one[2].grad_norm, rtol=1e-5)


def test_a_batch_in_parts_is_the_mean_over_them(digits):
    """Each part has its key: the gradient is that of the parts on their own, and devices change nothing."""
    config = tiny(accumulate=2)
    params = train.init_state(config, digits.event_shape).params
    x0, key = SCALER.encode(digits.train[:BATCH]), jax.random.key(0)
    keys = jax.random.split(jax.random.key(1), BATCH)
    losses, t, gradient = jax.jit(train.make_gradients(config, SCALER))(params, (), key, x0, None, keys)
    whole = jax.jit(train.make_gradients(tiny(), SCALER))
    parts = [whole(params, (), jax.random.fold_in(key, i), x0[i::2], None, keys[i::2]) for i in range(2)]
    close(gradient, jax.tree.map(lambda a, b: (a + b) / 2, parts[0][2], parts[1][2]), 1e-4)
    for i in range(2):
        np.testing.assert_allclose(losses[i::2], parts[i][0], rtol=1e-5)
        np.testing.assert_allclose(t[i::2], parts[i][1], rtol=1e-6)
    a, b = trained(config, digits, jax.devices()[:1], 3), trained(config, digits, jax.devices(), 3)
    close(a[1].params, b[1].params, 1e-5)


def test_what_crosses_devices(one, digits):
    """Data-parallel: all-reduces of the gradient. Fully sharded: gathers and scatters, and no whole parameter comes in or goes out."""
    assert sharding.collectives(one[3]) == {}
    size = sum(a.nbytes for a in jax.tree.leaves(one[1].params))
    _, _, _, compiled = trained(tiny(), digits, jax.devices(), 0)
    sent = sharding.collectives(compiled)
    assert set(sent) == {"all-reduce"} and size <= sent["all-reduce"][1] < 1.05 * size
    _, state, _, compiled = trained(tiny(param_shards=8), digits, jax.devices(), 0)
    sent = sharding.collectives(compiled)
    assert set(sent) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert sent["all-gather"][1] >= size and sent["reduce-scatter"][1] == pytest.approx(size / 8, rel=0.01)
    assert sent["all-reduce"][1] < 0.1 * size  # the metrics and the gradient's norm
    leaves = jax.tree.leaves(state)
    assert sum(a.addressable_shards[0].data.nbytes for a in leaves) == pytest.approx(sum(a.nbytes for a in leaves) / 8, rel=0.1)


def test_collectives_are_counted_from_a_known_program():
    mesh = sharding.make_mesh()

    def total(x):
        return jax.lax.with_sharding_constraint(x.sum(axis=0), sharding.replicated(mesh))

    x = jax.device_put(jnp.ones((16, 6), jnp.bfloat16), sharding.by_batch(mesh))
    sent = sharding.collectives(jax.jit(total).lower(x).compile())
    assert set(sent) == {"all-reduce"} and sent["all-reduce"][0] == 1
    assert sent["all-reduce"][1] in (12, 24)  # 6 numbers, which a CPU sums in float32


def test_rules_choose_the_axis():
    mesh = sharding.make_mesh(shards=4)
    tree = {"conv": {"kernel": jnp.zeros((3, 3, 8, 16)), "bias": jnp.zeros(3)}, "step": jnp.zeros(())}
    spec = lambda rules: jax.tree.map(lambda s: tuple(s.spec), sharding.layout(mesh, tree, rules))  # noqa: E731
    assert spec(sharding.RULES) == {"conv": {"kernel": (None, None, None, "shard"), "bias": ()}, "step": ()}
    assert spec([("kernel", 2), ("", None)])["conv"] == {"kernel": (None, None, "shard"), "bias": ()}
    assert spec([("kernel", 0)])["conv"]["kernel"] == ()  # 3 does not divide
    with pytest.raises(ValueError, match="train.param_shards=3 does not divide 8 devices"):
        sharding.make_mesh(shards=3)


@pytest.mark.parametrize("rules", [sharding.RULES, (("kernel", 0), ("", None)), (("bias", None), ("", "longest"))])
def test_a_network_split_by_any_rules_has_the_same_output_and_gradient(rules):
    mesh = sharding.make_mesh(shards=4)
    keys = jax.random.split(jax.random.key(0), 3)
    variables = {"kernel": jax.random.normal(keys[0], (8, 16)), "bias": jax.random.normal(keys[1], (16,))}
    x = jax.random.normal(keys[2], (16, 8))

    def apply(variables, x, c, labels, dropout_keys):
        return jnp.tanh(x @ variables["kernel"] + variables["bias"][None])

    def loss(apply):
        return jax.jit(jax.value_and_grad(lambda v, x: (apply(v, x, None, None, None) ** 2).mean()))

    split = jax.tree.map(jax.device_put, variables, sharding.layout(mesh, variables, rules))
    expected = loss(apply)(variables, x)
    found = loss(sharding.fully_sharded(mesh, rules)(apply))(split, jax.device_put(x, sharding.by_batch(mesh)))
    close(expected, found, 1e-6)


def test_a_batch_that_does_not_divide_in_parts_is_refused(digits):
    with pytest.raises(ValueError, match="train.batch_size=16 does not divide over 8 devices in 4 parts; use a multiple of 32"):
        train.prepare(tiny(accumulate=4), digits)


def test_a_conditional_learned_and_sharded_run(digits):
    """Labels, a learned schedule and split parameters together, against one device."""

    def config(shards):
        return experiment(
            sde=dict(name="linear_log_snr"), model=dict(name="mlp", width=16, depth=1, num_classes=10),
            prediction=dict(kind="edm", noise_label="log_snr"), loss=dict(name="bound", learn_schedule=True),
            train=dict(batch_size=BATCH, param_shards=shards),
        )  # fmt: skip

    a, b = trained(config(1), digits, jax.devices()[:1], 3), trained(config(8), digits, jax.devices(), 3)
    np.testing.assert_allclose(a[2].loss, b[2].loss, rtol=1e-5)
    close(a[1].params, b[1].params, 1e-5)
    assert configs.build_score(config(1), b[1].params)(jnp.ones((2, 8, 8, 1)), jnp.full(2, 0.5)).shape == (2, 8, 8, 1)


def test_a_learned_schedule_under_pmap(digits):
    """Its gradient goes through the network's input as well."""
    config = experiment(
        sde=dict(name="linear_log_snr"), model=dict(name="mlp", width=16, depth=1),
        prediction=dict(kind="edm", noise_label="log_snr"), loss=dict(name="bound", learn_schedule=True),
        train=dict(batch_size=BATCH),
    )  # fmt: skip
    _, state, totals, _ = trained(config, digits, jax.devices()[:1], 2)
    update = jax.pmap(train.make_update(config, SCALER, sharding.over_axis("i")), axis_name="i", in_axes=(0, 0, None))
    copies = lambda tree: jax.tree.map(lambda a: jnp.broadcast_to(a, (8, *a.shape)), tree)  # noqa: E731
    many, sums = copies(train.init_state(config, digits.event_shape)), copies(train.zero_totals())
    for step in range(2):
        many, sums = update(many, sums, data.batches(digits, BATCH, 0)[step])
    np.testing.assert_allclose(sums.grad_norm, totals.grad_norm, rtol=1e-5)
    for device in range(8):
        close(jax.tree.map(lambda a: a[device], many.params), state.params, 1e-5)  # noqa: B023


def test_samples_do_not_depend_on_devices_that_do_not_divide_the_batch():
    config = experiment(
        data=dict(name="gaussian_mixture_2d"), model=dict(name="mlp", width=8, depth=1), sample=dict(num=25, batch_size=10, num_steps=3)
    )
    found = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = sharding.make_mesh(devices)
        params = train.prepare(config, data.load("gaussian_mixture_2d"), mesh)[-1]
        params = jax.tree.map(lambda a: 0.03 * jnp.ones(a.shape, a.dtype), params.ema)
        found.append(evaluate.make_sampler(config, mesh, (2,))(params, 25, 3))
    assert found[0].shape == (25, 2)
    np.testing.assert_allclose(*found, atol=1e-5)
