"""XLA's flags for tests: most of their time is compilation."""

from importlib.metadata import version

# Code made without LLVM's optimiser and, where JAX still has the older ones, without the emitters that take half of the time.
QUICK = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
