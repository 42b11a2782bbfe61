"""A pytest plugin: the fixture ``gplq_parity``, in which the test of an export consists.

A user's repository names the export and its images once, in ``pyproject.toml`` or on the command line::

    [tool.pytest.ini_options]
    gplq_export = "dist"                       # --gplq-export: the folder that gplq-export wrote
    gplq_data = "images.npz"                   # --gplq-data: test images, as --data of gplq-export
    gplq_images = "512"                        # --gplq-images: so many of them (default: all)
    gplq_thresholds = "thresholds.yaml"        # --gplq-thresholds: limits that replace those of gplq
    gplq_require = ["trt"]                     # --gplq-require: back ends that must not be missing

and a test asks for the fixture, and may look closer at what was found::

    def test_the_export(gplq_parity):
        assert gplq_parity.pair("cpu").candidate_top.top1.value > 90

The check runs once a session, when the first test asks. If a gate fails, so do all tests that ask: in their set-up,
which pytest calls an error, with a line for each gate. What was skipped, and why, ends pytest's output.

Nothing is imported before that, so that sessions without it stay as fast as they are.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gplq_export.check.report import Report

_OPTIONS = {
    "export": "folder that gplq-export wrote, to be checked by the fixture gplq_parity",
    "data": "its test images, as --data of gplq-export",
    "images": "how many of them (default: all)",
    "thresholds": "YAML file with limits that replace those of gplq",
}
_report = pytest.StashKey["Report"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, each on the command line and in the configuration file."""
    group = parser.getgroup("gplq", "parity of exported models (gplq)")
    for name, text in _OPTIONS.items():
        group.addoption(f"--gplq-{name}", metavar=name.upper(), help=text)
        parser.addini(f"gplq_{name}", text)
    text = "back end, such as trt, whose absence is a failure; may be repeated"
    group.addoption("--gplq-require", metavar="NAME", action="append", default=[], help=text)
    parser.addini("gplq_require", text, type="args")


@pytest.fixture(scope="session")
def gplq_parity(pytestconfig: pytest.Config) -> "Report":
    """What the check of the export found (``gplq_export.check.report.Report``); fails if a gate failed."""
    __tracebackhide__ = True
    folder, data = (_option(pytestconfig, name) for name in ("export", "data"))
    images, thresholds = (_option(pytestconfig, name) for name in ("images", "thresholds"))
    if not folder or not data:
        pytest.fail(
            "gplq_parity needs --gplq-export and --gplq-data, or gplq_export and gplq_data in the "
            "configuration of pytest.",
            pytrace=False,
        )
    if images is not None and not images.isdecimal():
        pytest.fail(f"--gplq-images takes a number, found '{images}'.", pytrace=False)
    from gplq.errors import GplqError
    from gplq_export.manifest import CHECKPOINT
    from gplq_export.testing import assert_parity

    try:
        report = assert_parity(
            Path(folder, CHECKPOINT),
            folder,
            data,
            limit=None if images is None else int(images),
            thresholds=thresholds,
            require=[*pytestconfig.getoption("--gplq-require"), *pytestconfig.getini("gplq_require")],
        )
    except (AssertionError, GplqError) as error:
        pytest.fail(str(error), pytrace=False)
    pytestconfig.stash[_report] = report
    return report


def _option(config: pytest.Config, name: str) -> str | None:
    """As given on the command line, where paths are relative to the current folder; or in the configuration file."""
    given: str | None = config.getoption(f"--gplq-{name}")
    if given is not None:
        return given
    stored = str(config.getini(f"gplq_{name}"))
    is_path = name != "images" and not stored.startswith("hf:")
    return (str(config.rootpath / stored) if is_path else stored) if stored else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What the check could not do, and why: a skipped gate is no passed one."""
    report = config.stash.get(_report, None)
    if report is None:
        return
    counts = {status: sum(gate.status == status for gate in report.gates) for status in ("passed", "skipped")}
    terminalreporter.section("parity of the export")
    terminalreporter.write_line(f"{counts['passed']} gates passed, {counts['skipped']} skipped")
    for gate in report.gates:
        if gate.status == "skipped":
            terminalreporter.write_line(f"  {gate.id}: {gate.sentence}")
