"""Experiments: `Experiment` as declared, `Resolved` as found and checked, with its signature."""

from reseed.experiment.declared import Experiment
from reseed.experiment.resolve import Resolved, cache_folder, resolve_experiment

__all__ = ["Experiment", "Resolved", "cache_folder", "resolve_experiment"]
