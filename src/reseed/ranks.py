"""Processes that train one group together: who is one of how many, and what they say to each other.

    rank 0     leads: it holds the locks, tells the others what to do (`Ranks.tell`), records
    ranks 1…   follow (`reseed.follow`), on this machine or on other nodes

Every exchange is made by all ranks in the same order. Nobody waits blindly: between two looks
signals are heeded, and a rank whose process is gone is missed.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reseed.config import ReseedError

PATIENCE = timedelta(days=30)
"""A rank may wait as long as another works. That one is gone is seen otherwise."""
_SPINS, _PAUSE_S = 50, 1e-4
_SMALL = 2**18
"""Numbers; of fewer, a copy costs less than a message."""


class RankLost(ReseedError):
    """A process of the team is gone.

    Args:
        message: which one, and how it ended.
        out_of_memory: whether memory was what it lacked.
    """

    def __init__(self, message: str, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


@dataclass
class Ranks:
    """This process among those that train together.

    Attributes:
        index: which one it is, from 0.
        count: how many there are.
        device: where it trains.
        local_index, local_count: the same among those of its node.
        check: raises `RankLost` where one is known to be gone; called while it waits.
    """

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_index: int = 0
    local_count: int = 1
    check: Callable[[], None] = lambda: None
    _group: Any = None

    @property
    def several(self) -> bool:
        return self.count > 1

    @property
    def leads(self) -> bool:
        return self.index == 0

    def channel(self) -> Ranks:
        """The same ranks with exchanges of their own, for another thread. All make it together."""
        if not self.several:
            return self
        return Ranks(self.index, self.count, self.device, self.local_index, self.local_count,
                     self.check, dist.new_group(timeout=PATIENCE))  # fmt: skip

    def sum_(self, x: Tensor) -> Tensor:
        """``x``, with the sum over all ranks in it."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def largest_(self, x: Tensor) -> Tensor:
        """``x``, with the largest over all ranks in it."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """The mean over all ranks into each of the tensors, which are contiguous."""
        if not self.several:
            return
        small = [x for x in tensors if x.numel() < _SMALL]
        sent = [x for x in tensors if x.numel() >= _SMALL]
        if small:  # in one message
            sent.append(torch.cat([x.flatten() for x in small]))
        works = [dist.all_reduce(x, group=self._group, async_op=True) for x in sent]
        for x, work in zip(sent, works, strict=True):
            self._wait(work, x.device)
            x.div_(self.count)
        if small:
            means = sent[-1].split([x.numel() for x in small])
            for x, mean in zip(small, means, strict=True):
                x.copy_(mean.view_as(x))

    def copy_(self, x: Tensor, source: int, between: Callable[[], None] = lambda: None) -> Tensor:
        """``x``, with what rank ``source`` has there in it.

        Args:
            between: called while it waits.
        """
        if self.several:
            work = dist.broadcast(x, source, group=self._group, async_op=True)
            self._wait(work, x.device, between)
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """The vectors of all ranks, which may differ in length."""
        if not self.several:
            return [x]
        lengths = torch.zeros(self.count, dtype=torch.int64, device=x.device)
        lengths[self.index] = len(x)
        length = int(self.sum_(lengths).max())
        padded = x.new_zeros(length)
        padded[: len(x)] = x
        found = [torch.empty_like(padded) for _ in range(self.count)]
        work = dist.all_gather(found, padded, group=self._group, async_op=True)
        self._wait(work, x.device)
        return [one[:n] for one, n in zip(found, lengths.tolist(), strict=True)]

    def tell(self, what: Any = None) -> Any:
        """What rank 0 says, on every rank."""
        if not self.several:
            return what
        said = pickle.dumps(what) if self.leads else b""
        length = self.copy_(torch.tensor([len(said)], dtype=torch.int64), 0)
        room = torch.empty(int(length), dtype=torch.uint8)
        if self.leads:
            room.copy_(torch.frombuffer(bytearray(said), dtype=torch.uint8))
        return pickle.loads(self.copy_(room, 0).numpy().tobytes())

    def collect(self, what: Any) -> list[Any]:
        """What each rank has, on every rank."""
        own = torch.frombuffer(bytearray(pickle.dumps(what)), dtype=torch.uint8)
        return [pickle.loads(said.numpy().tobytes()) for said in self.gather(own)]

    def _reduced(self, x: Tensor, how: Any) -> Tensor:
        if self.several:
            self._wait(dist.all_reduce(x, how, group=self._group, async_op=True), x.device)
        return x

    def _wait(
        self, work: Any, device: torch.device, between: Callable[[], None] = lambda: None
    ) -> None:
        """On the CPU by looking again and again, as the library's own waiting is deaf to signals;
        on a GPU nobody waits here but its stream."""
        looks = 0
        while device.type == "cpu" and not work.is_completed():
            looks += 1
            time.sleep(0 if looks < _SPINS else _PAUSE_S)
            if looks % _SPINS == 0:
                self.check()
                between()
        try:
            work.wait()
        except RuntimeError as error:
            self.check()  # which knows more of it
            raise RankLost(f"another process of the team is gone ({error})") from error


ALONE = Ranks()
"""One process, which exchanges nothing."""
