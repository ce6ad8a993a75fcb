"""8x8 digits, the embedded default."""

from sde_diffusion.config import experiment


def get_config():
    return experiment(
        data=dict(name="digits"),
        sde=dict(name="vp"),
        model=dict(name="unet", channels=32, multipliers=(1, 2), num_blocks=1),
        train=dict(batch_size=128, num_steps=200),
        eval=dict(gaussian_mixture=True),
    )
