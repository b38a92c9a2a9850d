"""Prompts about a word, made of token ids.

    {word} has the first letter: {ANSWER}      ten example words, drawn, a line each
    {word}[ has the first letter:]             the word in question

The prompt is joined from token ids, so that each word is one token at a known position. Tokenising
the whole text could split a word and shift the positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from reseed.errors import ConfigError
from reseed.evaluate.word_task.words import Words

_CARRIER = ":"
"""Precedes a piece while it is tokenised, as some tokenizers insert a space at the start of a text.
No tokenizer merges it with what follows."""


@dataclass(frozen=True, eq=False)
class Template:
    """The tokens between the words. The keys say whether the word before ends in a space.

    Attributes:
        opening: tokens at the start of a text.
        after: tokens after a word in a line with an answer, for each class.
        question: tokens after the last word, up to the answer.
        answers: the first differing token of the answer of each class.
    """

    opening: tuple[int, ...]
    after: dict[bool, tuple[tuple[int, ...], ...]]
    question: dict[bool, tuple[int, ...]]
    answers: dict[bool, tuple[int, ...]]

    @classmethod
    def of(cls, tokenizer: Any, words: Words, line: str) -> Template:
        """Tokenise ``line``, a text with the placeholders ``{word}`` and ``{answer}``."""
        opening = tokenizer.bos_token_id
        opening = tokenizer.eos_token_id if opening is None else opening
        after, question, answers = {}, {}, {}
        for spaced in (False, True):
            rest = line.partition("{word}")[2]
            rest = rest.lstrip(" ") if spaced else rest
            texts = [rest.replace("{answer}", answer) for answer in words.answers]
            ids = [_piece(tokenizer, text) for text in texts]
            # All answers may begin with the same token, such as a separate space.
            shared = _shared_beginning(ids)
            after[spaced] = tuple(tuple(_piece(tokenizer, f"{text}\n")) for text in texts)
            question[spaced] = tuple(ids[0][:shared])
            answers[spaced] = tuple(i[shared] if len(i) > shared else -1 for i in ids)
        return cls(() if opening is None else (opening,), after, question, answers)

    def check_answers(self) -> None:
        """Raise `ConfigError` if two classes have the same answer token."""
        for answers in self.answers.values():
            if len(set(answers)) < len(answers) or -1 in answers:
                raise ConfigError(
                    "{key} needs answers that differ in their first token; two classes share "
                    "theirs",
                    "causal",
                )


@dataclass(frozen=True, eq=False)
class Prompts:
    """One prompt for each of n words, padded on the right (causal attention never reads it).

    Attributes:
        tokens: the ids.
        word_position: position of the word.
        last_position: position of the last token.
    """

    tokens: Int[Tensor, "n context"]
    word_position: Int[Tensor, " n"]
    last_position: Int[Tensor, " n"]

    def rows(self, chosen: Int[Tensor, " m"]) -> Prompts:
        """Return some of the prompts."""
        each = (self.tokens, self.word_position, self.last_position)
        return Prompts(*(values[chosen] for values in each))


def make_prompts(
    words: Words,
    template: Template,
    chosen: Int[np.ndarray, " n"],
    pools: Int[np.ndarray, " all"],
    icl_words: int,
    random: np.random.Generator,
    *,
    ask: bool = False,
) -> Prompts:
    """Make a prompt for each of the chosen words.

    Args:
        chosen: indices of words.
        pools: part of the split of every word; examples come from the same part as the word in
            question, and are never another spelling of it.
        icl_words: examples in each prompt, drawn without replacement.
        ask: end the prompt where the answer follows; else it ends with the word.

    Raises:
        ConfigError: a part has too few words.
    """
    spelling = np.unique(np.array(words.spellings), return_inverse=True)[1]
    members = {part: np.flatnonzero(pools == part) for part in np.unique(pools[chosen])}
    for pool in members.values():
        _, sizes = np.unique(spelling[pool], return_counts=True)
        if len(pool) - sizes.max(initial=0) < icl_words:
            raise ConfigError(
                f"{{key}} (={icl_words}) must not exceed the number of other words in a part of "
                f"the split (={len(pool) - sizes.max(initial=0)})",
                "icl_words",
            )
    rows, at = [], []
    for word in chosen:
        examples = _draw(word, members[pools[word]], spelling, icl_words, random)
        row = list(template.opening)
        for example in examples:
            row.append(int(words.tokens[example]))
            row += template.after[_spaced(words, example)][int(words.labels[example])]
        at.append(len(row))
        row.append(int(words.tokens[word]))
        if ask:
            row += template.question[_spaced(words, word)]
        rows.append(row)
    end = torch.tensor([len(row) - 1 for row in rows])
    tokens = torch.zeros(len(rows), int(end.max()) + 1, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return Prompts(tokens, torch.tensor(at), end)


def _draw(
    word: int,
    pool: Int[np.ndarray, " some"],
    spelling: Int[np.ndarray, " all"],
    number: int,
    random: np.random.Generator,
) -> Int[np.ndarray, " number"]:
    """Draw uniformly among the words of the pool with another spelling."""
    found = pool[random.choice(len(pool), number, replace=False)]
    if (spelling[found] != spelling[word]).all():
        return found
    others = pool[spelling[pool] != spelling[word]]
    return others[random.choice(len(others), number, replace=False)]


def _shared_beginning(ids: list[list[int]]) -> int:
    """Return the length of the longest common prefix."""
    differ = (i for i, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1)
    return next(differ, min(map(len, ids)))


def _spaced(words: Words, index: int) -> bool:
    return words.texts[index].endswith(" ")


def _piece(tokenizer: Any, text: str) -> list[int]:
    """Tokenise a piece from the middle of a text."""
    alone = tokenizer(_CARRIER, add_special_tokens=False)["input_ids"]
    ids = tokenizer(_CARRIER + text, add_special_tokens=False)["input_ids"]
    if ids[: len(alone)] == alone:
        return ids[len(alone) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]
