"""``python -m gplq``."""

import sys

from gplq.cli import main

sys.exit(main())
