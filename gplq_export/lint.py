"""``gplq-export lint MODEL.onnx``: where any quantised ONNX file breaks a rule of the runtime that it is for.

A file that builds is not a file that runs in INT8: runtimes fall back to floating point, and merge or drop quantisers,
without telling. Each rule (:mod:`gplq_export.lint_rules`) names what breaks it, what follows and what to do. Those
runtimes that are installed are asked as well (:mod:`gplq_export.ask`): what one refuses is an error, rule or no rule.
"""

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir

from gplq.errors import GateError
from gplq.files import sha256
from gplq_export.ask import Answer, ask
from gplq_export.lint_rules import RULES, Rule, Runtime
from gplq_export.onnx_file import printable, read_onnx
from gplq_export.qdq import QdqGraph

SCHEMA_VERSION = "1.1"
RUNTIMES = {"trt": "TensorRT", "ort": "ONNX Runtime CPU"}
_SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """A rule and every place that breaks it: (node, what was found there)."""

    rule: Rule
    places: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        rule = self.rule
        return {
            "rule": rule.id,
            "severity": rule.severity,
            "runtimes": list(rule.runtimes),
            "consequence": rule.consequence,
            "fix": rule.fix,
            "source": rule.source,
            "count": len(self.places),
            "places": [{"node": node, "found": found} for node, found in self.places],
        }


def lint(model: ir.Model, runtime: str = "all") -> list[Finding]:
    """What breaks the rules of ``runtime`` ("trt", "ort" or "all"), errors first.

    ``model`` gets the shapes and types that can be inferred.
    """
    graph = QdqGraph(model)
    rules = [rule for rule in RULES.values() if runtime == "all" or runtime in rule.runtimes]
    found = ((rule, tuple((_name(node), text) for node, text in rule.find(graph))) for rule in rules)
    findings = [Finding(rule, places) for rule, places in found if places]
    return sorted(findings, key=_order)


def refusals(answer: Answer) -> list[Finding]:
    """What a runtime said against a file, as a finding of a rule of its own."""
    if not answer.refusals:
        return []
    rule = Rule(
        f"{answer.runtime}-refuses",
        "error",
        (cast(Runtime, answer.runtime),),
        f"{answer.name} does not load the file.",
        "See the findings about the same nodes, if there are any; else go by these words, which are the runtime's own.",
        f"{answer.name}, which was asked",
        lambda _: iter(()),
    )
    return [Finding(rule, tuple((it.node or "the model", it.words) for it in answer.refusals))]


def _order(finding: Finding) -> tuple[int, str]:
    return _SEVERITIES.index(finding.rule.severity), finding.rule.id


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("model", type=Path, help="any ONNX file")
    parser.add_argument(
        "--runtime", choices=[*RUNTIMES, "all"], default="all", help="whose rules: TensorRT's, ONNX Runtime's or all"
    )
    parser.add_argument(
        "--rules-only", action="store_true", help="do not load the file in the runtimes that are installed"
    )
    parser.add_argument("--strict", action="store_true", help="fail on warnings, too")
    parser.add_argument("--json", action="store_true", help="print JSON, with every node")


def run(arguments: argparse.Namespace) -> None:
    """Print the findings.

    Raises:
        UsageError: the file cannot be read.
        GateError: a rule is broken whose severity is error, or with ``--strict`` a warning; or a runtime refuses it.
    """
    findings = lint(read_onnx(arguments.model), arguments.runtime)
    asked = [name for name in RUNTIMES if arguments.runtime in ("all", name) and not arguments.rules_only]
    answers = [ask(arguments.model, name) for name in asked]
    findings = sorted(itertools.chain(findings, *map(refusals, answers)), key=_order)
    if arguments.json:
        content = {
            "schema_version": SCHEMA_VERSION,
            "file": str(arguments.model),
            "sha256": sha256(arguments.model),
            "runtime": arguments.runtime,
            "asked": [answer.to_dict() for answer in answers],
            "findings": [finding.to_dict() for finding in findings],
        }
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(arguments.model, arguments.runtime, answers, findings)) + "\n")
    fatal = _SEVERITIES[: 2 if arguments.strict else 1]
    broken = [finding.rule.id for finding in findings if finding.rule.severity in fatal]
    if broken:
        raise GateError(f"{arguments.model} breaks {len(broken)} rule(s): {', '.join(broken)}.")


def _lines(path: Path, runtime: str, answers: Sequence[Answer], findings: Sequence[Finding]) -> Iterator[str]:
    rules = sum(runtime in ("all", *rule.runtimes) for rule in RULES.values())
    severities = Counter[str](finding.rule.severity for finding in findings)
    counts = ", ".join(f"{severities[severity]} {severity}(s)" for severity in _SEVERITIES)
    yield f"{path}: {counts}; {rules} rules of {RUNTIMES.get(runtime, ' and '.join(RUNTIMES.values()))}"
    yield from (f"  {answer}" for answer in answers)
    for finding in findings:
        rule, (node, found) = finding.rule, finding.places[0]
        many = f"{len(finding.places)} nodes, first " if len(finding.places) > 1 else ""
        yield ""
        yield f"{rule.severity}: {rule.id} [{', '.join(RUNTIMES[name] for name in rule.runtimes)}]"
        yield f"  where   {many}{printable(node)}: {printable(found)}"
        yield f"  then    {rule.consequence}"
        yield f"  fix     {rule.fix}"
        yield f"  source  {rule.source}"


def _name(node: ir.Node | None) -> str:
    if node is None:
        return "the model"
    return node.name or f"{node.op_type} of {node.outputs[0].name}"
