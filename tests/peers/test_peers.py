"""Tests with the libraries themselves: reseed reads what they save, and they read its exports.

A test is skipped if its library is not installed; `make test-peers` makes an environment with all
three.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reseed
from reseed.sae.base import SAE, SAEConfig
from reseed.sae.batch_topk import BatchTopKConfig
from reseed.sae.formats import export_sae
from reseed.sae.gated import GatedConfig
from reseed.sae.jumprelu import JumpReLUConfig
from reseed.sae.matryoshka import MatryoshkaConfig
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig

D, F, K = 16, 64, 4


def library(name: str) -> Any:
    """Import a library, or skip the test."""
    return pytest.importorskip(name, reason=f"{name} is not installed: make test-peers")


def dictionaries(module: str) -> Any:
    """Import a module of dictionary_learning. The library imports nnsight, which its dictionaries
    do not need; if nnsight is not installed, an empty module replaces it."""
    if "nnsight" not in sys.modules and importlib.util.find_spec("nnsight") is None:
        stand_in = types.ModuleType("nnsight")
        stand_in.LanguageModel = object  # type: ignore[attr-defined]
        sys.modules["nnsight"] = stand_in
    library("dictionary_learning")
    return importlib.import_module(f"dictionary_learning.{module}")


def moved(module: torch.nn.Module, seed: int = 0) -> Any:
    """Move every parameter away from its start, thresholds to values above 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = 0.3 * torch.randn(p.shape, generator=generator)
            p.copy_(noise.abs() if "threshold" in name else p + noise)
    return module


def tokens() -> Tensor:
    return 2 * torch.randn(128, D, generator=torch.Generator().manual_seed(5))


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    """Assert equality within 1e-5 of the largest value."""
    error = (ours.double() - theirs.detach().double()).abs().max()
    assert float(error) <= 1e-5 * float(theirs.detach().abs().max())


def assert_same(sae: SAE, x: Tensor, latents: Tensor, reconstruction: Tensor) -> None:
    out = sae(x)
    assert_equal(out.latents, latents)
    assert_equal(out.reconstruction, reconstruction)
    assert torch.equal(out.latents > 0, latents > 0)


def trained(config: SAEConfig) -> SAE:
    """Return an SAE of ours, moved away from its start."""
    sae = moved(config.build(D, torch.Generator().manual_seed(1)), 1)
    with torch.no_grad():
        if isinstance(config, BatchTopKConfig):
            sae.threshold.fill_(0.8)
        if config.name == "jumprelu":
            sae.log_threshold.uniform_(-2, 0, generator=torch.Generator().manual_seed(2))
        if config.unit_norm_decoder:
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return sae.requires_grad_(False)


# sparsify


def by_sparsify(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    acts, indices, _ = sae.encode(x)
    return torch.zeros(len(x), F).scatter(1, indices, acts), sae.decode(acts, indices)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_latents": F},
        {"num_latents": 0, "expansion_factor": F // D},
        {"num_latents": F, "multi_topk": True, "normalize_decoder": False},
        {"num_latents": F, "activation": "groupmax"},
        {"num_latents": F, "transcode": True},
    ],
    ids=str,
)
def test_sparsify_is_read(settings: dict[str, Any], tmp_path: Path) -> None:
    sparsify = library("sparsify")
    theirs = moved(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(k=K, **settings)))
    theirs.save_to_disk(tmp_path)
    x = tokens()
    assert_same(reseed.load_sae(tmp_path), x, *by_sparsify(theirs, x))


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_sparsify_reads_ours(activation: str, tmp_path: Path) -> None:
    sparsify = library("sparsify")
    sae, x = trained(TopKConfig(num_latents=F, k=K, activation=activation)), tokens()
    export_sae(sae, tmp_path, "sparsify", {"seed": 3})
    assert_same(sae, x, *by_sparsify(sparsify.SparseCoder.load_from_disk(tmp_path), x))


# SAELens


def by_saelens(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    latents = sae.encode(x)
    return latents, sae.decode(latents)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Standard", {}),
        ("TopK", {"k": K}),
        ("TopK", {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("JumpReLU", {}),
        ("Gated", {}),
    ],
)
def test_saelens_is_read(kind: str, settings: Any, centred: bool, tmp_path: Path) -> None:
    lens = library("sae_lens")
    config = getattr(lens, f"{kind}SAEConfig")(
        d_in=D, d_sae=F, apply_b_dec_to_input=centred, **settings
    )
    theirs = moved(getattr(lens, f"{kind}SAE")(config))
    theirs.save_model(tmp_path)
    x = tokens()
    assert_same(reseed.load_sae(tmp_path), x, *by_saelens(theirs, x))


@pytest.mark.parametrize("kind", ["BatchTopK", "MatryoshkaBatchTopK"])
def test_batch_topk_saes_of_saelens_are_read(kind: str, tmp_path: Path) -> None:
    lens = library("sae_lens")
    more = {"matryoshka_widths": [F // 4, F]} if kind.startswith("M") else {}
    config = getattr(lens, f"{kind}TrainingSAEConfig")(d_in=D, d_sae=F, k=K, **more)
    theirs = moved(getattr(lens, f"{kind}TrainingSAE")(config))
    theirs.topk_threshold.fill_(0.7)
    theirs.save_inference_model(tmp_path)
    stored = lens.SAE.load_from_disk(tmp_path)
    x = tokens()
    assert_same(reseed.load_sae(tmp_path), x, *by_saelens(stored, x))


OURS = {
    "topk": TopKConfig(num_latents=F, k=K),
    "batch_topk": BatchTopKConfig(num_latents=F, k=K),
    "matryoshka": MatryoshkaConfig(num_latents=F, k=K),
    "jumprelu": JumpReLUConfig(num_latents=F),
    "jumprelu centred": JumpReLUConfig(num_latents=F, subtract_b_dec=True),
    "gated": GatedConfig(num_latents=F),
    "relu": ReLUConfig(num_latents=F),
    "relu centred": ReLUConfig(num_latents=F, subtract_b_dec=True),
}


@pytest.mark.parametrize("name", OURS)
def test_saelens_reads_ours(name: str, tmp_path: Path) -> None:
    lens = library("sae_lens")
    sae, x = trained(OURS[name]), tokens()
    export_sae(sae, tmp_path, "saelens", {"model": "gpt2", "site": "resid_post", "layer": 3})
    theirs = lens.SAE.load_from_disk(tmp_path)
    assert_same(sae, x, *by_saelens(theirs, x))
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"


# dictionary_learning


def by_dictionary(theirs: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    latents = theirs.encode(x)
    return latents, theirs.decode(latents)


@pytest.mark.parametrize(
    ("module", "kind", "arguments"),
    [
        ("dictionary", "AutoEncoder", {}),
        ("dictionary", "AutoEncoderNew", {}),
        ("dictionary", "GatedAutoEncoder", {}),
        ("dictionary", "JumpReluAutoEncoder", {}),
        ("trainers.top_k", "AutoEncoderTopK", {"k": K}),
        ("trainers.batch_top_k", "BatchTopKSAE", {"k": K}),
        (
            "trainers.matryoshka_batch_top_k",
            "MatryoshkaBatchTopKSAE",
            {"k": K, "group_sizes": [F // 4, F - F // 4]},
        ),
    ],
)
@pytest.mark.parametrize("threshold", [0.7, -1.0])
def test_dictionary_learning_is_read(
    module: str, kind: str, arguments: Any, threshold: float, tmp_path: Path
) -> None:
    theirs = moved(getattr(dictionaries(module), kind)(D, F, **arguments))
    if "BatchTopK" in kind:
        theirs.threshold.fill_(threshold)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": kind} | ({"k": K} if "k" in arguments else {})
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    x = tokens()
    assert_same(reseed.load_sae(tmp_path), x, *by_dictionary(theirs, x))


@pytest.mark.parametrize("name", OURS)
def test_dictionary_learning_reads_ours(name: str, tmp_path: Path) -> None:
    utils = dictionaries("utils")
    sae, x = trained(OURS[name]), tokens()
    notes = export_sae(sae, tmp_path, "dictionary_learning")
    theirs, _ = utils.load_dictionary(str(tmp_path), "cpu")
    latents, reconstruction = by_dictionary(theirs, x)
    assert_equal(sae(x).reconstruction, reconstruction)
    if any("normalize_decoder=False" in note for note in notes):
        theirs = dictionaries("dictionary").AutoEncoder.from_pretrained(
            str(tmp_path / "ae.pt"), normalize_decoder=False
        )
        latents, reconstruction = by_dictionary(theirs, x)
    assert_same(sae, x, latents, reconstruction)
