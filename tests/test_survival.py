"""What a run survives: signals, damaged checkpoints, a second run, non-finite losses."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from sde_diffusion import data, train
from sde_diffusion.checkpoint import CHECKSUMS, Checkpoints
from sde_diffusion.config import experiment
from sde_diffusion.survival import Signals, Stopped, locked


def tiny(**options):
    return experiment(
        model=dict(name="mlp", width=16, depth=1),
        optim=dict(lr=1e-3, warmup_steps=5),
        train=dict(batch_size=16, num_steps=8, log_every=2, sample_every=100, checkpoint_every=4, **options),
        sample=dict(num=8, batch_size=8, num_steps=2),
    )


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def through(digits, tmp_path_factory):
    """An undisturbed run: its workdir and its final state."""
    path = tmp_path_factory.mktemp("through")
    return path, jax.device_get(train.train(tiny(), path, digits))


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_once_and_the_run_goes_on_bit_for_bit(number, through, digits, tmp_path, monkeypatch):
    log = train._log

    def and_stop(config, metrics, bar, step, *rest):
        if step == 2:
            os.kill(os.getpid(), number)
        return log(config, metrics, bar, step, *rest)

    with Signals() as signals, monkeypatch.context() as patch:
        patch.setattr(train, "_log", and_stop)
        with pytest.raises(Stopped, match=number.name) as stopped:
            train.train(tiny(), tmp_path, digits, signals)
    assert stopped.value.code == 128 + number
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 3  # the line of step 2 is written in step 3
    assert equal(train.train(tiny(), tmp_path, digits), through[1])
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 8


def test_signals_outside_the_loop_stop_at_once_and_handlers_return():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"), signals.waiting():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM
            with pytest.raises(Stopped, match="SIGINT"):  # the second does not wait
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_in_the_last_step_is_heard(through, digits, tmp_path, monkeypatch):
    log = train._log

    def and_stop(config, metrics, bar, step, *rest):
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return log(config, metrics, bar, step, *rest)

    monkeypatch.setattr(train, "_log", and_stop)
    with Signals() as signals, pytest.raises(Stopped):
        train.train(tiny(), tmp_path, digits, signals)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 8


DAMAGE = {
    "one bit": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "lost": lambda path: path.unlink(),
}


# A checkpoint without checksums is one that was not sealed yet.
@pytest.mark.parametrize(
    ("which", "damage"), [(w, d) for w in ("largest", CHECKSUMS, "_METADATA") for d in DAMAGE if (w, d) != (CHECKSUMS, "lost")]
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(which, damage, through, digits, tmp_path, capfd):
    workdir = tmp_path / "run"
    subprocess.run(["cp", "-r", str(through[0]), str(workdir)], check=True)
    newest = workdir / "checkpoints" / "step_8"
    files = [p for p in newest.rglob("*") if p.is_file()]
    victim = max(files, key=lambda p: p.stat().st_size) if which == "largest" else next(p for p in files if p.name == which)
    DAMAGE[damage](victim)
    _, _, abstract = train.prepare(tiny(), digits)
    with Checkpoints(workdir) as checkpoints:
        step, _ = checkpoints.restore(abstract)
    assert step == 4 and (workdir / "unreadable_step_8").is_dir() and not newest.exists()
    assert "the checkpoint of step 8 cannot be read (its" in capfd.readouterr().err
    if (which, damage) == ("largest", "one bit"):
        assert equal(train.train(tiny(), workdir, digits), through[1])
        with Checkpoints(workdir, read_only=True) as checkpoints:
            assert checkpoints.latest_step() == 8


def test_all_checkpoints_damaged_is_an_error_and_moves_nothing(through, digits, tmp_path):
    workdir = tmp_path / "run"
    subprocess.run(["cp", "-r", str(through[0]), str(workdir)], check=True)
    for step in (4, 8):
        (workdir / "checkpoints" / f"step_{step}" / "default" / "_METADATA").write_text("{}")
    _, _, abstract = train.prepare(tiny(), digits)
    for read_only in (True, False):
        with Checkpoints(workdir, read_only=read_only) as checkpoints:
            with pytest.raises(data.Unreadable, match="no checkpoint in .* can be read, of steps 8, 4; restore one"):
                checkpoints.restore(abstract)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["step_4", "step_8"]


def test_a_second_run_in_a_workdir_is_refused_until_the_first_ends(tmp_path):
    code = "import sys, pathlib\nfrom sde_diffusion.survival import locked\nwith locked(pathlib.Path(sys.argv[1])): print('in', flush=True); input()"
    first = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "in\n"
    with pytest.raises(BlockingIOError, match=f"another run writes to .*process {first.pid}"), locked(tmp_path):
        pass
    first.kill()
    first.wait()
    with locked(tmp_path):
        pass


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    state = {"a": np.ones(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        checkpoints._wait()
        monkeypatch.setattr(checkpoints.manager, "save", lambda *a, **k: (_ for _ in ()).throw(ValueError("RESOURCE_EXHAUSTED: x\ny")))
        with pytest.raises(OSError, match="checkpoint of step 2 could not be written to .*: no space is left; those before it are whole"):
            checkpoints.save(2, state)
        assert checkpoints.latest_step() == 1


def test_non_finite_losses_name_their_noise_level(digits, tmp_path, monkeypatch, capsys):
    """One example's loss is not finite at one level; the line names it, and the last good checkpoint stays."""
    sound = train.configs.build_loss

    def broken(config, values=None, times=None):
        def loss(score_fn, sde, key, x0):
            losses, t = sound(config, values, times)(score_fn, sde, key, x0)
            return jax.numpy.where(t == t.max(), np.nan, losses), t

        return loss

    train.train(tiny(), tmp_path, digits)
    monkeypatch.setattr(train.configs, "build_loss", broken)
    config = tiny(max_bad_steps=3)
    config.train.num_steps = 30
    with pytest.raises(FloatingPointError, match="not finite in .* updates in a row up to step 12"):
        train.train(config, tmp_path, digits)
    # The latest time is the lowest log-SNR.
    assert "step 10: 2 update(s) skipped for a non-finite loss or gradient (examples: 2 at log-SNR -10.0..-7.1)" in capsys.readouterr().err
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 8
