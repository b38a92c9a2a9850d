"""Sites of many architectures: exact by laws that do not use the code that finds them."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from architectures import ALL, outcome, save_tiny
from reseed.activations.hookpoints import SITES, Hookpoint, HookpointConfig
from reseed.activations.intervention import intervene, logits
from reseed.activations.language_model import LanguageModel
from reseed.activations.model_source import PathModelConfig
from reseed.activations.places import Place, read, watch
from reseed.activations.sites import Sites, blocks_path, check_sites, find_sites
from reseed.errors import ConfigError

FAST = ("gemma2", "bloom", "granite", "falcon (parallel)")
SLOW = (
    "gpt2", "gpt_neox", "gptj", "gpt_neo", "opt", "opt (norm after)", "mixtral", "qwen3_moe",
    "deepseek_v3", "gpt_oss", "jamba", "jetmoe", "mamba", "mpt", "xglm", "olmo2", "nemotron_h",
    "falcon_h1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "sites"),
    [
        *((kind, ("attn_out", "resid_mid")) for kind in FAST),
        *(pytest.param(kind, SITES[:-1], marks=pytest.mark.slow) for kind in SLOW),
    ],
)
def test_a_site_is_exact_or_refused(
    kind: str, sites: tuple[str, ...], tiny_model: Path, tmp_path: Path
) -> None:
    model = LanguageModel(save_tiny(kind, tiny_model, tmp_path / "model"))
    for site in sites:
        said = outcome(model, site, 0 if site == "embed" else 1)
        assert said == "exact" or "has no such site: " in said, said


def test_every_architecture_of_the_tests_has_a_tiny_model() -> None:
    assert set(FAST + SLOW) <= set(ALL)
    assert len(ALL) >= 100


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        ("gemma2", ("the output of model.layers.1.post_attention_layernorm",
                    "the output of model.layers.1.post_feedforward_layernorm")),
        ("granite", ("the second term of addition 0 in model.layers.1",
                     "the second term of addition 1 in model.layers.1")),
        ("bloom", ("the output of transformer.h.1.self_attention.dense",
                   "the output of transformer.h.1.mlp.dense_4h_to_h")),
        ("opt", ("the output of model.decoder.layers.1.self_attn",
                 "the output of model.decoder.layers.1.fc2")),
    ],
)  # fmt: skip
def test_what_is_added_is_found_where_the_family_adds_it(
    kind: str, places: tuple[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    found = save_tiny(kind, tiny_model, tmp_path / "model")
    hooks = [Hookpoint("attn_out", 1), Hookpoint("mlp_out", 1)]
    assert tuple(str(found.place(hook)) for hook in hooks) == places
    # Runs of version 0.1 read the module's own output, so theirs is another signature.
    former = kind == "opt"
    assert [found.site_identity(hook) for hook in hooks] == [
        {} if former else {"place": places[0]}, {"place": places[1]}
    ]  # fmt: skip


def test_the_sites_of_a_pre_norm_block_are_its_sublayers_and_have_their_former_identity(
    tiny_model: Path, tmp_path: Path
) -> None:
    found = PathModelConfig(path=str(tiny_model)).resolve(tmp_path)
    assert found.place(Hookpoint("attn_out", 1)) == Place("model.layers.1.self_attn")
    assert found.place(Hookpoint("mlp_out", 1)) == Place("model.layers.1.mlp")
    assert found.place(Hookpoint("attn_z", 1)) == Place("model.layers.1.self_attn.o_proj", "input")
    for site in ("resid_post", "attn_out", "mlp_out"):
        assert found.site_identity(Hookpoint(site, 1)) == {}


class _Block(nn.Module):
    """A block that adds the MLP's output times ``factor`` to the stream, in one of two ways."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.attn, self.mlp, self.in_place = nn.Linear(4, 4), nn.Linear(4, 4), in_place

    def forward(self, x: Tensor) -> Tensor:
        middle = x + self.attn(x)
        added = self.mlp(middle)
        if self.in_place:
            added += middle
            return added
        return middle + 3 * added


class _Model(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(5, 4), nn.ModuleList([_Block(in_place)])

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("in_place", [False, True])
def test_a_scaled_or_overwritten_term_is_read_and_replaced_by_hand(in_place: bool) -> None:
    torch.manual_seed(0)
    model, tokens = _Model(in_place), torch.arange(4).view(1, 4)
    sites = find_sites(model, "blocks.0", tokens)
    block = model.blocks[0]
    with torch.no_grad():
        x = model.embed(tokens)
        middle = x + block.attn(x)
        added = block.mlp(middle) * (1 if in_place else 3)
        found = read(model, list(sites.places.values()), input_ids=tokens)
        assert torch.equal(found[sites.places["mlp_out"]], added)
        assert torch.equal(found[sites.places["resid_mid"]], middle)
        assert torch.equal(found[sites.places["resid_post"]], middle + added)
        ones = torch.ones_like(added)
        with watch(model, {sites.places["mlp_out"]: lambda x: ones}):
            assert torch.equal(model(tokens), middle + 1)
        assert torch.equal(ones, torch.ones_like(ones)), "the replacement must not be changed"
    assert check_sites(model, sites, tokens) == {}


def test_a_sum_that_does_not_hold_is_told_with_its_error() -> None:
    torch.manual_seed(0)
    model, tokens = _Model(False), torch.arange(4).view(1, 4)
    raw = Place("blocks.0.mlp")  # without the factor 3
    sites = find_sites(model, "blocks.0", tokens)
    wrong = Sites({**sites.places, "mlp_out": raw}, {}, sites.sums)
    with torch.no_grad():
        found = read(model, [raw], input_ids=tokens)[raw]
        told = check_sites(model, wrong, tokens)
    assert set(told) == {"resid_mid", "mlp_out"}
    rule, error = told["mlp_out"].rsplit(" ", 1)
    assert rule == "resid_mid + mlp_out must be resid_post, and differs by up to"
    assert float(error) == pytest.approx(float(2 * found.abs().max()), rel=0.01)


def test_a_site_whose_sum_does_not_hold_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch
) -> None:
    found = PathModelConfig(path=str(tiny_model)).resolve(tmp_path)
    sites = found.sites(1)
    places = {**sites.places, "mlp_out": Place("model.layers.1.mlp.gate_proj", "input")}
    monkeypatch.setitem(found._sites, 1, Sites(places, {}, sites.sums))
    model, tokens = LanguageModel(found), torch.arange(6).view(1, 6)
    with pytest.raises(
        ConfigError,
        match=r"^`hookpoint.site`=mlp_out: layer 1 of tiny-llama has no such site: resid_mid \+ "
        r"mlp_out must be resid_post, and differs by up to .*hookpoint=module",
    ):
        next(iter(model.activations(tokens, [Hookpoint("mlp_out", 1)])))
    next(iter(model.activations(tokens, [Hookpoint("attn_out", 1)])))


class _Attention(nn.Module):
    """Attention whose output, after a norm, is scaled by a gate of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o, self.norm = nn.Linear(4, 12), nn.Linear(4, 4), nn.LayerNorm(4)
        self.gate_in, self.gate_out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q @ k.transpose(-1, -2)).softmax(-1).tril()
        return self.norm(self.norm(self.o(weights @ v))) * self.gate_out(self.gate_in(x))


def test_a_tensor_that_mixes_no_positions_is_not_taken_for_z() -> None:
    torch.manual_seed(0)
    model, tokens = _Model(False), torch.arange(4).view(1, 4)
    model.blocks[0].attn = _Attention()
    with torch.no_grad():
        sites = find_sites(model, "blocks.0", tokens)
        assert sites.places["attn_z"] == Place("blocks.0.attn.gate_out", "input")
        told = check_sites(model, sites, tokens)
    assert told == {
        "attn_z": "the input of blocks.0.attn.gate_out does not depend on other positions"
    }


@pytest.mark.parametrize(
    "change", [lambda y: y.mul_(2), lambda y: nn.functional.silu(y, inplace=True)]
)
def test_a_tensor_is_read_as_it_was_at_its_place_whatever_else_is_read(change) -> None:
    """Models that scale embeddings, or activate, in place change a tensor that was read before."""

    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            return self.second(change(self.first(input_ids)))

    torch.manual_seed(0)
    model, x = Changing(), torch.randn(2, 3, 4)
    first, second = Place("first"), Place("second")
    with torch.no_grad():
        alone = read(model, [first], input_ids=x)[first]
        assert torch.equal(read(model, [first, second], input_ids=x)[first], alone)
        assert torch.equal(alone, model.first(x))
        ones = torch.ones(())
        with watch(model, {first: lambda y: ones.expand_as(y)}):
            model(input_ids=x)
    assert float(ones) == 1, "the replacement must not be changed"


def test_edits_of_one_place_are_applied_in_order_and_passes_that_end_early_leave_nothing(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = LanguageModel(PathModelConfig(path=str(tiny_model)).resolve(tmp_path))
    tokens = torch.arange(6).view(1, 6)
    out, same = Hookpoint("mlp_out", 1), Hookpoint("module", 1, "model.layers.1.mlp")
    zeroed = logits(model, tokens, {out: torch.zeros_like})
    assert torch.equal(logits(model, tokens, {out: torch.zeros_like, same: lambda x: x}), zeroed)
    middle, after = Hookpoint("resid_mid", 1), Hookpoint("mlp_out", 1)
    with intervene(model, {middle: torch.zeros_like}):
        found = [next(model.activations(tokens, [after]))[after] for _ in range(3)]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], next(model.activations(tokens, [after]))[after])


def test_a_layer_is_checked_without_the_interventions_around(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = LanguageModel(PathModelConfig(path=str(tiny_model)).resolve(tmp_path))
    tokens, stored = torch.arange(6).view(1, 6), torch.full((1, 6, 16), torch.nan)
    hook = Hookpoint("attn_out", 1)
    with intervene(model, {Hookpoint("resid_pre", 0): lambda x: stored}):
        assert bool(next(model.activations(tokens, [hook]))[hook].isnan().all())
    assert not bool(next(model.activations(tokens, [hook]))[hook].isnan().any())


def test_threads_that_share_a_loaded_model_read_the_same(tiny_model: Path, tmp_path: Path) -> None:
    model = LanguageModel(PathModelConfig(path=str(tiny_model)).resolve(tmp_path))
    tokens, hooks = torch.arange(6).view(1, 6), [Hookpoint("mlp_out", layer) for layer in range(3)]
    alone = [next(model.activations(tokens, [hook]))[hook] for hook in hooks]
    with ThreadPoolExecutor(6) as pool:
        found = pool.map(lambda hook: next(model.activations(tokens, [hook]))[hook], hooks * 10)
        assert all(torch.equal(x, y) for x, y in zip(found, alone * 10, strict=True))


@pytest.mark.parametrize(
    ("kind", "module", "told"),
    [
        ("phi", "model.layers.*.resid_dropout", "must be computed once; in one forward pass it is "
         "computed 2 times"),
        ("qwen3_moe (one expert)", "model.layers.*.mlp.experts.act_fn", "the rows of the output of "
         r"model\.layers\.1\.mlp\.experts\.act_fn do not follow the sequences of the batch"),
    ],
)  # fmt: skip
def test_a_module_without_one_vector_for_each_token_is_refused(
    kind: str, module: str, told: str, tiny_model: Path, tmp_path: Path
) -> None:
    found = save_tiny(kind, tiny_model, tmp_path / "model")
    hook = Hookpoint("module", 1, module)

    def use() -> None:
        found.d_in(hook)
        list(LanguageModel(found).activations(torch.arange(6).view(1, 6), [hook]))

    with pytest.raises(ConfigError, match=told):
        use()


def test_blocks_that_cannot_be_told_apart_are_refused() -> None:
    model = _Model(False)
    model.others = nn.ModuleList([nn.Linear(4, 4)])
    text = SimpleNamespace(num_hidden_layers=1)
    model.config = SimpleNamespace(get_text_config=lambda: text)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"cannot tell which modules .* blocks: blocks, others"):
        blocks_path(model)


def test_the_input_of_a_module_is_read_and_replaced(tiny_model: Path, tmp_path: Path) -> None:
    config = HookpointConfig(site="module", module="model.layers.*.mlp.down_proj", side="input")
    hook = Hookpoint.of(config, 2)
    found = PathModelConfig(path=str(tiny_model)).resolve(tmp_path)
    assert (str(hook), found.d_in(hook)) == ("model.layers.2.mlp.down_proj.input", 32)
    model, tokens = LanguageModel(found), torch.arange(6).view(1, 6)
    mlp = model.model.get_submodule("model.layers.2.mlp")
    hooks = [hook, Hookpoint("mlp_out", 2)]
    (there,) = model.activations(tokens, hooks)
    with torch.inference_mode():
        assert torch.equal(mlp.down_proj(there[hook]), there[hooks[1]])
        with intervene(model, {hook: torch.zeros_like}):
            without = logits(model, tokens)
    assert torch.equal(without, logits(model, tokens, {hooks[1]: torch.zeros_like}))
    with pytest.raises(ConfigError, match=r"`side`=input is only for hookpoint\.site=module; got"):
        HookpointConfig(site="mlp_out", side="input")


def test_threads_that_share_a_model_find_the_same_sites(tiny_model: Path, tmp_path: Path) -> None:
    alone = PathModelConfig(path=str(tiny_model)).resolve(tmp_path)
    expected = [alone.sites(layer) for layer in range(3)]
    for _ in range(5):
        shared = replace(alone)  # without what `alone` has found
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(shared.sites, [0, 1, 2] * 2))
        assert found == expected * 2


def test_embeddings_precede_layer_0(tiny_model: Path, tmp_path: Path) -> None:
    found = PathModelConfig(path=str(tiny_model)).resolve(tmp_path)
    assert found.d_in(Hookpoint("embed", 0)) == 16
    with pytest.raises(
        ConfigError, match="`layer` must be 0 with hookpoint=embed, which precedes layer 0; got 2"
    ):
        found.check(Hookpoint("embed", 2))


@pytest.mark.parametrize(
    ("kind", "attention"), [("llama", "sdpa"), ("bloom", "eager"), ("gemma2", "eager")]
)
def test_attention_is_what_the_architecture_supports(
    kind: str, attention: str, tiny_model: Path, tmp_path: Path
) -> None:
    found = save_tiny(kind, tiny_model, tmp_path / "model")
    assert found.config.attention == attention
    assert found.config.signed()["attention"] == attention
    assert LanguageModel(found).model.config._attn_implementation == attention
    if attention == "eager":
        with pytest.raises(ConfigError, match=re.escape("`attention` must be auto or eager: ")):
            PathModelConfig(path=str(tmp_path / "model"), attention="sdpa").resolve(tmp_path)
