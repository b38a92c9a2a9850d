"""Comparison of trained dictionaries: matching, stability over seeds, nulls and intervals.

The input is weights, firing counts and, if stored, held-out activations; the output is tables. No
language model and no training code is loaded.
"""
