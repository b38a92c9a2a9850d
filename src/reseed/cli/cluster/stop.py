"""Cancellation of the SLURM jobs of a sweep."""

from __future__ import annotations

from reseed.cli.cluster.queue import QueueError, cancel
from reseed.cli.cluster.record import Record
from reseed.cli.cluster.states import Seen
from reseed.sweeps import Sweep


def cancel_sweep(sweep: Sweep) -> list[str]:
    """Cancel every queued or running job of a sweep, and return their ids.

    Raises:
        QueueError: SLURM does not answer.
    """
    record = Record(sweep.path)
    if not record.path.is_file():
        return []
    with record.lock():
        seen = Seen.now(sweep)
        if seen.queue is None:
            raise QueueError(f"nothing was cancelled: {seen.trouble}")
        ids = [job.job for job in seen.active]
        record.mark_cancelled(ids)
        cancel(reversed(ids))  # dependent jobs first, so that none starts when its dependency ends
    return ids
