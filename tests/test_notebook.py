import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from quick import QUICK

from sde_diffusion import data, train
from sde_diffusion.config import experiment, to_json

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_quickstart_notebook_runs(tmp_path, monkeypatch):
    config = experiment(model=dict(name="mlp", width=16, depth=1), train=dict(batch_size=16, num_steps=3),
                        sample=dict(batch_size=8), eval=dict(batch_size=8))  # fmt: skip
    train.train(config, tmp_path, data.load("digits"))
    (tmp_path / "config.json").write_text(to_json(config))
    monkeypatch.setenv("SDE_DIFFUSION_WORKDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("XLA_FLAGS", QUICK)

    # A kernel of this interpreter, whatever kernels the machine has installed.
    notebook = nbformat.read(ROOT / "experiments" / "quickstart.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "experiments")}})
    manager = client.create_kernel_manager()
    manager.kernel_spec.argv[0] = sys.executable
    client.execute()

    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    figures = sum("image/png" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", []))
    assert figures == 2
    largest = float(printed.split("largest difference")[1].split()[0])
    # float32, tolerance 1e-4 a step, and the prior's own mismatch of about 0.02 nats.
    assert largest < 0.1
