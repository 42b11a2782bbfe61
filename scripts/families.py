"""Every architecture of timm: is it quantised, how much of it, and if not, why. Writes ``docs/families.md``.

Each is built on the meta device, without weights or memory, and asked as ``gplq models NAME`` asks. Some minutes.
"""

import os
import re
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import list_models, list_modules

from gplq.coverage import cover
from gplq.errors import GplqError
from gplq.progress import progress

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
HEAD = """# Every architecture of timm

Written by `make families`, from timm {version}; `gplq models NAME` says the same of one architecture, and which of its
layers stay in floating point. Each was built without weights and watched in one forward pass. Of {all} architectures
gplq quantises {quantised}: all products of two activations get quantisers, and of what is multiplied by weights the
share in the table. The tests take [one of each of {families} families](../gplq/coverage.py) through everything, to the
proof of the exported file; what the others lose, `gplq quantize` and `gplq-export check` tell.

## Quantised

`weights`: the share of the weights of linears and convolutions that get 4 or 8 bits, least and most of the module's
architectures. What is missing are mostly convolutions in groups, which stay in floating point.

| timm's module | weights | architectures |
|---|---|---|
"""
REFUSED = """
## Refused

By the layer that stands in the way (of the first, where there are several), and what it would take.

| reason | architectures (layer) |
|---|---|
"""


@dataclass(frozen=True)
class Row:
    """What there is to say of an architecture; ``layer`` stands in the way, for ``reason``."""

    name: str
    share: float = 0.0
    reason: str = ""
    layer: str = ""


def look(name: str) -> Row:
    """As ``gplq models`` does."""
    torch.set_num_threads(1)
    try:
        return Row(name, share=cover(name).share)
    except GplqError as error:
        found = re.match(r"layer '(.*?)' \((\w+)\) (.*)", str(error))
        return Row(name, reason=f"{found[2]} {found[3]}", layer=found[1]) if found else Row(name, reason=str(error))


def page(rows: dict[str, Row], families: int) -> str:
    """The document."""
    quantised = [row for row in rows.values() if not row.reason]
    text = HEAD.format(version=timm.__version__, all=len(rows), quantised=len(quantised), families=families)
    for module in list_modules():
        here = [rows[name] for name in list_models(module=module) if name in rows and not rows[name].reason]
        if here:
            least, most = (f"{100 * share:.0f} %" for share in (min(r.share for r in here), max(r.share for r in here)))
            shares = least if least == most else f"{least} to {most}"
            text += f"| {module} | {shares} | {', '.join(row.name for row in here)} |\n"
    text += REFUSED
    reasons: dict[str, list[Row]] = defaultdict(list)
    for row in rows.values():
        if row.reason:
            reasons[row.reason].append(row)
    for reason, here in sorted(reasons.items()):
        names = ", ".join(f"{row.name} (`{row.layer}`)" if row.layer else row.name for row in here)
        text += f"| {reason.replace('|', chr(92) + '|')} | {names} |\n"
    return text


def main() -> None:
    """Look at all of them, in as many processes as there are cores."""
    from gplq.coverage import FAMILIES

    names = list_models()
    rows = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool, progress(len(names), "timm", "architecture") as bar:
        for row in pool.map(look, names, chunksize=8):
            rows[row.name] = row
            bar.update()
    PAGE.write_text(page(rows, len(FAMILIES)), encoding="utf-8")
    print(f"wrote {PAGE}: {sum(not row.reason for row in rows.values())} of {len(rows)} are quantised", file=sys.stderr)


if __name__ == "__main__":
    main()
