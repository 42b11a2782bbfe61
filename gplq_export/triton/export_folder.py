"""What an export offers for serving: its files, checked against its manifest, and what a server must know of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gplq.errors import UsageError
from gplq_export.manifest import exported, read_manifest
from gplq_export.runner import read_header
from gplq_export.triton.bindings import Bindings, onnx_bindings
from gplq_export.triton.config import Profile

_CPU = ("cpu", "int4", "fp32")
_GPU = ("fp16",)
# Others are served as engines only. What they are in ONNX needs FP16 and INT8, and Triton's ONNX Runtime lets TensorRT
# have one of them; it would ignore what the file for OpenVINO is laid out for.


@dataclass(frozen=True)
class Network:
    """A file of an export that Triton can serve.

    Attributes:
        kind: as 'gplq-export bench' names it: "cpu", "int4", "fp32" (ONNX Runtime on the CPU); "fp16" (ONNX Runtime on
            the GPU); "trt-int4.plan", "fp16.plan" and the like (TensorRT).
        file: the file itself. ``sha256``: of it.
        onnx_sha256: of the ONNX file that it is, or was built from.
        bindings: its inputs and outputs; those of an engine are its ONNX file's.
        profiles: ranges of the batch of an engine. ``engine``: what the manifest says about its build.
    """

    kind: str
    file: Path
    sha256: str
    onnx_sha256: str
    bindings: Bindings
    profiles: tuple[Profile, ...] = ()
    engine: dict[str, Any] | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether it is served on the CPU."""
        return self.kind in _CPU

    @property
    def suffix(self) -> str:
        """Of the model's name."""
        if self.kind.endswith(".plan"):
            return self.kind.removesuffix(".plan")
        return self.kind if self.on_cpu else f"{self.kind}-onnx"


class Export:
    """A folder that gplq-export wrote.

    Attributes:
        checkpoint_sha256: of what was exported.
        preprocessing: how images become tensors; plain data of :class:`gplq.preprocessing.Preprocessing`.
        labels: the names of the classes; numbers if the checkpoint names none; None for a network without classes.
    """

    def __init__(self, folder: Path) -> None:
        """Read the manifest.

        Raises:
            UsageError: there is none that gplq-export wrote.
        """
        self.folder = folder
        self._manifest = manifest = read_manifest(folder)
        self._files: dict[str, Any] = manifest["files"]
        try:
            self._engines: dict[str, Any] = dict(manifest["engines"])
            self.checkpoint_sha256 = str(manifest["checkpoint"]["sha256"])
            self.preprocessing: dict[str, Any] = dict(manifest["preprocessing"])
            self.labels = _labels(manifest)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise UsageError(f"{folder / 'manifest.json'} is damaged: it lacks {error}. Export again.") from error

    def kinds(self) -> list[str]:
        """What it has that can be served; engines of TensorRT-RTX, which Triton does not load, not."""
        names = sorted(self._files, key=lambda name: (name.endswith(".plan"), name != "model.cpu.onnx", name))
        kinds = [name.removeprefix("model.").removesuffix(".onnx") for name in names]
        return [kind for kind in kinds if kind in (*_CPU, *_GPU) or (kind[-5:] == ".plan" and not self._of_rtx(kind))]

    def default_kinds(self) -> list[str]:
        """The file for CPUs, and every engine with its FP16 twin."""
        return [kind for kind in self.kinds() if kind == "cpu" or kind.endswith(".plan")]

    def _of_rtx(self, kind: str) -> bool:
        return (
            self._engines.get(kind.removesuffix(".plan"), {}).get("backend") == "TensorRT-RTX" and kind[-5:] == ".plan"
        )

    def network(self, kind: str) -> Network:
        """One of them.

        Raises:
            UsageError: there is no such file, it cannot be served, or it is not the one that was exported.
        """
        plan = kind.endswith(".plan")
        name = f"model.{kind}" if plan else f"model.{kind}.onnx"
        if kind not in self.kinds():
            if self._of_rtx(kind):
                raise UsageError(
                    f"{self.folder / name} was built by TensorRT-RTX, whose plans Triton does not load. Build it with "
                    "TensorRT on a machine with a GPU, in the image nvcr.io/nvidia/tensorrt of the server's release."
                )
            raise UsageError(f"{self.folder} has no '{kind}' to serve; it has {', '.join(self.kinds())}.")
        file = exported(self.folder, self._manifest, name)
        if not plan:
            return Network(kind, file, self._sha256(name), self._sha256(name), onnx_bindings(file))
        # Reading an engine's tensors from itself would run it. The hashes say which ONNX file it was built from.
        onnx_name = f"{name.removesuffix('.plan')}.onnx"
        bindings, header = onnx_bindings(exported(self.folder, self._manifest, onnx_name)), read_header(file)
        try:
            engine = self._engines[kind.removesuffix(".plan")]
            same = engine["plan_sha256"] == self._sha256(name) and engine["onnx_sha256"] == self._sha256(onnx_name)
            ranges = [engine["batch"], *engine.get("options", {}).get("profiles", ())]
            profiles = tuple((int(low), int(best), int(high)) for low, best, high in ranges)
            built = {key: engine[key] for key in ("backend", "compute_capabilities", "options")}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"{self.folder / 'manifest.json'} does not say how {name} was built. Export again."
            ) from error
        if not same:
            raise UsageError(f"{file} was not built from the {onnx_name} beside it. Export again.")
        built = {**built, "backend_version": header.version}
        return Network(kind, file, self._sha256(name), self._sha256(onnx_name), bindings, profiles, built)

    def _sha256(self, name: str) -> str:
        entry = self._files.get(name)
        return str(entry.get("sha256")) if isinstance(entry, dict) else ""


def _labels(manifest: dict[str, Any]) -> list[str] | None:
    """One a line is how they are written down, so none may hold a line break."""
    [first, *_] = manifest["outputs"]
    if first["name"] != "logits":
        return None
    classes = int(first["shape"][-1])
    names = manifest["label_names"] or [str(index) for index in range(classes)]
    if len(names) != classes:
        raise ValueError("label_names")
    return [" ".join(str(name).split()) for name in names]
