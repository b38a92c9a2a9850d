"""Tiny random models of many architectures of transformers, and what must hold of their sites."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.intervention import intervene, logits
from reseed.activations.language_model import LanguageModel
from reseed.activations.model_source import PathModelConfig, ResolvedModel
from reseed.activations.sites import blocks_path
from reseed.errors import ConfigError

WIDTH, LAYERS, VOCABULARY = 32, 3, 40
COMMON = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": VOCABULARY, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Settings that most architectures have, under the names that transformers maps to their own."""
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "head_dim": 4,
}  # fmt: skip
OLD = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 4}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "codegen": ("codegen", OLD),
    "deepseek_v2": ("deepseek_v2", LATENT | {"first_k_dense_replace": 1, "n_shared_experts": 1}),
    "deepseek_v3": ("deepseek_v3", LATENT | {"first_k_dense_replace": 1, "n_shared_experts": 1}),
    "falcon_h1": (
        "falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
                      "mamba_n_groups": 1, "mamba_chunk_size": 8}
    ),
    "falcon (alibi)": ("falcon", {"head_dim": None, "parallel_attn": False, "alibi": True}),
    "falcon (new decoder)": (
        "falcon", {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "falcon (parallel)": ("falcon", {"head_dim": None}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global"], LAYERS]]}),
    "gpt_neox (sequential)": ("gpt_neox", {"use_parallel_residual": False}),
    "gptj": ("gptj", OLD),
    "mamba2": ("mamba2", {"expand": 2, "num_heads": 8, "state_size": 8, "n_groups": 1}),
    "minicpm3": ("minicpm3", LATENT),
    "opt (norm after)": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": WIDTH}),
    "qwen3_moe (one expert)": ("qwen3_moe", {"num_experts_per_tok": 1}),
    "stablelm (parallel)": ("stablelm", {"use_parallel_residual": True}),
}  # fmt: skip
"""Variants that need settings of their own."""
KINDS = (
    "afmoe", "apertus", "arcee", "aria_text", "bailing_hybrid", "biogpt", "bitnet", "bloom",
    "cohere", "cohere2", "cohere2_moe", "ctrl", "cwm", "diffllama", "doge", "ernie4_5",
    "ernie4_5_moe", "exaone4", "exaone_moe", "falcon_mamba", "flex_olmo", "gemma",
    "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt-sw3", "gpt2", "gpt_bigcode",
    "gpt_neox", "gpt_neox_japanese", "gpt_oss", "granite", "granitemoe", "granitemoeshared",
    "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hyperclovax", "internlm3", "jais2", "jamba",
    "jetmoe", "laguna", "lfm2", "llama", "llama4_text", "mamba", "mimo_v2_flash",
    "minimax", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral",
    "modernbert-decoder", "moshi", "mpt", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2",
    "olmo3", "olmo_hybrid", "olmoe", "openai-gpt", "opt", "persimmon", "phi", "phi3", "phimoe",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_moe", "qwen3_next", "recurrent_gemma",
    "rwkv", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "xglm",
    "xlstm",
)  # fmt: skip
ALL = sorted([*KINDS, *VARIANTS])


def tiny_config(kind: str) -> Any:
    """Return the configuration of a tiny model of an architecture."""
    from transformers import CONFIG_MAPPING

    kind, own = VARIANTS.get(kind, (kind, {}))
    build = CONFIG_MAPPING[kind]
    known = {f.name for f in dataclasses.fields(build)} | set(inspect.signature(build).parameters)
    names = getattr(build, "attribute_map", {})
    given = {**COMMON, **EXPERTS, **own}
    found = {names.get(name, name): value for name, value in given.items()}
    kept = {name: v for name, v in found.items() if name in known or name in own}
    return build(**{name: v for name, v in kept.items() if v is not None})


def save_tiny(kind: str, tokenizer: Path, folder: Path) -> ResolvedModel:
    """Save a tiny model with random weights, and find it as a user would."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind), attn_implementation="eager")
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.1 * torch.randn_like(weights)  # some are zero at the start
    model.save_pretrained(folder)
    for file in tokenizer.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return PathModelConfig(path=str(folder)).resolve(folder.parent / "cache")


def outcome(model: LanguageModel, site: str, layer: int) -> str:
    """Return ``exact``, or the reason for which the site is refused."""
    found = model.resolved
    hook = Hookpoint(site, layer)
    tokens = torch.arange(3, 17).reshape(2, 7)
    try:
        found.check(hook)
        width = found.d_in(hook)
        (there,) = model.activations(tokens, [hook])
    except ConfigError as error:
        return str(error)
    assert there[hook].shape == (2, 7, width)
    # Models change tensors in place: the value must not depend on what else is read.
    end = Hookpoint("resid_post", found.num_layers - 1)
    (together,) = model.activations(tokens, [hook, end])
    assert torch.equal(together[hook], there[hook])
    check(model, hook, there[hook], tokens)
    return "exact"


def check(model: LanguageModel, hook: Hookpoint, there: Tensor, tokens: Tensor) -> None:
    """Check what a site must be, without the code that finds it.

    Raises:
        AssertionError: it is something else.
    """
    same = {hook: lambda x: x.clone()}
    with torch.inference_mode():
        assert torch.equal(logits(model, tokens, same), logits(model, tokens))
        own = model.model(input_ids=tokens, use_cache=False, output_hidden_states=True)
    if hook.site in ("resid_pre", "resid_post"):
        states = list(own.hidden_states)
        start, _ = _edited(model, 0, tokens)
        if not torch.equal(states[0], start):  # Mamba and RWKV: states[layer] is after the layer
            states.insert(0, start)
        at = hook.layer + (hook.site == "resid_post")
        # The last one, resid_post of the last layer, is after the final norm.
        assert at == model.resolved.num_layers or torch.equal(there, states[at])
    elif hook.site == "embed":
        table = model.model.get_input_embeddings()
        with torch.inference_mode():
            assert torch.equal(there, table(tokens))
    elif hook.site in _LAWS:
        _LAWS[hook.site](model, hook.layer, tokens)


def _edited(
    model: LanguageModel, layer: int, tokens: Tensor, *zeroed: str
) -> tuple[Tensor, Tensor]:
    """Return the input and output of a block with some sites set to zero."""
    seen: list[Tensor] = []
    block = model.model.get_submodule(f"{blocks_path(model.model)}.{layer}")

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [*args, *kwargs.values()]
        seen.append(next(x for x in given if isinstance(x, Tensor)).clone())

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen.append((output if isinstance(output, Tensor) else output[0]).clone())

    handles = [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after),
    ]
    edits = {Hookpoint(site, layer): torch.zeros_like for site in zeroed}
    with torch.inference_mode(), intervene(model, edits):
        model.model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen[0], seen[1]


def _has(model: LanguageModel, site: str, layer: int) -> bool:
    try:
        model.place(Hookpoint(site, layer))
    except ConfigError:
        return False
    return True


def _mixes(model: LanguageModel, layer: int, tokens: Tensor, *zeroed: str) -> bool:
    """Return whether what the block adds at a position depends on what it reads at others."""

    def added() -> Tensor:
        start, end = _edited(model, layer, tokens, *zeroed)
        return end - start

    return _depends(added, model, Hookpoint("resid_pre", layer))


def _reading(model: LanguageModel, hook: Hookpoint, tokens: Tensor) -> Tensor:
    (there,) = model.activations(tokens, [hook])
    return there[hook]


def _depends(read: Callable[[], Tensor], model: LanguageModel, hook: Hookpoint) -> bool:
    """Return whether the last position of a tensor depends on others of the activations."""
    found = []
    for scale in (0.0, 1.0):
        with torch.inference_mode(), intervene(model, {hook: partial(_moved, scale)}):
            found.append(read()[:, -1])
    # Experts receive the tokens of all positions at once, which changes the rounding.
    return bool((found[0] - found[1]).abs().max() > 1e-4 * found[0].abs().max())


def _moved(scale: float, x: Tensor) -> Tensor:
    moved = x.clone()
    moved[:, :-1] += scale * torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
    return moved


def _added_by_both(model: LanguageModel, layer: int, tokens: Tensor) -> None:
    """Without both, a block returns its input; of the two, only attention mixes positions."""
    both = [site for site in ("attn_out", "mlp_out") if _has(model, site, layer)]
    # RWKV's MLP reads the position before, too.
    alone = model.model.config.model_type != "rwkv"
    if len(both) == 2:
        start, end = _edited(model, layer, tokens, *both)
        assert torch.equal(start, end)
        assert not alone or not _mixes(model, layer, tokens, "attn_out")
    if "mlp_out" in both and alone:
        hook = Hookpoint("mlp_out", layer)
        added = partial(_reading, model, hook, tokens)
        sited = _has(model, "resid_mid", layer)
        before = Hookpoint("resid_mid" if sited else "resid_pre", layer)
        assert not _depends(added, model, before), "the MLP works on each position by itself"
    if "attn_out" in both:
        added = partial(_reading, model, Hookpoint("attn_out", layer), tokens)
        assert _depends(added, model, Hookpoint("resid_pre", layer))


def _between(model: LanguageModel, layer: int, tokens: Tensor) -> None:
    """The stream between attention and MLP is the block's output without the MLP."""
    hooks = [Hookpoint(site, layer) for site in ("resid_mid", "resid_pre")]
    (there,) = model.activations(tokens, hooks)
    if _has(model, "mlp_out", layer):
        _, end = _edited(model, layer, tokens, "mlp_out")
        assert torch.equal(there[hooks[0]], end)
    edits = {hooks[0]: lambda x: there[hooks[1]]}
    with torch.inference_mode(), intervene(model, edits):
        _, end = _edited(model, layer, tokens)
    if _has(model, "attn_out", layer):
        assert torch.equal(end, _edited(model, layer, tokens, "attn_out")[1])


def _before_projection(model: LanguageModel, layer: int, tokens: Tensor) -> None:
    """Without z, attention adds the same at all positions."""
    if _has(model, "attn_out", layer):
        hook, z = Hookpoint("attn_out", layer), Hookpoint("attn_z", layer)
        with torch.inference_mode(), intervene(model, {z: torch.zeros_like}):
            (there,) = model.activations(tokens, [hook])
        assert torch.allclose(there[hook], there[hook][:1, :1].expand_as(there[hook]))


_LAWS: dict[str, Callable[[LanguageModel, int, Tensor], None]] = {
    "attn_out": _added_by_both,
    "mlp_out": _added_by_both,
    "resid_mid": _between,
    "attn_z": _before_projection,
}
