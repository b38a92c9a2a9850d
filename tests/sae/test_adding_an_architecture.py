"""The README's example: one file and one yaml add an architecture, also from another package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = '''
from dataclasses import dataclass
from typing import final

import torch

from reseed.config import setting
from reseed.sae.base import SAE, Loss, SAEConfig


@dataclass(frozen=True)
class AbsTopKConfig(SAEConfig, name="abstopk"):
    k: int = setting(32, at_least=1)

    @property
    def sparsity(self) -> str:
        return f"k={self.k}"

    def published_lr(self, num_latents: int) -> float:
        return 2e-4 / (num_latents / 2**14) ** 0.5

    def empty(self, d_in: int) -> "AbsTopK":
        return AbsTopK(self, d_in)


@final
class AbsTopK(SAE):
    """The k pre-activations largest in magnitude, with their signs."""

    config: AbsTopKConfig

    def encode(self, x):
        pre = (x - self.b_dec) @ self.W_enc.T + self.b_enc
        kept = pre.abs().topk(self.config.k, dim=-1).indices
        return torch.zeros_like(pre).scatter(-1, kept, pre.gather(-1, kept))

    def training_loss(self, x, step, dead):
        latents = self.encode(x)
        error = x - self.decode(latents)
        total = error.square().sum(1).mean()
        active = latents != 0
        l0 = active.sum(1).float().mean()
        return Loss(total, {}, active.sum(0), error.detach().square().sum(), l0)
'''

YAML = """
_target_: my_architecture.AbsTopKConfig
num_latents: null
expansion_factor: 8
decoder_init_norm: 1.0
encoder_init_scale: 1.0
unit_norm_decoder: true
k: 4
"""


@pytest.mark.slow
def test_one_file_and_one_yaml_add_an_architecture(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    (tmp_path / "my_architecture.py").write_text(MODULE)
    (tmp_path / "my_conf" / "sae").mkdir(parents=True)
    (tmp_path / "my_conf" / "sae" / "abstopk.yaml").write_text(YAML)
    # The metadata of an installed package, so that records can be read.
    about = tmp_path / "my_architecture-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-architecture\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[reseed.sae]\nabstopk = my_architecture\n")
    command = [sys.executable, "-m", "reseed", "run", "--config-dir", "my_conf"]
    command += ["comparison=seeds", *tiny_overrides, "sae=abstopk", "seed=0,1"]
    # Prepended, because the tested package itself may be found through PYTHONPATH.
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    found = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    records = [json.loads(p.read_text()) for p in tmp_path.glob("outputs/*/run.json")]
    assert [r["experiment"]["sae"]["type"] for r in records] == ["abstopk"] * 2
    metrics = [json.loads(p.read_text()) for p in tmp_path.glob("outputs/*/metrics.json")]
    assert all(m["l0"] == 4 and m["fvu"] < 1 for m in metrics)
