"""VDM on MNIST, small: the variational bound of the 256 grey levels, with a learned log-SNR (arXiv:2107.00630).

    python -m sde_diffusion.main --config=configs/vdm_mnist.py --workdir=runs/vdm_mnist

No figure of a whole run has been measured yet.
"""

from sde_diffusion.config import experiment


def get_config():
    return experiment(
        data=dict(name="mnist"),
        sde=dict(name="monotone_log_snr", log_snr_max=13.3, log_snr_min=-6.0),
        model=dict(
            name="unet", channels=16, multipliers=(1, 2, 2), num_blocks=2, embedding_scale=10.0, input_fourier=(7, 8)
        ),
        prediction=dict(kind="edm", noise_label="log_snr", sigma_data=0.6),
        loss=dict(name="bound", learn_schedule=True),
        optim=dict(lr=1e-3, warmup_steps=200, ema_decay=0.999),
        train=dict(batch_size=64, num_steps=8000, log_every=50, sample_every=1000, checkpoint_every=500),
        sample=dict(num=1024, batch_size=256, num_steps=20),
        eval=dict(batch_size=100, ode=False, bound_draws=4),
    )
