import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from oracle import SDES, ZERO_SNR, mixture, moment_z_scores

import sde_diffusion as sd

NAMES = sorted(SDES)
TIMES = (1e-3, 0.1, 0.5, 0.9)


def scipy_marginal(sde, t):
    """The density of alpha x0 + sigma eps by scipy, from the mixture's own parameters."""
    weights, means = np.array([0.3, 0.7]), np.array([[1.2, -0.5], [-0.8, 0.6]])
    covariances = np.array([[[0.3, 0.1], [0.1, 0.2]], [[0.5, -0.3], [-0.3, 0.4]]])
    alpha, sigma = (1.0, 0.0) if sde is None else (float(sde.alpha(t)), float(sde.sigma(t)))
    parts = [scipy.stats.multivariate_normal(alpha * m, alpha**2 * c + sigma**2 * np.eye(2)) for m, c in zip(means, covariances)]
    return lambda x: np.log(sum(w * p.pdf(x) for w, p in zip(weights, parts)))


def test_log_prob_is_scipys(x64):
    x = jax.random.normal(jax.random.key(0), (50, 2))
    np.testing.assert_allclose(mixture().log_prob(x), scipy_marginal(None, None)(np.asarray(x)), rtol=1e-9)
    for sde in SDES.values():
        for t in TIMES:
            expected = scipy_marginal(sde, jnp.asarray(t))(np.asarray(x))
            np.testing.assert_allclose(mixture().log_prob(x, sde, t), expected, rtol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_log_prob_integrates_to_one(name, x64):
    oracle = sd.GaussianMixture(np.array([2.0, 6.0]), np.array([[1.0], [-2.0]]), np.array([[[0.1]], [[0.4]]]))
    sde = SDES[name]
    for t in TIMES:
        width = 12 * np.sqrt(float(sde.alpha(jnp.asarray(t))) ** 2 + float(sde.sigma(jnp.asarray(t))) ** 2)
        x = np.linspace(-width, width, 20_001)
        density = np.exp(oracle.log_prob(jnp.asarray(x)[:, None], sde, t))
        np.testing.assert_allclose(scipy.integrate.simpson(density, x=x), 1, rtol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", NAMES)
def test_score_is_the_gradient_of_log_prob(name, dtype, x64):
    """At all noise levels, at points drawn from the marginal; each precision against autodiff in float64."""
    sde, oracle = SDES[name], mixture()
    t = jnp.repeat(jnp.geomspace(sde.t_train, sde.t_max, 8), 8)
    x = sde.perturb(oracle.sample(jax.random.key(0), 64), jax.random.normal(jax.random.key(1), (64, 2)), t)
    x, t = x.astype(jnp.float32), t.astype(jnp.float32)
    exact = jax.grad(lambda x: oracle.log_prob(x, sde, t.astype(jnp.float64)).sum())(x.astype(jnp.float64))
    if dtype == jnp.float32:
        oracle = jax.tree.map(lambda a: a.astype(jnp.float32), oracle)
    got = oracle.score_fn(sde)(x.astype(dtype), t.astype(dtype))
    assert got.dtype == dtype
    scale = np.asarray(jnp.linalg.norm(exact, axis=1, keepdims=True))
    np.testing.assert_allclose(got / scale, exact / scale, atol=1e-9 if dtype == jnp.float64 else 5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_predict_is_tweedies_formula(name, x64):
    """E[x0 | x_t] = (x + sigma^2 grad log p_t) / alpha, by autodiff of the density."""
    sde, oracle = SDES[name], mixture()
    t = jnp.linspace(0.01, sde.t_max, 30)
    x = sde.perturb(oracle.sample(jax.random.key(0), 30), jax.random.normal(jax.random.key(1), (30, 2)), t)
    gradient = jax.grad(lambda x: oracle.log_prob(x, sde, t).sum())(x)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    x0, eps = oracle.score_fn(sde).predict(x, t)
    np.testing.assert_allclose(x0, (x + sigma**2 * gradient) / alpha, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(eps, -sigma * gradient, rtol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_posterior_mean_by_monte_carlo(name):
    """E[(x0 - x0_hat) h(x_t)] = 0 for any h: what a conditional expectation is."""
    sde, oracle, n = SDES[name], mixture(), 100_000
    x0 = oracle.sample(jax.random.key(2), n)
    t = jnp.full(n, 0.35)
    x = sde.perturb(x0, jax.random.normal(jax.random.key(3), x0.shape), t)
    residual = x0 - oracle.score_fn(sde).predict(x, t)[0]
    for h in (jnp.ones_like(x), x / x.std(), jnp.tanh(x[:, ::-1])):
        product = np.asarray(residual * h)
        assert (np.abs(product.mean(0)) < 4 * product.std(0) / np.sqrt(n)).all()


def test_zero_terminal_snr():
    """At alpha = 0 nothing is known of x0: its mean, and the score of a standard normal."""
    oracle = mixture()
    x, t = jax.random.normal(jax.random.key(0), (5, 2)), jnp.ones(5)
    x0, eps = oracle.score_fn(ZERO_SNR).predict(x, t)
    np.testing.assert_allclose(x0, np.broadcast_to(oracle.mean(), (5, 2)), rtol=1e-5)
    np.testing.assert_allclose(eps, x, rtol=1e-6)


def test_samples_have_the_moments():
    oracle = mixture()
    x = np.asarray(oracle.sample(jax.random.key(4), 100_000))
    assert np.abs(moment_z_scores(x, oracle.mean(), oracle.covariance())).max() < 4
    # And the whole distribution: E[log p] differs from a quadrature by its own standard error.
    grid = np.linspace(-6, 6, 601)
    points = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    log_p = scipy_marginal(None, None)(points)
    expected = (np.exp(log_p) * log_p).sum() * (grid[1] - grid[0]) ** 2
    got = np.asarray(oracle.log_prob(jnp.asarray(x)))
    assert abs(got.mean() - expected) < 4 * got.std() / np.sqrt(len(x))


def test_moments_against_numpy(x64):
    """Of 20 components in 5 dimensions: E[x] and E[x x^T], component by component."""
    rng = np.random.default_rng(0)
    weights, means = rng.uniform(1, 2, 20), rng.normal(size=(20, 5))
    roots = rng.normal(size=(20, 5, 5))
    oracle = sd.GaussianMixture(weights, means, roots @ roots.transpose(0, 2, 1))
    probability = weights / weights.sum()
    second = sum(p * (r @ r.T + np.outer(m, m)) for p, r, m in zip(probability, roots, means))
    mean = sum(p * m for p, m in zip(probability, means))
    np.testing.assert_allclose(oracle.mean(), mean, rtol=1e-9)
    np.testing.assert_allclose(oracle.covariance() + np.outer(mean, mean), second, rtol=1e-9)


def test_degenerate_covariances_are_points():
    """Data at two points: the posterior mean is one of them once the noise is small."""
    oracle = sd.GaussianMixture(np.ones(2), np.array([[1.0, 0.0], [-1.0, 0.0]]), np.zeros((2, 2, 2)))
    sde = SDES["vp"]
    x = sde.perturb(oracle.means, jnp.ones((2, 2)), jnp.full(2, 1e-3))
    x0, _ = oracle.score_fn(sde).predict(x, jnp.full(2, 1e-3))
    np.testing.assert_allclose(x0, oracle.means, atol=1e-6)


def test_a_pytree_under_every_transformation():
    oracle, sde = mixture(), SDES["vp"]
    x, t = jax.random.normal(jax.random.key(0), (8, 2)), jnp.linspace(0.1, 0.9, 8)
    expected = oracle.score_fn(sde)(x, t)
    np.testing.assert_allclose(jax.jit(lambda o, x, t: o.score_fn(sde)(x, t))(oracle, x, t), expected, rtol=1e-5)
    one_by_one = jax.vmap(lambda x, t: oracle.score_fn(sde)(x[None], t[None])[0])(x, t)
    np.testing.assert_allclose(one_by_one, expected, rtol=1e-4, atol=1e-5)
    sharded = jax.pmap(oracle.score_fn(sde))(x[:, None], t[:, None])[:, 0]
    np.testing.assert_allclose(sharded, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.ones(2), np.zeros((1, 2)), np.eye(2)[None]), ["(2,)", "(1, 2)", "(1, 2, 2)"]),
        ((np.ones(1), np.zeros(2), np.eye(2)[None]), ["means (K, D)", "(2,)"]),
        ((np.array([1.0, 0.0]), np.zeros((2, 1)), np.ones((2, 1, 1))), ["positive", "weight 0"]),
        ((np.ones(1), np.zeros((1, 2)), np.array([[[1.0, 0.5], [0.0, 1.0]]])), ["symmetric", "(C + C^T) / 2"]),
        ((np.ones(1), np.zeros((1, 2)), np.array([[[1.0, 2.0], [2.0, 1.0]]])), ["semi-definite", "-1"]),
    ],
)
def test_bad_parameters_are_refused(arguments, words):
    with pytest.raises(ValueError) as error:
        sd.GaussianMixture(*arguments)
    assert all(word in str(error.value) for word in words)
