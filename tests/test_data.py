import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from sde_diffusion import data

LEVELS = [None, 2, 17, 256]


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_digits_are_a_stratified_split_of_scikit_learns():
    digits = data.load("digits")
    assert digits.train.shape == (1500, 8, 8, 1) and digits.test.shape == (297, 8, 8, 1)
    assert digits.event_shape == (8, 8, 1) and digits.num_levels == 17
    assert digits.train.dtype == np.uint8 and digits.train_labels.dtype == np.int32
    assert digits.train.max() == 16

    def rows(images, labels):
        return np.concatenate([images.reshape(len(images), -1), labels[:, None]], axis=1)

    ours = np.concatenate([rows(digits.train, digits.train_labels), rows(digits.test, digits.test_labels)])
    theirs = rows(*load_digits(return_X_y=True))
    assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))
    share = np.bincount(digits.test_labels) / np.bincount(theirs[:, -1].astype(int))
    np.testing.assert_allclose(share, 297 / 1797, atol=0.01)


def test_gaussian_mixture_draws_have_its_moments():
    weights, means, covariances = data.gaussian_mixture_2d()
    mixture = data.load("gaussian_mixture_2d")
    assert mixture.train.shape == (20_000, 2) and mixture.test.shape == (2_000, 2)
    assert mixture.train.dtype == np.float32 and mixture.num_levels is None
    np.testing.assert_array_equal(mixture.train, data.load("gaussian_mixture_2d", seed=5).train)
    for k in range(len(weights)):
        points = mixture.train[mixture.train_labels == k].astype(np.float64)
        n, std = len(points), np.sqrt(np.diag(covariances[k]))
        assert abs(n / 20_000 - weights[k]) < 4 * np.sqrt(weights[k] / 20_000)
        assert (np.abs(points.mean(axis=0) - means[k]) < 4 * std / np.sqrt(n)).all()
        assert (np.abs(points.std(axis=0) - std) < 4 * std / np.sqrt(2 * n)).all()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cifar1O", {}, ["'cifar1O'", "did you mean cifar10", "digits", "gaussian_mixture_2d"]),
        ("no/such_set", {}, ["'no/such_set'", ".npz", "./pictures"]),
        ("Mnist", {}, ["did you mean mnist"]),
        ("mnist:9.9.9", {}, ["mnist", "9.9.9", "3.0.1"]),
        ("imdb_reviews", {}, ["no image feature", "text"]),
        ("digits", {"image_size": 16}, ["image_size=16", "8x8"]),
        ("digits", {"channels": 3}, ["channels=3", "grey"]),
        ("gaussian_mixture_2d", {"channels": 1}, ["channels=1", "points"]),
        ("cifar10", {"channels": 2}, ["channels=2", "1 (grey), 3 (RGB)"]),
        ("cifar10", {"image_size": 0}, ["image_size=0"]),
    ],
)
def test_bad_requests_get_one_line(name, options, words):
    with pytest.raises(ValueError) as error:
        data.load(name, **options)
    for word in words:
        assert word in one_line(error)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere.npz", "~/nowhere"])
def test_a_missing_path_is_named(name):
    with pytest.raises(FileNotFoundError, match=r"nowhere.* does not exist; expected a"):
        data.load(name)


def test_a_bare_folder_name_gets_a_hint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match=r"write \./pictures"):
        data.load("pictures")


def test_importing_the_module_imports_no_reader():
    code = (
        "import sys, sde_diffusion.data as d; "
        "bad = {'grain', 'tensorflow_datasets', 'tensorflow', 'sklearn', 'PIL'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def encode(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


# By array_record itself, since TFDS's own writer needs TensorFlow.
def write_tfds(folder, splits, labels, shape, file_format="array_record"):
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder = folder / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    features = {"image": tfds.features.Image(shape=shape)}
    if labels is not None:
        features["label"] = tfds.features.ClassLabel(num_classes=7)
    tfds.features.FeaturesDict(features).save_config(folder)
    infos = []
    for split, images in splits.items():
        records = []
        for i, pixels in enumerate(images):
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(encode(pixels))
            if labels is not None:
                example.features.feature["label"].int64_list.value.append(int(labels[split][i]))
            records.append(example.SerializeToString())
        writer = ArrayRecordWriter(str(folder / f"tiny-{split}.{file_format}-00000-of-00001"), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        infos.append(
            {
                "name": split,
                "shardLengths": [str(len(records))],
                "numBytes": str(sum(map(len, records))),
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": file_format, "splits": infos}
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture
def tiny():
    random = np.random.default_rng(0)
    splits = {"train": 60, "validation": 9}
    images = {k: random.integers(0, 256, (n, 5, 6, 3)).astype(np.uint8) for k, n in splits.items()}
    labels = {k: random.integers(0, 7, n) for k, n in splits.items()}
    return images, labels


@pytest.mark.parametrize("in_memory", [True, False, None])
def test_tfds_set_comes_back_bit_for_bit(tmp_path, tiny, in_memory):
    images, labels = tiny
    write_tfds(tmp_path, images, labels, (5, 6, 3))
    got = data.load("tiny", data_dir=str(tmp_path), in_memory=in_memory)
    assert isinstance(got.train, data.LazyArray) == (in_memory is False)
    assert got.event_shape == (5, 6, 3) and got.num_levels == 256 and len(got.test) == 9
    np.testing.assert_array_equal(got.train[:], images["train"])
    np.testing.assert_array_equal(got.test[:], images["validation"])
    np.testing.assert_array_equal(got.train_labels[:], labels["train"])
    np.testing.assert_array_equal(got.test_labels[:], labels["validation"])
    assert got.train_labels.dtype == np.int32
    for index in (3, -1, slice(2, 50, 3), np.array([7, 7, 0]), np.zeros((2, 20), int)):
        np.testing.assert_array_equal(got.train[index], images["train"][index])


def test_memory_limit_decides_for_lazy_decoding(tmp_path, tiny, monkeypatch):
    write_tfds(tmp_path, tiny[0], None, (5, 6, 3))
    size = 69 * 5 * 6 * 3
    for limit, lazy in ((size, False), (size - 1, True)):
        monkeypatch.setattr(data, "MEMORY_LIMIT", limit)
        got = data.load("tiny", data_dir=str(tmp_path))
        assert isinstance(got.train, data.LazyArray) == lazy
        assert got.train_labels is None and got.test_labels is None


def test_lazy_and_decoded_batches_agree_also_after_pickling(tmp_path, tiny):
    import cloudpickle

    write_tfds(tmp_path, *tiny, (5, 6, 3))
    sets = [data.load("tiny", data_dir=str(tmp_path), in_memory=m) for m in (True, False)]
    first, second = (data.batches(s, 16, seed=3) for s in sets)
    third = pickle.loads(cloudpickle.dumps(second))
    for step in (0, 5, 11):
        for other in (second, third):
            np.testing.assert_array_equal(first[step]["x"], other[step]["x"])
            np.testing.assert_array_equal(first[step]["label"], other[step]["label"])


def test_tfds_set_without_a_test_split_holds_out_a_seeded_tenth(tmp_path, tiny):
    images, labels = tiny
    write_tfds(tmp_path, {"train": images["train"]}, labels, (5, 6, 3))
    load = [data.load("tiny", data_dir=str(tmp_path), seed=s, in_memory=s > 0) for s in (0, 1, 1)]
    for got in load:
        assert got.train.shape == (54, 5, 6, 3) and got.test.shape == (6, 5, 6, 3)
        both = np.concatenate([got.train[:], got.test[:]])
        assert sorted(x.tobytes() for x in both) == sorted(x.tobytes() for x in images["train"])
        for x, label in zip(got.test[:], got.test_labels[:], strict=True):
            where = (images["train"] == x[None]).all(axis=(1, 2, 3))
            assert labels["train"][where] == label
    assert (load[1].test == load[2].test).all() and (load[0].test[:] != load[1].test).any()


def test_images_of_varying_size_need_image_size(tmp_path):
    images = [np.full((h, w, 3), 90, np.uint8) for h, w in ((8, 12), (16, 9), (8, 8))]
    images[0][:, [0, 1, -2, -1]] = 255
    write_tfds(tmp_path, {"train": images}, None, (None, None, 3))
    with pytest.raises(ValueError, match="vary in size; set image_size"):
        data.load("tiny", data_dir=str(tmp_path))
    got = data.load("tiny", data_dir=str(tmp_path), image_size=8, channels=1)
    # The bright columns lie outside the centre crop.
    assert got.event_shape == (8, 8, 1) and (got.train == 90).all() and (got.test == 90).all()


def test_unprepared_set_gets_the_command_that_prepares_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        data.load("cifar100", data_dir=str(tmp_path))
    message = one_line(error)
    assert "'cifar100' is not prepared" in message and "pip install -e '.[prepare]' && " in message
    assert f"tfds.builder('cifar100', data_dir='{tmp_path}', file_format='array_record')" in message


def test_tfrecord_files_are_refused(tmp_path, tiny):
    write_tfds(tmp_path, tiny[0], None, (5, 6, 3), file_format="tfrecord")
    with pytest.raises(FileNotFoundError, match="stored as tfrecord; expected array_record"):
        data.load("tiny", data_dir=str(tmp_path))


@pytest.mark.parametrize("module", ["importlib_resources", "tensorflow"])
def test_a_module_that_tfds_misses_is_named(module, monkeypatch):
    def builder(*args, **kwargs):
        raise ModuleNotFoundError(f"Failed to construct: No module named '{module}.abc'")

    core = types.SimpleNamespace(DatasetNotFoundError=KeyError)
    stub = types.SimpleNamespace(builder=builder, core=core)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", stub)
    with pytest.raises(ImportError, match=f"'{module}', which is not installed; run: pip install"):
        data.load("cifar10")


def test_missing_tfds_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="'tensorflow_datasets', which is not installed"):
        data.load("cifar10")


def real(name):
    folder = os.environ.get("TFDS_DATA_DIR")
    if not folder or not (pathlib.Path(folder) / name).is_dir():
        pytest.skip(f"TFDS_DATA_DIR holds no prepared {name}")
    return data.load(name, data_dir=folder, in_memory=False)


def test_real_cifar10():
    before = "tensorflow" in sys.modules
    cifar = real("cifar10")
    assert cifar.train.shape == (50_000, 32, 32, 3) and cifar.test.shape == (10_000, 32, 32, 3)
    test = cifar.test[:]
    # Published statistics of the test images.
    mean = test.mean(axis=(0, 1, 2), dtype=np.float64) / 255
    np.testing.assert_allclose(mean, [0.494, 0.485, 0.450], atol=5e-4)
    assert (np.bincount(cifar.test_labels[:]) == 1000).all()
    assert ("tensorflow" in sys.modules) == before


def test_real_mnist():
    mnist = real("mnist")
    assert mnist.train.shape == (60_000, 28, 28, 1) and mnist.test.shape == (10_000, 28, 28, 1)
    test = mnist.test[:] / 255
    assert abs(test.mean() - 0.1325) < 5e-5 and abs(test.std() - 0.3105) < 5e-5
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.test_labels[:]).tolist() == counts


def test_npz_with_a_test_split(tmp_path):
    random = np.random.default_rng(0)
    train, test = (random.integers(0, 256, (n, 4, 4)).astype(np.uint8) for n in (20, 5))
    np.savez(tmp_path / "a.npz", images=train, test=test, labels=np.arange(20))
    got = data.load(str(tmp_path / "a.npz"))
    np.testing.assert_array_equal(got.train[..., 0], train)
    np.testing.assert_array_equal(got.test[..., 0], test)
    assert got.train_labels.tolist() == list(range(20)) and got.test_labels is None
    assert got.num_levels == 256
    coloured = data.load(str(tmp_path / "a.npz"), channels=3, image_size=8)
    assert coloured.event_shape == (8, 8, 3)
    assert (coloured.train[..., 0] == coloured.train[..., 2]).all()


def test_npz_without_a_test_split_holds_out_a_tenth(tmp_path):
    images = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None, None], (40, 2, 2, 3))
    np.savez(tmp_path / "a.npz", train=images, train_labels=np.arange(40))
    got = data.load(str(tmp_path / "a.npz"), seed=4)
    assert len(got.train) == 36 and len(got.test) == 4
    assert sorted([*got.train_labels, *got.test_labels]) == list(range(40))
    assert (got.test[:, 0, 0, 0] == got.test_labels).all()


def test_npz_of_vectors(tmp_path):
    np.savez(tmp_path / "a.npz", train=np.random.default_rng(0).normal(size=(30, 2)))
    got = data.load(str(tmp_path / "a.npz"))
    assert got.train.shape == (27, 2) and got.train.dtype == np.float32 and got.num_levels is None


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros(3)}, ["['x']", "`train` or `images`"]),
        ({"train": np.zeros((3, 4, 4))}, ["float64 (3, 4, 4)", "expected uint8 images"]),
        ({"train": np.zeros((3, 4, 4, 2), np.uint8)}, ["(3, 4, 4, 2)", "C = 1 or 3"]),
        ({"train": np.zeros((0, 4, 4), np.uint8)}, ["(0, 4, 4)"]),
        ({"train": np.zeros((1, 4, 4), np.uint8)}, ["1 example", "at least 2", "set data.name"]),
        ({"train": np.full((3, 2), np.nan)}, ["NaN"]),
        ({"train": np.array([{}], object)}, ["pickled", "numpy.savez"]),
        (
            {"train": np.zeros((3, 4, 4), np.uint8), "labels": np.zeros(2, int)},
            ["`labels`", "(2,)", "(3,)"],
        ),
        (
            {"train": np.zeros((3, 4, 4), np.uint8), "test": np.zeros((3, 5, 5), np.uint8)},
            ["`test`", "(5, 5, 1)", "(4, 4, 1)"],
        ),
    ],
)
def test_bad_npz_gets_one_line(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError) as error:
        data.load(str(tmp_path / "a.npz"))
    for word in ["a.npz", *words]:
        assert word in one_line(error)


def test_a_file_that_is_no_npz_gets_one_line(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"is not an \.npz"):
        data.load(str(tmp_path / "a.npz"))


def test_folder_of_images(tmp_path):
    for i in range(20):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        pixels = np.full((6, 6), 10 * i, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"class{i % 2}" / f"{i:02}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    for in_memory in (True, False):
        got = data.load(str(tmp_path), in_memory=in_memory)
        assert got.train.shape == (18, 6, 6, 1) and got.test.shape == (2, 6, 6, 1)
        values = [int(x[0, 0, 0]) // 10 for x in got.train[:]]
        held = {int(x[0, 0, 0]) // 10 for x in got.test[:]}
        assert values == [i for i in [*range(0, 20, 2), *range(1, 20, 2)] if i not in held]
        assert len(held) == 2


def test_folder_of_photographs_is_cropped_turned_and_coloured(tmp_path):
    wide = np.full((20, 40, 3), 60, np.uint8)
    wide[:, :5] = wide[:, -5:] = 250
    Image.fromarray(wide).save(tmp_path / "a.png")
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(wide).save(tmp_path / "b.JPG", quality=95, exif=tags)
    with pytest.raises(ValueError) as error:
        data.load(str(tmp_path))
    assert "vary in size, from (20, 40) to (40, 20); set image_size" in one_line(error)
    got = data.load(str(tmp_path), image_size=10)
    both = np.concatenate([got.train, got.test])
    assert both.shape == (2, 10, 10, 3) and np.abs(both.astype(int) - 60).max() <= 2
    assert data.load(str(tmp_path), image_size=10, channels=1).event_shape == (10, 10, 1)


def test_bad_folders_get_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.png, \.jpg or \.jpeg"):
        data.load(str(tmp_path))
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / name)
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        data.load(str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match="not a readable image"):
        data.load(str(tmp_path))


def numbered(count):
    rows = np.arange(count)
    return data.Dataset("numbered", rows[:, None].astype(np.float32), rows[:2], rows.astype(np.int32))


@pytest.mark.parametrize("batch_size", [1, 7, 30, 64, 150])
def test_every_epoch_holds_each_example_once_in_a_new_order(batch_size):
    batches = data.batches(numbered(30), batch_size, seed=1)
    steps = -(-120 // batch_size)
    stream = np.concatenate([batches[i]["x"] for i in range(steps)])[:120, 0].reshape(4, 30)
    for epoch in stream:
        assert sorted(epoch) == list(range(30))
    assert len({tuple(epoch) for epoch in stream}) == 4
    assert all(len(batches[i]["x"]) == batch_size for i in range(steps))


def test_a_batch_is_a_function_of_seed_and_step():
    def stream(seed, order=range(9)):
        batches = data.batches(numbered(30), 8, seed)
        return {i: batches[i]["x"].ravel().tolist() for i in order}

    assert stream(0) == stream(0, reversed(range(9)))
    assert stream(0) != stream(1)
    # Epoch 1 of seed 0 is not epoch 0 of seed 1.
    first = data.batches(numbered(30), 30, 0)[1]["x"]
    assert (first != data.batches(numbered(30), 30, 1)[0]["x"]).any()
    late = data.batches(numbered(30), 8, 0)[10**12]
    assert late["x"].shape == (8, 1)


def test_shuffling_leaves_no_trace_of_the_order():
    # Under uniform permutations the rank correlation has variance 1 / (n - 1).
    batches = data.batches(numbered(100), 100, seed=0)
    rows = np.arange(100.0)
    correlations = [np.corrcoef(rows, batches[i]["x"][:, 0])[0, 1] for i in range(400)]
    assert abs(np.mean(correlations)) < 4 / np.sqrt(400 * 99)
    assert abs(np.var(correlations) * 99 - 1) < 4 * np.sqrt(2 / 400)


def test_labels_stay_with_their_examples():
    for batch in data.batches(numbered(30), 64, 0)[:3]:
        np.testing.assert_array_equal(batch["x"][:, 0], batch["label"])
    vectors = data.Dataset("bare", np.zeros((5, 2), np.float32), np.zeros((1, 2), np.float32))
    assert set(data.batches(vectors, 4, 0)[0]) == {"x"}


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_parts_of_the_same_global_batch(hosts):
    whole = data.batches(numbered(30), 16, 2)
    parts = [data.batches(numbered(30), 16, 2, shard=(i, hosts)) for i in range(hosts)]
    for step in (0, 1, 7):
        for key in ("x", "label"):
            union = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(union, whole[step][key])


def test_reading_ahead_changes_no_bit():
    batches = data.batches(numbered(30), 8, 0)
    stream = data.read_ahead(batches, start=5)
    for step in range(5, 25):
        np.testing.assert_array_equal(next(stream)["x"], batches[step]["x"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 10, "shard": (0, 4)}, "multiple of the 4 host"),
        ({"shard": (2, 2)}, r"shard=\(2, 2\)"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_batches_get_one_line(options, words):
    with pytest.raises(ValueError, match=words) as error:
        data.batches(**{"dataset": numbered(30), "batch_size": 8, "seed": 0, **options})
    one_line(error)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_covers_every_row_once(count, hosts):
    array = np.arange(1, count + 1)[:, None]
    parts = [list(data.eval_batches(array, 16, shard=(i, hosts))) for i in range(hosts)]
    rows = []
    for step in zip(*parts, strict=True):
        for batch, mask in step:
            assert batch.shape == (16 // hosts, 1) and mask.dtype == bool
            assert (batch > 0).all()
            rows.extend(batch[mask][:, 0])
    assert rows == list(range(1, count + 1))


@pytest.mark.parametrize("centered", [True, False])
def test_decode_inverts_dequantize_for_every_level_and_the_most_extreme_noise(centered, monkeypatch):
    for bits in (0, 2**16 - 1):
        monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype, b=bits: jnp.full(shape, b, dtype))
        for num_levels in range(2, 257):
            scaler = data.Scaler(num_levels, centered)
            k = (np.arange(256) % num_levels).astype(np.uint8)
            y = scaler.dequantize(jax.random.key(0), k)
            np.testing.assert_array_equal(scaler.decode(y), k)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_decode_inverts_dequantize_and_encode(num_levels, centered):
    scaler = data.Scaler(num_levels, centered)
    k = np.tile(np.arange(num_levels, dtype=np.uint8), 2000)
    y = jax.jit(scaler.dequantize)(jax.random.key(1), k)
    decoded = jax.jit(scaler.decode)(y)
    assert y.dtype == jnp.float32 and decoded.dtype == jnp.uint8
    np.testing.assert_array_equal(decoded, k)
    np.testing.assert_array_equal(scaler.decode(scaler.encode(k)), k)
    low = -1.0 if centered else 0.0
    assert low < y.min() and y.max() < 1.0
    middle = scaler.encode(np.arange(num_levels, dtype=np.uint8))
    np.testing.assert_allclose(middle.mean(), (low + 1) / 2, atol=1e-6)


def test_decode_clips():
    y = jnp.array([-7.0, -1.0, 1.0, 3.0])
    assert data.Scaler(17).decode(y).tolist() == [0, 0, 16, 16]


def test_dequantization_noise_is_uniform():
    n = 2**18
    y = data.Scaler(17).dequantize(jax.random.key(0), np.full(n, 5, np.uint8))
    u = (np.asarray(y, np.float64) + 1) * 17 / 2 - 5
    assert 0 < u.min() and u.max() < 1
    counts, _ = np.histogram(u, bins=32, range=(0, 1))
    # Standard error of a bin's count: sqrt(n p (1 - p)), 89 here, for 8192 expected.
    assert np.abs(counts - n / 32).max() < 4.5 * np.sqrt(n / 32 * (31 / 32))
    assert abs(u.mean() - 0.5) < 4 / np.sqrt(12 * n)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_bits_per_dim_of_a_uniform_density(num_levels, centered):
    volume = 2.0 if centered else 1.0
    bits = data.Scaler(num_levels, centered).bits_per_dim(jnp.full(3, -64 * np.log(volume)), 64)
    np.testing.assert_allclose(bits, np.log2(num_levels), rtol=1e-6)
    assert bits.dtype == jnp.float32 and bits.shape == (3,)


@pytest.mark.parametrize("centered", [True, False])
def test_bits_per_dim_of_a_histogram_is_its_code_length(centered):
    scaler = data.Scaler(17, centered)
    probability = np.random.default_rng(0).dirichlet(np.ones(17))
    middle = np.asarray(scaler.encode(np.arange(17, dtype=np.uint8)), np.float64)
    density = probability / np.diff(middle).mean()
    bits = scaler.bits_per_dim(np.log(density).astype(np.float32), 1)
    np.testing.assert_allclose(bits, -np.log2(probability), rtol=1e-5, atol=1e-5)


def test_vectors_pass_unchanged():
    scaler = data.Scaler(None)
    x = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    for y in (scaler.dequantize(jax.random.key(0), x), scaler.encode(x), scaler.decode(x)):
        np.testing.assert_array_equal(y, x)
        assert y.dtype == jnp.float32
    np.testing.assert_allclose(scaler.bits_per_dim(jnp.array(-2 * np.log(2.0)), 2), 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="not pictures"):
        scaler.to_uint8(x)


def test_pictures_span_the_grey_scale():
    for num_levels in (2, 17, 256):
        scaler = data.Scaler(num_levels)
        grey = np.asarray(scaler.to_uint8(scaler.encode(np.arange(num_levels, dtype=np.uint8))))
        assert grey.dtype == np.uint8 and grey[0] == 0 and grey[-1] == 255
        np.testing.assert_allclose(grey, np.linspace(0, 255, num_levels), atol=0.51)


@pytest.mark.parametrize("num_levels", [0, 1, 257])
def test_bad_levels_are_refused(num_levels):
    with pytest.raises(ValueError, match=f"num_levels={num_levels}: expected 2 to 256"):
        data.Scaler(num_levels)


def test_scaler_is_a_static_argument():
    scale = jax.jit(lambda scaler, k: scaler.encode(k))
    k = np.arange(17, dtype=np.uint8)
    for levels in (17, 256):
        np.testing.assert_array_equal(scale(data.Scaler(levels), k), data.Scaler(levels).encode(k))


def test_flips_are_mirrors_of_half_the_images():
    x = np.random.default_rng(0).normal(size=(4000, 3, 4, 2)).astype(np.float32)
    y = np.asarray(jax.jit(data.random_flip)(jax.random.key(0), x))
    kept = (y == x).all(axis=(1, 2, 3))
    mirrored = (y == x[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (kept ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)
    np.testing.assert_array_equal(y, data.random_flip(jax.random.key(0), x))
