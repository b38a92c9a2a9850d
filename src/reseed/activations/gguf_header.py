"""The beginning of a GGUF file (llama.cpp's format): metadata and list of tensors."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from reseed.errors import ConfigError

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


class Length(int):
    """Length of an array."""


@dataclass(frozen=True)
class Header:
    """The beginning of a GGUF file.

    Attributes:
        values: the metadata; of an array, its `Length`.
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
        return Length(count)
