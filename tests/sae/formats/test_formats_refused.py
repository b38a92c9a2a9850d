"""Damaged, hostile, unfinished and unknown files are refused with a clear error; no code runs."""

import json
import pickle
import re
from types import SimpleNamespace

import foreign
import numpy as np
import pytest
import torch
from foreign import D, F, K, draws
from safetensors.torch import load_file, save_file

import reseed
from reseed.sae.checkpoint import CheckpointError, plain_tensors, save_sae
from reseed.sae.formats import import_sae
from reseed.sae.pretrained import Pretrained, place_of
from reseed.sae.topk import TopKConfig
from reseed.system.integrity import read_record, sha256_of, write_record


def refused(source, message, **options):
    with pytest.raises(CheckpointError) as error:
        reseed.load_sae(source, **options)
    assert message in str(error.value), str(error.value)


class Hostile:
    """An object whose unpickling creates a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def dictionary(folder, **more):
    p = draws()
    tensors = foreign.linear(p, encoder__bias="b_enc", bias="b_dec") | more
    return foreign.dictionary(folder, tensors, "AutoEncoder")


LAYOUTS = {
    "sparsify": lambda folder: foreign.sparsify(folder, draws()) / "sae.safetensors",
    "saelens": lambda folder: (
        foreign.saelens(folder, draws(), "jumprelu") / "sae_weights.safetensors"
    ),
    "dictionary_learning": lambda folder: dictionary(folder) / "ae.pt",
    "gemma_scope": lambda folder: foreign.gemma_scope(folder, draws()) / "params.npz",
    "gemma_scope_2": lambda folder: foreign.gemma_scope_2(folder, draws()) / "params.safetensors",
    "llama_scope": lambda folder: (
        foreign.llama_scope(folder, draws(), {"blocks.9.hook_resid_post": 3.0})
        / "sae_weights.safetensors"
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", [0, 0.001, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_refused(layout, part, tmp_path):
    file = LAYOUTS[layout](tmp_path / "sae")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    refused(tmp_path / "sae", f"{file} cannot be read (truncated, or not a data file?)")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_bytes_in_place_of_weights_are_refused(layout, tmp_path):
    file = LAYOUTS[layout](tmp_path / "sae")
    file.write_bytes(np.random.default_rng(0).bytes(5_000))
    refused(tmp_path / "sae", f"{file} cannot be read (truncated, or not a data file?)")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_is_not_run(tmp_path):
    target = tmp_path / "made"
    folder = dictionary(tmp_path / "sae")
    torch.save({"bias": Hostile(target)}, folder / "ae.pt")
    refused(folder, "cannot be read")
    (folder / "ae.pt").write_bytes(pickle.dumps(Hostile(target)))
    refused(folder, "cannot be read")
    assert not target.exists()


def test_objects_in_an_npz_are_not_run(tmp_path):
    target = tmp_path / "made"
    folder = foreign.gemma_scope(tmp_path / "sae", draws())
    np.savez(folder / "params.npz", W_enc=np.array([Hostile(target)], dtype=object))
    refused(folder, "cannot be read")
    (folder / "params.npz").write_bytes(pickle.dumps(Hostile(target)))
    refused(folder, "cannot be read")
    assert not target.exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "[" * 100_000])
def test_a_damaged_configuration_is_refused(text, tmp_path):
    folder = foreign.sparsify(tmp_path, draws())
    (folder / "cfg.json").write_text(text)
    refused(folder, "cfg.json")


def test_the_state_of_an_interrupted_training_is_refused_as_such(tmp_path):
    folder = dictionary(tmp_path)
    state = {"step": 300, "ae": {"bias": torch.zeros(D)}, "optimizer": {}, "config": {}}
    torch.save(state, folder / "ae.pt")
    refused(
        folder,
        "is the state of a training that was interrupted at step 300 (it holds ae, config, "
        "optimizer, step), not a finished SAE",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_dec": torch.zeros(F, D + 1)}, f"`W_dec` has shape [{F}, {D + 1}], expected "),
        ({"W_dec": torch.zeros(D, F)}, f"expected [num_latents={F}, d_in={D}]"),
        ({"b_dec": torch.zeros(D, dtype=torch.int64)}, "`b_dec` must hold floats; got torch.int64"),
        ({"b_enc": torch.full((F,), torch.nan)}, "`encoder.bias` holds values that are not finite"),
        ({"W_skip": torch.ones(D, D)}, "`W_skip` adds a linear map of the input"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, tmp_path):
    refused(foreign.sparsify(tmp_path, draws() | change), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": F + 1}, f"`k` (={F + 1}) must not exceed `num_latents` (={F})"),
        ({"k": "4"}, "`k` must be a whole number; got '4'"),
        ({"k": 0}, "`k` must be at least 1; got 0"),
        ({"k": None}, "`k` is missing"),
        ({"d_in": True}, "`d_in` must be a whole number; got True"),
        ({"num_latents": F + 1}, f"`encoder.weight` has shape [{F}, {D}]"),
        ({"activation": "relu"}, "`activation` is 'relu', which no architecture of reseed equals"),
        ({"activation": "groupmax", "k": 7}, f"`k` (=7) must divide `num_latents` (={F})"),
        ({"signed": True}, "reseed has no architecture with latents of either sign"),
    ],
)
def test_impossible_settings_of_sparsify_are_refused(change, message, tmp_path):
    refused(foreign.sparsify(tmp_path, draws(), **change), message)


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("standard", {"normalize_activations": "layer_norm"}, "rescales each token by its own"),
        ("standard", {"normalize_activations": "constant_norm_rescale"}, "by its own norm"),
        (
            "standard",
            {"normalize_activations": "expected_average_only_in"},
            "neither folded in nor in a file activation_scaler.json",
        ),
        ("temporal", {}, "`architecture` is 'temporal', which no architecture of reseed equals"),
        ("standard", {"activation_fn": "tanh-relu"}, "`activation_fn` is 'tanh-relu'"),
        ("transcoder", {"d_out": D + 1}, f"it maps {D} activations to {D + 1}"),
        ("topk", {"k": F + 1}, "must not exceed `num_latents`"),
    ],
)
def test_impossible_settings_of_saelens_are_refused(architecture, change, message, tmp_path):
    refused(foreign.saelens(tmp_path, draws(), architecture, **change), message)


@pytest.mark.parametrize(
    ("norms", "change", "message"),
    [
        (None, {}, "`dataset_average_activation_norm` must be above 0 at blocks.9.hook_resid_post"),
        ({"blocks.9.hook_resid_post": 0.0}, {}, "got 0.0"),
        (None, {"norm_activation": "token-wise"}, "`norm_activation` is 'token-wise'"),
        (None, {"norm_activation": "inference", "act_fn": "batchtopk"}, "store no threshold"),
        (None, {"norm_activation": "inference", "use_glu_encoder": True}, "`use_glu_encoder`"),
        (None, {"sae_type": "crosscoder"}, "`sae_type` is 'crosscoder'"),
    ],
)
def test_impossible_settings_of_llama_scope_are_refused(norms, change, message, tmp_path):
    refused(foreign.llama_scope(tmp_path, draws(), norms, **change), message)


def test_an_unknown_tensor_is_refused(tmp_path):
    folder = dictionary(tmp_path, ghost=torch.zeros(3))
    refused(
        folder,
        "the tensor `ghost` is unknown in this format and may change what the SAE computes",
    )


def test_k_of_weights_and_configuration_must_agree(tmp_path):
    tensors = foreign.linear(draws(), encoder__bias="b_enc", b_dec="b_dec")
    folder = foreign.dictionary(
        tmp_path, tensors | {"k": torch.tensor(K)}, "AutoEncoderTopK", k=K + 1
    )
    refused(folder, f"`k` is {K}, but config.json says {K + 1}")


def test_an_unknown_folder_is_refused_with_the_files_found_and_expected(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path, "holds no SAE of a known format; it contains notes.txt. Expected reseed: ")
    refused(tmp_path, "sparsify: cfg.json with sae.safetensors; ", format=None)
    refused(tmp_path, "Expected gemma_scope: params.npz or ", format="gemma_scope")
    refused(tmp_path / "nowhere", "there is no folder")
    refused(tmp_path, "no format is called `sparsfy`. Did you mean `sparsify`?", format="sparsfy")


def test_a_folder_of_several_saes_is_refused_with_their_names(tmp_path):
    for layer in (0, 1):
        foreign.sparsify(tmp_path / f"layers.{layer}", draws())
    refused(tmp_path, "Below it are layers.0 (sparsify), layers.1 (sparsify): give one of them.")


def test_a_file_without_its_companion_is_refused(tmp_path):
    folder = dictionary(tmp_path)
    (folder / "config.json").unlink()
    refused(folder / "ae.pt", "is not a file of a known format, or its companion files are missing")


def test_no_other_format_than_the_given_one_is_tried(tmp_path):
    folder = foreign.sparsify(tmp_path, draws())
    assert import_sae(folder, "sparsify").sae.num_latents == F
    refused(folder, "Expected saelens: cfg.json with sae_weights.safetensors", format="saelens")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:x", "a place on the hub is written hub:OWNER/NAME[@revision][/path]; got hub:x"),
        ("hub:a/b/../../c", "a place on the hub is written"),
        ("EleutherAI/sae-pythia", "for a repository on the hub write hub:EleutherAI/sae-pythia"),
    ],
)
def test_a_misspelt_place_on_the_hub_is_refused(source, message):
    refused(source, message)


def test_exactly_one_source_must_be_given():
    refused(None, "give either a source or `repo`")
    with pytest.raises(CheckpointError, match=re.escape("give either a source or `repo`")):
        reseed.load_sae("x", repo="a/b")
    with pytest.raises(CheckpointError, match="`revision` and `path` apply to the hub only"):
        reseed.load_sae("x", revision="main")


def test_the_files_that_were_read_are_listed(tmp_path):
    folder = foreign.sparsify(tmp_path, draws())
    values = json.loads((folder / "cfg.json").read_text())
    assert import_sae(folder).reads == (folder / "cfg.json", folder / "sae.safetensors")
    assert values["k"] == K


ODD = {
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t, t[:1]], layout=torch.jagged),
    "without values (on the device meta)": lambda t: t.to("meta"),
    "expanded: its shape [1000000, 1000000] has more values than the file": lambda t: torch.zeros(
        1
    ).expand(10**6, 10**6),
    "of the dtype complex64": lambda t: torch.complex(t, t),
    "of the type list": lambda t: t.tolist(),
    "of the type NoneType": lambda t: None,
}


@pytest.mark.parametrize("oddity", ODD)
def test_a_tensor_that_is_not_plain_is_refused(oddity, tmp_path):
    folder = dictionary(tmp_path)
    tensors = torch.load(folder / "ae.pt", weights_only=True)
    tensors["encoder.weight"] = ODD[oddity](tensors["encoder.weight"])
    torch.save(tensors, folder / "ae.pt")
    refused(folder, f"ae.pt: `encoder.weight` must be a plain tensor; it is {oddity}")


def test_names_must_be_text(tmp_path):
    folder = dictionary(tmp_path)
    tensors = torch.load(folder / "ae.pt", weights_only=True)
    torch.save(tensors | {3: torch.ones(1)}, folder / "ae.pt")
    refused(folder, "ae.pt must hold tensors by name; got the key 3")


def test_a_transposed_tensor_is_plain(tmp_path):
    p = draws()
    found = plain_tensors(tmp_path, {"W": p["W_enc"].T})["W"]
    assert found.is_contiguous()
    assert torch.equal(found, p["W_enc"].T)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_our_own_weights_must_be_finite(value, tmp_path):
    save_sae(TopKConfig(num_latents=F, k=K).build(D, torch.Generator()), tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    tensors["b_enc"][3] = value
    save_file(tensors, tmp_path / "sae.safetensors")
    own = {"weights_sha256": sha256_of(tmp_path / "sae.safetensors")}
    write_record(tmp_path / "sae.json", read_record(tmp_path / "sae.json") | own)
    refused(tmp_path, "`b_enc` holds values that are not finite")


def test_a_threshold_of_zero_is_finite_although_its_logarithm_is_not(tmp_path):
    p = draws()
    p["threshold"][:5] = 0
    sae = import_sae(foreign.gemma_scope(tmp_path / "theirs", p)).sae
    save_sae(sae, tmp_path / "ours")
    again = import_sae(tmp_path / "ours").sae
    x = foreign.tokens()
    assert torch.equal(sae.encode(x), again.encode(x))


@pytest.mark.parametrize(
    ("metadata", "place"),
    [
        ({}, (None, None)),
        ({"layer": 3, "site": "mlp_out", "hookpoint": "mlp_out.3"}, (3, "mlp_out")),
        ({"hook_name": "blocks.3.hook_resid_post"}, (3, "resid_post")),
        ({"hook_name": "blocks.3.hook_resid_pre"}, (3, "resid_pre")),
        ({"hook_name": "blocks.3.attn.hook_z"}, (3, "attn_z")),
        ({"hook_name": "hook_embed"}, (None, "embed")),
        ({"hook_name": "blocks.3.mlp.hook_post"}, (3, None)),
        ({"hookpoint": "layers.11.mlp"}, (11, "mlp_out")),
        ({"hookpoint": "layers.7"}, (7, None)),
        ({"submodule_name": "resid_post_layer_4", "layer": 4}, (4, "resid_post")),
        ({"layer": "12", "width": "16k"}, (12, None)),
        ({"hf_hook_point_in": "model.layers.7.output"}, (7, "resid_post")),
        ({"model": "h.3/mlp_out", "layer": [3], "site": 4}, (None, None)),
    ],
)
def test_the_place_of_an_sae_is_read_from_its_metadata(metadata, place):
    assert place_of(metadata) == place


def test_an_sae_of_a_modules_output_is_not_taken_for_one_of_what_the_module_adds():
    """In Gemma-2, a norm follows the MLP: its output is not what is added to the stream."""
    for name, warned in (("layers.3.mlp", True), ("blocks.3.hook_mlp_out", False)):
        found = SimpleNamespace(metadata={"hookpoint": name}, source="x", _said=name)
        assert Pretrained.misplaced(found, 3, "mlp_out") == ""  # type: ignore[arg-type]
        told = Pretrained.misplaced(found, 3, "mlp_out", is_module=False)  # type: ignore[arg-type]
        assert ("was trained on the activations of layer=3 hookpoint=module, " in told) == warned
