import dataclasses
import inspect
import math
import textwrap

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from oracle import SDES, ZERO_SNR, drift_and_squared_diffusion

import sde_diffusion as sd
from sde_diffusion.config import SDES as CLASSES
from sde_diffusion.sde import pytree_dataclass

TIMES = np.array([1e-5, 1e-3, 0.03, 0.2, 0.5, 0.8, 0.95, 0.999])
NAMES = sorted(SDES)


def coefficients(sde, t):
    """f of x and g^2, through the public methods."""
    return sde.drift(jnp.ones((len(t), 1), t.dtype), t)[:, 0], sde.diffusion(t) ** 2


@pytest.mark.parametrize("name", NAMES)
def test_drift_and_diffusion_are_the_published_ones(name, x64):
    drift, squared = coefficients(SDES[name], jnp.asarray(TIMES))
    published = drift_and_squared_diffusion(name, TIMES)
    np.testing.assert_allclose(drift, published[0], rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(squared, published[1], rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_moments_solve_their_differential_equations(name, x64):
    """dm/dt = f m and dv/dt = 2 f v + g^2, integrated by scipy, give alpha and sigma^2."""
    sde = SDES[name]

    @jax.jit
    def rates(t, y):
        f, squared = (c[0] for c in coefficients(sde, t[None]))
        return jnp.stack([f * y[0], 2 * f * y[1] + squared])

    times = TIMES[TIMES >= 1e-3]
    t0 = jnp.asarray(1e-3)
    start = np.array([sde.alpha(t0), sde.sigma(t0) ** 2])
    solution = scipy.integrate.solve_ivp(
        lambda t, y: np.asarray(rates(t, y)), (1e-3, 0.999), start, "DOP853", times, rtol=1e-10, atol=1e-14
    )
    np.testing.assert_allclose(sde.alpha(jnp.asarray(times)), solution.y[0], rtol=1e-7)
    np.testing.assert_allclose(sde.sigma(jnp.asarray(times)) ** 2, solution.y[1], rtol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_diffusion_by_autodiff_of_the_variance(name, x64):
    """g^2 = d sigma^2/dt - 2 f sigma^2: a route that does not pass through the log-SNR."""
    sde, t = SDES[name], jnp.asarray(TIMES)
    slope = jax.vmap(jax.grad(lambda t: sde.sigma(t) ** 2))(t)
    drift, squared = coefficients(sde, t)
    np.testing.assert_allclose(squared, slope - 2 * drift * sde.sigma(t) ** 2, rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_log_snr_is_the_ratio_of_the_marginals(name, x64):
    sde, t = SDES[name], jnp.asarray(TIMES)
    log_snr = np.asarray(sde.log_snr(t))
    np.testing.assert_allclose(log_snr, np.log(sde.alpha(t) ** 2 / sde.sigma(t) ** 2), rtol=1e-7, atol=1e-9)
    assert (np.diff(log_snr) < 0).all()
    np.testing.assert_allclose(sde.log_snr_rate(t), jax.vmap(jax.grad(sde.log_snr))(t))


def test_values_from_the_papers(x64):
    one, half = jnp.asarray(1.0), jnp.asarray(0.5)
    vp, subvp, ve, cosine = SDES["vp"], SDES["subvp"], SDES["ve"], SDES["cosine"]
    # beta from 0.1 to 20 integrates to 10.05.
    np.testing.assert_allclose(vp.alpha(one), np.exp(-5.025))
    np.testing.assert_allclose(subvp.sigma(one), 1 - np.exp(-10.05))
    np.testing.assert_allclose(vp.alpha(half) ** 2 + vp.sigma(half) ** 2, 1)
    np.testing.assert_allclose(subvp.sigma(half), vp.sigma(half) ** 2)
    # Half-way, VE stands at the geometric mean of 0.01 and 50, and the cosine schedule at signal = noise.
    np.testing.assert_allclose(ve.sigma(half), np.sqrt(0.5))
    np.testing.assert_allclose(ve.sigma(one), 50)
    np.testing.assert_allclose(cosine.log_snr(half), 0, atol=1e-12)
    np.testing.assert_allclose(cosine.log_snr(jnp.asarray(0.999)), -12.9, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_float32_keeps_its_digits_at_both_ends(name, x64):
    sde = SDES[name]
    t32 = jnp.concatenate([jnp.geomspace(1e-5, 1e-1, 50), jnp.linspace(0.1, sde.t_max, 50)]).astype(jnp.float32)
    t64 = t32.astype(jnp.float64)
    for fn in (sde.alpha, sde.sigma, sde.diffusion, sde.log_snr_rate):
        assert fn(t32).dtype == jnp.float32
        np.testing.assert_allclose(fn(t32), fn(t64), rtol=3e-5 if fn == sde.diffusion else 2e-5)
    np.testing.assert_allclose(sde.log_snr(t32), sde.log_snr(t64), atol=1e-5, rtol=0)
    # A drift that is itself about 1e-5 is held to an absolute error.
    drift32, drift64 = (coefficients(sde, t)[0] for t in (t32, t64))
    np.testing.assert_allclose(drift32, drift64, rtol=2e-5, atol=3e-7)


@pytest.mark.parametrize("name", NAMES)
def test_time_inverts_log_snr(name, x64):
    sde = SDES[name]
    t = jnp.geomspace(sde.t_train, sde.t_max, 40)
    np.testing.assert_allclose(sde.time(sde.log_snr(t)), t, rtol=1e-9)
    in_float32 = sde.time(sde.log_snr(t.astype(jnp.float32)))
    # lambda near 20 is rounded to 1e-6, and dt/t is of that size.
    np.testing.assert_allclose(in_float32, t, rtol=1e-5, atol=1e-6 if name == "ve" else 0)


@pytest.mark.parametrize("name", NAMES)
def test_time_is_clipped_beyond_the_ends(name):
    sde = SDES[name]
    early, late = sde.time(jnp.asarray([80.0, -80.0]))
    assert 0 <= early < 1e-5 and late == np.float32(sde.t_max)


@pytest.mark.parametrize("name", NAMES)
def test_time_is_differentiable(name, x64):
    sde = SDES[name]
    log_snr = jnp.linspace(-4.0, 6.0, 7)
    h = 1e-4
    finite = (sde.time(log_snr + h) - sde.time(log_snr - h)) / (2 * h)
    np.testing.assert_allclose(jax.vmap(jax.grad(sde.time))(log_snr), finite, rtol=1e-6)


def test_time_is_differentiable_in_the_schedule(x64):
    """At a fixed log-SNR a larger beta_max means an earlier time."""

    def time(beta_max):
        return dataclasses.replace(SDES["vp"], beta_max=beta_max).time(jnp.asarray(-1.0))

    finite = (time(20.01) - time(19.99)) / 0.02
    np.testing.assert_allclose(jax.grad(time)(20.0), finite, rtol=1e-5)
    assert finite < 0


def test_zero_terminal_snr():
    one = jnp.asarray(1.0)
    assert ZERO_SNR.alpha(one) == 0 and ZERO_SNR.sigma(one) == 1 and ZERO_SNR.log_snr(one) == -jnp.inf
    x0 = jnp.full((2, 3), 7.0)
    eps = jax.random.normal(jax.random.key(0), (2, 3))
    np.testing.assert_array_equal(ZERO_SNR.perturb(x0, eps, jnp.ones(2)), eps)
    # Just before the end the marginal is still right, to float32's rounding of alpha.
    near = jnp.asarray(1 - 2.0**-20)
    np.testing.assert_allclose(ZERO_SNR.alpha(near), np.pi / 2 * 2.0**-20, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("event", [(1,), (3,), (4, 4, 3)])
def test_perturb_draws_from_the_marginal(name, event):
    sde, n = SDES[name], 40_000
    batch = n // int(np.prod(event))
    x0 = jnp.full((batch, *event), 1.5)
    t = jnp.full(batch, 0.3)
    x = np.asarray(sde.perturb(x0, jax.random.normal(jax.random.key(1), x0.shape), t))
    assert x.shape == x0.shape
    mean, std = 1.5 * float(sde.alpha(t[0])), float(sde.sigma(t[0]))
    # Standard errors of the mean and of the standard deviation of n normals: std / sqrt(n), std / sqrt(2 n).
    assert abs(x.mean() - mean) < 4 * std / np.sqrt(n)
    assert abs(x.std() - std) < 4 * std / np.sqrt(2 * n)


@pytest.mark.parametrize("name", NAMES)
def test_a_scalar_time_is_a_batch_of_equal_times(name):
    sde = SDES[name]
    x = jax.random.normal(jax.random.key(2), (5, 2, 3))
    t = jnp.asarray(0.4)
    np.testing.assert_allclose(sde.drift(x, t), sde.drift(x, jnp.full(5, 0.4)), rtol=1e-6)
    np.testing.assert_allclose(sde.perturb(x, x, t), sde.perturb(x, x, jnp.full(5, 0.4)), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_prior(name):
    sde = SDES[name]
    scale = 50.0 if name == "ve" else 1.0
    x = np.asarray(sde.prior_sample(jax.random.key(3), (5_000, 2, 4)))
    n = x.size
    assert abs(x.mean()) < 4 * scale / np.sqrt(n)
    assert abs(x.std() - scale) < 4 * scale / np.sqrt(2 * n)
    expected = scipy.stats.norm(0, scale).logpdf(x[:7].astype(np.float64)).sum(axis=(1, 2))
    np.testing.assert_allclose(sde.prior_log_prob(jnp.asarray(x[:7])), expected, rtol=1e-5)
    # It stands for the marginal at t_max.
    end = jnp.asarray(sde.t_max)
    np.testing.assert_allclose(sde.sigma(end), scale, rtol=1e-4)
    assert name == "ve" or sde.alpha(end) < 0.01


def test_fields_are_leaves_that_do_not_recompile():
    traces = []

    @jax.jit
    def sigma(sde, t):
        traces.append(1)
        return sde.sigma(t)

    t = jnp.asarray([0.1, 0.2])
    values = [sigma(sd.VP(beta_max=b), t) for b in (10.0, 15.0, 20.0)]
    assert len(traces) == 1
    together = jax.vmap(lambda b: sd.VP(beta_max=b).sigma(t))(jnp.asarray([10.0, 15.0, 20.0]))
    np.testing.assert_allclose(together, np.stack(values), rtol=1e-6)


def test_a_process_of_ones_own_is_a_dataclass_and_no_more():
    """That of the module's docstring."""
    names = {"dataclasses": dataclasses, "jnp": jnp, "sd": sd, "__name__": __name__}
    exec(textwrap.dedent(inspect.getmodule(sd.SDE).__doc__.partition("`log_sigma`:\n\n")[2]), names)
    Flow = names["Flow"]
    mean, variance, traces = np.array([0.3, -0.2]), np.array([0.2, 0.1]), []
    oracle = sd.GaussianMixture.gaussian(mean, np.diag(variance))

    @jax.jit
    def sample(sde, init):
        traces.append(1)
        return sd.sample_ode(oracle.score_fn(sde), sde, jax.random.key(0), (8, 2), init=init, num_steps=30, denoise=False)

    for t_max in (0.999, 0.99):
        sde = Flow(t_max=t_max)
        init = sde.prior_sample(jax.random.key(0), (8, 2))
        first, last = (np.sqrt(float(sde.alpha(t)) ** 2 * variance + float(sde.sigma(t)) ** 2) for t in (sde.t_max, sde.t_min))
        exact = float(sde.alpha(sde.t_min)) * mean + last / first * (np.asarray(init) - float(sde.alpha(sde.t_max)) * mean)
        np.testing.assert_allclose(sample(sde, init), exact, atol=2e-3)
    assert len(traces) == 1
    assert np.isfinite(jax.grad(lambda sde: sample(sde, init).sum())(sde).t_max)
    assert sd.sample_adaptive(oracle.score_fn(sde), sde, jax.random.key(0), (8, 2)).success.all()

    class Inherits(sd.VP):
        def log_sigma(self, t):
            return super().log_sigma(t) + math.log(1.1)

    frozen = dataclasses.dataclass(frozen=True)
    for decorator in (frozen, lambda cls: jax.tree_util.register_dataclass(frozen(cls)), flax.struct.dataclass, pytree_dataclass):

        class Mine(Flow):
            t_max: float = 0.9

        assert jax.tree.leaves(decorator(Mine)()) == jax.tree.leaves(Flow(t_max=0.9))

    assert jax.tree.leaves(Inherits(beta_max=15.0)) == jax.tree.leaves(sd.VP(beta_max=15.0))
    np.testing.assert_allclose(jax.jit(lambda sde: sde.sigma(0.5))(Inherits()), 1.1 * sd.VP().sigma(0.5), rtol=1e-6)


def test_what_jit_would_lose_of_a_process_is_refused():
    class Plain(sd.VP):
        def __init__(self, power):
            super().__init__()
            object.__setattr__(self, "power", power)

    with pytest.raises(ValueError, match="Plain has power, .*field of a frozen dataclass"):
        sd.sample_ode(lambda x, t: -x, Plain(2.0), jax.random.key(0), (2, 1))


def test_a_process_may_hold_a_list_and_need_not_be_frozen():
    @dataclasses.dataclass
    class Powers(sd.SDE):
        powers: list
        t_min: float = 1e-3
        t_max: float = 1.0
        t_train: float = 1e-5

        def log_alpha(self, t):
            return -sum(t**p for p in self.powers)

        def log_sigma(self, t):
            return 0.5 * jnp.log(-jnp.expm1(2 * self.log_alpha(t)))

    def run(powers):
        return sd.sample_ode(lambda x, t: -x, Powers(powers), jax.random.key(0), (2, 1), num_steps=5)

    assert np.isfinite(run([1.0, 2.0])).all()
    with pytest.raises(ValueError, match="fall from t_train to t_max"):
        run([-1.0])


def test_a_process_of_ones_own_that_lacks_something_or_runs_backwards_is_refused():
    class Timeless(sd.SDE):
        t_max, t_min = 1.0, 1e-3

    class Half(sd.SDE):
        t_min, t_max, t_train = 1e-3, 1.0, 1e-5

        def log_alpha(self, t):
            return -t

    class Backwards(Half):
        def log_sigma(self, t):
            return -2 * t

    for sampler in (sd.sample_ode, sd.sample_sde, sd.sample_pc, sd.sample_langevin, sd.sample_adaptive):
        for cls, error, words in (
            (Timeless, ValueError, "Timeless lacks t_train: a process has t_min"),
            (Half, NotImplementedError, "Half must define log_alpha.t. and log_sigma"),
            (Backwards, ValueError, "log-SNR of .* must be finite and fall from t_train to t_max, .* turn it round"),
        ):
            with pytest.raises(error, match=words):
                sampler(lambda x, t: -x, cls(), jax.random.key(0), (2, 1))
    with pytest.raises(ValueError, match="Timeless lacks t_train"):
        dataclasses.dataclass(frozen=True)(Timeless)()


def test_frozen_and_known_by_name():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SDES["vp"].beta_max = 3.0
    assert {name: type(sde) for name, sde in SDES.items()}.items() <= CLASSES.items()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sd.VP(beta_min=30.0), ["VP", "beta_min=30.0", "beta_max=20.0", "usual"]),
        (lambda: sd.SubVP(beta_max=float("nan")), ["SubVP", "beta_max=nan"]),
        (lambda: sd.VE(sigma_min=0.0), ["VE", "sigma_min=0.0", "0.01"]),
        (lambda: sd.VE(sigma_min=60.0), ["sigma_min=60.0", "sigma_max=50.0"]),
        (lambda: sd.VP(t_min=2.0), ["t_min=2.0", "t_max=1.0", "t_train"]),
        (lambda: sd.CosineVP(t_train=0.0), ["CosineVP", "t_train=0.0"]),
        (lambda: sd.VE(sigma_max=np.inf), ["sigma_max=inf", "sigma_max < inf"]),
        (lambda: sd.SubVP(beta_max=np.inf), ["beta_max=inf", "beta_max < inf"]),
        (lambda: sd.VP(t_max=np.inf), ["t_max=inf", "t_max < inf"]),
    ],
)
def test_bad_ranges_are_refused(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("number", [float, np.float32, jnp.float32], ids=["float", "numpy", "jax"])
def test_wrong_constants_are_refused_whatever_number_they_are(number):
    for make, words in (
        (lambda: sd.VE(sigma_min=number(-1)), "sigma_min"),
        (lambda: sd.VP(beta_max=number(-5)), "beta_max"),
        (lambda: sd.CosineVP(t_max=number(1.5)), "t_max"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_whole_numbers_are_times_too():
    sde = sd.VP()
    np.testing.assert_allclose(sde.diffusion(1), sde.diffusion(1.0))
    np.testing.assert_allclose(sde.drift(jnp.ones((2, 3)), 1), sde.drift(jnp.ones((2, 3)), 1.0))


def test_no_two_processes_share_a_program(x64):
    """The structures of pytrees of different classes differ, however many leaves they have: jax.jit tells programs by them."""
    sdes = [cls() for cls in (sd.VP, sd.SubVP, sd.VE, sd.CosineVP)] + [sd.DDPM(), sd.SMLD(), sd.SMLD(num_levels=10)]
    structures = [jax.tree.structure(sde) for sde in sdes]
    assert all(a != b for i, a in enumerate(structures) for b in structures[:i])
    time = jax.jit(lambda sde: sde.sigma(0.5))
    np.testing.assert_allclose([time(sde) for sde in sdes], [sde.sigma(0.5) for sde in sdes], rtol=1e-12)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(sd.VE())]
    assert paths == [".sigma_min", ".sigma_max", ".t_min", ".t_max", ".t_train"]
