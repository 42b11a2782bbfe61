"""Pictures that people would rather look at than read."""

from pathlib import Path
from statistics import median

from gplq.files import atomic_path
from gplq_export.parity import ParityReport

_QUANTISED, _FREE, _FORCED = "#3b6ea5", "#c8553d", "#588157"


def plot_layers(report: ParityReport, *paths: Path) -> bool:
    """Two panels over depth: how much quantisation changes each block's output, and how many codes ONNX Runtime flips.

    Written to each of ``paths`` (SVG, PNG by suffix). Returns False if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no global state, no display
    except ImportError:
        return False
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    names = list(report.sqnr_db)
    top.bar([name.removeprefix("blocks.") for name in names], list(report.sqnr_db.values()), color=_QUANTISED)
    top.set_ylabel("SQNR of the output, dB")
    top.set_xlabel("block")
    top.set_title(f"What quantisation changes (PyTorch, quantisers on against off, n = {report.forced_images})")

    # A logarithmic axis has no zero: "none" is drawn at the bottom, half a code below the finest that can be seen.
    finest = 0.5 / max(count.total for count in report.free.values())
    positions = range(len(report.free))
    for label, table, colour, marker in (
        (f"free-running, n = {report.agreement.n}", report.free, _FREE, "o"),
        (f"same input, n = {report.forced_images}", report.quantizers, _FORCED, "s"),
    ):
        shares = [max(count.share, finest) for count in table.values()]
        bottom.plot(positions, shares, marker=marker, markersize=3, linewidth=1, color=colour, label=label)
    bottom.set_yscale("log")
    bottom.set_ylabel("share of codes that differ")
    bottom.set_xlabel("quantiser, from the image to the classifier (at the bottom: none)")
    bottom.set_title("What ONNX Runtime computes differently from PyTorch")
    bottom.legend(loc="upper left")
    for path in paths:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=120)
    return True


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
