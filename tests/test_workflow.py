"""The workflow that users copy: every command in it is one of ours, and it can do no harm."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from gplq import cli as gplq_cli
from gplq_export import cli

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / ".github" / "workflows" / "parity.yml"
WORKFLOW: dict[Any, Any] = yaml.safe_load(FILE.read_text())
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def commands() -> list[list[str]]:
    """The lines of all scripts that call one of our programs, as argument lists."""
    scripts = "\n".join(step.get("run", "") for step in STEPS).replace("\\\n", " ")
    lines = [line.strip() for line in scripts.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith((".venv/bin/gplq", "make"))]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_are_ours(command: list[str]) -> None:
    program, *arguments = command
    arguments = [argument for argument in arguments if argument != "${options[@]}"]
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program.endswith("/gplq"):
        gplq_cli._parser().parse_args(arguments)
    elif arguments[0] in cli.COMMANDS:
        cli._command(arguments[0]).parse_args(arguments[1:])
    else:
        cli._check_flags(cli._parser().parse_args(arguments))


def test_both_tiers_are_there() -> None:
    assert [command[:2] for command in commands()].count([".venv/bin/gplq-export", "check"]) == 2
    for job in WORKFLOW["jobs"].values():
        assert (ROOT / job["env"]["DATA"]).is_file()
    assert (ROOT / WORKFLOW["jobs"]["cpu"]["env"]["CHECKPOINT"]).is_file()


def test_actions_are_pinned_and_the_token_reads_only() -> None:
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert len(used) == 5
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action) for action in used)
    assert WORKFLOW["permissions"] == {}
    assert all(job["permissions"] == {"contents": "read"} for job in WORKFLOW["jobs"].values())
    assert all(
        step["with"]["persist-credentials"] is False
        for step in STEPS
        if step.get("uses", "").startswith("actions/checkout")
    )


def test_strangers_reach_neither_secrets_nor_the_gpu_nor_a_shell() -> None:
    events = WORKFLOW[True]  # YAML 1.1 reads the key "on" so
    assert set(events) == {"pull_request", "push", "schedule", "workflow_dispatch"}
    assert "secrets." not in re.sub(r"#.*", "", FILE.read_text())
    assert not [step for step in STEPS if "${{" in step.get("run", "")]
    condition = WORKFLOW["jobs"]["gpu"]["if"]
    assert "pull_request" not in condition
    assert condition.startswith("vars.GPU_RUNNER != '' && github.ref_name == github.event.repository.default_branch")
