"""What is trained: the same for every contender. No library is imported here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from contenders.base import L1, K

ARCHITECTURES = ("topk", "relu")
WARM_UP = 0.01
"""Of the steps, over which the learning rate rises; after it, it falls linearly to 0, which is the
one schedule that all contenders have."""
L1_WARM_UP = 0.05
"""Of the steps, over which the L1 coefficient rises: reseed's default, told to sae-lens."""
START = 3**-0.5
"""Length of the encoder's rows at the start times the decoder's: sparsify's, which has no option
for it. In a short run it decides how far TopK comes."""
CHUNK = 65_536
"""Tokens that reseed computes together; of the first it takes the inputs' scale and b_dec, and
sae-lens is told to take the scale of as many."""


@dataclass(frozen=True)
class Sae:
    """One SAE of the sweep."""

    architecture: str
    layer: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.architecture}-layer{self.layer}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A sweep: architectures × seeds × layers on one stream of tokens.

    Attributes:
        model: ``embedded``, or the folder of a transformers model.
        text: a file of plain text; None for the docstrings that reseed has.
        layers, seeds, architectures: what is combined.
        tokens: that each SAE sees, a multiple of `CHUNK`.
        context: tokens in a sequence.
        batch: tokens in a step, a multiple of ``context``.
        lr: peak learning rate of Adam, for all.
        threads: of every contender.
        work: a folder of this plan's own.
    """

    model: str
    text: str | None
    layers: tuple[int, ...]
    tokens: int
    num_latents: int
    threads: int
    work: str
    seeds: tuple[int, ...] = (0, 1, 2)
    architectures: tuple[str, ...] = ARCHITECTURES
    context: int = 256
    batch: int = 4_096
    lr: float = 1e-3
    held_out: int = 32_768
    k: int = field(default=K, init=False)
    l1: float = field(default=L1, init=False)

    @property
    def saes(self) -> list[Sae]:
        return [
            Sae(architecture, layer, seed)
            for architecture in self.architectures
            for layer in self.layers
            for seed in self.seeds
        ]

    @property
    def steps(self) -> int:
        return self.tokens // self.batch

    @property
    def sequences(self) -> int:
        return self.tokens // self.context

    @property
    def label(self) -> str:
        return self.model if self.model == "embedded" else Path(self.model).resolve().name

    def folder(self, name: str) -> Path:
        """Where something of this plan is kept."""
        return Path(self.work) / name

    def plain(self) -> dict[str, Any]:
        """For json; `Plan.of` reads it."""
        values = asdict(self)
        del values["k"], values["l1"]
        return values

    @classmethod
    def of(cls, values: dict[str, Any]) -> Plan:
        lists = {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
        return cls(**{**values, **lists})
