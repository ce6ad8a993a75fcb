"""Whether a run is the same on any number of devices and processes, and survives being killed.

    python -m experiments.scaling [--parts=devices,collectives,processes,soak] [--kills=25] [--out=FOLDER]

On 8 virtual CPU devices, a U-Net with dropout on the digits, 20 steps of training:
devices: losses, gradients, parameters, samples and bits/dim on 2, 4 and 8 devices, data-parallel, fully sharded, with the batch in two
parts, and by jax.pmap, as their largest difference from one device, relative to the largest entry; and each device's share of the state.
collectives: what the compiled step sends between devices, read from its HLO, by kind, number and bytes.
processes: the command line with 1 process of 8 devices, 2 of 4, and 2 of 4 fully sharded; checkpoints of each are read by the others.
soak: one run, killed at random moments, kill -9 and SIGTERM in turn, until it ends; its parameters against those of an undisturbed run.
Prints tables and writes scaling.json to --out; ends with status 1 where a bar is missed.
"""

import argparse
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# It is the numbers that matter here: compiling with LLVM's optimiser would take most of the time.
FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count="
os.environ["XLA_FLAGS"] = f"{FLAGS}8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from sde_diffusion import config as configs
from sde_diffusion import data, evaluate, sharding, train
from sde_diffusion.checkpoint import Checkpoints
from sde_diffusion.config import experiment

STEPS, BATCH = 20, 32
ROUNDING = 1e-5  # of float32 sums in another order, through 20 steps of Adam
COLUMNS = ("loss", "gradient", "parameters", "samples", "bits/dim")


def small(**options):
    return experiment(
        model=dict(name="unet", channels=16, multipliers=(1,), num_blocks=1, dropout=0.1),
        optim=dict(lr=1e-3, warmup_steps=5),
        train=dict(batch_size=BATCH, num_steps=STEPS, **options),
        sample=dict(num=16, batch_size=16, num_steps=5),
        eval=dict(batch_size=16, num_examples=16, ode=False, bound_draws=2),
    )


class OnDevices:
    """The update step of a config on a mesh of the first `count` devices."""

    def __init__(self, config, count):
        self.config, self.digits = config, data.load("digits")
        self.scaler = data.Scaler(self.digits.num_levels)
        self.mesh = sharding.make_mesh(jax.devices()[:count], config.train.param_shards)
        init = lambda: train.init_state(config, self.digits.event_shape)  # noqa: E731
        layout = sharding.layout(self.mesh, jax.eval_shape(init))
        whole, split = sharding.replicated(self.mesh), sharding.by_batch(self.mesh)
        self.state = jax.jit(init, out_shardings=layout)()
        self.totals = jax.device_put(train.zero_totals(), whole)
        distribute = sharding.fully_sharded(self.mesh)
        self.update = jax.jit(
            train.make_update(config, self.scaler, distribute),
            in_shardings=(layout, whole, split), out_shardings=(layout, whole), donate_argnums=(0, 1),
        )  # fmt: skip
        self.gradients = jax.jit(
            train.make_gradients(config, self.scaler, distribute), in_shardings=(layout.params, None, whole, split, None, split)
        )

    def batch(self, step):
        return sharding.put_batch(self.mesh, data.batches(self.digits, BATCH, 0)[step])

    def results(self):
        x0 = self.scaler.encode(self.batch(0)["x"])
        keys = jax.random.split(jax.random.key(2), BATCH)
        losses, _, gradient = self.gradients(self.state.params, (), jax.random.key(1), x0, None, keys)
        out = {"loss": losses, "gradient": gradient}
        for step in range(STEPS):
            self.state, self.totals = self.update(self.state, self.totals, self.batch(step))
        return jax.device_get({**out, **self.after(self.state)})

    def after(self, state):
        samples = evaluate.make_sampler(self.config, self.mesh, self.digits.event_shape)(state.ema, 16, 0)
        bits = evaluate.bound_bits_per_dim(self.config, state.ema, self.mesh, self.scaler, self.digits.test[:16])
        return {"parameters": state.params, "samples": samples, "bits/dim": bits["bits_per_dim"]}

    def share(self):
        """The part of the state that the first device holds."""
        leaves = jax.tree.leaves(self.state)
        return sum(a.addressable_shards[0].data.nbytes for a in leaves) / sum(a.nbytes for a in leaves)

    def compiled(self):
        return self.update.lower(self.state, self.totals, self.batch(0)).compile()


def by_pmap(one: OnDevices):
    """20 steps by jax.pmap on 8 devices."""
    update = jax.pmap(train.make_update(one.config, one.scaler, sharding.over_axis("devices")), axis_name="devices", in_axes=(0, 0, None))
    copies = lambda tree: jax.tree.map(lambda a: jnp.broadcast_to(a, (8, *a.shape)), tree)  # noqa: E731
    state = copies(train.init_state(one.config, one.digits.event_shape))
    totals = copies(train.zero_totals())
    for step in range(STEPS):
        state, totals = update(state, totals, data.batches(one.digits, BATCH, 0)[step])
    return jax.device_get(one.after(jax.device_get(jax.tree.map(lambda a: a[0], state))))


def difference(a, b) -> float:
    """The largest difference of two trees of arrays, relative to the largest entry."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.subtract(x, y, dtype=np.float64)))) for x, y in pairs) / max(
        float(np.max(np.abs(x))) for x in jax.tree.leaves(a)
    )


def devices() -> tuple[dict, bool]:
    one = OnDevices(small(), 1)
    truth = one.results()
    rows = {}
    cases = [(f"{n} devices", dict(), n) for n in (2, 4, 8)]
    cases += [("8, fully sharded", dict(param_shards=8), 8), ("2 x 4 sharded", dict(param_shards=4), 8)]
    print(f"{'against 1 device':<20}{'loss':>10}{'gradient':>10}{'parameters':>12}{'samples':>10}{'bits/dim':>10}{'share':>8}")

    def show(name, values, share):
        cells = [f"{values[k]:.0e}" if k in values else "-" for k in COLUMNS]
        print(f"{name:<20}{cells[0]:>10}{cells[1]:>10}{cells[2]:>12}{cells[3]:>10}{cells[4]:>10}{share:>8}", flush=True)

    for name, options, count in cases:
        run = OnDevices(small(**options), count)
        rows[name] = {k: difference(truth[k], v) for k, v in run.results().items()}
        rows[name]["share of the state"] = run.share()
        show(name, rows[name], f"{run.share():.4f}")
    # In parts the noise is drawn anew for each: compared with the same parts on one device.
    parts = small(accumulate=2)
    truth_parts, many = OnDevices(parts, 1).results(), OnDevices(parts, 8).results()
    rows["8, in 2 parts"] = {k: difference(truth_parts[k], v) for k, v in many.items()}
    show("8, in 2 parts", rows["8, in 2 parts"], "")
    rows["jax.pmap"] = {k: difference(truth[k], v) for k, v in by_pmap(one).items()}
    show("jax.pmap", rows["jax.pmap"], "")
    good = all(v < ROUNDING for row in rows.values() for k, v in row.items() if k != "share of the state")
    return rows, good and abs(rows["8, fully sharded"]["share of the state"] * 8 - 1) < 0.1


def collectives() -> tuple[dict, bool]:
    rows = {}
    good = True
    print(f"{'the compiled step':<20}{'collective':<20}{'number':>8}{'bytes':>12}")
    for name, options in (("data-parallel", {}), ("fully sharded", dict(param_shards=8)), ("2 x 4 sharded", dict(param_shards=4))):
        run = OnDevices(small(**options), 8)
        compiled = run.compiled()
        size = sum(a.nbytes for a in jax.tree.leaves(run.state.params))
        rows[name] = {kind: {"number": n, "bytes": b} for kind, (n, b) in sharding.collectives(compiled).items()}
        rows[name]["parameters"] = {"bytes": size}
        for kind, row in rows[name].items():
            print(f"{name:<20}{kind:<20}{row.get('number', ''):>8}{row['bytes']:>12,}", flush=True)
        kinds = set(rows[name]) - {"parameters"}
        if name == "data-parallel":
            good &= kinds == {"all-reduce"} and rows[name]["all-reduce"]["bytes"] < 1.01 * size
        else:
            # What is left to reduce over "data" is a device's share of the gradient, and the metrics.
            good &= kinds == {"all-gather", "reduce-scatter", "all-reduce"} and rows[name]["all-reduce"]["bytes"] < 0.3 * size
    return rows, good


CONFIG = """
from sde_diffusion.config import experiment

def get_config():
    return experiment(
        model=dict(name="mlp", width=64, depth=2, dropout=0.1), optim=dict(lr=1e-3, warmup_steps=5),
        train=dict(batch_size=32, num_steps=40, log_every=20, sample_every=100000, checkpoint_every=20),
        sample=dict(num=16, batch_size=16, num_steps=3),
        eval=dict(batch_size=16, num_examples=24, ode=False, bound_draws=2),
    )
"""


def start(folder: Path, workdir: str, *flags, count=1, per=8) -> list[subprocess.Popen]:
    """The command line in `count` processes of `per` devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": f"{FLAGS}{per}"}
    started = []
    for number in range(count):
        if count > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number),
            }  # fmt: skip
        command = [sys.executable, "-m", "sde_diffusion.main", f"--config={folder / 'config.py'}", f"--workdir={folder / workdir}", *flags]
        with (folder / f"{workdir}_{number}.log").open("a") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return started


def finish(processes) -> None:
    for process in processes:
        if process.wait(timeout=600) != 0:
            log = next(Path(arg.partition("=")[2]) for arg in process.args if arg.startswith("--workdir="))
            said = "".join(p.read_text()[-2000:] for p in sorted(log.parent.glob(f"{log.name}_*.log")))
            raise SystemExit(f"{' '.join(process.args)} ended with status {process.returncode}: {said}")


def final(folder: Path, workdir: str):
    """The newest state of a workdir, and its figures."""
    config = configs.load(folder / workdir / "config.json")
    _, _, abstract = train.prepare(config, data.load("digits"), sharding.make_mesh())
    with Checkpoints(folder / workdir, read_only=True) as checkpoints:
        step, state = checkpoints.restore(abstract)
    figures = {
        "state": jax.device_get(state),
        "eval": json.loads((folder / workdir / f"eval_{step:08d}.json").read_text()),
        "samples": np.load(next((folder / workdir / "samples").glob(f"step{step}_*.npz")))["samples"].astype(float),
    }
    return figures


def processes(folder: Path) -> tuple[dict, bool]:
    (folder / "config.py").write_text(CONFIG)
    cases = {
        "1 process": ("one", {}, ()), "2 processes": ("two", {"count": 2, "per": 4}, ()),
        "2, fully sharded": ("sharded", {"count": 2, "per": 4}, ("--config.train.param_shards=8",)),
    }  # fmt: skip
    for workdir, options, flags in cases.values():
        finish(start(folder, workdir, *flags, **options))
    truth = final(folder, "one")
    rows = {}
    print(f"{'against 1 process':<32}{'state':>10}{'eval':>10}{'samples':>10}")

    def compare(name, workdir, truth):
        rows[name] = {k: difference(truth[k], v) for k, v in final(folder, workdir).items()}
        print(f"{name:<32}" + "".join(f"{v:>10.0e}" for v in rows[name].values()), flush=True)

    for name in ("2 processes", "2, fully sharded"):
        compare(name, cases[name][0], truth)
    # Ten steps more, each from another's kind of checkpoint.
    more = "--config.train.num_steps=50"
    finish(start(folder, "two", more, per=1))
    finish(start(folder, "sharded", more, "--config.train.param_shards=1", per=2))
    finish(start(folder, "one", more, "--config.train.param_shards=8", count=2, per=4))
    truth = final(folder, "one")
    compare("saved by 2, gone on with by 1", "two", truth)
    compare("saved sharded, gone on whole", "sharded", truth)
    return rows, all(v < 1e-3 for row in rows.values() for v in row.values())


def soak(folder: Path, kills: int) -> tuple[dict, bool]:
    (folder / "config.py").write_text(CONFIG.replace("checkpoint_every=20", "checkpoint_every=100"))
    length = "--config.train.num_steps=20000"
    finish(start(folder, "through", length, per=1))
    moments = random.Random(0)
    counts = {"kill -9": 0, "SIGTERM": 0, "before the first step": 0, "ended by itself": 0}
    steps = []
    while counts["kill -9"] + counts["SIGTERM"] < kills:
        (process,) = start(folder, "soak", length, per=1)
        number, name = (signal.SIGKILL, "kill -9") if moments.random() < 0.5 else (signal.SIGTERM, "SIGTERM")
        time.sleep(moments.uniform(0.5, 15.0))
        process.send_signal(number)
        status = process.wait()
        counts["ended by itself" if status == 0 else name] += 1
        if status not in (0, -9, 143, -15):
            raise SystemExit(f"status {status} after {name}: see {folder}/soak_0.log")
        with Checkpoints(folder / "soak", read_only=True) as checkpoints:
            steps.append(checkpoints.latest_step() or 0)
        counts["before the first step"] += len(steps) > 1 and steps[-1] == steps[-2]
        print(f"kill {sum(counts[k] for k in ('kill -9', 'SIGTERM')):>3} of {kills}: {name}, at step {steps[-1]:,}", flush=True)
    finish(start(folder, "soak", length, per=1))
    a, b = final(folder, "through"), final(folder, "soak")
    same = all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    print(f"{kills} kills ({counts['kill -9']} by kill -9, {counts['SIGTERM']} by SIGTERM), last checkpoint at step {steps[-1]:,} of 20,000; "
          f"state, figures and samples {'equal' if same else 'DIFFER from'} those of the undisturbed run bit for bit")  # fmt: skip
    return {**counts, "equal": same}, same


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default="devices,collectives,processes,soak")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parts = {
        "devices": lambda _: devices(), "collectives": lambda _: collectives(), "processes": processes,
        "soak": lambda folder: soak(folder, options.kills),
    }  # fmt: skip
    figures = {"jax": jax.__version__, "python": platform.python_version()}
    missed = []
    for part in options.parts.split(","):
        with tempfile.TemporaryDirectory() as folder:
            figures[part], good = parts[part](Path(folder))
        missed += [] if good else [part]
        print(f"{part}: {'as it should be' if good else 'NOT as it should be'}\n", flush=True)
        (options.out / "scaling.json").write_text(json.dumps(figures, indent=1) + "\n")
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
