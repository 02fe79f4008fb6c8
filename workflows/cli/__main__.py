"""Run the command line with `python -m workflows.cli`."""

from workflows.cli.app import main

main()
