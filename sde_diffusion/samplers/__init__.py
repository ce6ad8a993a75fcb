"""Samplers: time grids, one loop, and one step function for each algorithm."""

from sde_diffusion.samplers.grid import time_grid
from sde_diffusion.samplers.ode import sample_ode
from sde_diffusion.samplers.pc import sample_pc
from sde_diffusion.samplers.sde import sample_sde

__all__ = ["sample_ode", "sample_pc", "sample_sde", "time_grid"]
