"""Tables and figures of a comparison, from the measures of `reseed.compare`."""
