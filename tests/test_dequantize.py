import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import sde_diffusion as sd
from sde_diffusion.data import Scaler

LEVELS, WEIGHTS, MEANS, STDS = 5, np.array([0.4, 0.6]), np.array([-0.5, 0.3]), np.array([0.2, 0.35])


def mixture(alpha=1.0, sigma=0.0):
    """The 1-D mixture after x -> alpha x + sigma eps."""
    variances = (alpha * STDS) ** 2 + sigma**2
    return sd.GaussianMixture(WEIGHTS, alpha * MEANS[:, None], variances[:, None, None])


def cell_probabilities(alpha=1.0, sigma=0.0):
    """Of the cells of the levels, each alpha times as wide as in model space, in closed form."""
    edges = alpha * (2 * np.arange(LEVELS + 1) / LEVELS - 1)
    stds = np.hypot(alpha * STDS, sigma)
    return np.diff(special.ndtr((edges[:, None] - alpha * MEANS) / stds) @ WEIGHTS)


def draws(dequantize, log_prob, n=20_000):
    """log p - log q of n draws for each level, `(L, n)`."""
    levels = np.repeat(np.arange(LEVELS), n)[:, None]
    x, log_q = dequantize(jax.random.key(0), levels)
    return np.asarray(log_prob(x) - log_q, np.float64).reshape(LEVELS, n), np.asarray(x), levels


def check(gain, probabilities):
    """Each level's mean is a bound, and its importance-weighted mean the probability within 4 of its standard errors."""
    n = gain.shape[1]
    assert (gain.mean(1) < np.log(probabilities) + 4 * gain.std(1) / np.sqrt(n)).all()
    ratio = np.exp(gain)
    assert (np.abs(ratio.mean(1) - probabilities) < 4 * ratio.std(1) / np.sqrt(n)).all()


@pytest.mark.parametrize("centered", [True, False])
def test_uniform(centered):
    scaler = Scaler(LEVELS, centered)
    gain, x, levels = draws(
        lambda key, k: sd.uniform_dequantize(scaler, key, k),
        # Model space [0, 1] is the image of [-1, 1] by a map of slope 1/2.
        (lambda x: mixture().log_prob(x)) if centered else (lambda x: mixture().log_prob(2 * x - 1) + np.log(2)),
    )
    check(gain, cell_probabilities())
    np.testing.assert_array_equal(scaler.decode(x), levels)


def test_uniform_is_what_the_scaler_counts():
    scaler, levels = Scaler(17), np.zeros((3, 8, 8, 1), int)
    _, log_q = sd.uniform_dequantize(scaler, jax.random.key(0), levels)
    log_p = jnp.asarray([10.0, 20.0, -5.0])
    np.testing.assert_allclose(sd.discrete_bits_per_dim(log_p, log_q, 64), scaler.bits_per_dim(log_p, 64), rtol=1e-5)


@pytest.mark.parametrize("t_end", [1e-3, 0.1])
def test_truncated_normal(t_end):
    """Under noise much narrower than a cell, and wider than it."""
    sde, scaler = sd.VP(), Scaler(LEVELS)
    alpha, sigma = float(sde.alpha(t_end)), float(sde.sigma(t_end))
    noisy = mixture(alpha, sigma)
    gain, x, levels = draws(lambda key, k: sd.truncated_normal_dequantize(scaler, sde, key, k, t_end), noisy.log_prob)
    if t_end == 0.1:
        check(gain, cell_probabilities(alpha, sigma))
    else:
        # The ratio's variance is huge there; it is a bound all the same.
        assert (gain.mean(1) < np.log(cell_probabilities(alpha, sigma))).all()
    np.testing.assert_array_equal(scaler.decode(x / alpha), levels)
    z = (x - alpha * np.asarray(scaler.encode(levels))) / sigma
    if t_end == 1e-3:
        assert abs(z.std() - 1) < 4 / np.sqrt(2 * len(z))


def test_truncated_normal_through_the_likelihood():
    """log p at t_end by the ODE, of the state that the draw is: the same bound."""
    sde, scaler, t_end = sd.VP(beta_max=40.0), Scaler(LEVELS), 0.1
    score_fn = mixture().score_fn(sde)
    gain, _, _ = draws(
        lambda key, k: sd.truncated_normal_dequantize(scaler, sde, key, k, t_end),
        lambda x: sd.log_likelihood(score_fn, sde, None, x, trace="exact", t_end=t_end, num_steps=60),
        n=400,
    )
    check(gain, cell_probabilities(float(sde.alpha(t_end)), float(sde.sigma(t_end))))


def test_variational():
    """A place for each level, learned by the bound's gradient: tighter than uniform, and still a bound."""
    scaler, oracle = Scaler(LEVELS), mixture()
    levels = np.repeat(np.arange(LEVELS), 200)[:, None]

    def draw(params, key, levels):
        def network(y):
            index = jnp.round((y + 1) * LEVELS / 2 - 0.5).astype(int)
            return params["mean"][index], params["log_std"][index]

        return sd.variational_dequantize(scaler, network, key, levels)

    def loss(params, key):
        x, log_q = draw(params, key, levels)
        return (log_q - oracle.log_prob(x)).mean()

    @jax.jit
    def descend(params, key):
        return jax.tree.map(lambda p, g: p - 2.0 * g, params, jax.grad(loss)(params, key))

    params = {"mean": jnp.zeros(LEVELS), "log_std": jnp.full(LEVELS, 0.5)}
    for i in range(300):
        params = descend(params, jax.random.key(i))
    gain, x, levels = draws(lambda key, k: draw(params, key, k), oracle.log_prob)
    uniform = draws(lambda key, k: sd.uniform_dequantize(scaler, key, k), oracle.log_prob)[0]
    probabilities = cell_probabilities()
    check(gain, probabilities)
    gap, uniform_gap = (np.log(probabilities) - g.mean(1) for g in (gain, uniform))
    assert gap.mean() < 0.75 * uniform_gap.mean()
    np.testing.assert_array_equal(scaler.decode(x), levels)


@pytest.mark.parametrize(
    ("scaler", "levels", "words"),
    [
        (Scaler(None), [[0]], ["num_levels=None", "vectors"]),
        (Scaler(17), [[17]], ["17", "one of 0..16", "num_levels"]),
        (Scaler(17), [[-1]], ["-1", "one of 0..16"]),
    ],
)
def test_bad_input(scaler, levels, words):
    calls = [
        lambda key, k: sd.uniform_dequantize(scaler, key, k),
        lambda key, k: sd.truncated_normal_dequantize(scaler, sd.VP(), key, k),
        lambda key, k: sd.variational_dequantize(scaler, lambda y: (y, y), key, k),
    ]
    for call in calls:
        with pytest.raises(ValueError) as error:
            call(jax.random.key(0), np.array(levels))
        assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("levels", [np.array([[17, 300, -5]]), np.linspace(0, 1, 17)[None], np.array([[np.nan]]), jnp.asarray([[17]])])
def test_a_scaler_refuses_what_are_not_its_levels(levels):
    scaler, key = Scaler(17), jax.random.key(0)
    for call in (scaler.encode, lambda k: scaler.dequantize(key, k), lambda k: sd.uniform_dequantize(scaler, key, k)):
        with pytest.raises(ValueError, match=r"levels hold .*, which is not one of 0..16: pass the integer levels"):
            call(levels)
