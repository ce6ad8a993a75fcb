"""Checkpoints of the training state: Orbax, asynchronous, restored onto the shardings of now."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints under `workdir/checkpoints`, by step. A context manager: leaving it waits for pending writes.

    Args:
      workdir: of the run.
      keep: how many of the newest are kept.
      read_only: create and delete nothing.
    """

    def __init__(self, workdir: str | Path, keep: int | None = None, read_only: bool = False):
        self.path = Path(workdir).absolute() / "checkpoints"
        self.manager = None
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

    def restore(self, like: Any, step: int | None = None) -> Any:
        """The state of `step` (the newest by default) with the structure, dtypes and shardings of `like`.

        `like` is a pytree of `jax.ShapeDtypeStruct` with shardings, or of arrays.
        """
        step = self.manager.latest_step() if step is None else step
        state = self.manager.restore(step, args=ocp.args.StandardRestore(_without_empty(like)))
        return like._replace(**state) if hasattr(like, "_replace") else state

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


def like(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Shapes and dtypes of `tree` (arrays or `ShapeDtypeStruct`s) with one sharding for all, for `restore`."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)
