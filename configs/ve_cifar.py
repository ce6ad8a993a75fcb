"""CIFAR-10, NCSN++ under the VE SDE: the published continuous recipe (arXiv:2011.13456 appendix G and H).

    python -m sde_diffusion.main --config=configs/ve_cifar.py --workdir=runs/ve_cifar

62.8 million parameters, 1.3 million steps of batch 128. Published: FID 2.38 with the predictor-corrector sampler,
1,000 steps of reverse diffusion and Langevin at snr 0.16 (table 3). The paper gives no bits/dim for it.
"""

from sde_diffusion.config import experiment


def get_config():
    return experiment(
        data=dict(name="cifar10", flip=True, centered=False),
        sde=dict(name="ve", sigma_min=0.01, sigma_max=50.0),
        model=dict(
            name="unet",
            channels=128,
            multipliers=(1, 2, 2, 2),
            num_blocks=4,
            attention=(16,),
            dropout=0.1,
            resampling="fir",
            progressive_input="residual",
            embedding="fourier",
        ),
        prediction=dict(kind="eps", noise_label="log_sigma"),
        # The published loss is 1/2 the sum over dimensions; this one is the sum, so it is clipped at 2, not at 1.
        loss=dict(name="dsm", weight="sigma2", times="uniform"),
        optim=dict(lr=2e-4, warmup_steps=5000, grad_clip=2.0, ema_decay=0.999),
        train=dict(
            batch_size=128,
            num_steps=1_300_000,
            log_every=100,
            sample_every=10_000,
            checkpoint_every=10_000,
        ),
        sample=dict(
            sampler="pc",
            method="reverse_diffusion",
            corrector="langevin",
            snr=0.16,
            num_steps=1000,
            grid="uniform",
            num=1024,
            batch_size=256,
        ),
        eval=dict(batch_size=64, rtol=1e-3, atol=1e-3),
    )
