"""The worker process of distributed training: trains its share of each group that rank 0 sends.

`reseed.distributed.launcher` starts it as ``python -m reseed.distributed.worker``; SLURM starts it
as a task of a job.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reseed import activations, sae
from reseed.config import Config
from reseed.distributed.launcher import ADDRESS, OUT_OF_MEMORY, join, open_store
from reseed.distributed.process_group import ProcessGroup
from reseed.errors import ConfigError, Interrupted, ReseedError
from reseed.experiment import Experiment
from reseed.experiment.resolve import Resolved, resolve_experiment
from reseed.sae.pretrained import Pretrained
from reseed.store.runs import RunStore
from reseed.system.console import mute, open_streams
from reseed.system.devices import is_out_of_memory
from reseed.train.config import RuntimeConfig
from reseed.train.group import fit_on_process


@dataclass(frozen=True)
class RunMessage(Config):
    """One run of a group, in the form that is sent to workers."""

    experiment: Experiment
    role: str
    penalty: float | None
    calibration: dict[str, Any] | None
    pretrained: dict[str, Any] | None
    signature: str

    @classmethod
    def of(cls, resolved: Resolved) -> RunMessage:
        r = resolved
        pretrained = None if r.pretrained is None else r.pretrained.to_dict()
        return cls(r.experiment, r.role, r.penalty, r.calibration, pretrained, r.signature)

    def resolve(self, runtime: RuntimeConfig) -> Resolved:
        """Resolve the run on this node.

        Raises:
            ReseedError: its signature differs from that on the leader's node.
        """
        pretrained = None if self.pretrained is None else Pretrained.from_dict(self.pretrained)
        found = resolve_experiment(self.experiment, runtime)
        found = replace(
            found,
            role=self.role,
            penalty=self.penalty,
            calibration=self.calibration,
            pretrained=pretrained,
        )
        if found.signature != self.signature:
            raise ReseedError(
                f"{found.label} has signature {found.signature} on this node, and "
                f"{self.signature} on the leader's: code, model or text differ between the nodes"
            )
        return found


def group_message(group: Sequence[Resolved], runtime: RuntimeConfig) -> dict[str, Any]:
    """Return the message, in plain values, that tells workers to train a group."""
    return {"runs": [RunMessage.of(r).to_dict() for r in group], "runtime": runtime.to_dict()}


def read_group(message: Any) -> tuple[list[RunMessage], RuntimeConfig]:
    """Return the runs and the runtime options of a message of `group_message`.

    Classes have stable names in it, which are looked up in the registry and never imported.

    Raises:
        ReseedError: it has an unknown key or name, or a value of a wrong type.
    """
    activations.load_all()
    sae.load_all()
    try:
        if not isinstance(message, dict) or message.keys() != {"runs", "runtime"}:
            raise ConfigError("{key} must have `runs` and `runtime`", "message")
        runs = [RunMessage.from_dict(run, f"runs[{i}]") for i, run in enumerate(message["runs"])]
        return runs, RuntimeConfig.from_dict(message["runtime"], "runtime")
    except (ConfigError, TypeError, ValueError) as error:
        raise ReseedError(
            f"cannot read the message of rank 0: {error}. Install the same version of reseed on "
            "all nodes"
        ) from error


def run_worker(ranks: ProcessGroup) -> None:
    """Train this rank's share of every group that rank 0 sends, until it sends None."""
    while (message := ranks.broadcast_json()) is not None:
        runs, runtime = read_group(message)
        if runtime.strategy == "ddp":
            mute()  # all ranks would print the same
        group = [run.resolve(runtime).spec for run in runs]
        store = RunStore(runtime.outputs)
        fit_on_process(group, [spec.run(store) for spec in group], runtime, ranks)


def main() -> None:
    """Run the worker until the leader ends it, then exit with its status."""
    open_streams()
    # Ctrl-C on a terminal reaches all processes; the leader decides how to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leader, index, count, kind, name = os.environ[ADDRESS].split(":", 4)
    folder = Path(name)
    threading.Thread(target=_exit_with_leader, args=(int(leader), folder), daemon=True).start()
    status = _exit_status(folder, int(index), int(count), kind)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # does not wait for an exchange that no other rank will complete


def _exit_status(folder: Path, index: int, count: int, kind: str) -> int:
    """Join the leader, train until it sends None, and return the exit status."""
    try:
        run_worker(join(open_store(folder), index, count, kind))
    except Interrupted as stop:
        return 128 + stop.number
    except Exception as error:
        if is_out_of_memory(error):
            print(f"rank {index}: {error}", file=sys.stderr)
            return OUT_OF_MEMORY
        if isinstance(error, ReseedError):
            print(f"rank {index}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        return 1
    return 0


def _exit_with_leader(leader: int, folder: Path) -> None:
    """Exit once the leader is gone: its locks are free, so another process may take the runs."""
    while os.getppid() == leader:
        time.sleep(0.3)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main()
