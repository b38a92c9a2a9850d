"""The libraries that `train_step.py` compares, each by its own training step.

`base` says what a contender is; `ours` is reseed; `sparsify_peer`, `saelens_peer` and
`dictionary_learning_peer` are the others. A library is imported when one of its contenders is
built, never before, so that each is optional.
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
"""What is compared for each architecture, by the name in the table. "reseed" is the yardstick."""

PEERS = {
    "sparsify": ("eai-sparsify==1.3.3", "pip install -e '.[bench]' -c constraints.txt"),
    "sae_lens": ("sae-lens==6.54.0", "pip install -e '.[bench]' -c constraints.txt"),
    "dictionary_learning": (
        "dictionary-learning==0.1.0",
        # What it needs is for reading language models, and would bring torchvision and diffusers.
        "pip install --no-deps dictionary-learning==0.1.0",
    ),
}
"""By the name of the module: what to install, and how."""


def installed(architecture: str) -> list[str]:
    """The names of the contenders whose library is there."""
    return [
        name for name, contender in ARCHITECTURES[architecture].items() if _found(contender.needs)
    ]


def missing(architectures: list[str]) -> list[str]:
    """A line for each library that would be compared and is not there."""
    needed = {each.needs for name in architectures for each in ARCHITECTURES[name].values()}
    return [
        f"{package} is not installed: left out. To compare with it: {command}"
        for module, (package, command) in PEERS.items()
        if module in needed and not _found(module)
    ]


def _found(module: str | None) -> bool:
    return module is None or importlib.util.find_spec(module) is not None
