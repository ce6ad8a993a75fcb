"""Data sets as integer levels or vectors, their batches, and the map to and from model space."""

import contextlib
import dataclasses
import difflib
import functools
import io
import json
import math
import os
import pathlib
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PRNGKeyArray, UInt8

from sde_diffusion.sde import shown

if TYPE_CHECKING:
    import grain


class Unreadable(ValueError):
    """A file that is not what its name says, or is too large to be; the message names it and the fix."""


# Decoded images above this many bytes stay on disk and are decoded on access.
MEMORY_LIMIT = 4 * 2**30


class LazyArray:
    """A read-only array whose rows are decoded on access: `a[i]`, `a[i:j]`, `a[index_array]`.

    `shape` and `dtype` are those of the whole array; indexing returns a numpy array.
    """

    def __init__(
        self,
        records: Callable[[list[int]], Sequence[Any]],
        decode: Callable[[Any], Any],
        rows: np.ndarray,
        item_shape: tuple[int, ...],
        dtype: Any,
    ):
        self.records = records
        self.decode = decode
        self.rows = rows
        self.shape = (len(rows), *item_shape)
        self.dtype = np.dtype(dtype)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        rows = self.rows[index]
        flat = np.ravel(rows).tolist()
        out = np.empty((len(flat), *self.shape[1:]), self.dtype)
        _decode_rows(self.records, flat, [(self.decode, out)])
        return out.reshape(np.shape(rows) + self.shape[1:])

    def take(self, index: np.ndarray) -> "LazyArray":
        """The rows at `index`, still undecoded."""
        return LazyArray(self.records, self.decode, self.rows[index], self.shape[1:], self.dtype)


def _decode_rows(
    records: Callable[[list[int]], Sequence[Any]],
    rows: list[int],
    fields: Sequence[tuple[Callable[[Any], Any], np.ndarray]],
) -> None:
    """Write `decode(record)` of each row into `out`, for each `(decode, out)` of fields."""
    workers = min(os.cpu_count() or 1, len(rows) // 8)

    def work(part: range) -> None:
        for i, record in zip(part, records([rows[i] for i in part]), strict=True):
            for decode, out in fields:
                out[i] = decode(record)

    if workers < 2:
        return work(range(len(rows)))
    # Threads pay for photographs; tiny images hold the interpreter lock most of the time. A pool
    # for each call keeps a LazyArray picklable (for grain's worker processes), leaves no threads
    # behind, and costs well under a millisecond.
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, [range(w, len(rows), workers) for w in range(workers)]))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and held-out examples.

    train, test: `(N, *event)`; images are uint8 levels `(N, H, W, C)` in 0..num_levels-1, vectors
    float32 `(N, D)`. Numpy arrays, or `LazyArray`s where the images do not fit in memory.
    train_labels, test_labels: int32 `(N,)`, or None.
    num_levels: 17 for the digits, 256 for 8-bit images, None for vectors.
    """

    name: str
    train: np.ndarray | LazyArray
    test: np.ndarray | LazyArray
    train_labels: np.ndarray | LazyArray | None = None
    test_labels: np.ndarray | LazyArray | None = None
    num_levels: int | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.train.shape[1:])

    @property
    def facts(self) -> dict[str, Any]:
        """What tells at once that it is not the data of before: its name, numbers and shape."""
        return {
            "name": self.name,
            "train": len(self.train),
            "held_out": len(self.test),
            "shape": list(self.event_shape),
            "levels": self.num_levels,
        }


def read_facts(path: pathlib.Path) -> dict[str, Any] | None:
    """The `Dataset.facts` that a run began with, of its data.json; None where there is none.

    Raises:
      ValueError: another file.
    """
    if not path.exists():
        return None
    try:
        facts = dict(json.loads(path.read_text()))
        shape, levels = facts["shape"], facts["levels"]
        if not (isinstance(shape, list) and shape and all(type(n) is int and n >= 1 for n in shape)):
            raise ValueError(f"shape {shown(shape)}")
        # Images have levels, vectors have none.
        if not (type(levels) is int and 2 <= levels <= 256 if len(shape) == 3 else levels is None):
            raise ValueError(f"levels {shown(levels)} with shape {shape}")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not what this program wrote ({error}); copy it again from where the run was trained, or delete it where the data are"
        ) from None
    return facts


def without_examples(facts: dict[str, Any]) -> Dataset:
    """A `Dataset` of these `Dataset.facts` that holds no example, arrays `(0, *event)`: enough to sample by, where the data are not."""
    empty = np.zeros((0, *facts["shape"]), np.float32 if facts["levels"] is None else np.uint8)
    labels = np.zeros(0, np.int32)
    return Dataset(str(facts.get("name")), empty, empty, labels, labels, facts["levels"])


def load(
    name: str,
    *,
    data_dir: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    seed: int = 0,
    in_memory: bool | None = None,
) -> Dataset:
    """A data set by name or path.

    name: "digits" (1,797 8x8 handwritten digits of scikit-learn, 1,500/297, no download);
      "gaussian_mixture_2d" (20,000/2,000 draws of `gaussian_mixture_2d()`); the name of any TFDS
      image set, as "cifar10", "imagenet_resized/32x32" or "mnist:3.0.1", read through
      `tfds.data_source` without TensorFlow; a path ending in `.npz` (uint8 `train` or `images`,
      `(N, H, W)` or `(N, H, W, C)`, or floating `(N, D)` vectors; optional `test`, `labels` or
      `train_labels`, `test_labels`); or a folder of PNG and JPEG images, searched recursively, in
      sorted order, with a separator in its path ("./pictures").
    data_dir: where TFDS sets lie; default `TFDS_DATA_DIR`, then `~/tensorflow_datasets`.
    image_size: images are centre-cropped to a square and resized to this side. Required where the
      sizes vary.
    channels: 1 or 3; default what the images have.
    seed: picks the held-out tenth of a set that comes without a test (TFDS: or validation) split.
    in_memory: decode everything now; default where it takes at most `MEMORY_LIMIT` bytes. Else
      images are decoded on access (`LazyArray`).
    Raises ValueError for an unknown name or unusable content, FileNotFoundError for a missing path
    or a TFDS set that is not prepared, ImportError where TFDS lacks a module.
    """
    if image_size is not None and not 1 <= image_size <= 2**14:
        raise ValueError(f"image_size={image_size}: expected a positive number of pixels, at most {2**14:,}, or None")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels={channels}: expected 1 (grey), 3 (RGB) or None")
    if name in _EMBEDDED:
        return _EMBEDDED[name](name, image_size, channels)
    try:
        path = pathlib.Path(name).expanduser()
        if path.suffix == ".npz":
            return _load_npz(path, image_size, channels, seed)
        if name.startswith((".", "~", os.sep)) or (os.sep in name and path.is_dir()):
            return _load_folder(path, image_size, channels, seed, in_memory)
    except (OSError, RuntimeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        # No such user, a name that is too long, a folder that may not be read.
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"data.name={shown(name)} cannot be read ({reason}); name a file or a folder that can") from None
    return _load_tfds(name, data_dir, image_size, channels, seed, in_memory)


def _digits(name: str, image_size: int | None, channels: int | None) -> Dataset:
    # scikit-learn takes about a second to import.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import StratifiedShuffleSplit

    _refuse_resizing(name, "8x8 grey images of 17 levels", image_size, channels, size=8)
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8, 1).astype(np.uint8)
    labels = labels.astype(np.int32)
    split = StratifiedShuffleSplit(n_splits=1, test_size=297, random_state=0)
    train, test = next(split.split(images.reshape(len(images), -1), labels))
    return Dataset(name, images[train], images[test], labels[train], labels[test], num_levels=17)


def gaussian_mixture_2d() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A ring of 8 equal Gaussians: weights `(8,)`, means `(8, 2)`, covariances `(8, 2, 2)`.

    float64. Radius 1.4, standard deviation 0.15: about unit variance along each axis.
    """
    angle = 2.0 * np.pi * np.arange(8) / 8
    means = 1.4 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    covariances = np.tile(0.15**2 * np.eye(2), (8, 1, 1))
    return np.full(8, 1.0 / 8.0), means, covariances


def _gaussian_mixture_2d(name: str, image_size: int | None, channels: int | None) -> Dataset:
    _refuse_resizing(name, "points in the plane", image_size, channels, size=None)
    weights, means, covariances = gaussian_mixture_2d()
    # RandomState's stream is frozen across numpy versions; Generator's is not.
    random = np.random.RandomState(0)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = random.choice(len(weights), size=n, p=weights)
        noise = random.standard_normal((n, 2, 1))
        points = means[labels] + (np.linalg.cholesky(covariances)[labels] @ noise)[..., 0]
        return points.astype(np.float32), labels.astype(np.int32)

    train, train_labels = draw(20_000)
    test, test_labels = draw(2_000)
    return Dataset(name, train, test, train_labels, test_labels)


_EMBEDDED = {"digits": _digits, "gaussian_mixture_2d": _gaussian_mixture_2d}


def _refuse_resizing(name: str, what: str, image_size: int | None, channels: int | None, size: int | None) -> None:
    if image_size not in (None, size):
        raise ValueError(f"image_size={image_size}: {name} holds {what}; leave image_size unset")
    if channels is not None and (size is None or channels != 1):
        raise ValueError(f"channels={channels}: {name} holds {what}; leave channels unset")


def _to_pixels(image: Any, image_size: int | None, channels: int, origin: str) -> np.ndarray:
    from PIL import Image, ImageOps

    if image.mode.startswith(("I", "F")):
        raise Unreadable(f"{origin} has more than 8 bits a channel (mode {image.mode}); expected 8-bit images, convert it first")
    mode = "RGB" if channels == 3 else "L"
    if image.mode != mode:
        image = image.convert(mode)
    if image_size is not None and image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels[..., None] if channels == 1 else pixels


def _from_bytes(encoded: bytes, image_size: int | None, channels: int, origin: str) -> np.ndarray:
    from PIL import Image

    with _reading(f"an image of {origin}"), Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
        return _to_pixels(image, image_size, channels, origin)


# Of all that Pillow reads; some other formats start programs.
_FORMATS = ("PNG", "JPEG")


@contextlib.contextmanager
def _reading(what: Any) -> Iterator[None]:
    """Whatever Pillow meets in a damaged or hostile image becomes one line that names it."""
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:  # of many kinds, by what is damaged
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Unreadable(f"{what} is not a readable image ({reason}); remove or replace it") from None


def _from_file(path: pathlib.Path, image_size: int | None, channels: int) -> np.ndarray:
    from PIL import Image, ImageOps

    with _reading(path), Image.open(path, formats=_FORMATS) as image:
        # Cameras store the rotation as a tag instead of turning the pixels.
        return _to_pixels(ImageOps.exif_transpose(image), image_size, channels, str(path))


def _fits_in_memory(in_memory: bool | None, count: int, item_shape: tuple[int, ...]) -> bool:
    return count * math.prod(item_shape) <= MEMORY_LIMIT if in_memory is None else in_memory


def _decode_all(images: LazyArray, labels: LazyArray | None, title: str) -> tuple[Any, Any]:
    """Both arrays in memory, with a progress line on stderr once it has taken a second."""
    started, shown, chunk = time.monotonic(), False, 2048
    out = np.empty(images.shape, images.dtype)
    out_labels = None if labels is None else np.empty(labels.shape, labels.dtype)
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        fields = [(images.decode, out[part])]
        if labels is not None:
            fields.append((labels.decode, out_labels[part]))
        _decode_rows(images.records, images.rows[part].tolist(), fields)
        if shown or time.monotonic() - started > 1.0:
            shown = True
            done = min(start + chunk, len(images))
            print(f"\r{title}: {done:,} of {len(images):,} decoded", end="", file=sys.stderr)
    if shown:
        print(file=sys.stderr, flush=True)
    return out, out_labels


def read_npz(path: pathlib.Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the arrays that the file holds, after a look at what each would take.

    Raises Unreadable unless each is a plain array, of the size that its file has, and all fit in memory.
    """
    try:
        arrays, total = {}, 0
        with zipfile.ZipFile(path) as archive:
            sizes = {i.filename: i.file_size for i in archive.infolist()}
            for key in keys:
                if f"{key}.npy" not in sizes:
                    continue
                with archive.open(f"{key}.npy") as file:
                    version = np.lib.format.read_magic(file)
                    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    shape, _, dtype = read[version](file)
                    size = math.prod(shape) * dtype.itemsize
                    total += size
                    if dtype.hasobject:
                        raise ValueError(f"`{key}` holds pickled objects")
                    if size + file.tell() != sizes[f"{key}.npy"]:
                        raise ValueError(f"`{key}` says {shape} {dtype} and holds something else")
                    if total > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
                        raise ValueError(f"`{key}` is larger than the memory")
                with archive.open(f"{key}.npy") as file:
                    arrays[key] = np.lib.format.read_array(file, allow_pickle=False)
        return arrays
    except Exception as error:  # of many kinds, by what is damaged
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Unreadable(f"{path} is not an .npz of plain arrays ({reason})") from None


def _held_out(count: int, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Sorted row numbers of the training part and of the seeded held-out tenth."""
    if count < 2:
        raise ValueError(f"{name} has {count} example(s): at least 2 are needed, one of them held out; set data.name to a larger data set")
    order = np.random.RandomState(seed).permutation(count)
    size = max(1, count // 10)
    return np.sort(order[size:]), np.sort(order[:size])


def _load_npz(path: pathlib.Path, image_size: int | None, channels: int | None, seed: int) -> Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a .npz file with an array `train`")
    try:
        arrays = read_npz(path, ("train", "images", "test", "labels", "train_labels", "test_labels"))
    except Unreadable as error:
        raise Unreadable(f"{error}; write it by numpy.savez(path, train=images) with uint8 images and no pickled objects") from None
    key = next((k for k in ("train", "images") if k in arrays), None)
    if key is None:
        with zipfile.ZipFile(path) as archive:
            held = shown(sorted(n.removesuffix(".npy") for n in archive.namelist()))
        raise ValueError(
            f"{path} holds the arrays {held}; expected `train` or `images`, optionally `test`, `labels` or `train_labels`, `test_labels`"
        )
    train = _checked_examples(arrays[key], path, key)
    train_labels = _checked_labels(arrays, ("train_labels", "labels"), len(train), path)
    if "test" in arrays:
        test = _checked_examples(arrays["test"], path, "test")
        if test.shape[1:] != train.shape[1:] or test.dtype != train.dtype:
            raise ValueError(
                f"`test` of {path} has examples {test.shape[1:]} {test.dtype}; expected {train.shape[1:]} {train.dtype} like `{key}`"
            )
        test_labels = _checked_labels(arrays, ("test_labels",), len(test), path)
    else:
        kept, held = _held_out(len(train), seed, str(path))
        train, test = train[kept], train[held]
        test_labels = None
        if train_labels is not None:
            train_labels, test_labels = train_labels[kept], train_labels[held]
    if train.ndim == 2:
        _refuse_resizing(str(path), "vectors", image_size, channels, size=None)
        return Dataset(str(path), train, test, train_labels, test_labels)
    return Dataset(
        str(path),
        _conform(train, image_size, channels, str(path)),
        _conform(test, image_size, channels, str(path)),
        train_labels,
        test_labels,
        num_levels=256,
    )


def _checked_examples(array: np.ndarray, path: pathlib.Path, key: str) -> np.ndarray:
    if len(array.shape) == 2 and np.issubdtype(array.dtype, np.floating) and array.size:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"`{key}` of {path} holds NaN, infinity or numbers beyond float32; remove those examples")
        return array
    grey = array[..., None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or grey.ndim != 4 or grey.shape[-1] not in (1, 3) or not grey.size:
        raise ValueError(
            f"`{key}` of {path} is {array.dtype} {array.shape}; expected uint8 images (N, H, W) or "
            "(N, H, W, C) with C = 1 or 3, or floating vectors (N, D)"
        )
    return grey


def _checked_labels(arrays: dict[str, np.ndarray], keys: Sequence[str], count: int, path: pathlib.Path) -> np.ndarray | None:
    key = next((k for k in keys if k in arrays), None)
    if key is None:
        return None
    labels = arrays[key]
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"`{key}` of {path} is {labels.dtype} {labels.shape}; expected integers ({count},)")
    return labels.astype(np.int32)


def _conform(images: np.ndarray, image_size: int | None, channels: int | None, origin: str) -> np.ndarray:
    from PIL import Image

    height, width, have = images.shape[1:]
    if image_size in (None, height) and image_size in (None, width) and channels in (None, have):
        return images
    pictures = (Image.fromarray(x[..., 0] if have == 1 else x) for x in images)
    return np.stack([_to_pixels(p, image_size, channels or have, origin) for p in pictures])


def _load_folder(
    path: pathlib.Path,
    image_size: int | None,
    channels: int | None,
    seed: int,
    in_memory: bool | None,
) -> Dataset:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; expected a folder of PNG or JPEG images")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    files = [p for p in files if not p.is_dir()]
    for file in files:
        if not file.is_file():
            raise Unreadable(f"{file} is not a regular file, or a link to none; remove it")
    if not files:
        raise ValueError(f"{path} holds no .png, .jpg or .jpeg file; expected a folder of images")
    name = str(path)
    height, width, have = _common_shape(files, image_size, channels, name)
    images = LazyArray(
        lambda rows: [files[i] for i in rows],
        functools.partial(_from_file, image_size=image_size, channels=have),
        np.arange(len(files)),
        (height, width, have),
        np.uint8,
    )
    train, test = (images.take(rows) for rows in _held_out(len(files), seed, name))
    if _fits_in_memory(in_memory, len(files), images.shape[1:]):
        train, _ = _decode_all(train, None, f"{name} train")
        test, _ = _decode_all(test, None, f"{name} test")
    return Dataset(name, train, test, num_levels=256)


def _common_shape(files: list[pathlib.Path], image_size: int | None, channels: int | None, name: str) -> tuple[int, int, int]:
    from PIL import Image

    if image_size is not None and channels is not None:
        return image_size, image_size, channels

    def header(file: pathlib.Path) -> tuple[tuple[int, int], bool]:
        with _reading(file), Image.open(file, formats=_FORMATS) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            size = image.size[::-1] if turned else image.size
            return size, image.mode in ("1", "L", "LA")

    with ThreadPoolExecutor() as pool:
        headers = list(pool.map(header, files))
    sizes = sorted({size for size, _ in headers})
    if image_size is None and len(sizes) > 1:
        raise ValueError(f"the images of {name} vary in size, from {sizes[0]} to {sizes[-1]}; set image_size")
    width, height = sizes[0] if image_size is None else (image_size, image_size)
    return height, width, channels or (1 if all(grey for _, grey in headers) else 3)


def _import_tfds() -> Any:
    # TFDS takes about a second to import, and a user of other data needs none of it.
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise _missing_module(error) from None
    return tfds


def _missing_module(error: ImportError) -> ImportError:
    # TFDS wraps some import errors and loses the name; it uses importlib_resources without
    # declaring it, and needs TensorFlow to construct a few data sets.
    found = re.search(r"No module named '(\w+)", str(error))
    module = found[1] if found else (error.name or "tensorflow_datasets")
    package = "-e '.[prepare]'" if module == "tensorflow" else module
    return ImportError(f"TFDS needs the module {module!r}, which is not installed; run: pip install {package}")


def _unknown(name: str, tfds: Any) -> ValueError:
    known = [*_EMBEDDED, *tfds.list_builders(with_community_datasets=False)]
    near = difflib.get_close_matches(name.lower(), known, n=3)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    if os.path.isdir(name):
        hint = f" (for the folder of that name write .{os.sep}{name})"
    return ValueError(
        f"unknown data set {name!r}{hint}; expected one of {', '.join(_EMBEDDED)}, the name of a "
        "TFDS image set such as cifar10 or mnist, a path ending in .npz, or a folder of images "
        "such as ./pictures"
    )


def _tfds_builder(tfds: Any, name: str, data_dir: str | None) -> Any:
    from absl import logging

    form = re.fullmatch(r"([a-z][a-z0-9_]*)(/[\w.+-]+)?(:\d+\.\d+\.\d+)?", name)
    if form is None:
        raise _unknown(name, tfds)
    verbosity = logging.get_verbosity()
    _check_feature_names(name, data_dir)
    # TFDS warns about every folder that it looks into; the error below says what matters.
    logging.set_verbosity(logging.ERROR)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        # Both look at the disk, and warn.
        features, prepared = builder.info.features, builder.is_prepared()
    except tfds.core.DatasetNotFoundError:
        raise _unknown(name, tfds) from None
    except ImportError as error:
        raise _missing_module(error) from None
    except Exception as error:
        # Without the builder's arguments in front and the list of near misses behind.
        cause = re.sub(r'^Failed to construct .*?}": |\. Here are .*', "", str(error).splitlines()[0])
        raise ValueError(f"TFDS cannot open the data set {name!r}: {cause}") from None
    finally:
        logging.set_verbosity(verbosity)
    if not any(isinstance(f, tfds.features.Image) for _, f in features.items()):
        raise ValueError(
            f"TFDS data set {name!r} has no image feature, only {', '.join(features)}; expected an image data set such as cifar10"
        )
    where = "" if data_dir is None else f", data_dir='{data_dir}'"
    # The `tfds` command line would do, but needs Apache Beam to start.
    command = (
        "pip install -e '.[prepare]' && python -c \"import tensorflow_datasets as tfds; "
        f"tfds.builder('{name}'{where}, file_format='array_record').download_and_prepare()\""
    )
    if not prepared:
        raise FileNotFoundError(
            f"TFDS data set {name!r} is not prepared in {builder.data_path}; "
            f"set TFDS_DATA_DIR or data.data_dir to where it is, or prepare it once with: {command}"
        )
    formats = {f.value for f in builder.info.available_file_formats()}
    if not formats & {"array_record", "parquet"}:
        raise FileNotFoundError(
            f"TFDS data set {name!r} in {builder.data_path} is stored as "
            f"{', '.join(sorted(formats))}; expected array_record: move that folder away and "
            f"prepare it again with: {command}"
        )
    return builder


def _unreadable(name: str, folder: Any, error: Exception) -> OSError:
    return OSError(f"TFDS data set {name!r} in {folder} cannot be read ({error}); prepare it again")


def _read_records(source: Any, name: str, folder: str, positions: list[int]) -> Sequence[Any]:
    try:
        return source.__getitems__(positions)
    except RuntimeError as error:
        raise _unreadable(name, folder, error) from None


def _check_feature_names(name: str, data_dir: str | None) -> None:
    """Raises Unreadable where a stored data set names features of other modules: TFDS would import them."""
    root = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    folder = root.expanduser() / re.split("[/:]", name)[0]
    for path in folder.rglob("features.json"):
        classes = re.findall(r'"(?:pythonClassName|type)"\s*:\s*"([^"]*\.[^"]*)"', path.read_text(errors="replace"))
        for other in classes:
            if not other.startswith("tensorflow_datasets."):
                raise Unreadable(f"{path} names the feature {shown(other)}, which is not one of TFDS; remove that folder")


def _load_tfds(
    name: str,
    data_dir: str | None,
    image_size: int | None,
    channels: int | None,
    seed: int,
    in_memory: bool | None,
) -> Dataset:
    tfds = _import_tfds()
    builder = _tfds_builder(tfds, name, data_dir)
    features = dict(builder.info.features.items())
    images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
    key = "image" if "image" in images else images[0]
    if features[key].np_dtype != np.uint8:
        raise ValueError(f"feature {key!r} of TFDS data set {name!r} is {features[key].np_dtype}; expected uint8")
    height, width, have = features[key].shape
    if image_size is None and (height is None or width is None):
        raise ValueError(f"the images of TFDS data set {name!r} vary in size; set image_size")
    if image_size is not None:
        height = width = image_size
    item_shape = (height, width, channels or (1 if have == 1 else 3))
    labelled = isinstance(features.get("label"), tfds.features.ClassLabel)

    splits = list(builder.info.splits)
    if "train" not in splits:
        raise ValueError(f"TFDS data set {name!r} has the splits {splits}; expected a `train`")
    held = next((s for s in ("test", "validation") if s in splits), None)

    def arrays(split: str) -> tuple[LazyArray, LazyArray | None]:
        # The decoders of TFDS leave the images as bytes: its own decoding warns where OpenCV is
        # absent and takes twice as long.
        try:
            source = builder.as_data_source(split, decoders={key: tfds.decode.SkipDecoding()})
            rows = np.arange(len(source))
        except RuntimeError as error:
            raise _unreadable(name, builder.data_dir, error) from None
        records = functools.partial(_read_records, source, name, str(builder.data_dir))
        decode = functools.partial(_from_bytes, image_size=image_size, channels=item_shape[-1], origin=f"{name} {split}")
        pixels = LazyArray(records, lambda r: decode(r[key]), rows, item_shape, np.uint8)
        if not labelled:
            return pixels, None
        return pixels, LazyArray(records, lambda r: r["label"], rows, (), np.int32)

    train, train_labels = arrays("train")
    if held is not None:
        test, test_labels = arrays(held)
    else:
        kept, out = _held_out(len(train), seed, f"TFDS data set {name!r}")
        train, test = train.take(kept), train.take(out)
        test_labels = None
        if train_labels is not None:
            train_labels, test_labels = train_labels.take(kept), train_labels.take(out)
    if _fits_in_memory(in_memory, len(train) + len(test), item_shape):
        train, train_labels = _decode_all(train, train_labels, f"{name} train")
        test, test_labels = _decode_all(test, test_labels, f"{name} test")
    return Dataset(name, train, test, train_labels, test_labels, num_levels=256)


@functools.lru_cache(maxsize=8)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    # Philox's raw stream is frozen across numpy versions, and its key keeps the epochs of all seeds
    # apart (seed + epoch would make epoch 1 of seed 0 that of epoch 0 of seed 1).
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order


def _read_batch(step: int, dataset: Dataset, batch_size: int, seed: int, shard: tuple[int, int]) -> dict[str, np.ndarray]:
    count, size = len(dataset.train), batch_size // shard[1]
    position = int(step) * batch_size + shard[0] * size + np.arange(size)
    epochs, places = np.divmod(position, count)
    rows = np.empty(size, np.int64)
    for epoch in range(epochs[0], epochs[-1] + 1):
        here = epochs == epoch
        rows[here] = _epoch_order(seed, epoch, count)[places[here]]
    batch = {"x": dataset.train[rows]}
    if dataset.train_labels is not None:
        batch["label"] = dataset.train_labels[rows]
    return batch


def batches(dataset: Dataset, batch_size: int, seed: int, *, shard: tuple[int, int] = (0, 1)) -> "grain.MapDataset":
    """Endless shuffled training batches: `batches(...)[step]` is a pure function of (seed, step).

    A batch is a dict of numpy arrays, `x` `(B, *event)` and, where there are labels, `label`
    `(B,)`. The examples are reshuffled in every epoch and each occurs once in it; a batch may span
    the end of an epoch, or several epochs.
    shard: `(index, count)` of the hosts; host i gets the i-th of `count` equal parts of the same
    global batch, in order, so `batch_size` is always the global one.
    Grain's `to_iter_dataset` and `mp_prefetch` apply to it and do not change what is read.
    Raises ValueError for a bad batch_size, seed or shard.
    """
    # Grain takes about a second to import.
    import grain

    index, hosts = shard
    if not 0 <= index < hosts:
        raise ValueError(f"shard={shard}: expected (index, count) with 0 <= index < count")
    if batch_size < 1 or batch_size % hosts:
        raise ValueError(
            f"batch_size={batch_size}: expected a positive multiple of the {hosts} host(s); try {hosts * max(1, batch_size // hosts)}"
        )
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}: expected an integer from 0 to 2**64 - 1")
    # Grain's own shuffle costs some 30 microseconds for each example; one permutation for each
    # epoch makes a batch of 128 small images about a hundred times cheaper.
    read = functools.partial(_read_batch, dataset=dataset, batch_size=batch_size, seed=seed, shard=shard)
    return grain.MapDataset.range(sys.maxsize // batch_size).map(read)


def read_ahead(batches: "grain.MapDataset", start: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps start, start + 1, ..., each read while the one before it is in use."""
    import grain

    # One thread and two batches hide the decoding of a LazyArray behind a step; grain's default of
    # 16 threads and 500 batches costs memory, and time in the interpreter lock.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(batches[start:].to_iter_dataset(options))


def eval_batches(array: Any, batch_size: int, *, shard: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs `(batch, mask)` that cover every row of `array` once, in order.

    batch `(B, *event)`; mask bool `(B,)`, False on the rows that pad the last batch (they repeat
    the last example, so they are valid input). shard as in `batches`.
    """
    index, hosts = shard
    if batch_size < 1 or batch_size % hosts or not 0 <= index < hosts:
        raise ValueError(
            f"batch_size={batch_size}, shard={shard}: expected a positive multiple of the number "
            "of hosts and (index, count) with 0 <= index < count"
        )
    size = batch_size // hosts
    for start in range(0, len(array), batch_size):
        rows = start + index * size + np.arange(size)
        yield array[np.minimum(rows, len(array) - 1)], rows < len(array)


# Grey levels are split into 2^14 sub-levels: fine enough for a density, and coarse enough for
# float32 to keep a level and its sub-level apart for up to 256 levels.
_SUBLEVELS = 2**14


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Scaler:
    """The affine map between integer levels k in 0..L-1 and model space; pure and float32.

    centered: y = 2 (k + u) / L - 1 in [-1, 1]; else y = (k + u) / L in [0, 1]; u in (0, 1).
    num_levels: L, from 2 to 256, or None for vectors, on which the map is the identity.
    A static pytree: pass it through `jax.jit` or close over it.
    """

    num_levels: int | None
    centered: bool = True

    def __post_init__(self):
        if self.num_levels is not None and not 2 <= self.num_levels <= 256:
            raise ValueError(f"num_levels={self.num_levels}: expected 2 to 256, or None for vectors")

    def dequantize(self, key: PRNGKeyArray, k: Num[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
        """Model-space values of the levels k with uniform u (arXiv:1511.01844, section 3.1).

        u is uniform on the midpoints of 2^14 equal parts of (0, 1), so `decode` inverts it exactly.
        """
        if self.num_levels is None:
            return jnp.asarray(k, jnp.float32)
        self.check_levels(k)
        sublevel = jax.random.bits(key, jnp.shape(k), jnp.uint16) & (_SUBLEVELS - 1)
        return self._scale(k, sublevel, _SUBLEVELS)

    def encode(self, k: Num[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
        """Model-space values of the levels k, at u = 1/2."""
        if self.num_levels is None:
            return jnp.asarray(k, jnp.float32)
        self.check_levels(k)
        return self._scale(k, 0, 1)

    def check_levels(self, k: Num[Array | np.ndarray, "*shape"]) -> None:
        """Raises ValueError for known values that are not all integers in 0..num_levels - 1."""
        if isinstance(k, jax.core.Tracer):
            return
        k = np.asarray(k)
        if k.dtype == np.uint8 and self.num_levels == 256:
            return
        bad = ~((k >= 0) & (k < self.num_levels) & (k == np.floor(k)))
        if bad.any():
            raise ValueError(
                f"levels hold {k[bad].flat[0]:g}, which is not one of 0..{self.num_levels - 1}: pass the integer levels, or a Scaler with "
                "more num_levels"
            )

    def _scale(self, k: Any, sublevel: Any, sublevels: int) -> jax.Array:
        # Numerator and denominator are integers below 2^24, so only the division rounds.
        numerator = 2 * (jnp.asarray(k, jnp.int32) * sublevels + sublevel) + 1
        half_range = self.num_levels * sublevels
        if self.centered:
            return (numerator - half_range).astype(jnp.float32) / half_range
        return numerator.astype(jnp.float32) / (2 * half_range)

    def decode(self, y: Float[Array | np.ndarray, "*shape"]) -> Num[Array, "*shape"]:
        """The uint8 level whose cell holds y, clipped to 0..L-1; vectors come back unchanged."""
        y = jnp.asarray(y, jnp.float32)
        if self.num_levels is None:
            return y
        scaled = (y + 1.0) * (0.5 * self.num_levels) if self.centered else y * self.num_levels
        return jnp.clip(jnp.floor(scaled), 0, self.num_levels - 1).astype(jnp.uint8)

    def to_uint8(self, y: Float[Array | np.ndarray, "*shape"]) -> UInt8[Array, "*shape"]:
        """The decoded levels as grey values 0..255, for pictures."""
        if self.num_levels is None:
            raise ValueError("num_levels=None: vectors are not pictures; plot them as points")
        grey = self.decode(y).astype(jnp.float32) * (255.0 / (self.num_levels - 1))
        return jnp.round(grey).astype(jnp.uint8)

    def values(self) -> Float[np.ndarray, " levels"] | None:
        """What `encode` makes of each level, increasing, `(L,)`; None for vectors."""
        if self.num_levels is None:
            return None
        middle = (np.arange(self.num_levels, dtype=np.float32) + 0.5) / self.num_levels
        return 2 * middle - 1 if self.centered else middle

    def bits_per_dim(self, log_prob_nats: Float[Array | np.ndarray, "*batch"], num_dims: int) -> Float[Array, "*batch"]:
        """-log2 p / D of a density of model-space values, as a density of k + u (of y for vectors).

        The expectation over u bounds the discrete code length from above (arXiv:1511.01844,
        section 3.1).
        """
        bits = -jnp.asarray(log_prob_nats, jnp.float32) / (num_dims * math.log(2.0))
        if self.num_levels is None:
            return bits
        return bits + math.log2(self.num_levels / (2 if self.centered else 1))


def random_flip(key: PRNGKeyArray, x: Num[Array | np.ndarray, "batch height width channels"]) -> Num[Array, "batch height width channels"]:
    """Each image mirrored left to right with probability 1/2. Not for digits or letters."""
    flip = jax.random.bernoulli(key, 0.5, (x.shape[0], 1, 1, 1))
    return jnp.where(flip, x[:, :, ::-1], x)
