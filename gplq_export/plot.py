"""Pictures that people would rather look at than read."""

from pathlib import Path
from statistics import median

from gplq.files import atomic_path

_QUANTISED, _FREE, _FORCED = "#3b6ea5", "#c8553d", "#588157"


def plot_ratios(ratios: dict[int, dict[str, list[float]]], path: Path) -> None:
    """Times against the baseline's: bars of the median ratio, lines from the lowest repeat to the highest.

    ``ratios``: by batch and back end, one for each repeat. SVG or PNG by the name of ``path``.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for table in ratios.values() for name in table))
    figure = Figure(figsize=(9, 1.5 + 0.3 * max(len(names), 1) * max(len(ratios), 1)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(len(ratios), 1)
    for index, (batch, table) in enumerate(ratios.items()):
        rows = [names.index(name) + (index - (len(ratios) - 1) / 2) * height for name in table]
        middle = [median(values) for values in table.values()]
        reach = [[m - min(v) for m, v in zip(middle, table.values(), strict=True)],
                 [max(v) - m for m, v in zip(middle, table.values(), strict=True)]]  # fmt: skip
        colour = (_QUANTISED, _FREE, _FORCED)[index % 3]
        axes.barh(rows, middle, height, xerr=reach, color=colour, error_kw={"linewidth": 1}, label=f"batch {batch}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("time / time of the baseline (FP32 on CPUs, FP16 engine on GPUs)")
    axes.legend(loc="lower right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=120)
