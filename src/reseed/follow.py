"""A follower of a team: trains its share of each group, as it is told, until told to end.

Started by `reseed.train.team` as ``python -m reseed.follow``, or a task of a SLURM job.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from reseed.config import ReseedError
from reseed.console import mute
from reseed.devices import is_out_of_memory
from reseed.experiment import Experiment, Resolved, resolve_experiment
from reseed.ranks import Ranks
from reseed.runs import Interrupted, RunStore
from reseed.sae.pretrained import Pretrained
from reseed.train.config import RuntimeConfig
from reseed.train.team import ADDRESS, OUT_OF_MEMORY, join


@dataclass(frozen=True)
class Part:
    """One run of a group, as it is told to followers."""

    experiment: Experiment
    role: str
    penalty: float | None
    calibration: dict[str, Any] | None
    pretrained: Pretrained | None
    signature: str

    @classmethod
    def of(cls, resolved: Resolved) -> Part:
        r = resolved
        return cls(r.experiment, r.role, r.penalty, r.calibration, r.pretrained, r.signature)

    def resolve(self, runtime: RuntimeConfig) -> Resolved:
        """The same here.

        Raises:
            ReseedError: it is not the same here.
        """
        found = resolve_experiment(self.experiment, runtime)
        found = replace(
            found,
            role=self.role,
            penalty=self.penalty,
            calibration=self.calibration,
            pretrained=self.pretrained,
        )
        if found.signature != self.signature:
            raise ReseedError(
                f"{found.label} has signature {found.signature} on this node, and "
                f"{self.signature} on the first: code, model or text are not the same"
            )
        return found


@dataclass(frozen=True)
class Order:
    """What followers are told: a group to train."""

    parts: tuple[Part, ...]
    runtime: RuntimeConfig


def follow(ranks: Ranks) -> None:
    """Train a share of every group that the first rank names, until it names none."""
    from reseed.train.fit import fit_share

    while (order := ranks.tell()) is not None:
        if order.runtime.strategy == "ddp":
            mute()  # all ranks would say the same
        group = [part.resolve(order.runtime) for part in order.parts]
        runs = [resolved.run(RunStore(order.runtime.outputs)) for resolved in group]
        fit_share(group, runs, order.runtime, ranks)


def main() -> None:
    """Follow the process that started this one."""
    # Ctrl-C on a terminal reaches all processes; the first one says what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    status = _followed(*os.environ[ADDRESS].split(":"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # an exchange that nobody will answer is not waited for


def _followed(host: str, port: str, index: str, count: str, kind: str) -> int:
    """Follow until told to end; the exit status."""
    try:
        store = TCPStore(host, int(port), is_master=False)
        follow(join(store, int(index), int(count), kind))
    except Interrupted as stop:
        return 128 + stop.number
    except Exception as error:
        if is_out_of_memory(error):
            print(f"rank {index}: {error}", file=sys.stderr)
            return OUT_OF_MEMORY
        traceback.print_exc()
        return 1
    return 0


def _end_with(leader: int) -> None:
    """End once the leader is gone: its locks are free then, and another may take the runs."""
    while os.getppid() == leader:
        time.sleep(0.3)
    os._exit(1)


if __name__ == "__main__":
    main()
