import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import SDES, ZERO_SNR, gaussian_kl, mixture, perturbed, standard_error

import sde_diffusion as sd
from sde_diffusion.losses import weighted_error
from sde_diffusion.weights import LOG_SNR_WEIGHTS, TIME_WEIGHTS

NAMES = sorted(SDES)
# Weights that grow without bound at the noisy end: times uniform in t see it too seldom.
STEEP_WEIGHTS = ("v_mse", "flow_matching", "indi")
LOSSES = {
    **{f"dsm_{w}": functools.partial(sd.dsm_loss, weighting=w) for w in ("sigma2", "likelihood")},
    "dsm_callable": functools.partial(sd.dsm_loss, weighting=lambda t: t**2),
    **{f"weighted_{w}": functools.partial(sd.weighted_loss, weight=w) for w in (*LOG_SNR_WEIGHTS, *TIME_WEIGHTS) if w not in STEEP_WEIGHTS},
    "weighted_callable": functools.partial(sd.weighted_loss, weight=lambda log_snr: jnp.exp(-(log_snr**2) / 8)),
}
# Two of them are one function.
STEEP = {f"weighted_{w}": functools.partial(sd.weighted_loss, weight=w) for w in ("v_mse", "indi")}
# A weight sees the process through lambda alone: all weights on one process, these on all of them.
CORE = ("dsm_sigma2", "dsm_likelihood", "dsm_callable", "weighted_elbo", "weighted_simple", "weighted_likelihood")
MATCHING = {"implicit": sd.implicit_loss, "sliced": sd.sliced_loss}
# A Gaussian of independent coordinates, and a network's error: what has closed forms.
MEAN, VARIANCE = np.array([0.5, -1.0, 0.2]), np.array([0.3, 1.0, 0.05])


def gaussian():
    return sd.GaussianMixture.gaussian(MEAN, np.diag(VARIANCE))


def chosen(name):
    return LOSSES if name in ("vp", "zero_snr") else {loss: LOSSES[loss] for loss in CORE}


def all_losses(score_fn, sde, key, x0, times, losses=LOSSES):
    """Each loss by name; inside one jit they share draws and evaluations."""
    return {name: loss(score_fn, sde, key, x0, times=times) for name, loss in losses.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_score_is_the_minimum_of_every_loss(name):
    """Every loss is a quadratic in the amount of an error: slope 0 at the exact score, and positive curvature.

    The slope is a mean over examples with its own standard error; its minimum must lie within 4 of them of zero, and
    they must be small (1/20 of the size of the error), or the test would say nothing.
    """
    sde, oracle, n = SDES[name], mixture(), 20_000
    key_x, key = jax.random.split(jax.random.key(0))
    x0 = oracle.sample(key_x, n)

    @jax.jit
    def values(amount):
        score_fn = perturbed(oracle.score_fn(sde), sde, amount)
        others = all_losses(score_fn, sde, key, x0, "log_snr", {**(STEEP if name == "vp" else {}), **MATCHING})
        return {**all_losses(score_fn, sde, key, x0, "uniform", chosen(name)), **others}

    at = {amount: values(jnp.asarray(amount)) for amount in (-1.0, 0.0, 1.0)}
    for loss in at[0.0]:
        minus, zero, plus = (np.asarray(at[a][loss], np.float64) for a in (-1.0, 0.0, 1.0))
        slope, curvature = (plus - minus) / 2, (plus + minus - 2 * zero).mean()
        assert curvature > 0, loss
        assert abs(slope.mean()) < 4 * standard_error(slope), loss
        assert standard_error(slope) / curvature < 0.05, loss


@pytest.mark.parametrize("times", ["uniform", "log_snr"])
@pytest.mark.parametrize("name", NAMES)
def test_elbo_weight_is_the_diffusion_term(name, times, x64):
    """For each clean x0, KL(q(x_min|x0) || p_min) = KL(q(x_max|x0) || p_max) + diffusion term: the chain rule of KL.

    Closed forms on Gaussian data, without a word of log-SNR or of time derivatives.
    """
    sde, n = SDES[name], 40_000
    x0 = gaussian().sample(jax.random.key(0), n)

    def kl_at(t):
        alpha, variance = float(sde.alpha(jnp.asarray(t))), float(sde.sigma(jnp.asarray(t))) ** 2
        return gaussian_kl(alpha * np.asarray(x0), variance, alpha * MEAN, alpha**2 * VARIANCE + variance)

    expected = kl_at(sde.t_train) - kl_at(sde.t_max)
    exact = gaussian().score_fn(sde)
    got = np.asarray(jax.jit(lambda key: sd.weighted_loss(exact, sde, key, x0, times=times))(jax.random.key(1)))
    # Per-example differences: the variance of x0 itself drops out.
    error = standard_error(got - expected)
    assert abs((got - expected).mean()) < 4 * error
    if times == "log_snr":
        assert error < 0.02 * expected.mean()


@pytest.mark.parametrize("name", NAMES)
def test_negative_log_likelihood_is_prior_plus_diffusion_plus_reconstruction(name, x64):
    """E[-log p(x_min)] of Gaussian data is its entropy; the ELBO's terms must add up to it."""
    sde, n = SDES[name], 40_000
    x0 = gaussian().sample(jax.random.key(2), n)
    t_min, t_max = jnp.asarray(sde.t_train), jnp.asarray(sde.t_max)
    exact = gaussian().score_fn(sde)
    loss = np.asarray(jax.jit(lambda key: sd.weighted_loss(exact, sde, key, x0, times="log_snr"))(jax.random.key(3)))
    alpha, sigma = float(sde.alpha(t_max)), float(sde.sigma(t_max))
    prior = gaussian_kl(alpha * np.asarray(x0), sigma**2, 0.0, float(sde.prior_std()) ** 2)
    noise_entropy = 1.5 * np.log(2 * np.pi * np.e * float(sde.sigma(t_min)) ** 2)
    variance = float(sde.alpha(t_min)) ** 2 * VARIANCE + float(sde.sigma(t_min)) ** 2
    entropy = 0.5 * np.log(2 * np.pi * np.e * variance).sum()
    total = loss + prior + noise_entropy
    # The prior stands for the marginal at t_max: what it costs is the KL between the two.
    mismatch = gaussian_kl(alpha * MEAN, alpha**2 * VARIANCE + sigma**2, 0.0, float(sde.prior_std()) ** 2)
    assert abs(total.mean() - entropy - mismatch) < 4 * standard_error(total)
    # Out of tens of nats.
    assert standard_error(total) < 0.3


@pytest.mark.parametrize("name", NAMES)
def test_the_elbo_of_an_error_is_its_integral(name, x64):
    """An error e(t) in eps adds 1/2 int (-dlambda/dt) |e|^2 dt: with |e|^2 = D, half the log-SNR's range a dimension."""
    sde, n = SDES[name], 20_000
    x0 = gaussian().sample(jax.random.key(4), n)
    exact = gaussian().score_fn(sde)
    constant = lambda x, t: exact(x, t) + 1 / sde.sigma(t)[:, None]  # noqa: E731
    ends = sde.log_snr(jnp.asarray([sde.t_train, sde.t_max]))
    values = jax.jit(lambda key: [sd.weighted_loss(f, sde, key, x0, times="log_snr") for f in (exact, constant)])(jax.random.key(5))
    difference = np.asarray(values[1] - values[0])
    assert abs(difference.mean() - 1.5 * float(ends[0] - ends[1])) < 4 * standard_error(difference)


@pytest.mark.parametrize("name", [*NAMES, "zero_snr"])
def test_both_ways_to_draw_times_estimate_the_same_numbers(name):
    """In float32, where every value must be finite at both ends too, zero terminal SNR included."""
    sde, n = {**SDES, "zero_snr": ZERO_SNR}[name], 20_000
    x0 = gaussian().sample(jax.random.key(6), n)
    exact = gaussian().score_fn(sde)
    # Half the exact score: an error at all noise levels.
    score_fn = lambda x, t: 0.5 * exact(x, t)  # noqa: E731

    def shrunk(x, t):
        """An error of x0_hat, so that the error of eps is small where alpha is, as it is for networks that predict x0 or v."""
        x0, _ = exact.predict(x, t)
        alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        return exact(x, t) - 0.5 * alpha / (alpha**2 + sigma**2) * x0

    def both(key, times):
        steep = STEEP if name in ("vp", "zero_snr") else {}
        return {**all_losses(score_fn, sde, key, x0, times, chosen(name)), **all_losses(shrunk, sde, key, x0, times, steep)}

    uniform, log_snr = (jax.jit(functools.partial(both, times=times))(jax.random.key(i)) for i, times in enumerate(("uniform", "log_snr")))
    for loss in uniform:
        a, b = (np.asarray(values[loss], np.float64) for values in (uniform, log_snr))
        assert np.isfinite([a, b]).all() and min(a.min(), b.min()) >= 0, loss
        assert abs(a.mean() - b.mean()) < 4 * np.hypot(standard_error(a), standard_error(b)), loss
    if name != "ve":
        # VE's log-SNR is linear in t: there the two ways are one.
        assert log_snr["weighted_elbo"].std() < 0.5 * uniform["weighted_elbo"].std()


def test_the_four_names_of_two_losses():
    """L_simple is sigma^2-weighted score matching, and the g^2 weight is the ELBO (arXiv:2101.09258)."""
    sde = SDES["vp"]
    x0, exact = gaussian().sample(jax.random.key(7), 500), gaussian().score_fn(SDES["vp"])
    value = jax.jit(lambda key: all_losses(exact, sde, key, x0, "uniform"))(jax.random.key(8))
    span = sde.t_max - sde.t_train
    np.testing.assert_allclose(value["weighted_simple"], value["weighted_sigma2"], rtol=1e-6)
    np.testing.assert_allclose(value["weighted_simple"], 0.5 * span * value["dsm_sigma2"], rtol=1e-5)
    np.testing.assert_allclose(value["weighted_likelihood"], value["weighted_elbo"], rtol=1e-4)
    np.testing.assert_allclose(value["weighted_elbo"], 0.5 * span * value["dsm_likelihood"], rtol=1e-4)


def test_event_axes_are_summed():
    """A score of zero leaves the squared norm of the noise: D on average, not 1."""
    for event in [(1,), (8, 8, 3)]:
        x0 = jnp.zeros((400, *event))
        loss = jax.jit(lambda x0: sd.dsm_loss(lambda x, t: jnp.zeros_like(x), SDES["vp"], jax.random.key(0), x0))(x0)
        dims = int(np.prod(event))
        assert loss.shape == (400,)
        # |eps|^2 has mean D and variance 2 D.
        assert abs(float(loss.mean()) - dims) < 4 * np.sqrt(2 * dims / 400)


def test_a_batch_of_one_and_returned_times():
    loss, t = sd.weighted_loss(gaussian().score_fn(SDES["vp"]), SDES["vp"], jax.random.key(0), jnp.zeros((1, 3)), return_times=True)
    assert loss.shape == t.shape == (1,) and 0 < float(t[0]) <= 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_data_keeps_float32_schedules(dtype):
    """Data in bfloat16, as a mixed-precision input pipeline hands out: loss and times in float32, and right."""
    x0 = jnp.full((20_000, 2), 0.5, dtype)
    exact = sd.GaussianMixture.gaussian(np.full(2, 0.5), 0.0 * np.eye(2)).score_fn(SDES["vp"])
    loss, t = sd.dsm_loss(exact, SDES["vp"], jax.random.key(0), x0, return_times=True)
    assert loss.dtype == t.dtype == jnp.float32
    # Data at a point: the exact score leaves nothing of the noise.
    assert float(loss.mean()) < 1e-4


def test_jit_and_pmap_give_the_same_numbers():
    sde, oracle = SDES["vp"], mixture()
    keys = jax.random.split(jax.random.key(0), 8)
    x0 = oracle.sample(jax.random.key(1), 32).reshape(8, 4, 2)

    def loss(key, x0):
        return sd.weighted_loss(oracle.score_fn(sde), sde, key, x0)

    one_by_one = np.stack([jax.jit(loss)(k, x) for k, x in zip(keys, x0)])
    np.testing.assert_allclose(jax.pmap(loss)(keys, x0), one_by_one, rtol=1e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda f, s, k, x: sd.dsm_loss(f, s, k, x, weighting="g2"), ["'g2'", "likelihood, sigma2"]),
        (lambda f, s, k, x: sd.dsm_loss(f, s, k, x, weighting="elbo"), ["'elbo'", "likelihood, sigma2"]),
        (
            lambda f, s, k, x: sd.weighted_loss(f, s, k, x, weight="snr"),
            ["'snr'", "edm, elbo, flow_matching, indi, likelihood, min_snr, p2, sigma2, sigmoid, simple, simple_cosine, v_mse"],
        ),
        (lambda f, s, k, x: sd.weighted_loss(f, s, k, x, times="cosine"), ["'cosine'", "'uniform'", "'log_snr'"]),
        # The function that both share, because jaxtyping would stop it at the public ones under pytest.
        (lambda f, s, k, x: weighted_error(f, s, k, x.astype(jnp.uint8), "uniform", None, False), ["uint8", "scale it to float"]),
        (lambda f, s, k, x: sd.weighted_loss(f, s, k, x, weight=lambda l: l[:, None]), ["weight", "(2, 1)", "(2,)"]),
        (lambda f, s, k, x: sd.dsm_loss(f, s, k, x, weighting=lambda t: jnp.ones(5)), ["weighting", "(5,)", "(2,)"]),
        (lambda f, s, k, x: sd.weighted_loss(f, s, k, x, control=0.0), ["control=0.0", "standard deviation"]),
        (lambda f, s, k, x: sd.sliced_loss(f, s, k, x, probes=0), ["probes=0", "at least 1"]),
        (lambda f, s, k, x: sd.sliced_loss(f, s, k, x, probe="cauchy"), ["'cauchy'", "gaussian, rademacher"]),
        (lambda f, s, k, x: sd.implicit_loss(f, s, k, x, weighting="g2"), ["'g2'", "likelihood, sigma2"]),
        (lambda f, s, k, x: weighted_error(f, s, 0, x, "uniform", None, False), ["key=0", "jax.random.key(0)"]),
        (lambda f, s, k, x: weighted_error(f, sd.VP, k, x, "uniform", None, False), ["sde=<class", "an SDE, as sd.VP()"]),
    ],
)
def test_bad_input_is_refused_while_tracing(call, words):
    with pytest.raises(ValueError) as error:
        jax.eval_shape(lambda: call(lambda x, t: -x, SDES["vp"], jax.random.key(0), jnp.zeros((2, 3))))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("times", "words"),
    [(np.arange(1000.0), "0 to 999, outside the range .*sde.levels"), (np.ones((2, 2)), r"\(2, 2\).*1-D"), (np.ones(0), "1-D")],
)
def test_levels_outside_the_process_are_refused(times, words):
    """The usual slip: numbers of levels in place of times."""
    for loss in (sd.dsm_loss, sd.weighted_loss):
        with pytest.raises(ValueError, match=words):
            loss(lambda x, t: -x, sd.DDPM(), jax.random.key(0), jnp.ones((4, 3)), times=times)


@pytest.mark.parametrize("name", NAMES)
def test_the_control_changes_the_variance_and_nothing_else(name):
    """Same draws: the difference has mean 0 within its standard error, the gradient is the same, the variance smaller."""
    sde, oracle, n = SDES[name], mixture(), 10_000
    x0 = oracle.sample(jax.random.key(0), n)

    @jax.jit
    def values(amount, key):
        def loss(amount, control):
            each = sd.weighted_loss(perturbed(oracle.score_fn(sde), sde, amount), sde, key, x0, times="log_snr", control=control)
            return each.mean(), each

        return [jax.value_and_grad(loss, has_aux=True)(amount, control) for control in (None, 0.9)]

    ((_, plain), slope), ((_, controlled), same_slope) = values(jnp.asarray(0.0), jax.random.key(1))
    assert abs(float((controlled - plain).mean())) < 4 * standard_error(controlled - plain)
    np.testing.assert_allclose(same_slope, slope, rtol=1e-4)
    # What is left is the loss's own change with t, which stratified times take out, and with x0.
    assert controlled.var() < 0.9 * plain.var()
