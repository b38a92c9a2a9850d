"""Places: tensors of a model's forward pass, read or replaced while it runs.

A place is the input or output of a module, or a tensor of an addition in a module's own code: some
models write what enters the residual stream to no module's output, for example if a factor scales
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

OUTPUT, INPUT, TERM, SUM = "output", "input", "term", "sum"
Action = Callable[[Tensor], Tensor | None]
"""Receives a tensor [sequences, context, width]; returns a replacement, or None for no change."""


@dataclass(frozen=True)
class Place:
    """A tensor of the forward pass.

    Attributes:
        module: path of the module at which, or in whose own code, the tensor is found.
        kind: ``output`` or ``input`` of the module; ``term`` or ``sum`` of an addition in its code.
        number: number of the addition in the module's own code, from 0. The code of its submodules
            does not count.
        term: 0 for the first term of the addition, 1 for the second.
    """

    module: str
    kind: str = OUTPUT
    number: int = 0
    term: int = 0

    def __str__(self) -> str:
        if self.kind in (OUTPUT, INPUT):
            return f"the {self.kind} of {self.module}"
        part = "result" if self.kind == SUM else ("first term", "second term")[self.term]
        return f"the {part} of addition {self.number} in {self.module}"


@contextmanager
def watch(model: nn.Module, actions: Mapping[Place, Action]) -> Iterator[None]:
    """Call an action with the tensor at each place whenever ``model`` computes it.

    Actions receive tensors whose tokens the model has flattened into one dimension as sequences.
    Replacements are cast to the dtype of the original. Gradients pass through them.

    Raises:
        ValueError: a replacement has another shape than the tensor.
    """
    size = torch.Size()

    def note_size(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal size
        size = (args[0] if args else kwargs["input_ids"]).shape

    def act(place: Place, found: Tensor) -> Tensor:
        flattened = found.dim() == 2 and len(found) == size.numel()
        there = found.reshape(*size, -1) if flattened else found
        given = actions[place](there)
        if given is None:
            return found
        if given.shape != there.shape:
            raise ValueError(
                f"the replacement of {place}, a tensor of shape {tuple(there.shape)}, must have "
                f"the same shape; got {tuple(given.shape)}"
            )
        # A copy, because the model may change the tensor in place.
        return given.to(found.dtype).reshape(found.shape).clone()

    with one_pass(model), ExitStack() as stack:

        def hook(handle: Any) -> None:
            stack.callback(handle.remove)

        hook(model.register_forward_pre_hook(note_size, with_kwargs=True))
        in_code: dict[tuple[str, int], list[Place]] = {}
        for place in actions:
            module = model.get_submodule(place.module)
            if place.kind == OUTPUT:
                hook(module.register_forward_hook(_output_hook(place, act)))
            elif place.kind == INPUT:
                hook(module.register_forward_pre_hook(_input_hook(place, act), with_kwargs=True))
            else:
                in_code.setdefault((place.module, place.number), []).append(place)
        if in_code:
            modules = {module for module, _ in in_code}
            stack.enter_context(_WatchedAdditions(model, modules, in_code, act))
        yield


def read(model: nn.Module, places: Sequence[Place], **inputs: Any) -> dict[Place, Tensor]:
    """Return the tensors at ``places`` in one forward pass, which ends once all are computed.

    Raises:
        LookupError: the forward pass does not compute one of them.
    """
    found: dict[Place, Tensor] = {}

    def keep(place: Place) -> Action:
        def action(tensor: Tensor) -> None:
            found[place] = tensor
            if len(found) == len(wanted):
                raise _Stop
            found[place] = tensor.clone()  # the model may change the tensor in place

        return action

    wanted = {place: keep(place) for place in places}
    try:
        with watch(model, wanted):
            model(**inputs, use_cache=False)
    except _Stop:
        pass
    missed = [place for place in wanted if place not in found]
    if missed:
        raise LookupError(f"the forward pass never computes {missed[0]}")
    return found


@contextmanager
def one_pass(model: nn.Module) -> Iterator[None]:
    """Keep other threads from running a model whose hooks are watched: hooks see their passes, too.

    The thread itself may enter again.
    """
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(model, RLock())
    with lock:
        yield


_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_LOCKS_LOCK = Lock()


class _Stop(Exception):
    """Exception that ends a forward pass, once nothing more is needed of it."""


def hidden_states(output: Any) -> Tensor:
    """Return the hidden states in a module's output: a tensor, or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def received(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, int | str]:
    """Return the first tensor that a module receives, and its position or keyword.

    Raises:
        LookupError: it receives none.
    """
    for at, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor):
            return value, at
    raise LookupError("the module receives no tensor")


class Additions(TorchFunctionMode):
    """Base class that knows which module's own code runs, and numbers the additions in it.

    Args:
        model: the model that will run.
        modules: paths of modules; these and the modules inside them are followed.
    """

    def __init__(self, model: nn.Module, modules: Iterable[str]) -> None:
        super().__init__()
        self.model, self.modules = model, tuple(modules)
        self._running: list[tuple[str, Iterator[int]]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Any:
        # A pass that ended early left its modules behind.
        clear = self.model.register_forward_pre_hook(lambda *_: self._running.clear())
        self._handles.append(clear)
        inside = tuple(f"{module}." for module in self.modules)
        for name, module in self.model.named_modules():
            if name in self.modules or name.startswith(inside):
                self._handles += self._follow(name, module)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.clear()

    def _follow(self, name: str, module: nn.Module) -> list[Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._running.append((name, iter(range(1 << 62))))
            self.entered(name, args, kwargs)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._running.pop()
            self.left(name, output)

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
        ]

    @property
    def running(self) -> str | None:
        """Path of the module whose own code runs; None outside of those that are followed."""
        return self._running[-1][0] if self._running else None

    def entered(self, name: str, args: Any, kwargs: Any) -> None:
        """Act when a module is called."""

    def left(self, name: str, output: Any) -> None:
        """Act when a module has returned."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._running:
            return func(*args, **kwargs)
        number = next(self._running[-1][1]) if func in _ADDITIONS else None
        return self.called(func, args, kwargs, number)

    def called(self, func: Any, args: Any, kwargs: Any, addition: int | None) -> Any:
        """Call a function of torch and return its result."""
        return func(*args, **kwargs)


_ADDITIONS = {
    torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__,
    torch.Tensor.__iadd__,
}  # fmt: skip
_Act = Callable[[Place, Tensor], Tensor]


class _WatchedAdditions(Additions):
    """Calls an action with terms and results of some additions."""

    def __init__(
        self,
        model: nn.Module,
        modules: Iterable[str],
        places: Mapping[tuple[str, int], Sequence[Place]],
        act: _Act,
    ) -> None:
        super().__init__(model, modules)
        self.places, self.act = places, act

    def called(self, func: Any, args: Any, kwargs: Any, addition: int | None) -> Any:
        if addition is None:
            return func(*args, **kwargs)
        places = self.places.get((self.running or "", addition), ())
        terms = list(args)
        for place in places:
            if place.kind == TERM:
                terms[place.term] = self.act(place, terms[place.term])
        result = func(*terms, **kwargs)
        for place in places:
            if place.kind == SUM:
                result = self.act(place, result)
        return result


def _output_hook(place: Place, act: _Act) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        found = hidden_states(output)
        given = act(place, found)
        if given is found:
            return None
        if isinstance(output, Tensor):
            return given
        if isinstance(output, Mapping):  # an output of transformers
            return type(output)(**{**output, next(iter(output)): given})
        return type(output)((given, *output[1:]))

    return hook


def _input_hook(place: Place, act: _Act) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found, at = received(args, kwargs)
        given = act(place, found)
        if given is found:
            return None
        if isinstance(at, int):
            return (*args[:at], given, *args[at + 1 :]), kwargs
        return args, {**kwargs, at: given}

    return hook
