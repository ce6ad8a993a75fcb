import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import config_flags  # noqa: F401  (configs are read as the entry point reads them)

import sde_diffusion as sd
from sde_diffusion import config as configs
from sde_diffusion.config import experiment

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def read(path):
    scope = {}
    exec(compile(path.read_text(), path, "exec"), scope)
    return scope["get_config"]()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_valid_and_survives_json(path, tmp_path):
    config = read(path)
    configs.validate(config)
    file = tmp_path / "config.json"
    file.write_text(configs.to_json(config))
    again = configs.load(file)
    configs.validate(again)
    assert configs.differences(again, config) == []
    assert json.loads(configs.to_json(again)) == json.loads(configs.to_json(config))
    assert read(path).sde.name in path.stem or path.stem == "gaussian_mixture_2d" or path.stem.startswith("vdm_")


def test_published_parameter_counts():
    """61.8 and 62.8 million: the DDPM++ and NCSN++ of arXiv:2011.13456 with 4 blocks a resolution."""
    for name, millions in (("vp_cifar", 61.8), ("subvp_cifar", 61.8), ("ve_cifar", 62.8)):
        model = configs.build_model(read(CONFIGS[0].with_name(f"{name}.py")))
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1))
        count = sum(a.size for a in jax.tree.leaves(shapes))
        assert round(count / 1e6, 1) == millions


def test_overriding_one_key_leaves_the_rest():
    config = experiment(optim=dict(lr=1e-4))
    assert config.optim.lr == 1e-4
    assert config.optim.beta2 == experiment().optim.beta2


BAD = [
    (("optim", "learning_rate", 1e-4), ["optim.learning_rate", "lr"]),
    (("model", "name", "unets"), ["unets", "unet", "mlp"]),
    (("sde", "name", "vpp"), ["vpp", "subvp"]),
    (("sample", "method", "heunn"), ["heunn", "ddim"]),
    (("sample", "sampler", "odd"), ["odd", "ode", "pc"]),
    (("sample", "grid", "linear"), ["linear", "edm"]),
    (("loss", "weight", "elb"), ["elb", "sigmoid"]),
    (("loss", "times", "cosine"), ["cosine", "adaptive, log_snr, uniform"]),
    (("loss", "name", "mse"), ["mse", "dsm"]),
    (("prediction", "kind", "noise"), ["noise", "eps"]),
    (("sample", "num_steps", 0), ["sample.num_steps=0", "at least 1"]),
    (("sample", "fit_states", 15), ["sample.fit_states=15", "at least 16"]),
    (("sample", "fit_states", 10**9), ["sample.fit_states=1000000000", "at most 10,000,000"]),
    (("train", "batch_size", -4), ["train.batch_size=-4", "at least 1"]),
    (("sample", "t_end", 2.0), ["t_end=2.0", "range", "None"]),
    (("eval", "t_end", 0.0), ["t_end=0.0", "range"]),
    (("optim", "lr", 0.0), ["optim.lr=0.0", "positive"]),
    (("optim", "ema_decay", 1.0), ["optim.ema_decay=1.0", "[0, 1)"]),
    (("sde", "beta_max", 0.01), ["beta_max=0.01", "beta_min"]),
    (("model", "multipliers", (1, 0)), ["model.multipliers=(1, 0)", "positive"]),
    (("model", "input_fourier", (3,)), ["model.input_fourier", "prediction.noise_label=None", "'data_log_snr'"]),
    (("model", "dropout", 2.0), ["model.dropout=2.0", "[0, 1)"]),
    (("eval", "seed", -1), ["eval.seed=-1", "from 0"]),
]


@pytest.mark.parametrize("change, words", BAD, ids=lambda v: ".".join(map(str, v)) if isinstance(v, tuple) else "")
def test_wrong_values_name_themselves_and_the_fix(change, words):
    section, key, value = change
    config = experiment()
    with config.unlocked():
        config[section][key] = value
    with pytest.raises(ValueError) as error:
        configs.validate(config)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_eps_prediction_with_zero_terminal_snr_is_refused():
    config = experiment(sde=dict(name="cosine", t_max=1.0))
    with pytest.raises(ValueError, match="zero terminal SNR.*prediction='v'"):
        configs.validate(config)
    configs.validate(experiment(sde=dict(name="cosine", t_max=1.0), prediction=dict(kind="v")))


def test_differences_ignore_what_a_run_may_change():
    saved = experiment()
    new = experiment(sample=dict(num_steps=7), train=dict(num_steps=9), optim=dict(lr=1.0))
    assert configs.differences(new, saved) == ["optim.lr: 0.0002 -> 1.0"]


def test_builders_follow_the_config():
    config = experiment(sde=dict(name="ve", sigma_max=80.0), model=dict(name="mlp", width=8, depth=1))
    sde = configs.build_sde(config)
    assert isinstance(sde, sd.VE) and float(sde.sigma(1.0)) == pytest.approx(80.0)
    params = configs.build_model(config).init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1))["params"]
    score_fn = configs.build_score(config, params)
    # The network starts at eps = 0: the score vanishes.
    assert jnp.all(score_fn(jnp.ones((3, 2)), jnp.full(3, 0.5)) == 0)
    config.sample.method = "ddim"
    config.sample.num_steps = 3
    x = configs.build_sampler(config)(score_fn, jax.random.key(1), (5, 2))
    assert x.shape == (5, 2)


def test_a_sampler_that_cannot_start_is_refused_before_training():
    zero_snr = dict(sde=dict(name="cosine", t_max=1.0), prediction=dict(kind="v"))
    configs.validate(experiment(**zero_snr))
    for sample, words in (
        (dict(sampler="sde", method="euler_maruyama"), ["'euler_maruyama'", "zero terminal SNR", "'ancestral'"]),
        (dict(method="dpmpp_3m", num_steps=2), ["'dpmpp_3m'", "at least 3 steps, got 2"]),
    ):
        with pytest.raises(ValueError) as error:
            configs.validate(experiment(**zero_snr, sample=sample))
        assert all(word in str(error.value) for word in words)


def test_a_saved_config_takes_overrides_like_a_fresh_one(tmp_path):
    """JSON has no tuples: they come back as tuples all the same."""
    (tmp_path / "config.json").write_text(configs.to_json(experiment(model=dict(multipliers=(1, 2, 2)))))
    config = configs.load(tmp_path / "config.json")
    config.model.multipliers = (1, 1)
    assert config.model.multipliers == (1, 1) and config.model.attention == ()
