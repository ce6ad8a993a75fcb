import os

# Before JAX starts: 8 CPU devices, for the tests in which devices matter.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Double precision, where orders and identities are measured."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(autouse=True, scope="module")
def _free_programs():
    """Frees what a module compiled: the programs of all tests together fill gigabytes."""
    yield
    jax.clear_caches()
