"""Hugging Face's diffusers' solvers on processes and time grids of this library; needs the extra `bench` (torch, diffusers)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import sde_diffusion as sd


def on_times(solver, sde, t) -> np.ndarray:
    """Sets a scheduler of diffusers to the N + 1 times t; returns the factor by which its state is smaller than ours, `(N + 1,)`.

    diffusers knows sigma / alpha alone, and keeps the state of a variance-preserving process.
    """
    import torch

    alpha, sigma = (np.asarray(f(t), np.float64) for f in (sde.alpha, sde.sigma))
    num = len(t) - 1
    solver.set_timesteps(num)
    solver.sigmas, solver.timesteps, solver.num_inference_steps = torch.from_numpy(sigma / alpha), torch.arange(num), num
    solver.model_outputs = [None] * len(solver.model_outputs)
    return np.hypot(alpha, sigma)


def diffusers_samples(sde, predict, start, budgets):
    """(solver, budget, grid, end points) of diffusers' solvers from these states, on EDM's grid and uniform log(sigma / alpha)."""
    import torch
    from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kinds = {
        "DDIM": (DPMSolverMultistepScheduler, {"solver_order": 1}),
        "DPM-Solver++ 2M": (DPMSolverMultistepScheduler, {"solver_order": 2}),
        "DPM-Solver++ 3M": (DPMSolverMultistepScheduler, {"solver_order": 3}),
        "UniPC-2": (UniPCMultistepScheduler, {"solver_order": 2, "solver_type": "bh2"}),
        "UniPC-3": (UniPCMultistepScheduler, {"solver_order": 3, "solver_type": "bh2"}),
        "DEIS-3": (DEISMultistepScheduler, {"solver_order": 3}),
    }
    predict = jax.jit(predict)
    for (name, (scheduler, options)), budget, grid in itertools.product(kinds.items(), budgets, ("edm", "log_snr")):
        t = np.asarray(sd.time_grid(sde, budget, grid))
        solver = scheduler(prediction_type="sample", **options)
        scale = on_times(solver, sde, t)
        state = torch.from_numpy(np.asarray(start, np.float64) / scale[0])
        for i in range(budget):
            x = jnp.asarray(state.numpy() * scale[i], jnp.float32)
            x0 = predict(x, jnp.full(len(x), t[i]))[0]
            state = solver.step(torch.from_numpy(np.asarray(x0, np.float64)), solver.timesteps[i], state).prev_sample
        yield name, budget, grid, state.numpy() * scale[-1]
