"""What people and CI read of a check: every format is made of a :class:`gplq_export.check.report.Report` alone.

::

    words.py          what the formats have in common
    console.py        lines for a terminal
    markdown.py       a comment on a pull request
    junit.py          what CI systems show as tests
    html.py           everything, with charts, in one file: report.html.jinja
    charts.py         SVG
    diff.py           two reports: what got worse, what got better   (gplq-export diff)
    command.py        a report once more, in any format              (gplq-export report)
"""

from pathlib import Path

from gplq.files import write_text
from gplq_export.check.report import Report


def write_reports(report: Report, folder: Path) -> list[Path]:
    """Write a report in every format, each file atomically; returns their paths.

    ``parity.json`` comes first: it is there whatever fails after it, and the others can be made from it.

    Raises:
        UsageError: the folder cannot be written to.
    """
    from gplq_export.reports.html import html
    from gplq_export.reports.junit import junit
    from gplq_export.reports.markdown import markdown

    makers = {
        "parity.json": Report.to_json,
        "parity.junit.xml": junit,
        "report.md": markdown,
        "report.html": html,
    }
    for name, make in makers.items():
        write_text(folder / name, make(report))
    return [folder / name for name in makers]
