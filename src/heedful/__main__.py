"""`python -m heedful`: the command, where it is not on the path."""

from heedful.cli import main

main()
