from reseed.api import compose as compose
from reseed.api import load_sweep as load_sweep
from reseed.api import read_activations as read_activations
from reseed.compare.matching import match as match
from reseed.errors import ConfigError as ConfigError
from reseed.errors import ReseedError as ReseedError
from reseed.sae.formats import load_sae as load_sae
from reseed.store.find import load_run as load_run

__version__: str
