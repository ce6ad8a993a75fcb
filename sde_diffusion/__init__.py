"""Continuous-time SDE diffusion in JAX: `import sde_diffusion as sd`."""

from sde_diffusion.analytic import GaussianMixture
from sde_diffusion.discrete import DDPM, SMLD, cosine_betas, linear_betas
from sde_diffusion.likelihood import log_likelihood
from sde_diffusion.losses import dsm_loss, sample_times, weighted_loss
from sde_diffusion.prediction import as_score
from sde_diffusion.samplers import sample_ode, sample_pc, sample_sde, time_grid
from sde_diffusion.sde import SDE, VE, VP, CosineVP, SubVP

__all__ = [
    "DDPM", "SDE", "SMLD", "VE", "VP", "CosineVP", "GaussianMixture", "SubVP", "as_score", "cosine_betas",
    "dsm_loss", "linear_betas", "log_likelihood", "sample_ode", "sample_pc", "sample_sde", "sample_times",
    "time_grid", "weighted_loss",
]  # fmt: skip
