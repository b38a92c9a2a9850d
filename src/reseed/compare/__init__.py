"""Comparison of trained dictionaries: matching, stability over seeds, nulls and intervals.

Weights, firing counts and, where there are, held-out activations in, tables out; no language model
and no training code is loaded.
"""
