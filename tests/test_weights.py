import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import SDES, ZERO_SNR, mixture, standard_error

import sde_diffusion as sd
from sde_diffusion.weights import LOG_SNR_WEIGHTS, TIME_WEIGHTS, loss_weight, min_snr, p2


# The papers' losses, of one point x0 and what a network says of it: t uniform in (0, 1), arrays of float64.


def cosine(t):
    return np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)


def straight(t):
    return 1 - t, t


PUBLISHED = {
    # L_simple.
    "simple_cosine": (cosine, lambda a, s, x0, eps, x0_hat, eps_hat: (eps - eps_hat) ** 2),
    # L_simple over (k + SNR)^gamma, k = gamma = 1.
    "p2": (cosine, lambda a, s, x0, eps, x0_hat, eps_hat: (eps - eps_hat) ** 2 / (1 + a**2 / s**2)),
    # For a network that predicts x0 the paper's weight is min(SNR, 5).
    "min_snr": (cosine, lambda a, s, x0, eps, x0_hat, eps_hat: np.minimum(a**2 / s**2, 5) * (x0 - x0_hat) ** 2),
    # v = alpha eps - sigma x0.
    "v_mse": (cosine, lambda a, s, x0, eps, x0_hat, eps_hat: ((a * eps - s * x0) - (a * eps_hat - s * x0_hat)) ** 2),
    # The velocity of x_t = (1 - t) x0 + t eps is eps - x0.
    "flow_matching": (straight, lambda a, s, x0, eps, x0_hat, eps_hat: ((eps - x0) - (eps_hat - x0_hat)) ** 2),
    # x_t = (1 - t) x + t y, and the network predicts x.
    "indi": (straight, lambda a, s, x0, eps, x0_hat, eps_hat: (x0 - x0_hat) ** 2),
}
CENTRES = np.array([-7.0, -4.0, -2.0, 0.0, 1.0, 2.0, 4.0, 7.0])
POINT = 0.7


def test_every_weight_is_its_papers_loss(x64):
    """Of a network that is wrong near one noise level at a time, ours must be one constant times theirs at all of them.

    The data is one point, so the error of eps, a bump around lambda = c, is all of either loss, and both are integrals over t.
    """
    u = (np.arange(400_000) + 0.5) / 400_000
    sde = sd.CosineVP(t_max=0.9999)
    names = list(PUBLISHED)

    @jax.jit
    @jax.vmap
    def ours(centre):
        def score_fn(x, t):
            # eps_hat = eps + bump: eps follows from x, for data at one point.
            eps = (x - sde.alpha(t)[:, None] * POINT) / sde.sigma(t)[:, None]
            return -(eps + jnp.exp(-2 * (sde.log_snr(t) - centre) ** 2)[:, None]) / sde.sigma(t)[:, None]

        x0 = jnp.full((20_000, 1), POINT)
        return [sd.weighted_loss(score_fn, sde, jax.random.key(0), x0, weight=w, times="log_snr").mean() for w in names]

    got = np.stack(ours(jnp.asarray(CENTRES)))
    for row, (name, (path, loss)) in zip(got, PUBLISHED.items()):
        a, s = path(u)
        eps = np.random.default_rng(0).standard_normal(len(u))
        x = a * POINT + s * eps
        bump = np.exp(-2 * (2 * np.log(a / s) - CENTRES[:, None]) ** 2)
        eps_hat = eps + bump
        theirs = loss(a, s, POINT, eps, (x - s * eps_hat) / a, eps_hat).mean(axis=1)
        # Both are rectangle rules of smooth functions with thousands of points under the bump.
        np.testing.assert_allclose(row / theirs, row[3] / theirs[3], rtol=2e-3, err_msg=name)


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


def test_the_edm_weight_is_finite_at_zero_snr():
    weight = LOG_SNR_WEIGHTS["edm"]
    # N(lambda; 2.4, 2.4^2) (e^-lambda + 1/4) / (1/4), written out at two noise levels.
    for log_snr in (-3.0, 1.0):
        normal = np.exp(-0.5 * ((log_snr - 2.4) / 2.4) ** 2) / (2.4 * np.sqrt(2 * np.pi))
        np.testing.assert_allclose(weight(jnp.asarray(log_snr)), normal * (4 * np.exp(-log_snr) + 1), rtol=1e-5)
    assert weight(jnp.asarray(-jnp.inf)) == 0


@pytest.mark.parametrize("name", [*LOG_SNR_WEIGHTS, *TIME_WEIGHTS])
def test_weights_are_finite_at_both_ends(name):
    """In float32, at the first and last times of every process, t = 1 at zero terminal SNR included."""
    for sde in (*SDES.values(), ZERO_SNR):
        t = jnp.asarray([sde.t_train, 0.5, np.nextafter(np.float32(sde.t_max), 0), sde.t_max], jnp.float32)
        density = loss_weight(name)(sde, t)
        assert np.isfinite(density).all() and (density >= 0).all() and density[1] > 0, sde


def test_functions_of_lambda_far_out():
    """Products of what overflows and what vanishes: of the right limits at lambda = +-100, and never nan at +-inf."""
    ends = jnp.asarray([-jnp.inf, -100.0, 100.0, jnp.inf])
    for name, weight in LOG_SNR_WEIGHTS.items():
        values = np.asarray(weight(ends))
        assert not np.isnan(values).any(), name
        assert np.isfinite(values[2:]).all() and (name in ("v_mse", "flow_matching", "indi") or np.isfinite(values).all()), name
    # sech(50) = 2 e^-50.
    np.testing.assert_allclose(LOG_SNR_WEIGHTS["simple_cosine"](ends[1:3]), 2 * np.exp(-50.0), rtol=1e-5)
    np.testing.assert_allclose(LOG_SNR_WEIGHTS["indi"](ends[1]), 4 * np.exp(50.0), rtol=1e-5)


MONOTONE = {"elbo", "sigmoid", "v_mse", "flow_matching", "indi"}


def test_which_weights_are_monotone():
    """The column "monotonic" of the table of arXiv:2303.00848."""
    assert {name for name in LOG_SNR_WEIGHTS if sd.is_monotone(name)} == MONOTONE
    for sde in (SDES["vp"], SDES["ve"], ZERO_SNR):
        assert {name for name in LOG_SNR_WEIGHTS if sd.is_monotone(name, sde)} == MONOTONE
        assert sd.is_monotone("likelihood", sde)
    # 1 / beta rises where beta falls: never for VE, whose log-SNR is linear.
    assert sd.is_monotone("simple", SDES["ve"]) and not sd.is_monotone("simple", SDES["vp"])
    # Of the range that a process uses: sech falls where lambda > 0.
    assert sd.is_monotone("simple_cosine", sd.LinearLogSNR(log_snr_max=10.0, log_snr_min=0.5))
    assert sd.is_monotone(lambda l: jnp.exp(-l)) and not sd.is_monotone(lambda l: 1 + 0.01 * jnp.tanh(l))
    assert not sd.is_monotone(p2(0.5)) and not sd.is_monotone(min_snr(1.0))


def test_the_table_lists_every_weight():
    lines = sd.weights().splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*LOG_SNR_WEIGHTS, "simple", "likelihood"]
    for line in lines[1:-2]:
        assert ("  yes  " in line) == (line.split()[0] in MONOTONE)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sd.is_monotone("snr"), ["'snr'", "min_snr"]),
        (lambda: sd.is_monotone("simple"), ["'simple'", "is_monotone('simple', sde)"]),
        (lambda: sd.is_monotone(lambda l: l[:5]), ["(5,)", "(2001,)"]),
    ],
)
def test_bad_weights_are_refused(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def other_mixture():
    """What a model might have learned of `mixture()`."""
    return sd.GaussianMixture(
        np.array([0.5, 0.5]),
        np.array([[1.0, -0.2], [-0.5, 0.4]]),
        np.array([[[0.4, 0.0], [0.0, 0.3]], [[0.4, -0.1], [-0.1, 0.6]]]),
    )


def test_a_monotone_weight_is_the_elbo_of_noisy_data():
    """arXiv:2303.00848 theorem 1, of data from one mixture and a model that is another one.

    L_w = [w KL] at lambda_max - [w KL] at lambda_min + integral of p_w KL, p_w = -dw/dlambda >= 0 and KL = E KL(q(z_t|x) || p_t): what
    the ELBO of the noisy data is short of a constant, from log-densities alone; the loss is made of scores alone.
    """
    sde, model, n = SDES["vp"], other_mixture(), 20_000
    names = ("elbo", "sigmoid", "v_mse", "indi")
    x0 = mixture().sample(jax.random.key(0), n)
    log_snr = np.linspace(float(sde.log_snr(sde.t_max)), float(sde.log_snr(sde.t_train)), 201)

    @jax.jit
    def losses(key):
        score_fn = model.score_fn(sde)
        return [sd.weighted_loss(score_fn, sde, key, x0, weight=w, times="log_snr", control=0.9) for w in names]

    @jax.jit
    def divergences(key):
        def one(at):
            t, key = at
            eps = jax.random.normal(key, x0.shape)
            log_q = -0.5 * (eps**2).sum(axis=1) - 2 * jnp.log(sde.sigma(t)) - jnp.log(2 * jnp.pi)
            kl = log_q - model.log_prob(sde.alpha(t) * x0 + sde.sigma(t) * eps, sde, t)
            return kl.mean(), kl.var() / n

        return jax.lax.map(one, (sde.time(jnp.asarray(log_snr, jnp.float32)), jax.random.split(key, 201)))

    mean, variance = (np.asarray(v, np.float64) for v in divergences(jax.random.key(2)))
    for name, loss in zip(names, losses(jax.random.key(1))):
        w = np.asarray(LOG_SNR_WEIGHTS[name](log_snr), np.float64)
        p_w = -np.diff(w)
        assert (p_w >= 0).all(), name
        # Trapezoids of the cells: the coefficient of each node.
        coefficient = 0.5 * (np.append(p_w, 0) + np.insert(p_w, 0, 0))
        coefficient[-1] += w[-1]
        coefficient[0] -= w[0]
        right, error = coefficient @ mean, np.sqrt(coefficient**2 @ variance)
        left = float(np.asarray(loss, np.float64).mean())
        bound = 4 * np.hypot(error, standard_error(loss))
        assert abs(left - right) < bound < 0.1 * left, (name, left, right, bound)


def test_the_loss_depends_on_the_ends_of_the_schedule_alone():
    """arXiv:2303.00848 section 3: four processes from lambda = 9 to -8, one number each weight, within its standard error."""
    high, low, n = 9.0, -8.0, 20_000
    vp, cosine = sd.VP(), sd.CosineVP()

    def ends(sde):
        return {"t_train": float(sde.time(jnp.asarray(high))), "t_max": float(sde.time(jnp.asarray(low)))}

    processes = [
        sd.VP(t_min=0.1, **ends(vp)),
        sd.CosineVP(t_min=0.1, **ends(cosine)),
        sd.LinearLogSNR(log_snr_max=high, log_snr_min=low),
        sd.VE(sigma_min=np.exp(-high / 2), sigma_max=np.exp(-low / 2)),
    ]
    names = ("elbo", "sigmoid", "min_snr", "indi")
    x0, model = mixture().sample(jax.random.key(0), n), other_mixture()
    values = []
    for i, sde in enumerate(processes):
        losses = jax.jit(
            lambda key, sde=sde: [
                sd.weighted_loss(model.score_fn(sde), sde, key, x0, weight=w, times="log_snr", control=0.9) for w in names
            ]
        )(jax.random.key(10 + i))
        values.append([(float(v.mean()), standard_error(v)) for v in losses])
    for j, name in enumerate(names):
        first, error = values[0][j]
        for other, other_error in (v[j] for v in values[1:]):
            assert abs(other - first) < 4 * np.hypot(error, other_error) < 0.1 * first, name
