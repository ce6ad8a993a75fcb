import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import SDES, ZERO_SNR, mixture, moment_z_scores

import sde_diffusion as sd
from sde_diffusion.sde import expand

NAMES = sorted(SDES)
MEAN = np.array([0.5, -0.3, 0.1])
COVARIANCE = np.array([[0.5, 0.2, 0.0], [0.2, 0.3, -0.1], [0.0, -0.1, 0.4]])


def gaussian():
    return sd.GaussianMixture.gaussian(MEAN, COVARIANCE)


def transported_prior(sde, x):
    """log p of x at t_min where the exact flow of the Gaussian carries the prior there, in float64.

    The flow is the linear map that turns the marginal at t_min into that at t_max without rotation; the prior's density
    at its end, and its determinant, give the answer: the mismatch of prior and marginal is part of it.
    """
    values, q = np.linalg.eigh(COVARIANCE)
    at = {}
    for t in (sde.t_min, sde.t_max):
        alpha, sigma = float(sde.alpha(jnp.asarray(t))), float(sde.sigma(jnp.asarray(t)))
        at[t] = alpha, np.sqrt(alpha**2 * values + sigma**2)
    (alpha, std), (alpha_max, std_max) = at[sde.t_min], at[sde.t_max]
    y = (np.asarray(x) - alpha * MEAN) @ q * (std_max / std) + alpha_max * MEAN @ q
    prior_std = float(sde.prior_std())
    log_prior = -0.5 * (y / prior_std) ** 2 - np.log(prior_std) - 0.5 * np.log(2 * np.pi)
    return (log_prior + np.log(std_max / std)).sum(axis=1)


@pytest.mark.parametrize("name", NAMES)
def test_gaussian_closed_form(name, x64):
    sde = SDES[name]
    x = gaussian().sample(jax.random.key(0), 8)
    got = sd.log_likelihood(gaussian().score_fn(sde), sde, None, x, trace="exact", rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(got, transported_prior(sde, x), atol=2e-5)


# Ranges in which prior and marginal at t_max agree to the tolerance.
WIDE = {
    "vp": sd.VP(beta_max=40.0),
    "subvp": sd.SubVP(beta_max=40.0),
    "ve": sd.VE(sigma_max=2000.0),
    "cosine": ZERO_SNR,
}


@pytest.mark.parametrize("name", NAMES)
def test_mixture_in_the_plane(name):
    """In float32 at the default tolerances."""
    sde, oracle = WIDE[name], mixture()
    x = oracle.sample(jax.random.key(1), 8)
    got = sd.log_likelihood(oracle.score_fn(sde), sde, None, x, trace="exact")
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, oracle.log_prob(x, sde, sde.t_min), atol=5e-3)


def mixture_16():
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(3, 16, 16)) / 5
    return sd.GaussianMixture(np.array([1.0, 2.0, 3.0]), rng.normal(size=(3, 16)) / 2, roots @ roots.transpose(0, 2, 1))


def test_mixture_in_16_dimensions():
    """Float32, default tolerances, and images: the density does not care about the shape of the event."""
    sde, oracle = WIDE["vp"], mixture_16()
    x = sde.perturb(oracle.sample(jax.random.key(3), 6), jax.random.normal(jax.random.key(4), (6, 16)), jnp.full(6, sde.t_min))
    expected = oracle.log_prob(x, sde, sde.t_min)
    exact = oracle.score_fn(sde)

    def on_images(x, t):
        return exact(x.reshape(len(x), 16), t).reshape(x.shape)

    got = sd.log_likelihood(on_images, sde, None, x.reshape(6, 2, 4, 2), trace="exact")
    np.testing.assert_allclose(got, expected, atol=0.02)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased(probe):
    """The mean over probes of one example, within 4 of its standard errors of the exact density."""
    sde, oracle, n = WIDE["vp"], mixture_16(), 400
    point = oracle.sample(jax.random.key(5), 1)
    exact = float(sd.log_likelihood(oracle.score_fn(sde), sde, None, point, trace="exact")[0])
    values = np.asarray(sd.log_likelihood(oracle.score_fn(sde), sde, jax.random.key(6), jnp.tile(point, (n, 1)), probe=probe))
    error = values.std() / np.sqrt(n)
    assert abs(values.mean() - exact) < 4 * error
    assert 0.01 < error < 5


def test_more_probes_have_less_variance():
    sde, oracle, n = WIDE["vp"], mixture_16(), 400
    x = jnp.tile(oracle.sample(jax.random.key(5), 1), (n, 1))
    one, eight = (np.asarray(sd.log_likelihood(oracle.score_fn(sde), sde, jax.random.key(7), x, num_probes=k)) for k in (1, 8))
    # A ratio of variances of n normals each has relative standard error 2 / sqrt(n).
    assert abs(one.var() / eight.var() / 8 - 1) < 4 * 2 / np.sqrt(n)


def test_an_example_does_not_depend_on_its_neighbours():
    """Alone, and beside one a thousand times more distant, which needs other steps."""
    sde, oracle = SDES["vp"], mixture()
    x = oracle.sample(jax.random.key(8), 8)
    options = {"trace": "exact"}
    batch = sd.log_likelihood(oracle.score_fn(sde), sde, None, x, **options)
    alone = sd.log_likelihood(oracle.score_fn(sde), sde, None, x[:1], **options)
    np.testing.assert_allclose(alone[0], batch[0], atol=2e-4)
    other = sd.log_likelihood(oracle.score_fn(sde), sde, None, x.at[1:].mul(1000.0), **options)
    np.testing.assert_allclose(other[0], batch[0], atol=1e-6)


@pytest.mark.parametrize(("method", "batch_size"), [("adams", 3), ("adams", 5), ("adams", 8), ("dopri8", 3)])
def test_a_few_at_once_have_the_numbers_of_all_at_once(method, batch_size):
    """Of seven, one is far more distant than the others, and one fails. From 4 on, the last go on in a smaller batch."""
    sde, oracle, key = SDES["vp"], mixture(), jax.random.key(9)
    x = oracle.sample(jax.random.key(8), 7).at[1].mul(30.0).at[4].set(jnp.nan)
    together, few = (
        sd.log_likelihood(oracle.score_fn(sde), sde, key, x, method=method, batch_size=size, num_probes=2, details=True)
        for size in (None, batch_size)
    )
    assert np.isfinite(np.delete(few.log_prob, 4)).all() and np.isnan(few.log_prob[4])
    np.testing.assert_allclose(few.log_prob, together.log_prob, atol=2e-4, rtol=1e-5)
    np.testing.assert_allclose(few.latent, together.latent, atol=2e-4, rtol=1e-5)
    np.testing.assert_allclose(few.evaluations, together.evaluations, rtol=0.05)


@pytest.mark.parametrize("num", [128, 131])
def test_one_cpu_works_on_two_halves_at_once(monkeypatch, num):
    """From 128 examples on, where batch_size says that score_fn takes batches of any size."""
    sde, oracle, key, sizes = SDES["vp"], mixture(), jax.random.key(9), set()
    exact, x = oracle.score_fn(sde), oracle.sample(jax.random.key(8), num)

    def score_fn(x, t):
        sizes.add(len(x))
        return exact(x, t)

    together = sd.log_likelihood(score_fn, sde, key, x, details=True)
    assert sizes == {num}
    sizes.clear()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    halves = sd.log_likelihood(score_fn, sde, key, x, batch_size=num, details=True)
    assert sizes == {num // 2, num - num // 2, num // 4}
    np.testing.assert_allclose(halves.log_prob, together.log_prob, atol=2e-4)
    np.testing.assert_allclose(halves.latent, together.latent, atol=2e-4)


def test_an_example_that_is_done_makes_room_for_the_next():
    """The first of six needs the most evaluations; two at once take those of a queue, not those of three pairs."""
    sde, oracle, calls = SDES["vp"], mixture(), []
    exact = oracle.score_fn(sde)

    def score_fn(x, t):
        assert x.shape[0] == 2
        jax.debug.callback(lambda: calls.append(1))
        far = jnp.abs(x).max(axis=1, keepdims=True) > 50
        return exact(x, t) * (1 + 0.1 * far * jnp.sin(60 * t[:, None]))

    x = oracle.sample(jax.random.key(8), 6).at[0].mul(1000.0)
    out = sd.log_likelihood(score_fn, sde, None, x, trace="exact", details=True, batch_size=2)
    jax.block_until_ready(out)
    jax.effects_barrier()
    counts, slots = np.asarray(out.evaluations), [0, 0]
    for count in counts:
        slots[np.argmin(slots)] += count
    assert len(calls) == max(slots) < counts.reshape(3, 2).max(axis=1).sum()


def test_its_probes_are_its_own():
    """Hutchinson's value of the first example is the same whatever stands behind it."""
    sde, oracle, key = SDES["vp"], mixture(), jax.random.key(9)
    x = oracle.sample(jax.random.key(8), 4)
    batch = sd.log_likelihood(oracle.score_fn(sde), sde, key, x)
    other = sd.log_likelihood(oracle.score_fn(sde), sde, key, x.at[1:].add(0.5))
    np.testing.assert_allclose(other[0], batch[0], atol=1e-6)
    np.testing.assert_array_equal(batch, sd.log_likelihood(oracle.score_fn(sde), sde, key, x))


def test_one_dimension_integrates_to_one(x64):
    """exp(log p) of a 1-D mixture under an inexact score: the flow of any score transports a density."""
    sde = WIDE["vp"]
    exact = sd.GaussianMixture(np.ones(2), np.array([[1.0], [-1.0]]), np.full((2, 1, 1), 0.2)).score_fn(sde)

    def score_fn(x, t):
        return exact(x, t) + 0.3 * sde.alpha(t)[:, None] * jnp.cos(2 * x)

    x = jnp.linspace(-6, 6, 241)
    log_p = sd.log_likelihood(score_fn, sde, None, x[:, None], trace="exact", t_end=0.01)
    np.testing.assert_allclose(np.exp(log_p).sum() * (x[1] - x[0]), 1, atol=2e-3)


def test_t_end_is_where_the_data_lives():
    oracle, sde = mixture(), WIDE["vp"]
    x = oracle.sample(jax.random.key(10), 8)
    for t_end in (0.01, 0.2):
        got = sd.log_likelihood(oracle.score_fn(sde), sde, None, x, trace="exact", t_end=t_end)
        np.testing.assert_allclose(got, oracle.log_prob(x, sde, t_end), atol=5e-3)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_its_gradient_is_the_score(batch_size):
    """d log p / dx through the solver, against the marginal's own score."""
    oracle, sde = mixture(), WIDE["vp"]
    x = oracle.sample(jax.random.key(11), 4)
    gradient = jax.grad(
        lambda x: sd.log_likelihood(oracle.score_fn(sde), sde, None, x, trace="exact", t_end=0.05, batch_size=batch_size).sum()
    )(x)
    expected = oracle.score_fn(sde)(x, jnp.full(4, 0.05))
    np.testing.assert_allclose(gradient, expected, atol=0.02)


def test_pmap_gives_the_numbers_of_jit():
    oracle, sde = mixture(), SDES["vp"]
    x = oracle.sample(jax.random.key(12), 16).reshape(8, 2, 2)

    def log_p(x):
        return sd.log_likelihood(oracle.score_fn(sde), sde, None, x, trace="exact")

    np.testing.assert_allclose(jax.pmap(log_p)(x).reshape(-1), log_p(x.reshape(16, 2)), atol=2e-4)


def test_evaluations_are_few_and_a_bfloat16_network_does_not_stall():
    """Smooth in log-SNR: tens of steps, not thousands; counted at the score function."""
    oracle, sde, calls = mixture(), SDES["vp"], []
    exact = oracle.score_fn(sde)

    def score_fn(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return exact(x, t)

    jax.block_until_ready(sd.log_likelihood(score_fn, sde, jax.random.key(0), oracle.sample(jax.random.key(1), 1)))
    jax.effects_barrier()
    assert 20 < len(calls) < 600


def test_numbers_of_numpy_and_traced_tolerances():
    oracle, sde = mixture(), SDES["vp"]
    x, key = oracle.sample(jax.random.key(0), 3), jax.random.key(1)
    value = functools.partial(sd.log_likelihood, oracle.score_fn(sde), sde, key, x)
    plain = value(num_probes=2, rtol=1e-3, max_steps=500)
    # Not through what jaxtyping checks under pytest: as users have it.
    bare = functools.partial(inspect.unwrap(sd.log_likelihood), oracle.score_fn(sde), sde, key, x)
    np.testing.assert_array_equal(bare(num_probes=np.int64(2), rtol=np.float64(1e-3), max_steps=np.int64(500)), plain)
    traced = jax.jit(lambda rtol: value(num_probes=2, rtol=rtol, max_steps=500))(1e-3)
    np.testing.assert_allclose(traced, plain, rtol=1e-4)


@pytest.mark.parametrize("method", ["adams", "tsit5", "dopri8", "heun"])
def test_short_steps_are_taken_where_data_are_thin(method):
    """A coordinate that hardly varies: near the data steps are far shorter than the rounding of the whole way, pi / 2."""
    sde, variances, t = sd.SubVP(), np.array([0.25, 1e-10]), 1e-3
    oracle = sd.GaussianMixture.gaussian(np.zeros(2), np.diag(variances))
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    spread = alpha**2 * variances + sigma**2
    x = (np.sqrt(spread) * np.random.default_rng(0).standard_normal((8, 2))).astype(np.float32)
    exact = -0.5 * (x.astype(np.float64) ** 2 / spread + np.log(2 * np.pi * spread)).sum(axis=1)
    value = sd.log_likelihood(oracle.score_fn(sde), sde, None, jnp.asarray(x), trace="exact", method=method, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(value, exact, atol=0.02)


@pytest.mark.parametrize("method", ["adams", "tsit5", "dopri8", "heun"])
def test_a_score_that_is_not_finite_costs_few_evaluations(method):
    out = sd.log_likelihood(lambda x, t: x * jnp.nan, SDES["vp"], None, jnp.ones((2, 1)), trace="exact", method=method, details=True)
    assert np.isnan(out.log_prob).all() and out.evaluations.max() < 200


def test_an_example_that_runs_out_of_steps_is_nan():
    oracle, sde = mixture(), SDES["vp"]
    x = oracle.sample(jax.random.key(0), 3)
    assert np.isnan(sd.log_likelihood(oracle.score_fn(sde), sde, None, x, trace="exact", max_steps=2)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trace": "full"}, ["'full'", "'hutchinson'", "'exact'"]),
        ({"probe": "cauchy"}, ["'cauchy'", "gaussian, rademacher"]),
        ({"num_probes": 0}, ["num_probes=0", "at least 1"]),
        ({"method": "rk45"}, ["'rk45'", "adams, dopri8, heun, tsit5"]),
        ({"num_steps": 0}, ["num_steps=0", "at least 1"]),
        ({"batch_size": 0}, ["batch_size=0", "at least 1", "None"]),
        ({"atol": 0.0}, ["atol=0.0", "positive"]),
        ({"t_end": 2.0}, ["t_end=2.0", "t_train=1e-05", "t_max=1.0", "None"]),
        ({"t_end": 0.0}, ["t_end=0.0", "VP"]),
        ({"key": None}, ["key", "trace='exact'"]),
        ({"sigma_data": np.inf}, ["sigma_data=inf", "finite"]),
        ({"sigma_data": np.ones(2)}, ["sigma_data=", "one number"]),
        ({"grid": jnp.array([0.5, 0.1])}, ["starts at 0.5", "t_max=1.0"]),
        ({"grid": jnp.array([1.0, 0.1]), "num_steps": 5}, ["num_steps=5", "of 1 steps", "pass one"]),
    ],
)
def test_bad_input_is_refused_while_tracing(options, words):
    options = {"key": jax.random.key(0), **options}
    key = options.pop("key")
    with pytest.raises(ValueError) as error:
        jax.eval_shape(lambda: sd.log_likelihood(lambda x, t: -x, SDES["vp"], key, jnp.zeros((2, 3)), **options))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_no_examples_are_refused(batch_size):
    sde = SDES["vp"]
    for fn in (lambda x: sd.log_likelihood(mixture().score_fn(sde), sde, None, x, trace="exact", batch_size=batch_size),
               lambda x: sd.encode(mixture().score_fn(sde), sde, x, batch_size=batch_size)):  # fmt: skip
        with pytest.raises(ValueError, match=r"shape \(0, 2\); pass at least one example"):
            fn(jnp.zeros((0, 2)))


def test_a_score_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"returned shape \(2, 1\) for x of shape \(2, 3\)"):
        jax.eval_shape(lambda: sd.log_likelihood(lambda x, t: x[:, :1], SDES["vp"], jax.random.key(0), jnp.zeros((2, 3))))


def mixture_in(dim):
    """Three Gaussians, their standard deviations from 0.1 to 1 along random axes."""
    rng = np.random.default_rng(dim)
    bases = np.linalg.qr(rng.standard_normal((3, dim, dim)))[0]
    covariances = np.einsum("kij,j,klj->kil", bases, np.geomspace(0.01, 1.0, dim), bases)
    return sd.GaussianMixture(np.array([1.0, 2.0, 3.0]), rng.standard_normal((3, dim)), covariances)


def error_per_dim(oracle, sde, x, **options):
    """|log p - the marginal's at t_min - the prior's mismatch at the latent| / D, the mismatch in closed form."""
    out = sd.log_likelihood(oracle.score_fn(sde), sde, None, x, trace="exact", details=True, **options)
    mismatch = sde.prior_log_prob(out.latent) - oracle.log_prob(out.latent, sde, sde.t_max)
    return np.abs(out.log_prob - mismatch - oracle.log_prob(x, sde, sde.t_min)) / x.shape[1]


@pytest.mark.parametrize(("dim", "name"), [(2, "ve"), (16, "subvp"), (64, "vp")])
def test_a_thousandth_of_a_nat_per_dimension(dim, name):
    """Float32, exact trace, default tolerance, default range of times."""
    oracle, sde = mixture_in(dim), SDES[name]
    assert error_per_dim(oracle, sde, oracle.sample(jax.random.key(0), 16)).max() < 1e-3


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_a_millionth_in_double_precision(name, x64):
    oracle, sde = mixture_in(2), SDES[name]
    x = oracle.sample(jax.random.key(0), 8)
    assert error_per_dim(oracle, sde, x, method="dopri8", rtol=1e-9, atol=1e-9).max() < 1e-6


def test_hutchinson_over_a_thousand_examples():
    """Unbiased, and its standard errors are right on average."""
    sde, oracle, n = WIDE["vp"], mixture_16(), 1000
    x = oracle.sample(jax.random.key(5), n)
    exact = sd.log_likelihood(oracle.score_fn(sde), sde, None, x, trace="exact")
    out = sd.log_likelihood(oracle.score_fn(sde), sde, jax.random.key(6), x, num_probes=4, details=True)
    error = np.asarray(out.log_prob - exact, np.float64)
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(n)
    excess = error**2 - np.asarray(out.standard_error, np.float64) ** 2
    assert abs(excess.mean()) < 4 * excess.std() / np.sqrt(n)


def test_standard_errors_of_one_probe_and_of_the_exact_trace():
    sde, oracle = SDES["vp"], mixture()
    x = oracle.sample(jax.random.key(0), 3)
    one = sd.log_likelihood(oracle.score_fn(sde), sde, jax.random.key(1), x, details=True, num_steps=5)
    exact = sd.log_likelihood(oracle.score_fn(sde), sde, None, x, trace="exact", details=True, num_steps=5)
    assert np.isnan(one.standard_error).all() and (exact.standard_error == 0).all()


@pytest.mark.parametrize("method", ["adams", "tsit5", "dopri8", "heun"])
@pytest.mark.parametrize("num_steps", [None, 12])
def test_evaluations_are_counted(method, num_steps):
    """At the score function, for a single example."""
    oracle, sde, calls = mixture(), SDES["vp"], []
    exact = oracle.score_fn(sde)

    def score_fn(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return exact(x, t)

    x, tolerance = oracle.sample(jax.random.key(1), 1), 1e-2
    out = sd.log_likelihood(
        score_fn, sde, None, x, trace="exact", method=method, num_steps=num_steps, rtol=tolerance, atol=tolerance, details=True
    )
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert out.evaluations[0] == len(calls)


def test_a_fixed_grid_converges():
    """At order 3 at least, up to Adams's start; from grids by name and from arrays."""
    oracle, sde = mixture(), WIDE["vp"]
    x = oracle.sample(jax.random.key(10), 8)
    options = {"trace": "exact", "details": True}
    expected = oracle.log_prob(x, sde, sde.t_min)
    errors = []
    for num_steps in (25, 100):
        out = sd.log_likelihood(oracle.score_fn(sde), sde, None, x, num_steps=num_steps, **options)
        assert (out.evaluations == num_steps + 5).all()
        errors.append(np.abs(out.log_prob - expected).max())
    assert errors[1] < 5e-3 and errors[1] < errors[0] / 8
    by_array = sd.log_likelihood(oracle.score_fn(sde), sde, None, x, grid=sd.time_grid(sde, 100), **options)
    np.testing.assert_allclose(by_array.log_prob, out.log_prob, atol=1e-4)
    runge_kutta = sd.log_likelihood(oracle.score_fn(sde), sde, None, x, num_steps=25, method="tsit5", **options)
    np.testing.assert_allclose(runge_kutta.log_prob, expected, atol=5e-3)


def test_a_schedule_whose_data_lives_at_time_zero():
    oracle, sde = mixture(), sd.LinearLogSNR(log_snr_max=8.0, log_snr_min=-10.0)
    x = oracle.sample(jax.random.key(1), 8)
    got = sd.log_likelihood(oracle.score_fn(sde), sde, None, x, trace="exact")
    np.testing.assert_allclose(got, oracle.log_prob(x, sde, 0.0), atol=5e-3)


def test_a_network_with_its_own_backward_pass():
    """It has no forward mode."""
    oracle, sde = mixture(), SDES["vp"]
    exact = oracle.score_fn(sde)
    custom = jax.custom_vjp(exact)
    custom.defvjp(lambda x, t: (exact(x, t), (x, t)), lambda kept, g: (jax.vjp(lambda x: exact(x, kept[1]), kept[0])[1](g)[0], None))
    x = oracle.sample(jax.random.key(1), 3)
    for trace in ("exact", "hutchinson"):
        got, expected = (
            sd.log_likelihood(lambda x, t: fn(x, t), sde, jax.random.key(0), x, trace=trace, num_steps=8, sigma_data=1.0)
            for fn in (custom, exact)
        )
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_there_and_back_again(name):
    """Encoding and decoding at tolerance 1e-5 return the data within 1e-3 of its scale."""
    oracle, sde = mixture(), SDES[name]
    x = oracle.sample(jax.random.key(1), 16)
    latent = sd.encode(oracle.score_fn(sde), sde, x, rtol=1e-5, atol=1e-5)
    back = sd.sample_adaptive(oracle.score_fn(sde), sde, jax.random.key(0), x.shape, init=latent, denoise=False, rtol=1e-5, atol=1e-5)
    error = float(np.sqrt(np.mean((back.samples - x) ** 2)))
    print(f"{name}: round-trip error {error:.2g}")
    assert error < 1e-3


def test_the_latent_is_that_of_the_likelihood_and_of_the_prior():
    """Standard normal, where the marginal at t_max is: mean and covariance of 500 within 4.5 standard errors."""
    oracle, sde = mixture(), WIDE["vp"]
    x = oracle.sample(jax.random.key(1), 500)
    latent = sd.encode(oracle.score_fn(sde), sde, x)
    assert np.abs(moment_z_scores(latent, np.zeros(2), np.eye(2))).max() < 4.5
    details = sd.log_likelihood(oracle.score_fn(sde), sde, None, x, trace="exact", details=True)
    np.testing.assert_allclose(latent, details.latent, atol=2e-3)


def test_slerp():
    a, b = (jax.random.normal(jax.random.key(i), (5, 8, 8, 3)) for i in (0, 1))
    np.testing.assert_array_equal(sd.slerp(a, b, 0.0), a)
    np.testing.assert_array_equal(sd.slerp(a, b, 1.0), b)
    fractions = jnp.linspace(0.0, 1.0, 5)

    def norm(x):
        return np.linalg.norm(np.asarray(x).reshape(5, -1), axis=1)

    middle = norm(sd.slerp(a, b, fractions))
    # Between the two norms, up to the angle's departure from a right one and the curvature of their difference.
    assert (middle > 0.98 * np.minimum(norm(a), norm(b))).all() and (middle < 1.02 * np.maximum(norm(a), norm(b))).all()
    # On a sphere exactly: equal norms stay, angles are proportional to the fraction.
    b = b * expand(norm(a) / norm(b), b)
    between = sd.slerp(a, b, fractions)
    np.testing.assert_allclose(norm(between), norm(a), rtol=1e-5)
    cosine = lambda x, y: (np.asarray(x) * np.asarray(y)).reshape(5, -1).sum(1) / norm(x) / norm(y)
    np.testing.assert_allclose(np.arccos(cosine(a, between)[1:]), (fractions * np.arccos(cosine(a, b)))[1:], rtol=1e-3)
    np.testing.assert_allclose(sd.slerp(a, a, 0.3), a, rtol=1e-6)
    with pytest.raises(ValueError, match="make them equal"):
        sd.slerp(a, b[:, :4], 0.5)


def test_a_prior_beyond_the_lowest_log_snr_has_its_own_scale():
    # VE up to sigma = 1e5, where lambda = -23; the flow is integrated to lambda = -20.
    gauss, sde = sd.GaussianMixture.gaussian(jnp.zeros(2), jnp.eye(2)), sd.VE(sigma_max=1e5)
    x = gauss.sample(jax.random.key(0), 8)
    out = sd.log_likelihood(gauss.score_fn(sde), sde, None, x, trace="exact", details=True)
    np.testing.assert_allclose(out.log_prob, gauss.log_prob(x, sde, sde.t_min), atol=1e-3)
    np.testing.assert_allclose(out.latent, 1e5 * x, rtol=1e-3)


def test_examples_on_a_mesh_of_explicit_axes():
    """What `jax.make_mesh` gives by default."""
    sde, oracle = SDES["vp"], mixture()
    x = oracle.sample(jax.random.key(8), 16)
    split = jax.device_put(x, jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec("data")))
    got, expected = (sd.log_likelihood(oracle.score_fn(sde), sde, None, a, trace="exact") for a in (split, x))
    np.testing.assert_allclose(got, expected, atol=2e-4)
    with pytest.raises(ValueError, match="batch_size=4 .* explicit mesh axes; leave batch_size out"):
        sd.log_likelihood(oracle.score_fn(sde), sde, None, split, trace="exact", batch_size=4)
