"""Saved SAEs: exact round trip, and clear errors for broken folders."""

import json
import os
import stat

import pytest
import torch

import reseed
from reseed.sae.checkpoint import CheckpointError, load_sae, read_metadata, save_sae
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig
from reseed.system.files import atomic_write_bytes, atomic_write_json
from reseed.system.integrity import read_record, sha256_of, write_record

CONFIGS = [TopKConfig(num_latents=32, k=3, aux_alpha=0.5), ReLUConfig(expansion_factor=4)]


@pytest.fixture
def saved(tmp_path):
    sae = CONFIGS[0].build(6, torch.Generator().manual_seed(0))
    save_sae(sae, tmp_path / "run", {"seed": 3})
    return tmp_path / "run"


def edit(folder, **changes):
    """Change entries of the description, and let its checksums fit."""
    weights = {"weights_sha256": sha256_of(folder / "sae.safetensors")}
    file = folder / "sae.json"
    write_record(file, {**read_record(file), **weights, **changes})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip_is_exact(config, dtype, tmp_path):
    sae = config.build(8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    sae = sae.to(dtype)
    save_sae(sae, tmp_path, {"note": "ü"})
    loaded = reseed.load_sae(tmp_path)
    assert type(loaded) is type(sae)
    assert loaded.config == config
    for (name, a), (other, b) in zip(
        sae.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == other
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    x = torch.randn(10, 8)
    assert torch.equal(sae(x).latents, loaded(x).latents)
    assert torch.equal(sae(x).reconstruction, loaded(x).reconstruction)
    assert read_metadata(tmp_path) == {"note": "ü"}


def test_a_saved_sae_has_two_files_with_these_contents(saved):
    assert sorted(os.listdir(saved)) == ["sae.json", "sae.safetensors"]
    description = json.loads((saved / "sae.json").read_text())
    assert description["type"] == "topk"
    assert (description["d_in"], description["num_latents"]) == (6, 32)
    assert description["config"]["aux_alpha"] == 0.5
    assert description["reseed_version"] == reseed.__version__
    assert description["metadata"] == {"seed": 3}


def test_a_loaded_sae_has_no_gradients_until_they_are_turned_on(saved):
    sae = load_sae(saved)
    assert sae.W_enc.numpy().shape == (32, 6)
    assert not sae(torch.zeros(2, 6)).reconstruction.requires_grad
    sae.requires_grad_(True)
    assert all(p.is_leaf for p in sae.parameters())
    save_sae(sae, saved)


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_sae(folder)
    return caught


def test_a_missing_folder_or_file_is_refused(saved, tmp_path):
    refused(tmp_path / "nowhere", "there is no folder .*nowhere")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no trained SAE: sae.json is missing")
    (saved / "sae.safetensors").unlink()
    refused(saved, "holds no trained SAE: sae.safetensors is missing")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(saved, keep):
    file = saved / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(saved, "sae.safetensors is damaged: its content does not fit sae.json")
    edit(saved)
    refused(saved, "sae.safetensors is damaged: it cannot be read")


def test_a_truncated_description_is_refused(saved):
    file = saved / "sae.json"
    file.write_text(file.read_text()[:-9])
    refused(saved, r"sae.json is damaged: it is not JSON \(")


def test_an_unknown_architecture_is_refused(saved):
    edit(saved, type="topkk")
    refused(saved, r"no sae is called `topkk`. Did you mean `topk`\?")


def test_a_class_path_is_not_imported(saved):
    edit(saved, type="os.system")
    refused(saved, "no sae is called `os.system`")


def test_wrong_shapes_are_refused(saved):
    edit(saved, d_in=7)
    refused(saved, r"`W_dec` has shape \[32, 6\], expected \[32, 7\]")


def test_widths_that_disagree_are_refused(saved):
    edit(saved, num_latents=31)
    refused(saved, "num_latents is 31, but its config says 32")


def test_zero_latents_are_refused(saved):
    """In a public library's config 0 means that the expansion factor decides."""
    description = json.loads((saved / "sae.json").read_text())
    edit(saved, config={**description["config"], "num_latents": 0})
    refused(saved, "`config.num_latents` must be an integer or null, at least 1; got 0")


def test_a_transposed_decoder_is_refused(saved):
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / "sae.safetensors")
    tensors["W_dec"] = tensors["W_dec"].T.contiguous()
    save_file(tensors, saved / "sae.safetensors")
    edit(saved)
    refused(saved, r"`W_dec` has shape \[6, 32\], expected \[32, 6\]")


def test_invalid_descriptions_are_refused(saved):
    edit(saved, d_in="six")
    refused(saved, "`d_in` must be a whole number of at least 1; got 'six'")
    edit(saved, format_version=99)
    refused(saved, "has format version 99; this program .* reads version 1")
    (saved / "sae.json").write_text("{}")
    refused(saved, "sae.json lacks config, d_in, format_version, num_latents, type")


def test_an_unknown_config_key_is_refused(saved):
    description = json.loads((saved / "sae.json").read_text())
    edit(saved, config={**description["config"], "kk": 3})
    refused(saved, r"there is no key `config.kk`. Did you mean `(config\.)?k`\?")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    atomic_write_json(file, {"a": 1})
    assert json.loads(file.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        atomic_write_bytes(file, "text")
    assert json.loads(file.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]
    usual = tmp_path / "usual"
    usual.touch()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)
