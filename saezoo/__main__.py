"""`python -m saezoo`."""

from saezoo.cli import main

main()
