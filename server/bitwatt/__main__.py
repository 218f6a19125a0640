"""`python -m bitwatt` is the command `bitwatt`."""

from bitwatt.cli import main

main()
