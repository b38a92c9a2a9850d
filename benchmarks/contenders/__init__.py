"""Libraries that `train_step.py` compares, each with its own training step.

`base` defines the interface of a contender; `ours` is reseed; `sparsify_peer`, `saelens_peer` and
`dictionary_learning_peer` are the peers. A library is imported only when one of its contenders is
built, so that each is optional.
"""

from __future__ import annotations

import importlib.util

from contenders import dictionary_learning_peer, ours, saelens_peer, sparsify_peer
from contenders.base import Contender

ARCHITECTURES: dict[str, dict[str, type[Contender]]] = {
    "topk": {
        "reseed": ours.Reseed,
        "reseed, clipped": ours.ReseedClipped,
        "reseed, plain": ours.ReseedPlain,
        "eai-sparsify": sparsify_peer.Sparsify,
        "sae-lens": saelens_peer.TopK,
        "sae-lens, sparse": saelens_peer.TopKSparse,
    },
    "batch_topk": {
        "reseed": ours.ReseedClipped,
        "reseed, TopK": ours.ReseedTopK,
        "sae-lens": saelens_peer.BatchTopK,
        "dictionary_learning": dictionary_learning_peer.BatchTopK,
    },
    "matryoshka": {
        "reseed": ours.ReseedClipped,
        "sae-lens": saelens_peer.Matryoshka,
        "dictionary_learning": dictionary_learning_peer.Matryoshka,
    },
    "jumprelu": {
        "reseed": ours.ReseedClipped,
        "sae-lens": saelens_peer.JumpReLU,
        "dictionary_learning": dictionary_learning_peer.JumpReLU,
    },
    "gated": {
        "reseed": ours.ReseedClipped,
        "sae-lens": saelens_peer.Gated,
        "dictionary_learning": dictionary_learning_peer.Gated,
    },
    "relu": {
        "reseed": ours.ReseedClipped,
        "sae-lens": saelens_peer.ReLU,
        "dictionary_learning": dictionary_learning_peer.ReLU,
    },
}
"""Contenders for each architecture, by the name in the table. Ratios are relative to "reseed"."""

PEERS = {
    "sparsify": ("eai-sparsify==1.3.3", "pip install -e '.[bench]' -c constraints.txt"),
    "sae_lens": ("sae-lens==6.54.0", "pip install -e '.[bench]' -c constraints.txt"),
    "dictionary_learning": (
        "dictionary-learning==0.1.0",
        # Its dependencies only serve language models, and include torchvision and diffusers.
        "pip install --no-deps dictionary-learning==0.1.0",
    ),
}
"""Module → package to install, and the command."""


def installed(architecture: str) -> list[str]:
    """Return the names of the contenders whose library is installed."""
    return [
        name for name, contender in ARCHITECTURES[architecture].items() if _found(contender.needs)
    ]


def missing(architectures: list[str]) -> list[str]:
    """Return a line for each library of these architectures that is not installed."""
    needed = {each.needs for name in architectures for each in ARCHITECTURES[name].values()}
    return [
        f"{package} is not installed: left out. To compare with it: {command}"
        for module, (package, command) in PEERS.items()
        if module in needed and not _found(module)
    ]


def _found(module: str | None) -> bool:
    return module is None or importlib.util.find_spec(module) is not None
