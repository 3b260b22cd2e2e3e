"""``python -m robustood`` is the command ``robustood``."""

import sys

from robustood.cli import main

if __name__ == "__main__":
    sys.exit(main())
