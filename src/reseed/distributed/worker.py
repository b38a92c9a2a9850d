"""The worker process of distributed training: trains its share of each group that rank 0 sends.

`reseed.distributed.launcher` starts it as ``python -m reseed.distributed.worker``; SLURM starts it
as a task of a job.
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

from reseed.distributed.launcher import ADDRESS, OUT_OF_MEMORY, join
from reseed.distributed.process_group import ProcessGroup
from reseed.errors import Interrupted, ReseedError
from reseed.experiment import Experiment
from reseed.experiment.resolve import Resolved, resolve_experiment
from reseed.sae.pretrained import Pretrained
from reseed.store.runs import RunStore
from reseed.system.console import mute, open_streams
from reseed.system.devices import is_out_of_memory
from reseed.train.config import RuntimeConfig
from reseed.train.group import fit_on_process


@dataclass(frozen=True)
class RunMessage:
    """One run of a group, in the form that is sent to workers."""

    experiment: Experiment
    role: str
    penalty: float | None
    calibration: dict[str, Any] | None
    pretrained: Pretrained | None
    signature: str

    @classmethod
    def of(cls, resolved: Resolved) -> RunMessage:
        r = resolved
        return cls(r.experiment, r.role, r.penalty, r.calibration, r.pretrained, r.signature)

    def resolve(self, runtime: RuntimeConfig) -> Resolved:
        """Resolve the run on this node.

        Raises:
            ReseedError: its signature differs from that on the leader's node.
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
                f"{self.signature} on the leader's: code, model or text differ between the nodes"
            )
        return found


@dataclass(frozen=True)
class GroupMessage:
    """A group to train, as sent to the workers."""

    runs: tuple[RunMessage, ...]
    runtime: RuntimeConfig


def run_worker(ranks: ProcessGroup) -> None:
    """Train this rank's share of every group that rank 0 sends, until it sends None."""
    while (message := ranks.broadcast_object()) is not None:
        if message.runtime.strategy == "ddp":
            mute()  # all ranks would print the same
        group = [run.resolve(message.runtime).spec for run in message.runs]
        runs = [spec.run(RunStore(message.runtime.outputs)) for spec in group]
        fit_on_process(group, runs, message.runtime, ranks)


def main() -> None:
    """Run the worker until the leader ends it, then exit with its status."""
    open_streams()
    # Ctrl-C on a terminal reaches all processes; the leader decides how to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_leader, args=(os.getppid(),), daemon=True).start()
    status = _exit_status(*os.environ[ADDRESS].split(":"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # does not wait for an exchange that no other rank will complete


def _exit_status(host: str, port: str, index: str, count: str, kind: str) -> int:
    """Join the leader, train until it sends None, and return the exit status."""
    try:
        store = TCPStore(host, int(port), is_master=False)
        run_worker(join(store, int(index), int(count), kind))
    except Interrupted as stop:
        return 128 + stop.number
    except Exception as error:
        if is_out_of_memory(error):
            print(f"rank {index}: {error}", file=sys.stderr)
            return OUT_OF_MEMORY
        traceback.print_exc()
        return 1
    return 0


def _exit_with_leader(leader: int) -> None:
    """Exit once the leader is gone: its locks are free, so another process may take the runs."""
    while os.getppid() == leader:
        time.sleep(0.3)
    os._exit(1)


if __name__ == "__main__":
    main()
