"""Random wrong values, one to three a config: python -m experiments.fuzz [--num=500] [--seed=0].

Each case goes the way of the entry point (flags, config, checks, data, `train.prepare`). It must end in one line that names a
key or a value that was changed, raised by this library, with exit status 2; or in a start after which the update step, the
sampler and the evaluation can be traced. A workdir with a run in it must keep every byte. Some cases are repeated as commands.
"""

import collections
import contextlib
import functools
import io
import json
import os
import random
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

DEVICES = "--xla_force_host_platform_device_count=2"
if __name__ == "__main__":
    # Before JAX starts: on two devices some batches do not divide.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import sde_diffusion
from sde_diffusion import config as configs
from sde_diffusion import data, evaluate, main, report, sharding, train
from sde_diffusion.bound import variational_bound
from sde_diffusion.checkpoint import Checkpoints
from sde_diffusion.config import experiment
from sde_diffusion.likelihood import log_likelihood

_ROOT = Path(__file__).resolve().parent.parent
_SMALL = dict(unet=dict(name="unet", channels=8, multipliers=(1, 2), num_blocks=1), mlp=dict(name="mlp", width=8, depth=1))

# Small networks, so that a start is traced in a second; the shipped configs come on top.
VARIANTS = {
    "digits": dict(model=_SMALL["unet"]),
    "digits_classes": dict(model=dict(_SMALL["unet"], num_classes=10, dropout=0.1, remat=True), prediction=dict(kind="v")),
    "vectors": dict(data=dict(name="gaussian_mixture_2d"), model=_SMALL["mlp"]),
    "vectors_ve": dict(data=dict(name="gaussian_mixture_2d"), model=_SMALL["mlp"], sde=dict(name="ve"), sample=dict(sampler="pc")),
    "vectors_cosine": dict(data=dict(name="gaussian_mixture_2d"), model=_SMALL["mlp"], sde=dict(name="cosine"),
                           prediction=dict(kind="v"), sample=dict(sampler="sde", method="ancestral")),
    "learned": dict(model=_SMALL["unet"], sde=dict(name="monotone_log_snr", log_snr_max=8.0), prediction=dict(kind="edm"),
                    loss=dict(name="bound", learn_schedule=True), eval=dict(ode=False, bound_draws=2)),
    "adaptive": dict(model=_SMALL["mlp"], sde=dict(name="subvp"), loss=dict(times="adaptive"), train=dict(accumulate=2, param_shards=2)),
}  # fmt: skip

WORDS = ["", "x", "none", "None", "nan", "inf", "-inf", "1e400", "-1", "0", "1", "2", "3", "7", "0.5", "1.5", "-0.0", "1e-300", "1e-40", "1e30", "1e9",
         "99999999999999999999999", "2147483648", "true", "False", "()", "(0,)", "(1,)", "(3,)", "(16,)", "(-1, 2)", "(1.5,)", "('a',)", "((1,),)",
         "(1, 2, 4, 8, 16)", "(1,", "[1, 2]", "{}", "{'a': 1}", "lambda: 0", "__import__('os')", "a" * 3000, "naïve-ü-漢字", "\u202e\x00", "two\nlines",
         "/etc/passwd", "/nonexistent/x.npz", "~nobody_here/x", "./", "../..", "/dev/zero", "solver.json", "file.npz", "x" * 300 + "/y", "%s%n", "*"]  # fmt: skip
NAMES = ["vp", "subvp", "ve", "cosine", "linear_log_snr", "monotone_log_snr", "unet", "mlp", "eps", "x0", "v", "score", "edm", "t", "log_sigma",
         "log_snr", "uniform", "adaptive", "weighted", "dsm", "bound", "elbo", "sigma2", "likelihood", "ode", "sde", "pc", "heun", "adams_4", "dpmpp_3m",
         "euler_maruyama", "ancestral", "langevin_norm", "quadratic", "exact", "hutchinson", "fir", "residual", "fourier", "float16", "float64", "int8",
         "digits", "gaussian_mixture_2d", "mnist", "cifar10", "cifar1O", "mnist:9.9.9"]  # fmt: skip
OF_TYPE = {
    bool: ["true", "false", "True", "1", "0"],
    int: ["-1", "0", "1", "2", "3", "4", "5", "6", "7", "8", "16", "64", "100", "1000000", "2147483647", "2147483648", "9223372036854775807", "10" * 30],
    float: ["-1", "0", "-0.0", "0.001", "0.1", "0.5", "0.9", "0.999", "0.9999999999", "1", "1.5", "2", "10", "100", "1e-5", "1e-10", "1e-40", "1e-300",
            "1e9", "1e30", "1e39", "1e300", "nan", "inf", "-inf"],
    str: [*NAMES, "none", "", "x", "a" * 3000, "naïve-ü-漢字", "/etc/passwd", "/nonexistent/x.npz", "~nobody_here/x", "./", "/dev/zero", "solver.json"],
    tuple: ["()", "(1,)", "(2,)", "(0,)", "(-1, 2)", "(1, 2)", "(2, 1)", "(1, 1, 1)", "(1, 2, 4, 8, 16)", "(4,)", "(8,)", "(8, 4)", "(16,)", "(1.5,)",
            "('a',)", "((1,),)", "(1000000,)", "(30,)", "(3, 3)", "(100,)", "(True,)", "3", "(" + "1," * 5000 + ")"],
}  # fmt: skip
UNKNOWN = ["optim.learning_rate", "modle.channels", "train.seed", "data", "seed.x", "sde.sigma_maximum", "model.channels.deep", "optim", "eval.", ".lr", "lr",
           "sample.num_step", "__class__", "model.__dict__"]  # fmt: skip
# Settings that are wrong only together, or only for the data.
CONFLICTS = [
    ["sde.t_max=1.0", "prediction.kind=eps"], ["model.attention=(5,)"], ["model.channels=7"], ["model.multipliers=(1,1,1,1,1)"],
    ["data.image_size=9"], ["train.batch_size=7"], ["train.accumulate=3"], ["train.param_shards=3"], ["sample.t_end=2.0"], ["eval.t_end=1e-9"],
    ["loss.learn_schedule=True", "loss.name=weighted"], ["loss.times=adaptive", "loss.learn_schedule=True"], ["data.name=gaussian_mixture_2d"],
    ["data.name=digits", "data.flip=True"], ["data.flip=True"], ["model.num_classes=3"], ["eval.ode=False", "eval.bound_draws=0"],
    ["sample.sampler=sde", "sample.method=adams"], ["sample.method=dpmpp_3m", "sample.num_steps=2"], ["sample.num_steps=1", "mode=fit_solver"],
    ["loss.weight=sigma2", "loss.name=bound"], ["data.channels=3"], ["model.channels=60000"], ["model.num_blocks=100000"], ["model.width=999999"],
    ["sample.num_steps=2000000000"], ["train.batch_size=2000000000"], ["eval.num_probes=1000000"], ["sde.beta_max=1e30"], ["sde.sigma_max=1e38"],
    ["sde.t_min=0.99999999"], ["model.dtype=float16", "model.param_dtype=int8"], ["sample.noise_level=1e20", "sample.sampler=sde"],
]  # fmt: skip


class Case(NamedTuple):
    """One command: the config that it starts from, its flags, and whether its workdir holds a run."""

    base: str
    words: tuple[str, ...]
    in_run: bool
    file: Path | None = None  # a saved config with changes of its own
    changes: tuple[str, ...] = ()  # of that file, as key=value

    def arguments(self, room: Path) -> list[str]:
        config = _ROOT / "configs" / f"{self.base}.py"
        config = config if config.exists() else room / "configs" / f"{self.base}.py"
        if self.file:
            config = f"{_ROOT / 'sde_diffusion' / 'saved_config.py'}:{self.file}"
        return [f"--config={config}", f"--workdir={room / ('run_' + self.base if self.in_run else 'new')}", *self.words]

    def command(self, room: Path) -> str:
        words = " ".join(shlex.quote(a) for a in self.arguments(room))
        return f"XLA_FLAGS={DEVICES} python -m sde_diffusion.main {words}"


class Result(NamedTuple):
    """How a case ended: "start", "refused" or "failure", with its message, and the place that refused it."""

    kind: str
    message: str
    place: str = ""


def make_room(room: Path, runs) -> None:
    """The variants as config files, and for some a workdir with a run: config, checkpoint and metrics of an untrained network."""
    (room / "configs").mkdir(parents=True)
    for name, sections in VARIANTS.items():
        code = f"from sde_diffusion.config import experiment\n\n\ndef get_config():\n    return experiment(**{sections!r})\n"
        (room / "configs" / f"{name}.py").write_text(code)
    for name in runs:
        config, workdir = experiment(**VARIANTS[name]), room / f"run_{name}"
        dataset = data.load(**configs.data_options(config))
        state = jax.jit(lambda: train.init_state(config, dataset.event_shape), compiler_options={"xla_backend_optimization_level": 0})()  # noqa: B023
        with Checkpoints(workdir) as checkpoints:
            checkpoints.save(4, state._replace(step=jnp.int32(4)))
        (workdir / "config.json").write_text(configs.to_json(config))
        with report.Metrics(workdir) as metrics:
            metrics.write(4, {"loss": 1.0})


# Of a file, which no parser of flags looks at before.
RAW = [None, True, False, -1, 0, 1, 3, 0.5, 1.5, -0.0, 1e-300, 1e30, 10**30, float("nan"), float("inf"), "", "x", "uniform", "1", [], [1], [0], ["a"],
       [[1]], [1.5], {}, {"a": 1}, "a" * 3000, "two\nlines", [1] * 5000]  # fmt: skip


def make_file_case(rng: random.Random, bases, folder: Path, number: int) -> Case:
    """As `make_case`, with the values in a saved config."""
    base, changes = rng.choice(bases), []
    plain = json.loads(configs.to_json(_config(base)))
    for _ in range(rng.randint(1, 3)):
        key, value = rng.choice([*_keys(base), *plain, "sde.unknown", "unknown"]), rng.choice(RAW)
        owner, (*sections, name) = plain, key.split(".")
        for section in sections:
            owner = owner[section] if isinstance(owner.get(section), dict) else {}
        owner[name] = value
        changes.append(f"{key}={value}")
    file = folder / f"{number}.json"
    folder.mkdir(exist_ok=True)
    file.write_text(json.dumps(plain))
    return Case(base, (), False, file, tuple(changes))


def make_case(rng: random.Random, bases, runs) -> Case:
    """A config with one to three keys changed at random, or a conflict, or an unknown key."""
    in_run = rng.random() < 0.3
    base = rng.choice(runs if in_run else bases)
    kind, words = rng.random(), []
    if kind < 0.2:
        words = rng.choice(CONFLICTS)
    elif kind < 0.3:
        words = [f"{rng.choice(UNKNOWN)}={rng.choice(WORDS)}"]
    else:
        keys = _keys(base)
        for _ in range(rng.randint(1, 3)):
            key = rng.choice(list(keys))
            # Mostly of the key's type: what is not is refused by the parser.
            words.append(f"{key}={rng.choice(OF_TYPE[keys[key]] if rng.random() < 0.7 else WORDS)}")
    mode = ["--mode=" + rng.choice(["train", "eval", "sample", "fit_solver"])] if in_run and rng.random() < 0.7 else []
    return Case(base, tuple([*mode, *("--" + ("" if w.startswith("mode=") else "config.") + w for w in words)]), in_run)


def _config(base):
    if base in VARIANTS:
        return experiment(**VARIANTS[base])
    return runpy.run_path(str(_ROOT / "configs" / f"{base}.py"))["get_config"]()


@functools.cache
def _keys(base):
    config = _config(base)
    nested = {f"{s}.{k}": config[s].get_type(k) for s in config if hasattr(config[s], "keys") for k in config[s]}
    return {"seed": int, **nested}


def trace(run: main.Start) -> None:
    """Traces what a run would compile: the update step, the sampler, and what evaluates."""
    config, dataset, scaler = run.config, run.dataset, run.scaler
    size, event = config.train.batch_size, dataset.event_shape
    batch = {"x": jax.ShapeDtypeStruct((size, *event), dataset.train.dtype)}
    if dataset.train_labels is not None:
        batch["label"] = jax.ShapeDtypeStruct((size,), np.int32)
    jax.eval_shape(train.make_update(config, scaler, sharding.fully_sharded(run.mesh)), run.abstract, train.zero_totals(), batch)
    params, key = run.abstract.ema, jax.random.key(0)
    evaluate.make_batch_sampler(config, run.mesh, event).trace(params, key)
    one = jax.ShapeDtypeStruct((1, *event), np.float32)

    def bits(params, x):
        score_fn, sde = configs.build_score(config, params), configs.build_sde(config, params)
        c, out = config.eval, []
        if c.ode:
            out.append(
                log_likelihood(score_fn, sde, key, x, trace=c.trace, num_probes=c.num_probes, rtol=c.rtol, atol=c.atol, t_end=c.t_end)
            )
        if c.bound_draws:
            out.append(variational_bound(score_fn, sde, key, x).total)
        return out

    jax.eval_shape(bits, params, one)


_INSIDE = re.compile(r"Traceback|File \"|jax\.|jax_|numpy|flax|absl|ml_collections|ConfigDict|object is not|has no attribute|"
                     r"unsupported operand|not supported between|Error whilst|NoneType|\[Errno|unexpected keyword|ShapedArray|Traced")  # fmt: skip
_HERE = (Path(sde_diffusion.__file__).parent, _ROOT / "configs")


class _Slow(BaseException):
    pass


def _too_slow(*_):
    raise _Slow()


def run_case(case: Case, room: Path, seconds: int = 90) -> Result:
    """One case in this process."""
    before = signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(seconds)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            values = flags.FlagValues()
            main.parse(["main", *case.arguments(room)], values)
            trace(main.start(values))
        return Result("start", "")
    except SystemExit as stop:
        lines = [line for line in stderr.getvalue().splitlines() if line.startswith("error: ")]
        message, cause = (lines or [""])[-1], stop.__context__
        place, fault = "flags", _fault(case, stderr.getvalue(), message)
        if stop.code != 2:
            fault = f"exit status {stop.code}"
        if isinstance(cause, Exception) and not fault:
            frames = traceback.extract_tb(cause.__traceback__)
            last = Path(frames[-1].filename)
            place = f"{last.stem}.{frames[-2 if frames[-1].name == 'check' else -1].name}"
            parsing = any(f.name == "parse" and f.filename == main.__file__ for f in frames)
            if parsing:
                place = "flags"
            elif not last.is_relative_to(_HERE[0]):
                fault = f"{type(cause).__name__} from {last.name}"
            elif not isinstance(cause, (ValueError, OSError, ImportError)):
                fault = f"{type(cause).__name__} from Python"
        return Result("failure" if fault else "refused", f"{fault}: {message}" if fault else message, place)
    except _Slow:
        return Result("failure", f"took longer than {seconds} s")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)
        inside = [f for f in where if Path(f.filename).is_relative_to(_HERE[0])][-1:] or where[-1:]
        return Result(
            "failure", f"{type(error).__name__} at {Path(inside[0].filename).name}:{inside[0].lineno}: {' '.join(str(error).split())[:300]}"
        )
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _fault(case: Case, stderr: str, message: str) -> str:
    """What is wrong with a refusal, or ""."""
    if not message:
        return f"no line of error, but {stderr[-200:]!r}"
    if "Traceback" in stderr or stderr.count("error: ") != 1 or not stderr.endswith("\n") or stderr.count("\n") != 1:
        return f"not one line: {stderr[-300:]!r}"
    if len(message) > 1500:
        return f"{len(message)} characters"
    plain = message
    words = [*case.words, *case.changes]
    for word in words:
        key, _, value = word.lstrip("-").partition("=")
        plain = plain.replace(value, "") if len(value) > 3 else plain
    inside = _INSIDE.search(plain)
    if inside:
        return f"says {inside[0]!r}"
    for word in words:
        key, _, value = word.lstrip("-").partition("=")
        short = key.strip(".").split(".")[-1]
        if short and short in message or value and value in message or value[:50] and repr(value[:50])[1:-1] in message:
            return ""
    return "names no key and no value"


def contents(folder: Path) -> dict:
    """Every file below with its bytes."""
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def as_command(case: Case, room: Path, result: Result) -> str | None:
    """What differs when a refused case is given to a process of its own, or None."""
    words = [sys.executable, "-m", "sde_diffusion.main", *case.arguments(room)]
    env = dict(
        os.environ, XLA_FLAGS=DEVICES, JAX_PLATFORMS="cpu", PYTHONPATH=os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    )
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=_ROOT, timeout=600)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if result.kind == "start":
        return None if done.returncode == 0 else f"exit status {done.returncode}: {done.stderr[-300:]}"
    if done.returncode != 2 or lines != [result.message] or "Traceback" in done.stderr:
        return f"exit status {done.returncode}: {done.stderr[-400:]}"
    return None


def fuzz(num: int, seed: int, room: Path, bases, runs=("vectors", "digits"), say=print, commands: int = 0) -> list[tuple[Case, Result]]:
    """Runs the cases; returns those with their results. Damage to a workdir is a failure of its own."""
    make_room(room, runs)
    # Images are decoded where they are needed, and not at all here; a set is opened once.
    data.MEMORY_LIMIT, load, limit = 2**20, data.load, data.MEMORY_LIMIT
    data.load = functools.cache(load)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    rng, out, before = random.Random(seed), [], contents(room)
    try:
        while len(out) < num:
            by_file = rng.random() < 0.2
            case = make_file_case(rng, bases, Path(f"{room}-files"), len(out)) if by_file else make_case(rng, bases, runs)
            if any("\x00" in w for w in case.words):
                # The system passes no such argument to a program.
                case = case._replace(words=tuple(w.replace("\x00", "\x01") for w in case.words))
            began = time.monotonic()
            result = run_case(case, room)
            if contents(room) != before:
                result = Result("failure", f"wrote into the folder; {result.message}")
                before = contents(room)
            out.append((case, result))
            if result.kind == "failure":
                say(f"FAILURE {result.message}\n  {case.command(room)}", flush=True)
            elif time.monotonic() - began > 30:
                say(f"{time.monotonic() - began:.0f} s: {case.command(room)}", flush=True)
            if len(out) % 100 == 0:
                jax.clear_caches()
                say(f"{len(out)} cases, {collections.Counter(r.kind for _, r in out)}", flush=True)
    finally:
        data.load, data.MEMORY_LIMIT = load, limit
    refused = [(c, r) for c, r in out if r.kind == "refused"]
    picked = rng.sample(refused, min(commands, len(refused)))
    for case, result in picked:
        fault = as_command(case, room, result)
        if fault or contents(room) != before:
            out.append((case, Result("failure", f"as a command: {fault or 'wrote into the folder'}")))
            say(f"FAILURE {out[-1][1].message}\n  {case.command(room)}", flush=True)
    if commands:
        say(f"{len(picked)} refusals repeated as commands", flush=True)
    return out


def _main(_):
    logging.set_verbosity(logging.ERROR)
    count, seed = flags.FLAGS.num, flags.FLAGS.seed
    shipped = sorted(p.stem for p in (_ROOT / "configs").glob("*.py"))
    # The CIFAR networks take half a minute to trace.
    bases = [*3 * list(VARIANTS), *(n for n in shipped if "cifar" not in n), "vp_cifar" if flags.FLAGS.cifar else "digits"]
    room = Path(tempfile.mkdtemp(prefix="fuzz-"))
    began = time.monotonic()
    results = fuzz(count, seed, room, bases, commands=flags.FLAGS.commands)
    refusals = collections.Counter(r.place for _, r in results if r.kind == "refused")
    kinds = collections.Counter(r.kind for _, r in results)
    print(f"\n{'cases':<40}{len(results):>6}   {time.monotonic() - began:.0f} s, seed {seed}")
    print(f"{'valid starts':<40}{kinds['start']:>6}   traced: update step, sampler, evaluation")
    print(f"{'refused in one line':<40}{kinds['refused']:>6}")
    for place, n in refusals.most_common():
        print(f"{'  by ' + place:<40}{n:>6}")
    print(f"{'failures':<40}{kinds['failure']:>6}")
    for case, result in results:
        if result.kind == "failure":
            print(f"  {result.message}\n    {case.command(room)}")
    sys.exit(1 if kinds["failure"] else 0)


if __name__ == "__main__":
    flags.DEFINE_integer("num", 500, "Cases.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the cases.")
    flags.DEFINE_integer("commands", 20, "Refusals that are repeated as commands of their own.")
    flags.DEFINE_boolean("cifar", True, "Also change a CIFAR config, which takes longer.")
    app.run(_main)
