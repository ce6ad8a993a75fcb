"""What a training step and a sampler of the library cost on the devices of this machine, beside the same step in PyTorch.

    python -m experiments.accelerator [--config=configs/vp_cifar.py] [--config.KEY=VALUE ...] [--batch=512] [--dtype=bfloat16]
        [--shape=32,32,3] [--rounds=5] [--torch=compile|eager|off] [--out=runs/accelerator.json]

On a CPU, in a minute or two: --config.model.channels=16 --config.model.num_blocks=1 --batch=16. On a GPU (pip install -e '.[cuda]',
and torch, as far as the two agree on CUDA's libraries) or a TPU: no option is needed. All local devices are used, by the mesh of
`sde_diffusion.sharding`, in one process. Random levels of --shape stand in for the data, and lie on the device beforehand.

- FLOPs of one training step and of one network evaluation: XLA's cost analysis of the program before optimization, lowered for one
  CPU device. So they are of all devices together and do not depend on the machine: of a compiled GPU program XLA counts neither
  matrix products nor convolutions, which are calls of cuBLAS and cuDNN. Recomputation (model.remat) counts as work.
- Step time: the update of `sde_diffusion.train`, compiled, with its state donated; median over the rounds of the mean of 4 steps.
- Matmul peak: the best FLOP/s of 8 chained square products in the compute dtype on one device, of sizes from 512 that double as long
  as a second allows. MFU: FLOPs of the step / step time / (peak * devices).
- Sampler: `sample_ode` with its defaults and 20 network evaluations, of --batch images; median over the rounds.
- Compile times: tracing, lowering and compiling, without the compilation cache.
- Memory: the most that one device held in update and sampler; where the device does not tell (CPU), what the update's program asks.
- PyTorch (`experiments.torch_unet`): the same network from the same parameters, Adam, clipping, average, dropout; torch.compile,
  channels last, bfloat16 by autocast. Its steps are timed in turn with the library's, in the same rounds. On one device, CPU or
  CUDA, where torch is installed and has the network's options; else the reason is told. On a CPU with all of its threads or with one,
  whichever is the faster before compiling. A ratio taken on a CPU that other processes use says little; look at its range.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

import sde_diffusion as sd
from sde_diffusion import config as configs
from sde_diffusion import data, sharding, train

NFE = 20
STEPS = 4  # of one measurement


def _seconds(fn, repeats=1):
    """Seconds of one call; `fn` is called `repeats` times and its last result awaited."""
    start = time.perf_counter()
    for _ in range(repeats):
        out = fn()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats


def _compiled(fn, *args):
    """The compiled program of a jitted function, and the seconds that took."""
    start = time.perf_counter()
    compiled = fn.lower(*args).compile()
    return compiled, time.perf_counter() - start


def flops(fn, *args) -> float:
    """FLOPs of `fn` for arguments of these shapes, by XLA's cost analysis before optimization, for one CPU device."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return float(jax.jit(fn).lower(*shapes).cost_analysis()["flops"])


def matmul_peak(dtype, seconds: float = 1.0) -> tuple[float, int]:
    """The best FLOP/s of 8 chained products of square matrices on one device, and their size."""

    @jax.jit
    def chain(x, w):
        for _ in range(8):
            x = x @ w
        return x

    best, took, n = (0.0, 0), 0.0, 512
    while n == 512 or (8 * took < seconds and n <= 16384):
        x, w = jax.random.normal(jax.random.key(0), (2, n, n), dtype)
        w = w * jnp.asarray(n**-0.5, dtype)  # the products keep their scale
        jax.block_until_ready(chain(x, w))
        took = min(_seconds(lambda: chain(x, w)) for _ in range(3))
        best = max(best, (16 * n**3 / took, n))
        n *= 2
    return best


def _memory(compiled) -> tuple[int, str]:
    """The peak of bytes held on one device, and who says so."""
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices()]
    if any(peaks):
        return max(peaks), "device.memory_stats()"
    m = compiled.memory_analysis()
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return int(held), "memory_analysis() of the update"


def _torch_step(config, params, x, mode):
    """(the step of PyTorch as a function that returns when it is done, facts); the step is None where there is none."""
    platform_name, model = jax.devices()[0].platform, config.model
    if mode == "off":
        return None, {"skipped": "--torch=off"}
    if importlib.util.find_spec("torch") is None:
        return None, {"skipped": "torch is not installed"}
    if jax.device_count() > 1:
        return None, {"skipped": "only on one device; hide the others, as by CUDA_VISIBLE_DEVICES=0"}
    usual = dict(resampling="plain", progressive_input="none", embedding="sinusoidal", num_classes=None, remat=False, param_dtype="float32")
    other = [f"model.{k}={model.get(k)}" for k, v in usual.items() if model.get(k, v) != v]
    if model.name != "unet" or other or config.train.accumulate > 1:
        return None, {"skipped": f"torch_unet has no {', '.join(other) or 'such network or train.accumulate'}"}

    import torch

    from experiments import torch_unet

    if platform_name != "cpu" and not (platform_name == "gpu" and torch.cuda.is_available()):
        return None, {"skipped": f"torch {torch.__version__} does not see this {platform_name}"}
    device = torch.device("cpu" if platform_name == "cpu" else "cuda")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TensorFloat-32, as in JAX
    options = {k: v for k, v in configs._model_options(config).items() if k not in (*usual, "dtype")}
    net = torch_unet.UNet(x.shape[1:], **options)
    net.load_state_dict(torch_unet.from_flax(jax.device_get(params)))
    net.to(device, memory_format=torch.channels_last)
    images = torch.from_numpy(np.array(x)).to(device).permute(0, 3, 1, 2)
    facts = {
        "torch": torch.__version__, "cuda": torch.version.cuda if device.type == "cuda" else None, "parameters": sum(p.numel() for p in net.parameters()),
    }  # fmt: skip

    if device.type == "cpu":
        # OpenMP's threads wait for one another at every operation: where other processes use the cores, that is most of the step.
        trial = copy.deepcopy(net)
        step = torch_unet.make_step(trial, config.optim, flip=config.data.flip, bfloat16=config.model.dtype == "bfloat16", compiled=False)
        took = {}
        for threads in {torch.get_num_threads(), 1}:
            torch.set_num_threads(threads)
            step(images)
            took[threads] = min(_seconds(lambda: step(images)) for _ in range(3))
        facts["threads"] = min(took, key=took.get)
        torch.set_num_threads(facts["threads"])

    for compiled in (True, False) if mode == "compile" else (False,):
        step = torch_unet.make_step(
            net, config.optim, flip=config.data.flip, bfloat16=config.model.dtype == "bfloat16", compiled=compiled
        )  # fmt: skip

        def run(step=step):
            step(images)
            if device.type == "cuda":
                torch.cuda.synchronize()

        try:
            start = time.perf_counter()
            run()
            facts |= {"compiled": compiled, "first_step_s": time.perf_counter() - start}
            for _ in range(2):
                run()
            return run, facts
        except torch.OutOfMemoryError:
            return None, facts | {"skipped": "out of memory; lower --batch"}
        except Exception as error:  # torch.compile fails in many ways; eager PyTorch remains
            if not compiled:
                raise
            facts["not_compiled"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"


def measure(config, shape: tuple[int, ...], rounds: int = 5, torch_mode: str = "compile") -> dict:
    """All figures for a config, with random examples `(*shape)`: 8-bit levels if an image, else vectors. SI units."""
    configs.validate(config)
    batch_size, rng = config.train.batch_size, np.random.default_rng(0)
    image = len(shape) == 3
    x = rng.integers(0, 256, (batch_size, *shape)).astype(np.uint8) if image else rng.normal(size=(batch_size, *shape)).astype(np.float32)
    labels = rng.integers(0, config.model.get("num_classes") or 1, batch_size).astype(np.int32)
    mesh, scaler, abstract = train.prepare(config, data.Dataset("random", x, x, labels, labels, 256 if image else None))
    layout = jax.tree.map(lambda a: a.sharding, abstract)
    whole, split = sharding.replicated(mesh), sharding.by_batch(mesh)
    state = jax.jit(lambda: train.init_state(config, shape), out_shardings=layout)()
    totals = jax.device_put(train.zero_totals(), whole)
    host_batch = {"x": x, "label": labels}
    batch = sharding.put_batch(mesh, host_batch)

    # XLA counts the body of a loop once, so the FLOPs are those of the batch in one part.
    in_one = config.copy_and_resolve_references()
    in_one.train.accumulate = 1
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), state.params)
    evaluate = lambda params, x, c: configs.build_score(config, params).network(x, c)  # noqa: E731
    device = jax.devices()[0]
    figures = {
        "device": device.device_kind, "platform": device.platform, "runtime": " ".join(device.client.platform_version.split()),
        "devices": jax.device_count(), "jax": jax.__version__, "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(), "network": config.model.name, "dtype": config.model.dtype, "batch": batch_size,
        "shape": list(shape), "parameters": sum(a.size for a in jax.tree.leaves(params)),
        "step_flops": flops(train.make_update(in_one, scaler), state, totals, host_batch),
        "evaluation_flops": flops(evaluate, params, jnp.zeros(x.shape), jnp.zeros(batch_size)),
    }  # fmt: skip

    update = jax.jit(
        train.make_update(config, scaler, sharding.fully_sharded(mesh)),
        in_shardings=(layout, whole, split), out_shardings=(layout, whole), donate_argnums=(0, 1),
    )  # fmt: skip
    update, figures["update_compile_s"] = _compiled(update, state, totals, batch)

    @jax.jit
    def draw(params, key):
        score_fn = configs.build_score(config, params, distribute=sharding.with_gathered(mesh))
        x = sd.sample_ode(score_fn, score_fn.sde, key, (batch_size, *shape), num_steps=NFE - 1)
        return jax.lax.with_sharding_constraint(x, split)

    key = jax.device_put(jax.random.key(0), whole)
    draw, figures["sampler_compile_s"] = _compiled(draw, state.ema, key)
    jax.block_until_ready(draw(state.ema, key))
    figures["sampler_s"] = statistics.median(_seconds(lambda: draw(state.ema, key)) for _ in range(rounds))
    carry = [state, totals]
    del state, totals

    def step():
        carry[:] = update(*carry, batch)
        return carry

    _seconds(step, 2)
    figures["peak_memory_bytes"], figures["peak_memory_by"] = _memory(update)
    other_step, other = _torch_step(config, carry[0].params, x, torch_mode)
    pairs = [(_seconds(step, STEPS), _seconds(other_step, STEPS) if other_step else None) for _ in range(rounds)]
    figures["step_s"] = statistics.median(ours for ours, _ in pairs)
    figures["matmul_peak_flops_per_s"], figures["matmul_size"] = matmul_peak(jnp.dtype(config.model.dtype))
    figures |= {
        "images_per_s": batch_size / figures["step_s"],
        "mfu": figures["step_flops"] / figures["step_s"] / (figures["matmul_peak_flops_per_s"] * jax.device_count()),
        "sampler_images_per_s": batch_size / figures["sampler_s"],
    }
    if other_step:
        other["step_s"] = statistics.median(theirs for _, theirs in pairs)
        other["images_per_s"] = batch_size / other["step_s"]
        ratios = [theirs / ours for ours, theirs in pairs]
        other |= {"step_s_over_ours": statistics.median(ratios), "lowest_ratio": min(ratios), "highest_ratio": max(ratios)}
    return figures | {"pytorch": other}


def show(f: dict) -> None:
    """Prints the figures of `measure` as a table."""
    other = f["pytorch"]
    rows = [
        ("device", f"{f['device']} x {f['devices']}, {f['runtime']}"),
        ("versions", f"JAX {f['jax']}, jaxlib {f['jaxlib']}, Python {f['python']}"),
        ("network", f"{f['network']}, {f['parameters']:,} parameters, {f['dtype']}, batch {f['batch']} of {tuple(f['shape'])}"),
        ("training step", f"{f['step_s'] * 1e3:,.1f} ms, {f['images_per_s']:,.1f} images/s, {f['step_flops'] / 1e9:,.2f} GFLOP"),
        ("matmul peak", f"{f['matmul_peak_flops_per_s'] / 1e12:,.3g} TFLOP/s a device, at size {f['matmul_size']}"),
        ("MFU", f"{f['mfu']:.1%}"),
        ("network evaluation", f"{f['evaluation_flops'] / 1e9:,.2f} GFLOP"),
        (f"sampler, {NFE} evaluations", f"{f['sampler_s'] * 1e3:,.1f} ms, {f['sampler_images_per_s']:,.1f} images/s"),
        ("compilation", f"update {f['update_compile_s']:.1f} s, sampler {f['sampler_compile_s']:.1f} s"),
        ("peak memory", f"{f['peak_memory_bytes'] / 2**20:,.1f} MiB a device, by {f['peak_memory_by']}"),
    ]
    if "torch" in other:
        how = "compiled" if other.get("compiled") else "eager"
        cuda = f", CUDA {other['cuda']}" if other["cuda"] else ""
        cuda += f", {other['threads']} thread(s)" if "threads" in other else ""
        rows.append(("PyTorch", f"torch {other['torch']}{cuda}, {how}, {other['parameters']:,} parameters"))
    if "skipped" in other:
        rows.append(("PyTorch", f"not measured: {other['skipped']}"))
    else:
        rows.append(("PyTorch training step", f"{other['step_s'] * 1e3:,.1f} ms, {other['images_per_s']:,.1f} images/s"))
        rows.append(
            (
                "PyTorch / this library",
                f"{other['step_s_over_ours']:.2f} of the step time, {other['lowest_ratio']:.2f} to {other['highest_ratio']:.2f} in the rounds",
            )
        )
    for name, value in rows:
        print(f"{name:<24}{value}")


def parse(argv: list[str]):
    """The options and the config of a command line, without the program's name."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.accelerator", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", default="configs/vp_cifar.py", help="config file; --config.section.key=value overrides it")
    parser.add_argument("--batch", type=int, help="images a step and a draw, of all devices together [512; on a CPU 16]")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="compute dtype [bfloat16; on a CPU float32]")
    parser.add_argument("--shape", default="32,32,3", help="shape of one example: height,width,channels, or a length")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of the measurements")
    parser.add_argument("--torch", default="compile", choices=["compile", "eager", "off"], help="how PyTorch runs beside")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator.json"), help="where the figures go")
    options, rest = parser.parse_known_args(argv)
    values = flags.FlagValues()
    words = [parser.prog, f"--config={options.config}", *rest]  # its overrides need it first
    try:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
        left = values(words)
        options.shape = tuple(int(n) for n in options.shape.split(","))
        config, on_cpu = values.config, jax.default_backend() == "cpu"
        config.train.batch_size = options.batch or (16 if on_cpu else 512)
        config.model.dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    if len(left) > 1:
        parser.error(f"unexpected argument {left[1]!r}; values of the config are set as --config.section.key=value")
    return options, config


def main(argv: list[str]) -> None:
    """Measures, prints the table and writes the JSON."""
    # Read when JAX first looks for its devices: memory is left for PyTorch, and a CPU device is there to count FLOPs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.config.jax_platforms and "cpu" not in jax.config.jax_platforms:
        jax.config.update("jax_platforms", f"{jax.config.jax_platforms},cpu")
    options, config = parse(argv)
    try:
        figures = measure(config, options.shape, options.rounds, options.torch)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise SystemExit(f"error: out of memory at batch {config.train.batch_size}; lower --batch") from None
    show(figures)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\nfigures in {options.out}")


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    main(sys.argv[1:])
