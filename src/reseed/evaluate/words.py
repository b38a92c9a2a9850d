"""The words of a task, their classes, and the prompts about them.

First letters are one task (Chanin et al. 2024); a table of tokens and labels defines any other.

The prompt about a word:

    {word} has the first letter: {ANSWER}      ten randomly drawn example words, one per line
    {word}[ has the first letter:]             the word in question

The prompt is joined from token ids, so that each word is one token at a known position. Tokenising
the whole text could split a word and shift the positions.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_letters, ascii_lowercase
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from reseed.errors import ConfigError
from reseed.system.files import user_path

_SHOWN = 5
_STARTS, _ENDS = ("▁", "Ġ"), ("▁", "</w>")
"""Markers of the start or end of a word, in raw tokens."""


@dataclass(frozen=True, eq=False)
class Words:
    """Words of one token each, sorted by token id.

    Attributes:
        tokens: token ids.
        texts: the words as text, with a leading (or trailing) space if the token has one.
        labels: index of each word's class.
        classes: class names; a class may have no word (first letters are always all 26).
        answers: for each class, the answer that prompts give.
    """

    tokens: Int[Tensor, " n"]
    texts: tuple[str, ...]
    labels: Int[Tensor, " n"]
    classes: tuple[str, ...]
    answers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def spellings(self) -> tuple[str, ...]:
        """The words in lower case without spaces; no example is spelt like the word in question."""
        return tuple(text.strip().lower() for text in self.texts)

    @cached_property
    def spelling_ids(self) -> Int[np.ndarray, " n"]:
        """A number for each of the `spellings`; equal for the spellings of one word."""
        return np.unique(np.array(self.spellings), return_inverse=True)[1]

    @property
    def num_spellings(self) -> int:
        """The number of different words."""
        return int(self.spelling_ids.max(initial=-1)) + 1

    def distinct(self, some: Int[np.ndarray, " m"]) -> list[int]:
        """Count the words of each class among some; the spellings of a word count as one."""
        pairs = np.unique(np.stack([self.labels.numpy()[some], self.spelling_ids[some]]), axis=1)
        return np.bincount(pairs[0], minlength=len(self.classes)).tolist()


def first_letter_words(tokenizer: Any) -> Words:
    """Return every token that consists of letters A to Z, labelled by its first letter."""
    found = [(i, text) for i, text in _vocabulary(tokenizer).items() if _is_word(text)]
    if not found:
        raise ConfigError("no token of the model's vocabulary is a word of the letters A to Z")
    letters = [ascii_lowercase.index(text.strip()[0].lower()) for _, text in found]
    classes = tuple(ascii_lowercase)
    return Words(*_columns(found, letters), classes, tuple(c.upper() for c in classes))


def labelled_words(tokenizer: Any, file: str) -> Words:
    """Return the tokens that a csv file (columns ``token``, ``label``) lists, with its labels.

    The file lists a token's text, with its leading space if it has one. If only the text with a
    leading space is a token, that token is used.

    Raises:
        ConfigError: the file is missing, has other columns, or lists a text that is not a token, or
            a token twice.
    """
    rows = _read(user_path(file))
    known = {text: i for i, text in reversed(_vocabulary(tokenizer).items())}
    chosen = {text: next((t for t in (text, f" {text}") if t in known), None) for text, _ in rows}
    unknown = [text for text, token in chosen.items() if token is None]
    if unknown:
        shown = ", ".join(repr(text) for text in unknown[:_SHOWN])
        raise ConfigError(
            f"{{key}}: {len(unknown)} of {len(rows)} texts are not single tokens of this model: "
            f"{shown}",
            "task_file",
        )
    found = [(known[chosen[text] or ""], chosen[text] or "") for text, _ in rows]
    if len({i for i, _ in found}) < len(found):
        seen = [i for i, _ in found]
        twice = next(text for i, text in found if seen.count(i) > 1)
        raise ConfigError(f"{{key}} names the token {twice!r} more than once", "task_file")
    classes = tuple(sorted({label for _, label in rows}))
    if len(classes) < 2:
        raise ConfigError(
            f"{{key}} must have at least two labels; got {', '.join(classes)}", "task_file"
        )
    labels = [classes.index(label) for _, label in rows]
    order = sorted(range(len(found)), key=lambda i: found[i][0])
    columns = _columns([found[i] for i in order], [labels[i] for i in order])
    return Words(*columns, classes, classes)


def _read(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not {"token", "label"} <= set(reader.fieldnames or ()):
                found = ", ".join(reader.fieldnames or ()) or "none"
                raise ConfigError(
                    f"{{key}} must have the columns token and label; {path} has {found}",
                    "task_file",
                )
            rows = [(row["token"] or "", (row["label"] or "").strip()) for row in reader]
    except OSError as error:
        raise ConfigError(f"{{key}}: cannot read {path}: {error.strerror}", "task_file") from error
    incomplete = next((i for i, row in enumerate(rows) if not all(row)), None)
    if incomplete is not None or not rows:
        what = "no rows" if incomplete is None else f"no token or no label in row {incomplete + 1}"
        raise ConfigError(f"{{key}}: {path} has {what}", "task_file")
    return rows


def _vocabulary(tokenizer: Any) -> dict[int, str]:
    """Return the text of every token but the special ones, by id."""
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(len(tokenizer)) if i not in special]
    raw = tokenizer.convert_ids_to_tokens(ids)
    return {i: _decoded(tokenizer, t) for i, t in zip(ids, raw, strict=True) if t is not None}


def _decoded(tokenizer: Any, raw: str) -> str:
    """Return a token's text, with the space of its marker even if the tokenizer drops it."""
    text = tokenizer.convert_tokens_to_string([raw])
    if raw.startswith(_STARTS) and not text.startswith(" "):
        text = f" {text}"
    # Some vocabularies mark the ends of words, not their starts.
    if len(raw) > 1 and raw.endswith(_ENDS) and not text.endswith(" "):
        text = f"{text} "
    return text


def _is_word(text: str) -> bool:
    """Return whether the text is letters A to Z, with at most one space before (or after) them."""
    word = text[1:] if text.startswith(" ") else text.removesuffix(" ")
    return bool(word) and set(word) <= set(ascii_letters)


def _columns(
    found: list[tuple[int, str]], labels: list[int]
) -> tuple[Tensor, tuple[str, ...], Tensor]:
    return torch.tensor([i for i, _ in found]), tuple(t for _, t in found), torch.tensor(labels)


_CARRIER = ":"
"""Prefix of a piece while it is tokenised, because some tokenizers insert a space at the start of a
text. No tokenizer merges it with what follows."""


@dataclass(frozen=True, eq=False)
class Template:
    """Tokens of a prompt between its words.

    The keys of the dictionaries say whether the preceding word ends in a space.

    Attributes:
        opening: tokens at the start of a text.
        after: tokens after a word in a line with an answer, for each class.
        question: tokens after the last word, up to the answer.
        answers: for each class, the first token in which its answer differs from the others.
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
    """One prompt for each of n words, padded on the right (causal attention ignores the padding).

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
        pools: every word's part of the split; examples come from the same part as the word in
            question, and are never another spelling of that word.
        icl_words: number of examples in each prompt, sampled without replacement.
        ask: whether the prompt continues after the word in question, up to the answer.

    Raises:
        ConfigError: a part of the split has too few words.
    """
    spelling = words.spelling_ids
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
    """Sample examples uniformly from the words of the pool that are not a spelling of ``word``."""
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
