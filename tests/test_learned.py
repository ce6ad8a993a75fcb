"""Fitted solvers."""

import dataclasses
import functools
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from oracle import SDES, ZERO_SNR, eps_network, mixture

import sde_diffusion as sd
from sde_diffusion.prediction import as_pytree
from sde_diffusion.samplers import learned, linear, ode
from sde_diffusion.samplers.grid import time_grid
from sde_diffusion.samplers.linear import Steps


@pytest.fixture(scope="module")
def fitted():
    sde, oracle = sd.VE(), mixture()
    solver = sd.fit_solver(oracle.score_fn(sde), sde, jax.random.key(0), (64, 2), nfe=5, num_states=1024, max_updates=12, progress=False)
    return sde, oracle, solver


def test_a_fitted_solver_beats_the_default_on_new_states(fitted):
    sde, oracle, solver = fitted
    init = sde.prior_sample(jax.random.key(99), (2000, 2))
    sample = lambda **o: np.asarray(sd.sample_ode(oracle.score_fn(sde), sde, jax.random.key(0), init.shape, init=init, denoise=False, **o))  # noqa: E731
    exact = np.asarray(
        sd.sample_adaptive(
            oracle.score_fn(sde), sde, jax.random.key(0), init.shape, init=init, method="dopri8", rtol=1e-6, atol=1e-6, denoise=False
        ).samples
    )
    mine, default = (np.sqrt(((sample(**o) - exact) ** 2).mean()) for o in ({"method": solver}, {"num_steps": 5}))
    assert mine < 0.7 * default
    facts = json.loads(solver.facts)
    # 256 held-out states: their error is that of 2000 others, within the spread of a few far ones.
    assert 0.4 < facts["held_out_rmse"] / mine < 2.5
    assert 0 < facts["held_out_stderr"] < 0.5 * facts["held_out_rmse"]
    assert abs(facts["held_out_rmse_of_the_default"] - default) < 4 * facts["held_out_stderr_of_the_default"]


def test_a_fitted_solver_spends_what_it_says(fitted):
    sde, _, solver = fitted
    calls = []

    def score_fn(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return -x

    for denoise in (False, True):
        calls.clear()
        jax.block_until_ready(sd.sample_ode(score_fn, sde, jax.random.key(0), (3, 2), method=solver, denoise=denoise))
        jax.effects_barrier()
        assert len(calls) == 5 + denoise


def test_saving_and_refusing(fitted, tmp_path):
    sde, oracle, solver = fitted
    again = sd.LearnedSolver.load(solver.save(tmp_path / "solver.json"))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(solver), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (tmp_path / "solver.json").stat().st_size < 3000
    key = jax.random.key(1)
    draw = lambda s: sd.sample_ode(oracle.score_fn(sde), sde, key, (4, 2), method=s)  # noqa: E731
    np.testing.assert_allclose(draw(again), draw(solver), rtol=1e-5, atol=1e-6)
    # As a constant of a program that is compiled around it too.
    np.testing.assert_allclose(jax.jit(lambda: draw(again))(), draw(solver), rtol=1e-5, atol=1e-6)
    assert json.loads(again.facts)["nfe"] == 5 and "VE" in json.loads(again.facts)["sde"]
    for other in (sd.VP(), sd.VE(sigma_max=80.0)):
        with pytest.raises(ValueError, match="fitted to VE.*not to .*fit_solver"):
            sd.sample_ode(oracle.score_fn(other), other, key, (4, 2), method=again)
    with pytest.raises(ValueError, match="pass it to sample_ode"):
        sd.sample_sde(oracle.score_fn(sde), sde, key, (4, 2), method=again)
    assert again.nfe == 5
    np.testing.assert_array_equal(sd.sample_ode(oracle.score_fn(sde), sde, key, (4, 2), method=again, num_steps=5), draw(again))
    for options in ({"num_steps": 6}, {"grid": "edm"}, {"t_end": 0.1}):
        with pytest.raises(ValueError, match="own times"):
            sd.sample_ode(oracle.score_fn(sde), sde, key, (4, 2), method=again, **options)
    for content in ("", "{}", "[1]", '{"facts": {}, "times": [1, 0], "time": [1], "process": []}', "\x00\xff"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="bad.json is not a solver"):
            sd.LearnedSolver.load(tmp_path / "bad.json")
    plain = json.loads((tmp_path / "solver.json").read_text())
    # A table without factors of the first evaluation is one too, and one for data about zero.
    (tmp_path / "older.json").write_text(json.dumps({k: v for k, v in plain.items() if k not in ("first", "scale", "centre")}))
    older = sd.LearnedSolver.load(tmp_path / "older.json")
    assert older.table.first is None and np.isfinite(draw(older)).all()
    for key, wrong in (("state", plain["state"][:-1]), ("centre", [0.0])):
        (tmp_path / "bad.json").write_text(json.dumps({**plain, key: wrong}))
        with pytest.raises(ValueError, match="do not fit together"):
            sd.LearnedSolver.load(tmp_path / "bad.json")


def test_a_fitted_solver_predicts_for_a_corrector(fitted):
    """At its own times, whatever `sample_pc` has for others; without a corrector it is `sample_ode`'s, from the same key."""
    sde, oracle, solver = fitted
    arguments = oracle.score_fn(sde), sde, jax.random.key(1), (4, 2)
    np.testing.assert_array_equal(sd.sample_pc(*arguments, predictor=solver, corrector=None), sd.sample_ode(*arguments, method=solver))
    corrected, path = sd.sample_pc(*arguments, predictor=solver, return_path=True)
    assert path.shape == (6, 4, 2) and np.isfinite(corrected).all()
    with pytest.raises(ValueError, match="its own times and 5 evaluations: leave num_steps"):
        sd.sample_pc(*arguments, predictor=solver, num_steps=1000)


def test_a_fitted_solver_refuses_other_events(fitted):
    sde, _, solver = fitted
    with pytest.raises(ValueError, match=r"events of shape \(2,\), not \(3,\): fit_solver"):
        sd.sample_ode(lambda x, t: -x, sde, jax.random.key(0), (4, 3), method=solver)


def test_a_fit_moves_with_the_data():
    """From zero terminal SNR the prior says nothing of the data: a fit to data moved by m is the same fit, and its samples move by m.

    Rounded differently, the two agree within 1e-3; without a centre they are 1e-2 apart.
    """
    by, key, shape = np.array([5.0, -2.0], np.float32), jax.random.key(0), (64, 2)
    ends = []
    for m in (0 * by, by):
        oracle = mixture()
        oracle.means += m[None]
        score_fn = oracle.score_fn(ZERO_SNR)
        solver = sd.fit_solver(score_fn, ZERO_SNR, key, shape, nfe=4, num_states=128, max_updates=3, progress=False)
        ends.append(sd.sample_ode(score_fn, ZERO_SNR, key, shape, method=solver, denoise=False) - m[None])
        end, path = sd.sample_ode(score_fn, ZERO_SNR, key, shape, method=solver, return_path=True, denoise=False)
        np.testing.assert_array_equal(path[-1], end)
        np.testing.assert_allclose(path[0], ZERO_SNR.prior_sample(jax.random.split(key)[0], shape), atol=1e-6)
    assert np.abs(ends[1] - ends[0]).max() < 1e-3


@pytest.mark.parametrize("nfe", [2, 5, 11])
@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(), ZERO_SNR], ids=["vp", "ve", "zero snr"])
@pytest.mark.parametrize("less", [1, 0])
def test_the_start_of_a_fit_is_exact_for_a_gaussian(sde, nfe, less):
    """N(m, s^2 I): x_t - alpha m goes as the standard deviation of the marginal; so too where the first evaluation is away from t_max."""
    mean, s, shape = np.array([3.0, -1.0], np.float32), 0.4, (8, 2)
    oracle = sd.GaussianMixture.gaussian(mean, s**2 * np.eye(2))
    family = learned._Family(sde, nfe, s, 64, time_grid(sde, nfe + less, sigma_data=s))
    table, times = jax.jit(family.build)(family.start())
    assert len(table.time) == nfe and float(times[0]) == sde.t_max and (float(table.time[0]) < 0.999 * sde.t_max) == bool(less)
    x = sde.prior_sample(jax.random.key(0), shape)
    alpha, sigma = (np.asarray(f(times), np.float64)[[0, -1]] for f in (sde.alpha, sde.sigma))
    std = np.hypot(alpha * s, sigma)
    exact = alpha[1] * mean + std[1] / std[0] * (np.asarray(x) - alpha[0] * mean)
    solver = sd.LearnedSolver(table, times, learned._process(sde), json.dumps({"sde": repr(sde)}), jnp.asarray(mean))
    for denoise in (False, True):
        out = sd.sample_ode(oracle.score_fn(sde), sde, jax.random.key(0), shape, method=solver, init=x, denoise=denoise)
        # The posterior mean of N(m, s^2 I) from there.
        wanted = mean + alpha[1] * s**2 / std[1] ** 2 * (exact - alpha[1] * mean) if denoise else exact
        np.testing.assert_allclose(out, wanted, atol=3e-5)


@pytest.mark.parametrize("less", [1, 0])
def test_the_equations_of_a_fit_are_those_of_the_whole_sampler(less):
    """Taken row by row, they are those of the derivative through the scan: the gradient to rounding, the matrix in the mean over its
    random probes. Of 20 x 21 / 2 numbers, 5 standard errors of 100 draws are exceeded once in 10,000 tests."""
    sde, oracle, num, limit = sd.VP(), mixture(), 4, 1e-3
    score_fn, centre = oracle.score_fn(sde), jnp.asarray(oracle.mean(), jnp.float32)
    family = learned._Family(sde, num, 0.5, 64, time_grid(sde, num + less))
    theta, unravel = ravel_pytree(family.start())
    theta = theta + 0.05 * jax.random.normal(jax.random.key(0), theta.shape)
    x = sde.prior_sample(jax.random.key(1), (8, 2))
    target = 0.9 * sd.sample_ode(score_fn, sde, jax.random.key(0), x.shape, init=x, num_steps=50, denoise=False)

    @jax.jit
    def build(theta):
        return family.build(unravel(theta))

    def ends(theta):
        table, times = build(theta)
        return linear.run(table, score_fn, sde, jax.random.key(0), x, times[0], times[-1], centre=centre, denoise=False)

    numbers = jax.jit(jax.jacobian(lambda theta: learned._numbers(build(theta)[0], 1)))(theta)
    draws = [
        learned._normal_equations(*build(theta), numbers, limit, score_fn, sde, centre, x, target, key)
        for key in jax.random.split(jax.random.key(2), 100)
    ]
    gradients, matrices = (np.asarray(a, np.float64) for a in zip(*draws))
    # The gradient of half the sum of pseudo-Huber losses; mean(r^2) = |r|^2 / 2 here.
    loss = lambda theta: (2 * limit * (jnp.sqrt(1 + ((ends(theta) - target) ** 2).mean(axis=1) / limit) - 1)).sum()  # noqa: E731
    np.testing.assert_allclose(gradients[0], jax.jit(jax.grad(loss))(theta), rtol=1e-3, atol=1e-4 * np.abs(gradients[0]).max())
    weight = (1 + ((ends(theta) - target) ** 2).mean(axis=1) / limit) ** -0.5
    jacobian = np.asarray(jax.jit(jax.jacobian(ends))(theta), np.float64)
    exact = np.einsum("b,bdp,bdq->pq", weight, jacobian, jacobian)
    error = matrices.std(axis=0) / np.sqrt(len(matrices))
    assert np.all(np.abs(matrices.mean(axis=0) - exact) < 5 * error + 1e-4 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nfe": 1}, "nfe=1.*at least 2"), ({"nfe": "4"}, "nfe='4'.*an integer"), ({"num_states": 3}, "num_states=3.*4096"), ({"t_end": 2.0}, "t_end=2.0"),
        ({"fine_steps": 8}, "fine_steps=8.*more than nfe=8"), ({"fine_steps": 20.5}, "fine_steps=20.5.*an integer"),
    ],
)  # fmt: skip
def test_a_fit_that_makes_no_sense_is_refused(options, words):
    """Not through what jaxtyping checks under pytest: as users have it."""
    with pytest.raises(ValueError, match=words):
        inspect.unwrap(sd.fit_solver)(lambda x, t: -x, sd.VP(), jax.random.key(0), (4, 2), progress=False, **options)


def test_a_fit_inside_a_transformation_is_refused():
    with pytest.raises(ValueError, match="cannot run inside jax.jit.*call it outside"):
        jax.eval_shape(lambda key: sd.fit_solver(lambda x, t: -x, sd.VP(), key, (4, 2), progress=False).times, jax.random.key(0))


def test_a_fit_to_a_score_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="score_fn gives NaN"):
        sd.fit_solver(lambda x, t: x * jnp.nan, sd.VP(), jax.random.key(0), (16, 2), num_states=32, progress=False)


def test_a_fit_to_a_score_without_finite_derivatives_is_refused():
    @jax.custom_jvp
    def score_fn(x, t):
        return -x

    score_fn.defjvp(lambda primals, tangents: (-primals[0], jnp.nan * tangents[0]))
    with pytest.raises(ValueError, match="derivatives of score_fn are not finite"):
        sd.fit_solver(score_fn, sd.VP(), jax.random.key(0), (16, 2), num_states=32, progress=False)


def test_a_fit_goes_on_with_the_better_of_two_starts(monkeypatch):
    """And returns its last solver, by all held-out states: on the few that the other start has looked at, that one is better."""
    sde, taken, trial = sd.VP(), [], learned._TRIAL

    def descend(family, *_):
        """A start from t_max that is the better one, as errors are told here; each update adds 1 to the factors of the state."""
        ahead = len(family.times) == 6
        table, times = jax.jit(family.build)(family.start())
        for update in range(1, 20):
            taken.append(ahead)
            errors = np.full(8, 1e-9 / update * (2 if ahead else 1))
            if update > trial:
                errors = np.concatenate([np.full(8, 1e-8), errors])
            yield errors, (dataclasses.replace(table, state=table.state + update), times), 0

    def of_states(table, *_):
        return np.full(16, 1e-12 if float(table.time[0]) == sde.t_max else 2e-12)

    monkeypatch.setattr(learned, "_descend", descend)
    monkeypatch.setattr(learned, "_of_states", of_states)
    options = dict(nfe=4, num_states=32, max_updates=20, progress=False)
    solver = sd.fit_solver(mixture().score_fn(sde), sde, jax.random.key(0), (16, 2), **options)
    assert taken == [True, False] * trial + [False] * (20 - 2 * trial)
    assert float(solver.table.time[0]) == sde.t_max
    assert (solver.table.state > 20 - trial).all() and (solver.table.state < 21 - trial).all()
    np.testing.assert_allclose(json.loads(solver.facts)["held_out_rmse"], 1e-6)


def test_the_errors_that_a_descent_tells_are_those_of_its_solver():
    """Of the first held-out states, as many as it looks at: more and more, up to all."""
    sde, score_fn, key = sd.VP(), as_pytree(mixture().score_fn(sd.VP())), jax.random.key(4)
    x = sde.prior_sample(key, (16, 32, 2))
    draw = functools.partial(sd.sample_ode, score_fn, sde, key, (32, 2), method="adams_4", num_steps=100, denoise=False)
    target, centre = jnp.stack([draw(init=part) for part in x]), jnp.zeros(2)
    held_out, data = (x[:4], target[:4]), (x[4:], target[4:])
    family, sizes = learned._Family(sde, 5, 0.5, 2, time_grid(sde, 6, event_size=2)), []
    for errors, solver, _ in learned._descend(family, score_fn, centre, data, held_out, key, 20):
        sizes.append(len(errors))
        np.testing.assert_allclose(errors, learned._of_states(*solver, score_fn, sde, centre, held_out)[: len(errors)], rtol=1e-6)
    assert sizes[0] == 32 and sizes[-1] == 128 and sizes == sorted(sizes)


def test_a_state_whose_score_is_not_finite_counts_as_infinitely_far():
    sde = sd.VP()
    family = learned._Family(sde, 5, 0.5, 2, time_grid(sde, 6, event_size=2))
    solver, x = jax.jit(family.build)(family.start()), jnp.array([[[9.0, 0.0], [0.1, 0.0]]])
    score_fn = as_pytree(lambda x, t: jnp.where(x > 5, jnp.nan, -x))
    errors = learned._of_states(*solver, score_fn, sde, jnp.zeros(2), (x, jnp.zeros_like(x)))
    assert errors[0] == np.inf and np.isfinite(errors[1])
    # Be it the fitted one or the default: what is finite is the better one.
    assert learned._best([(errors,), (np.ones(2),)]) == 1 and learned._best([(np.ones(2),), (errors,)]) == 0


def test_what_a_fit_says_of_its_error_is_that_of_all_held_out_states():
    """Also where its updates looked at few of them. They are the first quarter of the prior draws of its key."""
    sde, oracle, key = sd.VP(), mixture(), jax.random.key(3)
    solver = sd.fit_solver(oracle.score_fn(sde), sde, key, (16, 2), nfe=5, num_states=512, max_updates=2, progress=False)
    held_out = sde.prior_sample(key, (32, 16, 2))[:8].reshape(128, 2)
    sample = functools.partial(sd.sample_ode, oracle.score_fn(sde), sde, key, (128, 2), init=held_out, denoise=False)
    errors = jnp.mean((sample(method=solver) - sample(method="adams_4", num_steps=100)) ** 2, axis=-1)
    facts = json.loads(solver.facts)
    assert facts["held_out_states"] == 128
    np.testing.assert_allclose(facts["held_out_rmse"], float(jnp.sqrt(errors.mean())), rtol=1e-3)
    np.testing.assert_allclose(facts["held_out_median"], float(jnp.sqrt(jnp.median(errors))), rtol=0.05)  # between two of an even number


@pytest.mark.parametrize(("nfe", "sigma_data"), [(5, 0.5), (9, 0.1)])
def test_a_fit_that_finds_nothing_better_is_the_default(nfe, sigma_data, tmp_path):
    """Data of 6 and 30 times the standard deviation that is said, and next to no time: what is returned samples as the default does."""
    sde = sd.VE()
    oracle = sd.GaussianMixture([0.5, 0.5], np.array([[-3.0, 0.0], [3.0, 1.0]], np.float32), np.stack([0.1 * np.eye(2)] * 2))
    options = dict(nfe=nfe, num_states=32, seconds=0.0, sigma_data=sigma_data, progress=False)
    solver = sd.fit_solver(oracle.score_fn(sde), sde, jax.random.key(0), (16, 2), **options)
    facts = json.loads(solver.facts)
    assert facts["held_out_rmse"] == facts["held_out_rmse_of_the_default"]
    assert (facts["updates"], facts["ended_by"]) == (1, "the time limit")
    solver = sd.LearnedSolver.load(solver.save(tmp_path / "solver.json"))
    draw = functools.partial(sd.sample_ode, oracle.score_fn(sde), sde, jax.random.key(1), (64, 2), sigma_data=sigma_data)
    np.testing.assert_allclose(draw(method=solver), draw(num_steps=nfe), rtol=1e-4, atol=1e-4)


def test_a_fit_where_the_default_is_exact_already_stays_there():
    """N(0, sigma_data^2 I): errors are those of rounding, so the equations must not divide by them."""
    sde, oracle = SDES["vp"], sd.GaussianMixture.gaussian(np.zeros(2), 0.25 * np.eye(2))
    options = dict(nfe=6, num_states=32, max_updates=3, progress=False)
    facts = json.loads(sd.fit_solver(oracle.score_fn(sde), sde, jax.random.key(0), (16, 2), **options).facts)
    assert facts["held_out_rmse"] < 1e-5 and (facts["updates"], facts["ended_by"]) == (3, "max_updates")


def test_a_fit_to_a_network_of_eps_starts_from_its_default_and_goes_on():
    """Its first table is that of `adams_eps`; fitted in a few updates, other states end a third closer."""
    sde = SDES["vp"]
    network, std = eps_network(sde)
    times = time_grid(sde, 6, "wide", sigma_data=std, event_size=16)
    family = learned._Family(sde, 6, std, 16, times, "adams_eps")
    table, _ = jax.jit(family.build)(family.start())
    rule = jax.jit(lambda: ode.METHODS["adams_eps"](Steps.of(sde, times, std, 16)))()
    np.testing.assert_allclose(table.time, rule.time, rtol=1e-5)
    np.testing.assert_allclose(table.state, rule.state, rtol=1e-4)
    np.testing.assert_allclose(table.history[:, : rule.history.shape[1]], rule.history, rtol=2e-3, atol=2e-3)
    score_fn = sd.as_score(network, sde, sigma_data=std)
    solver = sd.fit_solver(score_fn, sde, jax.random.key(0), (64, 16), nfe=6, num_states=256, max_updates=12, progress=False)
    draw = functools.partial(sd.sample_ode, score_fn, sde, jax.random.key(1), (128, 16), denoise=False)
    exact = draw(method="rk4", num_steps=400, grid="log_snr")
    fitted, default = (float(jnp.sqrt(jnp.mean((draw(**o) - exact) ** 2))) for o in ({"method": solver}, {"num_steps": 6}))
    assert fitted < 0.67 * default
