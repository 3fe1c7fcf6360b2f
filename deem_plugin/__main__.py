"""Lets `python -m deem_plugin` do what `deem` does, for launchers that take a module."""

import sys

from .cli import main

sys.exit(main())
