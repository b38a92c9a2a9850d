"""Modules of `sweep.py`: the plan that all contenders share, and the training of each contender.

Every measurement runs in a separate process (`processes`). `plan` defines the SAEs to train, `ours`
and `peers` train them, `parts` prepares tokens and held-out activations, measures FVU and times the
model's pass and an SAE's steps alone; `tables` prints the results.
"""
