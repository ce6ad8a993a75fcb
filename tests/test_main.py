"""The entry point as a user meets it: a process, a workdir, and what is printed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from quick import QUICK

import sde_diffusion as sd
from experiments import networks
from sde_diffusion import config as configs
from sde_diffusion import data, main, train
from sde_diffusion.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
TINY = [
    f"--config={ROOT / 'configs' / 'vp_digits.py'}",
    "--config.model.channels=8", "--config.model.multipliers=(1,)", "--config.train.batch_size=16",
    "--config.train.num_steps=6", "--config.train.log_every=2", "--config.train.checkpoint_every=2",
    "--config.train.sample_every=3", "--config.sample.num=8", "--config.sample.batch_size=8",
    "--config.sample.num_steps=2", "--config.eval.num_examples=8", "--config.eval.batch_size=8",
    "--config.eval.rtol=0.1", "--config.eval.atol=0.1", "--config.eval.gaussian_mixture=False",
    # The bound compiles in half the time of the ODE likelihood.
    "--config.eval.ode=False", "--config.eval.bound_draws=2",
]  # fmt: skip


def environment():
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**env, "XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}


def run(*arguments, cwd=ROOT):
    command = [sys.executable, "-m", "sde_diffusion.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=cwd, timeout=600)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    done = run(f"--workdir={path}", *TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out bits/dim" in done.stdout and "floor" in done.stdout
    return path


def contents(path):
    return {p.relative_to(path): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_run_leaves_config_checkpoints_metrics_and_pictures(workdir):
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["channels"] == 8 and config["optim"]["lr"] == 1e-3
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [2, 3, 4, 6] or [r["step"] for r in rows] == [2, 4, 6]
    assert all(np.isfinite(r["loss"]) for r in rows)
    assert any((workdir / "tensorboard").iterdir())
    assert (workdir / "samples" / "train_00000003.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((workdir / "eval_00000006.json").read_text())
    bound = figures["bound"]
    assert bound["num"] == 8 and np.isfinite(bound["bits_per_dim"]) and bound["stderr"] > 0
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 6


def test_sample_and_eval_find_the_config_in_the_workdir(workdir):
    done = run(f"--workdir={workdir}", "--mode=sample", "--config.sample.num=5", "--config.sample.seed=3",
               "--config.sample.sampler=pc", "--config.model.multipliers=(1,)")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    file = workdir / "samples" / "step6_pc_reverse_diffusion_2_steps_langevin_snr_0.16_x1_seed3_5.npz"
    samples = np.load(file)["samples"]
    assert samples.shape == (5, 8, 8, 1) and samples.dtype == np.uint8
    assert file.with_suffix(".png").exists()
    before = (workdir / "eval_00000006.json").read_text()
    done = run(f"--workdir={workdir}", "--mode=eval")
    assert done.returncode == 0, done.stderr[-3000:]
    # The same checkpoint, data and seeds: the same figures to the last digit.
    assert json.loads((workdir / "eval_00000006.json").read_text()) == json.loads(before)


def test_a_run_is_opened_where_its_data_are_not(workdir, tmp_path, monkeypatch):
    there = sd.load_run(workdir)
    shutil.copytree(workdir, tmp_path / "run")

    def missing(*_, **__):
        raise FileNotFoundError("the data")

    monkeypatch.setattr(data, "load", missing)
    here = sd.load_run(tmp_path / "run")
    assert here.event_shape == (8, 8, 1) and here.step == 6
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([0.1, 0.9])
    np.testing.assert_array_equal(here.score_fn(x, t), there.score_fn(x, t))
    levels = np.arange(17, dtype=np.uint8)
    np.testing.assert_array_equal(here.scaler.to_uint8(here.scaler.encode(levels)), there.scaler.to_uint8(there.scaler.encode(levels)))
    for damaged in ("{}", "[]", '{"shape": null, "levels": 17}', '{"shape": [8, 8, 1], "levels": null}', '{"shape": [8, 8, 1], "levels": "17"}',
                    '{"shape": [2], "levels": 256}', '{"shape": "881", "levels": 17}', '{"shape": [8, 8, 1], "levels": 1}'):  # fmt: skip
        (tmp_path / "run" / "data.json").write_text(damaged)
        with pytest.raises(ValueError, match="data.json is not what this program wrote.*copy it again"):
            sd.load_run(tmp_path / "run")
    (tmp_path / "run" / "data.json").unlink()  # as of runs of before: the data tell
    with pytest.raises(FileNotFoundError, match="the data"):
        sd.load_run(tmp_path / "run")


@pytest.mark.slow
def test_a_conditional_run_draws_the_classes_it_is_asked_for(tmp_path, workdir):
    """Eight Gaussians in the plane, of which a label tells one: of 128 samples more than three quarters are nearest to it; by chance, an eighth."""
    done = run(
        "--config=configs/gaussian_mixture_2d.py", f"--workdir={tmp_path}", "--config.model.num_classes=8", "--config.train.num_steps=400",
        "--config.optim.ema_decay=0.98", "--config.eval.ode=False", "--config.eval.bound_draws=1", "--config.eval.num_examples=8",
        "--config.sample.num=8", "--config.eval.batch_size=8", "--config.sample.batch_size=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    labels = np.tile(np.arange(8), 16)
    there = sd.load_run(tmp_path, labels)
    x = np.asarray(sd.sample_ode(there.score_fn, there.sde, jax.random.key(0), (128, 2), num_steps=12))
    examples = data.load("gaussian_mixture_2d")
    points, classes = there.scaler.encode(np.asarray(examples.train[:])), np.asarray(examples.train_labels[:])
    means = np.stack([points[classes == k].mean(axis=0) for k in range(8)])
    nearest = ((x[:, None] - means[None]) ** 2).sum(axis=-1).argmin(axis=1)
    assert (nearest == labels).mean() > 0.75
    for wrong in ([8], [-1], [0.5], [[1]], 3):
        with pytest.raises(ValueError, match=r"must be integers from 0 to 7, one for each example"):
            sd.load_run(tmp_path, wrong)
    with pytest.raises(ValueError, match="the run has no classes: model.num_classes is None"):
        sd.load_run(workdir, [1])


@pytest.fixture
def without_data(workdir, tmp_path):
    """The workdir, copied to where its data are not."""
    there = shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((there / "config.json").read_text())
    config["data"]["name"] = str(tmp_path / "elsewhere.npz")
    (there / "config.json").write_text(json.dumps(config))
    return there


def test_a_run_is_sampled_where_its_data_are_not(workdir, without_data):
    drawn = []
    for place in (workdir, without_data):
        done = run(f"--workdir={place}", "--mode=sample", "--config.sample.num=3", "--config.sample.seed=5")
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = (place / "samples").glob("*seed5_3.npz")
        drawn.append(np.load(file)["samples"])
    np.testing.assert_array_equal(*drawn)
    done = run(f"--workdir={without_data}", "--mode=eval")
    assert done.returncode == 2 and "elsewhere.npz" in done.stderr
    # Nor does a conditional network need their labels.
    config = configs.load(workdir / "config.json")
    with config.unlocked():
        config.model.num_classes = 10
    train.prepare(config, data.without_examples(data.read_facts(workdir / "data.json")))


@pytest.mark.slow
def test_a_solver_is_fitted_to_a_run_where_its_data_are_not_and_samples_from_it(without_data):
    workdir = without_data
    few = ["--config.sample.num_steps=3", "--config.sample.fit_states=40", "--config.sample.fit_seconds=1e-3"]
    done = run(f"--workdir={workdir}", "--mode=fit_solver", *few)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 8 held-out states" in done.stdout  # a quarter, in whole batches of 8
    assert "updates: 1, ended by the time limit: a larger sample.fit_seconds than 0.001 may pay" in done.stdout
    solver = workdir / "solver_3.json"
    assert f"--mode=sample --config.sample.method={solver}" in done.stdout
    done = run(f"--workdir={workdir}", "--mode=sample", "--config.sample.num=4", f"--config.sample.method={solver}")
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (workdir / "samples").glob("*solver_3*.npz")
    assert np.load(file)["samples"].shape == (4, 8, 8, 1)
    assert f"{solver} has 3 evaluations of its own: sample.num_steps=2 is for other methods" in done.stdout
    for wrong in ("grid=edm", "t_end=0.01"):
        done = run(f"--workdir={workdir}", "--mode=sample", f"--config.sample.method={solver}", f"--config.sample.{wrong}")
        assert done.returncode == 2 and "is a fitted solver with its own times" in done.stderr, done.stderr[-3000:]


@pytest.mark.slow
def test_solvers_beside_each_other_on_a_run(workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(networks, "OWN", ("dpmpp_2m", "unipc_3"))  # each compiles for each number of evaluations
    trained = networks.load_run(workdir)
    # Fitted to another score, which compiles faster.
    score_fn = sd.as_score(lambda x, t: jnp.tanh(x + 1), trained.sde, prediction="x0")
    options = dict(nfe=3, num_states=16, fine_steps=10, max_updates=1, progress=False)
    solver = sd.fit_solver(score_fn, trained.sde, jax.random.key(0), (8, *trained.event_shape), **options)
    shutil.copytree(workdir, tmp_path / "run")
    solver.save(tmp_path / "run" / "solver_3.json")
    networks.main([f"--workdir={tmp_path / 'run'}", "--num=8", "--reference=100", "--budgets=3,24", f"--out={tmp_path}"])
    table = json.loads((tmp_path / "networks.json").read_text())["table"]
    assert table["24"]["adams"]["rmse"] < 0.2 * table["3"]["adams"]["rmse"]
    theirs = min(row["rmse"] for name, row in table["3"].items() if name not in ("adams", "fitted"))
    for kind in ("adams", "fitted"):
        assert table["3"][kind]["ratio"] == pytest.approx(table["3"][kind]["rmse"] / theirs)
    assert table["3"]["fitted"]["rmse"] != table["3"]["adams"]["rmse"] and "fitted" not in table["24"]
    assert "geometric mean" in capsys.readouterr().out


BAD = [
    (["--config.optim.learning_rate=1"], ["learning_rate"]),
    (["--config.model.name=unets"], ["unets", "mlp", "unet"]),
    (["--config.sde.name=vpp"], ["vpp", "subvp"]),
    (["--config.sample.method=heunn"], ["heunn", "ddim"]),
    (["--config.data.name=cifar1O"], ["cifar1O"]),
    (["--config.sample.num_steps=0"], ["num_steps=0", "at least 1"]),
    (["--mode=fit_solver", "--config.sample.num_steps=100"], ["num_steps=100", "2 to 99"]),
    (["--config.optim.lr=0.5"], ["another config", "optim.lr: 0.001 -> 0.5"]),
    (["--config.optim.lr=fast"], ["fast"]),
    (["--config.optim.warmup_steps=many"], ["--config.optim.warmup_steps=many", "int"]),
    (["--config.model.channels=0"], ["model.channels=0", "at least 1"]),
    (["--config.seed=-1"], ["seed=-1", "from 0"]),
    (["--mode=trian"], ["trian", "train"]),
    (["--config=nowhere.py"], ["nowhere.py", "vp_digits", "ve_cifar"]),
    (["--config=gaussian_mixture_2d", "--config.model.attention=1"], ["model.attention", "width"]),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=lambda v: v[0] if isinstance(v, list) else "")
def test_a_wrong_flag_is_one_line_and_touches_nothing(workdir, arguments, words, capsys):
    before = contents(workdir)
    if arguments in (BAD[0][0], BAD[-1][0]):  # as a user starts it
        done = run(f"--workdir={workdir}", *arguments)
        status, printed = done.returncode, done.stderr
    else:  # in this process, which needs no start of its own
        with pytest.raises(SystemExit) as end:
            values = flags.FlagValues()
            main.parse(["main", f"--workdir={workdir}", *arguments], values)
            main.start(values)
        status, printed = end.value.code, capsys.readouterr().err
    assert status == 2
    lines = [line for line in printed.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in printed
    for word in words:
        assert word in lines[0]
    assert contents(workdir) == before


def test_a_file_for_a_workdir_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        done = run(f"--workdir={path}", *TINY)
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'file'} is a file")
    assert (tmp_path / "file").read_text() == ""


def test_missing_workdir_and_missing_checkpoint_are_named(tmp_path):
    done = run()
    assert done.returncode == 2 and "--workdir is missing" in done.stderr
    done = run(f"--workdir={tmp_path / 'new'}", "--mode=sample")
    assert done.returncode == 2 and "no checkpoint" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(workdir, tmp_path):
    command = [sys.executable, "-m", "sde_diffusion.main", f"--workdir={tmp_path}", *TINY]
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.time() + 300
        while not list((tmp_path / "checkpoints").glob("step_*[0-9]")) and time.time() < deadline:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run(f"--workdir={tmp_path}", *TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    start = int(re.search(r"steps (\d+) to 6|already trained to step (6)", done.stdout).group(1) or 6)
    assert 2 <= start <= 6
    config = configs.load(tmp_path / "config.json")
    _, _, abstract = train.prepare(config, data.load("digits"))
    states = []
    for path in (workdir, tmp_path):
        with Checkpoints(path, read_only=True) as checkpoints:
            states.append(checkpoints.restore(abstract, 6)[1])
    for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_importing_the_library_is_light():
    """No flags, no devices, none of the heavy packages: it must be quick in a notebook."""
    code = (
        "import sys, sde_diffusion, jax; from jax._src import xla_bridge; "
        "heavy = {'tensorflow', 'tensorflow_datasets', 'orbax', 'absl', 'flax', 'grain', 'diffrax'} & set(sys.modules); "
        "print(sorted(heavy), xla_bridge.backends_are_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=120)
    assert done.stdout.strip() == "[] False", done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name, extra", [("vp_mnist", ["--config.model.attention=(14,)"]), ("vp_cifar", ["--config.model.attention=()"])])
def test_the_real_data_train(name, extra, tmp_path):
    if not os.environ.get("TFDS_DATA_DIR"):
        pytest.skip("TFDS_DATA_DIR is not set: no prepared MNIST and CIFAR-10")
    done = run(
        f"--workdir={tmp_path}", f"--config={ROOT / 'configs' / (name + '.py')}", *TINY[1:], "--config.model.num_blocks=1",
        "--config.model.multipliers=(1,1)",
        "--config.train.num_steps=60", "--config.train.log_every=10", "--config.optim.warmup_steps=5", "--config.optim.lr=2e-3",
        "--config.train.sample_every=60", "--config.train.checkpoint_every=60",
        *extra,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]
    assert list((tmp_path / "samples").glob("step60_*.png"))
