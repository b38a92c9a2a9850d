"""Plan of a sweep, the same for every contender. No library is imported here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from contenders.base import L1, K

ARCHITECTURES = ("topk", "relu")
WARM_UP = 0.01
"""Fraction of the steps over which the learning rate rises. Then it falls linearly to 0, the only
schedule that all contenders have."""
L1_WARM_UP = 0.05
"""Fraction of the steps over which the L1 coefficient rises: reseed's default, set for sae-lens."""
START = 3**-0.5
"""Initial length of the encoder's rows relative to the decoder's, as in sparsify, which has no
option for it. In a short run it determines how far TopK gets."""
CHUNK = 65_536
"""Tokens of a chunk in reseed. The first chunk determines the scale of the inputs and b_dec;
sae-lens is set to estimate its scale from as many tokens."""


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
    """Sweep: architectures × seeds × layers on one stream of tokens.

    Attributes:
        model: ``embedded``, or the folder of a transformers model.
        text: a file of plain text; None for reseed's dataset of docstrings.
        layers, seeds, architectures: the axes of the sweep.
        tokens: tokens that each SAE sees, a multiple of `CHUNK`.
        context: tokens per sequence.
        batch: tokens per step, a multiple of ``context``.
        lr: peak learning rate of Adam, for all contenders.
        threads: threads of every contender.
        work: folder for the files of this plan.
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
        """Return a path in the folder of this plan."""
        return Path(self.work) / name

    def plain(self) -> dict[str, Any]:
        """Return the values for JSON; `Plan.of` is the inverse."""
        values = asdict(self)
        del values["k"], values["l1"]
        return values

    @classmethod
    def of(cls, values: dict[str, Any]) -> Plan:
        lists = {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
        return cls(**{**values, **lists})
