"""The entry point: python -m sde_diffusion.main --config=configs/vp_digits.py --workdir=DIR --mode=train|eval|sample."""

import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

_HERE = Path(__file__).resolve().parent
_DEFAULT = next((p for p in (_HERE.parent / "configs", _HERE / "configs") if p.is_dir()), _HERE) / "vp_digits.py"

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file. [default: the workdir's own config, else the embedded digits]"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, checkpoints, metrics, samples.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "sample"], "What to do; train ends with the other two.")


def _fail(error) -> None:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def _with_config(argv: list[str]) -> list[str]:
    """argv with --config first, as its overrides need it: the one it names, or the workdir's, or the default."""
    values = {}
    for i, word in enumerate(argv[1:], 1):
        name, equals, value = word.lstrip("-").partition("=")
        if name == "config":
            end = i + (1 if equals else 2)
            return [argv[0], *argv[i:end], *argv[1:i], *argv[end:]]
        values[name] = value if equals else "".join(argv[i + 1 : i + 2])
    saved = Path(values.get("workdir") or os.devnull).expanduser().absolute() / "config.json"
    config = f"{_HERE / 'saved_config.py'}:{saved}" if saved.is_file() else str(_DEFAULT)
    return [argv[0], f"--config={config}", *argv[1:]]


def _unknown_key(message: str, argv: list[str]) -> str:
    """What to say of an override of a key that the config does not have."""
    from sde_diffusion.config import experiment

    known = experiment()
    for word in argv[1:]:
        name, *path = word.lstrip("-").partition("=")[0].split(".")
        if name == "config" and any(part in message for part in path):
            section = known.get(path[0])
            choices = f"{path[0]} has {', '.join(sorted(section))}" if section else f"its sections are {', '.join(known)}"
            return f"unknown config key '{'.'.join(path)}'; {choices}"
    return " ".join(message.split())


def _parse(argv):
    """absl's parser; a wrong flag or config value becomes one line."""
    try:
        rest = flags.FLAGS(_with_config(argv))
        _ = _CONFIG.value  # the file is read now, not at its first use
    except (AttributeError, KeyError) as error:
        _fail(_unknown_key(str(error), argv))
    except (flags.Error, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        _fail(" ".join(str(error).split()))
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; values are set as --config.section.key=value")
    return rest


def main(_):
    """Sets the run up, with one line for each thing that can be wrong, then hands over to train, evaluate or sample."""
    if not _WORKDIR.value:
        _fail("--workdir is missing; name a folder for this run, as --workdir=runs/digits")
    workdir = Path(_WORKDIR.value).expanduser().absolute()

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # Orbax tells every step of every write

    import jax

    # A U-Net compiles for longer than a short run takes. The environment variable of the same name goes first.
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "sde_diffusion" / "jax"))

    from sde_diffusion import config as configs
    from sde_diffusion import data, evaluate, train
    from sde_diffusion.checkpoint import Checkpoints

    try:
        config = _CONFIG.value
        configs.validate(config)
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
        mesh, scaler, abstract = train.prepare(config, dataset)
    except (AttributeError, KeyError, ValueError, TypeError, OSError, ImportError) as error:
        _fail(" ".join(str(error).split()))

    if _MODE.value == "train":
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            temporary = workdir / "config.json.tmp"
            temporary.write_text(configs.to_json(config))
            temporary.replace(saved)
        state = train.train(config, workdir, dataset)
        step, params = int(state.step), state.ema
    else:
        with Checkpoints(workdir, read_only=True) as checkpoints:
            params = checkpoints.restore(abstract, step).ema

    if _MODE.value == "sample":
        samples = evaluate.make_sampler(config, mesh, dataset.event_shape)(params, config.sample.num, config.sample.seed)
        if jax.process_index() == 0:
            evaluate.write_samples(config, workdir, samples, step, dataset, scaler)
    else:
        evaluate.evaluate(config, workdir, params, step, dataset, mesh, scaler)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
