"""In place of Triton's TensorRT back end, which no registry carries and which needs a GPU. It runs no plan.

It compares the configuration with what gplq.json beside the plan says, as the real one does with the plan. Requests are
answered by the plan's twin in ONNX where a test has put it beside the plan as ``twin.onnx``, and refused otherwise.
"""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

_path = Path(__file__).resolve().parents[1] / "onnxruntime" / "model.py"
_spec = importlib.util.spec_from_file_location("onnxruntime_stand_in", _path)
stand_in = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stand_in)


class TritonPythonModel(stand_in.TritonPythonModel):
    """One instance of a model."""

    session = None

    def initialize(self, args: dict[str, str]) -> None:
        """Check the configuration; raises if it does not fit."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"], args["model_version"])
        sidecar = json.loads((folder / "gplq.json").read_text(encoding="utf-8"))
        if hashlib.sha256((folder / "model.plan").read_bytes()).hexdigest() != sidecar["files"]["model.plan"]:
            raise pb_utils.TritonModelException("unable to create TensorRT engine: it is not the one that was written")
        for kind in ("input", "output"):
            tensors = {tensor["name"]: (tensor["dtype"], tensor["shape"]) for tensor in sidecar["bindings"][f"{kind}s"]}
            stand_in.check(config, kind, tensors)
        largest = max(profile[2] for profile in sidecar["profiles"])
        if config["max_batch_size"] > largest:
            raise pb_utils.TritonModelException(
                f"configuration specified max-batch {config['max_batch_size']} but TensorRT engine only supports "
                f"max-batch {largest}"
            )
        if (folder / "twin.onnx").is_file():
            self.open(folder / "twin.onnx", config)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers of the twin, or refusals."""
        if self.session is not None:
            return super().execute(requests)
        error = pb_utils.TritonError("this stands in for TensorRT, and runs no plan", pb_utils.TritonError.UNAVAILABLE)
        return [pb_utils.InferenceResponse(error=error) for _ in requests]
