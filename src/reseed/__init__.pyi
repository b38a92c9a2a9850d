from reseed.compare.matching import match as match
from reseed.sae.formats import load_sae as load_sae
from reseed.store.runs import load_run as load_run

__version__: str
