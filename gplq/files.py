"""Writing files so that a failure or a kill leaves the old content or the new, never half of it; and hashing them."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gplq.errors import UsageError


def printable(path: str | Path) -> str:
    r"""A path for messages and records: what is no UTF-8 in it is written as its bytes.

    >>> printable("k\udcfcche")
    'k\\xfcche'
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; renamed to ``path`` on success, deleted on failure.

    Raises:
        UsageError: the folder is missing, read-only or full.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        # mkstemp makes the file private; an output should follow the user's umask like any other.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise writing_error(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A folder to fill under a temporary name beside ``out``; on success renamed to ``out``, in place of what is there.

    Raises:
        UsageError: the folder that it is to lie in is read-only or full.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        temporary.chmod(0o755)
    except OSError as error:
        raise writing_error(out, error) from error
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        if out.exists():
            out.rename(old)
        temporary.rename(out)
    except OSError as error:
        if old.exists() and not out.exists():
            old.rename(out)
        raise writing_error(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def writing_error(path: Path, error: OSError) -> UsageError:
    """The message for an operating-system error met while writing ``path``."""
    advice = {
        errno.ENOSPC: "free some space or choose another folder",
        errno.EDQUOT: "free some space or choose another folder",
        errno.EACCES: "choose a folder that you may write to",
        errno.EPERM: "choose a folder that you may write to",
        errno.EROFS: "choose a folder that you may write to",
        errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
        errno.EEXIST: "a part of the path is a file, not a folder; choose another path",
    }.get(error.errno or 0, "choose another path")
    return UsageError(f"cannot write {path}: {error.strerror or error}. Nothing was left behind; {advice}.")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")  # names of files, as they are


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically, indented, keys in the order given."""
    write_text(path, json.dumps(content, indent=2) + "\n")
