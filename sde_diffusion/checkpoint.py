"""Checkpoints of the training state: Orbax, asynchronous, restored onto the shardings of now."""

import sys
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
        if self.path.is_dir() or not read_only:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep, step_prefix="step", create=not read_only, read_only=read_only
            )
            self.manager = ocp.CheckpointManager(self.path, options=options)

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
                state = self.manager.restore(step, args=ocp.args.StandardRestore(wanted))
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


def _without_empty(state):
    """The fields of a NamedTuple that are not (), as a dict: what a run does not use is not in its file."""
    if not hasattr(state, "_asdict"):
        return state
    return {name: value for name, value in state._asdict().items() if not (type(value) is tuple and not value)}


def like(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `tree` (arrays or `ShapeDtypeStruct`s) with the shardings of a like tree, for `restore`."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)
