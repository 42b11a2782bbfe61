"""``config.pbtxt``: built, printed and read with the server's own protobuf schema, never by string templates.

The schema is that of the package ``tritonclient``; a server that is older than it refuses fields that it does not know.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format  # type: ignore[import-untyped]

from gplq.errors import UsageError
from gplq_export.runtimes import package
from gplq_export.triton.bindings import Bindings, TensorInfo

CONFIG = "config.pbtxt"
LABELS = "labels.txt"
PREPROCESSING = "gplq.preprocessing"  # a network's parameter: what its images went through, as JSON
WARM_UP = "images"  # the file in the model's folder warmup/
ENGINE_CACHE = "/var/cache/engines"  # a volume in compose.yaml
Profile = tuple[int, int, int]  # smallest, best and largest batch of an engine


@dataclass(frozen=True)
class ServingOptions:
    """What can be chosen about serving; every value ends up in a config.pbtxt.

    Attributes:
        instances: copies of a network on the CPU, which compute at the same time. One on each GPU.
        threads: of each copy on the CPU. ONNX Runtime's threads wait actively: more than cores divided by copies slow
            each other down.
        batch_max: largest batch of an ONNX file; that of an engine is its largest profile's.
        queue_delay_us: how long a request may wait for others to share a batch with, in µs. 0: batches form of what
            came while the network was busy.
        versions: so many of the newest versions of each network are served, side by side.
        top_k: so many labels the end-to-end model returns.
    """

    instances: int = 2
    threads: int = 1
    batch_max: int = 8
    queue_delay_us: int = 0
    versions: int = 2
    top_k: int = 5


def schema() -> Any:
    """The module of the schema's messages.

    Raises:
        MissingError: tritonclient is not installed.
    """
    return package("tritonclient.grpc.model_config_pb2", "tritonclient is not installed: pip install 'gplq[triton]'.")


def parse_config(text: str, source: Path) -> Any:
    """A ``ModelConfig`` message.

    Raises:
        UsageError: the text is none; says line, column and why, as only the server's log would.
        MissingError: tritonclient is not installed.
    """
    try:
        return text_format.Parse(text, schema().ModelConfig())
    except text_format.ParseError as error:
        raise UsageError(f"{source} is no model configuration: line {error}") from error


def print_config(config: Any) -> str:
    """A message as text, as the server reads it."""
    text: str = text_format.MessageToString(config)
    return text


def onnxruntime_cpu(name: str, bindings: Bindings, options: ServingOptions, *, optimise: bool) -> Any:
    """An ONNX file in ONNX Runtime on the CPU; ``optimise``: its graph optimisations, without which it runs as is."""
    config = _batching(name, "onnxruntime", bindings, options.batch_max, options)
    # Without a count, this backend starts two instances.
    config.instance_group.add(kind=_kind("KIND_CPU"), count=options.instances)
    _parameters(
        config,
        {
            "intra_op_thread_count": str(options.threads),
            "inter_op_thread_count": "1",
            "execution_mode": "0",  # one node after the other
        },
    )
    if not optimise:
        config.optimization.graph.level = 2  # this backend's number for "none"
    return config


def onnxruntime_gpu(name: str, bindings: Bindings, options: ServingOptions) -> Any:
    """An ONNX file in ONNX Runtime's TensorRT provider, which builds the engine when the server starts."""
    config = _batching(name, "onnxruntime", bindings, options.batch_max, options)
    config.instance_group.add(kind=_kind("KIND_GPU"), count=1)
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
    profile = {"min": 1, "opt": min(8, options.batch_max), "max": options.batch_max}
    [images] = bindings.inputs
    shapes = {
        f"trt_profile_{extreme}_shapes": f"{images.name}:{'x'.join(map(str, (batch, *images.shape[1:])))}"
        for extreme, batch in profile.items()
    }
    settings = {
        "precision_mode": "FP16",
        "max_workspace_size_bytes": str(2**30),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": ENGINE_CACHE,
        **shapes,
    }
    for key, value in settings.items():
        accelerator.parameters[key] = value
    return config


def tensorrt(name: str, bindings: Bindings, profiles: Sequence[Profile], options: ServingOptions) -> Any:
    """A plan in TensorRT: every profile, CUDA graphs for the batches that it is best at."""
    batch_max = max(profile[2] for profile in profiles)
    config = _batching(name, "tensorrt", bindings, batch_max, options)
    config.platform = "tensorrt_plan"
    config.instance_group.add(kind=_kind("KIND_GPU"), count=1, profile=[str(index) for index in range(len(profiles))])
    best = sorted({profile[1] for profile in profiles})
    config.dynamic_batching.preferred_batch_size.extend(best)
    config.optimization.cuda.graphs = True
    # Batches of other sizes run without a graph; one request alone is worth one.
    for batch in sorted({min(profile[0] for profile in profiles), *best, batch_max}):
        graph = config.optimization.cuda.graph_spec.add(batch_size=batch)
        for tensor in bindings.inputs:
            graph.input[tensor.name].dim.extend(tensor.shape[1:])
    return config


def python(name: str, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], instances: int) -> Any:
    """A model.py on the CPU that takes one request at a time: batches are none of Triton's business."""
    config = schema().ModelConfig(name=name, backend="python", max_batch_size=0)
    _tensors(config, inputs, outputs, batched=False)
    config.instance_group.add(kind=_kind("KIND_CPU"), count=instances)
    return config


def ensemble(
    name: str, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], steps: Sequence[tuple[str, Any]]
) -> Any:
    """Models in a row. ``steps``: name and config of each; tensors of one name are one tensor."""
    config = schema().ModelConfig(name=name, platform="ensemble", max_batch_size=0)
    _tensors(config, inputs, outputs, batched=False)
    for model, its in steps:
        step = config.ensemble_scheduling.step.add(model_name=model, model_version=-1)
        for tensor in its.input:
            step.input_map[tensor.name] = tensor.name
        for tensor in its.output:
            step.output_map[tensor.name] = tensor.name
    return config


def add_labels(config: Any, output: str) -> None:
    """Let the server name the classes of an output, for the classification extension."""
    [tensor] = [tensor for tensor in config.output if tensor.name == output]
    tensor.label_filename = LABELS


def add_warm_up(config: Any, batches: Sequence[int], *, from_file: bool) -> None:
    """Make the server run batches before it says that it is ready: of the file in warmup/, or of noise."""
    for batch in batches:
        warm_up = config.model_warmup.add(name=f"batch of {batch}", batch_size=batch, count=1)
        for tensor in config.input:
            data = warm_up.inputs[tensor.name]
            data.data_type = tensor.data_type
            data.dims.extend(tensor.dims)
            if from_file:
                data.input_data_file = WARM_UP
            else:
                data.random_data = True


def add_identity(config: Any, version: int, hashes: Mapping[str, str]) -> None:
    """What clients can ask for: where a version comes from, as in its gplq.json."""
    _parameters(config, {f"gplq.{version}.{key}": value for key, value in hashes.items()})


def add_preprocessing(config: Any, settings: Mapping[str, Any]) -> None:
    """Tell clients of a network what to do to an image before they send it."""
    _parameters(config, {PREPROCESSING: json.dumps(settings)})


def _batching(name: str, backend: str, bindings: Bindings, batch_max: int, options: ServingOptions) -> Any:
    config = schema().ModelConfig(name=name, backend=backend, max_batch_size=batch_max)
    _tensors(config, bindings.inputs, bindings.outputs, batched=True)
    config.version_policy.latest.num_versions = options.versions
    config.dynamic_batching.max_queue_delay_microseconds = options.queue_delay_us
    return config


def _tensors(config: Any, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], *, batched: bool) -> None:
    """Triton puts the batch in front of the dims of a model that batches."""
    for kind, tensors in ((config.input, inputs), (config.output, outputs)):
        for tensor in tensors:
            dims = tensor.shape[1:] if batched else tensor.shape
            kind.add(name=tensor.name, data_type=schema().DataType.Value(tensor.dtype), dims=dims)


def _parameters(config: Any, values: Mapping[str, str]) -> None:
    for key, value in values.items():
        config.parameters[key].string_value = value


def _kind(name: str) -> int:
    value: int = schema().ModelInstanceGroup.Kind.Value(name)
    return value
