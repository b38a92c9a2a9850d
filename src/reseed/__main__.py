"""Entry point of ``python -m reseed``."""

from reseed.cli.main import main

main()
