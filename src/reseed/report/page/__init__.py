"""The report of a sweep: `blocks` as HTML with a browser of latents, markdown or TeX."""
