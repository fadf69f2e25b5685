"""`python -m igla_mega`."""

from igla_mega.cli import main

main()
