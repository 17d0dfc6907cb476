"""``python -m ndm_ct``: the command line."""

import sys

from ndm_ct.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
