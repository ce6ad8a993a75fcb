import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from oracle import SDES, ZERO_SNR, drift_and_squared_diffusion, mixture, moment_z_scores, order

import sde_diffusion as sd
from sde_diffusion.prediction import check_process
from sde_diffusion.samplers import ode
from sde_diffusion.samplers import sde as reverse
from sde_diffusion.samplers.grid import GRIDS, resolve_grid
from sde_diffusion.samplers.integrate import check_shape, check_state

NAMES = sorted(SDES)
ODE = tuple(sorted(ode.METHODS))
REVERSE = tuple(sorted(reverse.METHODS))
ONE_STEP = ("ancestral", "ancestral_large", "ddim", "euler", "euler_maruyama", "reverse_diffusion")
MEAN, STD = 0.8, 0.6


def one_gaussian():
    """N(0.8, 0.36) in one dimension."""
    return sd.GaussianMixture.gaussian(np.array([MEAN]), np.array([[STD**2]]))


def sampler(method):
    """The public function that owns the method, as (score_fn, sde, key, shape, **options)."""
    if method in ODE:
        return lambda *a, **k: sd.sample_ode(*a, method=method, **k)
    if method in REVERSE:
        return lambda *a, **k: sd.sample_sde(*a, method=method, **k)
    return lambda *a, **k: sd.sample_pc(*a, corrector=method, **k)


def counted(score_fn):
    """The score function, and the list that grows by one at each of its evaluations."""
    calls = []

    def wrapped(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return score_fn(x, t)

    return wrapped, calls


# Distributions.


METHODS = {**ode.METHODS, **reverse.METHODS}
# One of each kind is tried on every process, the others on one.
KINDS = (*ONE_STEP, "adams", "heun", "rk4", "unipc_3", "dpmpp_3s", "sa_solver", "sde_adams", "churned_heun")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (name, method)
        for name in (*NAMES, "zero_snr")
        for method in (*ODE, *REVERSE)
        if (method in KINDS or name == "ve") and (name != "zero_snr" or METHODS[method].zero_snr)
    ],
)
def test_the_mixture_is_recovered(name, method):
    """Mean and covariance within 4 standard errors of 4096 samples: 2% of a variance, twice the bias of the steps."""
    sde, oracle = {**SDES, "zero_snr": ZERO_SNR}[name], mixture()
    options = {"num_steps": 500, "grid": "uniform"} if METHODS[method].order == 1 else {"num_steps": 120}
    # Euler's method in t is slow on geometric noise: sigma grows by 17 / num_steps a step.
    options |= {"num_steps": 2000} if (name, method) == ("ve", "euler") else {}
    x = sampler(method)(oracle.score_fn(sde), sde, jax.random.key(1), (4096, 2), **options)
    assert np.abs(moment_z_scores(x, oracle.mean(), oracle.covariance())).max() < 4
    # The shape of the distribution too: how much lies beyond the gap between the components.
    expected = 0.3 * scipy.stats.norm(1.2, np.sqrt(0.3)).sf(0.4) + 0.7 * scipy.stats.norm(-0.8, np.sqrt(0.5)).sf(0.4)
    beyond = (np.asarray(x)[:, 0] > 0.4).mean()
    assert abs(beyond - expected) < 4 * np.sqrt(expected * (1 - expected) / 4096)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("corrector", ["langevin", "langevin_norm"])
def test_predictor_corrector_recovers_the_mixture(name, corrector):
    """The published rule needs |score| near sqrt(D) / sigma: 16 independent copies of a coordinate stand for images."""
    sde, dims = SDES[name], 16
    oracle = sd.GaussianMixture(np.array([0.4, 0.6]), np.array([[1.0], [-0.5]]), np.array([[[0.2]], [[0.3]]]))
    exact = oracle.score_fn(sde)

    def score_fn(x, t):
        return exact(x.reshape(-1, 1), jnp.repeat(t, dims)).reshape(x.shape)

    x = sd.sample_pc(score_fn, sde, jax.random.key(3), (512, dims), corrector=corrector, num_steps=400)
    z = moment_z_scores(np.asarray(x).reshape(-1, 1), oracle.mean(), oracle.covariance())
    assert np.abs(z).max() < 4


@pytest.mark.parametrize("predictor", ["ddim", "ancestral", "euler_maruyama"])
def test_any_predictor_and_annealed_langevin(predictor):
    sde, oracle = SDES["vp"], mixture()
    x = sd.sample_pc(
        oracle.score_fn(sde), sde, jax.random.key(4), (4096, 2),
        predictor=predictor, corrector="annealed_langevin", corrector_steps=2, num_steps=300,
    )  # fmt: skip
    assert np.abs(moment_z_scores(x, oracle.mean(), oracle.covariance())).max() < 4


def test_the_corrector_alone_finds_the_marginal():
    """Langevin at one noise level, started wrong, forgets it: stationary variance sigma^2 / (1 - snr^2) by its own map."""
    sde = sd.VE(sigma_min=0.99, sigma_max=1.0)
    flat = sd.GaussianMixture.gaussian(np.zeros(1), np.zeros((1, 1)))
    x = sd.sample_pc(
        flat.score_fn(sde), sde, jax.random.key(5), (20_000, 1), predictor="ddim", corrector_steps=100, snr=0.3,
        num_steps=1, t_end=0.5, init=jnp.full((20_000, 1), 5.0), denoise=False,
    )  # fmt: skip
    # The contraction of a step is 1 - h with h = 2 snr^2 = 0.18; variance v = (1 - h)^2 v + 2 h sigma^2.
    sigma = np.sqrt(0.99)
    expected = sigma**2 / (1 - 0.3**2)
    assert abs(float(x.var()) / expected - 1) < 4 * np.sqrt(2 / 20_000)
    assert abs(float(x.mean())) < 4 * np.sqrt(expected / 20_000)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_denoise_ends_with_the_posterior_mean(name):
    """With and without, from the same noise: the end state follows the marginal at t_end, and is denoised exactly."""
    sde, oracle, t_end = SDES[name], mixture(), 0.3
    options = {"t_end": t_end, "num_steps": 300, "method": "ancestral_large"}
    noisy, clean = (
        sd.sample_sde(oracle.score_fn(sde), sde, jax.random.key(6), (4096, 2), denoise=denoise, **options) for denoise in (False, True)
    )
    alpha, sigma = float(sde.alpha(jnp.asarray(t_end))), float(sde.sigma(jnp.asarray(t_end)))
    marginal = alpha * np.asarray(oracle.mean()), alpha**2 * np.asarray(oracle.covariance()) + sigma**2 * np.eye(2)
    assert np.abs(moment_z_scores(noisy, *marginal)).max() < 4
    posterior_mean = oracle.score_fn(sde).predict(noisy, jnp.full(4096, t_end))[0]
    np.testing.assert_allclose(clean, posterior_mean, atol=1e-5)


# Orders.


def exact_flow(sde, x, t, s):
    """The probability flow of one Gaussian from t to s: marginal to marginal, standard deviations apart."""
    (alpha_t, std_t), (alpha_s, std_s) = (
        (float(sde.alpha(u)), np.sqrt(float(sde.alpha(u)) ** 2 * STD**2 + float(sde.sigma(u)) ** 2))
        for u in (jnp.asarray(t), jnp.asarray(s))
    )
    return alpha_s * MEAN + std_s / std_t * (np.asarray(x) - alpha_t * MEAN)


@pytest.mark.parametrize(
    ("name", "method"),
    [("vp", "euler"), ("ve", "euler"), ("vp", "ddim"), ("cosine", "ddim"), *[(name, "heun") for name in NAMES]],
)
def test_convergence_order(name, method, x64):
    """Against the closed form of the flow, over 8 states."""
    sde, t_end = SDES[name], 0.05
    init = sde.prior_sample(jax.random.key(7), (8, 1))
    exact = exact_flow(sde, init, sde.t_max, t_end)
    steps, errors = np.array([50, 100, 200]) * (4 if name == "ve" else 1), []
    for num in steps:
        x = sampler(method)(
            one_gaussian().score_fn(sde), sde, jax.random.key(0), (8, 1), init=init,
            num_steps=int(num), grid="log_snr" if method == "heun" else "uniform", t_end=t_end, denoise=False,
        )  # fmt: skip
        errors.append(np.abs(np.asarray(x) - exact).max())
    expected = 2 if method == "heun" else 1
    assert abs(order(steps, errors) - expected) < 0.15, errors


def test_heun_follows_the_published_ode(x64):
    """A mixture under VP: scipy integrates dx/dt = f x - 1/2 g^2 score with the paper's beta, Heun must agree."""
    sde, oracle = SDES["vp"], mixture()
    init = sde.prior_sample(jax.random.key(8), (4, 2))
    score = jax.jit(lambda x, t: oracle.score_fn(sde)(x.reshape(4, 2), jnp.broadcast_to(t, 4)))

    def rate(t, x):
        f, squared = drift_and_squared_diffusion("vp", t)
        return f * x - 0.5 * squared * np.asarray(score(jnp.asarray(x), jnp.asarray(t))).ravel()

    solution = scipy.integrate.solve_ivp(rate, (1.0, 0.01), np.asarray(init).ravel(), rtol=1e-9, atol=1e-9)
    x = sd.sample_ode(oracle.score_fn(sde), sde, jax.random.key(0), (4, 2), init=init, num_steps=800, t_end=0.01, denoise=False)
    np.testing.assert_allclose(np.asarray(x).ravel(), solution.y[:, -1], atol=5e-5)


@pytest.mark.parametrize("method", [m for m in REVERSE if reverse.METHODS[m].order == 1])
def test_weak_order_is_one(method):
    """The bias of the variance on one Gaussian, from 260,000 samples a step count, against log steps.

    The standard error of a variance, sqrt(2 / n) = 0.3%, is a fraction of the smallest bias.
    """
    sde, t_end, n = SDES["vp"], 0.02, 2**18
    alpha, sigma = float(sde.alpha(jnp.asarray(t_end))), float(sde.sigma(jnp.asarray(t_end)))
    expected = alpha**2 * STD**2 + sigma**2
    steps, biases = np.array([10, 20, 40]), []
    for num in steps:
        x = np.asarray(
            sd.sample_sde(
                one_gaussian().score_fn(sde),
                sde,
                jax.random.key(9),
                (n, 1),
                method=method,
                num_steps=int(num),
                grid="log_snr",
                t_end=t_end,
                denoise=False,
            )  # fmt: skip
        )
        biases.append(abs(x.var(dtype=np.float64) / expected - 1))
    assert min(biases) > 4 * np.sqrt(2 / n), biases
    assert abs(order(steps, biases) - 1) < 0.3, biases


def test_euler_maruyama_has_the_moments_of_its_own_recursion(x64):
    """x' = x - f x h + g^2 h score + sqrt(g^2 h) z on one Gaussian: mean and variance step by step, paper's beta."""
    sde, n, num = SDES["vp"], 200_000, 25
    t = np.linspace(1.0, 0.1, num + 1)
    mean, variance = 0.0, 1.0
    for now, then in zip(t[:-1], t[1:]):
        f, squared = drift_and_squared_diffusion("vp", now)
        signal = np.exp(-0.5 * (0.1 * now + 9.95 * now**2))
        spread = signal**2 * STD**2 + 1 - signal**2
        factor = 1 - (f + squared / spread) * (now - then)
        mean = factor * mean + squared * (now - then) * signal * MEAN / spread
        variance = factor**2 * variance + squared * (now - then)
    x = np.asarray(sd.sample_sde(one_gaussian().score_fn(sde), sde, jax.random.key(10), (n, 1), grid=jnp.asarray(t), denoise=False))
    assert abs(x.mean() - mean) < 4 * np.sqrt(variance / n)
    assert abs(x.var() / variance - 1) < 4 * np.sqrt(2 / n)


# Evaluations, grids, paths, keys.


@pytest.mark.parametrize("method", [*ODE, *REVERSE])
def test_evaluations_are_the_documented_ones(method):
    """Counted, against the fact sheet; one more for `denoise`. Without it, see below."""
    per_step = {**ode.METHODS, **reverse.METHODS}[method].evaluations
    sde = SDES["vp"]
    score_fn, calls = counted(lambda x, t: -x)
    x = sampler(method)(score_fn, sde, jax.random.key(0), (2, 3), num_steps=7)
    jax.block_until_ready(x)
    jax.effects_barrier()
    assert len(calls) == 7 * per_step + 1


@pytest.mark.parametrize(("corrector", "corrector_steps", "per_step"), [("langevin", 3, 4), (None, 3, 1), ("langevin", 0, 1)])
def test_evaluations_of_predictor_corrector(corrector, corrector_steps, per_step):
    score_fn, calls = counted(lambda x, t: -x)
    jax.block_until_ready(
        sd.sample_pc(
            score_fn,
            SDES["vp"],
            jax.random.key(0),
            (2, 3),
            corrector=corrector,
            corrector_steps=corrector_steps,
            num_steps=5,
            denoise=False,
        )
    )
    jax.effects_barrier()
    assert len(calls) == 5 * per_step


@pytest.mark.parametrize("kind", ["edm", "log_snr", "quadratic", "uniform"])
@pytest.mark.parametrize("sde", [SDES["vp"], SDES["ve"], ZERO_SNR, sd.DDPM()], ids=lambda sde: type(sde).__name__)
def test_grids(sde, kind):
    """Exact ends, strictly decreasing, and evenly spaced in the variable that names them."""
    for num in (1, 300, 18):
        t = np.asarray(sd.time_grid(sde, num, kind))
        assert t.shape == (num + 1,) and (np.diff(t) < 0).all()
        assert t[0] == np.float32(sde.t_max) and t[-1] == np.float32(sde.t_min)
    # The first time stands for the largest noise that the samplers know, where the process has no largest one.
    log_snr = np.maximum(np.asarray(sde.log_snr(jnp.asarray(t)), np.float64), -20)
    spaced = {"edm": np.exp(-log_snr / 14), "log_snr": log_snr, "uniform": t, "quadratic": np.sqrt(t)}[kind]
    steps = np.diff(np.asarray(spaced, np.float64))
    np.testing.assert_allclose(steps, steps.mean(), rtol=2e-3)


@pytest.mark.parametrize("kind", GRIDS)
def test_grids_that_stop_in_noise(kind):
    """Below a log-SNR of -20, from where a grid starts otherwise: it still decreases."""
    sde = sd.VP(beta_max=60.0)
    t = np.asarray(sd.time_grid(sde, 5, kind, t_end=0.9))
    assert sde.log_snr(jnp.array(0.9)) < -24 and (np.diff(t) < 0).all() and t[0] == 1 and t[-1] == np.float32(0.9)


def test_samples_have_the_unit_of_the_data():
    """Data, noise and sigma_data in another unit: the samples too, however small alpha / sigma then is."""
    unit = 1e4
    sde = sd.VE(0.01 * unit, 80.0 * unit)
    oracle = sd.GaussianMixture([0.5, 0.5], unit * np.array([[0.9, 0.0], [-0.9, 0.2]]), unit**2 * np.stack([0.1 * np.eye(2)] * 2))
    init = unit * 80 * jax.random.normal(jax.random.key(0), (64, 2))
    x = sd.sample_ode(oracle.score_fn(sde), sde, jax.random.key(0), (64, 2), init=init, num_steps=8, sigma_data=0.5 * unit)
    same = sd.sample_ode(
        sd.GaussianMixture([0.5, 0.5], oracle.means / unit, np.stack([0.1 * np.eye(2)] * 2)).score_fn(sd.VE(0.01, 80.0)),
        sd.VE(0.01, 80.0), jax.random.key(0), (64, 2), init=init / unit, num_steps=8, sigma_data=0.5,
    )  # fmt: skip
    np.testing.assert_allclose(x / unit, same, rtol=1e-3, atol=1e-3)


def test_edm_grid_is_edms(x64):
    """arXiv:2206.00364 eq. 5 with rho = 7, as a VE process from 80 to 0.002 reads it."""
    sde = sd.VE(sigma_min=0.002, sigma_max=80.0, t_min=1e-9, t_train=1e-9)
    sigma = np.asarray(sde.sigma(sd.time_grid(sde, 17, "edm")))
    i = np.arange(18)
    published = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigma, published, rtol=1e-5)


def test_a_grid_of_ones_own():
    """An array gives what the name gives; other values of the same length compile nothing."""
    sde, oracle, traces = SDES["vp"], mixture(), []

    def score_fn(x, t):
        traces.append(1)
        return oracle.score_fn(sde)(x, t)

    def sample(**options):
        return sd.sample_ode(score_fn, sde, jax.random.key(0), (5, 2), **options)

    by_name = sample(num_steps=12)
    traced = len(traces)
    np.testing.assert_allclose(sample(grid=sd.time_grid(sde, 12, "ahead", event_size=2)), by_name, rtol=1e-5)
    other = sample(grid=jnp.linspace(1.0, 0.01, 13))
    assert sample(num_steps=12, grid="log_snr", t_end=0.1).shape == (5, 2)
    assert len(traces) == traced > 0
    assert not np.allclose(other, by_name, rtol=1e-5)


@pytest.mark.parametrize("method", ["heun", "ancestral", "langevin"])
def test_return_path(method):
    """The states at all times of the grid: the prior draw first, what denoise=False returns last."""
    sde, oracle = SDES["vp"], mixture()
    options = {"num_steps": 6, "return_path": True}
    call = lambda **more: sampler(method)(oracle.score_fn(sde), sde, jax.random.key(1), (3, 2), **options, **more)  # noqa: E731
    sample, path = call(denoise=False)
    assert path.shape == (7, 3, 2)
    np.testing.assert_array_equal(sample, path[-1])
    _, again = call(init=path[0], denoise=False)
    np.testing.assert_allclose(again, path, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [*ODE, *REVERSE, "langevin"])
def test_one_key_one_sample_and_neighbours_do_not_matter(method):
    sde, oracle = SDES["vp"], mixture()

    def sample(key, init):
        return np.asarray(sampler(method)(oracle.score_fn(sde), sde, jax.random.key(key), (4, 2), num_steps=20, init=init))

    init = sde.prior_sample(jax.random.key(2), (4, 2))
    first = sample(0, init)
    np.testing.assert_array_equal(sample(0, init), first)
    np.testing.assert_array_equal(sample(0, init.at[1:].mul(-3.0))[0], first[0])
    assert (method in ODE) == np.array_equal(sample(1, init), first)
    # Two examples that start at one point part by their own noise.
    same = sample(0, jnp.ones((4, 2)))
    assert (method in ODE) == np.array_equal(same[0], same[1])


def test_the_published_corrector_couples_neighbours():
    """Why "langevin" is the default: here a neighbour changes the step of all."""
    sde, oracle = SDES["vp"], mixture()
    init = sde.prior_sample(jax.random.key(2), (4, 2))
    a, b = (
        sd.sample_pc(oracle.score_fn(sde), sde, jax.random.key(0), (4, 2), corrector="langevin_norm", num_steps=20, init=x)
        for x in (init, init.at[1:].mul(-3.0))
    )
    assert not np.allclose(a[0], b[0], rtol=1e-3)


@pytest.mark.parametrize("method", REVERSE)
def test_the_last_step_adds_no_noise(method):
    """Data at one point comes out as that point, with no trace of the noise at t_end (its std is 0.01)."""
    sde = SDES["ve"]
    point = sd.GaussianMixture.gaussian(np.array([0.3, -0.2]), np.zeros((2, 2)))
    x = sampler(method)(point.score_fn(sde), sde, jax.random.key(0), (64, 2), num_steps=200)
    np.testing.assert_allclose(x, np.tile([[0.3, -0.2]], (64, 1)), atol=1e-4)


@pytest.mark.parametrize("method", ["ddim", "heun", "ancestral"])
def test_a_point_is_reached_in_two_steps(method):
    """Where x0 is known DDIM, Heun and the posterior are exact: also in 2 steps, and from zero terminal SNR too."""
    for sde in (SDES["subvp"], SDES["ve"], ZERO_SNR):
        point = sd.GaussianMixture.gaussian(np.array([0.3]), np.zeros((1, 1)))
        x = sampler(method)(point.score_fn(sde), sde, jax.random.key(0), (5, 1), num_steps=2)
        np.testing.assert_allclose(x, 0.3, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2, 2, 3), (3, 5)])
@pytest.mark.parametrize("method", ["heun", "euler_maruyama", "langevin"])
def test_shapes(method, shape):
    sde = SDES["ve"]
    x = sampler(method)(lambda x, t: -x / (1 + sde.sigma(t).reshape(-1, *[1] * (x.ndim - 1)) ** 2), sde,
                        jax.random.key(0), shape, num_steps=10)  # fmt: skip
    assert x.shape == shape and x.dtype == jnp.float32 and np.isfinite(x).all()


@pytest.mark.parametrize("method", ["adams", "heun", "langevin"])
def test_pmap_shard_map_and_shards_give_the_numbers_of_jit(method):
    sde, oracle = SDES["vp"], mixture()
    keys = jax.random.split(jax.random.key(0), 8)

    def sample(key):
        return sampler(method)(oracle.score_fn(sde), sde, key, (4, 2), num_steps=20)

    one_by_one = np.stack([sample(key) for key in keys])
    np.testing.assert_allclose(jax.pmap(sample)(keys), one_by_one, rtol=1e-3, atol=1e-4)
    mesh, part = jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec("data")
    mapped = jax.jit(jax.shard_map(lambda keys: sample(keys[0])[None], mesh=mesh, in_specs=part, out_specs=part))
    np.testing.assert_allclose(mapped(jax.device_put(keys, jax.sharding.NamedSharding(mesh, part))), one_by_one, rtol=1e-3, atol=1e-4)
    # Noise is drawn at the global shape: a batch spread over 8 devices is the batch of one device.
    init = sde.prior_sample(jax.random.key(1), (32, 2))
    whole, spread = (
        sampler(method)(oracle.score_fn(sde), sde, jax.random.key(2), (32, 2), init=x, num_steps=20)
        for x in (init, jax.device_put(init, jax.sharding.NamedSharding(mesh, part)))
    )
    np.testing.assert_allclose(spread, whole, rtol=1e-3, atol=1e-4)


def test_gradients_flow_through_a_sampler(x64):
    """d sample / d init of the flow of one Gaussian is the ratio of the marginals' standard deviations."""
    sde = SDES["vp"]
    init = jnp.asarray([[0.3]])

    def end(init):
        return sd.sample_ode(
            one_gaussian().score_fn(sde), sde, jax.random.key(0), (1, 1), init=init, num_steps=200, t_end=0.1, denoise=False
        )[0, 0]

    slope = (exact_flow(sde, init + 1, 1.0, 0.1) - exact_flow(sde, init, 1.0, 0.1))[0, 0]
    np.testing.assert_allclose(jax.grad(end)(init), [[slope]], rtol=1e-3)


@pytest.mark.parametrize("method", ["ancestral", "sa_solver", "sde_adams", "churned_heun"])
def test_gradients_of_no_noise_are_those_of_the_ode(method, x64):
    """At noise level 0, where the noise's standard deviation is a root at zero: as difference quotients have them."""
    sde, oracle, times = SDES["vp"], mixture(), jnp.array([1.0, 0.6, 0.3, 0.1, 0.01])

    def mean(times, level=0.0):
        return sd.sample_sde(oracle.score_fn(sde), sde, jax.random.key(0), (4, 2), method=method, grid=times, noise_level=level).mean()

    gradient, move = jax.grad(mean)(times), jnp.array([0.0, 1e-5, -1e-5, 1e-5, 1e-6])
    np.testing.assert_allclose(gradient @ move, 0.5 * (mean(times + move) - mean(times - move)), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(mean, argnums=1)(times, 0.0), (mean(times, 1e-5) - mean(times)) / 1e-5, rtol=1e-3)
    np.testing.assert_allclose(jax.grad(mean, argnums=1)(times, 1.0), (mean(times, 1 + 1e-6) - mean(times, 1 - 1e-6)) / 2e-6, rtol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["vp", "cosine", "ve"])
def test_heun_does_not_blow_up_in_few_steps(name, num_steps):
    """The samples stay as far out as the data, whose modes are within 5 standard deviations of 4; once they were 100 times as far."""
    sde, oracle = SDES[name], mixture()
    draw = lambda method, **o: sampler(method)(oracle.score_fn(sde), sde, jax.random.key(0), (64, 2), num_steps=num_steps, **o)  # noqa: E731
    for x in (draw("heun"), draw("churned_heun"), draw("churned_heun", noise_level=2.0)):
        assert np.abs(x).max() < 4


def test_a_schedule_is_an_argument_like_any_other():
    """vmap over beta_max, and the SDE as a traced argument of jit."""
    oracle = mixture()

    def sample(beta_max):
        sde = sd.VP(beta_max=beta_max)
        return sd.sample_ode(oracle.score_fn(sde), sde, jax.random.key(0), (3, 2), num_steps=8)

    several = jax.vmap(sample)(jnp.asarray([10.0, 20.0]))
    np.testing.assert_allclose(several[1], sample(20.0), rtol=1e-4, atol=1e-5)


def test_the_state_stays_float32():
    """A narrow init and a narrow network do not narrow the state."""
    dtype = jnp.bfloat16
    sde, oracle = SDES["vp"], mixture()
    init = sde.prior_sample(jax.random.key(0), (64, 2)).astype(dtype)
    exact = oracle.score_fn(sde)
    score_fn = sd.as_score(lambda x, t: -(sde.sigma(t)[:, None] * exact(x, t)).astype(dtype), sde, prediction="eps")
    x = sd.sample_ode(score_fn, sde, jax.random.key(1), (64, 2), init=init, method="heun", grid="edm")
    wide = sd.sample_ode(exact, sde, jax.random.key(1), (64, 2), init=init.astype(jnp.float32), method="heun", grid="edm")
    assert x.dtype == jnp.float32
    # The network's own rounding, 2^-9 of its output, not the 2^-9 of alpha ~ 1 against sigma ~ 0.01.
    np.testing.assert_allclose(x, wide, atol=0.05)


# Bad input.


def vp_call(function=sd.sample_ode, **options):
    shape = options.pop("shape", (2, 2))
    return lambda: function(lambda x, t: -x, SDES["vp"], options.pop("key", jax.random.key(0)), shape, **options)


def ddim_but(**columns):
    return lambda steps: dataclasses.replace(ode.ddim(steps), **columns)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (vp_call(method="rk5"), ["method 'rk5'", "adams, adams_2", "dpmpp_2m", "unipc_3"]),
        (vp_call(method=["heun"]), ["method ['heun']", "adams"]),
        (vp_call(method="sa_solver"), ["'sa_solver' is one of sample_sde", "sample.sampler='sde'", "adams"]),
        (vp_call(sd.sample_sde, method="adams"), ["'adams' is one of sample_ode", "ancestral"]),
        (vp_call(sd.sample_sde, method="sa_solver", num_steps=2), ["at least 3 steps, got 2", "method='sde_adams'"]),
        (vp_call(method="runs/solver_8.json"), ["sd.LearnedSolver.load('runs/solver_8.json')"]),
        (vp_call(method="dpmpp_3m", num_steps=2), ["'dpmpp_3m'", "at least 3 steps, got 2", "method='adams'"]),
        (vp_call(sigma_data=0.0), ["sigma_data=0.0", "positive"]),
        (vp_call(sigma_data=np.inf), ["sigma_data=inf", "finite"]),
        (lambda: sd.time_grid(SDES["vp"], 5, sigma_data=-1.0), ["sigma_data=-1.0", "positive"]),
        (lambda: sd.time_grid(SDES["vp"], 5, event_size=0), ["event_size=0", "integer of at least 1"]),
        (vp_call(method=lambda steps: 3), ["must return a samplers.linear.Table, not int"]),
        (vp_call(method=ddim_but(time=np.ones(9)), num_steps=10), ["of 10 steps, 1 rows each, needs time of shape (10,), not (9,)"]),
        (vp_call(method=ddim_but(x0=1.0), num_steps=10), ["needs x0 of shape (10,), not ()"]),
        (vp_call(method=ddim_but(history=np.ones(10)), num_steps=10), ["needs history of shape (10, K), not (10,)"]),
        (vp_call(method=ddim_but(noise=np.ones(10)), num_steps=10), ["adds no noise", "sample_sde"]),
        (vp_call(sd.sample_sde, noise_level=np.inf), ["noise_level=inf", "finite"]),
        (vp_call(sd.sample_sde, noise_level=-1.0), ["noise_level=-1.0", "0 is the ODE"]),
        (vp_call(sd.sample_sde, method="em"), ["'em'", "ancestral, ancestral_large", "euler_maruyama, reverse_diffusion"]),
        (vp_call(sd.sample_pc, predictor="em"), ["predictor 'em'", "ancestral", "heun"]),
        (vp_call(sd.sample_pc, corrector="mala"), ["corrector 'mala'", "annealed_langevin, langevin, langevin_norm"]),
        (vp_call(sd.sample_pc, corrector_steps=-1), ["corrector_steps=-1", "at least 0"]),
        (vp_call(sd.sample_pc, snr=0.0), ["snr=0.0", "0.16"]),
        (vp_call(sd.sample_pc, snr=1.2), ["snr=1.2", "stable"]),
        (vp_call(sd.sample_pc, corrector="mala", corrector_steps=0), ["corrector 'mala'"]),
        (vp_call(sd.sample_adaptive, noise_level=np.inf), ["noise_level=inf", "finite"]),
        (vp_call(sd.sample_adaptive, sigma_data=np.inf), ["sigma_data=inf", "finite"]),
        (vp_call(sd.sample_adaptive, rtol=np.inf), ["rtol=inf", "in (0, 1)"]),
        (vp_call(inspect.unwrap(sd.sample_adaptive), denoise=2), ["denoise=2", "True or False"]),
        (vp_call(inspect.unwrap(sd.sample_ode), denoise=None), ["denoise=None", "True or False"]),
        (vp_call(inspect.unwrap(sd.sample_langevin), return_path="no"), ["return_path='no'", "True or False"]),
        (vp_call(sd.sample_langevin, step_size=None), ["step_size=None", "(0, 4)"]),
        (vp_call(sd.sample_pc, snr="a"), ["snr=a", "(0, 1)"]),
        (lambda: sd.sample_ode(None, SDES["vp"], jax.random.key(0), (4, 2)), ["score_fn=None", "(x (B, *event), t (B,)) -> (B, *event)"]),
        (lambda: sd.sample_ode(dict, SDES["vp"], jax.random.key(0), (4, 2)), ["score_fn=<class", "must be a function"]),
        (vp_call(sd.sample_adaptive, shape=(4,)), ["(4,)", "(batch, *event)"]),
        (vp_call(method="dpmpp2m"), ["did you mean 'dpmpp_2m'?"]),
        (lambda: check_state(None, SDES["vp"], 0, (2, 2), None), ["key=0", "jax.random.key(0)"]),
        (lambda: check_state(None, SDES["vp"], None, (2, 2), None), ["key=None", "jax.random.key(0)"]),
        (lambda: check_shape(jax.random.key(0)), ["shape=", "(batch, *event)"]),
        (lambda: inspect.unwrap(check_process)(None, sd.VP), ["sde=<class", "an SDE, as sd.VP()"]),
        (lambda: inspect.unwrap(check_process)(None, jnp.ones(2)), ["must be an SDE", "score_fn, sde, key"]),
        (vp_call(grid="cosine"), ["grid 'cosine'", "ahead, edm, log_snr, near, quadratic, student, tapered, uniform, wide"]),
        (vp_call(num_steps=0), ["num_steps=0", "at least 1"]),
        (vp_call(t_end=0.0), ["t_end=0.0", "t_train=1e-05", "t_max=1.0", "t_min=0.001"]),
        (vp_call(t_end=1.0), ["t_end=1.0", "VP"]),
        (vp_call(grid=jnp.array([0.1, 0.5, 1.0])), ["decreasing", "reverse"]),
        (vp_call(grid=jnp.array([1.0, 0.5, 0.5])), ["decreasing", "repeated"]),
        (lambda: resolve_grid(SDES["vp"], np.array([1.0, 0.5, 0.5 - 1e-10]), 2, None, 0.5, 1, True), ["decreasing", "repeated in float32"]),
        (vp_call(grid=jnp.array([1.0, np.nan])), ["grid holds NaN"]),
        (
            lambda: resolve_grid(SDES["vp"], ["edm", "uniform"], 2, None, 0.5, 1, True),
            ["1-D array of at least 2 decreasing times", "student"],
        ),
        (vp_call(grid=jnp.array([2.0, 0.5])), ["2", "outside", "VP", "1.0"]),
        (vp_call(grid=jnp.array([1.0, 0.0])), ["outside", "1e-05"]),
        (vp_call(grid=jnp.array([1.0])), ["(1,)", "at least 2"]),
        (vp_call(grid=jnp.array([0.5, 0.1])), ["starts at 0.5", "t_max=1.0", "pass init"]),
        (vp_call(grid=jnp.array([1.0, 0.5]), t_end=0.1), ["t_end=0.1", "pass one"]),
        (vp_call(grid=jnp.array([1.0, 0.5, 0.1]), num_steps=50), ["num_steps=50", "of 2 steps", "pass one"]),
        (vp_call(sd.sample_sde, grid=jnp.array([1.0, 0.5, 0.1]), num_steps=3), ["num_steps=3", "of 2 steps", "pass one"]),
        (vp_call(inspect.unwrap(sd.sample_adaptive), rtol=np.array([1e-3, 1e-2])), ["plain numbers"]),
        (lambda: check_state(None, SDES["vp"], jax.random.split(jax.random.key(0)), (2, 2), None), ["key=", "jax.random.key(0)"]),
        (vp_call(shape=(4,)), ["(4,)", "(batch, *event)"]),
        (vp_call(shape=(0, 2)), ["(0, 2)", "positive"]),
        (vp_call(init=jnp.ones((3, 2))), ["(3, 2)", "(2, 2)", "equal"]),
    ],
)
def test_bad_input_is_refused_before_compilation(call, words):
    """eval_shape traces and compiles nothing."""
    with pytest.raises(ValueError) as error:
        jax.eval_shape(call)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "sde",
    [sd.VP(beta_max=45.0), sd.VE(sigma_max=1e5), sd.CosineVP(t_max=0.99999)],
    ids=["vp", "ve", "cosine"],
)
@pytest.mark.parametrize("grid", ["uniform", "student"])
@pytest.mark.parametrize("method", ["adams", "dpmpp_3m", "dpmpp_3s", "unipc_3", "deis_3", "heun", "sa_solver", "sde_adams", "churned_heun"])
def test_log_snrs_below_minus_20_are_what_they_are(sde, grid, method):
    """The flow of one Gaussian from log-SNRs of -22 to -23: within 5% of its end's size (3% is Heun's, whose first step in
    uniform time goes from sigma / alpha = 63,000 to 64; the others' are below 2%). At -30 float32 rounds sigma / alpha = 3e6 to 0.2."""
    score_fn = sd.GaussianMixture.gaussian(np.array([MEAN]), np.array([[STD**2]])).score_fn(sde)
    init = sde.prior_sample(jax.random.key(7), (64, 1))
    run, level = (sd.sample_ode, {}) if method in ode.METHODS else (sd.sample_sde, {"noise_level": 0.0})
    x = run(
        score_fn, sde, jax.random.key(0), init.shape, init=init, method=method, num_steps=100, grid=grid, t_end=0.2, denoise=False, **level
    )
    exact = exact_flow(sde, init, sde.t_max, 0.2)
    assert np.abs(np.asarray(x) - exact).max() < 0.05 * np.abs(exact).max()


def test_a_grid_of_ones_own_and_its_number_of_steps():
    grid = jnp.array([1.0, 0.5, 0.1])
    for function in (sd.sample_ode, sd.sample_sde, sd.sample_pc):
        np.testing.assert_array_equal(vp_call(function, grid=grid, num_steps=2)(), vp_call(function, grid=grid)())


def test_the_snr_of_a_corrector_may_be_traced():
    score_fn, key = mixture().score_fn(SDES["vp"]), jax.random.key(0)
    sample = lambda snr: sd.sample_pc(score_fn, SDES["vp"], key, (4, 2), snr=snr, num_steps=3)  # noqa: E731
    np.testing.assert_allclose(jax.jit(sample)(0.16), sample(0.16), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sample", [sd.sample_ode, sd.sample_sde, sd.sample_pc])
def test_an_infinite_drift_is_refused(sample):
    option = {sd.sample_ode: {"method": "euler"}, sd.sample_sde: {}, sd.sample_pc: {"predictor": "euler"}}[sample]
    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(ValueError, match="needs alpha > 0.*zero terminal SNR.*'ddim'"):
            wrap(lambda key: sample(mixture().score_fn(ZERO_SNR), ZERO_SNR, key, (2, 2), **option))(jax.random.key(0))
