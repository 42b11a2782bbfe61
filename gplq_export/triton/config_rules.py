"""Rules about one ``config.pbtxt``, read on its own and against the small files beside it."""

import difflib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gplq_export.triton.config import schema
from gplq_export.triton.problem import Problem, error, warning

PLATFORMS = {  # what `platform` may be -> the backend that it stands for
    "tensorrt_plan": "tensorrt",
    "onnxruntime_onnx": "onnxruntime",
    "pytorch_libtorch": "pytorch",
    "tensorflow_graphdef": "tensorflow",
    "tensorflow_savedmodel": "tensorflow",
    "ensemble": "ensemble",
}
_BACKENDS = (  # those of NVIDIA's images
    "onnxruntime", "tensorrt", "python", "pytorch", "openvino", "tensorflow", "dali", "fil", "vllm", "tensorrtllm",
    "identity", "repeat", "square", "distributed_addsub",
)  # fmt: skip
_GPU_ACCELERATORS, _CPU_ACCELERATORS = ("tensorrt", "cuda"), ("openvino",)
_PRECISIONS = ("FP32", "FP16", "BF16", "INT8")
_ONNXRUNTIME_PARAMETERS = (
    "intra_op_thread_count", "inter_op_thread_count", "execution_mode", "cudnn_conv_algo_search", "gpu_mem_limit",
    "arena_extend_strategy", "do_copy_in_default_stream", "enable_mem_arena", "enable_mem_pattern",
    "use_device_allocator_for_initializers", "memory.enable_memory_arena_shrinkage",
)  # fmt: skip
_BYTES = {"BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
          "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8}  # fmt: skip


def backend_of(config: Any) -> str:
    """The backend that runs a model, "ensemble" for none; "" if the configuration does not say."""
    return str(config.backend or PLATFORMS.get(config.platform, ""))


def server_shape(tensor: Any, config: Any) -> tuple[int, ...]:
    """A tensor's whole shape in a request: the server puts the batch in front if the model batches."""
    return (*([-1] if config.max_batch_size > 0 else []), *tensor.dims)


def model_shape(tensor: Any, config: Any) -> tuple[int, ...]:
    """A tensor's whole shape as the model's file gets it: reshaped, if that is asked for."""
    dims = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
    return (*([-1] if config.max_batch_size > 0 else []), *dims)


def config_problems(folder: Path, config: Any) -> Iterator[Problem]:
    """What is wrong with the configuration of a model's folder; ``where`` says what of the model."""
    yield from _identity(folder, config)
    yield from _tensors(config)
    yield from _shapes(config)
    yield from _batching(config)
    yield from _priorities(config)
    yield from _sequences(config)
    yield from _instances(config)
    yield from _accelerators(config)
    yield from _parameters(config)
    yield from _labels(folder, config)
    yield from _warm_up(folder, config)
    if config.response_cache.enable:
        if config.model_transaction_policy.decoupled:
            found = "response_cache with decoupled: which of several answers would be kept?"
            yield error("response-cache", "", found, "give up the one or the other")
        fix = "start the server with --cache-config=local,size=BYTES"
        yield warning("response-cache", "", "response_cache is silently off in a server without a cache", fix)


def _identity(folder: Path, config: Any) -> Iterator[Problem]:
    if config.name and config.name != folder.name:
        yield error("name", "", f"the configuration's name is '{config.name}'", "make it the folder's, or leave it out")
    if config.platform and config.platform not in PLATFORMS:
        fix = f"one of {', '.join(PLATFORMS)}, or use backend"
        yield error("platform", "", f"there is no platform '{config.platform}'", fix)
    elif not backend_of(config):
        yield error("backend", "", "neither backend nor platform is given", 'such as backend: "onnxruntime"')
    elif config.platform and config.backend and PLATFORMS[config.platform] != config.backend:
        found = f"platform '{config.platform}' is not of backend '{config.backend}'"
        yield error("backend", "", found, "leave out the platform")
    elif backend_of(config) not in (*_BACKENDS, "ensemble") and not _library(folder, f"libtriton_{config.backend}.so"):
        near = difflib.get_close_matches(config.backend, _BACKENDS, 1, 0.5)
        found = f"no backend of NVIDIA's images is called '{config.backend}', and its library is not in the folder"
        yield error("backend", "", found, f"'{near[0]}'?" if near else f"one of {', '.join(_BACKENDS)}")
    if (
        config.runtime
        and config.runtime != f"libtriton_{backend_of(config)}.so"
        and not _library(folder, config.runtime)
    ):
        fix = f"leave it out: the server takes libtriton_{backend_of(config)}.so"
        yield error("backend", "", f"its runtime '{config.runtime}' is not in the folder", fix)
    if any(not agent.name for agent in config.model_repository_agents.agents):
        yield error("agents", "", "a repository agent without a name", "name it, such as checksum")
    if (config.platform == "ensemble") != config.HasField("ensemble_scheduling"):
        found = 'platform "ensemble" and ensemble_scheduling need each other'
        yield error("ensemble", "", found, "give both or neither")


def _tensors(config: Any) -> Iterator[Problem]:
    for kind, tensors in (("input", config.input), ("output", config.output)):
        if not tensors:
            # The real backends fill it in from the file, as they understand it; Python's does not.
            yield warning(
                "tensors", "", f"no {kind} is given", "name it, with type and dims, so that it can be checked"
            )
        for name, count in Counter(tensor.name for tensor in tensors).items():
            if count > 1:
                yield error("tensors", name, f"{kind} given {count} times", "keep one")
        for tensor in tensors:
            if not tensor.name:
                yield error("tensors", "", f"an {kind} without a name", "name it")
            if tensor.data_type == 0:
                yield error("tensors", tensor.name, "has no data_type", "such as TYPE_FP32")
            if not tensor.dims:
                yield error("dims", tensor.name, "has no dims", "give them without the batch, such as [3, 224, 224]")
            elif any(size == 0 or size < -1 for size in tensor.dims):
                found = f"has dims {list(tensor.dims)}"
                yield error("dims", tensor.name, found, "sizes are positive, or -1 where they vary")


def _library(folder: Path, name: str) -> bool:
    """Whether a library lies where the server looks for it, besides its own folder of backends."""
    return any((place / name).is_file() for place in (folder, *(it for it in folder.glob("[0-9]*") if it.is_dir())))


def _shapes(config: Any) -> Iterator[Problem]:
    """What else a tensor may say of its shape, and what refers to tensors by name."""
    formats = schema().ModelInput.Format
    for tensor in config.input:
        layout = formats.Name(tensor.format)
        if layout != "FORMAT_NONE" and len(tensor.dims) != 3:
            found = f"{layout} with dims {list(tensor.dims)}: such an image has three"
            yield error("format", tensor.name, found, "leave out the format, which changes nothing in the server")
    for tensor in (*config.input, *config.output):
        if tensor.is_shape_tensor and backend_of(config) != "tensorrt":
            yield error("shape-tensor", tensor.name, "a shape tensor, which only TensorRT has", "leave it out")
        if tensor.HasField("reshape"):
            yield from _reshape(tensor, config)
    for batch_input in config.batch_input:
        if len(batch_input.source_input) != 1:
            found = f"batch_input of {len(batch_input.source_input)} inputs"
            yield error("batch-tensor", ", ".join(batch_input.target_name), found, "one source_input")
    inputs, outputs = ({tensor.name for tensor in tensors} for tensors in (config.input, config.output))
    for known, names in (
        (inputs, [name for it in (*config.batch_input, *config.batch_output) for name in it.source_input]),
        (outputs, [name for it in config.batch_output for name in it.target_name]),
    ):
        for name in sorted(set(names) - known):
            fix = f"one of {', '.join(sorted(known))}" if known else "name the tensor first"
            yield error("batch-tensor", name, "batch_input or batch_output refers to it, and it is not given", fix)


def _reshape(tensor: Any, config: Any) -> Iterator[Problem]:
    before, after = list(tensor.dims), list(tensor.reshape.shape)
    fix = f"a shape of as many values as dims {before}, and -1 as often"
    if any(size == 0 or size < -1 for size in after):
        yield error("reshape", tensor.name, f"reshape to {after}", "sizes are positive, or -1 where they vary")
    elif not after and config.max_batch_size == 0:
        yield error("reshape", tensor.name, "reshape to a scalar of a model without batches", fix)
    elif _segments(before) != _segments(after):
        yield error("reshape", tensor.name, f"dims {before} do not fit into {after}", fix)


def _segments(shape: list[int]) -> list[int]:
    """The number of values before, between and behind the sizes that vary, which a reshape keeps."""
    products = [1]
    for size in shape:
        if size == -1:
            products.append(1)
        else:
            products[-1] *= size
    return products


def _priorities(config: Any) -> Iterator[Problem]:
    dynamic = config.dynamic_batching
    levels = dynamic.priority_levels
    if levels and not 1 <= dynamic.default_priority_level <= levels:
        found = f"default_priority_level {dynamic.default_priority_level} with {levels} priority_levels"
        yield error("priority", "", found, f"1 to {levels}")
    for level in sorted(set(dynamic.priority_queue_policy) - set(range(1, levels + 1))):
        fix = f"1 to {levels}" if levels else "give priority_levels"
        yield error("priority", "", f"priority_queue_policy for level {level} of {levels}", fix)
    if levels > 1 and dynamic.preserve_ordering:
        fix = "give up the one or the other"
        yield error("priority", "", f"preserve_ordering with {levels} priority_levels", fix)


def _sequences(config: Any) -> Iterator[Problem]:
    kinds = schema().ModelSequenceBatching.Control.Kind
    used = Counter(kinds.Name(it.kind) for each in config.sequence_batching.control_input for it in each.control)
    for kind, count in used.items():
        if count > 1:
            yield error("sequence", kind, f"given {count} times", "one input tells it")
    for each in config.sequence_batching.control_input:
        if not each.name:
            yield error("sequence", "", "a control_input without a name", "name it")
        for control in each.control:
            kind = kinds.Name(control.kind)
            values = (control.int32_false_true, control.fp32_false_true, control.bool_false_true)
            if kind != "CONTROL_SEQUENCE_CORRID" and not any(len(it) == 2 for it in values):
                found = f"{kind} without its two values"
                yield error("sequence", each.name, found, "such as int32_false_true: [0, 1]")


def _batching(config: Any) -> Iterator[Problem]:
    largest, dynamic = config.max_batch_size, config.HasField("dynamic_batching")
    if largest < 0:
        yield error("batch", "", f"max_batch_size is {largest}", "0 for a model that takes no batches, else at least 1")
    preferred = max(config.dynamic_batching.preferred_batch_size, default=0)
    if dynamic and preferred > max(largest, 0):
        found = f"preferred_batch_size {preferred} is more than max_batch_size {largest}"
        yield error("batch", "", found, "prefer none or a smaller one")
    elif dynamic and largest == 0:
        fix = "give max_batch_size, and dims without the batch"
        yield warning("batch", "", "dynamic_batching does nothing with max_batch_size 0", fix)
    if any(size < 1 for size in config.dynamic_batching.preferred_batch_size):
        yield error("batch", "", "preferred_batch_size is below 1", "prefer none or a larger one")


def _instances(config: Any) -> Iterator[Problem]:
    kinds, backend = schema().ModelInstanceGroup.Kind, backend_of(config)
    for group in config.instance_group:
        kind = kinds.Name(group.kind)
        if backend == "tensorrt" and kind in ("KIND_CPU", "KIND_MODEL"):
            yield error("instances", "", f"TensorRT with {kind}", "it runs on GPUs only: KIND_GPU")
        if backend == "onnxruntime" and kind == "KIND_CPU" and group.count == 0:
            yield warning(
                "instances", "", "without a count, ONNX Runtime gets 2 instances on the CPU", "give the count"
            )
        if group.profile and backend != "tensorrt":
            yield error("instances", "", "a profile, which only TensorRT has", "remove it")
        if group.count < 0:
            yield error("instances", "", f"count is {group.count}", "at least 1")
        if kind == "KIND_CPU" and group.gpus:
            yield error("instances", "", "KIND_CPU with a list of gpus", "remove the one or the other")
        if any(gpu < 0 for gpu in group.gpus):
            yield error("instances", "", f"gpus are {list(group.gpus)}", "numbers from 0, as nvidia-smi lists them")


def _accelerators(config: Any) -> Iterator[Problem]:
    accelerators = config.optimization.execution_accelerators
    gpu, cpu = accelerators.gpu_execution_accelerator, accelerators.cpu_execution_accelerator
    kinds = schema().ModelInstanceGroup.Kind
    groups = {kinds.Name(group.kind) for group in config.instance_group}
    if gpu and groups == {"KIND_CPU"}:
        yield warning("accelerator", "", "gpu_execution_accelerator with instances on the CPU only", "remove it")
    for chosen, known in ((gpu, _GPU_ACCELERATORS), (cpu, _CPU_ACCELERATORS)):
        for accelerator in chosen:
            if accelerator.name not in known:
                found = f"'{accelerator.name}' is none that ONNX Runtime's backend has"
                yield error("accelerator", accelerator.name, found, f"one of {', '.join(known)}")
    for accelerator in gpu:
        given = accelerator.parameters
        if accelerator.name == "tensorrt" and given.get("precision_mode", "FP32") not in _PRECISIONS:
            found = f"precision_mode is '{given['precision_mode']}'"
            yield error("accelerator", "tensorrt", found, f"one of {', '.join(_PRECISIONS)}")


def _parameters(config: Any) -> Iterator[Problem]:
    if backend_of(config) != "onnxruntime":
        return
    for key in config.parameters:
        near = difflib.get_close_matches(key, _ONNXRUNTIME_PARAMETERS, 1, 0.8)
        if near and key not in _ONNXRUNTIME_PARAMETERS:
            yield warning("parameters", key, "is no parameter of this backend, which ignores it", f"'{near[0]}'?")
    kinds = schema().ModelInstanceGroup.Kind
    on_cpu = any(kinds.Name(group.kind) == "KIND_CPU" for group in config.instance_group)
    if on_cpu and "intra_op_thread_count" not in config.parameters:
        found = "every instance starts a thread on each core, and they wait actively for each other"
        yield warning("threads", "", found, "give parameter intra_op_thread_count; cores divided by instances at most")


def _labels(folder: Path, config: Any) -> Iterator[Problem]:
    for tensor in config.output:
        if not tensor.label_filename:
            continue
        try:
            labels = (folder / tensor.label_filename).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as failure:
            found = f"its label_filename '{tensor.label_filename}' cannot be read: {failure}"
            yield error("labels", tensor.name, found, "a text file in the model's folder, a label a line")
            continue
        classes = math.prod(tensor.dims)
        if classes > 0 and len(labels) != classes:
            found = f"{len(labels)} labels for {classes} classes"
            yield error("labels", tensor.name, found, "a label a line, in the order of the classes")


def _warm_up(folder: Path, config: Any) -> Iterator[Problem]:
    inputs = {tensor.name: tensor for tensor in config.input}
    for sample in config.model_warmup:
        if sample.batch_size > max(config.max_batch_size, 1):
            found = f"batch_size {sample.batch_size} is more than max_batch_size {config.max_batch_size}"
            yield error("warm-up", sample.name, found, "warm up with a smaller one")
        for name in sorted(set(sample.inputs) ^ set(inputs)):
            has = "the model has no such input" if name in sample.inputs else "has no data for this input"
            yield error("warm-up", sample.name, f"'{name}': {has}", "give data for each input of the model")
        for name in sorted(set(sample.inputs) & set(inputs)):
            yield from _warm_up_input(folder, sample.name, inputs[name], sample.inputs[name])


def _warm_up_input(folder: Path, sample: str, tensor: Any, data: Any) -> Iterator[Problem]:
    fits = len(data.dims) == len(tensor.dims) and all(
        size > 0 and wanted in (size, -1) for size, wanted in zip(data.dims, tensor.dims, strict=True)
    )
    if not fits or data.data_type != tensor.data_type:
        found = f"'{tensor.name}' has dims {list(data.dims)}, the model {list(tensor.dims)}, or the types differ"
        yield error("warm-up", sample, found, "the model's own type and dims, without the batch")
    elif data.WhichOneof("input_data_type") is None:
        found = f"'{tensor.name}' has no data"
        yield error("warm-up", sample, found, "zero_data: true, random_data: true or input_data_file")
    elif data.input_data_file:
        path = folder / "warmup" / data.input_data_file
        size = _BYTES.get(schema().DataType.Name(data.data_type).removeprefix("TYPE_"))
        expected = None if size is None else size * math.prod(data.dims)
        found_bytes = path.stat().st_size if path.is_file() else None
        if found_bytes is None:
            yield error("warm-up", sample, f"{path.name} is not in warmup/", "put it there, or take random_data")
        elif expected is not None and found_bytes < expected:
            found = f"{path.name} has {found_bytes:,} bytes, one of a batch {expected:,}"
            yield error("warm-up", sample, found, "raw numbers, in row-major order")
