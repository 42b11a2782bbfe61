"""What a rule about a model repository found."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Problem:
    """``rule``: its name. ``where``: the model, and what of it. ``found``: what is wrong. ``fix``: what to do."""

    severity: Literal["error", "warning"]
    rule: str
    where: str
    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.rule}: {self.where}: {self.found}. {self.fix[:1].upper()}{self.fix[1:]}."


def error(rule: str, where: str, found: str, fix: str) -> Problem:
    """The server refuses it, or would serve wrong answers."""
    return Problem("error", rule, where, found, fix)


def warning(rule: str, where: str, found: str, fix: str) -> Problem:
    """The server does something else than one may believe."""
    return Problem("warning", rule, where, found, fix)
