"""`python -m controller` is the command `headgate`."""

from controller.cli import main

main()
