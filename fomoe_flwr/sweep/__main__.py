"""`python -m fomoe_flwr.sweep -m KEY=V1,V2 ...` is `fomoe sweep`."""

import sys

from fomoe_flwr.cli.main import main

sys.exit(main(["sweep", *sys.argv[1:]]))
