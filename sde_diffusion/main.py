"""The entry point: python -m sde_diffusion.main --config=configs/vp_digits.py --workdir=DIR --mode=train|eval|sample|fit_solver."""

import contextlib
import errno
import json
import os
import runpy
import sys
import threading
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

_HERE = Path(__file__).resolve().parent
_CONFIGS = next((p for p in (_HERE.parent / "configs", _HERE / "configs") if p.is_dir()), _HERE)

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file. [default: the workdir's own config, else the embedded digits]"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, checkpoints, metrics, samples.")
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval", "sample", "fit_solver"],
    "What to do; train ends with eval, which samples too; fit_solver fits a solver of sample.num_steps evaluations.",
)

_DISTRIBUTED = flags.DEFINE_boolean(
    "distributed", False, "One process of several, on one host or more. Slurm's steps and JAX_COORDINATOR_ADDRESS switch it on."
)


def _fail(error) -> None:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def _with_config(argv: list[str]) -> list[str]:
    """argv with --config first, as its overrides need it: the one it names, or the workdir's, or the default."""
    values, rest = {}, []
    words = iter(argv[1:])
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        if not equals and name in ("config", "workdir"):
            value = next(words, "")
            word = f"--{name}={value}"
        values[name] = value
        rest += [word] if name != "config" else []
    if values.get("config"):
        return [argv[0], f"--config={_config_path(values['config'])}", *rest]
    run = Path(values.get("workdir") or os.devnull).expanduser().absolute()
    started = (run / "config.json").is_file() and any(run.glob("checkpoints/step_*"))
    config = f"{_HERE / 'saved_config.py'}:{run / 'config.json'}" if started else _CONFIGS / "vp_digits.py"
    return [argv[0], f"--config={config}", *rest]


def _config_path(name: str) -> str:
    """The file that --config names: a path, or the bare name of one of the library's own configs."""
    path = Path(name.partition(":")[0]).expanduser()
    own = _CONFIGS / f"{path.stem}.py"
    if path.is_file():
        return name
    if str(path.parent) in (".", "configs") and own.is_file():
        return str(own)
    known = ", ".join(sorted(p.stem for p in _CONFIGS.glob("*.py") if not p.stem.startswith("_")))
    _fail(f"--config={name} does not exist; name a file, or one of the library's own: {known}")


def _unknown_key(message: str, argv: list[str]) -> str:
    """What to say of an override of a key that the config does not have."""
    path, *argument = argv[1].partition("=")[2].split(":", 1)
    try:
        known = runpy.run_path(path)["get_config"](*argument)
    except Exception:  # the file itself is wrong, and the message is about that
        known = {}
    for word in argv[2:]:
        name, *keys = word.lstrip("-").partition("=")[0].split(".")
        if known and name == "config" and any(key in message for key in keys):
            section = known.get(keys[0])
            choices = f"{keys[0]} has {', '.join(sorted(section))}" if section else f"its sections are {', '.join(known)}"
            return f"unknown config key '{'.'.join(keys)}'; {choices}"
    return " ".join(message.split())


def _wrong_value(message: str, argv: list[str]) -> str:
    """A parser's message, after the flag that it is about where that can be told."""
    blamed = [w for w in argv[2:] if w.partition("=")[2] and w.partition("=")[2] in message]
    flag = f"{blamed[0]}: " if blamed and blamed[0].partition("=")[0] not in message else ""
    return " ".join((flag + message).split())


def _parse(argv):
    """absl's parser; a wrong flag or config value becomes one line."""
    argv = _with_config(argv)
    try:
        rest = flags.FLAGS(argv)
        _ = _CONFIG.value  # the file is read now, not at its first use
    except (AttributeError, KeyError) as error:
        _fail(_unknown_key(str(error), argv))
    except (flags.Error, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        _fail(_wrong_value(str(error), argv))
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; values are set as --config.section.key=value")
    return rest


def _check_writable(workdir: Path) -> None:
    """Raises OSError unless files can be written in the folder, which need not exist yet."""
    there = next(p for p in (workdir, *workdir.parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file; name a folder for --workdir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} cannot be written to; name another --workdir")


def _join_processes() -> None:
    """Where a launcher or the flag says so, meets the other processes of the run, by JAX's distributed runtime.

    JAX finds the others by itself under Slurm and on TPU pods; elsewhere JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID name them.
    """
    import jax

    steps = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if not (_DISTRIBUTED.value or steps > 1 or "JAX_COORDINATOR_ADDRESS" in os.environ):
        return
    # Its handler would keep a SIGTERM to itself until `Signals` takes over: the run would go on until it is killed.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        count, number = (int(os.environ[k]) if k in os.environ else None for k in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(num_processes=count, process_id=number)
    except (RuntimeError, ValueError, TypeError) as error:
        _fail(f"the processes of this run did not meet ({' '.join(str(error).split())}); set JAX_COORDINATOR_ADDRESS=HOST:PORT of "
              "process 0, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or drop --distributed")  # fmt: skip


def _quiet_threads() -> None:
    """Prints no traceback of a thread: what fails in one is raised again where it is waited for."""
    threading.excepthook = lambda _: None
    usual = sys.unraisablehook
    # TensorStore's own threads come here.
    sys.unraisablehook = lambda error: usual(error) if threading.current_thread() is threading.main_thread() else None


def main(_):
    """Sets the run up, with one line for each thing that can be wrong, then hands over to train, evaluate or sample."""
    if not _WORKDIR.value:
        _fail("--workdir is missing; name a folder for this run, as --workdir=runs/digits")
    workdir = Path(_WORKDIR.value).expanduser().absolute()

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # Orbax tells every step of every write, and an error three times

    import jax

    # A U-Net compiles for longer than a short run takes. The environment variable of the same name goes first.
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "sde_diffusion" / "jax"))

    _join_processes()

    from sde_diffusion import config as configs
    from sde_diffusion import data, train
    from sde_diffusion.checkpoint import Checkpoints
    from sde_diffusion.survival import Signals, Stopped, locked

    try:
        config = _CONFIG.value
        configs.validate(config)
        _check_writable(workdir)
        if Path(config.data.name).expanduser().exists() and any(c in config.data.name for c in (os.sep, ".npz")):
            config.data.name = str(Path(config.data.name).expanduser().absolute())  # a run goes on from any folder
        with Checkpoints(workdir, read_only=True) as checkpoints:
            step = checkpoints.latest_step()
        if _MODE.value != "train" and step is None:
            raise ValueError(f"no checkpoint in {workdir}; train first: python -m sde_diffusion.main --workdir={_WORKDIR.value}")
        saved = workdir / "config.json"
        if step is not None and saved.exists():
            changes = configs.differences(config, configs.load(saved))
            if changes:
                raise ValueError(
                    f"{workdir} holds a run of another config ({'; '.join(changes)}); use another --workdir, or drop "
                    "these changes"
                )
        dataset = data.load(**configs.data_options(config))
        if step is not None:
            _check_same_data(workdir / "data.json", dataset)
        mesh, scaler, abstract = train.prepare(config, dataset)
    except (AttributeError, KeyError, ValueError, TypeError, OSError, ImportError) as error:
        _fail(" ".join(str(error).split()))

    _quiet_threads()
    try:
        with contextlib.ExitStack() as stack:
            signals = stack.enter_context(Signals())
            if _MODE.value == "train":
                workdir.mkdir(parents=True, exist_ok=True)
                if jax.process_index() == 0:
                    stack.enter_context(locked(workdir))
                    temporary = workdir / "config.json.tmp"
                    temporary.write_text(configs.to_json(config))
                    temporary.replace(saved)
                    (workdir / "data.json").write_text(json.dumps(dataset.facts) + "\n")
                state = train.train(config, workdir, dataset, signals)
                step = int(state.step)
            else:
                with Checkpoints(workdir, read_only=True) as checkpoints:
                    step, state = checkpoints.restore(abstract)
            _use(state.ema, step, config, workdir, dataset, mesh, scaler)
    except (FloatingPointError, OSError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC
        what = f"no space is left in {workdir}; free some" if full else " ".join(str(error).split())
        print(f"error: {what}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        # Threads that wait to write would each add a traceback of the same thing.
        os._exit(2)
    except Stopped as stop:
        print(f"stopped by {stop}; the same command goes on from the last checkpoint in {workdir}", file=sys.stderr, flush=True)
        if jax.process_count() > 1 and not stop.agreed:
            # The others may wait for this one in a computation, where no signal is heard; an orderly end would wait for them.
            sys.stdout.flush()
            os._exit(stop.code)
        raise SystemExit(stop.code) from None


def _check_same_data(path: Path, dataset) -> None:
    """Raises ValueError where the data are not those that the run began with."""
    before = json.loads(path.read_text()) if path.exists() else dataset.facts
    changes = [f"{k}: {v} -> {dataset.facts.get(k)}" for k, v in before.items() if dataset.facts.get(k) != v]
    if changes:
        raise ValueError(f"the data are not those that {path.parent} was begun with ({'; '.join(changes)}); restore them, or use another --workdir")


def _use(params, step, config, workdir, dataset, mesh, scaler) -> None:
    """What comes after training, or in its place."""
    import jax

    from sde_diffusion import evaluate

    if _MODE.value == "fit_solver":
        evaluate.fit_solver(config, workdir, params, dataset.event_shape)
    elif _MODE.value == "sample":
        samples = evaluate.make_sampler(config, mesh, dataset.event_shape)(params, config.sample.num, config.sample.seed)
        if jax.process_index() == 0:
            evaluate.write_samples(config, workdir, samples, step, dataset, scaler)
    else:
        evaluate.evaluate(config, workdir, params, step, dataset, mesh, scaler)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
