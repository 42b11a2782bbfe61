"""``gplq-export doctor``: what works on this machine, and what to do for the rest.

Nothing is imported before it is asked for, and whatever an import or a probe raises is an answer, too: this command has
to work where nothing else does.
"""

import argparse
import importlib
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gplq.errors import MissingError
from gplq_export.engine import Backend, find_builder
from gplq_export.triton.images import OLDEST_ONNXRUNTIME, TritonImage, same_version, triton_image, version_numbers

SCHEMA_VERSION = "1.0"
Status = Literal["ok", "missing", "broken", "too old", "untested", "note"]

# Distribution -> module, oldest version that works, first that nobody has tried, what to install; as in pyproject.toml.
PACKAGES = {
    "torch": ("torch", "2.11", "3", "torch"),
    "timm": ("timm", "1.0.31", "2", "timm"),
    "numpy": ("numpy", "2.0", "3", "numpy"),
    "onnx": ("onnx", "1.21", "2", "onnx"),
    "onnx-ir": ("onnx_ir", "0.2", "2", "onnx-ir"),
    "onnxscript": ("onnxscript", "0.6", "1", "onnxscript"),
    "polygraphy": ("polygraphy", "0.49.20", "1", "gplq[trt]"),
    "pycuda": ("pycuda", "2025.1", "2027", "gplq[pycuda]"),
    "matplotlib": ("matplotlib", "3.9", "4", "gplq[report]"),
    "tritonclient": ("tritonclient", "2.60", "3", "gplq[triton]"),
}
_TENSORRT = {  # name -> modules, the first that loads; what to install
    "TensorRT": (("tensorrt",), "gplq[trt]"),
    "TensorRT-RTX": (("tensorrt_rtx", "tensorrt_rtx_bindings"), "gplq[trt-rtx]"),
}
_ORT_FLOOR, _ORT_CEILING = "1.30", "2"
_ORT_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
_PROBE_SECONDS = 20
_DISK_BYTES = 5 * 10**9  # a checkpoint, the files of an export and two engines of a ViT-L


@dataclass(frozen=True)
class Check:
    """A line of the report: what was looked at, how it is, what was found and, if need be, what to do."""

    name: str
    status: Status
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Feature:
    """Whether something that gplq does works here; ``why`` says what is missing, and how to get it."""

    name: str
    works: bool
    why: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--triton", metavar="TAG", help="say what a Triton image such as 26.06 loads that was built here"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print what works here.

    Raises:
        UsageError: the Triton image is not in the table.
        MissingError: quantising, exporting or checking with ONNX Runtime on the CPU does not work.
    """
    # Before the probes: a wrong tag should not take seconds to be refused.
    image = None if arguments.triton is None else triton_image(arguments.triton)
    checks = examine()
    builder = _builder()
    features = what_works(checks, builder)
    served = [] if image is None else triton_answers(image, builder)
    if arguments.json:
        content = {
            "schema_version": SCHEMA_VERSION,
            "checks": [asdict(check) for check in checks],
            "features": [asdict(feature) for feature in features],
            "triton": None if image is None else {**asdict(image), "answers": [asdict(answer) for answer in served]},
        }
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(checks, features, image, served)) + "\n")
    if broken := [feature.name for feature in features[: len(_CPU_PATH)] if not feature.works]:
        raise MissingError(f"on this machine gplq cannot {', '.join(broken)}; what to do is said above.")


def examine() -> list[Check]:
    """Every check of this machine; none raises."""
    version = platform.python_version()
    python = Check(
        "Python", "ok" if sys.version_info >= (3, 11) else "too old", version, "install Python 3.11 or newer"
    )
    probes: dict[str, Callable[[], Check]] = {
        **{name: partial(_package, name) for name in PACKAGES},
        "PyTorch on GPU": _torch_device,
        "ONNX Runtime": _onnx_runtime,
        **{name: partial(_tensorrt, name) for name in _TENSORRT},
        "GPU": gpu,
        "disk": _disk,
    }
    return [python, *(_answer(name, probe) for name, probe in probes.items())]


def _answer(name: str, probe: Callable[[], Check]) -> Check:
    try:
        return probe()
    except Exception as error:  # a half-installed package raises anything, such as AttributeError
        return Check(name, "broken", f"{type(error).__name__}: {_first_line(error)}", "reinstall it")


def what_works(checks: list[Check], builder: Backend | MissingError) -> list[Feature]:
    """What gplq can do here, by the checks; the first ones are the path that needs no GPU."""
    by_name = {check.name: check for check in checks}

    def needs(feature: str, *names: str) -> Feature:
        lacking = [by_name[name] for name in names if by_name[name].status in ("missing", "broken", "too old")]
        return Feature(
            feature, not lacking, "; ".join(f"{it.name} {it.status}: {it.fix or it.found}" for it in lacking)
        )

    gpu = by_name["GPU"].status == "ok"
    can_build = not isinstance(builder, MissingError)
    on_torch = by_name["PyTorch on GPU"].status == "ok"
    on_pycuda = by_name["pycuda"].status == "ok"
    running = "" if gpu else "needs an NVIDIA GPU and its driver"
    if gpu and not (on_torch or on_pycuda):
        running = "needs PyTorch with CUDA, or pip install 'gplq[pycuda]'"
    return [
        *(needs(feature, *names) for feature, names in _CPU_PATH.items()),
        needs("plot a bench", "matplotlib"),
        Feature("build engines", can_build, "" if can_build else str(builder)),
        Feature(
            "run engines",
            gpu and can_build and (on_torch or on_pycuda),
            running or ("" if can_build else "no TensorRT"),
        ),
        Feature("INT8 tensor cores (--int4, --int8)", *_capability(by_name["GPU"], 75, "Turing (SM75)")),
        Feature("FP8 tensor cores (--fp8)", *_capability(by_name["GPU"], 89, "Ada (SM89)")),
        needs("talk to a Triton server", "tritonclient"),
    ]


_CPU_PATH = {
    "quantise models": ("Python", "torch", "timm", "numpy"),
    "export ONNX": ("Python", "torch", "timm", "numpy", "onnx", "onnx-ir", "onnxscript"),
    "check with ONNX Runtime": ("onnx", "ONNX Runtime"),
}


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import(module: str) -> tuple[Any, str]:
    """A module and "", or None and the reason: libraries that are missing or broken raise all kinds of errors."""
    try:
        return importlib.import_module(module), ""
    except Exception as error:
        return None, _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _judge(name: str, version: str, floor: str, ceiling: str, install: str) -> Check:
    if version_numbers(version) < version_numbers(floor):
        return Check(name, "too old", f"{version}, needs {floor}", f"pip install --upgrade '{install}'")
    if version_numbers(version) >= version_numbers(ceiling):
        return Check(name, "untested", f"{version}, tried below {ceiling}", f"pip install '{install}<{ceiling}'")
    return Check(name, "ok", version)


def _package(name: str) -> Check:
    module, floor, ceiling, install = PACKAGES[name]
    version = _installed(name)
    if version is None:
        return Check(name, "missing", "not installed", f"pip install '{install}'")
    _, reason = _import(module)
    if reason:
        return Check(name, "broken", f"{version} does not load: {reason}", f"pip install --force-reinstall '{install}'")
    return _judge(name, version, floor, ceiling, install)


def _torch_device() -> Check:
    name = "PyTorch on GPU"
    torch, reason = _import("torch")
    if torch is None:
        return Check(name, "missing", reason, "pip install torch")
    if torch.version.cuda is None:
        return Check(name, "note", "built without CUDA: works on the CPU", "https://pytorch.org/get-started")
    if not torch.cuda.is_available():
        return Check(name, "note", f"built for CUDA {torch.version.cuda}, but finds no GPU: works on the CPU")
    return Check(name, "ok", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")


def _onnx_runtime() -> Check:
    name = "ONNX Runtime"
    versions = {package: version for package in _ORT_PACKAGES if (version := _installed(package)) is not None}
    if len(versions) > 1:
        remedy = "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'gplq[cpu]' or 'gplq[gpu]'"
        return Check(
            name, "broken", f"{' and '.join(versions)} are installed: they overwrite each other's files", remedy
        )
    runtime, reason = _import("onnxruntime")
    if not versions and runtime is None:
        return Check(name, "missing", "not installed", "pip install 'gplq[cpu]' (or 'gplq[gpu]', never both)")
    if runtime is None or not hasattr(runtime, "InferenceSession"):
        return Check(
            name, "broken", f"does not load: {reason or 'it is empty'}", "pip install --force-reinstall 'gplq[cpu]'"
        )
    check = _judge(name, runtime.__version__, _ORT_FLOOR, _ORT_CEILING, next(iter(versions), "onnxruntime"))
    # What is listed as available is what it was built with; these it found a device and the libraries for.
    devices = runtime.get_ep_devices() if hasattr(runtime, "get_ep_devices") else []  # since 1.23
    usable = sorted({device.ep_name for device in devices})
    listed = [it for it in runtime.get_available_providers() if it not in usable and it != "AzureExecutionProvider"]
    providers = f"{check.found}; {', '.join(usable)}"
    if listed:
        providers += f"; built with, but not usable here: {', '.join(listed)}"
    return Check(name, check.status, providers, check.fix)


def _tensorrt(name: str) -> Check:
    modules, install = _TENSORRT[name]
    for module_name in modules:
        module, reason = _import(module_name)
        if module is not None and hasattr(module, "Builder"):
            return Check(name, "ok", str(module.__version__))
    return Check(name, "missing", reason or "has no builder", f"pip install '{install}'")


def _builder() -> Backend | MissingError:
    try:
        return find_builder()
    except MissingError as error:
        return error


def gpu() -> Check:
    """The first GPU and its driver, as nvidia-smi names them."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return Check(
            "GPU", "missing", "no NVIDIA driver (nvidia-smi does not start)", "engines run on NVIDIA GPUs only"
        )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or lines[0].count(",") != 3:
        reason = (done.stdout + done.stderr).strip().splitlines() or ["it says nothing"]
        return Check("GPU", "broken", f"nvidia-smi: {reason[0]}", "reinstall the NVIDIA driver, or reboot")
    device, capability, driver, memory = (part.strip() for part in lines[0].split(","))
    more = f"; and {len(lines) - 1} more" if len(lines) > 1 else ""
    return Check("GPU", "ok", f"{device}, SM{capability.replace('.', '')}, driver {driver}, {memory}{more}")


def _capability(gpu: Check, needed: int, since: str) -> tuple[bool, str]:
    found = re.search(r", SM(\d+),", gpu.found)
    if gpu.status != "ok" or found is None:
        return False, "needs an NVIDIA GPU and its driver"
    return int(found[1]) >= needed, "" if int(
        found[1]
    ) >= needed else f"this GPU has SM{found[1]}; needs {since} or newer"


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    few = free < _DISK_BYTES
    return Check("disk", "note" if few else "ok", f"{free / 1e9:.1f} GB free here", "free some space" if few else "")


def triton_answers(image: TritonImage, builder: Backend | MissingError) -> list[Feature]:
    """Whether what is exported and built here loads in a Triton image, and why."""
    remedy = f"build in nvcr.io/nvidia/tensorrt:{image.release}-py3, on a GPU as the server's"
    if isinstance(builder, MissingError):
        plan = Feature("plans built here", False, f"nothing can build one here; {remedy}")
    elif builder.name != "TensorRT":
        plan = Feature("plans built here", False, f"Triton loads TensorRT's, not those of {builder.name}; {remedy}")
    elif image.tensorrt is None:
        ask = f"docker run --rm {image.name} bash -c 'dpkg -l | grep libnvinfer'"
        plan = Feature("plans built here", False, f"not known: {ask} must show {builder.version}; else {remedy}")
    elif not same_version(builder.version, image.tensorrt):
        why = f"built with TensorRT {builder.version}, and a plan loads in its own version only; {remedy}"
        plan = Feature("plans built here", False, why)
    else:
        plan = Feature("plans built here", True, "the same version; the server's GPU must be of this GPU's kind, too")
    recent = version_numbers(image.onnxruntime) >= version_numbers(OLDEST_ONNXRUNTIME)
    why = "" if recent else f"not tried: tested with ONNX Runtime {OLDEST_ONNXRUNTIME} and newer"
    return [plan, Feature("ONNX files exported here", recent, why)]


def _lines(
    checks: list[Check], features: list[Feature], image: TritonImage | None, served: list[Feature]
) -> Iterator[str]:
    width = max(len(check.name) for check in checks) + 2
    for check in checks:
        fix = f"  → {check.fix}" if check.fix and check.status != "ok" else ""
        yield f"{check.name:{width}}{check.status:10}{check.found}{fix}"
    yield ""
    yield from _answers(features)
    if image is not None:
        yield ""
        yield f"{image.name}"
        yield f"  TensorRT {image.tensorrt or '(not in the table)'}, ONNX Runtime {image.onnxruntime}"
        yield f"  by {image.source} (read {image.read})"
        yield from _answers(served)


def _answers(features: list[Feature]) -> Iterator[str]:
    width = max(len(feature.name) for feature in features) + 2
    for feature in features:
        yield f"{feature.name:{width}}{'yes' if feature.works else 'no':5}{feature.why}".rstrip()
