"""Samplers: time grids, one loop, and a table of coefficients for each algorithm."""

from sde_diffusion.samplers.adaptive import sample_adaptive
from sde_diffusion.samplers.catalogue import solvers
from sde_diffusion.samplers.grid import time_grid
from sde_diffusion.samplers.langevin import sample_langevin
from sde_diffusion.samplers.learned import LearnedSolver, fit_solver
from sde_diffusion.samplers.ode import sample_ode
from sde_diffusion.samplers.pc import sample_pc
from sde_diffusion.samplers.sde import sample_sde

__all__ = [
    "LearnedSolver", "fit_solver", "sample_adaptive", "sample_langevin", "sample_ode", "sample_pc", "sample_sde", "solvers", "time_grid",
]  # fmt: skip
