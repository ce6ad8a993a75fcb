import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import SDES, gaussian_kl, mixture

import sde_diffusion as sd
from sde_diffusion.bound import bound_gradients, check_values, prior_term, reconstruction_term
from sde_diffusion.data import Scaler
from sde_diffusion.sde import pytree_dataclass

PROCESSES = {**SDES, "linear": sd.LinearLogSNR(8.0, -6.0), "monotone": sd.MonotoneLogSNR(8.0, -6.0)}


def z_score(a, b):
    """Of the difference of two means of independent samples, in their standard errors."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a.mean() - b.mean()) / np.hypot(a.std() / np.sqrt(len(a)), b.std() / np.sqrt(len(b)))


def log_normal(z, mean, std):
    return np.sum(-0.5 * ((z - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi), axis=1)


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_every_term_with_the_exact_denoiser(name, x64):
    """Diffusion = KL(q(z_0|x) || p_0) - KL(q(z_1|x) || p_1), p the mixture's exact marginals, whose densities are known.

    Prior and reconstruction against draws of z and normal densities. A z-score under 4 each, of 20,000 examples.
    """
    sde, oracle, n = PROCESSES[name], mixture(), 20_000
    keys = jax.random.split(jax.random.key(0), 4)
    x0 = oracle.sample(keys[0], n)
    got = jax.jit(lambda key: sd.variational_bound(oracle.score_fn(sde), sde, key, x0))(keys[1])

    def draw(key, t):
        alpha, sigma = float(sde.alpha(jnp.asarray(t))), float(sde.sigma(jnp.asarray(t)))
        z = alpha * x0 + sigma * jax.random.normal(key, x0.shape)
        return np.asarray(z), log_normal(np.asarray(z), alpha * np.asarray(x0), sigma), alpha, sigma

    z, log_q, alpha, sigma = draw(keys[2], sde.t_train)
    start = log_q - np.asarray(oracle.log_prob(jnp.asarray(z), sde, sde.t_train))
    decoder = -log_normal(np.asarray(x0), z / alpha, sigma / alpha)
    z, log_q, _, _ = draw(keys[3], sde.t_max)
    end = log_q - np.asarray(oracle.log_prob(jnp.asarray(z), sde, sde.t_max))
    prior = log_q - np.asarray(sde.prior_log_prob(jnp.asarray(z)))
    assert abs(z_score(got.diffusion, start - end)) < 4
    assert abs(z_score(got.prior, prior)) < 4
    assert abs(z_score(got.reconstruction, decoder)) < 4
    # Their sum bounds the negative log-density of the noiseless data from above, and not by much.
    nll = -np.asarray(oracle.log_prob(x0))
    total = np.asarray(got.total)
    assert total.mean() > nll.mean() - 4 * total.std() / np.sqrt(n)


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_the_discrete_bound_is_a_kl_of_joint_gaussians(num_steps, x64):
    """q(z_0..z_T | x) and the model p(z_0..z_T), with an inexact linear denoiser, are jointly Gaussian: their KL by matrices."""
    sde, x, n = sd.VP(), 0.7, 200_000
    mean, variance = 0.2, 0.6

    def score_fn(z, t):
        alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        return -(z - alpha * mean) / (alpha**2 * variance + sigma**2)

    t = np.linspace(sde.t_train, sde.t_max, num_steps + 1)
    alpha, sigma = (np.asarray(f(jnp.asarray(t))) for f in (sde.alpha, sde.sigma))
    # Both as chains from z_T down: z_s = a z_t + b x + c noise, with b x by the denoiser in the model.
    mean_q, mean_p = np.zeros(num_steps + 1), np.zeros(num_steps + 1)
    root_q, root_p = np.zeros((2, num_steps + 1, num_steps + 1))
    mean_q[-1], root_q[-1, -1], root_p[-1, -1] = alpha[-1] * x, sigma[-1], 1.0
    for i in range(num_steps - 1, -1, -1):
        ratio = alpha[i + 1] / alpha[i]
        added = sigma[i + 1] ** 2 - ratio**2 * sigma[i] ** 2
        a, b = ratio * sigma[i] ** 2 / sigma[i + 1] ** 2, alpha[i] * added / sigma[i + 1] ** 2
        c = np.sqrt(added) * sigma[i] / sigma[i + 1]
        gain = variance * alpha[i + 1] / (alpha[i + 1] ** 2 * variance + sigma[i + 1] ** 2)
        mean_q[i], root_q[i] = a * mean_q[i + 1] + b * x, a * root_q[i + 1]
        mean_p[i] = (a + b * gain) * mean_p[i + 1] + b * (mean - gain * alpha[i + 1] * mean)
        root_p[i] = (a + b * gain) * root_p[i + 1]
        root_q[i, i] = root_p[i, i] = c
    cov_q, cov_p = root_q @ root_q.T, root_p @ root_p.T
    gap = mean_p - mean_q
    solved = np.linalg.solve(cov_p, np.concatenate([cov_q, gap[:, None]], axis=1))
    expected = 0.5 * (np.trace(solved[:, :-1]) + gap @ solved[:, -1] - len(t) + np.linalg.slogdet(cov_p)[1] - np.linalg.slogdet(cov_q)[1])
    bound = jax.jit(lambda key: sd.variational_bound(score_fn, sde, key, jnp.full((n, 1), x), num_steps=num_steps))(jax.random.key(1))
    values = np.asarray(bound.prior + bound.diffusion)
    assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(n)
    assert values.std() / np.sqrt(n) < 0.02 * expected


def test_more_steps_tighten_the_bound(x64):
    """L_T falls with T towards the bound in continuous time (arXiv:2107.00630 appendix F)."""
    sde, oracle, n = SDES["vp"], mixture(), 40_000
    x0 = oracle.sample(jax.random.key(0), n)
    means = [
        float(jax.jit(lambda key, T=T: sd.variational_bound(oracle.score_fn(sde), sde, key, x0, num_steps=T).diffusion.mean())(
            jax.random.key(1))) for T in (5, 20, 200, None)
    ]  # fmt: skip
    assert means[0] > means[1] > means[2] > means[3]
    assert means[2] - means[3] < 0.1 * (means[1] - means[3])


@pytest.mark.parametrize("levels", [2, 3, 17])
def test_the_reconstruction_of_levels_is_an_integral(levels, x64):
    """By quadrature over z for each level, at a noise that often confuses neighbours."""
    values = Scaler(levels).values()
    sde = sd.LinearLogSNR(2 * np.log(2.2 / (values[1] - values[0])), -6.0)
    n = 20_000
    truth = np.tile(np.arange(levels), n)
    got = np.asarray(reconstruction_term(sde, jax.random.key(0), jnp.asarray(values[truth], float)[:, None], values))
    std = float(np.exp(-0.5 * sde.log_snr(jnp.asarray(0.0))))
    z = np.linspace(values[0] - 9 * std, values[-1] + 9 * std, 20_001)
    exponent = -0.5 * ((z[:, None] - values) / std) ** 2
    density, log_p = np.exp(exponent), exponent - np.logaddexp.reduce(exponent, axis=1, keepdims=True)
    exact = -(density * log_p).sum(axis=0) * (z[1] - z[0]) / (std * np.sqrt(2 * np.pi))
    for level in range(levels):
        values_got = got[truth == level]
        assert abs(values_got.mean() - exact[level]) < 4 * values_got.std() / np.sqrt(n)
    assert exact.max() > 0.05


def test_the_prior_term_is_a_kl():
    x0 = jnp.asarray([[0.5, -1.0], [2.0, 0.0]])
    for sde in PROCESSES.values():
        alpha, sigma = float(sde.alpha(jnp.asarray(1.0 * sde.t_max))), float(sde.sigma(jnp.asarray(1.0 * sde.t_max)))
        expected = gaussian_kl(alpha * np.asarray(x0, np.float64), sigma**2, 0.0, float(sde.prior_std()) ** 2)
        np.testing.assert_allclose(prior_term(sde, x0), expected, rtol=1e-3, atol=2e-6)


def bent():
    """A monotone schedule that is far from linear."""
    sde = sd.MonotoneLogSNR(8.0, -6.0)
    height = sde.network["height"] + np.where(sde.network["place"] > 0.6, 3.0, 0.0).astype(np.float32)
    return dataclasses.replace(sde, network={**sde.network, "height": height})


def test_schedules_fall_and_keep_their_ends(x64):
    t = jnp.linspace(0.0, 1.0, 1001)
    for sde in (sd.LinearLogSNR(9.0, -7.0), dataclasses.replace(bent(), log_snr_max=9.0, log_snr_min=-7.0)):
        log_snr = np.asarray(sde.log_snr(t))
        assert log_snr[0] == pytest.approx(9.0) and log_snr[-1] == pytest.approx(-7.0) and (np.diff(log_snr) < 0).all()
        np.testing.assert_allclose(sde.alpha(t) ** 2 + sde.sigma(t) ** 2, 1, rtol=1e-12)
        np.testing.assert_allclose(sde.time(sde.log_snr(t)), t, atol=1e-9)


def test_the_interior_does_not_change_the_bound(x64):
    """Only the end points do (arXiv:2107.00630 section 5.1): linear and bent schedules give one number, under a wrong score."""
    oracle, n = mixture(), 40_000
    x0 = oracle.sample(jax.random.key(0), n)
    values = []
    for i, sde in enumerate((sd.LinearLogSNR(8.0, -6.0), bent())):
        score_fn = lambda x, t, sde=sde: 0.8 * oracle.score_fn(sde)(x, t)  # noqa: E731
        values.append(jax.jit(lambda k: sd.variational_bound(score_fn, sde, k, x0, times="uniform").diffusion)(jax.random.key(i)))
    assert abs(z_score(*values)) < 4
    assert abs(values[0].std() / values[1].std() - 1) > 0.05


def test_gradients_of_parameters_ends_and_interior(x64):
    """Against autodiff of what each of them descends, written out with the same draws."""
    oracle, n = mixture(), 64
    x0 = oracle.sample(jax.random.key(0), n)
    sde = jax.tree.map(lambda a: jnp.asarray(a, float), bent())
    key = jax.random.key(1)

    def make_score(scale, sde):
        return lambda x, t: scale * oracle.score_fn(sde)(x, t)

    terms, t, by_scale, by_sde = jax.jit(lambda scale, sde: bound_gradients(make_score, scale, sde, key, x0))(jnp.asarray(0.8), sde)

    def direct(scale, sde):
        return sd.variational_bound(make_score(scale, sde), sde, key, x0, times="uniform")

    np.testing.assert_allclose(terms.total, jax.jit(direct)(0.8, sde).total, rtol=1e-9)
    expected = jax.jit(jax.grad(lambda scale, sde: direct(scale, sde).total.mean(), argnums=(0, 1)))(0.8, sde)
    np.testing.assert_allclose(by_scale, expected[0], rtol=1e-9)
    np.testing.assert_allclose(by_sde.log_snr_max, expected[1].log_snr_max, rtol=1e-8)
    np.testing.assert_allclose(by_sde.log_snr_min, expected[1].log_snr_min, rtol=1e-8)
    mean = float(terms.diffusion.mean())
    moment = jax.jit(jax.grad(lambda sde: 0.5 * (direct(0.8, sde).diffusion ** 2).mean() / mean**2))(sde)
    for name in sde.network:
        np.testing.assert_allclose(by_sde.network[name], moment.network[name], rtol=1e-7, atol=1e-12)


def test_a_learned_interior_reaches_the_smallest_variance():
    """For a given loss per log-SNR h, E[l^2] is least for a density proportional to sqrt(E[h^2]): here by quadrature."""
    oracle, n = mixture(), 512
    sde = jax.tree.map(jnp.asarray, sd.MonotoneLogSNR(8.0, -10.0))
    optimizer = optax.adam(0.05)

    def make_score(_, sde):
        return oracle.score_fn(sde)

    @jax.jit
    def update(network, state, key):
        key_x, key = jax.random.split(key)
        now = dataclasses.replace(sde, network=network)
        terms, _, _, by_sde = bound_gradients(make_score, 0.0, now, key, oracle.sample(key_x, n))
        change, state = optimizer.update(by_sde.network, state)
        return optax.apply_updates(network, change), state, terms.diffusion

    def second_moment(network):
        keys = jax.random.split(jax.random.key(9), 200)
        still = jax.vmap(lambda k: update(network, optimizer.init(network), k)[2])(keys)
        return float((still.astype(jnp.float32) ** 2).mean())

    start, network, state = second_moment(sde.network), sde.network, optimizer.init(sde.network)
    for key in jax.random.split(jax.random.key(0), 300):
        network, state, _ = update(network, state, key)
    # h = |eps - eps_hat|^2 / 2 by level, from many draws at each.
    linear = sd.LinearLogSNR(8.0, -10.0)
    x0, t = oracle.sample(jax.random.key(1), 20_000), jnp.linspace(0.005, 0.995, 100)
    errors = jax.jit(
        jax.vmap(lambda t: (sd.losses.noise_error(oracle.score_fn(linear), linear, jax.random.key(2), x0, jnp.full(20_000, t)) ** 2).mean())
    )(t)
    least = float((18 * 0.5 * jnp.sqrt(errors).mean()) ** 2)
    end = second_moment(network)
    assert end < 0.8 * start
    # The standard error of a second moment of 100,000 draws is below 2%.
    assert 0.95 * least < end < 1.1 * least


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sd.LinearLogSNR(-5.0, 13.0), ["log_snr_min < log_snr_max", "-5.0", "13.0"]),
        (lambda: sd.LinearLogSNR(t_max=1.5), ["t_max <= 1", "1.5"]),
        (lambda: sd.LinearLogSNR(log_snr_max=np.inf), ["finite", "inf"]),
        (lambda: check_values(sd.LinearLogSNR(5.0, -5.0), Scaler(256).values()), ["is 5,", "raise log_snr_max", "11.1"]),
        (lambda: check_values(SDES["vp"], np.array([0.0, 1.0, 0.5])), ["increasing"]),
        (lambda: check_values(SDES["vp"], np.array([0.0])), ["at least two"]),
        (
            lambda: sd.variational_bound(lambda x, t: -x, SDES["vp"], jax.random.key(0), jnp.zeros((2, 3)), num_steps=0),
            ["num_steps=0", "continuous"],
        ),
        (
            # jaxtyping would stop it under pytest.
            lambda: inspect.unwrap(sd.variational_bound)(lambda x, t: -x, SDES["vp"], jax.random.key(0), jnp.zeros((2, 3)), num_steps=2.5),
            ["num_steps=2.5", "an integer of at least 1"],
        ),
        (
            lambda: sd.variational_bound(
                lambda x, t: -x, sd.LinearLogSNR(), jax.random.key(0), jnp.full((2, 3), 0.51), values=Scaler(4).values()
            ),
            ["0.51", "grid", "encode"],
        ),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_gradients_outside_jit_are_those_inside():
    exact, sde = mixture(), sd.MonotoneLogSNR(8.0, -6.0)
    x0 = exact.sample(jax.random.key(0), 4)

    def gradients(sde):
        return bound_gradients(lambda scale, sde: lambda x, t: scale * exact.score_fn(sde)(x, t), 0.8, sde, jax.random.key(1), x0)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients(sde)[2:], jax.jit(gradients)(sde)[2:])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_data_of_half_precision_meet_noise_of_full(dtype):
    # A score of 0: the diffusion term is (8 + 5) / 2 |eps|^2, of 64 dimensions.
    sde, x0 = sd.LinearLogSNR(8.0, -5.0), jnp.zeros((20000, 64), dtype)
    diffusion = np.asarray(sd.variational_bound(lambda x, t: 0 * x, sde, jax.random.key(7), x0).diffusion, np.float64)
    assert diffusion.dtype == np.float64 and abs(diffusion.mean() - 416) < 4 * diffusion.std() / np.sqrt(len(x0))


class _Bent(sd.LinearLogSNR):
    def fraction(self, t):
        return t + 0.5 * jnp.sin(2 * np.pi * t)


def test_what_is_no_bound_is_refused():
    x0, key = jnp.zeros((2, 3)), jax.random.key(0)
    coarse, values = sd.LinearLogSNR(1.0, -6.0), Scaler(256).values()
    score = lambda x, t: 0 * x  # noqa: E731
    with pytest.raises(ValueError, match="log-SNR at t_train=.* need 11.1 or more"):
        bound_gradients(lambda *_: score, 0.0, coarse, key, jnp.asarray(values[:3])[None], values)
    with pytest.raises(ValueError, match="pass num_steps for discrete time"):
        sd.variational_bound(score, sd.VP(), key, x0, times=jnp.linspace(0.1, 0.9, 5))
    bent = pytree_dataclass(_Bent)(8.0, -6.0)
    for call in (sd.variational_bound, sd.weighted_loss):
        with pytest.raises(ValueError, match=r"the log-SNR .* goes from -?[\d.]+ at t=.* it must be finite and fall"):
            call(score, bent, key, x0)
    with pytest.raises(ValueError, match="it must be finite and fall"):
        sd.log_likelihood(score, bent, key, x0)
