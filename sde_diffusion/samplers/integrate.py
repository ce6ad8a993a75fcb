"""The loop that all fixed-grid samplers share: one `lax.scan` of a step function over neighbouring times of a grid."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sde_diffusion.prediction import as_pytree, lookup, predict, zero_terminal_snr
from sde_diffusion.samplers.grid import resolve_grid


def resolve(methods: dict, name: str, kind: str, sde):
    """The step function of that name; a ValueError for an unknown one, and for one whose drift is infinite at t_max."""
    step = lookup(methods, name, kind)
    if name in ("euler", "euler_maruyama") and zero_terminal_snr(sde):
        raise ValueError(
            f"{kind} {name!r} needs a finite drift, but alpha({sde.t_max}) = 0 (zero terminal SNR); "
            "use 'ddim', 'heun' or 'ancestral'"
        )
    return step


def integrate(
    step, score_fn, sde, key, shape, *, num_steps, grid, t_end, init, denoise, return_path
) -> Any:
    """Carries a prior draw, or `init`, along the grid with `step(score_fn, sde, key, x, t, s)`, from time t to s < t."""
    times = resolve_grid(sde, grid, num_steps, t_end)
    shape = tuple(shape)
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape={shape} must be (batch, *event) with at least one event axis, all positive")
    if init is not None and init.shape != shape:
        raise ValueError(f"init has shape {init.shape} but shape={shape} was asked for; make them equal")
    if init is not None:
        if not jnp.issubdtype(init.dtype, jnp.floating):
            raise ValueError(f"init has dtype {init.dtype}; pass floats, of the scale of the prior")
        # The state keeps float32 or wider, whatever the network computes in.
        init = init.astype(jnp.promote_types(init.dtype, jnp.float32))
    if zero_terminal_snr(sde) and not hasattr(score_fn, "predict"):
        raise ValueError(
            f"a bare score function leaves x0 undefined at zero terminal SNR (alpha({sde.t_max}) = 0): use as_score with "
            "prediction='v' or 'x0', or an SDE with a smaller t_max"
        )
    if key is None:
        raise ValueError("key=None; pass jax.random.key(seed)")
    return _run(
        as_pytree(step), as_pytree(score_fn), sde, key, times, init,
        shape=shape, denoise=denoise, return_path=return_path,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("shape", "denoise", "return_path"))
def _run(step, score_fn, sde, key, times, init, *, shape, denoise, return_path):
    key_prior, key_steps = jax.random.split(key)
    x = sde.prior_sample(key_prior, shape) if init is None else init

    def body(x, inputs):
        index, t, s = inputs
        x = step(score_fn, sde, jax.random.fold_in(key_steps, index), x, t, s).astype(x.dtype)
        return x, (x if return_path else None)

    num_steps = times.shape[0] - 1
    end, path = jax.lax.scan(body, x, (jnp.arange(num_steps), times[:-1], times[1:]))
    sample = predict(score_fn, sde, end, times[-1])[0].astype(x.dtype) if denoise else end
    return (sample, jnp.concatenate([x[None], path])) if return_path else sample
