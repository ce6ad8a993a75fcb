"""How arrays lie on the devices: the batch is split over one data axis, everything else is on all of them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sde_diffusion.sde import check


def make_mesh(devices: Any = None) -> Mesh:
    """A mesh of all devices (of all hosts), or of the given ones, with the one axis "data"."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def by_batch(mesh: Mesh) -> NamedSharding:
    """The first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """This host's part of a global batch, a pytree of numpy arrays, as global arrays split over the mesh."""
    sharding = by_batch(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), batch)


def check_batch_size(mesh: Mesh, batch_size: int, name: str) -> None:
    """Raises ValueError unless the global batch divides over the devices."""
    n = mesh.devices.size
    check(batch_size % n == 0, f"{name}={batch_size} does not divide over {n} devices; use a multiple of {n}")


def round_up(mesh: Mesh, batch_size: int) -> int:
    """The smallest multiple of the number of devices that is not below batch_size."""
    n = mesh.devices.size
    return -(-batch_size // n) * n
