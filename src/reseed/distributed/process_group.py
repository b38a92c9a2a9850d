"""A process's rank, its exchanges with the other ranks, and batches that several ranks share.

`ProcessGroup` has the exchanges. All ranks must make the same exchanges in the same order. Waiting
is a polling loop, so that signals are handled and the death of another process is noticed.

Ranks exchange tensors and JSON, never pickles. Each JSON message begins with an HMAC-SHA256 under
the key of the group, over the number of the exchange, the sender's rank and the text. The receiver
verifies it before it parses the text, so a process without the key can neither give an order nor
repeat an earlier one.

If ranks share each batch in equal portions (``runtime=ddp``), each computes the loss on its
portion, such that the means over the ranks of loss and gradients are those of the whole batch. This
holds by itself for a mean over tokens. Terms that depend on the batch in another way use these
functions:

    total variance         `shared_variance`: an equal share of the whole batch's variance
    a mean, squared        `batch_mean`
    smallest chosen value  `min_over_batch`
    the k·B largest        one cut for all ranks  (`reseed.sae.selection`)

Training declares the sharing once, with a context like autocast (`batch_shared_by`), so losses need
no parameter for it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from reseed.errors import ReseedError

PATIENCE = timedelta(days=30)
"""Timeout of an exchange: a rank may wait as long as another works. `ProcessGroup.check` detects
the loss of a rank."""
_SPINS, _PAUSE_S = 50, 1e-4
_LAST_CHECKS, _LAST_CHECK_S = 20, 0.05
_SMALL = 2**18
"""Number of elements below which copying a tensor costs less than a message of its own."""
_MAC = hashlib.sha256().digest_size
_LONGEST = 2**30
"""Longest JSON message in bytes, so that no announced length can exhaust memory."""


class ProcessLostError(ReseedError):
    """The loss of another process of the group that trains together.

    Args:
        message: names the process and how it ended.
        out_of_memory: True if it ran out of memory.
    """

    def __init__(self, message: str, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


@dataclass
class ProcessGroup:
    """This process's rank, and its exchanges with the other ranks.

    Attributes:
        index: this process's rank, from 0.
        count: number of ranks.
        device: device that this process trains on.
        local_index, local_count: index and count among the ranks of its node.
        check: raises `ProcessLostError` if a rank is known to be lost; called while waiting.
        key: key that all ranks share and nobody else knows; it authenticates JSON messages.
    """

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_index: int = 0
    local_count: int = 1
    check: Callable[[], None] = lambda: None
    key: bytes = field(default=b"", repr=False)
    _group: Any = None
    _messages: int = 0

    @property
    def several(self) -> bool:
        return self.count > 1

    @property
    def leads(self) -> bool:
        return self.index == 0

    def channel(self) -> ProcessGroup:
        """Return a separate channel for another thread, which exchanges tensors only: JSON messages
        are numbered on the main channel. All ranks must call this together."""
        if not self.several:
            return self
        return replace(self, _group=dist.new_group(timeout=PATIENCE))

    def sum_(self, x: Tensor) -> Tensor:
        """Replace ``x`` by its sum over all ranks, and return it."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def max_(self, x: Tensor) -> Tensor:
        """Replace ``x`` by its elementwise maximum over all ranks, and return it."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of the tensors, which must be contiguous, by its mean over all ranks."""
        if not self.several:
            return
        small = [x for x in tensors if x.numel() < _SMALL]
        sent = [x for x in tensors if x.numel() >= _SMALL]
        if small:  # sent in one message
            sent.append(torch.cat([x.flatten() for x in small]))
        works = [dist.all_reduce(x, group=self._group, async_op=True) for x in sent]
        for x, work in zip(sent, works, strict=True):
            self._wait(work, x.device)
            x.div_(self.count)
        if small:
            means = sent[-1].split([x.numel() for x in small])
            for x, mean in zip(small, means, strict=True):
                x.copy_(mean.view_as(x))

    def broadcast_(
        self, x: Tensor, source: int, between: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Replace ``x`` by that of rank ``source``, and return it.

        Args:
            between: called while waiting.
        """
        if self.several:
            work = dist.broadcast(x, source, group=self._group, async_op=True)
            self._wait(work, x.device, between)
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """Return the vectors of all ranks, which may differ in length."""
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

    def broadcast_json(self, value: Any = None) -> Any:
        """Send a value of rank 0, in JSON, to all ranks, and return it.

        Numbers keep their value, also NaN and infinities; tuples become lists.

        Raises:
            ReseedError: the message was not made by rank 0.
        """
        if not self.several:
            return value
        sent = self._seal(value) if self.leads else torch.empty(0, dtype=torch.uint8)
        length = int(self.broadcast_(torch.tensor([len(sent)], dtype=torch.int64), 0))
        if not _MAC < length <= _LONGEST:
            raise self._refusal(0)
        buffer = sent if self.leads else torch.empty(length, dtype=torch.uint8)
        return self._open([self.broadcast_(buffer, 0)])[0]

    def gather_json(self, value: Any) -> list[Any]:
        """Return the values of all ranks, sent in JSON, on every rank.

        Numbers keep their value, also NaN and infinities; tuples become lists.

        Raises:
            ReseedError: a message was not made by its rank.
        """
        return self._open(self.gather(self._seal(value))) if self.several else [value]

    def _seal(self, value: Any) -> Tensor:
        """Return the message with ``value``, in bytes."""
        text = json.dumps(value).encode()
        mac = self._mac(self.index, text)
        return torch.frombuffer(bytearray(mac + text), dtype=torch.uint8)

    def _open(self, messages: Sequence[Tensor]) -> list[Any]:
        """Return the values of the messages of ranks 0, 1, ..., after verifying the senders."""
        values = []
        for sender, message in enumerate(messages):
            sent = message.numpy().tobytes()
            mac, text = sent[:_MAC], sent[_MAC:]
            if not hmac.compare_digest(mac, self._mac(sender, text)):
                raise self._refusal(sender)
            values.append(json.loads(text))
        self._messages += 1
        return values

    def _mac(self, sender: int, text: bytes) -> bytes:
        return hmac.digest(self.key, b"%d %d " % (self._messages, sender) + text, "sha256")

    def _refusal(self, sender: int) -> ReseedError:
        return ReseedError(
            f"refused a message that rank {sender} of this training did not send (its HMAC or its "
            "length is wrong)"
        )

    def _reduced(self, x: Tensor, how: Any) -> Tensor:
        if self.several:
            self._wait(dist.all_reduce(x, how, group=self._group, async_op=True), x.device)
        return x

    def _wait(
        self, work: Any, device: torch.device, between: Callable[[], None] = lambda: None
    ) -> None:
        """Wait for an exchange.

        Polls on the CPU, because torch's own wait ignores signals; on a GPU only the stream waits.
        """
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
            # A killed process loses its connections a moment before its exit can be seen.
            for _ in range(_LAST_CHECKS):
                self.check()  # raises a more specific error if it can
                time.sleep(_LAST_CHECK_S)
            raise ProcessLostError(f"another process of the group has ended ({error})") from error


ALONE = ProcessGroup()
"""A single process, without exchanges."""

_sharing: ContextVar[ProcessGroup] = ContextVar("sharing", default=ALONE)


@contextmanager
def batch_shared_by(ranks: ProcessGroup) -> Iterator[None]:
    """Declare that, inside the context, every batch is one rank's portion of a shared batch."""
    before = _sharing.set(ranks)
    try:
        yield
    finally:
        _sharing.reset(before)


def current_batch_group() -> ProcessGroup:
    """Return the ranks that share the batch: this process alone, unless training declares more."""
    return _sharing.get()


def batch_mean(mean: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the mean over the whole batch, with the gradient of this rank's portion.

    For means that enter a loss nonlinearly: the gradient, averaged over the ranks, is then that of
    the whole batch.
    """
    ranks = current_batch_group()
    if not ranks.several:
        return mean
    whole = ranks.sum_(mean.detach().clone()) / ranks.count
    return mean + (whole - mean.detach())


def min_over_batch(values: Float[Tensor, " pairs"]) -> Float[Tensor, ""]:
    """Return the smallest value of the whole batch; infinity if there is none."""
    own = values.min() if len(values) else values.new_full((), torch.inf)
    return -current_batch_group().max_(-own)


def shared_variance(x: Float[Tensor, "batch d_in"], own: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return this rank's equal share of Σ‖x − x̄‖² over the whole batch.

    Args:
        own: Σ‖x − x̄‖² of this rank's portion around its own mean.
    """
    ranks = current_batch_group()
    if not ranks.several:
        return own
    # Σ_r own_r + Σ_r n‖x̄_r − x̄‖², in float64: the second term is a difference of large sums.
    mean = x.detach().double().mean(0)
    sums = torch.cat([mean, own.detach().double()[None], mean.square().sum()[None]])
    sums = ranks.sum_(sums) / ranks.count
    between = len(x) * (sums[-1] - sums[:-2].square().sum())
    return (sums[-2] + between.clamp_min(0)).to(own.dtype)
