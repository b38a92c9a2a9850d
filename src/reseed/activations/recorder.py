"""Record how the values inside a block of a model depend on each other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from reseed.activations.places import Additions, hidden_states, received


@dataclass(eq=False)
class Value:
    """A tensor in the recorded computation.

    Attributes:
        parents: the values that it was computed from.
        module: path of the module whose own code computed it.
        addition: number of the addition that computed it (see `Place`); None for other functions.
    """

    parents: tuple[Value, ...]
    module: str
    addition: int | None = None


class BlockDone(Exception):
    """Exception that ends the forward pass after the recorded block."""


class Recorder(Additions):
    """Records the values that are computed inside a block, and how they depend on each other.

    Views of a tensor are the same value.
    """

    def __init__(self, model: nn.Module, block: str) -> None:
        super().__init__(model, [block])
        self.block = block
        self.inputs: dict[str, list[Value]] = {}
        self.outputs: dict[str, list[Value]] = {}
        self._values: dict[tuple[Any, ...], Value] = {}
        self._alive: list[Tensor] = []  # the address of a storage is unique while it exists

    def entered(self, name: str, args: Any, kwargs: Any) -> None:
        try:
            tensor, _ = received(args, kwargs)
        except LookupError:
            return
        self.inputs.setdefault(name, []).append(self.value_of(tensor))

    def left(self, name: str, output: Any) -> None:
        try:
            tensor = hidden_states(output)
        except (TypeError, LookupError):
            tensor = None
        if isinstance(tensor, Tensor):
            self.outputs.setdefault(name, []).append(self.value_of(tensor, name))
        if name == self.block:
            raise BlockDone

    def called(self, func: Any, args: Any, kwargs: Any, addition: int | None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # an attribute, such as a shape
            return func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        parents = tuple(self.value_of(x) for x in given)
        result = func(*args, **kwargs)
        in_place = kwargs.get("inplace") is True or kwargs.get("out") is not None
        changed = in_place or name in _IN_PLACE or re.fullmatch(r"\w*[^_]_", name)
        plain = addition is not None and not kwargs and len(parents) == 2
        made = [args[0]] if name == "__setitem__" else tree_leaves(result)
        for tensor in (x for x in made if isinstance(x, Tensor)):
            there = self._values.get(_storage(tensor))
            if there is None or changed:  # what is changed in place becomes another value
                self._new(tensor, parents, self.running or "", addition if plain else None)
        return result

    def value_of(self, tensor: Tensor, module: str | None = None) -> Value:
        there = self._values.get(_storage(tensor))
        return there or self._new(tensor, (), module or self.running or "", None)

    def _new(
        self, tensor: Tensor, parents: tuple[Value, ...], module: str, addition: int | None
    ) -> Value:
        value = self._values[_storage(tensor)] = Value(parents, module, addition)
        self._alive.append(tensor)
        return value


_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


def _storage(x: Tensor) -> tuple[Any, ...]:
    return x.untyped_storage()._cdata, x.storage_offset(), x.numel()


class WithoutValues(TorchFunctionMode):
    """Makes conditions on tensors of the meta device, which have no values, true.

    Models ask, for example, whether a mask hides anything.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CONDITIONS and args[0].is_meta:
            return _CONDITIONS[func]
        return func(*args, **(kwargs or {}))


_CONDITIONS = {torch.Tensor.__bool__: True, torch.Tensor.item: 1, torch.Tensor.__int__: 1}
