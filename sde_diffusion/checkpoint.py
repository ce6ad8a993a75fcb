"""Checkpoints of the training state: Orbax, asynchronous, restored onto the shardings of now."""

import contextlib
import gc
import io
import logging
import sys
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints under `workdir/checkpoints`, by step. A context manager: leaving it waits for pending writes.

    Args:
      workdir: of the run.
      keep: how many of the newest are kept.
      read_only: create, move and delete nothing.
    """

    def __init__(self, workdir: str | Path, keep: int | None = None, read_only: bool = False):
        self.path = Path(workdir).absolute() / "checkpoints"
        self.manager, self.read_only = None, read_only
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file, where checkpoints are to be; move it away, or use another --workdir")
        if self.path.is_dir() or not read_only:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep, step_prefix="step", create=not read_only, read_only=read_only
            )
            # The handler is named: otherwise it is guessed from the newest folder, and a damaged one hides those before it.
            try:
                self.manager = ocp.CheckpointManager(self.path, item_handlers=ocp.StandardCheckpointHandler(), options=options)
            except RecursionError:
                raise OSError(f"a checkpoint in {self.path} holds metadata that are none; move the newest step away") from None

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return None if self.manager is None else self.manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Starts writing `state`, a pytree of arrays; a step that is there already is left as it is."""
        if step not in self.manager.all_steps():
            self.manager.save(step, args=ocp.args.StandardSave(_without_empty(state)), force=True)

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any]:
        """`(step, state)` of the newest checkpoint that can be read, or of the given step.

        One that cannot be read is reported, moved to `workdir/unreadable_step_N` and passed over.

        Args:
          like: a pytree of `jax.ShapeDtypeStruct` with shardings, or of arrays: the structure, dtypes and shardings of the state.

        Raises:
          OSError: none can be read.
        """
        wanted = _without_empty(like)
        steps = sorted(self.manager.all_steps(), reverse=True) if step is None else [step]
        for step in steps:
            try:
                with _quiet():
                    _check_arrays(self.manager.item_metadata(step), wanted)
                    state = self.manager.restore(step, args=ocp.args.StandardRestore(wanted))
                if isinstance(state, dict) and int(state.get("step", step)) != step:
                    raise ValueError(f"it holds the state of step {int(state['step'])}")
            except Exception as error:  # of many kinds, by the file that is damaged
                reason = " ".join(str(error).split())[:200]
                print(f"the checkpoint of step {step} cannot be read ({type(error).__name__}: {reason})", file=sys.stderr)
                self._set_aside(step)
            else:
                return step, like._replace(**state) if hasattr(like, "_replace") else state
        raise OSError(f"no checkpoint in {self.path} can be read, of steps {', '.join(map(str, steps))}; use another --workdir")

    def _set_aside(self, step):
        if not self.read_only and jax.process_index() == 0:
            target = self.path.parent / f"unreadable_step_{step}"
            number = 0
            while target.exists():
                number += 1
                target = target.with_name(f"unreadable_step_{step}_{number}")
            (self.path / f"step_{step}").rename(target)
        self.manager.reload()

    def close(self) -> None:
        """Waits until everything is written."""
        if self.manager is not None:
            self.manager.wait_until_finished()
            self.manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


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
