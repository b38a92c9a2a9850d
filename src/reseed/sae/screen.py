"""The float32 top k through a bfloat16 product: half the time on CPUs that have one, and exact.

The rough product p̃ (inputs, weight and bias rounded, accumulated in float32, stored in bfloat16)
differs from the true pre-activation p by at most ε in sum and a relative u in storage:

    ε = ‖x̂‖‖δe‖ + ‖δx‖(‖ê‖ + ‖δe‖) + γ(‖x̂‖ + ‖δx‖)(‖ê‖ + ‖δe‖) + |δb| + γ|b|

with hats for rounded values, δ for what rounding took away, and γ = 2(D + 2)2⁻²⁴ for both float32
sums (Cauchy-Schwarz; the largest norm over the latents stands for each). If t is a lower bound of
the k-th largest p̃ of a row, k latents have p ≥ t/(1 + u) − ε, so every member of the true top k has
p̃ ≥ (1 − u)(t/(1 + u) − 2ε). Those are computed again in float32, and the k largest of them kept.
Rows where that bound says nothing (not above 0) take the float32 product.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.sae.product import CPU_ROWS, float32_product, prepacked_product
from reseed.sae.tournament import largest

_STORAGE = 2.0**-8
_LARGEST_INT16 = 2**15 - 1
MIN_D_IN, MIN_LATENTS, MIN_ROWS = 512, 8192, 2 * CPU_ROWS
"""Below these the float32 product costs less than choosing and computing again."""
MAX_CANDIDATES = 8
"""In units of k, over a block: with more, the band is too wide to pay."""

Selected = tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]


def screen_pays(rows: Float[Tensor, "batch d_in"], W_enc: Tensor) -> bool:
    """Whether `screened_select` is the faster way here."""
    num_latents, d_in = W_enc.shape
    return (
        rows.device.type == "cpu"
        and rows.dtype == W_enc.dtype == torch.float32
        and d_in >= MIN_D_IN
        and num_latents >= MIN_LATENTS
        and num_latents % 32 == 0
        and len(rows) >= MIN_ROWS
        and has_bfloat16()
    )


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (emulated, it is slower than float32)."""
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except AttributeError:
        return False


@torch.no_grad()
def screened_select(
    rows: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    k: int,
    descending: bool = False,
) -> Selected:
    """The same as `reseed.sae.selection.select`; needs a multiple of 32 latents."""
    values = rows.new_empty(len(rows), k)
    indices = torch.empty(len(rows), k, dtype=torch.int64)
    exact = float32_product(CPU_ROWS, W_enc, b_enc, repeats=1)
    rough_rows, rough_W, rough_b = rows.bfloat16(), W_enc.bfloat16(), b_enc.bfloat16()
    product = prepacked_product(CPU_ROWS, rough_W, rough_b, "relu")
    error = _error_bound(rows, rough_rows, W_enc, rough_W, b_enc, rough_b)
    for start in range(0, len(rows), CPU_ROWS):
        block = slice(start, start + CPU_ROWS)
        if product is not None:
            rough = product(rough_rows[block])
        else:
            rough = torch.nn.functional.linear(rough_rows[block], rough_W, rough_b).relu()
        # Bits of non-negative bfloat16 sort like integers, which are faster to compare.
        row, latent = _true_places(_candidates(rough.view(torch.int16), error[block], k))
        counts = torch.bincount(row, minlength=len(rough))
        unsure = counts < k
        if len(row) <= MAX_CANDIDATES * k * len(rough) and not unsure.all():
            found = _rescored(row, latent, counts, rows[block], W_enc, b_enc, k, descending)
        else:
            unsure = torch.ones_like(unsure)
            found = values[block], indices[block]
        if unsure.any():
            found[0][unsure], found[1][unsure] = largest(exact(rows[block][unsure]), k, descending)
        values[block], indices[block] = found
    return values, indices


def _error_bound(
    x: Tensor, rough_x: Tensor, W: Tensor, rough_W: Tensor, b: Tensor, rough_b: Tensor
) -> Float[Tensor, " batch"]:
    """ε of the module's head, for each row, with a percent more for its own rounding."""
    norm_x, lost_x = _norms(x, rough_x)
    norm_W, lost_W = (norms.max() for norms in _norms(W, rough_W))
    gamma = 2 * (x.shape[1] + 2) * 2.0**-24
    product = norm_x * lost_W + lost_x * (norm_W + lost_W)
    sums = gamma * (norm_x + lost_x) * (norm_W + lost_W)
    bias = (b - rough_b).abs().max() + gamma * b.abs().max()
    return 1.01 * (product + sums + bias)


def _norms(
    exact: Float[Tensor, "rows d_in"], rough: Float[Tensor, "rows d_in"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Of each row as rounded, and of what rounding took away; in blocks that fit the cache."""
    norms, lost = exact.new_empty(len(exact)), exact.new_empty(len(exact))
    for start in range(0, len(exact), CPU_ROWS):
        block = slice(start, start + CPU_ROWS)
        rounded = rough[block].float()
        torch.linalg.vector_norm(rounded, dim=1, out=norms[block])
        torch.linalg.vector_norm(exact[block] - rounded, dim=1, out=lost[block])
    return norms, lost


def _candidates(
    bits: Int[Tensor, "block num_latents"], error: Float[Tensor, " block"], k: int
) -> Bool[Tensor, "block num_latents"]:
    """Who may be among the k largest; nobody in rows where the bound says nothing."""
    # Maxima of disjoint groups: the k-th of them is a lower bound of the k-th of all.
    count, width = bits.shape
    members = 1
    while width % (2 * members) == 0 and width // (2 * members) >= 16 * k:
        members *= 2
    maxima = bits.view(count, members, -1).amax(1)
    bound = largest(maxima, k)[0].amin(1).view(torch.bfloat16).float()
    cut = (1 - _STORAGE) * (bound / (1 + _STORAGE) - 2 * error)
    # One step down, as rounding to bfloat16 may have gone up.
    cut_bits = cut.bfloat16().view(torch.int16) - 1
    sound = (cut > 0) & torch.isfinite(cut)
    cut_bits = torch.where(sound, cut_bits, _LARGEST_INT16).to(torch.int16)
    return bits >= cut_bits[:, None]


def _rescored(
    row: Int[Tensor, " candidates"],
    latent: Int[Tensor, " candidates"],
    counts: Int[Tensor, " block"],
    rows: Float[Tensor, "block d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    k: int,
    descending: bool,
) -> Selected:
    """The k largest candidates of every row, computed in float32."""
    offsets = counts.cumsum(0) - counts
    # Dot products of rows with chosen rows: `embedding_bag`'s gradient in its sample weights.
    scores = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows, W_enc, latent, offsets, row, 0, -1
    )
    width = max(k, int(counts.max()))
    table = rows.new_full((len(rows), width), -torch.inf)
    owners = torch.zeros(len(rows), width, dtype=torch.int64)
    place = torch.arange(len(row)) - offsets[row]
    table[row, place] = scores + b_enc[latent]
    owners[row, place] = latent
    values, chosen = table.topk(k, dim=1, sorted=descending)
    return values, owners.gather(1, chosen)


def _true_places(
    mask: Bool[Tensor, "block num_latents"],
) -> tuple[Int[Tensor, " found"], Int[Tensor, " found"]]:
    """`mask.nonzero()`, looking at eight bytes at a time: nearly all are false."""
    words = mask.view(torch.int64).flatten().nonzero().squeeze(1)
    word, byte = mask.view(-1, 8)[words].nonzero().unbind(1)
    position = words[word] * 8 + byte
    return position // mask.shape[1], position % mask.shape[1]
