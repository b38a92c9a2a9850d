"""Words of a vocabulary, and prompts made of their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from reseed.errors import ConfigError
from reseed.evaluate.words import (
    Template,
    Words,
    first_letter_words,
    labelled_words,
    make_prompts,
)

LINE = "{word} has the first letter: {answer}"
PIECES = [
    "Ġcat",
    "cat",
    "Cat",
    "Ġdog",
    "dog",
    "Ġapple",
    "Ġan",
    "Ġax",
    "zoo",
    "Ġb",
    "don't",
    "Ġ12",
    "Ġ",
]


def byte_level(pieces: list[str] = PIECES, bos: str | None = "<bos>") -> Any:
    """Make a byte-level tokenizer of single bytes and some pieces, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*alphabet, *pieces]))}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **({"bos_token": bos} if bos else {})
    )


def metaspace() -> Any:
    """Make a tokenizer like SentencePiece, which inserts a space at the start of a text."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:\n"
    pieces = ["<s>", "▁", *letters, "▁cat", "▁dog", "<0x41>"]
    tokenizer = Tokenizer(BPE({t: i for i, t in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"),
                                           decoders.ByteFallback(), decoders.Fuse()])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_words_are_letters_after_at_most_one_space() -> None:
    words = first_letter_words(byte_level())
    longer = [text for text in words.texts if len(text.strip()) > 1]
    assert longer == [" cat", "cat", "Cat", " dog", "dog", " apple", " an", " ax", "zoo"]
    assert " b" in words.texts
    assert all(text.strip().isalpha() and text.isascii() for text in words.texts)
    assert words.tokens.diff().gt(0).all()
    assert len(words.classes) == 26
    by_text = dict(zip(words.texts, words.labels.tolist(), strict=True))
    assert (by_text[" cat"], by_text["Cat"], by_text["zoo"]) == (2, 2, 25)
    assert (words.classes[2], words.answers[2]) == ("c", "C")


def test_a_space_that_decoding_drops_is_restored() -> None:
    words = first_letter_words(metaspace())
    assert " cat" in words.texts
    assert "cat" not in words.texts


def test_special_tokens_are_not_words() -> None:
    tokenizer = byte_level(["hello", "stop"])
    tokenizer.add_special_tokens({"eos_token": "stop"})
    assert "hello" in first_letter_words(tokenizer).texts
    assert "stop" not in first_letter_words(tokenizer).texts


def test_a_vocabulary_without_words_is_refused() -> None:
    tokenizer = Tokenizer(BPE({"1": 0, "2": 1}, merges=[]))
    with pytest.raises(ConfigError, match="no token of the model's vocabulary is a word"):
        first_letter_words(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def labelled(tmp_path: Path, text: str) -> Words:
    path = tmp_path / "words.csv"
    path.write_text(text)
    return labelled_words(byte_level(), str(path))


def test_labelled_words_are_read_from_a_csv_file(tmp_path: Path) -> None:
    words = labelled(tmp_path, "token,label\n dog,animal\napple,fruit\n cat,animal\ndog,animal\n")
    assert sorted(words.texts) == [" apple", " cat", " dog", "dog"]  # only " apple" is a token
    assert words.classes == ("animal", "fruit")
    assert [words.classes[i] for i in words.labels] == [
        "fruit" if "apple" in text else "animal" for text in words.texts
    ]
    assert words.tokens.diff().gt(0).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("word,label\na,b\n", r"must have the columns token and label; .* has word, label"),
        (
            "token,label\nelephant,x\ncat,y\n",
            r"1 of 2 texts are not single tokens of this model: 'ele",
        ),
        ("token,label\ncat,x\ncat,y\n", r"names the token 'cat' more than once"),
        ("token,label\ncat,x\ndog,x\n", r"must have at least two labels; got x"),
        ("token,label\ncat,\n", r"has no token or no label in row 1"),
        ("token,label\n", "has no rows"),
    ],
)
def test_an_invalid_table_of_words_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        labelled(tmp_path, text)


def test_a_missing_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot read nowhere\.csv: No such file"):
        labelled_words(byte_level(), "nowhere.csv")


@pytest.fixture
def vocabulary() -> tuple[Any, Words]:
    pieces = [f"Ġ{a}{b}x" for a in "abcdef" for b in "mnopqr"] + ["Amx", "amx"]
    tokenizer = byte_level(pieces)
    return tokenizer, first_letter_words(tokenizer)


@pytest.mark.parametrize("ask", [False, True])
def test_prompts_have_correct_examples_from_the_words_part(
    vocabulary: tuple[Any, Words], ask: bool
) -> None:
    tokenizer, words = vocabulary
    template = Template.of(tokenizer, words, LINE)
    chosen = np.arange(len(words))
    pools = (chosen % 2).astype(np.int64)
    made = make_prompts(words, template, chosen, pools, 10, np.random.default_rng(0), ask=ask)
    for i in chosen:
        text = tokenizer.decode(made.tokens[i, 1 : made.last_position[i] + 1])
        *lines, last = text.split("\n")
        assert made.tokens[i, 0] == tokenizer.bos_token_id
        assert len(lines) == 10
        # Here the space before a letter is a separate token, shared by all answers.
        assert last == words.texts[i] + (" has the first letter: " if ask else "")
        examples = [line.partition(" has the first letter: ")[::2] for line in lines]
        assert all(answer == word.strip()[0].upper() for word, answer in examples)
        # The word's token is at its position, and no example has its spelling.
        assert made.tokens[i, made.word_position[i]] == words.tokens[i]
        spelt = [word.strip().lower() for word, _ in examples]
        assert words.texts[i].strip().lower() not in spelt
        places = [words.texts.index(word) for word, _ in examples]
        assert len(set(places)) == 10
        assert {pools[j] for j in places} == {pools[i]}


def test_prompts_are_a_function_of_their_seed(vocabulary: tuple[Any, Words]) -> None:
    tokenizer, words = vocabulary
    template, chosen = Template.of(tokenizer, words, LINE), np.arange(20)
    pools = np.zeros(len(words), dtype=np.int64)
    first, again, other = (
        make_prompts(words, template, chosen, pools, 5, np.random.default_rng(s)).tokens
        for s in (0, 0, 1)
    )
    assert first.equal(again)
    assert not first.equal(other)


def test_too_few_words_for_the_examples_are_refused(vocabulary: tuple[Any, Words]) -> None:
    tokenizer, words = vocabulary
    template = Template.of(tokenizer, words, LINE)
    pools = np.arange(len(words))
    with pytest.raises(ConfigError, match=r"`icl_words` \(=1\) must not exceed the number of othe"):
        make_prompts(words, template, np.array([0]), pools, 1, np.random.default_rng(0))


def test_a_separate_space_before_the_answer_belongs_to_the_question() -> None:
    """The question ends with the space token, and the answer is the letter."""
    tokenizer = metaspace()
    words = first_letter_words(tokenizer)
    template = Template.of(tokenizer, words, LINE)
    template.check_answers()
    assert tokenizer.convert_ids_to_tokens(template.question[False][-2:]) == [":", "▁"]
    letters = tokenizer.convert_ids_to_tokens(template.answers[False])
    assert letters == [answer.upper() for answer in words.classes]
    assert tokenizer.convert_ids_to_tokens(template.after[False][3])[-4:] == [":", "▁", "D", "\n"]


def test_answers_with_a_common_first_token_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "words.csv"
    path.write_text("token,label\ncat,ox\ndog,oxen\nzoo,b\n")
    tokenizer = byte_level()
    words = labelled_words(tokenizer, str(path))
    with pytest.raises(ConfigError, match="`causal` needs answers that differ in their first"):
        Template.of(tokenizer, words, "{word} is {answer}").check_answers()
