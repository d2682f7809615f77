"""`python -m lit_offrl`."""

import sys

from lit_offrl.cli import main

if __name__ == "__main__":
    sys.exit(main())
