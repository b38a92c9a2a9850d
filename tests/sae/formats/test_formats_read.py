"""Every layout is read as its own formula, written out densely in float64."""

import foreign
import pytest
import torch
from foreign import D, F, K, assert_same, decoded, draws, jump, pre, tokens, topk

import reseed
from reseed.sae.formats import import_sae

EXACT = pytest.mark.parametrize("seed", [0, 1])


def test_sparsify_is_read(tmp_path):
    p, x = draws(), tokens()
    sae = reseed.load_sae(foreign.sparsify(tmp_path / "layers.3", p, multi_topk=True))
    latents = topk(pre(p, x, centred=True))
    assert_same(sae, x, latents, decoded(p, latents))
    assert (sae.config.k, sae.config.multi_topk, sae.config.name) == (K, True, "topk")


def test_sparsify_without_num_latents_follows_the_expansion_factor(tmp_path):
    p, x = draws(), tokens()
    p |= {name: p[name][:36] for name in ("W_enc", "W_dec", "b_enc")}
    sae = reseed.load_sae(foreign.sparsify(tmp_path, p, num_latents=0, expansion_factor=3))
    latents = topk(pre(p, x, centred=True))
    assert_same(sae, x, latents, decoded(p, latents))
    assert sae.num_latents == 36


def test_groupmax_keeps_the_largest_of_every_group(tmp_path):
    p, x = draws(), tokens()
    sae = reseed.load_sae(foreign.sparsify(tmp_path, p, activation="groupmax"))
    groups = pre(p, x, centred=True).relu().view(len(x), K, F // K)
    largest = groups == groups.amax(2, keepdim=True)
    latents = (groups * largest).view(len(x), F)
    assert_same(sae, x, latents, decoded(p, latents))


def test_a_transcoder_of_sparsify_reads_raw_inputs(tmp_path):
    p, x = draws(), tokens()
    folder = foreign.sparsify(tmp_path, {**p, "W_skip": torch.zeros(D, D)}, transcode=True)
    found = import_sae(folder)
    latents = topk(pre(p, x, centred=False))
    assert_same(found.sae, x, latents, decoded(p, latents))
    assert found.transcoder
    assert found.notes == (
        "`W_skip` is zero and was dropped",
        "a transcoder: it reconstructs the module's output",
    )


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_saelens_is_read(architecture, centred, tmp_path):
    p, x = draws(), tokens()
    more = {"k": K} if architecture == "topk" else {}
    folder = foreign.saelens(tmp_path, p, architecture, apply_b_dec_to_input=centred, **more)
    found = import_sae(folder)
    values = pre(p, x, centred=centred)
    latents = {
        "standard": lambda: values.relu(),
        "topk": lambda: topk(values),
        "jumprelu": lambda: jump(values, p["threshold"]),
        "gated": lambda: gated(p, x, values),
    }[architecture]()
    assert_same(found.sae, x, latents, decoded(p, latents))
    assert found.metadata["hook_name"] == "blocks.3.hook_resid_post"


def gated(p, x, values):
    """Return 1[π > 0]·ReLU(exp(r) ⊙ (π − b_enc) + b_mag)."""
    shared = values - p["b_enc"].double()
    magnitude = p["r_mag"].double().exp() * shared + p["b_mag"].double()
    return (values > 0) * magnitude.relu()


def test_saelens_topk_that_rescales_by_decoder_norms_is_read(tmp_path):
    p, x = draws(), tokens()
    sae = reseed.load_sae(
        foreign.saelens(tmp_path, p, "topk", k=K, rescale_acts_by_decoder_norm=True)
    )
    norms = p["W_dec"].double().norm(dim=1)
    latents = topk(pre(p, x, centred=True) * norms)
    assert_same(sae, x, latents, decoded(p, latents / norms))


def test_a_separate_activation_scale_of_saelens_is_folded_in(tmp_path):
    p, x, scale = draws(), tokens(scale=5.0), 0.2
    folder = foreign.saelens(
        tmp_path, p, "jumprelu", normalize_activations="expected_average_only_in"
    )
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.2}')
    sae = reseed.load_sae(folder)
    latents = jump(pre(p, x * scale, centred=True), p["threshold"])
    # Latents are in raw units.
    assert_same(sae, x, latents / scale, decoded(p, latents) / scale)


def test_saelens_before_version_6_is_read(tmp_path):
    p, x = draws(), tokens()
    p["finetuning_scaling_factor"] = torch.linspace(0.5, 2, F)
    folder = foreign.saelens(
        tmp_path, p, "standard", activation_fn_str="topk", activation_fn_kwargs={"k": K},
        normalize_activations=False, finetuning_scaling_factor=True, metadata=None,
        hook_point="blocks.1.hook_mlp_out",
    )  # fmt: skip
    found = import_sae(folder)
    latents = topk(pre(p, x, centred=True))
    assert_same(found.sae, x, latents, decoded(p, latents * p["finetuning_scaling_factor"]))
    assert found.metadata["hook_point"] == "blocks.1.hook_mlp_out"


@pytest.mark.parametrize(
    ("kind", "tensors", "formula", "name"),
    [
        (
            "AutoEncoder",
            lambda p: foreign.linear(p, encoder__bias="b_enc", bias="b_dec"),
            lambda p, x: pre(p, x, centred=True).relu(),
            "relu",
        ),
        (
            "AutoEncoderNew",
            lambda p: foreign.linear(p, encoder__bias="b_enc", decoder__bias="b_dec"),
            lambda p, x: pre(p, x, centred=False).relu(),
            "relu",
        ),
        (
            "GatedAutoEncoder",
            lambda p: foreign.linear(
                p, gate_bias="b_enc", mag_bias="b_mag", r_mag="r_mag", decoder_bias="b_dec"
            ),
            lambda p, x: gated(p, x, pre(p, x, centred=True)),
            "gated",
        ),
        (
            "JumpReluAutoEncoder",
            lambda p: foreign.matrices(p, "threshold"),
            lambda p, x: jump(pre(p, x, centred=False), p["threshold"]),
            "jumprelu",
        ),
        (
            "AutoEncoderTopK",
            lambda p: (
                foreign.linear(p, encoder__bias="b_enc", b_dec="b_dec")
                | {"k": torch.tensor(K), "threshold": torch.tensor(-1.0)}
            ),
            lambda p, x: topk(pre(p, x, centred=True)),
            "topk",
        ),
        (
            "BatchTopKSAE",
            lambda p: (
                foreign.linear(p, encoder__bias="b_enc", b_dec="b_dec")
                | {"k": torch.tensor(K), "threshold": torch.tensor(0.6)}
            ),
            lambda p, x: jump(pre(p, x, centred=True), torch.tensor(0.6)),
            "batch_topk",
        ),
        (
            "MatryoshkaBatchTopKSAE",
            lambda p: (
                foreign.matrices(p)
                | {"k": torch.tensor(K), "threshold": torch.tensor(0.6)}
                | {"group_sizes": torch.tensor([5, 10, 25])}
            ),
            lambda p, x: jump(pre(p, x, centred=True), torch.tensor(0.6)),
            "matryoshka",
        ),
    ],
)
def test_dictionary_learning_is_read(kind, tensors, formula, name, tmp_path):
    p, x = draws(), tokens()
    found = import_sae(foreign.dictionary(tmp_path, tensors(p), kind))
    latents = formula(p, x)
    assert_same(found.sae, x, latents, decoded(p, latents))
    assert (found.sae.config.name, found.metadata["layer"]) == (name, 3)
    if name == "matryoshka":
        assert found.sae.config.prefix_sizes(F) == (5, 15, 40)


def test_an_unset_threshold_lets_all_positive_latents_through(tmp_path):
    p, x = draws(), tokens()
    tensors = foreign.linear(p, encoder__bias="b_enc", b_dec="b_dec")
    tensors |= {"k": torch.tensor(K), "threshold": torch.tensor(-1.0)}
    found = import_sae(foreign.dictionary(tmp_path, tensors, "BatchTopKSAE"))
    latents = pre(p, x, centred=True).relu()
    assert_same(found.sae, x, latents, decoded(p, latents))
    assert found.notes == ("its threshold was never set: every positive latent is active",)


def test_an_intermediate_dictionary_is_read_by_its_file(tmp_path):
    p, x = draws(), tokens()
    tensors = foreign.linear(p, encoder__bias="b_enc", bias="b_dec")
    folder = foreign.dictionary(tmp_path, tensors, "AutoEncoder")
    (folder / "checkpoints").mkdir()
    other = draws(3)
    step = folder / "checkpoints" / "ae_100.pt"
    torch.save(foreign.linear(other, encoder__bias="b_enc", bias="b_dec"), step)
    latents = pre(other, x, centred=True).relu()
    assert_same(reseed.load_sae(step), x, latents, decoded(other, latents))


@pytest.mark.parametrize("layout", [foreign.gemma_scope, foreign.gemma_scope_2])
def test_gemma_scope_is_read(layout, tmp_path):
    p, x = draws(), tokens()
    folder = layout(tmp_path / "layer_12" / "width_16k" / "average_l0_82", p)
    found = import_sae(folder)
    latents = jump(pre(p, x, centred=False), p["threshold"])
    assert_same(found.sae, x, latents, decoded(p, latents))
    if layout is foreign.gemma_scope:
        assert found.metadata == {"layer": "12", "width": "16k", "average_l0": "82"}
        assert_same(reseed.load_sae(folder / "params.npz"), x, latents, decoded(p, latents))
    else:
        assert found.metadata["hf_hook_point_in"] == "model.layers.7.output"


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("act_fn", ["relu", "topk", "jumprelu"])
def test_llama_scope_takes_raw_activations(act_fn, weighed, tmp_path):
    p, x, norm = draws(), tokens(scale=7.0), 20.0
    folder = foreign.llama_scope(
        tmp_path,
        p,
        {"blocks.9.hook_resid_post": norm},
        act_fn=act_fn,
        sparsity_include_decoder_norm=weighed,
    )
    found = import_sae(folder)
    scale = D**0.5 / norm
    latents = _llama(p, x * scale, act_fn, weighed)
    # As in the library's own fold, latents are in raw units.
    assert_same(found.sae, x, latents / scale, decoded(p, latents) / scale)
    assert found.notes == ("the input scale 0.173205 is folded in: latents are in raw units",)


def _llama(p, x, act_fn, weighed):
    norms = p["W_dec"].double().norm(dim=1) if weighed else torch.ones(F, dtype=torch.float64)
    values = pre(p, x, centred=False) * norms
    chosen = {
        "relu": lambda: values.relu(),
        "topk": lambda: topk(values),
        "jumprelu": lambda: jump(values, p["threshold"]),
    }[act_fn]()
    return chosen / norms


@pytest.mark.parametrize("act_fn", ["topk", "jumprelu"])
def test_a_transcoder_of_llama_scope_has_separate_input_and_output_scales(act_fn, tmp_path):
    p, x = draws(), tokens(scale=7.0)
    points = {"blocks.9.ln2.hook_normalized": 20.0, "blocks.9.hook_mlp_out": 3.0}
    into, out = points
    folder = foreign.llama_scope(
        tmp_path, p, points, act_fn=act_fn, hook_point_in=into, hook_point_out=out
    )
    found = import_sae(folder)
    scale_in, scale_out = (D**0.5 / norm for norm in points.values())
    latents = _llama(p, x * scale_in, act_fn, True)
    assert_same(found.sae, x, latents / scale_in, decoded(p, latents) / scale_out)
    assert found.transcoder


def test_the_first_layout_of_llama_scope_is_read(tmp_path):
    p, x = draws(unit=True), tokens(scale=7.0)
    settings = {
        "d_model": D, "d_sae": F, "act_fn": "jumprelu", "jump_relu_threshold": 0.3,
        "dataset_average_activation_norm": {"in": 20.0, "out": 20.0},
        "hook_point_in": "blocks.9.hook_resid_post", "hook_point_out": "blocks.9.hook_resid_post",
    }  # fmt: skip
    foreign.write(tmp_path, "hyperparams.json", settings)
    tensors = foreign.linear(p, encoder__bias="b_enc", decoder__bias="b_dec")
    foreign.write(tmp_path / "checkpoints", None, None, final__safetensors=tensors)
    scale = D**0.5 / 20
    latents = jump(pre(p, x * scale, centred=False), torch.tensor(0.3))
    for source in (tmp_path, tmp_path / "checkpoints" / "final.safetensors"):
        sae = reseed.load_sae(source)
        assert_same(sae, x, latents / scale, decoded(p, latents) / scale)


def test_bfloat16_weights_are_read_exactly_into_float32(tmp_path):
    p, x = draws(), tokens()
    low = {name: tensor.bfloat16() for name, tensor in p.items()}
    sae = reseed.load_sae(foreign.saelens(tmp_path, low, "jumprelu", dtype="bfloat16"))
    latents = jump(pre(low, x, centred=True), low["threshold"])
    assert_same(sae, x, latents, decoded(low, latents))
    assert sae.W_enc.dtype == torch.float32
