import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import SDES, ZERO_SNR, gaussian_kl, mixture

import sde_diffusion as sd
from sde_diffusion.losses import LOG_SNR_WEIGHTS, TIME_WEIGHTS, _loss, loss_weight

NAMES = sorted(SDES)
LOSSES = {
    **{f"dsm_{w}": functools.partial(sd.dsm_loss, weighting=w) for w in ("sigma2", "likelihood")},
    "dsm_callable": functools.partial(sd.dsm_loss, weighting=lambda t: t**2),
    **{f"weighted_{w}": functools.partial(sd.weighted_loss, weight=w) for w in (*LOG_SNR_WEIGHTS, *TIME_WEIGHTS)},
    "weighted_callable": functools.partial(sd.weighted_loss, weight=lambda log_snr: jnp.exp(-(log_snr**2) / 8)),
}
# A Gaussian of independent coordinates, and a network's error: what has closed forms.
MEAN, VARIANCE = np.array([0.5, -1.0, 0.2]), np.array([0.3, 1.0, 0.05])


def gaussian():
    return sd.GaussianMixture.gaussian(MEAN, np.diag(VARIANCE))


def standard_error(values):
    values = np.asarray(values, np.float64)
    return values.std() / np.sqrt(len(values))


def perturbed(exact, sde, amount):
    """The exact score plus amount times a smooth error that grows as the score does, 1 / sigma."""
    def score_fn(x, t):
        scale = jnp.sqrt(sde.alpha(t) ** 2 + sde.sigma(t) ** 2)[:, None]
        return exact(x, t) + amount * (jnp.sin(2 * x / scale) + 0.3) / sde.sigma(t)[:, None]

    return score_fn


def all_losses(score_fn, sde, key, x0, times):
    """Each loss by name; inside one jit they share draws and evaluations."""
    return {name: loss(score_fn, sde, key, x0, times=times) for name, loss in LOSSES.items()}


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
        return all_losses(perturbed(oracle.score_fn(sde), sde, amount), sde, key, x0, "uniform")

    at = {amount: values(jnp.asarray(amount)) for amount in (-1.0, 0.0, 1.0)}
    for loss in LOSSES:
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
    values = jax.jit(
        lambda key: [sd.weighted_loss(f, sde, key, x0, times="log_snr") for f in (exact, constant)]
    )(jax.random.key(5))
    difference = np.asarray(values[1] - values[0])
    assert abs(difference.mean() - 1.5 * float(ends[0] - ends[1])) < 4 * standard_error(difference)


@pytest.mark.parametrize("name", [*NAMES, "zero_snr"])
def test_both_ways_to_draw_times_estimate_the_same_numbers(name):
    """In float32, where every value must be finite at both ends too, zero terminal SNR included."""
    sde, n = {**SDES, "zero_snr": ZERO_SNR}[name], 20_000
    x0 = gaussian().sample(jax.random.key(6), n)
    # Half the exact score: an error at all noise levels.
    score_fn = lambda x, t: 0.5 * gaussian().score_fn(sde)(x, t)  # noqa: E731
    uniform, log_snr = (
        jax.jit(lambda key, times=times: all_losses(score_fn, sde, key, x0, times))(jax.random.key(i))
        for i, times in enumerate(("uniform", "log_snr"))
    )
    for loss in LOSSES:
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


def test_edm_weight_is_edms_loss(x64):
    """EDM draws log sigma ~ N(-1.2, 1.2^2) and weighs |D - x0|^2 by (sigma^2 + 1/4) / (sigma / 2)^2 (arXiv:2206.00364).

    Of a VE process, against that description by Monte-Carlo; the two differ by a constant of proportionality.
    """
    sde, n = sd.VE(sigma_min=2e-3, sigma_max=80.0), 100_000
    x0 = 0.5 * jax.random.normal(jax.random.key(0), (n, 1))
    ratios = []
    for shift in (0.0, 1.0):
        # The optimal denoiser of N(0, 1/4), its noise level misjudged by the shift.
        def denoise(x, sigma, shift=shift):
            return 0.25 / (0.25 + sigma**2) * x + shift * 0.3 * jnp.tanh(sigma)

        def score_fn(x, t, denoise=denoise):
            sigma = sde.sigma(t)[:, None]
            return (denoise(x, sigma) - x) / sigma**2

        sigma = jnp.exp(-1.2 + 1.2 * jax.random.normal(jax.random.key(1), (n, 1)))
        noisy = x0 + sigma * jax.random.normal(jax.random.key(2), (n, 1))
        theirs = (sigma**2 + 0.25) / (sigma / 2) ** 2 * (denoise(noisy, sigma) - x0) ** 2
        ours = sd.weighted_loss(score_fn, sde, jax.random.key(3), x0, weight="edm", times="log_snr")
        ratio = float(ours.mean() / theirs.mean())
        relative = np.hypot(standard_error(ours) / float(ours.mean()), standard_error(theirs[:, 0]) / float(theirs.mean()))
        ratios.append((ratio, relative * ratio))
    (a, error_a), (b, error_b) = ratios
    assert abs(a - b) < 4 * np.hypot(error_a, error_b) < 0.1 * a


def test_sigmoid_weight_is_monotone_and_half_at_two(x64):
    density = loss_weight("sigmoid")
    sde = SDES["cosine"]
    t = jnp.linspace(0.05, 0.95, 50)
    weight = np.asarray(density(sde, t) / -jax.vmap(jax.grad(sde.log_snr))(t))
    assert (np.diff(weight) > 0).all()
    at_two = sde.time(jnp.asarray(2.0))
    np.testing.assert_allclose(density(sde, at_two) / -jax.grad(sde.log_snr)(at_two), 0.5, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 5, 100, 1000])
def test_times_are_low_discrepancy(n):
    """One time in each n-th of the range, exactly n of them, for any n (1 / n summed up would give n + 1 for some)."""
    sde = SDES["vp"]
    t, weight = sd.sample_times(jax.random.key(n), n, sde)
    assert t.shape == weight.shape == (n,)
    cells = np.floor((np.sort(t) - sde.t_train) / (sde.t_max - sde.t_train) * n)
    # A time on the border of two cells may round into either.
    assert np.abs(cells - np.arange(n)).max() <= 1 and len(np.unique(np.asarray(t))) == n
    gaps = np.diff(np.sort(t))
    np.testing.assert_allclose(gaps, (sde.t_max - sde.t_train) / n, rtol=1e-3)


@pytest.mark.parametrize("times", ["uniform", "log_snr"])
@pytest.mark.parametrize("name", NAMES)
def test_times_integrate_functions(name, times, x64):
    """E[weight h(t)] is the integral of h over [t_train, t_max]."""
    sde = SDES[name]
    t, weight = sd.sample_times(jax.random.key(0), 20_000, sde, times)
    assert (t >= sde.t_train).all() and (t <= sde.t_max).all()
    for power in (0, 1, 3):
        exact = (sde.t_max ** (power + 1) - sde.t_train ** (power + 1)) / (power + 1)
        # A stratified sum is as exact as a rectangle rule; of the log-SNR, its largest weight divided by n.
        tolerance = float(weight.max()) / len(t)
        assert abs(float((weight * t**power).mean()) - exact) < tolerance


def test_each_time_is_uniform_on_its_own():
    """Stratified over the batch, but every example sees all times: by the mean and variance over many keys."""
    keys = jax.random.split(jax.random.key(0), 4000)
    t = np.asarray(jax.vmap(lambda k: sd.sample_times(k, 3, SDES["ve"])[0])(keys))
    # Standard errors of the mean (1/sqrt(12 n)) and of the variance (1/sqrt(180 n)) of n uniform numbers.
    assert (np.abs(t.mean(0) - 0.5) < 4 / np.sqrt(12 * 4000)).all()
    assert (np.abs(t.var(0) - 1 / 12) < 4 / np.sqrt(180 * 4000)).all()


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
    loss, t = sd.weighted_loss(
        gaussian().score_fn(SDES["vp"]), SDES["vp"], jax.random.key(0), jnp.zeros((1, 3)), return_times=True
    )
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
            ["'snr'", "edm, elbo, likelihood, sigma2, sigmoid, simple"],
        ),
        (lambda f, s, k, x: sd.weighted_loss(f, s, k, x, times="cosine"), ["'cosine'", "'uniform'", "'log_snr'"]),
        # The function that both share, because jaxtyping would stop it at the public ones under pytest.
        (lambda f, s, k, x: _loss(f, s, k, x.astype(jnp.uint8), "uniform", None, False), ["uint8", "scale it to float"]),
    ],
)
def test_bad_input_is_refused_while_tracing(call, words):
    with pytest.raises(ValueError) as error:
        jax.eval_shape(
            lambda: call(lambda x, t: -x, SDES["vp"], jax.random.key(0), jnp.zeros((2, 3)))
        )
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


def test_the_edm_weight_is_finite_at_zero_snr():
    weight = LOG_SNR_WEIGHTS["edm"]
    # N(lambda; 2.4, 2.4^2) (e^-lambda + 1/4) / (1/4), written out at two noise levels.
    for log_snr in (-3.0, 1.0):
        normal = np.exp(-0.5 * ((log_snr - 2.4) / 2.4) ** 2) / (2.4 * np.sqrt(2 * np.pi))
        np.testing.assert_allclose(weight(jnp.asarray(log_snr)), normal * (4 * np.exp(-log_snr) + 1), rtol=1e-5)
    assert weight(jnp.asarray(-jnp.inf)) == 0
