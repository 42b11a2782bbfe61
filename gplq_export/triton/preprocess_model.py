"""The first step of the end-to-end model: an encoded image -> the network's input.

This file is copied into the repository as model.py and runs inside the server, in its Python backend.

How tensors are passed depends on NumPy. With 2, ``as_numpy()`` of servers up to release 24.10 returns the first number
in every place, and an array that is given back arrives empty, both without an error; DLPack works. With 1, giving back
an array through DLPack crashes this process; the other way works.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # only the server has it
from preprocess import Preprocess  # type: ignore[import-not-found]  # lies beside this file in the repository

_DLPACK = int(np.__version__.split(".")[0]) >= 2


class TritonPythonModel:
    """What the backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read how to, once."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self.preprocess = Preprocess(json.loads((folder / "preprocessing.json").read_text(encoding="utf-8")))

    def execute(self, requests: list[Any]) -> list[Any]:
        """An answer for each request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        tensor = pb_utils.get_input_tensor_by_name(request, "image")
        encoded = np.from_dlpack(tensor) if _DLPACK else tensor.as_numpy()
        try:
            images = self.preprocess(encoded.tobytes())[None]
        except Exception as error:  # Pillow's decoders raise nearly every type there is for damaged files
            message = f"cannot read the image: {error}"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
        output = pb_utils.Tensor.from_dlpack("images", images) if _DLPACK else pb_utils.Tensor("images", images)
        return pb_utils.InferenceResponse([output])
