"""A workdir's own config as a config file: --config=sde_diffusion/saved_config.py:DIR/config.json (main does it unasked)."""

from pathlib import Path

from sde_diffusion import config


def get_config(path: str):
    return config.load(Path(path))
