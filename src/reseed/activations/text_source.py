"""The activations of a language model on a text."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from reseed.activations.cache import ActivationCache
from reseed.activations.chunk_cache import ChunkCache
from reseed.activations.chunks import VERSION, ActivationStream, held_out_chunks, held_out_packing
from reseed.activations.dataset import DatasetConfig, batches_available
from reseed.activations.found_model import DTYPES, FoundModel
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.language_model import LanguageModel
from reseed.activations.sites import blocks_path
from reseed.activations.source import ActivationSource, ResolvedData, check_held_out
from reseed.activations.text import ResolvedText, TextConfig
from reseed.activations.token_store import Packing, TokenStore, overlap_counts
from reseed.activations.tokens import describe, hash_chat_template, token_stores
from reseed.errors import ConfigError
from reseed.system.console import COLUMNS, cropped

_LABEL_COLUMNS = 30


@dataclass(frozen=True)
class ResolvedModelText(ResolvedData):
    """A text and the language model that will read it, both resolved."""

    model: FoundModel
    text: ResolvedText

    @property
    def config(self) -> TextConfig:
        return self.text.config

    @property
    def label(self) -> str:
        return self.text.label

    def in_order(self, order_seed: int) -> Self:
        config = replace(self.config, order_seed=order_seed)
        return replace(self, text=replace(self.text, config=config))

    def at_first_seeds(self) -> Self:
        config = self.config.at_first_seeds()
        return replace(self, text=replace(self.text, config=config))

    @property
    def depends_on_budget(self) -> bool:
        return self.config.subset_seed is not None

    @property
    def summary(self) -> tuple[str, ...]:
        if self.config.streamed:  # unknown before it is read
            return ()
        return self.summary_of(*self.stores(0))

    def summary_of(self, train: TokenStore, held_out: TokenStore) -> tuple[str, ...]:
        """Return the lines of `summary`, given the tokens."""
        first, *others = describe(train, held_out, self.model.tokenizer)
        origin = (f"  {line}" for line in self.text.origin)
        label = cropped(self.text.label, _LABEL_COLUMNS)  # so that the numbers are seen
        lines = (f"text {label}: {first}", *others, *origin)
        return tuple(cropped(line, COLUMNS) for line in lines)

    @property
    def description(self) -> str:
        return f"text {self.text.label}"

    @property
    def context_length(self) -> int:
        return self.config.context_length

    @property
    def fingerprints(self) -> dict[str, str]:
        found = {"text": self.text.fingerprint}
        if self.config.content == "messages":  # the template decides the tokens, too
            found["chat_template"] = hash_chat_template(self.model.tokenizer)
        return found

    def stores(self, needed: int) -> tuple[TokenStore, TokenStore]:
        """Return the training and held-out tokens; for a streamed text, only as many as needed."""
        size = self.model.transformers_config.get_text_config().vocab_size
        tokenizer = self.model.tokenizer
        fingerprint = self.model.fingerprints["tokenizer"]
        return token_stores(self.text, tokenizer, fingerprint, needed, int(size))

    @property
    def weight_bytes(self) -> int:
        weights = sum(p.numel() for p in self.model.skeleton.parameters())
        return weights * DTYPES[self.model.config.dtype].itemsize

    def flops_per_token(self, hookpoints: Sequence[Hookpoint]) -> float:
        """Return 2·P for the P weights of the model up to the deepest hookpoint."""
        unused = 1 + 1 / max(self.config.context_length - 1, 1)  # first positions are left out
        return 2.0 * max(map(self._weights_used, hookpoints)) * unused

    def _weights_used(self, hookpoint: Hookpoint) -> int:
        """Return the number of weights applied per token up to ``hookpoint`` (no embeddings)."""
        if hookpoint.site == "embed":
            return 0
        model, blocks = self.model.skeleton, blocks_path(self.model.skeleton)
        if not self.model.place(hookpoint).module.startswith(f"{blocks}.{hookpoint.layer}"):
            return sum(p.numel() for p in model.parameters())  # any module outside of the layer
        count = hookpoint.layer + (hookpoint.site != "resid_pre")
        layers = list(model.get_submodule(blocks).children())[:count]
        return sum(p.numel() for layer in layers for p in layer.parameters())

    def open(
        self, device: torch.device, needed: int, cache: ActivationCache | None = None
    ) -> TextSource:
        return TextSource(self, device, needed, cache)

    def check_budget(self, steps: int, batch_size: int) -> None:
        """Raise `ConfigError` if the text is too short for the training or held-out tokens."""
        if self.config.streamed:  # its length is known only after reading (`check_length`)
            return
        try:
            train, held_out = self.stores(steps * batch_size)
        except ConfigError as error:
            raise error.within("dataset") from None
        repeat = "Lower it, give more text, or set dataset.repeat=true."
        less = "Lower it, give more text, or raise dataset.held_out_fraction."
        one_document = train.num_documents + held_out.num_documents < 2
        if one_document:
            repeat = less = "The whole text is one document: set dataset.separator to split it."
        for part, wanted, key, remedy in (
            (train, steps * batch_size, "training.tokens", repeat),
            (held_out, self.config.held_out_tokens, "dataset.held_out_tokens", less),
        ):
            there = _activations(part, self.config)
            if part is train:
                batches = batches_available(there, self.config, batch_size)
                usable = batches * batch_size
                enough = (self.config.repeat and usable > 0) or batches >= steps
            else:
                usable, enough = there, there >= wanted
            if not usable:
                remedy = remedy if one_document else _remedy_of_none(part is train, there)
            if not enough:
                name = "training documents" if part is train else "held-out documents"
                raise ConfigError(
                    f"{{key}} (={wanted:,}) must not exceed the activations in the "
                    f"{part.num_documents:,} {name} of {self.label}: {usable:,}. {remedy}",
                    key,
                )


def _remedy_of_none(training: bool, activations: int) -> str:
    """Return what to do about a text of no whole batch of training or held-out activations."""
    if activations:
        return "Give more text, or lower training.batch_size."
    if training:
        return "Give more text, or lower dataset.context_length."
    return "Give more text, lower dataset.context_length, or raise dataset.held_out_fraction."


class TextSource(ActivationSource):
    """A language model and the tokens that it reads.

    Args:
        found: resolved model and text.
        device: device of the model.
        needed: number of activations that training needs; limits how much of a streamed text is
            read.
        cache: stores chunks on disk.
    """

    def __init__(
        self,
        found: ResolvedModelText,
        device: torch.device,
        needed: int,
        cache: ActivationCache | None = None,
    ) -> None:
        self.config, self.cache = found.config, cache
        self.train_store, self.held_out_store = found.stores(needed)
        self.needed = needed
        self.found, self.model = found, LanguageModel(found.model, device)
        self.device = self.model.device

    def stream(self, hookpoints: Sequence[Hookpoint]) -> ActivationStream:
        chunk_cache = self._chunk_cache("train")
        return ActivationStream(
            self.model, self.train_store, self.config, hookpoints, chunk_cache, self.needed
        )

    def held_out(
        self, hookpoints: Sequence[Hookpoint], tokens: int
    ) -> Iterator[dict[Hookpoint, Tensor]]:
        chunk_cache = self._chunk_cache("held_out")
        return held_out_chunks(
            self.model, self.held_out_store, self.config, hookpoints, tokens, chunk_cache
        )

    def held_out_sequences(
        self, tokens: int
    ) -> tuple[Int[Tensor, "sequences context"], Bool[Tensor, "sequences context"]]:
        """Return the first held-out sequences that have at least ``tokens`` activations in total.

        Returns:
            the sequences, and a mask of the positions that count (not first, not special tokens;
            see the data set's options).

        Raises:
            ConfigError: there are fewer held-out activations.
        """
        check_held_out(self, tokens)
        packing = held_out_packing(self.held_out_store, self.config)
        _, end, _ = packing.covering(0, tokens)
        sequences = packing.sequences(0, end)
        kept = packing.keep(sequences)
        return torch.from_numpy(sequences.astype(np.int64)), torch.from_numpy(kept)

    def _chunk_cache(self, part: str) -> ChunkCache | None:
        """Return the cached chunks of the training or held-out documents; None without a cache."""
        if self.cache is None:
            return None
        key = chunk_key(self.found, part, self.device)
        name = f"{self.found.model.label}-{{hookpoint}}-{self.found.label}"
        order = f"order{self.config.order_seed}" if part == "train" else part
        return ChunkCache(self.cache, key, f"{name}-{order}")

    @property
    def summary(self) -> tuple[str, ...]:
        if not self.config.streamed:  # known before (`ResolvedModelText.summary`)
            return ()
        return self.found.summary_of(self.train_store, self.held_out_store)

    def record(self) -> dict[str, Any]:
        counts = overlap_counts(self.train_store, self.held_out_store, self.found.text.cache)
        left_out = self.held_out_store.left_out
        return {
            "documents": self.train_store.num_documents,
            "tokens": len(self.train_store),
            "held_out_documents": self.held_out_store.num_documents,
            "held_out_tokens": len(self.held_out_store),
            **({} if left_out is None else {"held_out_documents_left_out": left_out}),
            **counts,
        }

    @property
    def held_out_available(self) -> int:
        return held_out_packing(self.held_out_store, self.config).num_activations


def chunk_key(found: ResolvedModelText, part: str, device: torch.device) -> dict[str, Any]:
    """Return everything that determines a text's activations but hookpoint and chunk's tokens.

    Args:
        part: ``train`` or ``held_out``; held-out documents do not depend on the order's seed.
        device: device of the computation. On the CPU the key includes the number of torch threads,
            which can change the last bits.
    """
    model, config = found.model, found.config
    seeds = {"order_seed", "subset_seed", "repeat"}
    left_out = {"held_out_tokens"} | ({"held_out_dedup"} if part == "train" else seeds)
    where: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        where["device"] = torch.cuda.get_device_name(device)
    else:
        where["device"] = f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
        where["threads"] = torch.get_num_threads()
    return {
        "version": VERSION,
        "fingerprints": {**model.fingerprints, **found.fingerprints},
        "model": model.config.signed(),
        "dataset": {k: v for k, v in config.signed().items() if k not in left_out},
        "part": part,
        "computed": where,
    }


def resolve_model_text(model: FoundModel, config: DatasetConfig, cache: Path) -> ResolvedModelText:
    """Find the text that ``model`` will read.

    Raises:
        ConfigError: the data set is no text, cannot be read, its sequences exceed the model's
            maximum length, or the tokenizer lacks the chat template that it needs. The error's key
            is relative to ``dataset``.
    """
    if not isinstance(config, TextConfig):
        raise ConfigError(
            f"{{key}}={config.name} {config.belongs}; model={model.label} is a language "
            "model and reads a text, for example dataset=docstrings"
        )
    if config.context_length > model.context_length:
        raise ConfigError(
            f"{{key}} must not exceed the {model.context_length} positions of {model.label}; "
            f"got {config.context_length}",
            "context_length",
        )
    if config.content == "messages":
        hash_chat_template(model.tokenizer)
    return ResolvedModelText(model, _resolve_text(config, cache, config.stamp()))


@lru_cache(maxsize=32)
def _resolve_text(config: TextConfig, cache: Path, stamp: Hashable) -> ResolvedText:
    return config.resolve(cache)


@lru_cache(maxsize=32)
def _activations(store: TokenStore, config: TextConfig) -> int:
    if len(store) < config.context_length:
        return 0
    packing = Packing(store, config)
    return packing.guaranteed_activations if config.repeat else packing.num_activations
