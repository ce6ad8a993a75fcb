"""What a run leaves to look at: metrics, image grids, scatter plots, a sample-quality figure."""

import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Num, UInt8


class Metrics:
    """Scalars and images of a run, as `workdir/metrics.jsonl` and in `workdir/tensorboard`.

    Each `write` appends one line of strict JSON, `{"step": 10, "loss": 0.5}`, and flushes it; a
    value that is not finite is the string "nan", "inf" or "-inf", which `float` reads.
    resume_step: the step that the run continues from; lines of later steps, left by a killed run,
    are dropped. None keeps them. A torn last line is dropped in both cases; lines that are no
    metrics are reported and go to `unreadable_metrics.txt`; all else is kept.
    Only one process of a run may write.
    """

    def __init__(self, workdir: str | os.PathLike, *, resume_step: int | None = None):
        # TensorBoard's writer takes a second to import, and readers of metrics do not need it.
        from tensorboardX import SummaryWriter

        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        if path.exists():
            _repair(path, resume_step)
        self._lines = path.open("a", encoding="utf-8")
        purge = None if resume_step is None else resume_step + 1
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Record scalars (Python numbers, or arrays of one element) at a step."""
        values = {name: float(value) for name, value in scalars.items()}
        if "step" in values:
            raise ValueError("metric name 'step' is taken by the step itself; rename the metric")
        line = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        text = json.dumps({"step": int(step), **line}, allow_nan=False)
        self._lines.write(text + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, int(step))

    def image(
        self,
        step: int,
        name: str,
        array: UInt8[Array | np.ndarray, "height width channels"],
    ) -> None:
        """Show a grey or RGB picture in TensorBoard at a step."""
        picture = np.asarray(array)
        # TensorBoard's writer takes a single channel only without its axis.
        if picture.shape[-1] == 1:
            self._board.add_image(name, picture[..., 0], int(step), dataformats="HW")
        else:
            self._board.add_image(name, picture, int(step), dataformats="HWC")

    def close(self) -> None:
        """Flush and close both files."""
        self._lines.close()
        self._board.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def _repair(path: pathlib.Path, resume_step: int | None) -> None:
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    steps = [_step(line) for line in lines]
    strange = [line for line, step in zip(lines, steps) if step is None]
    if strange:
        aside = path.with_name("unreadable_metrics.txt")
        with aside.open("ab") as file:
            file.writelines(strange)
        print(f"{path}: {len(strange)} line(s) that are no metrics are now in {aside}", file=sys.stderr)
    latest = math.inf if resume_step is None else resume_step
    lines = [line for line, step in zip(lines, steps) if step is not None and step <= latest]
    kept = b"".join(lines)
    if kept != text:
        _write_atomically(path, lambda temporary: temporary.write_bytes(kept))


def _step(line: bytes) -> int | None:
    """The step of a line of metrics; None where it is something else."""
    try:
        step = json.loads(line)["step"]
        return step if isinstance(step, int) else None
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return None


def _write_atomically(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    # A kill in the middle leaves the old file, never half of the new one.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def image_grid(
    images: UInt8[Array | np.ndarray, "n height width channels"],
    *,
    columns: int | None = None,
    padding: int = 1,
    scale: int | None = None,
) -> UInt8[np.ndarray, "grid_height grid_width channels"]:
    """One picture of all images, row by row, as near to a square as possible.

    images: grey (1 channel) or RGB. columns: images per row. padding: pixels of mid-grey around
    each image, before scaling. scale: nearest-neighbour enlargement of the whole; default, what
    brings the shorter side of an image to at least 40 pixels.
    Raises ValueError for no images, a channel count other than 1 and 3, columns or scale below 1,
    or negative padding.
    """
    images = np.asarray(images)
    count, height, width, channels = images.shape
    if not images.size or channels not in (1, 3):
        raise ValueError(f"images of shape {images.shape}: expected (N, H, W, C), C = 1 or 3, N > 0")
    if scale is None:
        scale = max(1, math.ceil(40 / min(height, width)))
    if columns is None:
        columns = min(count, max(1, math.ceil(math.sqrt(count * height / width))))
    if columns < 1 or scale < 1 or padding < 0:
        raise ValueError(f"columns={columns}, scale={scale}, padding={padding}: expected at least 1, 1 and 0")
    rows = math.ceil(count / columns)
    down, right = height + padding, width + padding
    grid = np.full((rows * down + padding, columns * right + padding, channels), 128, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * down + padding, i % columns * right + padding
        grid[top : top + height, left : left + width] = image
    return grid.repeat(scale, axis=0).repeat(scale, axis=1)


def save_image(path: str | os.PathLike, array: UInt8[Array | np.ndarray, "height width channels"]) -> None:
    """Write a grey or RGB picture, in the format of the suffix, all of it or nothing."""
    from PIL import Image

    picture = np.asarray(array)
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    _write_atomically(pathlib.Path(path), image.save)


def save_scatter(
    path: str | os.PathLike,
    points: Num[Array | np.ndarray, "n 2"],
    reference: Num[Array | np.ndarray, "m 2"],
) -> None:
    """Plot points of the plane over reference points, on the reference's axes, and write a PNG."""
    # The figure without pyplot has no global state and needs no display.
    from matplotlib.figure import Figure

    points, reference = np.asarray(points), np.asarray(reference)
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    dot = {"s": 6, "linewidths": 0}
    axes.scatter(*reference.T, color="0.75", label=f"data ({len(reference):,})", **dot)
    axes.scatter(*points.T, color="tab:blue", alpha=0.6, label=f"samples ({len(points):,})", **dot)
    low, high = reference.min(axis=0), reference.max(axis=0)
    margin = 0.15 * (high - low).max()
    axes.set(xlim=(low[0] - margin, high[0] + margin), ylim=(low[1] - margin, high[1] + margin))
    axes.set_aspect("equal")
    outside = ((points < low - margin) | (points > high + margin)).any(axis=1).sum()
    if outside:
        axes.set_title(f"{outside:,} samples lie outside", fontsize="medium")
    axes.legend(loc="upper right", markerscale=2)
    _write_atomically(pathlib.Path(path), lambda p: figure.savefig(p, format="png", dpi=120))


def energy_distance(
    x: Num[Array | np.ndarray, "n *event"],
    y: Num[Array | np.ndarray, "m *other"],
    *,
    chunk: int = 1024,
) -> tuple[float, float]:
    """Squared energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| between two sets of examples, and its standard error.

    Euclidean distance between flattened examples, in the units of x and y; zero exactly when the
    distributions agree. Szekely and Rizzo 2013 (doi:10.1016/j.jspi.2013.03.018), V-statistic:
    means over all pairs, each example with itself included, so it is never negative and is
    Delta (1/n + 1/m), Delta = E|X - X'|, on average for two sets of one distribution. That floor
    depends on the set sizes, hence they must match: compare samples with held-out data at the size
    at which training data are compared with held-out data.
    The error is the infinitesimal jackknife's; between sets of one distribution, where the distance is quadratic in the
    sets, it is an upper bound, up to 1.4 times too large.
    float64, O(n^2) time, O(n chunk) memory. Raises ValueError for sizes that do not match.
    """
    if len(x) != len(y) or not len(x) or np.shape(x)[1:] != np.shape(y)[1:]:
        raise ValueError(f"shapes {np.shape(x)} and {np.shape(y)}: expected two equal, non-empty sets of examples; cut the longer one")
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    y = np.asarray(y, np.float64).reshape(len(y), -1)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("x or y holds NaN or infinity; the energy distance is not defined")
    # Centring keeps |a|^2 + |b|^2 - 2 ab from cancelling.
    centre = 0.5 * (x.mean(axis=0) + y.mean(axis=0))
    x, y = x - centre[None], y - centre[None]
    between, within_x, within_y = (_distances(a, b, chunk) for a, b in ((x, y), (x, x), (y, y)))
    # What each example adds; x and y are independent.
    influence = 2.0 * (between[0] - within_x[0]), 2.0 * (between[1] - within_y[0])
    stderr = np.sqrt(sum(part.var(ddof=1) for part in influence) / len(x)) if len(x) > 1 else np.nan
    return float(2.0 * between[0].mean() - within_x[0].mean() - within_y[0].mean()), float(stderr)


def _distances(a: np.ndarray, b: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean distance of each of a to all of b, and of each of b to all of a."""
    squares, rows, columns = np.square(b).sum(axis=1), [], np.zeros(len(b))
    for start in range(0, len(a), chunk):
        part = a[start : start + chunk]
        squared = np.square(part).sum(axis=1)[:, None] + squares[None, :] - 2.0 * (part @ b.T)
        if a is b:
            # Rounding would leave the root of 1e-16 in place of an exact zero.
            own = np.arange(len(part))
            squared[own, start + own] = 0.0
        distances = np.sqrt(np.maximum(squared, 0.0))
        rows.append(distances.mean(axis=1))
        columns += distances.sum(axis=0)
    return np.concatenate(rows), columns / len(a)
