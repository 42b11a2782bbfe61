"""Every error that a user can cause, and the exit code that it ends the command with.

GplqError
├── UsageError (2)          the command line, a recipe or an input file is wrong
│   ├── ConfigError         a recipe that does not validate
│   ├── DataError           images that cannot be read
│   ├── ModelError          a model that is unknown or of an unsupported structure
│   └── CheckpointError     a ``model.pt`` that is damaged, hostile or from a newer version
├── GateError (1)           everything ran, and a check of the result failed
├── MissingError (3)        a package, driver or device is missing on this machine
├── BuildError (4)          an export or an engine build failed
└── PrecisionError (5)      an engine was built, but not at the requested precision

Exit code 0 is success, 130 an interruption with Ctrl-C, 143 one with SIGTERM. Messages say what, where, why and what
to do.
"""

import re


def first_line(error: Exception) -> str:
    """What a library's exception says, for a message: its first line, without colours; or else its type."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return (text or type(error).__name__).splitlines()[0].rstrip()


class GplqError(Exception):
    """Base of the tree; never raised itself."""

    exit_code = 1


class UsageError(GplqError):
    """The command line or an input is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A recipe does not validate."""


class DataError(UsageError):
    """Images or labels cannot be read."""


class ModelError(UsageError):
    """A model is unknown, or its structure is not supported."""


class CheckpointError(UsageError):
    """A checkpoint is damaged, hostile or from a newer version."""


class GateError(GplqError):
    """A check of the result failed."""

    exit_code = 1


class MissingError(GplqError):
    """Something is not installed or not present on this machine."""

    exit_code = 3


class BuildError(GplqError):
    """An export or an engine build failed."""

    exit_code = 4


class PrecisionError(GplqError):
    """An engine was built, but not at the requested precision."""

    exit_code = 5
