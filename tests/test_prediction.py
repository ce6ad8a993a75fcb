import functools
import inspect
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import SDES, ZERO_SNR, mixture
from quick import QUICK

import sde_diffusion as sd
from sde_diffusion.prediction import PREDICTIONS, predict

ALL = {**SDES, "ddpm": sd.DDPM(), "smld": sd.SMLD(), "zero_snr": ZERO_SNR}
STD = 0.7


def perfect_output(kind, x0, eps, alpha, sigma):
    """What a network of that kind must say where x0 and eps are known, from each kind's own paper."""
    if kind == "edm":
        # arXiv:2206.00364 table 1, for the variable x / alpha with noise of standard deviation sigma / alpha.
        ratio = sigma / alpha
        skip = STD**2 / (ratio**2 + STD**2)
        scale = ratio * STD / np.sqrt(ratio**2 + STD**2)
        return (x0 - skip * (x0 + ratio * eps)) / scale
    return {"eps": eps, "x0": x0, "score": -eps / sigma, "v": alpha * eps - sigma * x0}[kind]


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("kind", sorted(PREDICTIONS))
def test_round_trip(name, kind, x64):
    sde = ALL[name]
    if name == "zero_snr" and kind in ("eps", "score"):
        pytest.skip("refused, see below")
    t = jnp.linspace(0.002, 0.99 * sde.t_max, 6)
    alpha, sigma = np.asarray(sde.alpha(t))[:, None, None], np.asarray(sde.sigma(t))[:, None, None]
    x0, eps = (np.asarray(jax.random.normal(jax.random.key(i), (6, 2, 3))) for i in (0, 1))
    output = jnp.asarray(perfect_output(kind, x0, eps, alpha, sigma))
    score_fn = sd.as_score(lambda x, label: output, sde, prediction=kind, sigma_data=STD)
    x = jnp.asarray(alpha * x0 + sigma * eps)
    for got in (score_fn.predict(x, t), predict(score_fn, sde, x, t)):
        np.testing.assert_allclose(got[0], x0, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(got[1], eps, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(score_fn(x, t), -eps / sigma, rtol=1e-6, atol=1e-9)
    # A bare function with the same score passes through Tweedie's formula to the same pair.
    bare = predict(lambda x, t: score_fn(x, t), sde, x, t)
    np.testing.assert_allclose(bare[0], x0, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(bare[1], eps, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", sorted(PREDICTIONS))
@pytest.mark.parametrize("name", sorted(SDES))
def test_float32_round_trip_of_the_noise(name, kind):
    """The pair is consistent, x = alpha x0 + sigma eps, for any output, to float32's rounding of x."""
    sde = SDES[name]
    t = jnp.geomspace(sde.t_min, sde.t_max, 9)
    x = jax.random.normal(jax.random.key(0), (9, 5)) * jnp.sqrt(sde.alpha(t) ** 2 + sde.sigma(t) ** 2)[:, None]
    score_fn = sd.as_score(lambda x, label: jnp.sin(3 * x), sde, prediction=kind)
    x0, eps = score_fn.predict(x, t)
    assert x0.dtype == eps.dtype == jnp.float32
    np.testing.assert_allclose(sde.perturb(x0, eps, t), x, rtol=1e-4, atol=2e-5)


def test_zero_terminal_snr_is_exact_for_x0_and_v():
    """At alpha = 0 the state is the noise; x0 comes from the network alone."""
    x0, eps, t = jnp.full((2, 3), 0.25), jnp.full((2, 3), -1.5), jnp.ones(2)
    for kind, output in (("x0", x0), ("v", -x0), ("edm", x0 / 0.5)):
        score_fn = sd.as_score(lambda x, label, o=output: o, ZERO_SNR, prediction=kind)
        got = score_fn.predict(eps, t)
        np.testing.assert_allclose(got[0], x0, rtol=1e-6)
        np.testing.assert_allclose(got[1], eps, rtol=1e-6)
        np.testing.assert_allclose(score_fn(eps, t), -eps, rtol=1e-6)


@pytest.mark.parametrize("label", ["t", "log_sigma", "log_snr", "data_log_snr", "edm"])
@pytest.mark.parametrize("name", sorted(ALL))
def test_noise_labels_are_finite_and_monotone(name, label):
    sde, seen = ALL[name], []
    score_fn = sd.as_score(lambda x, c: seen.append(c) or x, sde, prediction="v", noise_label=label)
    t = jnp.linspace(sde.t_min, sde.t_max, 20)
    score_fn(jnp.zeros((20, 1)), t)
    steps = np.diff(np.asarray(seen[0]))
    assert np.isfinite(seen[0]).all()
    # Later is noisier; only float32's rounding of sigma -> 1 near the prior may repeat a value.
    assert (steps <= 0).all() if "log_snr" in label else (steps >= 0).all()
    assert abs(seen[0][-1] - seen[0][0]) > 0.5


@pytest.mark.parametrize("kind", ["edm", "v"])
@pytest.mark.parametrize("name", sorted(SDES))
def test_data_log_snr_is_that_of_the_state(name, kind):
    """The ratio of the variances of signal and noise in x, of 200,000 draws each: standard error sqrt(4 / 200,000) = 0.45%."""
    sde, seen, t, num = SDES[name], [], jnp.asarray([0.3]), 200_000
    sd.as_score(lambda x, c: seen.append(c) or x, sde, prediction=kind, noise_label="data_log_snr", sigma_data=STD)(jnp.zeros((1, 1)), t)
    x0, eps = (scale * jax.random.normal(jax.random.key(i), (num,)) for i, scale in enumerate((STD, 1.0)))
    signal, noise = sde.alpha(t) * x0, sde.sigma(t) * eps
    np.testing.assert_allclose(np.exp(seen[0]), signal.var() / noise.var(), rtol=4 * 0.0045)


@pytest.mark.parametrize("name", sorted(SDES))
def test_edm_label_is_a_quarter_log_sigma(name):
    """For VE that is EDM's own c_noise = log(sigma) / 4; else of the noise relative to the signal."""
    sde, seen = SDES[name], []
    sd.as_score(lambda x, c: seen.append(c) or x, sde, prediction="edm")(jnp.zeros((1, 1)), jnp.asarray([0.3]))
    t = jnp.asarray(0.3)
    np.testing.assert_allclose(seen[0], 0.25 * np.log(sde.sigma(t) / sde.alpha(t)), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(SDES))
def test_edm_inputs_and_targets_have_unit_variance(name):
    """For data of standard deviation sigma_data, at every noise level (arXiv:2206.00364 appendix B.6)."""
    sde, n, seen = SDES[name], 100_000, []
    x0 = STD * jax.random.normal(jax.random.key(0), (n, 1))
    eps = jax.random.normal(jax.random.key(1), (n, 1))
    for time in (0.01, 0.3, 0.9):
        t = jnp.full(n, time)
        score_fn = sd.as_score(lambda x, c: seen.append(x) or jnp.zeros_like(x), sde, prediction="edm", sigma_data=STD)
        x = sde.perturb(x0, eps, t)
        at_zero = score_fn.predict(x, t)[0]
        slope = sd.as_score(lambda x, c: jnp.ones_like(x), sde, prediction="edm", sigma_data=STD)
        target = (x0 - at_zero) / (slope.predict(x, t)[0] - at_zero)
        # The standard error of a standard deviation of n normals is 1 / sqrt(2 n).
        assert abs(float(seen[-1].std()) - 1) < 4 / np.sqrt(2 * n)
        assert abs(float(target.std()) - 1) < 4 / np.sqrt(2 * n)


@pytest.mark.parametrize("kind", sorted(PREDICTIONS))
@pytest.mark.parametrize("name", sorted(SDES))
def test_a_bfloat16_network_keeps_float32_schedules(name, kind):
    """An output that bfloat16 holds exactly gives the pair of a float32 network, bit for bit."""
    sde = SDES[name]
    t = jnp.asarray([sde.t_min, 0.01, 0.5, sde.t_max])
    x = jax.random.normal(jax.random.key(0), (4, 3))
    pairs = [
        sd.as_score(lambda x, c, d=dtype: jnp.full(x.shape, -0.375, d), sde, prediction=kind).predict(x, t)
        for dtype in (jnp.bfloat16, jnp.float32)
    ]
    for got, expected in zip(*pairs):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, expected)


def test_new_parameters_do_not_recompile():
    sde, traces = SDES["vp"], []

    def network(scale, x, label):
        traces.append(1)
        return scale * x

    for scale in (0.1, 0.2, 0.3):
        score_fn = sd.as_score(jax.tree_util.Partial(network, jnp.asarray(scale)), sde)
        sd.sample_ode(score_fn, sde, jax.random.key(0), (2, 2), num_steps=3)
        if scale == 0.1:
            first = len(traces)
    assert len(traces) == first


def test_a_network_may_branch_on_a_bound_flag():
    """Partial(apply, params, train=False) is the usual way to bind Flax's flags."""

    def network(scale, x, label, train):
        return 0 * x if train else scale * x

    samples = []
    for bound in ({"train": False}, {"train": True}):
        network_of_two = jax.tree_util.Partial(network, jnp.asarray(0.5), **bound)
        score_fn = sd.as_score(network_of_two, SDES["vp"])
        samples.append(sd.sample_ode(score_fn, SDES["vp"], jax.random.key(0), (2, 2), num_steps=3))
    assert not np.allclose(*samples)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", ["eps", "score"])
def test_zero_terminal_snr_is_refused(kind, wrap):
    """Also inside jit, where operations on constants are traced too."""

    def sample(key):
        score_fn = sd.as_score(lambda x, label: x, ZERO_SNR, prediction=kind)
        return sd.sample_ode(score_fn, ZERO_SNR, key, (2, 2))

    with pytest.raises(ValueError, match="zero terminal SNR.*prediction='v' or 'x0'"):
        wrap(sample)(jax.random.key(0))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_bare_score_at_zero_terminal_snr_is_refused(wrap):
    with pytest.raises(ValueError, match="zero terminal SNR.*as_score"):
        wrap(lambda key: sd.sample_ode(lambda x, t: -x, ZERO_SNR, key, (2, 2)))(jax.random.key(0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prediction": "noise"}, ["'noise'", "edm, eps, score, v, x0"]),
        ({"noise_label": "sigma"}, ["'sigma'", "data_log_snr, edm, log_sigma, log_snr, t"]),
    ],
)
def test_unknown_names_list_the_known_ones(options, words):
    with pytest.raises(ValueError) as error:
        sd.as_score(lambda x, label: x, SDES["vp"], **options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("score_fn", "words"),
    [
        (lambda x, t: x[:, :1], ["(2, 1)", "(2, 3)", "one score"]),
        (lambda x, t: x[0], ["(3,)", "(2, 3)"]),
        (lambda x, t: x.astype(jnp.bfloat16), ["bfloat16", "float32", ".astype(x.dtype)"]),
        (lambda x, t: (x, t), ["tuple", "(2, 3)"]),
        (lambda x, t: None, ["NoneType", "(2, 3)"]),
    ],
)
def test_bad_scores_are_refused_while_tracing(score_fn, words):
    sde = SDES["vp"]
    for use in (
        lambda: sd.sample_ode(score_fn, sde, jax.random.key(0), (2, 3)),
        lambda: sd.sample_sde(score_fn, sde, jax.random.key(0), (2, 3)),
        lambda: sd.sample_pc(score_fn, sde, jax.random.key(0), (2, 3)),
        lambda: sd.dsm_loss(score_fn, sde, jax.random.key(0), jnp.zeros((2, 3))),
        lambda: sd.weighted_loss(score_fn, sde, jax.random.key(0), jnp.zeros((2, 3))),
    ):
        # eval_shape compiles nothing: the message comes before any compilation.
        with pytest.raises(ValueError) as error:
            jax.eval_shape(use)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda make: make(lambda x, label: x, sd.VP), ["sde=<class", "an SDE, as sd.VP()"]),
        (lambda make: make(sd.VP(), lambda x, label: x), ["must be an SDE", "network, sde"]),
        (lambda make: make(lambda x, label: x, sd.VP(), sigma_data="0.5"), ["sigma_data='0.5'", "one number"]),
        (lambda make: make(lambda x, label: x, sd.VP(), sigma_data=np.ones(2)), ["sigma_data=", "one number"]),
        (lambda make: make(lambda x, label: x, sd.VP(), sigma_data=None), ["sigma_data=None", "one number"]),
    ],
)
def test_what_a_network_is_wrapped_with_is_checked(call, words):
    """Not through what jaxtyping checks under pytest: as users have it."""
    with pytest.raises(ValueError) as error:
        call(inspect.unwrap(sd.as_score))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_data_of_numpy_give_no_warnings():
    """float64, as numpy makes it, in a process without the checks of jaxtyping, in which every warning is an error."""
    code = """
import numpy as np, jax, sde_diffusion as sd
f, vp, key, x = lambda x, t: -x, sd.VP(), jax.random.key(0), np.eye(2)
for loss in (sd.dsm_loss, sd.weighted_loss, sd.implicit_loss, sd.sliced_loss, sd.variational_bound):
    loss(f, vp, key, x)
sd.log_likelihood(f, vp, key, x), sd.encode(f, vp, x), sd.slerp(x, x[::-1], 0.3), sd.dsm_loss(f, vp, key, x.tolist())
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True, env={**os.environ, "XLA_FLAGS": QUICK})


def test_a_network_of_the_wrong_shape_is_refused():
    score_fn = sd.as_score(lambda x, label: x[:, :1], SDES["vp"])
    with pytest.raises(ValueError, match=r"network returned shape \(2, 1\).*\(2, 3\)"):
        score_fn(jnp.zeros((2, 3)), jnp.full(2, 0.5))


def test_the_oracle_answers_like_any_score_function():
    oracle, sde = mixture(), SDES["vp"]
    exact = oracle.score_fn(sde)
    x, t = jax.random.normal(jax.random.key(0), (5, 2)), jnp.linspace(0.1, 0.9, 5)
    through_hub = predict(lambda x, t: exact(x, t), sde, x, t)
    for got, expected in zip(predict(exact, sde, x, t), through_hub):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_the_score_of_another_process_is_refused():
    score_fn = sd.as_score(lambda x, c: x, sd.VP(), prediction="v")
    for call in (
        lambda sde: sd.sample_ode(score_fn, sde, jax.random.key(0), (2, 3), num_steps=2),
        lambda sde: sd.log_likelihood(score_fn, sde, jax.random.key(0), jnp.zeros((2, 3)), rtol=0.1, atol=0.1),
        lambda sde: sd.dsm_loss(score_fn, sde, jax.random.key(0), jnp.zeros((2, 3))),
        lambda sde: sd.weighted_loss(score_fn, sde, jax.random.key(0), jnp.zeros((2, 3))),
        lambda sde: sd.implicit_loss(score_fn, sde, jax.random.key(0), jnp.zeros((2, 3))),
        lambda sde: sd.sliced_loss(score_fn, sde, jax.random.key(0), jnp.zeros((2, 3))),
    ):
        for other in (sd.VE(), sd.VP(beta_max=10.0)):
            with pytest.raises(ValueError, match="the score of VP.*pass the process it was made for"):
                call(other)
        # Where sampling stops is no part of the process.
        assert np.isfinite(call(sd.VP(t_min=0.01))).all()


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(), sd.DDPM()], ids=lambda s: type(s).__name__)
def test_float32_states_pass_through_under_x64(sde, x64):
    """The grid and the schedule are float64 then; the network is not asked to be."""
    score_fn = sd.as_score(lambda x, c: (0.5 * x).astype(jnp.float32), sde, prediction="eps")
    init = jnp.ones((3, 2), jnp.float32)
    key = jax.random.key(0)
    for function in (sd.sample_ode, sd.sample_sde, sd.sample_pc):
        sample = functools.partial(function, score_fn, sde, key, (3, 2), num_steps=4)
        assert jax.eval_shape(lambda x: sample(init=x), init).dtype == jnp.float32
    likelihood = functools.partial(sd.log_likelihood, score_fn, sde, key, rtol=0.1, atol=0.1)
    assert jax.eval_shape(likelihood, init).dtype == jnp.float32
    assert jax.eval_shape(functools.partial(sd.dsm_loss, score_fn, sde, key), init).dtype == jnp.float32


@pytest.mark.parametrize("method", ["adams", "ddim"])
def test_an_object_with_predict_that_is_no_pytree_answers_by_it(method):
    """At zero terminal SNR, where the score alone leaves x0 undefined."""
    sde = sd.CosineVP(t_max=1.0)
    exact = mixture().score_fn(sde)

    class Plain:
        def __call__(self, x, t):
            return jnp.full_like(x, jnp.nan)

        def predict(self, x, t):
            return exact.predict(x, t)

    ours, expected = (
        sd.sample_ode(score_fn, sde, jax.random.key(0), (8, 2), num_steps=6, method=method, sigma_data=0.5) for score_fn in (Plain(), exact)
    )
    np.testing.assert_allclose(ours, expected, atol=1e-5)
