"""``python -m reseed``."""

from reseed.cli.main import main

main()
