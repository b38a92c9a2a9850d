"""An object that shows whether a pickle was executed."""

from __future__ import annotations

import os
from pathlib import Path


class Payload:
    """An object whose unpickling makes a folder."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.sign),)
