"""Prompts about a word, made of token ids.

    {word} has the first letter: {ANSWER}      ten words that are drawn, a line each
    {word}[ has the first letter:]             the word in question

The words' own tokens are put between the tokens of the rest, so that each is one token and its
place is known: a text that is tokenised anew may split a word, and a place that is counted from
the end is then another's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from reseed.config import ConfigError
from reseed.evaluate.first_letter.words import Words

_CARRIER = ":"
"""Stands before a piece while it is tokenised: no tokenizer joins it to what follows, and some open
a text with a space of their own."""


@dataclass(frozen=True, eq=False)
class Template:
    """The tokens between the words.

    Attributes:
        opening: what a text begins with.
        after: what follows a word (that ends in a space: ``True``) in a line with an answer,
            for each class.
        question: what follows the last word, up to the answer.
        answers: the one token with which the answer of each class goes on.
    """

    opening: tuple[int, ...]
    after: dict[bool, tuple[tuple[int, ...], ...]]
    question: dict[bool, tuple[int, ...]]
    answers: dict[bool, tuple[int, ...]]

    @classmethod
    def of(cls, tokenizer: Any, words: Words, line: str) -> Template:
        """Tokenise ``line``, ``{word}`` and ``{answer}`` standing for what differs."""
        opening = tokenizer.bos_token_id
        opening = tokenizer.eos_token_id if opening is None else opening
        after, question, answers = {}, {}, {}
        for spaced in (False, True):
            rest = line.partition("{word}")[2]
            rest = rest.lstrip(" ") if spaced else rest
            texts = [rest.replace("{answer}", answer) for answer in words.answers]
            ids = [_piece(tokenizer, text) for text in texts]
            # The answers may begin alike, with a space that is a token of its own.
            shared = _shared_beginning(ids)
            after[spaced] = tuple(tuple(_piece(tokenizer, f"{text}\n")) for text in texts)
            question[spaced] = tuple(ids[0][:shared])
            answers[spaced] = tuple(i[shared] if len(i) > shared else -1 for i in ids)
        return cls(() if opening is None else (opening,), after, question, answers)

    def check_answers(self) -> None:
        """Raise `ConfigError` where two classes are not told apart by the next token."""
        for answers in self.answers.values():
            if len(set(answers)) < len(answers) or -1 in answers:
                raise ConfigError(
                    "{key} needs answers that differ in their first token; those of two classes "
                    "do not",
                    "causal",
                )


@dataclass(frozen=True, eq=False)
class Prompts:
    """One prompt for each of n words, padded on the right (which attention never looks at).

    Attributes:
        tokens: the ids.
        at: place of the word.
        end: place of the last token.
    """

    tokens: Int[Tensor, "n context"]
    at: Int[Tensor, " n"]
    end: Int[Tensor, " n"]


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
    """A prompt for each of the chosen words.

    Args:
        chosen: indices of words.
        pools: part of every word; examples are of the same part as the word in question, and never
            a spelling of it.
        icl_words: examples in each, drawn without replacement.
        ask: go on to where the answer is due; else the prompt ends with the word.

    Raises:
        ConfigError: a part has too few words.
    """
    spelling = np.unique(np.array(words.spellings), return_inverse=True)[1]
    members = {part: np.flatnonzero(pools == part) for part in np.unique(pools[chosen])}
    for pool in members.values():
        _, sizes = np.unique(spelling[pool], return_counts=True)
        if len(pool) - sizes.max(initial=0) < icl_words:
            raise ConfigError(
                f"{{key}} (={icl_words}) must not exceed the other words of a part of the split, "
                f"of which there are {len(pool) - sizes.max(initial=0)}",
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
    """Uniform among the words of the pool that are spelt otherwise."""
    found = pool[random.choice(len(pool), number, replace=False)]
    if (spelling[found] != spelling[word]).all():
        return found
    others = pool[spelling[pool] != spelling[word]]
    return others[random.choice(len(others), number, replace=False)]


def _shared_beginning(ids: list[list[int]]) -> int:
    """How many tokens all of them begin with."""
    differ = (i for i, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1)
    return next(differ, min(map(len, ids)))


def _spaced(words: Words, index: int) -> bool:
    return words.texts[index].endswith(" ")


def _piece(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that is not the beginning of one."""
    alone = tokenizer(_CARRIER, add_special_tokens=False)["input_ids"]
    ids = tokenizer(_CARRIER + text, add_special_tokens=False)["input_ids"]
    if ids[: len(alone)] == alone:
        return ids[len(alone) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]
