"""The program that trained the embedded model: `python scripts/pretrain/pretrain.py --out FOLDER`.

It trains a byte-level BPE tokenizer and a small GPT-NeoX on the docstrings of the installed
packages and on first-letter spelling drills, and then measures the float16 weights that it wrote.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import drills
import measurements
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)

from reseed.activations.docstrings import docstring_documents, docstring_fingerprint

SEPARATOR = "<|endoftext|>"
SEPARATOR_ID = 0
LOGIT_TOKENS = 256


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, besides the text and the versions of the packages."""

    vocabulary_size: int = 4096
    num_layers: int = 4
    d_model: int = 128
    num_heads: int = 4
    context_length: int = 256
    steps: int = 4000
    batch_size: int = 8  # rows of context_length + 1 tokens
    drill_share: float = 0.06  # of the tokens
    num_frequent_words: int = 2000
    lr_matrix: float = 0.02  # Muon
    lr_other: float = 8e-3  # AdamW: embeddings, norms, biases
    warmup_steps: int = 100
    decay_share: float = 0.6  # of the steps: the learning rate falls linearly to zero
    max_grad_norm: float = 1.0
    seed: int = 0
    threads: int = 1


def train_tokenizer(documents: Sequence[str], settings: Settings) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE like GPT-2's, trained on the documents and the drills' wording."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The answers must be single tokens; with the text alone, rare letters would not be.
    letters = [f"x{drills.QUESTION} {letter}\n" * 500 for letter in map(chr, range(65, 91))]
    bpe.train_from_iterator([*documents, *letters], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        model_max_length=settings.context_length,
        clean_up_tokenization_spaces=False,
    )


def build_model(settings: Settings) -> GPTNeoXForCausalLM:
    """Return the untrained model, in float32."""
    torch.manual_seed(settings.seed)
    config = GPTNeoXConfig(
        vocab_size=settings.vocabulary_size,
        hidden_size=settings.d_model,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        intermediate_size=4 * settings.d_model,
        max_position_embeddings=settings.context_length,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        },
        use_parallel_residual=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        classifier_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=SEPARATOR_ID,
        eos_token_id=SEPARATOR_ID,
    )
    model = GPTNeoXForCausalLM(config)
    model.set_attn_implementation("eager")  # a third faster than the fused kernel at this size
    return model


def training_rows(
    documents: Sequence[np.ndarray], lines: drills.DrillLines, settings: Settings
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield token ids and loss weights, each [context + 1], endlessly.

    An epoch concatenates all documents and new drills (`drill_share` of the tokens), shuffled.
    """
    rng = np.random.default_rng(settings.seed)
    num_tokens = sum(map(len, documents)) + len(documents)
    mean_line = sum(map(len, lines.ids)) / len(lines.ids)
    drill_tokens = num_tokens * settings.drill_share / (1 - settings.drill_share)
    num_drills = round(drill_tokens / (1 + drills.LINES_PER_DRILL * mean_line))
    separated = [np.concatenate([[SEPARATOR_ID], ids]) for ids in documents]
    texts = [(ids, np.ones(len(ids), dtype=np.float32)) for ids in separated]
    while True:
        parts = texts + [lines.sample_drill(rng, SEPARATOR_ID) for _ in range(num_drills)]
        order = rng.permutation(len(parts))
        ids = np.concatenate([parts[i][0] for i in order])
        weights = np.concatenate([parts[i][1] for i in order])
        length = settings.context_length + 1
        rows, row_weights = measurements.rows_of(ids, length), measurements.rows_of(weights, length)
        for i in rng.permutation(len(rows)):
            yield rows[i], row_weights[i]


def optimizers(model: GPTNeoXForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for all other parameters."""
    blocks = set(model.gpt_neox.layers.parameters())
    matrices = [p for p in model.parameters() if p in blocks and p.ndim == 2]
    chosen = set(matrices)
    others = [p for p in model.parameters() if p not in chosen]
    return [
        torch.optim.Muon(matrices, lr=settings.lr_matrix, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=settings.lr_other, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def learning_rate_factor(step: int, settings: Settings) -> float:
    """Return the factor on both learning rates: linear warm-up, plateau, linear decay to zero."""
    left = (settings.steps - step) / (settings.decay_share * settings.steps)
    return min(1.0, (step + 1) / settings.warmup_steps, left)


def backward(model: GPTNeoXForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> float:
    """Accumulate the gradient of the weighted loss, in nats per token, and return the loss.

    `ids` are [rows, context + 1], `weights` [rows, context]. Logits are computed and freed for
    `LOGIT_TOKENS` positions at a time: all together they would dominate the memory traffic.
    """
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.gpt_neox(ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        leaf = hidden.detach().requires_grad_()
        total = 0.0
        chunks = zip(
            leaf.split(LOGIT_TOKENS),
            ids[:, 1:].flatten().split(LOGIT_TOKENS),
            weights.flatten().split(LOGIT_TOKENS),
            strict=True,
        )
        for states, targets, target_weights in chunks:
            logits = model.get_output_embeddings()(states).float()
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            loss = (losses * target_weights).sum() / weights.numel()
            loss.backward()
            total += loss.item()
        hidden.backward(leaf.grad)
    return total


def train(
    model: GPTNeoXForCausalLM,
    rows: Iterator[tuple[np.ndarray, np.ndarray]],
    settings: Settings,
) -> None:
    """Train the model in place for `settings.steps` steps."""
    both = optimizers(model, settings)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, settings)
        )
        for optimizer in both
    ]
    started = time.perf_counter()
    for step in range(settings.steps):
        batch = [next(rows) for _ in range(settings.batch_size)]
        ids = torch.from_numpy(np.stack([row for row, _ in batch]))
        weights = torch.from_numpy(np.stack([row for _, row in batch]))[:, 1:]
        loss = backward(model, ids, weights)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        for optimizer, schedule in zip(both, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 50 == 0 or step == settings.steps - 1:
            seconds = time.perf_counter() - started
            print(f"step {step:5d}  loss {loss:.3f}  {seconds:6.0f} s", flush=True)


def measure(folder: Path, documents: Sequence[str], words: Sequence[str]) -> dict[str, object]:
    """Return the measurements of the model in `folder`, loaded in the way its users load it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train_documents = [text for text in documents if not measurements.is_heldout(text)]
    heldout_documents = [text for text in documents if measurements.is_heldout(text)]
    context = model.config.max_position_embeddings + 1
    rows = measurements.pack(encode(tokenizer, heldout_documents), SEPARATOR_ID, context)
    stream = measurements.pack(encode(tokenizer, train_documents), SEPARATOR_ID, context)[
        :, 1:
    ].ravel()
    tokens = drills.alphabetic_tokens(tokenizer)
    residual = measurements.residual_statistics(model, rows[:64])
    return {
        "heldout_documents": len(heldout_documents),
        "heldout_tokens": rows[:, 1:].size,
        "cross_entropy": measurements.cross_entropy(model, rows),
        "unigram_cross_entropy": measurements.unigram_cross_entropy(stream, rows, len(tokenizer)),
        "bigram_cross_entropy": measurements.bigram_cross_entropy(stream, rows, len(tokenizer)),
        "characters_per_token": sum(map(len, heldout_documents)) / rows[:, 1:].size,
        "first_letter_accuracy_drilled_tokens": drills.first_letter_accuracy(
            model, tokenizer, tokens, num_prompts=1000, seed=1
        ),
        "first_letter_accuracy_drilled_words": drills.first_letter_accuracy(
            model, tokenizer, words, num_prompts=1000, seed=2
        ),
        "residual_stream": residual,
    }


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> list[np.ndarray]:
    """Return the token ids [tokens] of each document, without special tokens."""
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    return [np.array(ids, dtype=np.int64) for ids in encoded]


def main() -> None:
    """Train the model, write its folder, and measure the written model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--cache", type=Path, help="folder of the text (default: OUT's parent)")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    arguments = parser.parse_args()
    settings = Settings(steps=arguments.steps)
    torch.set_num_threads(settings.threads)

    documents = docstring_documents(arguments.cache or arguments.out.parent)
    train_documents = [text for text in documents if not measurements.is_heldout(text)]
    tokenizer = train_tokenizer(train_documents, settings)
    tokens = drills.alphabetic_tokens(tokenizer)
    frequent = drills.frequent_words(train_documents, settings.num_frequent_words)
    words = list(dict.fromkeys([*tokens, *frequent]))
    encoded = encode(tokenizer, train_documents)
    lines = drills.DrillLines.of(words, tokenizer)
    model = build_model(settings)
    num_tokens = sum(map(len, encoded))
    print(f"{len(encoded)} documents, {num_tokens} tokens, {len(words)} drilled words", flush=True)
    started = time.process_time()
    train(model, training_rows(encoded, lines, settings), settings)
    cpu_minutes = (time.process_time() - started) / 60

    model.half().save_pretrained(arguments.out)
    (arguments.out / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(arguments.out)
    record = {
        "settings": asdict(settings),
        "parameters": model.num_parameters(),
        "text_sha256": docstring_fingerprint(documents),
        "train_documents": len(encoded),
        "train_tokens_per_epoch": num_tokens,
        "train_tokens_seen": settings.steps * settings.batch_size * settings.context_length,
        "drilled_words": len(words),
        "cpu_minutes": round(cpu_minutes, 1),
        "measured": measure(arguments.out, documents, words),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        },
    }
    text = json.dumps(record, indent=2)
    (arguments.out / "training.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
