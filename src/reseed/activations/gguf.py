"""GGUF files (llama.cpp's format): configuration, tokenizer and weights through transformers.

transformers reads a GGUF file leniently: it leaves out what it does not know, and takes its own
values where the file has none. So a file is checked when it is first used: its weights are loaded
once, and what could change activations unseen is refused. Configuration and tokenizer are then kept
in the cache, because reading them takes seconds; their record says that the file has passed.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch

from reseed.activations.model_files import (
    check_architecture,
    check_tokenizer,
    foreign,
    load_trained,
    quiet,
    read_light,
)
from reseed.config import digest
from reseed.errors import ConfigError
from reseed.system.console import say
from reseed.system.files import atomic_folder
from reseed.system.integrity import (
    DamagedFileError,
    check_record,
    describe_files,
    read_record,
    write_record,
)

VERSION = 1
"""Increase this when a GGUF file is checked or its tokenizer read in another way."""
_PACKAGES = ("gguf", "accelerate")
_RECORD = "gguf.json"
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
"""Tokenizers (``tokenizer.ggml.pre``) that split text as GPT-2's does, and every digit off."""
_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais")


@dataclass(frozen=True)
class Header:
    """The beginning of a GGUF file.

    Attributes:
        values: the metadata; of an array, its length.
        tensors: name → shape.
    """

    values: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture"))

    @property
    def size(self) -> int:
        """Number of weights of all tensors."""
        return sum(map(prod, self.tensors.values()))


def read_gguf(file: Path, fingerprint: str, cache: Path) -> tuple[Path, bool]:
    """Check a GGUF file on its first use, and read its configuration and tokenizer.

    Args:
        fingerprint: hash of the file's content.
        cache: folder of derived data, into which they are written.

    Returns:
        the folder with config.json and tokenizer.json, and False if the file lacks the unembedding.

    Raises:
        ConfigError: a package is missing, the file is damaged, or transformers cannot read it
            exactly.
    """
    lacking = [name for name in _PACKAGES if find_spec(name) is None]
    if lacking:
        raise ConfigError(
            f"{{key}}: a GGUF file is read with the packages {' and '.join(_PACKAGES)}: "
            f"pip install {' '.join(lacking)}",
            "path",
        )
    read_by = {name: metadata.version(name) for name in ("transformers", "tokenizers", "gguf")}
    folder = cache / "gguf" / f"{fingerprint}-{digest([VERSION, read_by])}"
    with suppress(FileNotFoundError, DamagedFileError):
        check_record(folder / _RECORD, quick=True)
        return folder, read_record(folder / _RECORD)["has_unembedding"]
    header = read_header(file)
    _check_values(header, file)
    from transformers import AutoConfig, AutoTokenizer

    config = read_light(AutoConfig, file)
    check_architecture(config, file)
    _check_size(config, header, file)
    tokenizer = read_light(AutoTokenizer, file)
    _split_digits(tokenizer, header, file)
    # The widest exponent: a weight that is not finite here is not finite in the file.
    model, fit = load_trained(file, torch.bfloat16, "eager", config)
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    there = header.size
    used = sum(weights.numel() for weights in model.state_dict(keep_vars=True).values())
    if there > used:
        say(f"{file}: the model does not use {there - used:,} of its {there:,} weights")

    def fill(new: Path) -> None:
        config.save_pretrained(new)
        tokenizer.save_pretrained(new)
        _drop_additions(new / "tokenizer.json", header)
        check_tokenizer(read_light(AutoTokenizer, new), rows, file)
        written = describe_files(new, sorted(path.name for path in new.iterdir()))
        write_record(new / _RECORD, {"has_unembedding": fit.unembedding, "files": written})

    with foreign(file, "its configuration and tokenizer cannot be written"):
        atomic_folder(folder, fill)
    return folder, fit.unembedding


def _check_values(header: Header, file: Path) -> None:
    """Raise `ConfigError` for values that transformers leaves out, or replaces by its own."""
    name, values = header.architecture, header.values
    epsilon = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
    for keys in (("block_count",), ("embedding_length",), epsilon):
        if not any(f"{name}.{key}" in values for key in keys):
            raise ConfigError(
                f"{{key}}: the model in {file} cannot be used: it does not give {name}.{keys[0]}",
                "path",
            )
    if not 0 < int(values[f"{name}.block_count"]) <= len(header.tensors):
        raise _unlike(
            f"{values[f'{name}.block_count']} blocks", f"{len(header.tensors)} tensors", file
        )
    scaling = values.get(f"{name}.rope.scaling.type", "none")
    factor = values.get(f"{name}.rope.scaling.factor", 0)
    scaled = scaling != "none" and not (scaling == "linear" and factor == 1)
    rope = [tensor for tensor in header.tensors if tensor.startswith("rope_")]
    wrong = ""
    if (scaled and name != "gpt-oss") or rope:
        wrong = f"its rotary positions are scaled ({rope[0] if rope else scaling})"
    elif name == "llama" and "llama.attention.head_count_kv" not in values:
        # llama.cpp stores the rows of keys in another order, which depends on it.
        wrong = "it does not give the number of key heads (llama.attention.head_count_kv)"
    if wrong:
        raise ConfigError(
            f"{{key}}: the model in {file} cannot be used: {wrong}, and transformers would read it "
            "wrongly. Use the model's safetensors",
            "path",
        )


def _check_size(config: Any, header: Header, file: Path) -> None:
    """Raise `ConfigError` before a model is built that is far larger than its file."""
    from transformers import AutoModelForCausalLM

    with foreign(file, "transformers cannot build the model of its metadata"), quiet():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        wanted = sum(weights.numel() for weights in model.parameters())
    if wanted > 2 * header.size:  # if only some are missing, loading names them
        raise _unlike(f"{wanted:,} weights", f"{header.size:,}", file)


def _unlike(wanted: str, found: str, file: Path) -> ConfigError:
    return ConfigError(
        f"{{key}}: the model in {file} cannot be used: its metadata describe {wanted}; the file "
        f"has {found}",
        "path",
    )


def _split_digits(tokenizer: Any, header: Header, file: Path) -> None:
    """Let a byte-level tokenizer split text as the file says (``tokenizer.ggml.pre``).

    transformers knows how some split it, and takes GPT-2's way for all others.
    """
    if header.values.get("tokenizer.ggml.model") != "gpt2":
        return
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    way = header.values.get("tokenizer.ggml.pre", "default")
    if way in _DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif way not in (*GGUF_PRE_TOKENIZER_SPLITS, *_GPT2):
        say(f"{file}: some tokens may differ from the model's own, because text is split as by "
            f"GPT-2, and not as the file says (tokenizer.ggml.pre={way})")  # fmt: skip


def _drop_additions(tokenizer: Path, header: Header) -> None:
    """Remove tokens that transformers adds to those of the file: they have no embedding."""
    values = json.loads(tokenizer.read_text(encoding="utf-8"))
    number = header.values.get("tokenizer.ggml.tokens", 0)
    values["added_tokens"] = [one for one in values["added_tokens"] if one["id"] < number]
    tokenizer.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def read_header(file: Path) -> Header:
    """Read the metadata and the list of tensors of a GGUF file, and check that it is whole.

    Raises:
        ConfigError: it is no GGUF file, or is damaged.
    """
    from gguf import GGML_QUANT_SIZES  # type: ignore[import-not-found]

    try:
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            at = _Cursor(data)
            if at.take(4) != b"GGUF":
                raise ValueError("it does not begin with the letters GGUF")
            if (version := at.number("I")) not in _VERSIONS:
                raise ValueError(f"it has version {version}; 2 and 3 are known")
            number, keys = at.number("Q"), at.number("Q")
            values = {}
            for _ in range(keys):
                name = at.text()
                values[name] = at.value(at.number("I"))
            tensors, end = {}, 0
            for _ in range(number):
                name, dimensions = at.text(), at.number("I")
                shape = tuple(at.number("Q") for _ in range(dimensions))
                block, size = GGML_QUANT_SIZES[at.number("I")]
                tensors[name] = shape
                end = max(end, at.number("Q") + prod(shape) // block * size)
            alignment = int(values.get("general.alignment", _ALIGNMENT))
            start = -(-at.at // alignment) * alignment
            if start + end > len(data):
                raise ValueError(f"it has {len(data):,} bytes, and needs {start + end:,}")
    except KeyError as error:
        raise _damaged(file, f"a tensor has the unknown type {error}") from None
    except (OSError, ValueError, ArithmeticError) as error:
        raise _damaged(file, str(error)) from None
    return Header(values, tensors)


def _damaged(file: Path, reason: str) -> ConfigError:
    return ConfigError(f"{{key}}: {file} is no sound GGUF file: {reason}", "path")


class _Cursor:
    """A position in a file, beyond whose end nothing is read."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """Read a value of the metadata; of an array, only its length."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"its metadata has a value of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            self.take(count * struct.calcsize(_NUMBERS[inner]))
        elif inner == _STRING:
            for _ in range(count):
                self.take(self.number("Q"))
        else:
            raise ValueError(f"its metadata has an array of the unknown type {inner}")
        return count
