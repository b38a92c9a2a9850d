"""Makes the scripts that pretrained the embedded model importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "pretrain"))
