"""First-letter spelling: the words, the prompt and the drills of the embedded model.

The prompt is that of Chanin et al. 2024 ("A is for Absorption"): ten in-context words, each on a
line `{word} has the first letter: {LETTER}`, then the queried word. A word carries the leading
space of its token, where it has one.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUESTION = " has the first letter:"
IN_CONTEXT_WORDS = 10
LINES_PER_DRILL = 16
LETTER_WEIGHT = 4.0
OTHER_WEIGHT = 0.3

_FREQUENT_WORD = re.compile(r"(?<=[a-z,] )[A-Za-z]{2,}(?=[ ,.])")
_WORD_START = "Ġ"


def letter_of(word: str) -> str:
    """Return the answer to a word's question: its first letter, upper case."""
    return word.removeprefix(" ")[0].upper()


def first_letter_prompt(in_context: Sequence[str], query: str) -> str:
    """Return the prompt whose next token is a space and the first letter of `query`."""
    lines = [f"{word}{QUESTION} {letter_of(word)}" for word in in_context]
    return "\n".join([*lines, query + QUESTION])


def alphabetic_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that are words of the task, decoded, by token id.

    A token counts if, after removing at most one leading space, it is non-empty and all A-Z, a-z.
    """
    words = []
    for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))):
        text = tokenizer.convert_tokens_to_string([token])
        if token.startswith(_WORD_START) and not text.startswith(" "):
            text = f" {text}"
        bare = text.removeprefix(" ")
        if bare.isascii() and bare.isalpha():
            words.append(text)
    return words


def frequent_words(documents: Iterable[str], count: int) -> list[str]:
    """Return the most frequent words of a text (ties by the alphabet), with a leading space."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(_FREQUENT_WORD.findall(document))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [f" {word}" for word, _ in ranked[:count]]


@dataclass(frozen=True)
class DrillLines:
    """The line of every drilled word, as token ids with a loss weight per token."""

    ids: list[np.ndarray]
    weights: list[np.ndarray]

    @classmethod
    def of(cls, words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> "DrillLines":
        """Return the lines of `words`.

        Raises:
            ValueError: if a line does not end in a one-token letter and a one-token newline.
        """
        lines = [f"{word}{QUESTION} {letter_of(word)}\n" for word in words]
        ids = [np.array(line, dtype=np.int64) for line in tokenizer(lines)["input_ids"]]
        weights = []
        for word, line in zip(words, ids, strict=True):
            answer = f" {letter_of(word)}"
            if tokenizer.decode(line[-2:-1]) != answer:
                raise ValueError(f"the answer {answer!r} must be one token of the tokenizer")
            weight = np.full(len(line), OTHER_WEIGHT, dtype=np.float32)
            weight[-2] = LETTER_WEIGHT
            weights.append(weight)
        return cls(ids, weights)

    def sample_drill(
        self, rng: np.random.Generator, separator: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and loss weights of one drill: a separator, then distinct words."""
        chosen = rng.choice(len(self.ids), LINES_PER_DRILL, replace=False)
        ids = np.concatenate([[separator], *(self.ids[i] for i in chosen)])
        start = np.full(1, OTHER_WEIGHT, dtype=np.float32)
        return ids, np.concatenate([start, *(self.weights[i] for i in chosen)])


@torch.inference_mode()
def first_letter_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    words: Sequence[str],
    num_prompts: int,
    seed: int,
) -> float:
    """Return the share of prompts whose most likely next token, of all tokens, is the answer.

    Queries are drawn from `words` without replacement. The in-context words of a prompt are too,
    and never include its query.
    """
    rng = np.random.default_rng(seed)
    queries = rng.permutation(len(words))[:num_prompts]
    right = 0
    for batch in np.array_split(queries, max(1, len(queries) // 50)):
        prompts, answers = [], []
        for query in map(int, batch):
            drawn = rng.choice(len(words), IN_CONTEXT_WORDS + 1, replace=False)
            in_context = [words[i] for i in map(int, drawn) if i != query][:IN_CONTEXT_WORDS]
            prompts.append(first_letter_prompt(in_context, words[query]))
            answers.append(f" {letter_of(words[query])}")
        ids = [torch.tensor(prompt) for prompt in tokenizer(prompts)["input_ids"]]
        last = torch.tensor([len(prompt) - 1 for prompt in ids])
        # Padding on the right needs no mask: the model is causal.
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        logits = model(padded, use_cache=False).logits[torch.arange(len(ids)), last]
        guesses = [tokenizer.decode([guess]) for guess in logits.argmax(-1).tolist()]
        right += sum(guess == answer for guess, answer in zip(guesses, answers, strict=True))
    return right / len(queries)
