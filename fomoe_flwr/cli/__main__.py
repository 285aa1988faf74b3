"""`python -m fomoe_flwr.cli` is `fomoe`."""

import sys

from fomoe_flwr.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
