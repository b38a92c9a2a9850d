"""Comparison of trained dictionaries: matching, stability over seeds, nulls and intervals.

Weights and firing counts in, tables out; no language model and no training code is loaded.
"""
