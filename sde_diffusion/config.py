"""Where a config meets the library: every key with its default, their check, and the objects they stand for.

A config file returns `experiment(section=dict(key=value))`; all other keys keep the values written here.
"""

import dataclasses
import inspect
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, config_dict

from sde_diffusion import models
from sde_diffusion.bound import variational_bound
from sde_diffusion.losses import dsm_loss, weighted_loss
from sde_diffusion.prediction import as_score, lookup
from sde_diffusion.samplers import LearnedSolver, sample_ode, sample_pc, sample_sde
from sde_diffusion.samplers import ode, pc, sde as reverse
from sde_diffusion.samplers.grid import GRIDS, check_t_end
from sde_diffusion.samplers.integrate import check_start, find
from sde_diffusion.schedules import BetweenEnds, LinearLogSNR, MonotoneLogSNR
from sde_diffusion.sde import SDE, VE, VP, CosineVP, SubVP, check, check_log_snr, shown
from sde_diffusion.weights import LOG_SNR_WEIGHTS, TIME_WEIGHTS

SDES = {
    "vp": VP, "subvp": SubVP, "ve": VE, "cosine": CosineVP, "linear_log_snr": LinearLogSNR, "monotone_log_snr": MonotoneLogSNR,
}  # fmt: skip
# The function, the solvers that it knows, and its usual one; of the ODE by what the network predicts.
SAMPLERS = {
    "ode": (sample_ode, ode.METHODS, None),
    "sde": (sample_sde, reverse.METHODS, "sde_adams"),
    "pc": (sample_pc, pc.PREDICTORS, "reverse_diffusion"),
}


def defaults() -> dict[str, Any]:
    """Every key but the options of the SDE and the network, which are their constructors' arguments."""
    return {
        "seed": 0,
        "data": {
            "name": "digits",  # digits, gaussian_mixture_2d, a TFDS name, an .npz file or a folder of images
            "data_dir": config_dict.placeholder(str),  # of TFDS; None: TFDS_DATA_DIR, then ~/tensorflow_datasets
            "image_size": config_dict.placeholder(int),  # crop and resize; None: as stored
            "channels": config_dict.placeholder(int),  # 1 or 3; None: as stored
            "flip": False,  # random horizontal flips
            "centered": True,  # pixels in [-1, 1], not [0, 1]
        },
        "sde": {"name": "vp"},
        "model": {"name": "unet"},
        "prediction": {
            "kind": "eps",  # eps, x0, v, score or edm
            "noise_label": config_dict.placeholder(str),  # t, log_sigma, log_snr, data_log_snr or edm; None: edm with edm, else t
            "sigma_data": 0.5,  # standard deviation of the scaled data about its mean, for edm and the samplers
        },
        "loss": {
            "name": "weighted",  # weighted (1/2 w(lambda) (-dlambda/dt) |eps - eps_hat|^2), dsm, or bound (VDM's, of the levels)
            "weight": "elbo",  # weighted: see sd.weights(); dsm: sigma2 or likelihood; bound: elbo
            "times": "log_snr",  # how times are drawn: uniform, log_snr, or adaptive (where the running loss is large)
            "learn_schedule": False,  # of bound: the log-SNR is learned as well (sde linear_log_snr or monotone_log_snr)
        },
        "optim": {
            "lr": 2e-4,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "warmup_steps": 1000,
            "grad_clip": 1.0,  # global norm; 0: none
            "ema_decay": 0.999,  # after a warm-up of (1 + step) / (10 + step)
        },
        "train": {
            "batch_size": 128,  # global: all devices and hosts together
            "accumulate": 1,  # parts of the batch, one after the other: less memory for activations
            "param_shards": 1,  # devices over which parameters, optimizer and average are split; 1: all hold them whole
            "num_steps": 1000,
            "log_every": 50,
            "sample_every": 1000,
            "checkpoint_every": 1000,
            "keep_checkpoints": 2,
            "label_dropout": 0.1,  # share of labels dropped, for networks with num_classes
            "max_bad_steps": 10,  # updates in a row with a non-finite loss before the run stops
        },
        "sample": {
            "sampler": "ode",  # ode, sde or pc
            "method": config_dict.placeholder(str),  # see sd.solvers(), or a file of --mode=fit_solver; for pc the predictor
            "noise_level": 1.0,  # of sde: 0 is the ODE
            "corrector": "langevin",  # of pc
            "snr": 0.16,  # of pc
            "corrector_steps": 1,  # of pc
            "num_steps": 18,
            "grid": config_dict.placeholder(str),  # None: the method's usual one; uniform for pc
            "t_end": config_dict.placeholder(float),  # None: the SDE's t_min
            "denoise": True,
            "num": 1024,
            "batch_size": 512,
            "fit_states": 1024,  # prior draws of --mode=fit_solver, in whole batches of 32, a quarter held out: fewer for large networks on a CPU
            "fit_seconds": 240.0,  # limit of --mode=fit_solver, fine solutions not counted: more for large networks on a CPU
            "seed": 0,
        },
        "eval": {
            "batch_size": 256,
            "num_examples": config_dict.placeholder(int),  # of the held-out set; None: all of it
            "trace": "hutchinson",
            "num_probes": 1,
            "rtol": 1e-3,
            "atol": 1e-3,
            "t_end": config_dict.placeholder(float),  # None: the SDE's t_min
            "ode": True,  # bits/dim by the ODE likelihood
            "bound_draws": 0,  # bits/dim by the variational bound, from this many draws an example; 0: not
            "gaussian_mixture": False,  # also fit scikit-learn's Gaussian mixtures to the training set, for comparison
            "seed": 0,
        },
    }


# A run may go on with other values of these; every other key is part of what its checkpoints mean.
FREE = ("sample", "eval", "train.num_steps", "train.log_every", "train.sample_every", "train.checkpoint_every",
        "train.keep_checkpoints", "train.max_bad_steps", "train.param_shards", "model.remat", "data.data_dir")  # fmt: skip


def _options(cls) -> dict[str, Any]:
    """The options of a dataclass or Linen module with their defaults, as plain config values."""
    out = {}
    for field in dataclasses.fields(cls):
        # The first two are Linen's own; a default that has to be made is an array.
        if field.init and field.name not in ("parent", "name") and field.default is not dataclasses.MISSING:
            kind = float if "float" in str(field.type) else int
            out[field.name] = config_dict.placeholder(kind) if field.default is None else field.default
    return out


def experiment(**sections) -> ConfigDict:
    """The whole config: defaults, the options of the named SDE and network, and on top the values given here.

    Raises:
      ValueError: an unknown section or key, listing the known ones.
    """
    full = defaults()
    for section, table in (("sde", SDES), ("model", models.MODELS)):
        given = sections.get(section, {})
        name = given.get("name", full[section]["name"]) if isinstance(given, dict) else full[section]["name"]
        full[section] = {"name": name, **_options(lookup(table, name, f"{section}.name"))}
    for section, values in sections.items():
        check(section in full, f"unknown config section {shown(section)}; choose one of {', '.join(full)}")
        if not isinstance(full[section], dict):
            full[section] = values
            continue
        check(isinstance(values, dict), f"config section {section!r} is {shown(values)}; it has {', '.join(sorted(full[section]))}")
        for key, value in values.items():
            check(key in full[section], _unknown_key(section, key, full[section]))
            if value is not None:  # None is the default wherever it may stand, and its placeholder knows the type
                full[section][key] = value
    return ConfigDict(full)


def _unknown_key(section, key, known) -> str:
    hint = f" (for another {section}.name, start from a config file that has it)" if section in ("sde", "model") else ""
    return f"unknown config key '{section}.{key}'; {section} has {', '.join(sorted(known))}{hint}"


def load(path: Path) -> ConfigDict:
    """A config from the JSON that `save` wrote.

    Raises:
      ValueError: not a JSON object of known keys, or not readable; the message names the file.
    """
    try:
        check(path.stat().st_size <= 2**20, "more than 1 MiB")
        plain = json.loads(path.read_text())
        check(isinstance(plain, dict), "not a JSON object")
        return experiment(**_tuples(plain))
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        error = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{path} is not a config that can be read ({error}); if a module of your own registers a name in it, import that first or "
            "pass its --config; else restore the file"
        ) from None


def _tuples(value):
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON, tuples as lists."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=list) + "\n"


def differences(config: ConfigDict, saved: ConfigDict) -> list[str]:
    """'key: saved value -> new value' for each key that a run cannot change half-way."""
    new, old = (json.loads(to_json(c)) for c in (config, saved))
    flat_new, flat_old = _flatten(new), _flatten(old)
    out = []
    for key in sorted(flat_new.keys() | flat_old.keys()):
        free = any(key == f or key.startswith(f + ".") for f in FREE)
        if not free and flat_new.get(key) != flat_old.get(key):
            out.append(f"{key}: {flat_old.get(key)} -> {flat_new.get(key)}")
    return out


def _flatten(tree, prefix=""):
    out = {}
    for key, value in tree.items():
        out.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out


# The largest values: the step is an int32, and a sampler's table is made before it is compiled.
_COUNTS = {
    "train.batch_size": 2**31 - 1, "train.num_steps": 2**31 - 2, "train.log_every": 2**31 - 1, "train.sample_every": 2**31 - 1,
    "train.checkpoint_every": 2**31 - 1, "train.keep_checkpoints": 2**31 - 1, "train.max_bad_steps": 2**31 - 1,
    "train.accumulate": 2**31 - 1, "train.param_shards": 2**31 - 1, "sample.num_steps": 100_000, "sample.num": 2**31 - 1,
    "sample.batch_size": 2**31 - 1, "eval.batch_size": 2**31 - 1, "eval.num_probes": 1_000_000,
}  # fmt: skip


def validate(config: ConfigDict) -> None:
    """Raises a one-line ValueError for every wrong value that can be seen without data, files or devices."""
    names = {key: config.get(key, {}) for key in ("sde", "model")}
    for section, value in names.items():
        check(hasattr(value, "keys"), f"config section {section!r} is {shown(value)}; build the config with experiment(...)")
    known = experiment(sde={"name": names["sde"].get("name", "vp")}, model={"name": names["model"].get("name", "unet")})
    for section in config:
        check(section in known, f"unknown config section {section!r}; choose one of {', '.join(known)}")
        if isinstance(known[section], ConfigDict):
            check(hasattr(config[section], "keys"), f"config section {section!r} is {shown(config[section])}; "
                  f"it has {', '.join(sorted(known[section]))}")  # fmt: skip
            for key in config[section]:
                check(key in known[section], _unknown_key(section, key, known[section]))
    for section in known:
        check(section in config, f"config section {section!r} is missing; build the config with experiment(...)")
        if isinstance(known[section], ConfigDict):
            for key in known[section]:
                check(key in config[section], f"config key '{section}.{key}' is missing; build the config with experiment(...)")
    _check_types(config, known)
    sde = build_sde(config)
    check_log_snr(sde)
    network, label = build_model(config), config.prediction.noise_label
    check(
        not getattr(network, "input_fourier", ()) or label in ("log_snr", "data_log_snr"),
        f"model.input_fourier damps its waves by the log-SNR of the input, but prediction.noise_label={label!r}: use 'data_log_snr' "
        "with edm, 'log_snr' otherwise",
    )
    as_score(lambda x, c: x, sde, **_prediction_options(config))
    losses = {"weighted": {**LOG_SNR_WEIGHTS, **TIME_WEIGHTS}, "dsm": {k: TIME_WEIGHTS[k] for k in ("sigma2", "likelihood")},
              "bound": {"elbo": 0}}  # fmt: skip
    lookup(lookup(losses, config.loss.name, "loss.name"), config.loss.weight, f"weight of the {config.loss.name} loss")
    lookup({"uniform": 0, "log_snr": 0, "adaptive": 0}, config.loss.times, "loss.times")
    check(
        config.loss.times != "adaptive" or not config.loss.learn_schedule,
        "loss.times='adaptive' and loss.learn_schedule=True do the same for the variance: use one of the two",
    )
    check(
        not config.loss.learn_schedule or config.loss.name == "bound" and isinstance(sde, BetweenEnds),
        f"loss.learn_schedule needs loss.name='bound' and an SDE with a schedule to learn, got {config.loss.name!r} and "
        f"{config.sde.name!r}: use linear_log_snr or monotone_log_snr",
    )
    check(config.eval.ode or config.eval.bound_draws > 0, "eval.ode=False and eval.bound_draws=0 leave no bits/dim; switch one on")
    if config.sample.sampler == "pc":
        lookup(pc.CORRECTORS, config.sample.corrector, "sample.corrector")
        check(config.sample.snr < 1, f"sample.snr={config.sample.snr!r} must be below 1, where Langevin steps are stable; 0.16 is usual")
    if config.sample.grid is not None:
        lookup(GRIDS, config.sample.grid, "sample.grid")
    lookup({"hutchinson": 0, "exact": 0}, config.eval.trace, "eval.trace")
    check_t_end(sde, config.sample.t_end)
    check_t_end(sde, config.eval.t_end)
    for key, most in _COUNTS.items():
        section, name = key.split(".")
        value = config[section][name]
        check(1 <= value <= most, f"{key}={value!r} must be an integer of at least 1 and at most {most:,}")
    methods = lookup(SAMPLERS, config.sample.sampler, "sample.sampler")[1]
    method = sample_method(config)
    if config.sample.sampler == "ode" and method.endswith(".json"):
        try:
            solver = LearnedSolver.load(method)
            solver.check(sde)
        except ValueError as error:
            raise ValueError(f"sample.method: {error}") from None
        end = config.sample.t_end
        check(
            config.sample.grid is None and (end is None or math.isclose(end, float(solver.times[-1]), rel_tol=1e-5)),
            f"sample.method={method} is a fitted solver with its own times, which end at {float(solver.times[-1]):g}: leave sample.grid and "
            "sample.t_end at None, or fit another",
        )
    else:
        solver = find(methods, method, f"sample.method of the {config.sample.sampler} sampler:")
        check_start(solver, method, sde, config.sample.num_steps)
    states = config.sample.fit_states
    check(
        16 <= states <= 10_000_000, f"sample.fit_states={states!r} must be an integer of at least 16 and at most 10,000,000; 1024 is usual"
    )
    for key, seed in (("seed", config.seed), ("sample.seed", config.sample.seed), ("eval.seed", config.eval.seed)):
        check(isinstance(seed, int) and 0 <= seed < 2**63, f"{key}={seed!r} must be an integer from 0 to 2^63 - 1")
    for key in ("optim.lr", "optim.eps", "sample.snr", "sample.fit_seconds", "eval.rtol", "eval.atol"):
        section, name = key.split(".")
        check(config[section][name] > 1e-37, f"{key}={config[section][name]!r} must be positive, and at least 1e-37")
    s = config.prediction.sigma_data
    check(1e-6 <= s <= 1e6, f"prediction.sigma_data={s!r} must be positive, from 1e-6 to 1e6: the standard deviation of the data")
    for key in ("optim.beta1", "optim.beta2", "optim.ema_decay", "train.label_dropout"):
        section, name = key.split(".")
        # The largest float32 below 1.
        check(0 <= config[section][name] <= 1 - 2**-24, f"{key}={config[section][name]!r} must be in [0, 1)")
    for key, most in (("optim.warmup_steps", 2**31 - 1), ("optim.grad_clip", 1e30), ("sample.corrector_steps", 10_000),
                      ("sample.noise_level", 1e3), ("eval.bound_draws", 1_000_000)):  # fmt: skip
        section, name = key.split(".")
        check(0 <= config[section][name] <= most, f"{key}={config[section][name]!r} must be at least 0 and at most {most:,}")
    n = config.eval.num_examples
    check(n is None or n >= 1, f"eval.num_examples={n} must be at least 1, or None for the whole held-out set")


def _check_types(config: ConfigDict, known: ConfigDict) -> None:
    """Raises a one-line ValueError for a value that is not of its key's type, and for a number that is not finite."""
    for section in known:
        nested = isinstance(known[section], ConfigDict)
        owner, place, prefix = (known[section], config[section], f"{section}.") if nested else (known, config, "")
        for name in owner if nested else [section]:
            value, kind = place[name], owner.get_type(name)
            usual = owner[name]
            if value is None and usual is None:
                continue
            word, fits = _TYPES[kind]
            example = f", as {usual!r}" if usual is not None else ", or None"
            check(fits(value), f"{prefix}{name}={shown(value)} must be {word}{example}")


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value):
    try:
        return (_is_int(value) or isinstance(value, float)) and abs(float(value)) < 3e38  # of float32
    except OverflowError:
        return False


_TYPES = {
    bool: ("True or False", lambda v: isinstance(v, bool)),
    int: ("an integer", _is_int),
    float: ("a finite number", _is_finite),
    str: ("a string of one line", lambda v: isinstance(v, str) and v.isprintable() and len(v) < 1000),
    tuple: ("a tuple of integers", lambda v: isinstance(v, (tuple, list)) and all(map(_is_int, v))),
}


class Learned(NamedTuple):
    """Parameters of a run that learns its schedule as well."""

    network: Any
    schedule: dict[str, Any]  # leaves of the SDE


def learned_leaves(sde: SDE) -> dict[str, Any]:
    """The leaves of a schedule that training may change, as float32 arrays."""
    names = [f.name for f in dataclasses.fields(sde) if f.name in ("log_snr_max", "log_snr_min", "network")]
    return {name: jax.tree.map(lambda a: jnp.array(a, jnp.float32), getattr(sde, name)) for name in names}


def build_sde(config: ConfigDict, params=None) -> SDE:
    """The SDE of the config, with the schedule of the parameters where that is learned."""
    sde = _construct(lookup(SDES, config.sde.name, "sde.name"), config.sde, "sde")
    return dataclasses.replace(sde, **params.schedule) if isinstance(params, Learned) else sde


def _construct(cls, section, kind):
    options = {k: v for k, v in section.items() if k != "name"}
    known = inspect.signature(cls).parameters
    for key in options:
        check(key in known, f"{kind} {section.name!r} has no option {key!r}; it has {', '.join(known)} "
              f"(to change {kind}.name, start from a config of that {kind})")  # fmt: skip
    return cls(**options)


def _model_options(config):
    return {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in config.model.items() if k != "name"}


def _prediction_options(config):
    p = config.prediction
    return {"prediction": p.kind, "noise_label": p.noise_label, "sigma_data": p.sigma_data}


def data_options(config: ConfigDict) -> dict[str, Any]:
    """The arguments of `data.load`."""
    return {key: config.data[key] for key in ("name", "data_dir", "image_size", "channels")}


def build_model(config: ConfigDict):
    """The network of the config, a Linen module."""
    return models.build(config.model.name, **_model_options(config))


def build_score(config: ConfigDict, params, labels=None, dropout_keys=None, *, sde=None, distribute=None):
    """The score function of the config's network with the given parameters; a conditional one takes labels, or none.

    dropout_keys: in training, a key an example `(B,)`. sde: the process in place of the config's. distribute: how the
    network is applied on several devices, see `sharding.fully_sharded` and its neighbours.
    """
    sde = build_sde(config, params) if sde is None else sde
    weights = params.network if isinstance(params, Learned) else params
    apply = build_model(config).apply
    apply = apply if distribute is None else distribute(apply)
    network = jax.tree_util.Partial(apply, {"params": weights}, labels=labels, dropout_keys=dropout_keys)
    return as_score(network, sde, **_prediction_options(config))


def build_loss(config: ConfigDict, values=None, times=None):
    """The loss of the config: (score_fn, sde, key, x0) -> (loss (B,), times (B,)).

    values: of the levels, for the bound; times: in place of the config's.
    """
    options = {"times": config.loss.times if times is None else times, "return_times": True}

    def loss(*arguments):
        if config.loss.name == "bound":
            bound, t = variational_bound(*arguments, values=values, **options)
            return bound.total, t
        if config.loss.name == "dsm":
            return dsm_loss(*arguments, weighting=config.loss.weight, **options)
        return weighted_loss(*arguments, weight=config.loss.weight, **options)

    return loss


def sample_method(config: ConfigDict) -> str:
    """The name of the config's solver, or its file."""
    return config.sample.method or SAMPLERS[config.sample.sampler][2] or ode.usual_method(config.prediction.kind)


def build_sampler(config: ConfigDict):
    """The sampler of the config: (score_fn, key, shape) -> samples, for a score function of `build_score`."""
    c = config.sample
    fn, method = SAMPLERS[c.sampler][0], sample_method(config)
    options = {"num_steps": c.num_steps, "grid": c.grid, "t_end": c.t_end, "denoise": c.denoise}
    if c.sampler == "pc":
        options |= {"predictor": method, "corrector": c.corrector, "snr": c.snr, "corrector_steps": c.corrector_steps}
    else:
        options["method"] = method
    if c.sampler == "sde":
        options["noise_level"] = c.noise_level
    if c.sampler == "ode" and method.endswith(".json"):
        options = {"method": LearnedSolver.load(method), "denoise": c.denoise}
    return lambda score_fn, key, shape: fn(score_fn, score_fn.sde, key, shape, **options)
