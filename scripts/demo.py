"""The main job, end to end on real input: quantise the demo ViT, export it, prove it, build its engine.

Every step is a command that you could type yourself; this script prints it, runs it, and puts the numbers that the
steps wrote into one table. Nothing is downloaded. Results: ``demo/``.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gplq.checkpoint import load_checkpoint
from gplq_export.check.report import Estimate, Layer, Report, read_report
from gplq_export.reports.words import verdict

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path("calib/fashion_mnist/vit")
DATA = Path("calib/fashion_mnist/fashion_mnist.npz")
OUT = Path("demo")


def run(*command: str, accept: tuple[int, ...] = (0,)) -> int:
    """Print a command as one would type it, run it; end the demo with its exit code if that is not in ``accept``."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    program, *arguments = command
    module = program.replace("-", "_")
    code = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=False).returncode
    if code not in accept:
        print(f"demo: '{program}' ended with exit code {code}", file=sys.stderr)
        sys.exit(code)
    return code


def main() -> None:
    """Three commands and a table."""
    started = time.monotonic()
    print("gplq demo: a 6-block ViT, Fashion-MNIST, 4-bit weights and activations. Three steps, a few minutes.")
    print("\n== 1 of 3: the baseline. Four bits by plain rounding, without any method")
    quantize = ["gplq", "quantize", str(MODEL), "--data", str(DATA)]
    run(*quantize, "--recipe", "recipes/naive.yaml", "--out", str(OUT / "naive.pt"), "--force")
    print("\n== 2 of 3: GPLQ. Stage 1 trains with quantised activations, Stage 2 rounds the weights")
    run(*quantize, "--recipe", "recipes/demo.yaml", "--out", str(OUT / "model.pt"), "--force")
    print("\n== 3 of 3: export to ONNX, check it against PyTorch, build the engine")
    # 3: there is no engine builder for this platform; everything else is done, and the table says so.
    export = ["gplq-export", str(OUT / "model.pt"), "--int4", "--trt", "--data", str(DATA)]
    run(*export, "--out", str(OUT / "dist"), "--force", accept=(0, 3))
    print(f"\n{table()}\nwhole demo: {time.monotonic() - started:.0f} s")
    print(f"\nThe whole report, the error layer by layer included: {OUT / 'dist/reports/report.html'}")
    print(f"Everything as data: {OUT / 'dist/reports/parity.json'} and {OUT / 'dist/manifest.json'}")


def table() -> str:
    """The numbers that the steps wrote down, in one place."""
    naive = load_checkpoint(ROOT / OUT / "naive.pt").provenance["top1"]
    gplq = load_checkpoint(ROOT / OUT / "model.pt").provenance["top1"]
    manifest = json.loads((ROOT / OUT / "dist" / "manifest.json").read_text(encoding="utf-8"))
    report = read_report(ROOT / OUT / "dist" / "reports" / "parity.json")
    rows = [(f"top-1, n = {report.data.images}, 95 % interval", "")]
    rows += [
        (f"  {name}", show(estimate))
        for name, estimate in (
            ("FP32", stored(gplq["FP32"])),
            ("W4A4, plain rounding", stored(naive["W4A4"])),
            ("W32A4, after Stage 1", stored(gplq["W32A4"])),
            ("W4A4, after Stage 2", stored(gplq["W4A4"])),
        )
    ]
    found = verdict(report)
    return "\n".join(
        [
            render(rows + parity_rows(report) + size_rows(manifest) + deployment_rows(manifest, report)),
            "* with another order of summation: the noise floor",
            f"{found.word}. {' '.join(found.sentences)}",
        ]
    )


def parity_rows(report: Report) -> list[tuple[str, str]]:
    """The portable file against PyTorch."""
    pair = report.pair("int4")
    if pair is None or pair.skipped:
        return [("PyTorch against ONNX Runtime", f"skipped: {pair.skipped if pair else 'no such file'}")]
    found, floor, forced = pair.found, pair.floor, pair.forced
    assert found and floor and forced and pair.candidate_top and found.agreement and floor.agreement
    return [
        ("  W4A4, ONNX Runtime", show(pair.candidate_top.top1)),
        ("PyTorch against ONNX Runtime", ""),
        ("  same label", show(found.agreement)),
        ("  same label, PyTorch against itself *", show(floor.agreement)),
        ("  equal codes, same input", equal_codes(forced.quantizers)),
        ("  linears, same input, largest difference", f"{max(forced.linears.values()):.1e} of the output"),
        ("  equal codes, same block input", equal_codes(forced.blocks)),
        ("  equal codes, free-running", equal_codes(pair.layers)),
    ]


def size_rows(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Bytes: what was expected of 4 bits, what the file has, and what the rest of it is."""
    parts, files = manifest["int4_onnx_bytes"], manifest["files"]
    fp32, int4 = files["model.fp32.onnx"]["bytes"], files["model.int4.onnx"]["bytes"]
    expected = int4 - parts["graph"]
    rows = [
        ("bytes", ""),
        ("  FP32 ONNX", f"{fp32:,}"),
        ("  INT4 ONNX, expected (tensors)", f"{expected:,}"),
        ("  INT4 ONNX, actual", f"{int4:,}  = {int4 / fp32:.3f} x FP32"),
    ]
    return rows + [(f"    {name}", f"{size:,}") for name, size in parts.items()]


def deployment_rows(manifest: dict[str, Any], report: Report) -> list[tuple[str, str]]:
    """What runs in which arithmetic, read back; and what could not be built."""
    kernels, pair = manifest["kernels"].get("cpu", {}), report.pair("cpu")
    integer = f"{sum(kernel['integer'] for kernel in kernels.values())} of {len(kernels)} multiplications in integers"
    rows = [("deployment", ""), ("  cpu", f"ONNX Runtime {manifest['versions']['onnxruntime']}: {integer}")]
    if pair is not None and pair.forced is not None:
        rows.append(("", f"equal codes, same input {equal_codes(pair.forced.quantizers)}"))
    for name, engine in manifest["engines"].items():
        built = f"{engine['backend']} {engine['backend_version']}, {engine['plan_bytes']:,} bytes"
        rows.append((f"  {name}", f"{built}, {engine['build_seconds']:.1f} s"))
        rows += [("", part) for part in engine["precision"]["summary"].split("; ")]
    rows += [("  skipped", problem["message"]) for problem in manifest["problems"]]
    return rows


def stored(accuracy: dict[str, Any]) -> Estimate:
    """An accuracy as a checkpoint has it."""
    low, high = accuracy["interval"]
    return Estimate(value=accuracy["percent"], low=low, high=high, n=accuracy["n"])


def show(estimate: Estimate) -> str:
    """An accuracy with its interval."""
    return f"{estimate.value:6.2f} %  [{estimate.low:.2f}, {estimate.high:.2f}]"


def equal_codes(layers: list[Layer]) -> str:
    """Equal codes of all layers together."""
    total = sum(layer.total for layer in layers)
    different = sum(layer.different for layer in layers)
    return f"{100 * (1 - different / total):.4f} %  ({different:,} of {total:,} differ)"


def render(rows: list[tuple[str, str]]) -> str:
    """Two columns; a row without a value is a headline."""
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}".rstrip() for name, value in rows]
    rule = "-" * 78
    return "\n".join([rule, *lines, rule])


if __name__ == "__main__":
    main()
