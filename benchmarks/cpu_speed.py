"""How fast our deployment files are on this CPU, against what one would otherwise use, as dated JSON and a table.

    pip install openvino nncf torchao          # what is not installed is left out, with a line that says so
    python benchmarks/cpu_speed.py --out benchmarks/results

All contenders compute the same network (DINOv2-S at 224 px with random weights; speed does not depend on them) on the
same images. They run in turn, in one process: a round is one batch through each, and ratios are taken within a round,
so that what else the machine does hits all alike. Ours are W4A4, calibrated without training.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from gplq import Recipe, stage2
from gplq.calibrate import calibrate_on
from gplq.checkpoint import Checkpoint
from gplq.convert import convert
from gplq.data import open_images
from gplq.files import write_json
from gplq.models import ModelSpec
from gplq.preprocessing import Preprocessing
from gplq.provenance import environment
from gplq_export.kernels import check_kernels, onnxruntime_kernels, openvino_kernels
from gplq_export.lowering import lower
from gplq_export.runtimes import OPENVINO_OPTIONS
from gplq_export.targets import TARGETS
from gplq_export.trace import INPUT, trace

Step = Callable[[np.ndarray], Any]
BASE = "ONNX Runtime FP32"
CALIBRATION = 8  # images


class Bench:
    """The files that are compared, and what opens each with a number of threads."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.folder, self.size = folder, arguments.img_size
        torch.manual_seed(0)
        spec = ModelSpec(arguments.model, {"img_size": self.size}, 10)
        self.float_model = spec.build()
        with torch.no_grad():
            # A bias of zeros, which no trained model has, would be optimised away, and with it fusions that count.
            for parameter in self.float_model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        self.images = self._images()
        self._write_ours(spec)
        self.contenders: dict[str, Callable[[int], Step]] = {
            BASE: lambda threads: self._onnxruntime("fp32", threads),
            "gplq W4A4, cpu file, ONNX Runtime": lambda threads: self._onnxruntime("cpu", threads),
            "gplq W4A4, openvino file, OpenVINO": lambda threads: self._openvino("openvino.onnx", threads),
            "gplq W4A4, openvino file, its default precision": lambda threads: self._openvino(
                "openvino.onnx", threads, {}
            ),
            "gplq W4A4, int4 reference, ONNX Runtime": lambda threads: self._onnxruntime("int4", threads),
            "ONNX Runtime quantize_static W8A8, best settings": self._quantize_static,
            "ONNX Runtime quantize_dynamic W8A8": self._quantize_dynamic,
            "OpenVINO FP32": lambda threads: self._openvino("fp32.onnx", threads),
            "OpenVINO FP32, its default precision": lambda threads: self._openvino("fp32.onnx", threads, {}),
            "OpenVINO NNCF W8A8": lambda threads: self._openvino(self._nncf(), threads),
            "OpenVINO NNCF W8A8, its default precision": lambda threads: self._openvino(self._nncf(), threads, {}),
            "PyTorch FP32, eager": self._torch_eager,
            "torchao W8A8 dynamic, compiled": self._torchao,
        }

    def _images(self) -> np.ndarray:
        """Smooth random images, float32 [n, 3, H, W]: edges and areas as photographs have."""
        self.preprocessing = Preprocessing((3, self.size, self.size), "bicubic", 1.0, "center", (0.5,) * 3, (0.25,) * 3)
        coarse = np.random.default_rng(0).integers(0, 256, (CALIBRATION, 16, 16, 3), dtype=np.uint8)
        path = self.folder / "images.npz"
        np.savez(path, images=coarse, labels=np.zeros(CALIBRATION, np.int64))
        self.image_set = open_images(path, "test", self.preprocessing)
        return torch.stack([self.image_set[index][0] for index in range(CALIBRATION)]).numpy()

    def _write_ours(self, spec: ModelSpec) -> None:
        recipe = Recipe.from_dict({"stage2": {"range": "minmax", "rounding": "nearest", "images": CALIBRATION}})
        model = spec.build()
        model.load_state_dict(self.float_model.state_dict())
        convert(model, recipe)
        with torch.no_grad():
            calibrate_on(model, model, [torch.from_numpy(self.images)], 1, recipe)
        stage2.quantize_weights(model, self.image_set, recipe)
        dialect = trace(Checkpoint(model, spec, self.preprocessing, None, recipe, {}))
        for name in ("fp32", "int4", "cpu", "openvino"):
            ir.save(lower(dialect, TARGETS[name](), {}), self.folder / f"{name}.onnx")
        check_kernels(onnxruntime_kernels(self.folder / "cpu.onnx"))

    def _onnxruntime(self, name: str, threads: int) -> Step:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Waiting threads would take time from the contender that comes next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = self.folder / f"{name}.onnx"
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {INPUT: x})

    def _openvino(self, name: str, threads: int, options: dict[str, str] = OPENVINO_OPTIONS) -> Step:
        import openvino

        if name == "openvino.onnx":
            check_kernels(openvino_kernels(self.folder / name))
        settings = {**options, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        compiled = openvino.Core().compile_model(self.folder / name, "CPU", settings)
        request = compiled.create_infer_request()
        return lambda x: request.infer({0: x})

    def _nncf(self) -> str:
        import nncf
        import openvino

        path = self.folder / "nncf.xml"
        if not path.exists():
            network = openvino.Core().read_model(self.folder / "fp32.onnx")
            data = nncf.Dataset([image[None] for image in self.images])
            quantised = nncf.quantize(
                network, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(self.images)
            )
            openvino.save_model(quantised, path, compress_to_fp16=False)
        return path.name

    def _quantize_static(self, threads: int) -> Step:
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

        images = iter(self.images)

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> dict[str, np.ndarray] | None:
                image = next(images, None)
                return None if image is None else {INPUT: image[None]}

        path = self.folder / "static.onnx"
        if not path.exists():
            # The fastest of its settings that we found: U8S8, and no quantiser behind a product.
            quantize_static(
                str(self.folder / "fp32.onnx"),
                str(path),
                Reader(),
                per_channel=True,
                op_types_to_quantize=["MatMul"],
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
            )
        return self._onnxruntime("static", threads)

    def _quantize_dynamic(self, threads: int) -> Step:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        path = self.folder / "dynamic.onnx"
        if not path.exists():
            quantize_dynamic(str(self.folder / "fp32.onnx"), str(path), per_channel=True, weight_type=QuantType.QInt8)
        return self._onnxruntime("dynamic", threads)

    def _torch_eager(self, threads: int) -> Step:
        return self._torch(self.float_model, threads)

    def _torchao(self, threads: int) -> Step:
        import copy

        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = copy.deepcopy(self.float_model)
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        torch._dynamo.reset()  # compiled anew for each number of threads
        return self._torch(torch.compile(model), threads)

    def _torch(self, model: Any, threads: int) -> Step:
        assert isinstance(model, nn.Module) or callable(model)

        def step(x: np.ndarray) -> Any:
            torch.set_num_threads(threads)
            with torch.inference_mode():
                return model(torch.from_numpy(x))

        return step


def open_contenders(bench: Bench, names: list[str], threads: int, left_out: dict[str, str]) -> dict[str, Step]:
    """Those of the contenders that run here; what is missing goes into ``left_out`` with the reason."""
    steps = {}
    for name in names:
        if name in left_out:
            continue
        try:
            step = bench.contenders[name](threads)
            step(bench.images[:1])
        except ImportError as error:
            left_out[name] = f"not installed: {error.name}"
        except Exception as error:  # other people's compilers; the rest is worth measuring
            if name.startswith(("gplq", BASE)):
                raise
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        else:
            steps[name] = step
            continue
        print(f"left out: {name} ({left_out[name]})")
    return steps


def measure(steps: dict[str, Step], x: np.ndarray, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, two rounds of warming apart."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-2, rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step(x)
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Milliseconds, and ratios to FP32 of the same round, by contender."""
    found = {}
    for name, seconds in times.items():
        ratios = sorted(ours / base for ours, base in zip(seconds, times[BASE], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
        found[name] = {
            "median_ms": round(1e3 * statistics.median(seconds), 2),
            "p95_ms": round(1e3 * float(np.percentile(seconds, 95)), 2),
            "min_ms": round(1e3 * min(seconds), 2),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_quartiles": [round(low, 3), round(high, 3)],
            "ratio_of_minima": round(min(seconds) / min(times[BASE]), 3),
            "n": len(seconds),
        }
    return found


def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: a row a contender, a column a setting; ratio of medians within rounds, and of minima."""
    names = list(next(iter(results.values())))
    lines = [f"| time / FP32 (of minima) | {' | '.join(results)} |", f"|---|{'---|' * len(results)}"]
    for name in names:
        cells = [f"{row[name]['ratio']:.3f} ({row[name]['ratio_of_minima']:.3f})" for row in results.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    base = " | ".join(f"{row[BASE]['median_ms']:.1f} ms, n = {row[BASE]['n']}" for row in results.values())
    return "\n".join([*lines, f"| {BASE}, median | {base} |"])


def main() -> None:
    """Measure, print a table and write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=25, help="at batch 1; a third of them at larger batches")
    parser.add_argument("--only", nargs="+", default=[], help="contenders whose name holds one of these words")
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # other people's deprecations
    results, left_out = {}, {}
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        chosen = [
            name
            for name in bench.contenders
            if name == BASE or not arguments.only or any(word in name for word in arguments.only)
        ]
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            steps = open_contenders(bench, chosen, threads, left_out)
            for batch in arguments.batch:
                rounds = arguments.rounds if batch == 1 else max(arguments.rounds // 3, 5)
                images = np.resize(bench.images, (batch, *bench.images.shape[1:]))
                results[f"batch {batch}, threads {threads}"] = summary(measure(steps, images, rounds))
                load.append(os.getloadavg()[0])
        sizes = {path.name: path.stat().st_size for path in sorted(Path(folder).glob("*.onnx"))}
    print(table(results))
    packages = ("openvino", "nncf", "torchao")
    versions = {name: importlib.metadata.version(name) for name in packages if _installed(name)}
    report = {
        "schema_version": "1.0",
        **environment(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_average": load,
        "other_versions": versions,
        "settings": {**vars(arguments), "out": str(arguments.out)},
        "file_bytes": sizes,
        "left_out": left_out,
        "results": results,
    }
    path = arguments.out / f"{datetime.now(UTC):%Y-%m-%d}-cpu-speed-{arguments.model}-{arguments.img_size}px.json"
    write_json(path, report)
    print(f"wrote {path}")


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
