import os
from pathlib import Path

from quick import QUICK

# Before JAX starts: 8 CPU devices, for the tests in which devices matter. Tests that start a process of their own run it on one.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", QUICK])
os.environ["JAX_PLATFORMS"] = "cpu"
# What one process has compiled, the other processes and the next run of the tests read.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

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


_MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def _few_mappings():
    """Frees programs as well where they take many memory mappings: Linux gives a process 65,530, and XLA crashes without."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
