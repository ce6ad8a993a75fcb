"""Files that are damaged, or made to do harm: one line that names the file, or passed over; no code of theirs runs."""

import io
import json
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image

import sde_diffusion as sd
from sde_diffusion import config as configs
from sde_diffusion import data, evaluate, main, report, train
from sde_diffusion.checkpoint import CHECKSUMS, Checkpoints
from sde_diffusion.config import experiment
from sde_diffusion.samplers.learned import _process
from sde_diffusion.samplers.linear import Steps
from sde_diffusion.samplers.ode import METHODS

ROOT = Path(__file__).parent.parent


class Evil:
    """Unpickling it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def evil(tmp_path):
    trace = tmp_path / "code_was_run"
    yield Evil(trace)
    assert not trace.exists()


def refused(call, *words, kind=ValueError):
    """The one line with which a call refuses."""
    with pytest.raises(kind) as error:
        call()
    message = " ".join(str(error.value).split())
    assert len(message) < 700
    for word in words:
        assert word in message, message
    return message


def header(shape, dtype="|u1"):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue()


def npz(path, content, name="train.npy"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)


def test_npz_that_holds_something_else(tmp_path, evil):
    path = tmp_path / "a.npz"
    np.savez(path, train=np.zeros((20, 8, 8), np.uint8))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 255
    for content in (b"", b"PK\x03\x04", whole[:300], whole[:-30], bytes(flipped), pickle.dumps(evil), b"\x93NUMPY" + b"\x01" * 100):
        path.write_bytes(content)
        refused(lambda: data.load(str(path)), str(path), "numpy.savez")
    np.savez(path, train=np.array([evil], object))
    refused(lambda: data.load(str(path)), str(path), "pickled", "numpy.savez")
    # Pickled beside the data: not read.
    np.savez(path, train=np.zeros((20, 8, 8), np.uint8), more=np.array([evil], object))
    assert data.load(str(path)).event_shape == (8, 8, 1)
    # A .npy file, and a pickle, under the name of an .npz.
    with path.open("wb") as file:
        np.save(file, np.zeros((20, 8, 8), np.uint8))
    refused(lambda: data.load(str(path)), str(path))


@pytest.mark.parametrize("shape", [(10**12, 8, 8), (2**62, 4), (2**70,), (-1, 8, 8), (10, 8, 8), (2**40, 0, 8)])
def test_npz_that_declares_absurd_shapes(tmp_path, shape):
    npz(tmp_path / "a.npz", header(shape) + b"\0" * 64)
    refused(lambda: data.load(str(tmp_path / "a.npz")), "a.npz", "numpy.savez")


def test_npz_bomb(tmp_path):
    """A petabyte of zeros by its directory: refused before anything is read."""
    path = tmp_path / "a.npz"
    npz(path, header((2**50,)) + b"\0" * 1000)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02")
    raw[at + 24 : at + 28] = struct.pack("<I", 2**32 - 2)
    path.write_bytes(raw)
    refused(lambda: data.load(str(path)), "a.npz")


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(side):
    """A small PNG that says it is large."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def images():
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(picture, "PNG")
    whole = picture.getvalue()
    deep = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(deep, "PNG")
    other = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(other, "TIFF")
    return {
        "empty": b"", "text": b"hello", "truncated": whole[: len(whole) // 2], "header only": whole[:30], "bomb": bomb(60_000),
        "half a bomb": bomb(11_000), "16 bits": deep.getvalue(), "tiff": other.getvalue(),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(x) print\n%%EOF\n",
        "bad checksum": whole[:40] + bytes(b ^ 255 for b in whole[40:60]) + whole[60:],
    }  # fmt: skip


@pytest.mark.parametrize("name", images())
@pytest.mark.parametrize("size", [None, 16])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_folder_with_a_file_that_is_no_image(tmp_path, name, size):
    for i in range(3):
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / f"a{i}.png")
    (tmp_path / "b.png").write_bytes(images()[name])
    load = lambda **options: data.load(str(tmp_path), image_size=size, channels=3 if size else None, **options)  # noqa: E731
    refused(load, "b.png")
    if size:
        # Found when its turn comes, in the middle of a run: main knows this error.
        lazy = load(in_memory=False)
        with pytest.raises(data.Unreadable, match="b.png"):
            lazy.train[:], lazy.test[:]


def test_folder_with_links_and_pipes(tmp_path):
    import os

    for i in range(3):
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / f"a{i}.png")
    (tmp_path / "folder.png").mkdir()
    assert len(data.load(str(tmp_path)).train) == 2
    os.mkfifo(tmp_path / "pipe.png")
    refused(lambda: data.load(str(tmp_path)), "pipe.png", "remove it")
    (tmp_path / "pipe.png").unlink()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    refused(lambda: data.load(str(tmp_path)), "loop.png", "remove it")
    (tmp_path / "loop.png").unlink()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    refused(lambda: data.load(str(tmp_path)), "zero.png", "remove it")


def test_stored_data_set_that_names_modules(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path / "harmless" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps({"pythonClassName": "evil_module.Feature"}))
    (folder / "dataset_info.json").write_text("{}")
    refused(lambda: data.load("harmless", data_dir=str(tmp_path)), "features.json", "evil_module.Feature", "remove")


@pytest.mark.parametrize("content", [
    "", "hello", "[]", "3", "null", "\x00\xff", "[" * 100_000, '{"a":' * 100_000, '{"seed": NaN}', '{"optim": {"lr": Infinity}}', '{"optim": 3}',
    '{"optim": []}', '{"sde": 3}', '{"model": {"name": 3}}', '{"model": {"name": ["unet"]}}', '{"seed": {"a": 1}}', '{"unknown": 1}', '{"": {}}',
    '{"data": {"nmae": "x"}}', '{"optim": {"lr": "fast"}}', '{"optim": {"lr": null}}', '{"model": {"multipliers": 3}}', '{"train": {"batch_size": 1e400}}',
    '{"seed": ' + "9" * 5000 + "}", '{"model": {"multipliers": [[1]]}}', '{"sample": {"sampler": {}}}', '{"__class__": 1}', '{"eval": {"ode": 1}}',
    '{"sample": {"method": "/etc/passwd"}}', '{"sample": {"method": "/nonexistent.json"}}', '{"sample": {"method": "a\\u0000.json"}}',
    " " * 2**21 + "{}",
], ids=lambda c: c[:30])  # fmt: skip
def test_config_that_is_none(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)

    def start():
        config = configs.load(path)
        configs.validate(config)
        data.load(**configs.data_options(config))

    if content == '{"optim": {"lr": null}}':
        return start()  # None stands for the default
    refused(start)


@pytest.mark.parametrize(
    "name", ["/nonexistent/a.npz", "~nobody_here/x", "/dev/zero", "x" * 300 + "/y", "./" + "x" * 300, "../" * 30 + "nowhere", "*", "%s"]
)
def test_data_that_is_elsewhere(name):
    refused(lambda: data.load(name), name[:20], kind=(ValueError, FileNotFoundError))


SDE = sd.VP()


def solver(path):
    times = sd.time_grid(SDE, 4)
    table = METHODS["unipc_3"](Steps.of(SDE, times))
    return json.loads(sd.LearnedSolver(table, times, _process(SDE), json.dumps({"sde": repr(SDE)})).save(path).read_text())


SOLVERS = {
    "nan": lambda s: {**s, "state": [float("nan")] * 4}, "infinite": lambda s: {**s, "times": [1e400, *s["times"][1:]]},
    "beyond float32": lambda s: {**s, "x0": [1e300] * 4}, "missing": lambda s: {k: v for k, v in s.items() if k != "eps"},
    "more": lambda s: {**s, "stages": [1] * 4}, "short": lambda s: {**s, "x0": s["x0"][:-1]}, "scalar": lambda s: {**s, "times": 1.0},
    "wide": lambda s: {**s, "history": [[0.0] * 50] * 4}, "ragged": lambda s: {**s, "history": [[0.0], [0.0, 1.0], [], []]},
    "words": lambda s: {**s, "x0": ["a"] * 4}, "null": lambda s: {**s, "process": None}, "process": lambda s: {**s, "process": [[1.0]]},
    "facts": lambda s: {**s, "facts": []}, "no sde": lambda s: {**s, "facts": {"nfe": 3}}, "rising": lambda s: {**s, "times": s["times"][::-1]},
    "empty": lambda s: {k: [] for k in s}, "an object": lambda s: {**s, "x0": {"a": 1}}, "list": lambda s: [s], "huge integer": lambda s: {**s, "x0": [10**400] * 4},
}  # fmt: skip


def of_sampling(method):
    return experiment(sample=dict(method=str(method)))


@pytest.mark.parametrize("name", SOLVERS)
def test_solver_that_is_none(tmp_path, name):
    path = tmp_path / "solver.json"
    good = solver(path)
    configs.validate(of_sampling(path))
    path.write_text(json.dumps(SOLVERS[name](good)))
    refused(lambda: configs.validate(of_sampling(path)), "solver.json", "save it again")


def test_solver_files_that_are_large_or_deep_or_no_json(tmp_path, evil):
    path = tmp_path / "solver.json"
    good = solver(path)
    for content in (b"", b"\xff\xfe", b"[" * 100_000, pickle.dumps(evil), b" " * (2**25 + 1), b"1" * 5000):
        path.write_bytes(content)
        refused(lambda: configs.validate(of_sampling(path)), "solver.json", "save it again")
    path.write_text(json.dumps({**good, "times": [2 * t for t in good["times"]]}))
    refused(lambda: configs.validate(of_sampling(path)), "sample.method", "t_max")
    refused(lambda: configs.validate(of_sampling(tmp_path)), str(tmp_path))
    refused(lambda: configs.validate(of_sampling(tmp_path / "none.json")), "none.json", "No such file")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two checkpoints of an untrained network, and what a restore asks for."""
    config = experiment(data=dict(name="gaussian_mixture_2d"), model=dict(name="mlp", width=8, depth=1))
    dataset = data.load("gaussian_mixture_2d")
    state, path = jax.jit(lambda: train.init_state(config, (2,)))(), tmp_path_factory.mktemp("run")
    with Checkpoints(path) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state._replace(step=jnp.int32(step)))
    return path, train.prepare(config, dataset)[2], state._replace(step=jnp.int32(4))


def every_file(pattern, content):
    def damage(step):
        for file in step.rglob(pattern):
            if file.is_file():
                file.write_bytes(content)

    return damage


def replace(step, other):
    shutil.rmtree(step)
    other(step)


def saved(change):
    """The newest checkpoint written anew from a changed state."""

    def damage(step, state):
        shutil.rmtree(step)
        with Checkpoints(step.parent.parent) as checkpoints:
            checkpoints.save(4, change(state))

    return damage


CHECKPOINTS = {
    "empty folder": lambda p, s: replace(p, Path.mkdir), "garbage": lambda p, s: every_file("*", b"\x80\x04garbage")(p),
    "nothing in the files": lambda p, s: every_file("*", b"")(p), "no arrays": lambda p, s: [f.unlink() for f in p.rglob("d/*") if f.is_file()],
    "a folder of the system": lambda p, s: replace(p, lambda q: q.symlink_to("/etc")), "deep metadata": lambda p, s: every_file("_METADATA", b"[" * 100_000)(p),
    "no metadata": lambda p, s: [f.unlink() for f in p.rglob("_METADATA")],
    "other shapes": saved(lambda s: jax.tree.map(lambda a: jnp.zeros((*a.shape, 2), a.dtype), s)), "integers": saved(lambda s: jax.tree.map(jnp.int32, s)),
    "half precision": saved(lambda s: s._replace(ema=jax.tree.map(jnp.float16, s.ema))), "another step": saved(lambda s: s._replace(step=jnp.int32(9))),
    "other names": saved(lambda s: s._replace(params={"a": jnp.zeros(3)})),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_that_is_damaged_is_passed_over(run, tmp_path, capfd, evil, name):
    path, like, state = run
    shutil.copytree(path, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_4"
    (newest / CHECKSUMS).unlink()  # they would tell of most of these before Orbax reads anything
    CHECKPOINTS[name](newest, state)
    if newest.is_dir() and not newest.is_symlink():
        (newest / "state.pkl").write_bytes(pickle.dumps(evil))
    capfd.readouterr()
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        step, restored = checkpoints.restore(like)
    assert step == 2 and int(restored.step) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and said.count("the checkpoint of step 4 cannot be read") == 1
    # A run that goes on moves it away, whole.
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.restore(like)[0] == 2
    assert (tmp_path / "run" / "unreadable_step_4").exists() and not newest.exists()


def test_things_among_the_checkpoints_that_are_none(run, tmp_path):
    path, like, _ = run
    shutil.copytree(path, tmp_path / "run")
    there = tmp_path / "run" / "checkpoints"
    (there / "step_9").write_bytes(b"\x80\x04garbage")
    (there / "step_abc").mkdir()
    (there / "step_-4").mkdir()
    (there / "step_77").symlink_to(there / "step_77")
    (there / "step_78").symlink_to("/nonexistent")
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 4 and checkpoints.restore(like)[0] == 4
    every_file("_CHECKPOINT_METADATA", b"[" * 100_000)(there / "step_4")
    refused(lambda: Checkpoints(tmp_path / "run", read_only=True), str(there), kind=OSError)
    shutil.rmtree(there)
    there.write_text("")
    refused(lambda: Checkpoints(tmp_path / "run"), str(there), "--workdir", kind=OSError)


def test_partial_evaluation_that_is_none_begins_again(tmp_path, capfd, evil):
    path, one = tmp_path / "eval_1_bound.partial.npz", jax.ShapeDtypeStruct((3,), jnp.float32)
    good = np.ones((5, 3), np.float32)
    np.savez(path, values=good)
    np.testing.assert_array_equal(evaluate._read_partial(path, one, 8)[0], good)
    assert evaluate._read_partial(tmp_path / "none.npz", one, 8) == []
    whole = path.read_bytes()
    wrong = (
        good[:, :2],
        good.astype(int),
        np.ones((9, 3), np.float32),
        np.float32(1),
        np.array([evil], object),
        np.array(["a"] * 5),
        good[:0],
    )
    contents = [b"", b"hello", whole[:-40], whole[:100], pickle.dumps(evil)]
    for array in wrong:
        file = io.BytesIO()
        np.savez(file, values=array)
        contents.append(file.getvalue())
    file = io.BytesIO()
    np.savez(file, other=good)
    contents.append(file.getvalue())
    for content in contents:
        path.write_bytes(content)
        capfd.readouterr()
        assert evaluate._read_partial(path, one, 8) == []
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and path.name in said and "begins again" in said
    npz(path, header((10**13, 3), "<f4") + b"\0" * 100, "values.npy")
    assert evaluate._read_partial(path, one, 8) == []


def test_metrics_that_are_none_are_put_aside(tmp_path, capsys, evil):
    good = [b'{"step": 1, "loss": 2.0}\n', b'{"step": 2, "loss": 1.0}\n']
    bad = [b"hello\n", b"\x00\x00\x00\n", b"\xff\xfe\n", b"[]\n", b"3\n", b'{"loss": 1.0}\n', b'{"step": "x"}\n', b"\n", b"[" * 100_000 + b"\n",
           pickle.dumps(evil).replace(b"\n", b"") + b"\n"]  # fmt: skip
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"".join([good[0], *bad, good[1], b'{"step": 3, "loss": 0.5}\n', b'{"step": 9']))
    with report.Metrics(tmp_path, resume_step=2):
        pass
    assert file.read_bytes() == b"".join(good)
    assert (tmp_path / "unreadable_metrics.txt").read_bytes() == b"".join(bad)
    assert re.search(r"metrics.jsonl: 10 line\(s\).*unreadable_metrics.txt", capsys.readouterr().err)


def test_only_a_config_file_is_code():
    """What could run code from a file: nothing but the config file that --config names."""
    uses = re.compile(r"\b(?:pickle|marshal|shelve|dill|runpy|yaml|importlib)\.|(?<![\w.])(?:exec|eval|compile|__import__)\(")
    found = {
        (path.name, use[0]) for path in (ROOT / "sde_diffusion").rglob("*.py") for line in path.read_text().splitlines()
        for use in uses.finditer(line)
    }  # fmt: skip
    assert found == {("main.py", "runpy.")}
    assert all("allow_pickle=True" not in path.read_text() for path in (ROOT / "sde_diffusion").rglob("*.py"))


@pytest.mark.parametrize("code, words", [
    ("x = undefined", ["line 1", "undefined"]), ("def get_config(): return 1 / 0", ["line 1", "division"]), ("def get_config(): return {}", ["returned a dict"]),
    ("def get_config(:", ["invalid syntax"]), ("import nothere", ["nothere"]), ("1", ["get_config"]), ("def get_config(): raise KeyError('q')", ["'q'"]),
    ("def get_config(a): return a", ["get_config"]),
    ("from sde_diffusion.config import experiment\ndef get_config(): return experiment(optim=dict(rate=1))", ["line 2", "optim.rate"]),
], ids=lambda v: v[:25] if isinstance(v, str) else "")  # fmt: skip
def test_config_file_that_gives_no_config(tmp_path, capsys, code, words):
    (tmp_path / "c.py").write_text(code)
    for more in ([], ["--config.seed=1"]):
        with pytest.raises(SystemExit) as stop:
            main.parse(["main", f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'new'}", *more], flags.FlagValues())
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
        assert all(word in said for word in ["c.py", "does not give a config", *words])
