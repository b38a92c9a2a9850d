"""Active (token, latent) pairs of a batch, sums over them, and products with blocks of rows.

Pairs have two layouts: a table [B, k] if every token has k pairs, or a flat list ("pairs"), sorted
by token and then by latent, if the numbers differ. This file is plain PyTorch and defines the
result; in float32 on the CPU compiled loops replace it (`reseed.sae.kernels`).

No product here holds a [B, F] tensor.

Letters: B batch, D d_in, F num_latents, k active latents per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as nn_functional
from jaxtyping import Float, Int
from torch import Tensor

from reseed.sae import kernels
from reseed.sae.kernels import GroupedPairs, Pairs

CPU_ROWS = 256
"""Number of rows per block on the CPU; a block stays in the cache until it is reduced."""
ACCELERATOR_ELEMENTS = 2**28
"""Number of pre-activations per block on other devices: 1 GiB in float32, enough to keep a device
busy."""

Product = Callable[[Tensor], Tensor]
"""A function that maps rows [block, D] to W x + b [block, F]."""


def block_rows(rows: Float[Tensor, "batch d_in"], num_latents: int) -> int:
    """Return the number of rows per block."""
    if rows.device.type == "cpu":
        return CPU_ROWS
    return max(CPU_ROWS, ACCELERATOR_ELEMENTS // num_latents)


def pre_activation_blocks(
    rows: Float[Tensor, "batch d_in"], W_enc: Tensor, b_enc: Tensor
) -> Iterator[tuple[slice, Float[Tensor, "block num_latents"]]]:
    """Yield each block of the batch and its W_enc x + b_enc, which the next block overwrites."""
    size = block_rows(rows, len(W_enc))
    product = float32_product(min(size, len(rows)), W_enc, b_enc, repeats=len(rows) // size)
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        yield block, product(rows[block])


def float32_product(size: int, W: Tensor, b: Tensor, repeats: int) -> Product:
    """Return the product W x + b, in the dtype of the weights, for ``repeats`` blocks of ``size``
    rows. The next call may overwrite its result."""
    on_cpu = W.device.type == "cpu" and W.dtype == torch.float32
    product = prepacked_product(size, W, b) if on_cpu and repeats >= 2 else None
    if product is not None:
        return product
    buffer = W.new_empty(size, len(W))
    return lambda block: torch.addmm(b, block, W.t(), out=buffer[: len(block)])


def thread_safe_product(size: int, W: Tensor, b: Tensor, repeats: int = 2) -> Product:
    """Return a `float32_product` that several threads may call at the same time."""
    product = prepacked_product(size, W, b) if repeats >= 2 else None
    return product or (lambda block: torch.addmm(b, block, W.t()))


def prepacked_product(size: int, W: Tensor, b: Tensor, post: str = "none") -> Product | None:
    """Return oneDNN's product with the weight packed once for all blocks; None without oneDNN.

    On CPUs where MKL is slow (AMD) this saves a quarter of the time or more. `torch.compile` emits
    these operators for a linear layer with frozen weights. They are not public, so the caller must
    be able to do without them.

    Args:
        post: ``relu`` to clip the result at 0.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(W.detach().contiguous(), size)
        linear = torch.ops.mkldnn._linear_pointwise
    except (AttributeError, RuntimeError):
        return None
    return lambda block: linear(block, packed, b, post, [], "")


@dataclass(frozen=True)
class SparseLatents:
    """(value, latent) pairs per token. Values are ≥ 0; a pair with value 0 is not active."""

    values: Float[Tensor, "batch k"] | Float[Tensor, " pairs"]
    indices: Int[Tensor, "batch k"] | Int[Tensor, " pairs"]
    by_latent: PairsByLatent

    def fired(self) -> Int[Tensor, " num_latents"]:
        """Return the number of tokens on which each latent is active."""
        if kernels.supports(self.values):
            return self.by_latent.grouped.fired(self.values)
        active = self.indices[self.values.detach() > 0]
        return torch.bincount(active, minlength=self.by_latent.num_latents)

    def active(self) -> Pairs:
        """Return the active pairs, sorted by latent, then by token."""
        order = self.by_latent.order
        values, latents = self.values.flatten()[order], self.indices.flatten()[order]
        active = values != 0
        return values[active], self.by_latent.tokens[active], latents[active]

    def dense(self) -> Float[Tensor, "batch num_latents"]:
        """Return the latents as a full matrix."""
        empty = self.values.new_zeros(self.by_latent.batch, self.by_latent.num_latents)
        if self.by_latent.token_of_pair is None:
            return empty.scatter(1, self.indices, self.values)
        return empty.index_put((self.by_latent.token_of_pair, self.indices), self.values)

    def first(self, k: int) -> SparseLatents:
        """Return the first k pairs of each token of a table."""
        indices = self.indices[:, :k].contiguous()
        return SparseLatents(
            self.values[:, :k].contiguous(),
            indices,
            PairsByLatent(indices, self.by_latent.num_latents),
        )

    def divided(self, ends: Int[Tensor, " groups"]) -> SparseLatents:
        """Split each token of a flat list by groups of latents; each part becomes a token of the
        result, which has batch × groups tokens.

        Args:
            ends: end (exclusive) of each group of consecutive latents; the last is F.
        """
        owners, num_latents = self.by_latent.token_of_pair, self.by_latent.num_latents
        assert owners is not None, "`divided` needs a flat list"
        groups = len(ends)
        owners = owners * groups + torch.searchsorted(ends, self.indices, right=True)
        split = PairsByLatent(self.indices, num_latents, owners, self.by_latent.batch * groups)
        return SparseLatents(self.values, self.indices, split)


@dataclass(frozen=True)
class PairsByLatent:
    """The (token, latent) pairs of a batch, sorted lazily by latent, then by token.

    Attributes:
        indices: latent of each pair: a table, or a flat list.
        token_of_pair: token of each pair of a flat list, ascending; None for a table.
        num_tokens: B, for a flat list (whose last tokens may have no pair).
    """

    indices: Int[Tensor, "batch k"] | Int[Tensor, " pairs"]
    num_latents: int
    token_of_pair: Int[Tensor, " pairs"] | None = None
    num_tokens: int | None = None

    @property
    def batch(self) -> int:
        return len(self.indices) if self.num_tokens is None else self.num_tokens

    @cached_property
    def grouped(self) -> GroupedPairs:
        """The pairs in the form that the compiled loops need."""
        return kernels.group_pairs(self.indices, self.token_of_pair, self.batch, self.num_latents)

    @cached_property
    def order(self) -> Int[Tensor, " pairs"]:
        # Radix sort: the narrower the key, the fewer the passes.
        narrow = torch.int16 if self.num_latents <= 2**15 else torch.int32
        return torch.sort(self.indices.flatten().to(narrow), stable=True).indices

    @cached_property
    def tokens(self) -> Int[Tensor, " pairs"]:
        if self.token_of_pair is None:
            return self.order // self.indices.shape[1]
        return self.token_of_pair[self.order]

    @cached_property
    def offsets(self) -> Int[Tensor, " num_latents"]:
        return _starts(self.indices.flatten(), self.num_latents)

    @cached_property
    def token_offsets(self) -> Int[Tensor, " batch"] | None:
        return None if self.token_of_pair is None else _starts(self.token_of_pair, self.batch)

    def per_token(
        self,
        weights: Float[Tensor, "batch k"] | Float[Tensor, " pairs"],
        W: Float[Tensor, "num_latents d_in"],
    ) -> Float[Tensor, "batch d_in"]:
        """Return S W: for each token, Σ over its latents of weight × row of W."""
        if kernels.supports(weights, W):
            return self.grouped.per_token(weights, W)
        return nn_functional.embedding_bag(
            self.indices, W, self.token_offsets, per_sample_weights=weights, mode="sum"
        )

    def weighted_sum(
        self,
        weights: Float[Tensor, "batch k"] | Float[Tensor, " pairs"],
        rows: Float[Tensor, "batch d_in"],
    ) -> Float[Tensor, "num_latents d_in"]:
        """Return SᵀG: for each latent, Σ over its tokens of weight × row."""
        return self.weighted_sums(weights, rows)[0]

    def weighted_sums(
        self,
        weights: Float[Tensor, "batch k"] | Float[Tensor, " pairs"],
        rows: Float[Tensor, "batch d_in"],
    ) -> tuple[Float[Tensor, "num_latents d_in"], Float[Tensor, " num_latents"]]:
        """Return SᵀG, and for each latent the sum of the weights over its tokens."""
        if kernels.supports(weights, rows):
            return self.grouped.per_latent(weights, rows)
        total = nn_functional.embedding_bag(
            self.tokens,
            rows,
            self.offsets,
            per_sample_weights=weights.flatten()[self.order],
            mode="sum",
        )
        return total, self.sum(weights)

    def sum(
        self, weights: Float[Tensor, "batch k"] | Float[Tensor, " pairs"]
    ) -> Float[Tensor, " num_latents"]:
        """Return for each latent the sum of the weights over its tokens."""
        return torch.bincount(
            self.indices.flatten(), weights=weights.flatten(), minlength=self.num_latents
        ).to(weights.dtype)


def _starts(sorted_by: Int[Tensor, " pairs"], count: int) -> Int[Tensor, " count"]:
    """Return the start of each of ``count`` groups in the pairs sorted by group."""
    counts = torch.bincount(sorted_by, minlength=count)
    return counts.cumsum(0) - counts
