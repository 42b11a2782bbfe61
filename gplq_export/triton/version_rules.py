"""Rules about the files of a model's versions: that they are there, are what was written, and fit the configuration."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gplq.errors import UsageError
from gplq.files import sha256
from gplq_export.runner import read_header
from gplq_export.triton.bindings import Bindings, TensorInfo, onnx_bindings
from gplq_export.triton.config import schema
from gplq_export.triton.config_rules import backend_of, model_shape
from gplq_export.triton.images import OLDEST_ONNXRUNTIME, TritonImage, release_tensorrt, same_version, version_numbers
from gplq_export.triton.problem import Problem, error, warning
from gplq_export.triton.sidecar import Sidecar, read_sidecar

FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}


def find_versions(folder: Path) -> list[int]:
    """The versions in a model's folder, as the server finds them: what is no number, it passes over."""
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and str(int(name)) == name)


def served_versions(folder: Path, config: Any) -> tuple[list[str], list[Problem]]:
    """Which versions the policy chooses, and what is wrong with that."""
    found, policy = find_versions(folder), config.version_policy
    numbers = [path.name for path in folder.iterdir() if path.is_dir() and path.name.isascii() and path.name.isdigit()]
    problems = [
        warning("version", name, "is passed over: a leading zero", f"call it {int(name)}")
        for name in numbers
        if str(int(name)) != name
    ]
    if policy.HasField("specific"):
        chosen = [version for version in policy.specific.versions if version in found]
        problems += [
            error("version", str(version), "its policy asks for it, and it is not there", "add it")
            for version in sorted(set(policy.specific.versions) - set(found))
        ]
    else:
        count = policy.latest.num_versions if policy.HasField("latest") else 1
        chosen = found if policy.HasField("all") else found[-count:] if count else []
    if not chosen:
        fix = "a folder 1 with the model's file in it, also for an ensemble"
        problems.append(error("version", "", "no version is served", fix))
    return [str(version) for version in chosen], problems


def version_problems(config: Any, folder: Path, image: TritonImage | None = None) -> Iterator[Problem]:
    """What is wrong with the files in a version's folder; ``where`` says what of the model."""
    where, backend = f"version {folder.name}", backend_of(config)
    try:
        sidecar = read_sidecar(folder)
    except UsageError as failure:
        yield error("sidecar", where, str(failure), "until then nothing is known about its origin")
        sidecar = None
    if sidecar is not None:
        yield from _hashes(folder, sidecar, where)
    name = config.default_model_filename or FILES.get(backend, "")
    if not name:
        return  # an ensemble, or a backend whose files we do not know
    path = folder / name
    if not path.exists():
        hang = "; the server would wait for it for ever" if backend == "python" else ""
        yield error("model-file", where, f"{name} is missing{hang}", f"put it there; {backend} loads nothing else")
    elif backend == "onnxruntime":
        yield from _onnx(config, path, sidecar, where, image)
    elif backend == "tensorrt":
        yield from _plan(config, path, sidecar, where, image)
    elif backend == "python":
        yield from _python(path, where)


def _hashes(folder: Path, sidecar: Sidecar, where: str) -> Iterator[Problem]:
    for name, expected in sidecar.files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file() or sha256(path) != expected:
            fix = "load it nowhere: write the version again, from an export that you trust"
            yield error("hash", where, f"{name} is not the file that was written: missing, damaged or replaced", fix)


def _onnx(config: Any, path: Path, sidecar: Sidecar | None, where: str, image: TritonImage | None) -> Iterator[Problem]:
    if not path.is_file():
        return  # a folder of that name holds a model with its weights beside it: not ours
    try:
        bindings = onnx_bindings(path)
    except UsageError as failure:
        yield error("onnx", where, str(failure), "the server could not load it either")
        return
    yield from _compare(config, bindings, where)
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    if bindings.quantised and any("int8_calibration_table_name" in it.parameters for it in accelerators):
        found = "a calibration table for a file with quantisers of its own: its session would fail"
        yield error("accelerator", where, found, "remove int8_calibration_table_name")
    oldest = version_numbers(OLDEST_ONNXRUNTIME)
    if image is not None and sidecar is not None and version_numbers(image.onnxruntime) < oldest:
        found = f"{image.name} has ONNX Runtime {image.onnxruntime}"
        yield warning("image", where, found, f"not tried: tested with {OLDEST_ONNXRUNTIME} and newer")


def _plan(config: Any, path: Path, sidecar: Sidecar | None, where: str, image: TritonImage | None) -> Iterator[Problem]:
    try:
        header = read_header(path)
    except UsageError as failure:
        yield error("plan", where, str(failure), "the server could not load it either")
        return
    if header.backend != "TensorRT":
        fix = "build it with TensorRT, in the image nvcr.io/nvidia/tensorrt of the server's release"
        yield error("plan", where, f"built by {header.backend}, whose plans Triton does not load", fix)
    elif image is not None and not (sidecar and sidecar.engine and _version_compatible(sidecar.engine)):
        theirs = release_tensorrt(image)
        if theirs is None:
            ask = f"docker run --rm {image.name} bash -c 'dpkg -l | grep libnvinfer' must show {header.version}"
            yield warning("image", where, f"which TensorRT {image.name} has is in no table", ask)
        elif not same_version(header.version, theirs):
            found = f"built by TensorRT {header.version}, release {image.release} has {theirs}"
            fix = f"build it in nvcr.io/nvidia/tensorrt:{image.release}-py3, or take the image of its version"
            yield error("image", where, found, fix)
    if sidecar is None or sidecar.bindings is None or not sidecar.profiles:
        found = "no gplq.json says what its tensors and profiles are: they are not checked"
        yield warning("plan", where, found, "let 'gplq-export triton' write the repository")
        return
    yield from _compare(config, sidecar.bindings, where)
    profiles = range(len(sidecar.profiles))
    asked = {index for group in config.instance_group for index in group.profile}
    for index in sorted(index for index in asked if not (index.isdigit() and int(index) in profiles)):
        found = f"instance_group asks for profile {index}, it has {len(profiles)}"
        yield error("profile", where, found, f"0 to {len(profiles) - 1}")
    used = [int(index) for index in asked if index.isdigit() and int(index) in profiles] or [0]
    largest = max(sidecar.profiles[index][2] for index in used)
    if config.max_batch_size > largest:
        found = f"max_batch_size {config.max_batch_size}, the engine's profile ends at {largest}"
        yield error("batch", where, found, f"max_batch_size {largest}, or build with --batch-max")
    smallest = min(sidecar.profiles[index][0] for index in used)
    if config.max_batch_size > 0 and smallest > 1:
        found = f"the engine's profile begins at {smallest}: smaller requests would fail"
        yield error("batch", where, found, "build it with --batch-min 1")


def _version_compatible(engine: dict[str, Any]) -> bool:
    options = engine.get("options")
    return isinstance(options, dict) and bool(options.get("version_compatible"))


def _compare(config: Any, bindings: Bindings, where: str) -> Iterator[Problem]:
    """Names, types and shapes of the configuration against those of the file."""
    for kind, tensors, real in (
        ("input", config.input, bindings.inputs),
        ("output", config.output, bindings.outputs),
    ):
        by_name = {tensor.name: tensor for tensor in real}
        for tensor in tensors:
            if tensor.name not in by_name:
                fix = f"it has {', '.join(by_name)}"
                yield error("tensors", f"{where}: {tensor.name}", f"the file has no such {kind}", fix)
            else:
                yield from _compare_tensor(config, tensor, by_name[tensor.name], where)
        missing = set(by_name) - {tensor.name for tensor in tensors} if tensors else set()
        if kind == "input" and missing:
            yield error("tensors", where, f"the file's input {', '.join(sorted(missing))} is not given", "give it")


def _compare_tensor(config: Any, tensor: Any, real: TensorInfo, where: str) -> Iterator[Problem]:
    where = f"{where}: {tensor.name}"
    dtype = schema().DataType.Name(tensor.data_type)
    if dtype not in ("TYPE_INVALID", real.dtype):
        yield error("dtype", where, f"{dtype}, the file has {real.dtype}", f"data_type: {real.dtype}")
    shape = model_shape(tensor, config)
    if len(shape) != len(real.shape):
        dims = list(real.shape[1:] if config.max_batch_size > 0 else real.shape)
        with_batch = " (the batch is put in front of the dims)" if config.max_batch_size > 0 else ""
        found = f"shape {list(shape)}{with_batch}, the file has {list(real.shape)}"
        yield error("dims", where, found, f"{'reshape to' if tensor.HasField('reshape') else 'dims:'} {dims}")
    elif config.max_batch_size > 0 and real.shape[0] != -1:
        found = f"the file takes batches of {real.shape[0]} only: others would fail"
        yield error("batch", where, found, "export it with a batch that may vary, or max_batch_size: 0 and whole dims")
    elif any(a != b and -1 not in (a, b) for a, b in zip(shape, real.shape, strict=True)):
        yield error("dims", where, f"shape {list(shape)}, the file has {list(real.shape)}", "those of the file")


def _python(path: Path, where: str) -> Iterator[Problem]:
    try:
        tree = ast.parse(path.read_bytes(), path.name)
    except (OSError, SyntaxError, ValueError) as failure:
        yield error("model-py", where, f"{path.name} is no Python: {failure}", "correct it")
        return
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if "TritonPythonModel" not in classes:
        yield error("model-py", where, f"{path.name} has no class TritonPythonModel", "the backend looks for that name")
    elif "execute" not in {it.name for it in classes["TritonPythonModel"].body if isinstance(it, ast.FunctionDef)}:
        yield error("model-py", where, "TritonPythonModel has no method execute", "it answers the requests")
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if "as_numpy" in used and "from_dlpack" not in used:
        found = "as_numpy() is silently wrong with NumPy 2 in servers up to release 24.10"
        yield warning("numpy", where, found, "with NumPy 2: np.from_dlpack(tensor), Tensor.from_dlpack(name, array)")
