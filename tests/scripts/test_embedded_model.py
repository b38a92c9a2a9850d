"""The embedded model as included in the package, and the claims of its card."""

import json
import math
from importlib.resources import files
from pathlib import Path

import drills
import measurements
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

FOLDER = Path(str(files("reseed") / "assets" / "model"))
DOCUMENTS = Path(__file__).parent / "heldout_documents.json"
"""Sixteen documents of 350 to 750 characters, drawn at random from the held-out documents."""


@pytest.fixture(scope="module")
def card() -> dict:
    return json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return json.loads(DOCUMENTS.read_text(encoding="utf-8"))


def test_the_folder_is_small_and_complete() -> None:
    sizes = {file.name: file.stat().st_size for file in FOLDER.iterdir()}
    assert sum(sizes.values()) < 8e6
    assert set(sizes) == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }


def test_the_parameter_count_is_that_of_the_stated_shape(
    model: PreTrainedModel, card: dict
) -> None:
    d, layers, vocabulary = 128, 4, 4096
    # Attention 4d² + 4d, MLP 8d² + 5d, two norms 4d; a last norm 2d; two embeddings.
    expected = layers * (12 * d**2 + 13 * d) + 2 * d + 2 * vocabulary * d
    assert model.num_parameters() == expected == card["parameters"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.max_position_embeddings == 256


def test_every_weight_is_exactly_a_float16(model: PreTrainedModel) -> None:
    assert all(torch.equal(p, p.half().float()) for p in model.parameters())


def test_the_tokenizer_is_lossless_and_has_its_separator(
    tokenizer: PreTrainedTokenizerBase, documents: list[str]
) -> None:
    assert len(tokenizer) == 4096
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    for document in [*documents, " leading and trailing ", "naïve Δ 😀\n\ttab"]:
        ids = tokenizer(document)["input_ids"]
        assert tokenizer.decode(ids) == document
        assert 0 not in ids


def test_held_out_cross_entropy_is_far_below_that_of_bigrams(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
    card: dict,
) -> None:
    assert all(map(measurements.is_heldout, documents))
    measured = card["measured"]
    losses = []
    for document in documents:
        ids = [0, *tokenizer(document)["input_ids"]][:256]
        with torch.inference_mode():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        losses += [-log_p[i, ids[i + 1]].item() for i in range(len(ids) - 1)]
    cross_entropy = math.fsum(losses) / len(losses)
    assert cross_entropy < measured["bigram_cross_entropy"] - 0.6
    assert cross_entropy == pytest.approx(measured["cross_entropy"], abs=0.4)  # 2% of the tokens
    rows = measurements.pack([np.array(ids[1:])], separator=0, length=len(ids))
    last = math.fsum(losses[1 - len(ids) :]) / (len(ids) - 1)
    assert measurements.cross_entropy(model, rows) == pytest.approx(last, rel=1e-4)


def test_it_knows_the_first_letters_of_the_drilled_words(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    words = drills.alphabetic_tokens(tokenizer)
    assert len(words) > 3000
    accuracy = drills.first_letter_accuracy(model, tokenizer, words, num_prompts=200, seed=5)
    assert accuracy > 0.9


def test_alphabetic_tokens_are_single_tokens_of_every_letter(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    words = drills.alphabetic_tokens(tokenizer)
    assert len(set(words)) == len(words)
    assert all(len(ids) == 1 for ids in tokenizer(words)["input_ids"])
    assert {drills.letter_of(word) for word in words} == {chr(65 + i) for i in range(26)}
    assert {" the", "the", " A", "Z"} <= set(words)


def test_a_drill_gives_its_letters_the_largest_loss_weight(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    lines = drills.DrillLines.of([" the", "A"], tokenizer)
    ids, weights = lines.ids[0], lines.weights[0]
    assert [tokenizer.decode([i]) for i in ids] == [
        " the", " has", " the", " first", " letter", ":", " T", "\n",
    ]  # fmt: skip
    assert weights.tolist() == pytest.approx([0.3] * 6 + [4.0, 0.3])
    assert tokenizer.decode(lines.ids[1]) == "A has the first letter: A\n"


def test_the_residual_stream_has_no_outlier(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[str]
) -> None:
    encoded = [np.array(ids) for ids in tokenizer(documents)["input_ids"]]
    for layer in measurements.residual_statistics(model, measurements.pack(encoded, 0, 128))[1:]:
        assert layer["max_norm"] < 5 * layer["mean_norm"]
        assert layer["first_position_norm"] < 5 * layer["mean_norm"]
        assert layer["top_dimension_share"] < 0.3
        assert layer["top_component_share"] < 0.5
