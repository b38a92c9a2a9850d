"""The bound below which a variance is nothing but rounding errors."""

from __future__ import annotations

from typing import Any

import torch

UNITS = 64
"""Standard deviations up to this many units of rounding, relative to the root mean square, count as
rounding: a sum over a large batch in the same precision errs by up to about 32."""


def above_rounding(variance: Any, square: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Return whether a variance is larger than rounding alone can make it; False for NaN.

    Numbers that are all equal seldom have a computed variance of exactly 0, because their mean is
    rounded; a ratio to such a variance would be a number without meaning, like 10¹³.

    Args:
        variance: sum (or mean) of the squared deviations from the mean; a number, array or tensor.
        square: sum (or mean) of the squares of the same numbers.
        dtype: precision in which the numbers were computed.
    """
    return variance > square * (UNITS * torch.finfo(dtype).eps) ** 2
