"""Checkpoints of the training state: Orbax, asynchronous, restored onto the shardings of now."""

import contextlib
import errno
import gc
import io
import json
import logging
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sde_diffusion.data import Unreadable

CHECKSUMS = "checksums.json"  # in a step's folder: Orbax itself reads back a flipped bit as another number


class Checkpoints:
    """The checkpoints under `workdir/checkpoints`, by step. A context manager: leaving it waits for pending writes.

    Args:
      workdir: of the run.
      keep: how many of the newest are kept.
      read_only: create, move and delete nothing.
    """

    def __init__(self, workdir: str | Path, keep: int | None = None, read_only: bool = False):
        self.path = Path(workdir).absolute() / "checkpoints"
        self.manager, self.read_only, self.unsealed = None, read_only, None
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file, where checkpoints are to be; move it away, or use another --workdir")
        if self.path.is_dir() or not read_only:
            log = logging.getLogger("absl")
            level = log.level
            log.setLevel(logging.ERROR)  # Orbax warns of what `read_only` asks for
            # The handler is named: otherwise it is guessed from the newest folder, and a damaged one hides those before it.
            try:
                options = ocp.CheckpointManagerOptions(max_to_keep=keep, step_prefix="step", create=not read_only, read_only=read_only)
                self.manager = ocp.CheckpointManager(self.path, item_handlers=ocp.StandardCheckpointHandler(), options=options)
            except RecursionError:
                raise OSError(f"a checkpoint in {self.path} holds metadata that are none; move the newest step away") from None
            finally:
                log.setLevel(level)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return None if self.manager is None else self.manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Starts writing `state`, a pytree of arrays; a step that is there already is left as it is.

        Raises:
          OSError: this checkpoint or the one before it could not be written.
        """
        if step not in self.manager.all_steps():
            self._wait()
            with self._writing(step):
                self.manager.save(step, args=ocp.args.StandardSave(_without_empty(state)), force=True)
            self.unsealed = self.path / f"step_{step}"

    @contextlib.contextmanager
    def _writing(self, what):
        try:
            yield
        except Exception as error:  # of many kinds, by the file system
            self.unsealed = None
            full = "RESOURCE_EXHAUSTED" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
            reason = "no space is left" if full else " ".join(str(error).split())[:300]
            raise OSError(
                f"the checkpoint of step {what} could not be written to {self.path}: {reason}; those before it are whole, and the same command goes on from them"
            ) from error

    def _wait(self):
        if self.unsealed is not None:
            with self._writing(self.unsealed.name.removeprefix("step_")):
                self.manager.wait_until_finished()
            self.seal()

    def seal(self) -> None:
        """Adds the checksums of its files to the checkpoint saved last, once it is written; returns at once before that."""
        if self.unsealed is None or self.manager.is_saving_in_progress():
            return
        with self._writing(self.unsealed.name.removeprefix("step_")):
            self.manager.wait_until_finished()  # which raises what went wrong
        if jax.process_index() == 0 and self.unsealed.is_dir():
            temporary = self.unsealed / f"{CHECKSUMS}.tmp"
            temporary.write_text(json.dumps(_checksums(self.unsealed), indent=0))
            temporary.replace(self.unsealed / CHECKSUMS)
        self.unsealed = None

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any]:
        """`(step, state)` of the newest checkpoint that can be read, or of the given step.

        One that cannot be read is reported and passed over; with an older one to go on from, it is moved to
        `workdir/unreadable_step_N`.

        Args:
          like: a pytree of `jax.ShapeDtypeStruct` with shardings, or of arrays: the structure, dtypes and shardings of the state.

        Raises:
          Unreadable: none can be read.
        """
        wanted = _without_empty(like)
        steps = sorted(self.manager.all_steps(), reverse=True) if step is None else [step]
        passed_over = []
        for step in steps:
            try:
                damage = _damage(self.path / f"step_{step}")
                # Before Orbax, in which the processes wait for each other.
                if not _all_agree(not damage):
                    raise OSError(damage or "as process 0 says")
                with _quiet():
                    _check_arrays(self.manager.item_metadata(step), wanted)
                    state = self.manager.restore(step, args=ocp.args.StandardRestore(wanted))
                if isinstance(state, dict) and int(state.get("step", step)) != step:
                    raise ValueError(f"it holds the state of step {int(state['step'])}")
                reason = ""
            except Exception as error:  # of many kinds, by the file that is damaged
                reason = " ".join(str(error).split())[:200] or type(error).__name__
            if not _all_agree(not reason):
                reason = reason or "another process could not"
                print(f"the checkpoint of step {step} cannot be read ({reason}); going back to the one before", file=sys.stderr)
                passed_over.append(step)
            else:
                self._set_aside(passed_over)
                return step, like._replace(**state) if hasattr(like, "_replace") else state
        if self.read_only:
            # A run that goes on beside this reader may have written another, and deleted these.
            self.manager.reload()
            if set(self.manager.all_steps()) - set(steps):
                return self.restore(like)
        raise Unreadable(
            f"no checkpoint in {self.path} can be read, of steps {', '.join(map(str, steps))}; restore one, or use another --workdir"
        )

    def _set_aside(self, steps):
        if self.read_only or not steps:
            return
        for step in steps if jax.process_index() == 0 else ():
            target = self.path.parent / f"unreadable_step_{step}"
            number = 0
            while target.exists():
                number += 1
                target = target.with_name(f"unreadable_step_{step}_{number}")
            (self.path / f"step_{step}").rename(target)
        _all_agree(True)  # no process lists the folder before it is done
        self.manager.reload()

    def close(self) -> None:
        """Waits until everything is written; raises OSError where it could not be."""
        if self.manager is not None:
            self._wait()
            self.manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of every file below a folder but the checksums' own, by its path."""
    out = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(CHECKSUMS):
            value = 0
            with path.open("rb") as file:
                while chunk := file.read(1 << 24):
                    value = zlib.crc32(chunk, value)
            out[str(path.relative_to(folder))] = value
    return out


def _damage(folder: Path) -> str:
    """What is wrong with the files of a checkpoint, by process 0; "" where nothing is, or no checksums were written yet."""
    found = ""
    if jax.process_index() == 0 and (folder / CHECKSUMS).exists():
        try:
            wanted = dict(json.loads((folder / CHECKSUMS).read_text()))
            there = _checksums(folder)
            bad = [name for name, value in wanted.items() if there.get(name) != value]
            found = f"its file {bad[0]} is not as it was written" if bad else ""
        except (OSError, ValueError, TypeError, RecursionError) as error:
            found = f"its {CHECKSUMS} cannot be read ({error})"
    return found


def _all_agree(mine: bool) -> bool:
    """Whether it is so for all processes, which wait for each other here."""
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.int32(mine)).all())


@contextlib.contextmanager
def _quiet():
    """Keeps back what threads print: of a damaged checkpoint each array that is still being read has a traceback of its own."""
    logger = logging.getLogger("asyncio")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                yield
            except BaseException:
                time.sleep(0.5)
                gc.collect()
                raise
    finally:
        logger.setLevel(level)


def _without_empty(state):
    """The fields of a NamedTuple that are not (), as a dict: what a run does not use is not in its file."""
    if not hasattr(state, "_asdict"):
        return state
    return {name: value for name, value in state._asdict().items() if not (type(value) is tuple and not value)}


def _check_arrays(stored, wanted):
    """Raises ValueError for arrays of other names, shapes or dtypes: Orbax casts dtypes, and prints tracebacks for the rest."""
    stored, wanted = ({jax.tree_util.keystr(path, simple=True, separator="/"): (a.shape, a.dtype)
                       for path, a in jax.tree_util.tree_leaves_with_path(tree)} for tree in (stored, wanted))  # fmt: skip
    for name in stored.keys() | wanted.keys():
        if stored.get(name) != wanted.get(name):
            there, here = (f"{a[1]} {a[0]}" if a else "missing" for a in (stored.get(name), wanted.get(name)))
            raise ValueError(f"its array {name} is {there}, that of this config {here}")


def like(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `tree` (arrays or `ShapeDtypeStruct`s) with the shardings of a like tree, for `restore`."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)
