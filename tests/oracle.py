"""Independent answers for the tests: published coefficients and closed forms in float64 numpy, and Monte-Carlo errors."""

import jax
import jax.numpy as jnp
import numpy as np

import sde_diffusion as sd

SDES = {"vp": sd.VP(), "subvp": sd.SubVP(), "ve": sd.VE(), "cosine": sd.CosineVP()}
ZERO_SNR = sd.CosineVP(t_max=1.0)


def drift_and_squared_diffusion(name, t):
    """The coefficients f(t) of x and g(t)^2 as the papers print them, for the defaults of `SDES`."""
    t = np.asarray(t, np.float64)
    beta, integral = 0.1 + 19.9 * t, 0.1 * t + 9.95 * t**2
    return {
        "vp": lambda: (-beta / 2, beta),
        "subvp": lambda: (-beta / 2, beta * -np.expm1(-2 * integral)),
        "ve": lambda: (0 * t, 2 * np.log(5000.0) * (0.01 * 5000.0**t) ** 2),
        "cosine": lambda: (-np.pi / 2 * np.tan(np.pi * t / 2), np.pi * np.tan(np.pi * t / 2)),
    }[name]()


def mixture():
    """Two correlated Gaussians in the plane, apart by about two standard deviations."""
    return sd.GaussianMixture(
        np.array([0.3, 0.7]),
        np.array([[1.2, -0.5], [-0.8, 0.6]]),
        np.array([[[0.3, 0.1], [0.1, 0.2]], [[0.5, -0.3], [-0.3, 0.4]]]),
    )


def gaussian_kl(mean_q, var_q, mean_p, var_p):
    """KL(N(mean_q, var_q) || N(mean_p, var_p)) for diagonal variances, summed over the last axis."""
    terms = var_q / var_p + (mean_p - mean_q) ** 2 / var_p - 1 + np.log(var_p / var_q)
    return 0.5 * np.sum(terms, axis=-1)


def moment_z_scores(x, mean, covariance):
    """Deviations of the sample's mean and covariance `(D,)`, `(D, D)`, in standard errors, flattened.

    The standard errors are the sample's own: std / sqrt(n) of x, and of the products of centred coordinates.
    """
    x = np.asarray(x, np.float64)
    n = len(x)
    centred = x - np.asarray(mean, np.float64)
    products = centred[:, :, None] * centred[:, None, :]
    z_mean = centred.mean(0) / (x.std(0) / np.sqrt(n))
    z_covariance = (products.mean(0) - np.asarray(covariance)) / (products.std(0) / np.sqrt(n))
    return np.concatenate([z_mean, z_covariance.ravel()])


def standard_error(values):
    """Of the mean of independent values."""
    values = np.asarray(values, np.float64)
    return values.std() / np.sqrt(len(values))


def perturbed(exact, sde, amount):
    """The exact score plus amount times a smooth error that grows as the score does, 1 / sigma."""

    def score_fn(x, t):
        scale = jnp.sqrt(sde.alpha(t) ** 2 + sde.sigma(t) ** 2)[:, None]
        return exact(x, t) + amount * (jnp.sin(2 * x / scale) + 0.3) / sde.sigma(t)[:, None]

    return score_fn


def order(steps, errors):
    """The convergence order: minus the slope of log error against log steps, by least squares."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def _eps_with_error(exact, inside, outside, sde, x, t):
    return -sde.sigma(t)[:, None] * exact(x, t) + 0.02 * jnp.sin(0.75 * sde.log_snr(t)[:, None] + x @ inside) @ outside


def eps_network(sde, seed=3, dim=16):
    """The exact eps of a mixture, 0.02 off by what depends on x and the log-SNR and has no place in any data; and the data's deviation."""
    random = np.random.default_rng(seed)
    oracle = sd.GaussianMixture(np.full(4, 0.25), 0.5 * random.normal(size=(4, dim)), np.tile(0.05 * np.eye(dim), (4, 1, 1)))
    inside, outside = (jnp.asarray(random.normal(size=(dim, dim)) / np.sqrt(dim), jnp.float32) for _ in range(2))
    network = jax.tree_util.Partial(_eps_with_error, oracle.score_fn(sde), inside, outside, sde)
    return network, float(np.sqrt(np.trace(oracle.covariance()) / dim))
