"""The folders of models: configuration, files and sidecars, as :mod:`gplq_export.triton.repository` shows them."""

import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from gplq import __version__
from gplq.errors import UsageError
from gplq.files import sha256, write_json, write_text
from gplq_export.doctor import gpu
from gplq_export.triton import config as configs
from gplq_export.triton.bindings import TensorInfo, onnx_bindings
from gplq_export.triton.config import CONFIG, LABELS, WARM_UP, ServingOptions
from gplq_export.triton.export_folder import Export, Network
from gplq_export.triton.images import TritonImage
from gplq_export.triton.sidecar import Sidecar
from gplq_export.triton.top import top_model
from gplq_export.triton.version_rules import FILES

_HERE = Path(__file__).parent


class ModelWriter:
    """Writes models of an export into a folder that nobody sees yet.

    ``models``: the folder. ``name``: what the models' names begin with. ``written``: see :func:`written_here`.
    """

    def __init__(
        self, models: Path, name: str, export: Export, options: ServingOptions, written: dict[str, Any]
    ) -> None:
        self.models, self.name, self.export, self.options, self.written = models, name, export, options, written

    def network(self, network: Network, warm_up: NDArray[np.float32] | None) -> str:
        """One network as a model; returns the model's name."""
        folder = self.models / f"{self.name}-{network.suffix}"
        config = self._network_config(network)
        batches = [1] if network.on_cpu else sorted({1, max(config.dynamic_batching.preferred_batch_size, default=1)})
        configs.add_warm_up(config, batches, from_file=warm_up is not None)
        if warm_up is not None:
            (folder / "warmup").mkdir(parents=True)
            (folder / "warmup" / WARM_UP).write_bytes(_as_input(warm_up, network).tobytes())
        if self.export.labels is not None:
            configs.add_labels(config, config.output[0].name)
            write_text(folder / LABELS, "".join(f"{label}\n" for label in self.export.labels))
        (folder / "1").mkdir(parents=True)
        hashes = write_version(folder / "1", network, self.export, self.written)
        configs.add_identity(config, 1, hashes)
        configs.add_preprocessing(config, self.export.preprocessing)
        self._config(folder, config)
        return folder.name

    def end_to_end(self, network: Network) -> str:
        """The ensemble around a network, and its other steps."""
        assert self.export.labels is not None
        [images], logits = network.bindings.inputs, network.bindings.outputs[0]
        encoded = TensorInfo("image", "TYPE_UINT8", (-1,))
        preprocess = configs.python(f"{self.name}-preprocess", [encoded], [images], self.options.instances)
        folder = self.models / preprocess.name
        (folder / "1").mkdir(parents=True)
        shutil.copyfile(_HERE / "preprocess_model.py", folder / "1" / "model.py")
        shutil.copyfile(_HERE / "preprocess.py", folder / "1" / "preprocess.py")
        write_json(folder / "1" / "preprocessing.json", self.export.preprocessing)
        self._step(folder, preprocess)

        model = top_model(logits.name, self.export.labels, self.options.top_k)
        folder = self.models / f"{self.name}-top"
        (folder / "1").mkdir(parents=True)
        onnx.save(model, folder / "1" / "model.onnx")
        one = ServingOptions(instances=1, threads=1, batch_max=self._network_config(network).max_batch_size)
        top = configs.onnxruntime_cpu(folder.name, onnx_bindings(folder / "1" / "model.onnx"), one, optimise=True)
        self._step(folder, top)

        steps = [(config.name, config) for config in (preprocess, self._network_config(network), top)]
        k = min(self.options.top_k, len(self.export.labels))
        outputs = [TensorInfo("labels", "TYPE_STRING", (-1, k)), TensorInfo("scores", "TYPE_FP32", (-1, k)), logits]
        folder = self.models / self.name
        (folder / "1").mkdir(parents=True)
        self._step(folder, configs.ensemble(self.name, [encoded], outputs, steps))
        return folder.name

    def _network_config(self, network: Network) -> Any:
        name, bindings = f"{self.name}-{network.suffix}", network.bindings
        if network.profiles:
            return configs.tensorrt(name, bindings, network.profiles, self.options)
        if network.on_cpu:
            # The reference is exact as it is written only.
            return configs.onnxruntime_cpu(name, bindings, self.options, optimise=network.kind != "int4")
        return configs.onnxruntime_gpu(name, bindings, self.options)

    def _step(self, folder: Path, config: Any) -> None:
        version = folder / "1"
        files = {path.name: sha256(path) for path in sorted(version.iterdir())}
        hashes = {"checkpoint_sha256": self.export.checkpoint_sha256}
        Sidecar("end-to-end", files, hashes, written=self.written).write(version)
        configs.add_identity(config, 1, hashes)
        self._config(folder, config)

    def _config(self, folder: Path, config: Any) -> None:
        write_text(folder / CONFIG, configs.print_config(config))


def write_version(folder: Path, network: Network, export: Export, written: dict[str, Any]) -> dict[str, str]:
    """A network's file and its sidecar; returns the hashes from the checkpoint to the file."""
    target = folder / (FILES["tensorrt"] if network.profiles else FILES["onnxruntime"])
    shutil.copyfile(network.file, target)
    hashes = {"checkpoint_sha256": export.checkpoint_sha256, "onnx_sha256": network.onnx_sha256}
    if network.profiles:
        hashes["plan_sha256"] = network.sha256
    Sidecar(
        network.kind,
        {target.name: network.sha256},
        hashes,
        network.bindings,
        network.profiles,
        network.engine,
        written,
    ).write(folder)
    return hashes


def _as_input(image: NDArray[np.float32], network: Network) -> NDArray[np.float32]:
    [images] = network.bindings.inputs
    if images.dtype != "TYPE_FP32" or tuple(image.shape) != images.shape[1:]:
        raise UsageError(f"the image to warm up with has shape {list(image.shape)}, not {list(images.shape[1:])}.")
    return np.ascontiguousarray(image, np.float32)


def written_here(image: TritonImage) -> dict[str, Any]:
    """When, where and for what. The GPU is that of the machine that writes: engines are made to be built there, too."""
    here = gpu()
    return {
        "tool_version": __version__,
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": here.found if here.status == "ok" else None,
        "cuda_of_torch": _cuda(),
        "image": asdict(image),
    }


def _cuda() -> str | None:
    """The CUDA that PyTorch was built for here, if it was."""
    import torch

    version: str | None = torch.version.cuda
    return version
