"""A model folder that holds no whole, sound causal language model is refused before training."""

from __future__ import annotations

import json
import logging
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from reseed.activations import model_source
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.intervention import logits, unembedding
from reseed.activations.language_model import LanguageModel
from reseed.activations.model_files import (
    Fit,
    NoUnembedding,
    check_architecture,
    check_fit,
    check_folder,
    check_tokenizer,
    load_trained,
    read_light,
)
from reseed.activations.model_source import PathModelConfig, ResolvedModel
from reseed.activations.source import ResolvedSource
from reseed.cli.hydra_app import CommandLine
from reseed.errors import ConfigError
from reseed.evaluate.base import RunSource
from reseed.evaluate.faithfulness import FaithfulnessConfig
from reseed.experiment import experiment_from
from reseed.experiment.resolve import find_model

TOKENS = torch.randint(2, 15, (3, 9), generator=torch.Generator().manual_seed(0))
HOOK = Hookpoint("resid_post", 1)
NORM = "model.norm.weight"


def resolved(folder: Path, cache: Path, **settings: Any) -> ResolvedModel:
    return PathModelConfig(path=str(folder), **settings).resolve(cache)


def activations(found: ResolvedModel) -> torch.Tensor:
    return torch.cat([x[HOOK] for x in LanguageModel(found).activations(TOKENS, [HOOK])])


def with_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Make a function that changes the tensors of a model folder."""

    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return apply


def with_config(**values: Any) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def with_index(weight_map: dict[str, str]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        index = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)

    return apply


def first_value(name: str, value: float) -> Callable[[Path], object]:
    return with_weights(lambda weights: weights[name].view(-1)[:1].fill_(value))


QUANTISED = {"bitsandbytes": {"load_in_4bit": True}, "gptq": {"bits": 4}, "awq": {"bits": 4}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (first_value("model.layers.2.mlp.up_proj.weight", float("nan")),
         "the weight `model.layers.2.mlp.up_proj.weight` in {folder}/model.safetensors has NaN or "
         "infinite values"),
        (first_value(NORM, float("-inf")), f"the weight `{NORM}` in "),
        (with_weights(lambda w: w.update({NORM: w[NORM].to(torch.bfloat16).fill_(torch.inf)})),
         f"the weight `{NORM}` in "),
        (with_weights(lambda w: w.pop(NORM)), f"do not fit config.json: `{NORM}` is missing"),
        (with_weights(lambda w: [w.pop(n) for n in list(w) if "layernorm" in n]),
         "do not fit config.json: `model.layers.0.input_layernorm.weight` is missing"),
        (with_weights(lambda w: w.update({NORM: torch.ones(3)})), "has shape [3], expected [16]"),
        (with_config(num_hidden_layers=8), "`model.layers.3.self_attn.q_proj.weight` is missing"),
        (with_index({NORM: "model.safetensors", "nosuch": "model.safetensors"}),
         "names `nosuch`, which is not in model.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
         "transformers cannot load its weights"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (with_config(transformers_weights="../other.safetensors"),
         "must name one of its *.safetensors; got '../other.safetensors'"),
        (with_config(architectures=["LlamaForSequenceClassification"]),
         "must be a causal language model; {folder} holds LlamaForSequenceClassification "
         "(model_type llama)"),
        *((with_config(quantization_config={"quant_method": method, **values}),
           f"are quantised ({method}), and cannot be loaded here: ")
          for method, values in QUANTISED.items()),
    ],
)  # fmt: skip
def test_a_folder_with_a_fault_is_refused_before_training(
    change: Callable[[Path], object], told: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    change(folder)
    with pytest.raises(ConfigError, match=re.escape(told.format(folder=folder))) as caught:
        resolved(folder, tmp_path)
    assert str(caught.value).startswith("`path`")
    assert "\n" not in str(caught.value)


CAUSAL = "must be a causal language model; FOLDER holds "
LATER = ", whose tokens attend to later ones"


@pytest.mark.parametrize(
    ("family", "values", "told"),
    [
        ("bert", {"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM (model_type bert)"),
        ("bert", {"architectures": ["BertModel"]}, f"BertModel (model_type bert){LATER}"),
        ("bert", {}, f"bert (model_type bert){LATER}"),
        ("xlm", {"architectures": ["XLMWithLMHeadModel"]}, "XLMWithLMHeadModel (model_type xlm)"),
        ("xlnet", {"architectures": ["XLNetLMHeadModel"]}, "XLNetLMHeadModel (model_type xlnet)"),
        ("t5", {"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ("bart", {}, "bart (model_type bart)"),
        ("bart", {"architectures": ["BartForConditionalGeneration"]}, "BartForConditional"),
        ("pegasus", {}, "pegasus (model_type pegasus)"),
        ("vit", {"architectures": ["ViTModel"]}, "ViTModel (model_type vit)"),
        ("clip", {}, "clip (model_type clip)"),
        ("whisper", {"architectures": ["WhisperForConditionalGeneration"]}, "WhisperForCond"),
        ("gpt2", {"architectures": ["GPT2ForSequenceClassification"]}, "GPT2ForSequenceCl"),
        ("bert", {"architectures": ["BertLMHeadModel"], "is_decoder": True}, None),
        ("llama", {"architectures": ["LlamaModel"]}, None),
        ("llama", {"architectures": ["LLaMAForCausalLM"]}, None),
        ("gpt2", {}, None),
        ("gpt_neox", {"architectures": ["GPTNeoXForCausalLM"]}, None),
        ("gemma3", {"architectures": ["Gemma3ForConditionalGeneration"]}, None),
    ],
)  # fmt: skip
def test_only_causal_language_models_pass(
    family: str, values: dict[str, Any], told: str | None
) -> None:
    config = AutoConfig.for_model(family, **values)
    if told is None:
        check_architecture(config, Path("FOLDER"))
        return
    with pytest.raises(ConfigError, match=re.escape(CAUSAL + told)):
        check_architecture(config, Path("FOLDER"))


FAMILIES = (
    "gpt2", "gptj", "gpt_neox", "opt", "bloom", "mistral", "mixtral", "qwen3_moe", "gemma2", "phi",
    "stablelm", "starcoder2", "mpt", "mamba", "rwkv", "cohere", "deepseek_v3", "jamba", "gpt_oss",
)  # fmt: skip
SMALL = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "intermediate_size": 64, "ffn_dim": 64,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_attention_heads": 4, "n_head": 4,
    "n_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_intermediate_size": 32, "vocab_size": 64, "word_embed_proj_dim": 32,
    "max_position_embeddings": 64, "n_positions": 64, "q_lora_rank": None, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "rotary_dim": 4, "n_group": 1,
    "topk_group": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "expand": 2,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_many_families_pass_with_and_without_unembedding(
    family: str, tmp_path: Path
) -> None:
    default = AutoConfig.for_model(family)
    config = AutoConfig.for_model(
        family, **{name: value for name, value in SMALL.items() if hasattr(default, name)}
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "base")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, unembedding_there in (("whole", True), ("base", tied)):
        check_folder(tmp_path / name)
        check_architecture(read_light(AutoConfig, tmp_path / name), tmp_path / name)
        fit = check_fit(tmp_path / name)
        loaded, again = load_trained(tmp_path / name, torch.float32, "eager")
        assert fit == again == Fit([], {}, [], unembedding_there)
        assert isinstance(loaded.get_output_embeddings(), NoUnembedding) != unembedding_there
        for weight, tensor in loaded.named_parameters():
            assert torch.equal(tensor, model.get_parameter(weight)), weight


class Vocabulary:
    """A tokenizer as `check_tokenizer` sees it."""

    def __init__(self, ids: dict[str, int], special: list[int]) -> None:
        self.ids, self.all_special_ids = ids, special

    def get_vocab(self) -> dict[str, int]:
        return self.ids


def test_a_tokenizer_has_no_ordinary_id_beyond_the_embedding() -> None:
    check_tokenizer(Vocabulary({"a": 0, "b": 1, "<image>": 2}, [2]), 2, Path("FOLDER"))
    with pytest.raises(ConfigError) as caught:
        check_tokenizer(Vocabulary({"a": 0, "b": 1, "c": 2}, [0]), 2, Path("FOLDER"))
    assert str(caught.value) == (
        "`model`: the tokenizer in FOLDER does not fit the model: the id of 'c' is 2, and the "
        "embedding has 2 rows"
    )


def test_a_tokenizer_that_is_too_large_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["more"] = 1_000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="the id of 'more' is 1000, and the embedding has"):
        _ = resolved(folder, tmp_path).tokenizer


def test_unused_tensors_are_reported_once(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    with_config(num_hidden_layers=2)(folder)
    found = resolved(folder, tmp_path)
    assert torch.equal(activations(found), activations(resolved(tiny_model, tmp_path)))
    resolved(folder, tmp_path)
    out = capsys.readouterr().out
    assert out.count(f"{folder}: the model does not use 9 tensors of its files: ") == 1
    assert "model.layers.2.input_layernorm.weight" in out


def test_a_model_without_unembedding_gives_activations_and_no_logits(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    with_weights(lambda weights: weights.pop("lm_head.weight"))(folder)
    found, whole = resolved(folder, tmp_path), resolved(tiny_model, tmp_path)
    assert torch.equal(activations(found), activations(whole))
    assert (found.has_unembedding, whole.has_unembedding) == (False, True)
    assert unembedding(LanguageModel(whole)) is not None
    assert unembedding(LanguageModel(found)) is None
    told = re.escape(f"{folder} holds no unembedding. Its activations are exact, but it cannot pre")
    with pytest.raises(ConfigError, match=told):
        logits(LanguageModel(found), TOKENS)
    with pytest.raises(ConfigError, match=rf"evaluation=faithfulness needs .*; {told}"):
        FaithfulnessConfig().check(RunSource(found, "tiny", "none"))
    FaithfulnessConfig().check(RunSource(whole, "tiny", "none"))
    FaithfulnessConfig().check(RunSource(found.with_random_weights(), "tiny", "random_weights"))


def test_a_weight_that_overflows_in_the_models_dtype_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    first_value(NORM, 1e30)(folder)
    assert activations(resolved(folder, tmp_path, dtype="bfloat16")).isfinite().all()
    with pytest.raises(ConfigError, match=rf"`{NORM}` has NaN or infinite values in float16"):
        _ = LanguageModel(resolved(folder, tmp_path, dtype="float16")).model


def test_a_wider_checkpoint_is_cast(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    with_weights(lambda w: w.update({n: t.double() for n, t in w.items()}))(folder)
    found = activations(resolved(folder, tmp_path))
    assert found.dtype == torch.float32
    assert torch.equal(found, activations(resolved(tiny_model, tmp_path)))


def test_large_weights_are_read_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_source, "_LARGE", 0)
    read: list[Path] = []
    scan = model_source._scan
    monkeypatch.setattr(model_source, "_scan", lambda path: (read.append(path), scan(path))[1])
    prints = {resolved(tiny_model, tmp_path).fingerprint for _ in range(2)}
    assert prints == {model_source.hash_files([tiny_model / n for n in
                                               ("config.json", "model.safetensors")])}  # fmt: skip
    assert len(read) == 1
    # Records of earlier versions do not say whether the weights are finite.
    (record,) = (tmp_path / "fingerprints").iterdir()
    model_source.write_record(record, {"sha256": "0" * 32, "files": []})
    assert resolved(tiny_model, tmp_path).fingerprint in prints
    assert len(read) == 2


def test_files_that_change_within_a_process_are_read_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    line = ["model=path", f"model.path={folder}", "dataset.context_length=16"]
    with CommandLine("run", line).composer() as composed:
        experiment, runtime = experiment_from(composed(line))

    def find(surrogate: str = "none") -> ResolvedSource:
        return find_model(replace(experiment, surrogate=surrogate), runtime)

    first, random = find(), find("random_weights")
    assert find() is first
    first_value(NORM, 0.5)(folder)
    second = find()
    assert second.fingerprint != first.fingerprint
    assert find() is second
    known = {"none": second.fingerprints, "random_weights": random.fingerprints}
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": "x"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for surrogate, prints in known.items():
        again = find(surrogate).fingerprints
        assert again["model"] == prints["model"]
        assert again["tokenizer"] != prints["tokenizer"]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16,
              torch.float8_e5m2, torch.float8_e4m3fn]
)  # fmt: skip
def test_the_scan_finds_what_is_not_finite(dtype: torch.dtype, tmp_path: Path) -> None:
    """Every finite value passes, the largest and the subnormal, too."""
    about = torch.finfo(dtype)
    fine = torch.tensor([0.0, -0.0, about.max, about.min, about.tiny / 2, 1.0], dtype=torch.double)
    tensors = {"fine": fine.to(dtype), "empty": torch.zeros(0, dtype=dtype)}
    tensors |= {"nan": torch.tensor([1.0, torch.nan]).to(dtype),
                "int": torch.full((4,), -1, dtype=torch.int64)}  # fmt: skip
    expected = ["nan"]
    if dtype != torch.float8_e4m3fn:  # it has no infinity
        tensors["infinite"] = torch.tensor([1.0, -torch.inf]).to(dtype)
        expected.append("infinite")
    save_file(tensors, tmp_path / "x.safetensors")
    digest, wrong = model_source._scan(tmp_path / "x.safetensors")
    assert set(wrong) == set(expected)
    assert (
        digest.hex()
        == model_source.hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3),
    max_leaves=5,
)  # fmt: skip
FUZZ = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def refused_or_usable(folder: Path, cache: Path) -> None:
    try:
        found = resolved(folder, cache)
        assert activations(found).shape == (*TOKENS.shape, found.d_in(HOOK))
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


@pytest.mark.slow
@given(data=st.data())
@FUZZ
def test_any_value_in_config_json_is_refused_or_usable(
    data: st.DataObject, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model", dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    key = data.draw(st.sampled_from([*config, "quantization_config", "auto_map", "sliding_window"]))
    with_config(**{key: data.draw(JSON)})(folder)
    refused_or_usable(folder, tmp_path)


@pytest.mark.slow
@given(data=st.data())
@FUZZ
def test_any_header_of_safetensors_is_refused_or_usable(
    data: st.DataObject, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model", dirs_exist_ok=True)
    content = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(list(header)))
    if data.draw(st.booleans()):
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        header[name] = {**header[name], field: data.draw(JSON)}
    else:
        header[name] = data.draw(JSON)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + content[8 + length :]
    )
    refused_or_usable(folder, tmp_path)


def test_the_reports_of_transformers_stay_silent(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    with_weights(lambda weights: weights.pop("lm_head.weight"))(folder)
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        _ = LanguageModel(resolved(folder, tmp_path)).model
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    captured = capfd.readouterr()
    assert (captured.out, captured.err, logged) == ("", "", [])
