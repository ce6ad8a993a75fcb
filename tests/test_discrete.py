import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import mixture, moment_z_scores

import sde_diffusion as sd


def published_ddpm(num=1000):
    """beta and alpha_bar of DDPM, as products in float64."""
    betas = np.linspace(1e-4, 0.02, num)
    return betas, np.cumprod(1 - betas)


def test_ddpm_marginals_are_cumulative_products(x64):
    _, alpha_bar = published_ddpm()
    sde = sd.DDPM()
    np.testing.assert_allclose(sde.alpha(sde.levels) ** 2, alpha_bar, rtol=1e-10)
    np.testing.assert_allclose(sde.sigma(sde.levels) ** 2, 1 - alpha_bar, rtol=1e-10)
    # The number that the literature quotes for the last level.
    np.testing.assert_allclose(sde.alpha(jnp.asarray(1.0)) ** 2, 4.036e-5, rtol=1e-3)


def test_ddpm_keeps_its_digits_in_float32():
    _, alpha_bar = published_ddpm()
    sde = sd.DDPM()
    np.testing.assert_allclose(sde.alpha(sde.levels) ** 2, alpha_bar, rtol=2e-5)
    np.testing.assert_allclose(sde.sigma(sde.levels) ** 2, 1 - alpha_bar, rtol=2e-5)


def test_ddpm_is_an_sde_between_its_levels(x64):
    """Inside level i, beta(t) = -N log(1 - beta_i) is constant: drift and diffusion are those of a VP process."""
    betas, _ = published_ddpm()
    sde = sd.DDPM()
    t = (jnp.asarray([0.5, 10.5, 499.5, 999.5])) / 1000
    rate = -1000 * np.log1p(-betas[[0, 10, 499, 999]])
    np.testing.assert_allclose(sde.drift(jnp.ones((4, 1)), t)[:, 0], -rate / 2, rtol=1e-9)
    np.testing.assert_allclose(sde.diffusion(t) ** 2, rate, rtol=1e-9)
    np.testing.assert_allclose(sde.time(sde.log_snr(t)), t, rtol=1e-9)


def test_cosine_betas(x64):
    """alpha_bar = f(t) / f(0) with f = cos^2((t + 0.008) / 1.008 pi / 2), wherever beta is not clipped at 0.999."""
    betas = np.asarray(sd.cosine_betas(1000))
    t = np.arange(1001) / 1000
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:999], (f / f[0])[1:1000], rtol=1e-9)
    assert betas[-1] == 0.999 and (np.diff(betas) > 0).all()


def test_cosine_betas_keep_their_digits_in_float32():
    f = np.cos((np.arange(2) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(sd.cosine_betas(1000)[0], 1 - f[1] / f[0], rtol=1e-6)


def test_smld_levels_are_geometric(x64):
    sde = sd.SMLD(sigma_min=0.01, sigma_max=50.0, num_levels=1000)
    sigmas = np.asarray(sde.sigma(sde.levels))
    np.testing.assert_allclose(sigmas, np.geomspace(0.01, 50, 1000), rtol=1e-12)


def test_ancestral_noise_is_what_the_published_ddpm_update_says(x64):
    """z recovered by x_{i-1} = (x_i - beta / sqrt(1 - abar) eps) / sqrt(1 - beta) + sigma z from a path is normal noise.

    With one key, two chains of different betas must hide the same z: that fixes mean and variance of every step.
    """
    oracle, batch = mixture(), 500
    recovered = []
    for betas in (np.linspace(0.02, 0.3, 20), np.linspace(0.05, 0.2, 20)):
        sde = sd.DDPM(jnp.asarray(betas))
        alpha_bar = np.cumprod(1 - betas)
        score_fn = jax.jit(lambda x, t, sde=sde: oracle.score_fn(sde)(x, t))
        for method in ("ancestral", "ancestral_large"):
            _, path = sd.sample_sde(
                oracle.score_fn(sde), sde, jax.random.key(0), (batch, 2),
                method=method, grid=sde.levels[::-1], return_path=True,
            )  # fmt: skip
            path = np.asarray(path)
            z = []
            for x, x_next, i in zip(path[:-1], path[1:], range(19, 0, -1)):
                score = np.asarray(score_fn(jnp.asarray(x), jnp.full(batch, (i + 1) / 20)))
                eps = -np.sqrt(1 - alpha_bar[i]) * score
                mean = (x - betas[i] / np.sqrt(1 - alpha_bar[i]) * eps) / np.sqrt(1 - betas[i])
                shrink = (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) if method == "ancestral" else 1.0
                z.append((x_next - mean) / np.sqrt(shrink * betas[i]))
            recovered.append(np.stack(z))
    for other in recovered[1:]:
        np.testing.assert_allclose(other, recovered[0], atol=1e-8)
    noise = recovered[0].reshape(-1, 2)
    assert np.abs(moment_z_scores(noise, np.zeros(2), np.eye(2))).max() < 4
    # Independent from step to step: the correlation of neighbours has standard error 1 / sqrt(n).
    neighbours = (recovered[0][1:] * recovered[0][:-1]).mean()
    assert abs(neighbours) * np.sqrt(recovered[0][1:].size) < 4


def test_smld_ancestral_noise_is_what_the_published_update_says(x64):
    """x_{i-1} = x_i + (sigma_i^2 - sigma_{i-1}^2) score + sqrt(sigma_{i-1}^2 (sigma_i^2 - sigma_{i-1}^2) / sigma_i^2) z."""
    oracle, batch, recovered = mixture(), 500, []
    for sigma_max in (50.0, 20.0):
        sde = sd.SMLD(sigma_max=sigma_max, num_levels=30)
        sigmas = np.geomspace(0.01, sigma_max, 30)
        _, path = sd.sample_sde(
            oracle.score_fn(sde), sde, jax.random.key(1), (batch, 2),
            method="ancestral", grid=sde.levels[::-1], return_path=True,
        )  # fmt: skip
        path, z = np.asarray(path), []
        for x, x_next, i in zip(path[:-1], path[1:], range(29, 0, -1)):
            score = np.asarray(oracle.score_fn(sde)(jnp.asarray(x), jnp.full(batch, i / 29)))
            step = sigmas[i] ** 2 - sigmas[i - 1] ** 2
            z.append((x_next - x - step * score) / np.sqrt(sigmas[i - 1] ** 2 * step / sigmas[i] ** 2))
        recovered.append(np.stack(z))
    np.testing.assert_allclose(recovered[1], recovered[0], atol=1e-7)
    assert np.abs(moment_z_scores(recovered[0].reshape(-1, 2), np.zeros(2), np.eye(2))).max() < 4


@pytest.mark.parametrize("sde", [sd.DDPM(), sd.SMLD(num_levels=1000)], ids=["ddpm", "smld"])
def test_ancestral_sampling_on_the_levels_recovers_the_data(sde):
    oracle, calls = mixture(), []

    def score_fn(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return oracle.score_fn(sde)(x, t)

    x = sd.sample_sde(score_fn, sde, jax.random.key(2), (4096, 2), method="ancestral", grid=sde.levels[::-1])
    jax.effects_barrier()
    # N levels, N evaluations: the last one gives the mean without noise.
    assert len(calls) == 1000
    assert np.abs(moment_z_scores(x, oracle.mean(), oracle.covariance())).max() < 4


@pytest.mark.parametrize("sde", [sd.DDPM(), sd.SMLD(num_levels=50)], ids=["ddpm", "smld"])
def test_the_ode_sampler_accepts_them(sde):
    oracle = mixture()
    x = sd.sample_ode(oracle.score_fn(sde), sde, jax.random.key(3), (4096, 2), num_steps=40)
    assert np.abs(moment_z_scores(x, oracle.mean(), oracle.covariance())).max() < 4


@pytest.mark.parametrize("sde", [sd.DDPM(), sd.SMLD(num_levels=100)], ids=["ddpm", "smld"])
def test_loss_on_levels_is_the_mean_over_them(sde):
    """A score of zero leaves |eps|^2, whose mean is D at every level; a score of one level is seen 1 / N of the time."""
    x0 = jnp.zeros((2 * len(sde.levels), 3))
    loss, t = sd.dsm_loss(lambda x, t: jnp.zeros_like(x), sde, jax.random.key(5), x0, times=sde.levels, return_times=True)
    # Twice as many draws as levels, stratified: each level exactly twice.
    np.testing.assert_allclose(np.sort(t), np.repeat(np.sort(sde.levels), 2), rtol=1e-6)
    # |eps|^2 of D = 3 normals has variance 2 D.
    assert abs(float(loss.mean()) - 3) < 4 * np.sqrt(6 / len(loss))


def test_loss_on_ddpm_levels_is_l_simple(x64):
    """On data at one point, predicting eps = a x has E|eps - a x|^2 = D (1 - a sigma)^2 + a^2 alpha^2 |x0|^2."""
    _, alpha_bar = published_ddpm(100)
    betas = jnp.linspace(1e-4, 0.02, 100)
    sde = sd.DDPM(betas)
    point = np.array([0.5, -1.0])
    model = sd.as_score(lambda x, t: 0.7 * x, sde, prediction="eps")
    loss = sd.dsm_loss(model, sde, jax.random.key(6), jnp.tile(point, (40_000, 1)), times=sde.levels)
    expected = np.mean(2 * (1 - 0.7 * np.sqrt(1 - alpha_bar)) ** 2 + 0.49 * alpha_bar * 1.25)
    standard_error = float(loss.std()) / np.sqrt(len(loss))
    assert abs(float(loss.mean()) - expected) < 4 * standard_error < 0.05


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sd.linear_betas(0), ["num_levels=0", "1000"]),
        (lambda: sd.cosine_betas(0), ["num_levels=0", "1000"]),
        (lambda: sd.SMLD(num_levels=1), ["num_levels=1", "at least 2"]),
        (lambda: sd.SMLD(sigma_min=50.0, sigma_max=0.01), ["sigma_min=50.0", "sigma_max=0.01"]),
        (lambda: sd.DDPM(jnp.asarray([0.1, 1.0])), ["(0, 1)", "zero terminal SNR", "CosineVP"]),
        (lambda: sd.DDPM(np.asarray([-0.1, 0.5])), ["-0.1", "(0, 1)"]),
        (lambda: sd.DDPM([0.1, 0.2]), ["list", "array"]),
        (lambda: sd.DDPM(jnp.full((2, 3), 0.1)), ["(2, 3)", "(N,)"]),
    ],
)
def test_bad_levels_are_refused(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
