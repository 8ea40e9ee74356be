"""Makes ``python -m conversion.cli`` the console script ``mla``."""

from . import main

main()
