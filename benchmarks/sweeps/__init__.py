"""What `sweep.py` runs: the plan that all contenders share, and each contender's own way.

Every function that measures runs in a process of its own (`processes`). `plan` says what is to be
trained, `ours` and `peers` train it, `parts` makes tokens and held-out activations, measures FVU
and times the model's pass and an SAE's steps alone; `tables` shows what came out.
"""
