"""`python -m steerd.cli.ctl`."""

from steerd.cli.ctl import main

main()
