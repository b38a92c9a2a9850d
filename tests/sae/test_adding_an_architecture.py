"""The README's example: one file and one yaml add an architecture, also from another package."""

from __future__ import annotations

import json

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
def test_one_file_and_one_yaml_add_an_architecture(tiny_overrides, made_up_package) -> None:
    folder = made_up_package.folder
    files = {"my_architecture.py": MODULE, "my_conf/sae/abstopk.yaml": YAML}
    made_up_package.write(files, {"reseed.sae": "abstopk = my_architecture"})
    own = ("comparison=seeds", *tiny_overrides, "sae=abstopk", "seed=0,1")
    made_up_package.reseed("run", "--config-dir", "my_conf", *own)
    records = [json.loads(p.read_text()) for p in folder.glob("outputs/*/run.json")]
    assert [r["experiment"]["sae"]["type"] for r in records] == ["abstopk"] * 2
    metrics = [json.loads(p.read_text()) for p in folder.glob("outputs/*/metrics.json")]
    assert all(m["l0"] == 4 and m["fvu"] < 1 for m in metrics)
