"""``python -m gplq_export``."""

import sys

from gplq_export.cli import main

sys.exit(main())
