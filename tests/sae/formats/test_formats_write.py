"""Exported SAEs read back the same, bit for bit where nothing is folded; others are refused."""

import json

import foreign
import pytest
import torch
from foreign import D, F, K, assert_same, draws, tokens

import reseed
from reseed.activations.hookpoints import SITES
from reseed.sae.base import SAEConfig
from reseed.sae.batch_topk import BatchTopKConfig
from reseed.sae.checkpoint import CheckpointError
from reseed.sae.formats import FORMATS, export_sae, import_sae
from reseed.sae.formats.base import Exporting, exact_log
from reseed.sae.formats.files import read_npz
from reseed.sae.gated import GatedConfig
from reseed.sae.jumprelu import JumpReLUConfig
from reseed.sae.matryoshka import MatryoshkaConfig
from reseed.sae.pretrained import place_of
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig

CONFIGS = {
    "topk": TopKConfig(num_latents=F, k=K),
    "groupmax": TopKConfig(num_latents=F, k=K, activation="groupmax"),
    "relu": ReLUConfig(num_latents=F),
    "relu_centred": ReLUConfig(num_latents=F, subtract_b_dec=True),
    "jumprelu": JumpReLUConfig(num_latents=F),
    "jumprelu_centred": JumpReLUConfig(num_latents=F, subtract_b_dec=True),
    "gated": GatedConfig(num_latents=F),
    "batch_topk": BatchTopKConfig(num_latents=F, k=K),
    "matryoshka": MatryoshkaConfig(num_latents=F, k=K, prefixes=(0.25, 1.0)),
}
METADATA = {"model": "pythia", "site": "resid_post", "layer": 3, "hookpoint": "resid_post.3"}
FOLDED = {
    ("gemma_scope", "relu_centred"), ("gemma_scope", "jumprelu_centred"),
    ("gemma_scope", "batch_topk"), ("gemma_scope", "matryoshka"),
    ("dictionary_learning", "jumprelu_centred"),
}  # fmt: skip
"""Pairs where b_dec is folded into b_enc, which rounds."""


def trained(config: SAEConfig):
    """Return an SAE of an architecture with parameters as training may leave them."""
    sae, p = config.empty(D), draws(4)
    with torch.no_grad():
        for name, parameter in (*sae.named_parameters(), *sae.named_buffers()):
            source = {"log_threshold": p["threshold"].log(), "threshold": torch.tensor(0.55)}
            parameter.copy_(source[name] if name in source else p[name])
    return sae.requires_grad_(False)


def holds(format: str, name: str) -> bool:
    """Return whether SAEs of ``CONFIGS[name]`` can be written in a format."""
    one = FORMATS[format]
    if name == "groupmax" and format in ("saelens", "dictionary_learning"):
        return False
    return format == "reseed" or (isinstance(one, Exporting) and CONFIGS[name].name in one.exports)


PAIRS = [(format, name) for format in FORMATS for name in CONFIGS if holds(format, name)]


@pytest.mark.parametrize(("format", "name"), PAIRS, ids=lambda v: v)
def test_an_exported_sae_reads_back_the_same(format, name, tmp_path):
    sae, x = trained(CONFIGS[name]), tokens()
    export_sae(sae, tmp_path / "out", format, METADATA)
    found = reseed.load_sae(tmp_path / "out")
    before, after = sae(x), found(x)
    if (format, name) in FOLDED:
        assert_same(found, x, before.latents, before.reconstruction)
    else:
        assert torch.equal(before.latents, after.latents)
        close = {"rtol": 0, "atol": 0 if found.config.name == sae.config.name else 1e-5}
        torch.testing.assert_close(after.reconstruction, before.reconstruction, **close)
        for parameter in ("W_enc", "b_enc", "W_dec", "b_dec"):
            assert torch.equal(getattr(sae, parameter), getattr(found, parameter))
    # Exporting the SAE that was read changes nothing either.
    export_sae(found, tmp_path / "again", format, METADATA)
    assert torch.equal(reseed.load_sae(tmp_path / "again")(x).latents, after.latents)


def test_written_tensors_are_bit_equal_to_those_that_were_read(tmp_path):
    p = draws()
    first = foreign.gemma_scope(tmp_path / "first", p) / "params.npz"
    export_sae(reseed.load_sae(first), tmp_path / "second", "gemma_scope")
    for key, tensor in read_npz(first).items():
        assert torch.equal(tensor, read_npz(tmp_path / "second" / "params.npz")[key]), key


def test_the_origin_is_exported_with_the_sae(tmp_path):
    sae = trained(CONFIGS["topk"])
    for format in ("reseed", "sparsify", "dictionary_learning"):
        export_sae(sae, tmp_path / format, format, METADATA)
        assert METADATA.items() <= import_sae(tmp_path / format).metadata.items()
    export_sae(sae, tmp_path / "saelens", "saelens", METADATA)
    found = import_sae(tmp_path / "saelens").metadata
    assert (found["hook_name"], found["reseed"]) == ("blocks.3.hook_resid_post", METADATA)
    notes = export_sae(trained(CONFIGS["batch_topk"]), tmp_path / "npz", "gemma_scope", METADATA)
    assert notes == (
        "params.npz does not store where the SAE comes from",
        "sae=batch_topk is stored as a JumpReLU, without its k",
    )


@pytest.mark.parametrize("site", [site for site in SITES if site != "module"])
def test_saelens_gets_the_hook_with_the_meaning_of_the_site(site, tmp_path):
    metadata = {"site": site, "layer": 3, "hookpoint": f"{site}.3"}
    export_sae(trained(CONFIGS["topk"]), tmp_path, "saelens", metadata)
    found = json.loads((tmp_path / "cfg.json").read_text())
    name = {"embed": "hook_embed", "attn_z": "blocks.3.attn.hook_z"}
    assert found["metadata"]["hook_name"] == name.get(site, f"blocks.3.hook_{site}")
    assert found["reshape_activations"] == ("hook_z" if site == "attn_z" else "none")
    assert place_of(found["metadata"]) == (None if site == "embed" else 3, site)


def test_a_threshold_is_kept_to_the_last_bit():
    threshold = torch.cat([draws(s)["threshold"] for s in range(50)] + [torch.tensor([1e-30, 1e8])])
    reached = exact_log(threshold).exp()
    after = torch.nextafter(threshold, torch.tensor(torch.inf))
    assert bool((reached >= threshold).all())
    assert bool((reached < after).all())
    assert bool((exact_log(torch.tensor([0.0, -1.0])) == -torch.inf).all())


def test_a_pre_activation_at_its_threshold_is_inactive_and_the_next_float_is_active(tmp_path):
    p = draws()
    p |= {"W_enc": torch.eye(F, D), "b_enc": torch.zeros(F), "b_dec": torch.zeros(D)}
    sae = reseed.load_sae(foreign.saelens(tmp_path, p, "jumprelu"))
    at = p["threshold"][:D]
    assert not bool(sae.encode(at)[:D].any())
    above = torch.nextafter(at, torch.tensor(torch.inf))
    assert torch.equal(sae.encode(above)[:D], above)


def test_weighing_by_decoder_norms_gives_each_latent_its_own_threshold(tmp_path):
    config = BatchTopKConfig(
        num_latents=F, k=K, weigh_by_decoder_norm=True, unit_norm_decoder=False
    )
    sae, x = trained(config), tokens()
    export_sae(sae, tmp_path, "saelens")
    out = sae(x)
    assert_same(reseed.load_sae(tmp_path), x, out.latents, out.reconstruction)


@pytest.mark.parametrize(
    ("format", "config", "message"),
    [
        ("sparsify", CONFIGS["relu"], "sparsify cannot hold sae=relu: it holds topk"),
        ("gemma_scope", CONFIGS["topk"], "gemma_scope cannot hold sae=topk: it holds jumprelu, "),
        ("saelens", CONFIGS["groupmax"], "saelens cannot hold `activation=groupmax`"),
        ("llama_scope", CONFIGS["relu"], "as llama_scope: reseed only reads this format"),
        (
            "dictionary_learning",
            BatchTopKConfig(num_latents=F, k=2.5),
            "dictionary_learning cannot hold k=2.5: its k is a whole number",
        ),
        (
            "sparsify",
            TopKConfig(num_latents=F, k=2, weigh_by_decoder_norm=True, unit_norm_decoder=False),
            "it chooses latents by f, not f‖d‖",
        ),
    ],
)
def test_an_sae_that_a_format_cannot_hold_is_refused(format, config, message, tmp_path):
    with pytest.raises(CheckpointError) as error:
        export_sae(trained(config), tmp_path / "out", format)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()
