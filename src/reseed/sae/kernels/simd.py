"""Vectorised comparisons that return bits; LLVM compiles them to the CPU's SIMD instructions.

Also the flags with which it vectorises sums, and a prefetch.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic as _intrinsic

# Any, because the intrinsic takes fewer arguments than the function that it decorates.
intrinsic: Any = _intrinsic

LANES = 32
"""Numbers per comparison."""
REORDER = {"reassoc", "contract", "nsz"}
"""Flags that let sums be vectorised. NaN and infinities keep their meaning."""


@intrinsic
def compare_ge(typingctx: Any, row: Any, start: Any, bound: Any) -> Any:
    """Return 32 bits: bit i is row[start + i] ≥ bound, for a contiguous array of integers."""

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
    """Return how many of 32 bits are set."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.ctpop(args[0]), ir.IntType(64))

    return types.int64(types.uint32), generate


@intrinsic
def first_one(typingctx: Any, bits: Any) -> Any:
    """Return the place of the lowest bit that is set."""

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
    """Prefetch the cache line of array[i, j], of a contiguous matrix."""

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
    """Return 32 bits: bit i is row[start + i] > floors[start + i], or either is NaN, for floats."""

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
