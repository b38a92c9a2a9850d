"""The report of a sweep: blocks (`render`) as HTML with a browser of latents, markdown or TeX."""
