"""Cancel what was submitted for a sweep."""

from __future__ import annotations

from reseed.cli.cluster.queue import QueueError, cancel
from reseed.cli.cluster.record import Record
from reseed.cli.cluster.states import Seen
from reseed.sweeps import Sweep


def cancel_sweep(sweep: Sweep) -> list[str]:
    """Cancel every job of a sweep that waits or runs; their ids.

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
        cancel(reversed(ids))  # those that wait for others first, before their turn comes
    return ids
