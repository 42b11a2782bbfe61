"""``gplq-export report``: a ``parity.json`` once more, in any format, without measuring anything.

Its exit code says nothing of the verdict: that of 'gplq-export check' did.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from gplq.errors import UsageError
from gplq.files import write_text
from gplq_export.check.report import Report, json_schema, read_report
from gplq_export.reports.console import console
from gplq_export.reports.html import html
from gplq_export.reports.junit import junit
from gplq_export.reports.markdown import markdown

FORMATS: dict[str, Callable[[Report], str]] = {
    "console": lambda report: "\n".join(console(report)) + "\n",
    "md": markdown,
    "html": html,
    "junit": junit,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``gplq-export report``."""
    parser.add_argument("report", type=Path, nargs="?", metavar="DIR|parity.json", help="what 'check' wrote")
    parser.add_argument("--format", choices=list(FORMATS), help="default: console")
    parser.add_argument("--out", type=Path, help="the file to write (default: standard output)")
    parser.add_argument("--link", help="of md: where the complete report is (default: report.html)")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of parity.json, and nothing else")


def run(arguments: argparse.Namespace) -> None:
    """Print or write a report.

    Raises:
        UsageError: it cannot be read or written, or a flag has no effect.
    """
    if arguments.schema:
        if others := [name for name in ("report", "format", "link") if getattr(arguments, name) is not None]:
            raise UsageError(f"--schema prints the JSON Schema alone; leave out {', '.join(others)}.")
        _emit(json.dumps(json_schema(), indent=2) + "\n", arguments.out)
        return
    if arguments.report is None:
        raise UsageError("name the folder of an export, or its reports/parity.json.")
    if arguments.link is not None and arguments.format != "md":
        raise UsageError("--link has no effect without --format md.")
    report = open_report(arguments.report)
    if arguments.link is not None:
        _emit(markdown(report, arguments.link), arguments.out)
    else:
        _emit(FORMATS[arguments.format or "console"](report), arguments.out)


def open_report(path: Path) -> Report:
    """Read a report: a file, or that of an export's folder.

    Raises:
        UsageError: there is none, or it is none of ours.
    """
    if path.is_dir():
        inside = path / "reports" / "parity.json"
        path = inside if inside.exists() else path / "parity.json"
    return read_report(path)


def _emit(text: str, out: Path | None) -> None:
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)
