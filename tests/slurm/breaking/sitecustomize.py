"""Breaks what runs in a job, and there alone; put first on PYTHONPATH by the launcher's `setup`.

RESEED_TEST_BREAK=slow:SECONDS   each step of each SAE takes so much longer, until a requeue
RESEED_TEST_BREAK=fail:NAME      the first step of a run whose name ends so raises an error
"""

import os
import sys
import time

asked = os.environ.get("RESEED_TEST_BREAK", "")
again = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
if asked and not again and os.environ.get("SUBMITIT_EXECUTOR") and "_submit" in str(sys.orig_argv):
    from reseed.train.run_state import RunState

    kind, _, value = asked.partition(":")
    train = RunState.train

    def broken(self, *arguments, **options):
        if kind == "slow":
            end = time.monotonic() + float(value)
            while time.monotonic() < end:  # asleep it is interrupted between two of its parts
                time.sleep(0.01)
        elif self.id.endswith(value) or f"{value}-" in self.id:
            raise RuntimeError("made to fail\nin two lines")
        return train(self, *arguments, **options)

    RunState.train = broken
