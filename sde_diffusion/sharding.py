"""How arrays lie on the devices: a mesh of the axes "data" and "shard", and the layout of parameters, batches and results.

The batch is split over all devices. Parameters, the optimizer's state and the average are on all devices, or split over the
axis "shard" (fully sharded: arXiv:1910.02054, arXiv:2304.11277); every device then gathers what it needs where it needs it.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sde_diffusion.sde import check

AXES = ("data", "shard")

# Which axis of a parameter, by the first pattern found in its path, is split over "shard": a number, "longest" (of those that
# divide; the last of equals), or None for none. The optimizer's state and the average follow by their own paths.
RULES = (("", "longest"),)


def make_mesh(devices: Any = None, shards: int = 1) -> Mesh:
    """A mesh of all devices (of all hosts), or of the given ones, with the axes "data" and "shard".

    shards: over how many neighbouring devices parameters are split; 1: none.

    Raises:
      ValueError: shards that do not divide the devices.
    """
    # In the order of the processes, as they read their parts of a batch.
    devices = np.asarray(sorted(jax.devices(), key=lambda d: (d.process_index, d.id)) if devices is None else devices)
    check(
        shards >= 1 and devices.size % shards == 0,
        f"train.param_shards={shards} does not divide {devices.size} devices; use a divisor of {devices.size}",
    )
    return Mesh(devices.reshape(-1, shards), AXES, axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def by_batch(mesh: Mesh) -> NamedSharding:
    """The first axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def layout(mesh: Mesh, tree: Any, rules: Sequence[tuple[str, int | str | None]] = RULES) -> Any:
    """The sharding of every leaf of a state or of parameters (arrays or shapes) by the rules."""
    shards = mesh.shape["shard"]

    def of_leaf(path, a):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axis = next((axis for pattern, axis in rules if re.search(pattern, name)), None)
        fits = [i for i, size in enumerate(a.shape) if size and size % shards == 0]
        if axis == "longest":
            axis = max(fits, key=lambda i: (a.shape[i], i), default=None)
        if shards == 1 or axis not in fits:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "shard"))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def with_gathered(mesh: Mesh) -> Callable[[Callable], Callable]:
    """A network's `apply` for parameters in `layout`, without gradient by them: XLA gathers each where it is used."""

    def wrap(apply):
        return lambda variables, *args, **options: apply(jax.lax.with_sharding_constraint(variables, replicated(mesh)), *args, **options)

    return (lambda apply: apply) if mesh.shape["shard"] == 1 else wrap


def fully_sharded(mesh: Mesh, rules: Sequence[tuple[str, int | str | None]] = RULES) -> Callable[[Callable], Callable]:
    """A network's `apply` for parameters in `layout` by the same rules: all-gathers forwards, reduce-scatters of their gradient backwards.

    The gathered parameters are not kept from the forward to the backward pass, but gathered again.
    """

    def wrap(apply):
        def split_apply(variables, x, c, labels=None, dropout_keys=None):
            specs = jax.tree.map(lambda s: s.spec, layout(mesh, variables, rules))

            def gather(a, spec):
                if mesh.shape["data"] > 1:
                    # So that the sum over "data" comes last, of the part that is left.
                    a = jax.lax.pcast(a, "data", to="varying")
                return jax.lax.all_gather(a, "shard", axis=spec.index("shard"), tiled=True) if "shard" in spec else a

            def local(variables, *batch):
                return apply(jax.tree.map(gather, variables, specs), *batch)

            def keep(primitive, *_, **__):
                return "all_gather" not in primitive.name

            batch = PartitionSpec(AXES if mesh.shape["data"] > 1 else "shard")
            return jax.shard_map(
                jax.checkpoint(local, policy=keep), mesh=mesh, in_specs=(specs, batch, batch, batch, batch), out_specs=batch
            )(variables, x, c, labels, dropout_keys)

        return split_apply

    return (lambda apply: apply) if mesh.shape["shard"] == 1 else wrap


def over_axis(name: str) -> Callable[[Callable], Callable]:
    """A network's `apply` under `jax.pmap` with the axis `name`, of a batch and parameters that all devices hold.

    Every device works on its part of the batch, and gets the results and the gradient of all.
    """

    @jax.custom_vjp
    def mean_gradient(arrays):
        return arrays

    mean_gradient.defvjp(lambda v: (v, None), lambda _, g: (jax.lax.pmean(g, name),))

    def wrap(apply):
        def split_apply(variables, x, c, **options):
            count = jax.lax.axis_size(name)
            check(
                len(x) % count == 0, f"a batch of {len(x)} does not divide over the {count} devices of jax.pmap; use a multiple of {count}"
            )

            def part(a):
                return jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index(name) * (len(x) // count), len(x) // count)

            # The sum over devices in the gradient of what is gathered below counts every device's loss.
            variables, x, c = mean_gradient((variables, x, c))
            out = apply(variables, part(x), part(c), **jax.tree.map(part, options))
            return jax.lax.all_gather(out, name, tiled=True)

        return split_apply

    return wrap


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """This host's part of a global batch, a pytree of numpy arrays, as global arrays split over the mesh."""
    sharding = by_batch(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), batch)


def check_batch_size(mesh: Mesh, batch_size: int, name: str, parts: int = 1) -> None:
    """Raises ValueError unless the global batch divides over the devices, in `parts` one after the other."""
    n = mesh.devices.size * parts
    after = f" in {parts} parts" if parts > 1 else ""
    check(batch_size % n == 0, f"{name}={batch_size} does not divide over {mesh.devices.size} devices{after}; use a multiple of {n}")


def check_memory(mesh: Mesh, size: float | int, what: str, fix: str) -> None:
    """Raises ValueError where `size` bytes do not fit on one device of the mesh, which has at least to hold them."""
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    stats = device.memory_stats() or {}
    memory = stats.get("bytes_limit") or host_memory()
    check(size <= memory, f"{what} takes {size / 2**30:,.0f} GiB or more, and a device has {memory / 2**30:,.0f}; {fix}")


def host_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def round_up(mesh: Mesh, batch_size: int) -> int:
    """The smallest multiple of the number of devices that is not below batch_size."""
    n = mesh.devices.size
    return -(-batch_size // n) * n


_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}


def collectives(compiled: Any) -> dict[str, tuple[int, int]]:
    """What a compiled program (`jit(f).lower(...).compile()`) sends between devices: kind -> (number, bytes of the results).

    Read from its HLO. A result is what one device ends up with; a loop's body counts once.
    """
    out = {}
    pattern = re.compile(r" = (.*?) (" + "|".join(_COLLECTIVES) + r")(-start)?\(")
    for line in compiled.as_text().splitlines():
        found = pattern.search(line)
        if found:
            results, kind, _ = found.groups()
            size = sum(
                (_BITS.get(dtype) or int(re.sub(r"\D", "", dtype))) // 8 * int(np.prod([int(n) for n in shape.split(",") if n]))
                for dtype, shape in re.findall(r"([a-z][a-z0-9]*)\[([\d,]*)\]", results)
            )
            number, total = out.get(kind, (0, 0))
            out[kind] = (number + 1, total + size)
    return out
