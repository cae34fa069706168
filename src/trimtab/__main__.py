"""`python -m trimtab` is the command line."""

from trimtab.app.cli import main

main()
