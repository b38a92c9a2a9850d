from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from reseed.activations.found_model import FoundModel
from reseed.activations.hookpoints import Hookpoint, HookpointConfig
from reseed.activations.language_model import LanguageModel
from reseed.activations.model_source import PathModelConfig
from reseed.errors import ConfigError


@pytest.fixture(scope="module")
def resolved(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    return PathModelConfig(path=str(tiny_model), batch_sequences=2).resolve(
        tmp_path_factory.mktemp("c")
    )


def test_activations_equal_those_of_the_full_model(resolved, tiny_model: Path) -> None:
    tokens = torch.randint(2, 15, (5, 12), generator=torch.Generator().manual_seed(0))
    reference = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    with torch.no_grad():
        states = reference(tokens, output_hidden_states=True).hidden_states
    hooks = [Hookpoint("resid_post", 0), Hookpoint("resid_post", 1)]
    batches = list(LanguageModel(resolved).activations(tokens, hooks))
    assert [len(b[hooks[0]]) for b in batches] == [2, 2, 1]
    for hook in hooks:
        found = torch.cat([b[hook] for b in batches])
        assert torch.allclose(found, states[hook.layer + 1], atol=1e-5)


def test_nothing_runs_after_the_deepest_hookpoint(resolved) -> None:
    model = LanguageModel(resolved)
    ran: list[str] = []
    for name, module in model.model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    list(model.activations(torch.zeros(1, 4, dtype=torch.long), [Hookpoint("mlp_out", 1)]))
    assert "model.layers.1.self_attn" in ran
    assert not any(name.startswith(("model.layers.2", "model.norm", "lm_head")) for name in ran)
    # The hooks are removed afterwards: a second pass is like the first.
    assert (
        len(list(model.activations(torch.zeros(1, 4, dtype=torch.long), [Hookpoint("mlp_out", 0)])))
        == 1
    )


def test_each_width_is_computed_once(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    """Every job of a sweep asks for it."""
    found = PathModelConfig(path=str(tiny_model)).resolve(tmp_path)
    asked: list[Hookpoint] = []
    find = FoundModel._find_width

    def counting(model: FoundModel, hook: Hookpoint) -> int:
        asked.append(hook)
        return find(model, hook)

    monkeypatch.setattr(FoundModel, "_find_width", counting)
    hooks = [Hookpoint("module", 2, "model.layers.2.mlp.up_proj"), Hookpoint("attn_out", 0)]
    assert [found.d_in(hook) for hook in hooks * 3] == [32, 16] * 3
    assert asked == hooks


def test_a_module_pattern_takes_the_layer_and_typos_are_named(resolved) -> None:
    hook = Hookpoint.of(HookpointConfig(site="module", module="model.layers.*.mlp.up_proj"), 2)
    assert str(hook) == "model.layers.2.mlp.up_proj"
    assert (resolved.d_in(hook), resolved.d_in(Hookpoint("attn_out", 0))) == (32, 16)
    with pytest.raises(ConfigError) as caught:
        resolved.check(Hookpoint("module", 1, "model.layers.*.mpl"))
    assert str(caught.value) == (
        "`hookpoint.module`: the model has no module `model.layers.1.mpl`. "
        "Did you mean `model.layers.1.mlp`?"
    )
    with pytest.raises(ConfigError, match="`module` is required with"):
        HookpointConfig(site="module")
    with pytest.raises(ConfigError, match="`module` is only for"):
        HookpointConfig(site="mlp_out", module="x")


def test_a_missing_layer_is_refused(resolved) -> None:
    for layer in (3, -1):
        with pytest.raises(ConfigError) as caught:
            resolved.check(Hookpoint("resid_post", layer))
        assert str(caught.value) == (
            f"`layer` must be from 0 to 2: tiny-llama has 3 layers; got {layer}"
        )


def test_the_fingerprint_depends_on_the_weights_not_on_the_folder(
    tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_model, copy)
    prints = [
        PathModelConfig(path=str(p)).resolve(tmp_path).fingerprint for p in (tiny_model, copy)
    ]
    assert prints[0] == prints[1]
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values()))[0] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert PathModelConfig(path=str(copy)).resolve(tmp_path).fingerprint != prints[0]


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`path` must be an existing folder"):
        PathModelConfig(path=str(tmp_path / "none")).resolve(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no config\.json"):
        PathModelConfig(path=str(tmp_path)).resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"must hold weights as \*\.safetensors"):
        PathModelConfig(path=str(tmp_path)).resolve(tmp_path)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "layers", "width"), [("stories260K", 5, 64), ("TinyStories-656K", 2, 128)]
)
def test_real_models_give_their_own_logits(
    real_data: Path, tmp_path: Path, name: str, layers: int, width: int
) -> None:
    found = PathModelConfig(path=str(real_data / "models" / name)).resolve(tmp_path)
    hook = Hookpoint("resid_post", layers - 1)
    assert (found.num_layers, found.d_in(hook), found.context_length) == (layers, width, 512)
    tokens = torch.tensor([found.tokenizer("Once upon a time there was a dog.")["input_ids"]])
    model = LanguageModel(found)
    (batch,) = model.activations(tokens, [hook])
    with torch.no_grad():
        logits = model.model.lm_head(model.model.model.norm(batch[hook]))
        expected = model.model(tokens).logits
    assert torch.allclose(logits, expected, atol=1e-4)


def changed(tiny_model: Path, folder: Path, **config: object) -> Path:
    """Copy the tiny model, and change its configuration."""
    shutil.copytree(tiny_model, folder)
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"num_hidden_layers": 4}, "`model.layers.3.self_attn.q_proj.weight` is missing"),
        ({"intermediate_size": 33}, "has shape [32, 16], expected [33, 16]"),
        ({"vocab_size": 7}, "expected [7, 16]"),
        ({"model_type": "nosuch"}, "transformers cannot read its configuration"),
        ({"model_type": None}, "the model in"),
        ({"num_hidden_layers": 10**9}, "it must be from 1 to 10,000; got 1000000000"),
        ({"num_attention_heads": 0}, "cannot be used"),
    ],
)
def test_a_model_whose_files_do_not_fit_is_refused(
    config: dict[str, object], told: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = changed(tiny_model, tmp_path / "model", **config)
    with pytest.raises(ConfigError, match=re.escape(told)):
        PathModelConfig(path=str(folder)).resolve(tmp_path)


def test_weights_that_are_missing_are_not_drawn_at_random(tiny_model: Path, tmp_path: Path) -> None:
    folder = changed(tiny_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    found = PathModelConfig(path=str(folder)).resolve(tmp_path)
    save_file({n: t for n, t in weights.items() if "norm" not in n}, folder / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"the files lack 7 of its weights: model\.layers\.0\.input"
    ):
        _ = LanguageModel(found).model
    save_file({"other": weights["model.norm.weight"]}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no name of the model of config\.json"):
        PathModelConfig(path=str(folder)).resolve(tmp_path)


def test_a_checkpoint_without_unembedding_or_prefix_is_read(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = changed(tiny_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    kept = {n.removeprefix("model."): t for n, t in weights.items() if n != "lm_head.weight"}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    found = PathModelConfig(path=str(folder)).resolve(tmp_path)
    read = LanguageModel(found).model.state_dict()
    assert torch.equal(read["model.norm.weight"], weights["model.norm.weight"])


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({"weight_map": {"a": "../outside.safetensors"}}, "names ../outside.safetensors, no file"),
        ({"weight_map": {"a": "nosuch.safetensors"}}, "names nosuch.safetensors, no file"),
        ([], "is not an index of weights"),
        ({"weight_map": 3}, "is not an index of weights"),
    ],
)
def test_an_index_names_files_of_its_own_folder(
    index: object, told: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = changed(tiny_model, tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=told):
        PathModelConfig(path=str(folder)).resolve(tmp_path)


def test_a_model_without_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = changed(tiny_model, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    found = PathModelConfig(path=str(folder)).resolve(tmp_path)
    with pytest.raises(ConfigError, match="tokenizer"):
        _ = found.tokenizer
