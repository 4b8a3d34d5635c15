"""``python -m convwave``."""

import sys

from convwave.cli import main

sys.exit(main())
