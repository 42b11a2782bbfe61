"""In place of Triton's ONNX Runtime back end, which no registry carries: the same model files and the same parameters.

Runs on the CPU. Names, types and shapes of the configuration must be those of the file, as the real one demands.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(int64)": "TYPE_INT64",
    "tensor(int32)": "TYPE_INT32",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(string)": "TYPE_STRING",
}
LEVELS = {-1: "ORT_ENABLE_BASIC", 1: "ORT_ENABLE_EXTENDED", 2: "ORT_DISABLE_ALL"}  # anything else: ORT_ENABLE_ALL


def session_options(config: dict[str, Any]) -> ort.SessionOptions:
    """What the parameters ask for."""
    parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", 0))
    options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", 0))
    if parameters.get("execution_mode", "0") == "1":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS.get(level, "ORT_ENABLE_ALL"))
    return options


def check(config: dict[str, Any], kind: str, found: dict[str, tuple[str, list[int]]]) -> None:
    """Compare the inputs or outputs of a configuration with a model's: type and shape, -1 for any size, by name."""
    for port in config[kind]:
        name = port["name"]
        if name not in found:
            raise pb_utils.TritonModelException(f"unexpected {kind} '{name}', the model has {sorted(found)}")
        dtype, shape = found[name]
        inner = port["reshape"].get("shape", []) if "reshape" in port else port["dims"]
        dims = [-1] * bool(config["max_batch_size"]) + [int(size) for size in inner]
        if len(dims) != len(shape) or any(a != b and -1 not in (a, b) for a, b in zip(dims, shape, strict=True)):
            raise pb_utils.TritonModelException(f"{kind} '{name}': {dims} configured, the model has {shape}")
        if dtype != port["data_type"]:
            raise pb_utils.TritonModelException(
                f"{kind} '{name}': {port['data_type']} configured, the model has {dtype}"
            )


class TritonPythonModel:
    """One instance of a model."""

    @staticmethod
    def auto_complete_config(model_config: Any) -> Any:
        """Nothing is completed: what is not written down is not tested."""
        return model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Open the file; raises if it is none, or another one than configured."""
        config = json.loads(args["model_config"])
        name = config.get("default_model_filename") or "model.onnx"
        self.open(Path(args["model_repository"], args["model_version"], name), config)

    def open(self, path: Path, config: dict[str, Any]) -> None:
        """What :meth:`initialize` does, with a file of this name."""
        self.session = ort.InferenceSession(str(path), session_options(config), providers=["CPUExecutionProvider"])
        for kind, values in (("input", self.session.get_inputs()), ("output", self.session.get_outputs())):
            shapes = {
                value.name: (TYPES[value.type], [size if isinstance(size, int) else -1 for size in value.shape])
                for value in values
            }
            check(config, kind, shapes)
        self.inputs = [port["name"] for port in config["input"]]
        self.outputs = [port["name"] for port in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """All requests in one run, as the real back end does it."""
        feeds = [
            [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs]
            for request in requests
        ]
        batch = {name: np.concatenate(arrays) for name, *arrays in zip(self.inputs, *feeds, strict=True)}
        answers = self.session.run(self.outputs, batch)
        ends = np.cumsum([len(arrays[0]) for arrays in feeds])[:-1]
        rows = zip(*(np.split(answer, ends) for answer in answers), strict=True)
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, part) for name, part in zip(self.outputs, row, strict=True)]
            )
            for row in rows
        ]
