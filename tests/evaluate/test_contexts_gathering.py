"""Stored firings (the highest, and a uniform draw), and the directions of latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from reseed.activations.intervention import unembedding
from reseed.activations.language_model import LanguageModel
from reseed.activations.model_source import PathModelConfig
from reseed.evaluate.context_gathering import (
    ContextGatherer,
    Firings,
    _mixed,
    lens,
    neighbours,
    rank_randomly,
)
from reseed.sae.topk import TopKConfig

CONTEXT, F = 8, 12


def random_firings(sequences: int, seed: int) -> torch.Tensor:
    """Make dense latents [sequences, context, F] of small integers, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randint(0, 4, (sequences, CONTEXT, F), generator=generator).float()
    return dense * (torch.rand(dense.shape, generator=generator) < 0.4)


def gathered(dense: torch.Tensor, sizes: list[int], backwards: bool = False) -> ContextGatherer:
    """Gather contexts from blocks of these numbers of sequences."""
    sae = TopKConfig(num_latents=F, k=1).build(4, torch.Generator())
    found = ContextGatherer(sae, top=3, reservoir=5, reach=2, seed=0)
    blocks, first = [], 0
    for part in dense.split(sizes):
        flat = part.reshape(-1, F).t().contiguous()
        latent, place = flat.nonzero(as_tuple=True)
        blocks.append(Firings(latent, place, flat[latent, place], first * CONTEXT, CONTEXT))
        first += len(part)
    for block in reversed(blocks) if backwards else blocks:
        found.count(block)
    return found


def shown(found: ContextGatherer) -> list:
    out = []
    for kept in (found.top, found.drawn):
        order = kept.in_order(slice(None))
        out += [
            kept.counts().tolist(),
            kept.position.gather(1, order).tolist(),
            kept.window[torch.arange(F)[:, None], order].tolist(),
        ]
    return [*out, found.firing.tolist(), found.total.tolist()]


def test_blocks_of_any_size_give_the_same_contexts_and_ties_go_by_position() -> None:
    dense = random_firings(40, 0)
    whole = gathered(dense, [40])
    assert shown(whole) == shown(gathered(dense, [1] * 40)) == shown(gathered(dense, [7, 20, 13]))
    assert shown(whole) == shown(gathered(dense, [7, 20, 13], backwards=True))
    order = whole.top.in_order(slice(None))
    for j in range(F):
        best = [(float(s[:, j].max()), i * CONTEXT + int(s[:, j].argmax())) for i, s in
                enumerate(dense) if s[:, j].any()]  # fmt: skip
        expected = sorted(best, key=lambda pair: (-pair[0], pair[1]))[:3]
        places = order[j, : len(expected)]
        assert whole.top.position[j, places].tolist() == [position for _, position in expected]
        assert whole.top.value[j, places].tolist() == [value for value, _ in expected]


def test_few_firings_are_all_kept_and_empty_slots_are_not_counted() -> None:
    dense = torch.zeros(3, CONTEXT, F)
    dense[1, 4, 2] = dense[1, 6, 2] = dense[2, 0, 2] = 1.5
    found = gathered(dense, [1, 1, 1])
    assert found.top.counts().tolist() == [0, 0, 2, *[0] * (F - 3)]
    drawn = found.drawn.position[2][found.drawn.in_order(slice(None))[2]]
    assert drawn[: found.drawn.counts()[2]].tolist() == [12, 14, 16]
    kept = found.top.window[2][found.top.in_order(slice(None))[2]]
    assert kept[0].tolist() == [0, 0, 1.5, 0, 1.5]
    assert kept[1].tolist() == [0, 0, 1.5, 0, 0]  # the tokens before are of another sequence


def test_the_draw_is_uniform_over_the_firings() -> None:
    """5 of 20 firings are drawn for each of many latents: all are equally frequent."""
    num_latents, n, size = 4_000, 20, 5
    latent = torch.arange(num_latents).repeat_interleave(n)
    place = torch.arange(n).repeat(num_latents)
    firings = Firings(latent, place, torch.ones(len(latent)), 0, n)
    rank = rank_randomly(firings, 0).view(num_latents, n)
    drawn = rank.topk(size, dim=1).indices
    counts = torch.bincount(drawn.flatten(), minlength=n).numpy()
    # Draws are without replacement: the variance of a count is smaller by (n − size)/(n − 1).
    expected = num_latents * size / n
    statistic = ((counts - expected) ** 2 / expected).sum() * (n - 1) / (n - size)
    assert stats.chi2.sf(statistic, n - 1) > 1e-3
    pairs = torch.bincount((drawn[:, :1] * n + drawn[:, 1:2]).flatten(), minlength=n * n)
    there = pairs.view(n, n).numpy() + pairs.view(n, n).t().numpy()
    pair_counts = there[np.triu_indices(n, 1)]
    assert stats.chisquare(pair_counts).pvalue > 1e-3, "all pairs are equally frequent"
    other = rank_randomly(firings, 1).view(num_latents, n).topk(size, dim=1).indices
    common = (drawn[:, :, None] == other[:, None]).sum() / num_latents
    assert float(common) == pytest.approx(size * size / n, abs=0.1), "seeds are independent"


def test_the_hash_is_one_to_one_and_equals_splitmix64() -> None:
    x = torch.cat([torch.arange(-500, 500), torch.arange(2**32 - 500, 2**32 + 500)])
    assert len(_mixed(x).unique()) == len(x)

    def reference(z: int) -> int:
        mask = 2**64 - 1
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    expected = [reference(int(v) % 2**64) for v in x]
    assert [int(v) % 2**64 for v in _mixed(x)] == expected


def test_neighbours_have_the_largest_of_all_cosines() -> None:
    rows = torch.randn(60, 10, generator=torch.Generator().manual_seed(0))
    rows[7] = 0
    rows[9] = 3 * rows[8] + 0.01 * rows[0]
    found = neighbours(rows, 4)
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
    cosine = unit @ unit.t()
    cosine.fill_diagonal_(-2)
    for j in range(60):
        expected = cosine[j].sort(descending=True)
        count = int((expected.values[:4] > 1e-6).sum())
        assert found.index[j, :count].tolist() == expected.indices[:count].tolist()
        assert found.value[j, :count] == pytest.approx(expected.values[:count].numpy(), abs=1e-6)
    assert found.index[7].tolist() == [-1] * 4, "a row of zeros has no direction"
    assert found.index[8, 0] == 9
    assert 7 not in found.index
    assert neighbours(rows[8:10], 4).index.tolist() == [[1, -1], [0, -1]], "only one other row"


def test_the_lens_is_the_product_with_the_unembedding() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, matrix = (torch.randn(n, 6, generator=generator) for n in (40, 33))
    promoted, suppressed = lens(rows, matrix, 5)
    logits = (rows.double() @ matrix.double().t()).numpy()
    order = np.argsort(-logits, axis=1)
    assert (promoted.index.numpy() == order[:, :5]).all()
    assert (suppressed.index.numpy() == order[:, ::-1][:, :5]).all()
    taken = np.take_along_axis(logits, order[:, :5], 1)
    assert promoted.value.numpy() == pytest.approx(taken, abs=1e-5)
    assert lens(rows, matrix, 99)[0].index.shape == (40, 33)


def save_model(kind: str, folder: Path, tiny_model: Path) -> None:
    """Save a model of one block with perturbed norms, and the tiny model's tokenizer."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2)
    elif kind == "gpt_neox":
        config = transformers.GPTNeoXConfig(**sizes)
    elif kind == "opt":
        config = transformers.OPTConfig(
            vocab_size=24, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=16,
        )  # fmt: skip
    elif kind == "gemma2":
        config = transformers.Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8)
    else:
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
            assert parameter.isfinite().all(), name
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2", "opt"])
def test_the_unembedding_is_the_slope_of_the_models_logits(
    kind: str, tmp_path: Path, tiny_model: Path
) -> None:
    """If the norm's divisor stays fixed, the model's logits change linearly by the matrix."""
    save_model(kind, tmp_path, tiny_model)
    config = PathModelConfig(path=str(tmp_path), attention="eager")  # all kinds support eager
    model = LanguageModel(config.resolve(tmp_path / "cache"))
    matrix = unembedding(model)
    assert matrix is not None
    tokens = len(model.resolved.tokenizer)
    assert matrix.shape == (tokens, 16)
    inner = {"llama": "model.norm", "gpt2": "transformer.ln_f",
             "gpt_neox": "gpt_neox.final_layer_norm", "gemma2": "model.norm",
             "opt": "model.decoder.final_layer_norm"}[kind]  # fmt: skip
    norm, head = model.model.get_submodule(inner), model.model.get_output_embeddings()
    x = torch.tensor([3.0, -3.0] * 8)  # mean 0, mean square 9
    direction = torch.randn(16, generator=torch.Generator().manual_seed(2))
    direction -= (direction @ x) / (x @ x) * x  # changes the norm of x only to second order
    step = 1e-2
    after, before = (head(norm(x + sign * step * direction))[:tokens] for sign in (1, -1))
    slope = (after - before).double() / (2 * step) * 3
    centred = slope - slope.mean()
    assert (matrix @ direction).numpy() == pytest.approx(centred.detach().numpy(), abs=2e-3)
    assert matrix.mean(0).abs().max() < 1e-6
