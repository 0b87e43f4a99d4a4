"""``python -m refattn`` is the command line."""

from .cli import main

main()
