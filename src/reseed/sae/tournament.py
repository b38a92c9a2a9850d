"""The k largest elements of every row."""

from __future__ import annotations

from jaxtyping import Int, Shaped
from torch import Tensor

_ARITY = 4
"""Elements per group."""


def largest(
    rows: Shaped[Tensor, "batch width"], k: int, descending: bool = False
) -> tuple[Shaped[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return the result of `torch.topk`; on the CPU by a tournament, which sorts fewer elements.

    The k largest lie in the k groups with the largest maxima: find those groups (recursively), then
    choose among their elements. A group is strided, so that maxima run over contiguous memory.
    """
    count, width = rows.shape
    groups, rest = divmod(width, _ARITY)
    if rest or groups < 2 * k or rows.device.type != "cpu":
        return rows.topk(k, dim=1, sorted=descending)
    members = rows.view(count, _ARITY, groups)
    _, best = largest(members.amax(1), k)
    chosen = members.gather(2, best[:, None].expand(-1, _ARITY, -1)).flatten(1)
    values, place = chosen.topk(k, dim=1, sorted=descending)
    return values, (place // k) * groups + best.gather(1, place % k)
