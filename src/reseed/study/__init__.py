"""The steps of a study: train missing runs, evaluate them, compare them, collect the tables."""
