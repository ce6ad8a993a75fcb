import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import SDES, ZERO_SNR

import sde_diffusion as sd

NAMES = sorted(SDES)


def learned(sde, shape=lambda u: 1 + 20 * u**2):
    """An AdaptiveTimes that has seen a loss per unit of lambda that rises along the range, from low to high lambda."""
    times = sd.AdaptiveTimes()
    ends = sde.log_snr(jnp.asarray(sde.t_max)), sde.log_snr(jnp.asarray(sde.t_train))
    low = jnp.maximum(ends[0], -20.0)

    @jax.jit
    def update(times, key):
        t, weight = sd.sample_times(key, 512, sde, times)
        u = (sde.log_snr(t) - low) / (ends[1] - low)
        return times.update(sde, t, shape(u) * weight * -sde.log_snr_rate(t))

    for i in range(40):
        times = update(times, jax.random.key(i))
    return times


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


@pytest.mark.parametrize(
    ("name", "times"), [*((n, t) for n in NAMES for t in ("uniform", "log_snr")), ("vp", "adaptive"), ("ve", "adaptive")]
)
def test_times_integrate_functions(name, times, x64):
    """E[weight h(t)] is the integral of h over [t_train, t_max]."""
    sde = SDES[name]
    times = learned(sde) if times == "adaptive" else times
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


def test_adaptive_times_follow_the_root_mean_square_of_the_loss():
    """A loss per unit of lambda of known size and noise: the bins' shares are its root mean square, beside the floor."""
    sde = sd.LinearLogSNR(log_snr_max=8.0, log_snr_min=-8.0)
    times = sd.AdaptiveTimes.of(16, decay=0.999, floor=0.1)

    def size(t):
        return jnp.exp(-0.5 * (sde.log_snr(t) / 3) ** 2)

    @jax.jit
    def update(times, key):
        key_t, key_noise = jax.random.split(key)
        t, weight = sd.sample_times(key_t, 1024, sde, times)
        # Mean 1 and mean square 3.
        noise = 1 + np.sqrt(2.0) * jax.random.normal(key_noise, t.shape)
        return times.update(sde, t, noise * size(t) * weight)

    for i in range(200):
        times = update(times, jax.random.key(i))
    centres = jnp.linspace(1, 0, 16000, endpoint=False) - 1 / 32000
    rms = np.sqrt(np.asarray(size(centres) ** 2).reshape(16, 1000).mean(axis=1))
    expected = 0.9 * rms / rms.sum() + 0.1 / 16
    # 200 x 1,024 draws over 16 bins: some 5,000 in the rarest, and a mean square whose relative standard error is sqrt(6 / n).
    np.testing.assert_allclose(times.shares(), expected, rtol=0.06)
    np.testing.assert_allclose(times.shares().sum(), 1, rtol=1e-5)


def test_adaptive_times_reach_the_least_variance():
    """At independent times the variance is (int rms dlambda)^2 - mean^2 at best, known here by quadrature; the floor costs 1 / 0.95 at most."""
    sde = sd.LinearLogSNR(log_snr_max=8.0, log_snr_min=-8.0)

    def size(t):
        return 2 * jnp.exp(-0.5 * (sde.log_snr(t) / 1.5) ** 2)

    def losses(times, key, n=1):
        """n losses at independent times: 16 lambda-units wide, chi-squared noise of mean 1 and mean square 3."""

        def one(key):
            key_t, key_noise = jax.random.split(key)
            t, weight = sd.sample_times(key_t, 1, sde, times)
            return size(t)[0] * 16 * weight[0] * jax.random.normal(key_noise) ** 2, t[0]

        return jax.vmap(one)(jax.random.split(key, n))

    @jax.jit
    def update(times, key):
        loss, t = losses(times, key, 1024)
        return times.update(sde, t, loss)

    times = sd.AdaptiveTimes()
    for i in range(100):
        times = update(times, jax.random.key(i))
    loss = np.asarray(jax.jit(lambda key: losses(times, key, 200_000))(jax.random.key(1000))[0], np.float64)
    log_snr = np.linspace(-8, 8, 20_001)
    mean = np.trapezoid(2 * np.exp(-0.5 * (log_snr / 1.5) ** 2), log_snr)
    least = 3 * mean**2
    uniform = 16 * 3 * np.trapezoid(4 * np.exp(-((log_snr / 1.5) ** 2)), log_snr)
    square = (loss**2).mean()
    error = (loss**2).std() / np.sqrt(len(loss))
    # Unbiased; at least the least; and 1 / 0.95 for the floor and 3% for bins of finite width and memory more at most.
    assert abs(loss.mean() - mean) < 4 * loss.std() / np.sqrt(len(loss))
    assert least - 4 * error < square < 1.03 / 0.95 * least + 4 * error
    assert least < 0.4 * uniform


def test_fresh_adaptive_times_are_uniform_in_the_log_snr():
    for sde in (SDES["vp"], ZERO_SNR):
        fresh, log_snr = (sd.sample_times(jax.random.key(3), 64, sde, times) for times in (sd.AdaptiveTimes(), "log_snr"))
        for a, b in zip(fresh, log_snr):
            np.testing.assert_allclose(a, b, rtol=2e-3)


def test_adaptive_times_leave_out_what_is_not_finite():
    sde, times = SDES["vp"], sd.AdaptiveTimes()
    t, _ = sd.sample_times(jax.random.key(0), 8, sde, times)
    loss = jnp.ones(8).at[3].set(jnp.nan).at[5].set(jnp.inf)
    after = times.update(sde, t, loss)
    assert np.isfinite(after.shares()).all() and float(after.counts.sum()) == 6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sd.AdaptiveTimes.of(0), ["bins=0", "100"]),
        (lambda: sd.AdaptiveTimes(decay=1.0), ["decay=1.0", "[0, 1)"]),
        (lambda: sd.AdaptiveTimes(floor=0.0), ["floor=0.0", "(0, 1]"]),
        (lambda: sd.AdaptiveTimes(jnp.zeros(3), jnp.zeros(4)), ["(3,)", "(4,)"]),
    ],
)
def test_bad_adaptive_times_are_refused(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_adaptive_times_are_a_pytree_of_two_arrays():
    times = sd.AdaptiveTimes.of(7, decay=0.5)
    assert [leaf.shape for leaf in jax.tree.leaves(times)] == [(7,), (7,)]
    assert jax.tree.map(lambda a: a, times).decay == 0.5 and dataclasses.replace(times, floor=0.2).floor == 0.2
