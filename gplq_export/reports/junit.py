"""A report as JUnit XML, which every CI system reads: a test case for each gate."""

import shlex
from xml.etree import ElementTree

from gplq_export.check.report import Gate, Report
from gplq_export.reports.console import measured
from gplq_export.reports.words import STAMP, harmless


def junit(report: Report) -> str:
    """One suite. A gate's pair is the class, its id the name; a pair that was skipped as a whole is a skipped case."""
    report = harmless(report)
    gated = {gate.pair for gate in report.gates}
    absent = [pair for pair in report.pairs if pair.skipped and pair.name not in gated]
    skipped = len(absent) + sum(gate.status == "skipped" for gate in report.gates)
    count = {"tests": len(report.gates) + len(absent), "failures": len(report.failed), "errors": 0}
    name = f"gplq-export check {report.subject.architecture}" + (" on random numbers" if report.data.random else "")
    totals = {"name": name, **{key: str(value) for key, value in count.items()}}
    root = ElementTree.Element("testsuites", totals)
    suite = ElementTree.SubElement(root, "testsuite", totals, skipped=str(skipped), timestamp=report.created_utc)
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in _properties(report).items():
        ElementTree.SubElement(properties, "property", name=key, value=value)
    for gate in report.gates:
        _case(suite, gate)
    for pair in absent:
        case = ElementTree.SubElement(suite, "testcase", classname=f"parity.{pair.name}", name=f"{pair.name}.compared")
        ElementTree.SubElement(case, "skipped", message=str(pair.skipped))
    if report.data.random:
        ElementTree.SubElement(suite, "system-out").text = STAMP
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ElementTree.Element, gate: Gate) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=f"parity.{gate.pair}", name=gate.id)
    details = "\n".join([measured(gate), gate.why] + [f"layer: {gate.layer}"] * (gate.layer is not None))
    if gate.status == "failed":
        ElementTree.SubElement(case, "failure", type=gate.metric, message=gate.sentence).text = details
    elif gate.status == "skipped":
        ElementTree.SubElement(case, "skipped", message=gate.sentence)
    else:
        note = "reported, not judged: " if gate.status == "reported" else ""
        ElementTree.SubElement(case, "system-out").text = f"{note}{gate.sentence}\n{details}"


def _properties(report: Report) -> dict[str, str]:
    """What the result depends on."""
    return {
        "command": shlex.join(report.command),
        "created_utc": report.created_utc,
        "seconds": f"{report.seconds:.1f}",
        "schema_version": report.schema_version,
        "thresholds_version": report.thresholds_version,
        "gplq": report.tool_version,
        "python": report.python,
        "platform": report.platform,
        **{f"version.{name}": version for name, version in report.versions.items()},
        "checkpoint.sha256": report.subject.checkpoint_sha256,
        "data.source": report.data.source,
        "data.sha256": report.data.sha256,
        "data.images": str(report.data.images),
        "data.random": str(report.data.random).lower(),
        **{f"file.{name}.sha256": file.sha256 for name, file in report.subject.files.items()},
    }
