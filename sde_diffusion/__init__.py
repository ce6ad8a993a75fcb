"""Continuous-time SDE diffusion in JAX: `import sde_diffusion as sd`."""

from sde_diffusion.analytic import GaussianMixture
from sde_diffusion.bound import Bound, variational_bound
from sde_diffusion.dequantize import (
    discrete_bits_per_dim, truncated_normal_dequantize, uniform_dequantize, variational_dequantize,
)  # fmt: skip
from sde_diffusion.discrete import DDPM, SMLD, cosine_betas, linear_betas
from sde_diffusion.likelihood import Likelihood, encode, log_likelihood, slerp
from sde_diffusion.losses import dsm_loss, weighted_loss
from sde_diffusion.prediction import as_score
from sde_diffusion.samplers import (
    LearnedSolver, fit_solver, sample_adaptive, sample_langevin, sample_ode, sample_pc, sample_sde, solvers, time_grid,
)  # fmt: skip
from sde_diffusion.schedules import LinearLogSNR, MonotoneLogSNR
from sde_diffusion.score_matching import implicit_loss, sliced_loss
from sde_diffusion.sde import SDE, VE, VP, CosineVP, SubVP
from sde_diffusion.times import AdaptiveTimes, sample_times
from sde_diffusion.weights import is_monotone, weights

__all__ = [
    "AdaptiveTimes", "Bound", "DDPM", "LearnedSolver", "Likelihood", "LinearLogSNR", "MonotoneLogSNR", "SDE", "SMLD",
    "VE", "VP", "CosineVP", "GaussianMixture", "SubVP", "as_score", "cosine_betas", "discrete_bits_per_dim",
    "dsm_loss", "encode", "fit_solver", "implicit_loss", "is_monotone", "linear_betas", "load_run", "log_likelihood",
    "sample_adaptive", "sample_langevin", "sample_ode", "sample_pc", "sample_sde", "sample_times", "slerp",
    "sliced_loss", "solvers", "time_grid", "truncated_normal_dequantize", "uniform_dequantize", "variational_bound",
    "variational_dequantize", "weighted_loss", "weights",
]  # fmt: skip


def __getattr__(name):
    if name == "load_run":  # imports what reads data and checkpoints, which nothing else here needs
        from sde_diffusion.evaluate import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
