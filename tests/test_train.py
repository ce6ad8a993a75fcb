import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sde_diffusion as sd
from sde_diffusion import config as configs
from sde_diffusion import data, evaluate, sharding, train
from sde_diffusion.checkpoint import Checkpoints
from sde_diffusion.config import experiment


def tiny(**changes):
    """A digits run of seconds: the MLP compiles fast, and all devices share a batch of 16."""
    sections = dict(
        model=dict(name="mlp", width=16, depth=1),
        optim=dict(lr=1e-3, warmup_steps=5),
        train=dict(batch_size=16, num_steps=8, log_every=2, sample_every=4, checkpoint_every=4),
        sample=dict(num=8, batch_size=8, num_steps=2),
        eval=dict(batch_size=16, num_examples=12, rtol=1e-1, atol=1e-1),
    )
    for section, values in changes.items():
        sections[section] = {**sections.get(section, {}), **values}
    return experiment(**sections)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def run_updates(config, dataset, devices, steps):
    mesh = sharding.make_mesh(devices)
    scaler = data.Scaler(dataset.num_levels)
    whole, split = sharding.replicated(mesh), sharding.by_batch(mesh)
    state = jax.jit(lambda: train.init_state(config, dataset.event_shape), out_shardings=whole)()
    update = jax.jit(train.make_update(config, scaler), in_shardings=(whole, whole, split), out_shardings=whole)
    totals = jax.device_put(train.zero_totals(), whole)
    batches = data.batches(dataset, config.train.batch_size, config.seed)
    for step in range(steps):
        state, totals = update(state, totals, sharding.put_batch(mesh, batches[step]))
    return state, totals


def leaves_equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_the_loss_falls_and_the_average_follows(digits):
    config = tiny(optim=dict(lr=3e-3, ema_decay=0.9), model=dict(width=64, depth=2))
    update = jax.jit(train.make_update(config, data.Scaler(17)))
    state, batches = train.init_state(config, digits.event_shape), data.batches(digits, 16, 0)
    losses = []
    for step in range(200):
        state, totals = update(state, jax.device_put(train.zero_totals()), batches[step])
        losses.append(float(totals.loss))
    # At eps_hat = 0 the ELBO's diffusion term is the number of dimensions over two times the span of the log-SNR.
    sde = configs.build_sde(config)
    start = 0.5 * 64 * float(sde.log_snr(sde.t_train) - sde.log_snr(sde.t_max))
    assert losses[0] == pytest.approx(start, rel=0.1)
    assert np.mean(losses[-20:]) < 0.85 * np.mean(losses[:5])
    gap = jax.tree.map(lambda e, p: float(jnp.abs(e - p).max()), state.ema, state.params)
    assert 0 < max(jax.tree.leaves(gap)) < 0.5


def test_totals_cover_every_step_and_noise_level(digits):
    config = tiny()
    _, totals = run_updates(config, digits, jax.devices()[:1], 6)
    assert int(totals.updates) == 6 and int(totals.skipped) == 0
    assert int(totals.level_count.sum()) == 6 * 16
    # Stratified times, uniform in the log-SNR: 16 times in 8 equal parts are 2 in each, every step.
    np.testing.assert_allclose(totals.level_count, 12, atol=1)
    assert float(totals.level_loss.sum()) / 16 == pytest.approx(float(totals.loss), rel=1e-4)
    row = train.summarize(config, jax.device_get(totals))
    assert row["loss"] == pytest.approx(float(totals.loss) / 6)
    assert sum(name.startswith("loss_by_log_snr") for name in row) == 8


def test_a_non_finite_loss_is_skipped_and_counted(digits):
    config = tiny(data=dict(name="gaussian_mixture_2d"))
    update = jax.jit(train.make_update(config, data.Scaler(None)))
    state, totals = train.init_state(config, (2,)), jax.device_put(train.zero_totals())
    state, totals = update(state, totals, {"x": np.ones((16, 2), np.float32)})
    bad = np.ones((16, 2), np.float32)
    bad[3, 1] = np.nan
    after, totals = update(state, totals, {"x": bad})
    assert leaves_equal(after.params, state.params) and leaves_equal(after.ema, state.ema)
    assert leaves_equal(after.opt_state, state.opt_state)
    assert int(after.bad_steps) == 1 and int(totals.skipped) == 1 and int(after.step) == 2
    assert np.isfinite(jax.device_get(totals.loss))
    good, _ = update(after, totals, {"x": np.ones((16, 2), np.float32)})
    assert int(good.bad_steps) == 0


def test_non_finite_losses_in_a_row_stop_the_run(tmp_path, digits):
    config = tiny(optim=dict(lr=1e38, warmup_steps=0, grad_clip=0.0), train=dict(max_bad_steps=3, num_steps=100))
    with pytest.raises(FloatingPointError, match="not finite in .* updates in a row.*optim.lr"):
        train.train(config, tmp_path, digits)


def test_stopping_and_starting_again_continues_bit_for_bit(tmp_path, digits):
    through = train.train(tiny(), tmp_path / "through", digits)
    train.train(tiny(train=dict(num_steps=4)), tmp_path / "halves", digits)
    halves = train.train(tiny(), tmp_path / "halves", digits)
    assert leaves_equal(through, halves)
    steps = [json.loads(line)["step"] for line in (tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8]
    with Checkpoints(tmp_path / "halves", read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 8


def test_evaluation_covers_exactly_the_examples(tmp_path, digits):
    """The same figure whatever the batch size: padding does not count, no example is dropped."""
    config = tiny(eval=dict(trace="exact", rtol=1e-4, atol=1e-4))
    # Vectors are not dequantized, so that nothing random is left.
    points = np.asarray(jax.random.normal(jax.random.key(0), (13, 2)))
    mesh, params = sharding.make_mesh(jax.devices()[:1]), train.init_state(config, (2,)).params
    figures = []
    for batch_size in (4, 13, 64):
        config.eval.batch_size = batch_size
        figures.append(evaluate.bits_per_dim(config, params, mesh, data.Scaler(None), points))
    assert [f["num"] for f in figures] == [13] * 3
    for figure in figures:
        # At eps_hat = 0 the flow only scales: x_T = x alpha_T / alpha_t, so the density is Gaussian, in closed form.
        sde = configs.build_sde(config)
        scale = float(sde.alpha(sde.t_max) / sde.alpha(sde.t_min))
        log_prob = -0.5 * (scale * points) ** 2 - 0.5 * np.log(2 * np.pi) + np.log(scale)
        assert figure["bits_per_dim"] == pytest.approx(-log_prob.mean() / np.log(2), rel=2e-3)


def vdm(**changes):
    usual = {
        "sde": dict(name="monotone_log_snr", log_snr_max=8.0, log_snr_min=-6.0),
        "eval": dict(num_examples=12, batch_size=5, ode=False, bound_draws=4),
    }
    return tiny(
        loss=dict(name="bound", learn_schedule=True),
        prediction=dict(noise_label="log_snr"), **{**usual, **changes},
    )  # fmt: skip


def test_figures_do_not_depend_on_batches_and_devices(digits):
    """Each example has its own key, for the dequantization, the probes and the draws of the bound."""
    config = vdm()
    config.eval.update(ode=True, rtol=1e-4, atol=1e-4)
    scaler, params = data.Scaler(17), train.init_state(config, digits.event_shape).ema
    figures = []
    for devices, batch_size in ((1, 5), (8, 8)):
        config.eval.batch_size = batch_size
        mesh = sharding.make_mesh(jax.devices()[:devices])
        figures.append([f(config, params, mesh, scaler, digits.test[:11]) for f in (evaluate.bits_per_dim, evaluate.bound_bits_per_dim)])
    for ode, bound in figures[1:]:
        assert ode["bits_per_dim"] == pytest.approx(figures[0][0]["bits_per_dim"], rel=1e-4)
        assert bound == pytest.approx(figures[0][1], rel=1e-5)


def test_a_stopped_evaluation_goes_on(tmp_path, digits):
    """What is in the file is not computed again, a batch that was cut short is, and a damaged file begins anew."""
    config = vdm()
    scaler, params, mesh = data.Scaler(17), train.init_state(config, digits.event_shape).ema, sharding.make_mesh(jax.devices()[:1])
    file = tmp_path / "partial.npz"
    bound = lambda: evaluate.bound_bits_per_dim(config, params, mesh, scaler, digits.test[:12], file)  # noqa: E731
    whole = bound()
    values = np.load(file)["values"]
    assert values.shape == (12, 3)
    marked = values.copy()
    marked[:5] = 0.0
    np.savez(file, values=marked[:7])
    assert bound()["bits_per_dim"] == pytest.approx(whole["bits_per_dim"] - values[:5].sum() / 12 / 64 / np.log(2), rel=1e-5)
    file.write_bytes(b"half a file")
    assert bound() == pytest.approx(whole, rel=1e-6)


def test_a_learned_schedule_trains_and_resumes(tmp_path, digits):
    """Its parameters move, the bound falls, and a checkpoint holds them; figures are of the averaged schedule."""
    config = vdm(
        model=dict(width=64), optim=dict(lr=1e-2, warmup_steps=0),
        train=dict(num_steps=80, log_every=20, checkpoint_every=40, sample_every=80),
    )  # fmt: skip
    state = train.train(config, tmp_path / "through", digits)
    start = configs.learned_leaves(configs.build_sde(config))
    assert all(float(jnp.abs(a - b).max()) > 1e-3 for a, b in zip(jax.tree.leaves(state.params.schedule), jax.tree.leaves(start)))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "through" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]
    part = config.copy_and_resolve_references()
    part.train.num_steps = 40
    train.train(part, tmp_path / "halves", digits)
    assert leaves_equal(state, train.train(config, tmp_path / "halves", digits))
    evaluate.evaluate(config, tmp_path / "through", state.ema, 80, digits, sharding.make_mesh(), data.Scaler(17))
    figures = json.loads((tmp_path / "through" / "eval_00000080.json").read_text())["bound"]
    assert figures["bits_per_dim"] == pytest.approx(sum(figures[t] for t in ("prior", "diffusion", "reconstruction")))
    assert not list((tmp_path / "through").glob("*.partial.npz"))


@pytest.mark.parametrize("name", ["ve", "cosine"])
def test_the_bound_trains_on_any_process(name, digits):
    """Without a learned schedule the loss is `variational_bound` of the process itself, variance preserving or not."""
    config = tiny(sde=dict(name=name), loss=dict(name="bound"), eval=dict(ode=False, bound_draws=2))
    scaler = data.Scaler(17)
    params = train.init_state(config, digits.event_shape).params
    x0, key = scaler.encode(digits.train[:16]), jax.random.key(1)
    losses, t, grads = train.make_gradients(config, scaler)(params, (), key, x0, None, None)
    bound = sd.variational_bound(configs.build_score(config, params), configs.build_sde(config), key, x0, values=scaler.values())
    np.testing.assert_allclose(losses, bound.total, rtol=1e-5)
    assert t.shape == (16,) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_a_schedule_that_cannot_tell_levels_apart_is_refused(digits):
    with pytest.raises(ValueError, match="is 2,.*raise log_snr_max"):
        train.prepare(vdm(sde=dict(name="linear_log_snr", log_snr_max=2.0)), digits)


def test_labels_reach_the_network(digits):
    config = tiny(model=dict(num_classes=10))
    state, _ = run_updates(config, digits, jax.devices()[:1], 3)
    x, t = jnp.ones((10, 8, 8, 1)), jnp.full(10, 0.5)
    scores = configs.build_score(config, state.params, jnp.arange(10))(x, t)
    assert float(jnp.std(scores, axis=0).max()) > 0
    draws = evaluate.make_sampler(config, sharding.make_mesh(jax.devices()[:1]), (8, 8, 1))(state.ema, 10, 0)
    assert draws.shape == (10, 8, 8, 1)


def test_batches_that_do_not_divide_over_devices_are_refused(digits):
    with pytest.raises(ValueError, match="train.batch_size=12 does not divide over 8 devices"):
        train.prepare(tiny(train=dict(batch_size=12)), digits)


def test_images_that_do_not_fit_the_network_are_refused(digits):
    config = experiment(model=dict(name="unet", channels=8, multipliers=(1, 1, 1, 1, 1)))
    with pytest.raises(ValueError, match="8.*16"):
        train.prepare(config, digits)


def test_the_average_moves_where_parameters_are_narrow(digits):
    """0.9999 is 1 in bfloat16: the average is float32, and closes 1 - 0.9999^200 of a gap in 200 updates."""
    config = tiny(model=dict(param_dtype="bfloat16"), optim=dict(lr=1e-12, warmup_steps=0, ema_decay=0.9999))
    update = jax.jit(train.make_update(config, data.Scaler(17)))
    state, batches = train.init_state(config, digits.event_shape), data.batches(digits, 16, 0)
    # Far from the start, where the average's own warm-up is over; the parameters stand still.
    state = state._replace(step=jnp.asarray(10**6), ema=jax.tree.map(lambda p: p.astype(jnp.float32) + 1.0, state.params))
    for step in range(200):
        state, _ = update(state, jax.device_put(train.zero_totals()), batches[step])
    gaps = [np.asarray(e - p.astype(jnp.float32)) for e, p in zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.params))]
    assert all(e.dtype == jnp.float32 for e in jax.tree.leaves(state.ema))
    np.testing.assert_allclose(np.concatenate([g.ravel() for g in gaps]), 0.9999**200, rtol=2e-3)


def test_any_sampling_batch_fits_any_number_of_devices(digits):
    """Rounded up to the devices, and cut to what was asked for; the refusal is for the training batch."""
    config = tiny(sample=dict(batch_size=5), eval=dict(batch_size=7))
    mesh, scaler, _ = train.prepare(config, digits)
    assert mesh.devices.size == 8
    state = train.init_state(config, digits.event_shape)
    assert evaluate.make_sampler(config, mesh, digits.event_shape)(state.ema, 11, 0).shape == (11, 8, 8, 1)
    assert evaluate.bits_per_dim(config, state.ema, mesh, scaler, digits.test[:3])["num"] == 3
    with pytest.raises(ValueError, match="train.batch_size=12 does not divide over 8 devices"):
        train.prepare(tiny(train=dict(batch_size=12)), digits)


def test_a_conditional_run_samples_without_labels(digits):
    config = tiny(model=dict(num_classes=10))
    params = train.init_state(config, digits.event_shape).ema
    x = sd.sample_ode(configs.build_score(config, params), configs.build_sde(config), jax.random.key(0), (3, 8, 8, 1), num_steps=2)
    assert x.shape == (3, 8, 8, 1) and np.isfinite(x).all()


def test_adaptive_times_are_learned_saved_and_resumed(tmp_path, digits):
    """They are part of the state: a run in two halves ends where one in one piece does, bit for bit."""
    config = tiny(loss=dict(times="adaptive"))
    through = train.train(config, tmp_path / "through", digits)
    train.train(tiny(loss=dict(times="adaptive"), train=dict(num_steps=4)), tmp_path / "halves", digits)
    halves = train.train(config, tmp_path / "halves", digits)
    assert leaves_equal(through, halves)
    # 8 batches of 16, the older ones discounted.
    assert float(halves.times.counts.sum()) == pytest.approx(16 * sum(0.99**i for i in range(8)), rel=1e-5)
    assert float(halves.times.shares().std()) > 0


def test_without_adaptive_times_the_state_is_what_it_was(tmp_path, digits):
    """No array more: a checkpoint of a state that knew nothing of them is restored."""
    state = train.init_state(tiny(), digits.event_shape)
    assert state.times == () and jax.tree.leaves(state) == jax.tree.leaves(tuple(state)[:5])

    class Before(train.NamedTuple):
        step: object
        params: object
        ema: object
        opt_state: object
        bad_steps: object

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, Before(*tuple(state)[:5]))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert leaves_equal(checkpoints.restore(state)[1], state)
