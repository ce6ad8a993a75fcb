"""The entry point: python -m sde_diffusion.main --config=configs/vp_digits.py --workdir=DIR --mode=train|eval|sample|fit_solver."""

import contextlib
import errno
import json
import math
import os
import runpy
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags, logging
from ml_collections import config_flags

_HERE = Path(__file__).resolve().parent
_CONFIGS = next((p for p in (_HERE.parent / "configs", _HERE / "configs") if p.is_dir()), _HERE)


def _define_flags(values: flags.FlagValues, argv: list[str]) -> None:
    config_flags.DEFINE_config_file(
        "config", None, "Config file. [default: the workdir's own config, else the embedded digits]", flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "Folder of the run: config, checkpoints, metrics, samples.", flag_values=values)
    flags.DEFINE_enum(
        "mode", "train", ["train", "eval", "sample", "fit_solver"],
        "What to do; train ends with eval, which samples too; fit_solver fits a solver of sample.num_steps evaluations.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean(
        "distributed", False, "One process of several, on one host or more. Slurm's steps and JAX_COORDINATOR_ADDRESS switch it on.",
        flag_values=values,
    )  # fmt: skip


class Start(NamedTuple):
    """A run that can begin: its flags, all of them checked, its data, and what `train.prepare` makes of the two."""

    mode: str
    workdir: Path
    config: Any
    dataset: Any
    mesh: Any
    scaler: Any
    abstract: Any


# Exit statuses: what is wrong would be wrong again (a flag, a value, the data); it may pass (a full disk, another run, a lost process).
_WRONG, _PASSING = 2, os.EX_TEMPFAIL


def _fail(error, status: int = _WRONG, at_once: bool = False) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if at_once:
        # Threads that wait to write would each add a traceback of the same thing; lost processes would be waited for.
        sys.stdout.flush()
        os._exit(status)
    raise SystemExit(status)


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


def _cut(text: str) -> str:
    """A word of the command line without the middle of a long one."""
    return text if len(text) <= 100 else f"{text[:80]}...{text[-15:]}"


def _sections(argv: list[str]):
    """The config that the config file gives by itself.

    Raises:
      ValueError: it gives none; the message says why, and where.
    """
    path, *argument = argv[1].partition("=")[2].split(":", 1)
    try:
        sections = runpy.run_path(path)["get_config"](*argument)
        if not hasattr(sections, "to_dict"):
            raise TypeError(f"get_config() returned a {type(sections).__name__}; return experiment(...)")
        return sections
    except Exception as error:  # of any kind, by what the config file does
        if Path(path).name == "saved_config.py":
            raise ValueError(error) from None
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        place = f", line {lines[-1]}" if lines else ""
        reason = f": {error}" if isinstance(error, (ValueError, SyntaxError)) else f" ({type(error).__name__}: {error})"
        raise ValueError(f"{path}{place}, does not give a config{reason}") from None


def _why_not_parsed(error: Exception, argv: list[str]) -> str:
    """One line for what the parser met: an unknown key, a value of the wrong type, a wrong flag, or a wrong config file."""
    message = str(error)
    try:
        sections, overrides = _sections(argv), []
    except ValueError as why:
        return str(why)
    for word in argv[2:]:
        name, _, value = word.lstrip("-").partition("=")
        first, *keys = name.split(".")
        # --noconfig.data.flip is absl's way to say False.
        if first in ("config", "noconfig") and keys:
            overrides.append((word, keys, value))
    for word, keys, value in overrides:
        if keys[0] not in sections:
            return f"unknown config key '{'.'.join(keys)}'; its sections are {', '.join(sections)}"
        section = sections[keys[0]]
        known = ", ".join(sorted(section)) if hasattr(section, "keys") else ""
        if not known and len(keys) > 1:
            return f"unknown config key '{'.'.join(keys)}'; {keys[0]} is one value, set as --config.{keys[0]}=..."
        if known and len(keys) == 1:
            return f"{_cut(word)}: {keys[0]} is a section; set one of its keys, as --config.{keys[0]}.{known.partition(',')[0]}=..."
        if known and (keys[1] not in section or len(keys) > 2):
            return f"unknown config key '{'.'.join(keys)}'; {keys[0]} has {known}"
    blamed = [(w, keys, v) for w, keys, v in overrides if w in message] or [(w, keys, v) for w, keys, v in overrides if v and v in message]
    if blamed:
        word, keys, value = blamed[0]
        owner = sections[keys[0]] if len(keys) == 2 else sections
        kind = owner.get_type(keys[-1])
        example = owner[keys[-1]]
        as_in = "" if example is None else f", as {example!r}"
        what = {bool: "true or false", int: "an int", float: "a number", tuple: "a tuple"}.get(kind, f"a {kind.__name__}")
        return f"{_cut(word)} must be {what}{as_in}"
    words = [w for w in argv[2:] if w.partition("=")[2] and w.partition("=")[2] in message]
    flag = f"{_cut(words[0])}: " if words and words[0].partition("=")[0] not in message else ""
    return flag + message


def parse(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """absl's parser of the program's command line into `values`; a wrong flag or config value is one line and exit status 2."""
    try:
        argv = _with_config(argv)
    except (OSError, RuntimeError) as error:  # a name that is too long, or of a user who does not exist
        _fail(f"--workdir or --config is no path ({getattr(error, 'strerror', None) or error}); name a folder and a file")
    try:
        _define_flags(values, argv)
        rest = values(argv)
        if not hasattr(values.config, "to_dict"):  # the file is read now, not at its first use
            raise RuntimeError(f"get_config() returned a {type(values.config).__name__}; return experiment(...)")
    except Exception as error:  # of any kind, by what the config file does
        _fail(_why_not_parsed(error, argv))
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


def _join_processes(distributed: bool = False) -> None:
    """Where a launcher or the flag says so, meets the other processes of the run, by JAX's distributed runtime.

    JAX finds the others by itself under Slurm and on TPU pods; elsewhere JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID name them.
    """
    import jax

    steps = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if not (distributed or steps > 1 or "JAX_COORDINATOR_ADDRESS" in os.environ):
        return
    # Its handler would keep a SIGTERM to itself until `Signals` takes over: the run would go on until it is killed.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX itself ends a process that waits in vain, without a line that says so.
    late = threading.Timer(
        10.0, print, ["waiting for the other processes of this run, up to 5 minutes ..."], {"file": sys.stderr, "flush": True}
    )
    late.daemon = True
    late.start()
    try:
        count, number = (int(os.environ[k]) if k in os.environ else None for k in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(num_processes=count, process_id=number)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        _fail(f"the processes of this run did not meet ({' '.join(str(error).split())}); set JAX_COORDINATOR_ADDRESS=HOST:PORT of "
              "process 0, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or drop --distributed")  # fmt: skip
    finally:
        late.cancel()


# What a computation over several processes says when one is gone: Gloo (CPU), NCCL (GPU), and JAX's own runtime.
_LOST = ("Gloo", "Connection reset", "Connection closed", "NCCL", "UNAVAILABLE", "heartbeat")


def _lost(error) -> str:
    return f"another process of this run was lost ({str(error).splitlines()[0][:200]}); the same command goes on from the last checkpoint"


def _quiet_threads() -> None:
    """Prints no traceback of a thread: what fails in one is raised again where it is waited for."""
    threading.excepthook = lambda _: None
    usual = sys.unraisablehook
    # TensorStore's own threads come here.
    sys.unraisablehook = lambda error: usual(error) if threading.current_thread() is threading.main_thread() else None


def start(values: flags.FlagValues = flags.FLAGS) -> Start:
    """Checks all that the parsed flags say, reads the data where needed, and prepares; one line and exit status 2 for what is wrong.

    Writes nothing, and compiles nothing.
    """
    if not values.workdir:
        _fail("--workdir is missing; name a folder for this run, as --workdir=runs/digits")
    import jax

    from sde_diffusion import config as configs
    from sde_diffusion import data, sharding, train
    from sde_diffusion.checkpoint import Checkpoints

    try:
        workdir = Path(values.workdir).expanduser().absolute()
        config = values.config
        try:
            configs.validate(config)
        except ValueError as error:
            file = Path(values["config"].config_filename.partition(":")[2])
            raise ValueError(f"{file}: {error}" if file.name and not values["config"].override_values else error) from None
        _check_writable(workdir)
        if any(c in config.data.name for c in (os.sep, ".npz")) and Path(config.data.name).expanduser().exists():
            config.data.name = str(Path(config.data.name).expanduser().absolute())  # a run goes on from any folder
        with Checkpoints(workdir, read_only=True) as checkpoints:
            step = checkpoints.latest_step()
        if values.mode != "train" and step is None:
            source = values["config"].config_filename
            given = "" if source == str(_CONFIGS / "vp_digits.py") else f"--config={source} "
            raise ValueError(
                f"--mode={values.mode} needs a trained network, but there is no checkpoint in {workdir}; train first: "
                f"python -m sde_diffusion.main {given}--workdir={values.workdir}"
            )
        saved = workdir / "config.json"
        if step is not None and saved.exists():
            changes = configs.differences(config, configs.load(saved))
            if changes:
                raise ValueError(
                    f"{workdir} holds a run of another config ({'; '.join(changes)}); use another --workdir, or drop these changes"
                )
        n = config.sample.num_steps
        if values.mode == "fit_solver" and not 2 <= n < 100:
            raise ValueError(
                f"sample.num_steps={n}: --mode=fit_solver needs 2 to 99 evaluations, fewer than its fine solutions have; 5 to 20 is usual"
            )
        facts = None if step is None else data.read_facts(workdir / "data.json")
        # Neither needs an example, but that a picture of points in the plane shows them beside the data.
        if facts and (values.mode == "fit_solver" or (values.mode == "sample" and facts["shape"] != [2])):
            dataset = data.without_examples(facts)
        else:
            dataset = data.load(**configs.data_options(config))
            _check_same_data(workdir, facts or {}, dataset.facts)
        # What was trained on many devices can be looked at on any number.
        shards = math.gcd(config.train.param_shards, jax.device_count())
        mesh = None if values.mode == "train" else sharding.make_mesh(shards=shards)
        return Start(values.mode, workdir, config, dataset, *train.prepare(config, dataset, mesh))
    except (AttributeError, KeyError, ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        _fail(error)


def main(_):
    """Sets the run up, with one line for each thing that can be wrong, then hands over to train, evaluate or sample."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # Orbax tells every step of every write, and an error three times

    import jax

    # A U-Net compiles for longer than a short run takes. The environment variable of the same name goes first.
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "sde_diffusion" / "jax"))

    _join_processes(flags.FLAGS.distributed)
    run = start()
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # None writes to the workdir before all have looked at it.
        multihost_utils.sync_global_devices("all processes have started")

    from sde_diffusion import config as configs
    from sde_diffusion import train
    from sde_diffusion.checkpoint import Checkpoints
    from sde_diffusion.data import Unreadable
    from sde_diffusion.survival import Signals, Stopped, locked

    _quiet_threads()
    try:
        with contextlib.ExitStack() as stack:
            signals = stack.enter_context(Signals())
            if run.mode == "train":
                run.workdir.mkdir(parents=True, exist_ok=True)
                if jax.process_index() == 0:
                    stack.enter_context(locked(run.workdir))
                    temporary = run.workdir / "config.json.tmp"
                    temporary.write_text(configs.to_json(run.config))
                    temporary.replace(run.workdir / "config.json")
                    (run.workdir / "data.json").write_text(json.dumps(run.dataset.facts) + "\n")
                state = train.train(run.config, run.workdir, run.dataset, signals)
                step = int(state.step)
            else:
                with Checkpoints(run.workdir, read_only=True) as checkpoints:
                    step, state = checkpoints.restore(run.abstract)
            _use(run, state.ema, step)
    except (FloatingPointError, Unreadable) as error:
        _fail(error, at_once=True)
    except TimeoutError as error:
        # Orbax gives up so where another process does not come to write its part.
        _fail(_lost(error) if jax.process_count() > 1 else error, _PASSING, at_once=True)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        what = f"no space is left in {run.workdir}; free some, and the same command goes on from the last checkpoint"
        _fail(what if full else error, _PASSING, at_once=True)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1 and any(word in str(error) for word in _LOST):
            _fail(_lost(error), _PASSING, at_once=True)
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _fail(f"out of memory ({str(error).splitlines()[0][:200]}); set model.remat, raise train.param_shards, or lower the "
              "batch_size of sample or eval; in another workdir also train.accumulate and train.batch_size")  # fmt: skip
    except Stopped as stop:
        print(f"stopped by {stop}; the same command goes on from the last checkpoint in {run.workdir}", file=sys.stderr, flush=True)
        if jax.process_count() > 1 and not stop.agreed:
            # The others may wait for this one in a computation, where no signal is heard; an orderly end would wait for them.
            sys.stdout.flush()
            os._exit(stop.code)
        raise SystemExit(stop.code) from None


def _check_same_data(workdir: Path, before: dict, now: dict) -> None:
    """Raises ValueError where the facts of the data are not those that the run began with, if known."""
    from sde_diffusion.sde import shown

    changes = [f"{k}: {shown(v)} -> {now.get(k)}" for k, v in before.items() if now.get(k) != v]
    if changes:
        raise ValueError(
            f"the data are not those that {workdir} was begun with ({'; '.join(changes)}); restore them, or use another --workdir"
        )


def _use(run: Start, params, step: int) -> None:
    """What comes after training, or in its place."""
    import jax

    from sde_diffusion import evaluate

    c, shape = run.config, run.dataset.event_shape
    if run.mode == "fit_solver":
        evaluate.fit_solver(c, run.workdir, params, shape)
    elif run.mode == "sample":
        samples = evaluate.make_sampler(c, run.mesh, shape)(params, c.sample.num, c.sample.seed)
        evaluate.check_samples(samples)
        if jax.process_index() == 0:
            evaluate.write_samples(c, run.workdir, samples, step, run.dataset, run.scaler)
    else:
        evaluate.evaluate(c, run.workdir, params, step, run.dataset, run.mesh, run.scaler)


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse)
    except KeyboardInterrupt:  # before `Signals` listens
        print("stopped by SIGINT, before the run began", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
