"""The program that trained the embedded model, on cases checked by hand."""

import math
from itertools import islice

import drills
import measurements
import numpy as np
import pretrain
import pytest


def test_the_first_letter_prompt_is_that_of_the_paper() -> None:
    assert drills.first_letter_prompt([" tartan", "ing"], " Blue") == (
        " tartan has the first letter: T\ning has the first letter: I\n Blue has the first letter:"
    )


def test_frequent_words_are_sorted_by_count_then_alphabet() -> None:
    text = "so the cat and the dog met the cat, not a dog."
    assert drills.frequent_words([text, text], 3) == [" the", " cat", " dog"]


def test_rows_overlap_in_one_token_so_that_each_is_predicted_once() -> None:
    rows = measurements.pack([np.array([5, 6, 7]), np.array([8, 9])], separator=0, length=4)
    assert rows.tolist() == [[0, 5, 6, 7], [7, 0, 8, 9]]


def test_unigram_cross_entropy_equals_the_hand_computed_value() -> None:
    # Counts 2, 1, 0 of three tokens, plus one each: 3/6, 2/6, 1/6.
    found = measurements.unigram_cross_entropy(np.array([0, 0, 1]), np.array([[2, 0, 1, 2]]), 3)
    assert found == pytest.approx(-(math.log(3 / 6) + math.log(2 / 6) + math.log(1 / 6)) / 3)


def test_bigram_cross_entropy_equals_the_hand_computed_value() -> None:
    # Pairs 0→1 twice, 0→2 once, 1→0 twice; unigram (3+1, 2+1, 1+1) / 9.
    train = np.array([0, 1, 0, 1, 0, 2])
    p_01 = (2 + 2 * 3 / 9) / (3 + 2)
    p_10 = (2 + 1 * 4 / 9) / (2 + 1)
    p_22 = 2 / 9  # nothing ever followed 2
    found = measurements.bigram_cross_entropy(train, np.array([[0, 1, 0], [2, 2, 2]]), 3)
    assert found == pytest.approx(-(math.log(p_01) + math.log(p_10) + 2 * math.log(p_22)) / 4)


def test_heldout_documents_are_few_and_always_the_same() -> None:
    share = np.mean([measurements.is_heldout(f"document {i}") for i in range(20_000)])
    assert share == pytest.approx(measurements.HELDOUT_PERCENT / 100, abs=0.004)
    # The SHA-256 of the empty text begins with e3b0c442 = 3820012610: the 10th percent.
    assert not measurements.is_heldout("")


def test_learning_rate_warms_up_holds_and_falls_to_zero() -> None:
    settings = pretrain.Settings(steps=1000, warmup_steps=100, decay_share=0.5)
    factors = [pretrain.learning_rate_factor(step, settings) for step in (0, 99, 500, 750, 1000)]
    assert factors == pytest.approx([0.01, 1, 1, 0.5, 0])


def test_training_rows_hold_every_document_once_an_epoch_and_the_share_of_drills() -> None:
    settings = pretrain.Settings(context_length=8, drill_share=0.25)
    documents = [np.arange(i, i + 9) for i in range(100, 1100, 10)]  # 10 tokens with separator
    line = np.array([1, 2, 3, 4])
    weights = np.array([0.3, 0.3, 4.0, 0.3], dtype=np.float32)
    lines = drills.DrillLines([line] * 20, [weights] * 20)
    # 1,000 tokens of text need 333 of drills: 5 drills of 65 tokens, 1,325 in all.
    rows = list(islice(pretrain.training_rows(documents, lines, settings), 1324 // 8))
    assert all(len(ids) == len(row_weights) == 9 for ids, row_weights in rows)
    ids = np.concatenate([ids[1:] for ids, _ in rows])
    row_weights = np.concatenate([weights[1:] for _, weights in rows])
    text = ids[ids >= 100]
    assert len(set(text)) == len(text)
    assert len(text) > 880  # of 900; the rest are first tokens of rows, or do not fill one
    assert np.all(row_weights[ids >= 100] == 1)
    assert np.all(row_weights[ids == 3] == 4)
    assert np.all(row_weights[np.isin(ids, [1, 2, 4])] == np.float32(0.3))


def test_the_chunked_backward_equals_the_plain_one() -> None:
    torch = pytest.importorskip("torch")
    settings = pretrain.Settings(vocabulary_size=64, num_layers=1, d_model=16, context_length=160)
    model = pretrain.build_model(settings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (4, 161), generator=generator)
    weights = torch.rand(4, 160, generator=generator)
    loss = pretrain.backward(model, ids, weights)
    chunked = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1]).logits
    log_p = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    plain = -(log_p * weights).mean()
    plain.backward()
    assert loss == pytest.approx(plain.item(), rel=1e-3)
    for name, p in model.named_parameters():
        error = (p.grad - chunked[name]).norm() / p.grad.norm().clamp(min=1e-6)
        assert error < 0.02, name  # bfloat16 holds 8 bits
