import json
import math
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sde_diffusion import data, evaluate, report


def lines(workdir):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def events(workdir):
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            size = int.from_bytes(raw[at : at + 8], "little")
            found.append(Event.FromString(raw[at + 12 : at + 12 + size]))
            at += 16 + size
    return found


def test_metrics_are_on_disk_at_once_and_exact(tmp_path):
    metrics = report.Metrics(tmp_path / "run")
    metrics.write(3, {"loss": jnp.float32(0.1), "rate": np.float64(2.5), "images": 7})
    assert lines(tmp_path / "run") == [{"step": 3, "loss": float(np.float32(0.1)), "rate": 2.5, "images": 7.0}]
    metrics.close()


def test_values_that_are_not_finite_stay_strict_json(tmp_path):
    with report.Metrics(tmp_path) as metrics:
        metrics.write(0, {"a": math.nan, "b": math.inf, "c": -math.inf})
    (line,) = lines(tmp_path)
    assert math.isnan(float(line["a"])) and float(line["b"]) == math.inf
    assert float(line["c"]) == -math.inf


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    with report.Metrics(tmp_path) as metrics:
        metrics.write(5, {"loss": 0.25})
        metrics.image(5, "grey", np.full((4, 6, 1), 200, np.uint8))
        metrics.image(5, "colour", np.full((4, 6, 3), 9, np.uint8))
    values = {v.tag: (e.step, v) for e in events(tmp_path) for v in e.summary.value}
    step, loss = values["loss"]
    assert step == 5 and loss.simple_value == 0.25
    assert values["grey"][1].image.height == 4 and values["colour"][1].image.width == 6


def test_resuming_drops_later_steps_and_a_torn_line_only(tmp_path):
    with report.Metrics(tmp_path) as metrics:
        for step in (10, 20, 30):
            metrics.write(step, {"loss": step / 7})
    path = tmp_path / "metrics.jsonl"
    before = path.read_text().splitlines()
    path.write_text("\n".join([*before, '{"step": 40, "lo']))
    with report.Metrics(tmp_path, resume_step=20) as metrics:
        metrics.write(25, {"loss": 1.0})
    after = path.read_text().splitlines()
    assert after[:2] == before[:2]
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 25]
    assert any(e.step == 21 for e in events(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tensorboard"]


def test_reopening_without_a_step_keeps_all_whole_lines(tmp_path):
    with report.Metrics(tmp_path) as metrics:
        metrics.write(10, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20')
    with report.Metrics(tmp_path) as metrics:
        metrics.write(5, {"loss": 2.0})
    assert [line["step"] for line in lines(tmp_path)] == [10, 5]


def test_a_metric_cannot_be_called_step(tmp_path):
    with report.Metrics(tmp_path) as metrics, pytest.raises(ValueError, match="'step' is taken"):
        metrics.write(1, {"step": 2.0})


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_is_found_in_the_grid(channels):
    images = np.random.default_rng(0).integers(0, 256, (10, 5, 7, channels)).astype(np.uint8)
    grid = report.image_grid(images, columns=4, padding=2, scale=3)
    assert grid.shape == (3 * (2 + 3 * 7), 3 * (2 + 4 * 9), channels) and grid.dtype == np.uint8
    small = grid[1::3, 1::3]
    np.testing.assert_array_equal(small.repeat(3, axis=0).repeat(3, axis=1), grid)
    for i, image in enumerate(images):
        top, left = 2 + 7 * (i // 4), 2 + 9 * (i % 4)
        np.testing.assert_array_equal(small[top : top + 5, left : left + 7], image)
    assert (small[:2] == 128).all() and (small[-7:, 20:] == 128).all()


@pytest.mark.parametrize(
    ("count", "shape", "expected"),
    [
        (64, (8, 8, 1), (365, 365)),
        (1, (8, 8, 1), (50, 50)),
        (100, (32, 32, 3), (662, 662)),
        (4, (64, 64, 3), (131, 131)),
    ],
)
def test_grids_are_square_and_small_images_enlarged(count, shape, expected):
    assert report.image_grid(np.zeros((count, *shape), np.uint8)).shape[:2] == expected


def test_a_grid_of_tall_images_is_nearly_square():
    height, width, _ = report.image_grid(np.zeros((36, 80, 20, 1), np.uint8)).shape
    assert 0.7 < height / width < 1.4


@pytest.mark.parametrize(
    ("shape", "options"),
    [((0, 8, 8, 1), {}), ((4, 8, 8, 2), {}), ((4, 8, 8, 1), {"columns": 0})],
)
def test_bad_grids_are_refused(shape, options):
    with pytest.raises(ValueError, match="expected"):
        report.image_grid(np.zeros(shape, np.uint8), **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_saved_images_read_back(tmp_path, channels):
    picture = np.random.default_rng(0).integers(0, 256, (9, 5, channels)).astype(np.uint8)
    path = tmp_path / "samples" / "grid.png"
    report.save_image(path, jnp.asarray(picture))
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image).reshape(picture.shape), picture)
    assert os.listdir(path.parent) == ["grid.png"]


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    report.save_image(path, np.zeros((2, 2, 1), np.uint8))
    before = path.read_bytes()

    def fail(self, file, *args, **kwargs):
        pathlib.Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        report.save_image(path, np.ones((2, 2, 1), np.uint8))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["grid.png"]


def test_scatter_is_a_picture_of_both_sets(tmp_path):
    random = np.random.default_rng(0)
    reference = random.normal(size=(300, 2)).astype(np.float32)
    path = tmp_path / "scatter.png"
    report.save_scatter(path, reference[:50] + 50.0, reference)
    with Image.open(path) as image:
        far = np.asarray(image.convert("RGB"))
    report.save_scatter(path, reference[:50], reference)
    with Image.open(path) as image:
        near = np.asarray(image.convert("RGB"))
    blue = [(np.ptp(p.astype(int), axis=2) > 60).sum() for p in (far, near)]
    assert blue[1] > blue[0] + 200
    assert os.listdir(tmp_path) == ["scatter.png"]


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_energy_distance_is_the_sum_over_all_pairs(chunk):
    random = np.random.default_rng(0)
    x = random.normal(size=(7, 2, 3))
    y = 2.0 + random.normal(size=(7, 2, 3))

    def mean(a, b):
        return math.fsum(math.dist(p.ravel(), q.ravel()) for p in a for q in b) / 49

    expected = 2 * mean(x, y) - mean(x, x) - mean(y, y)
    assert report.energy_distance(x, y, chunk=chunk)[0] == pytest.approx(expected, rel=1e-12)


def test_energy_distance_of_a_set_to_itself_is_zero_far_from_the_origin():
    x = 1e4 + np.random.default_rng(0).normal(size=(50, 64))
    # The root of float64's rounding of |a - b|^2 remains for equal points in the two sets.
    assert abs(report.energy_distance(x, x[::-1])[0]) < 1e-6


def test_energy_distance_of_shifted_gaussians_is_the_folded_normals_mean():
    # |X - Y| is folded normal: E|N(m, 2)| = 2 exp(-m^2/4) / sqrt(pi) + m erf(m / 2).
    n, shift, rounds = 500, 1.5, 40
    random = np.random.default_rng(0)
    values = [report.energy_distance(random.normal(size=(n, 1)), shift + random.normal(size=(n, 1)))[0] for _ in range(rounds)]
    same = 2 / math.sqrt(math.pi)
    apart = same * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)
    # The V-statistic counts each example's zero distance to itself.
    expected = 2 * apart - 2 * same * (1 - 1 / n)
    assert abs(np.mean(values) - expected) < 4 * np.std(values) / math.sqrt(rounds)


def test_energy_distance_floor_is_its_documented_mean():
    n, rounds = 100, 200
    random = np.random.default_rng(0)
    values = [report.energy_distance(random.normal(size=(n, 1)), random.normal(size=(n, 1)))[0] for _ in range(rounds)]
    expected = 2 / math.sqrt(math.pi) * (2 / n)
    assert min(values) >= 0
    assert abs(np.mean(values) - expected) < 4 * np.std(values) / math.sqrt(rounds)


@pytest.mark.parametrize(("shift", "low", "high"), [(0.0, 1.0, 1.6), (0.7, 0.8, 1.25)])
def test_energy_distance_knows_its_standard_error(shift, low, high):
    # Of sets of one distribution an upper bound, up to the root of 2 too large; the spread of 200 draws has an error of 5%.
    n, random = 200, np.random.default_rng(0)
    draws = [report.energy_distance(random.normal(size=(n, 8)), shift + random.normal(size=(n, 8)), chunk=77) for _ in range(200)]
    values, errors = np.array(draws).T
    assert low < np.sqrt(np.mean(errors**2)) / np.std(values) < high


def test_energy_distance_takes_images():
    x = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1)).astype(np.uint8)
    y = jnp.asarray(x[::-1] // 2)
    value = report.energy_distance(x, y)[0]
    wide = report.energy_distance(x.astype(np.float64), np.asarray(y, np.float64))[0]
    assert value == wide > 0


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.zeros((3, 2)), np.zeros((4, 2)), "cut the longer one"),
        (np.zeros((3, 2)), np.zeros((3, 3)), "expected two equal"),
        (np.full((3, 2), np.nan), np.zeros((3, 2)), "NaN"),
    ],
)
def test_bad_sets_are_refused(x, y, words):
    with pytest.raises(ValueError, match=words):
        report.energy_distance(x, y)


def test_quality_takes_rows_at_random_of_a_file_in_order():
    random, n = np.random.default_rng(0), 500
    train, test = (np.sort(random.normal(size=(10 * n, 1)), axis=0).astype(np.float32) for _ in range(2))
    samples = random.normal(size=(n, 1)).astype(np.float32)
    figures = evaluate.quality(samples, data.Dataset("sorted", train, test), data.Scaler(None))
    # 2 / sqrt(pi) (2 / n) on average, with that standard deviation at most.
    assert max(figures["energy_distance"], figures["energy_distance_floor"]) < 5 * 2 / np.sqrt(np.pi) * 2 / n
