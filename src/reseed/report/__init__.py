"""Tables and figures of a comparison, from what `reseed.compare` measured."""
