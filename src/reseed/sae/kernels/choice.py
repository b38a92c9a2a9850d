"""The k largest numbers of a row, and the vectorised comparisons that find them.

Numbers are compared as integers that have the same order. The k-th largest is found by bisection
between the smallest and the largest: a vectorised pass counts the numbers ≥ each midpoint. Rows are
long, so the maxima of disjoint groups come first: the k-th largest of them is a lower bound of the
k-th largest of all, and few numbers reach it.

The comparisons return bits; LLVM compiles them to the CPU's SIMD instructions. This file also
defines the flags with which LLVM vectorises sums, and a prefetch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic as _intrinsic

from reseed.system.compiling import njit

# Any, because the intrinsic takes fewer arguments than the function that it decorates.
intrinsic: Any = _intrinsic

LANES = 32
"""Number of elements that one comparison compares."""
REORDER = {"reassoc", "contract", "nsz"}
"""Flags that let sums be vectorised. NaN and infinities keep their meaning."""


@intrinsic
def compare_ge(typingctx: Any, row: Any, start: Any, bound: Any) -> Any:
    """Return 32 bits: bit i is set if row[start + i] ≥ bound; the row is contiguous integers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        kind = context.get_value_type(signature.args[0].dtype)
        lanes = ir.VectorType(kind, LANES)
        place = builder.gep(array.data, [args[1]])
        numbers = builder.load(builder.bitcast(place, lanes.as_pointer()))
        numbers.align = signature.args[0].dtype.bitwidth // 8
        one = builder.insert_element(ir.Constant(lanes, ir.Undefined), args[2], ir.IntType(32)(0))
        same = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        bounds = builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), same)
        found = builder.icmp_signed(">=", numbers, bounds)
        return builder.bitcast(found, ir.IntType(32))

    return types.uint32(row, types.int64, row.dtype), generate


@intrinsic
def popcount(typingctx: Any, bits: Any) -> Any:
    """Return the number of bits, of 32, that are set."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.ctpop(args[0]), ir.IntType(64))

    return types.int64(types.uint32), generate


@intrinsic
def first_one(typingctx: Any, bits: Any) -> Any:
    """Return the index of the lowest bit that is set."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        count = builder.cttz(args[0], ir.IntType(1)(1))
        return builder.zext(count, ir.IntType(64))

    return types.int64(types.uint32), generate


@intrinsic
def without_first(typingctx: Any, bits: Any) -> Any:
    """Return the bits with the lowest set bit cleared."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.and_(args[0], builder.sub(args[0], ir.IntType(32)(1)))

    return types.uint32(types.uint32), generate


@intrinsic
def prefetch(typingctx: Any, array: Any, i: Any, j: Any) -> Any:
    """Prefetch the cache line of array[i, j]; the array is a contiguous matrix."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        matrix = context.make_array(signature.args[0])(context, builder, args[0])
        width = builder.extract_value(matrix.shape, 1)
        place = builder.add(builder.mul(args[1], width), args[2])
        byte = builder.bitcast(builder.gep(matrix.data, [place]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte.type, number, number, number])
        name = "llvm.prefetch.p0"
        module = builder.module
        function = module.globals.get(name) or ir.Function(module, kind, name)
        builder.call(function, [byte, number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate


@intrinsic
def compare_gt(typingctx: Any, row: Any, start: Any, floors: Any) -> Any:
    """Return 32 bits: bit i is set if row[start + i] > floors[start + i] or either float is NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = ir.VectorType(context.get_value_type(signature.args[0].dtype), LANES)
        loaded = []
        for which in (0, 2):
            array = context.make_array(signature.args[which])(context, builder, args[which])
            place = builder.gep(array.data, [args[1]])
            numbers = builder.load(builder.bitcast(place, lanes.as_pointer()))
            numbers.align = signature.args[which].dtype.bitwidth // 8
            loaded.append(numbers)
        found = builder.fcmp_unordered(">", *loaded)
        return builder.bitcast(found, ir.IntType(32))

    return types.uint32(row, types.int64, floors), generate


_WIDE = 16
"""Minimum number of groups per chosen number."""
_LARGEST = np.int32(2**31 - 1)


@njit(nogil=True, cache=True, inline="always")
def padded(count):  # pragma: no cover
    """Return ``count`` rounded up to a multiple of `LANES`."""
    return (count + LANES - 1) // LANES * LANES


@njit(nogil=True, cache=True)
def kth_largest(keys, count, k):  # pragma: no cover
    """Return the k-th largest of the first ``count`` keys; overwrite the padding after them."""
    low = high = keys[0]
    for i in range(count):
        low = min(low, keys[i])
        high = max(high, keys[i])
    for i in range(count, padded(count)):
        keys[i] = low
    # The padding is the smallest key, so it counts only if the result is the smallest key anyway.
    least, most = np.int64(low), np.int64(high)
    while least < most:
        middle = least + (most - least + 1) // 2
        found = 0
        for start in range(0, count, LANES):
            found += popcount(compare_ge(keys, start, keys.dtype.type(middle)))
        if found >= k:
            least = middle
        else:
            most = middle - 1
    return keys.dtype.type(least)


@njit(nogil=True, cache=True)
def group_maxima(row, width, k, maxima):  # pragma: no cover
    """Write maxima of disjoint (strided) groups of the row, and return the number of groups."""
    groups = width
    while groups // 2 >= _WIDE * k:
        groups //= 2
    for i in range(groups):
        maxima[i] = row[i]
    for start in range(groups, width, groups):
        # The slice excludes negative indices; only then does the compiler vectorise the loop.
        others = row[start : min(start + groups, width)]
        for i in range(len(others)):
            maxima[i] = others[i] if others[i] > maxima[i] else maxima[i]
    return groups


@njit(nogil=True, cache=True)
def reaching(row, width, bound, places, most):  # pragma: no cover
    """Write the indices of the numbers ≥ bound, ascending; return their count, −1 if > ``most``."""
    count = 0
    whole = width // LANES * LANES
    for start in range(0, whole, LANES):
        bits = compare_ge(row, start, bound)
        while bits != 0:
            if count == most:
                return -1
            places[count] = start + first_one(bits)
            bits = without_first(bits)
            count += 1
    for i in range(whole, width):
        if row[i] >= bound:
            if count == most:
                return -1
            places[count] = i
            count += 1
    return count


@njit(nogil=True, cache=True)
def as_keys(values, count, keys):  # pragma: no cover
    """Write integers that order like the float32 numbers; NaN is largest, as in `torch.topk`."""
    bits = values.view(np.int32)
    for i in range(count):
        one = bits[i]
        key = one ^ ((one >> np.int32(31)) & _LARGEST)
        keys[i] = _LARGEST if values[i] != values[i] else key


@njit(nogil=True, cache=True)
def keep_largest(scores, places, count, k, keys, values, indices, descending):  # pragma: no cover
    """Write the k largest scores and their places; among equal scores, take the first ones."""
    as_keys(scores, count, keys)
    bound = kth_largest(keys, count, k)
    above = 0
    for i in range(count):
        above += keys[i] > bound
    equal, kept = k - above, 0
    for i in range(count):
        take = keys[i] > bound
        if not take and keys[i] == bound and equal > 0:
            take = True
            equal -= 1
        if take:
            values[kept], indices[kept] = scores[i], places[i]
            kept += 1
    if descending:
        _sort(values, indices, k, keys)


@njit(nogil=True, cache=True)
def _sort(values, indices, k, keys):  # pragma: no cover
    """Sort in place (Shellsort) by descending value, and equal values by ascending place."""
    as_keys(values, k, keys)
    gap = 1
    while gap < k // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for i in range(gap, k):
            key, value, index = keys[i], values[i], indices[i]
            j = i
            while j >= gap and (
                keys[j - gap] < key or (keys[j - gap] == key and indices[j - gap] > index)
            ):
                keys[j], values[j] = keys[j - gap], values[j - gap]
                indices[j] = indices[j - gap]
                j -= gap
            keys[j], values[j], indices[j] = key, value, index
        gap //= 3


@njit(nogil=True, cache=True)
def choose(rows, k, values, indices, start, stop, descending):  # pragma: no cover
    """Write the k largest float32 numbers of each row from ``start`` to ``stop``."""
    width = rows.shape[1]
    keys = np.empty(padded(width), dtype=np.int32)
    scratch = np.empty(padded(width), dtype=np.int32)
    places = np.empty(width, dtype=np.int64)
    scores = np.empty(width, dtype=np.float32)
    for i in range(start, stop):
        as_keys(rows[i], width, keys)
        groups = group_maxima(keys, width, k, scratch)
        bound = kth_largest(scratch, groups, k)
        count = reaching(keys, width, bound, places, width)
        for c in range(count):
            scores[c] = rows[i, places[c]]
        keep_largest(scores, places, count, k, scratch, values[i], indices[i], descending)
