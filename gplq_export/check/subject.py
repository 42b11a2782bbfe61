"""What is checked: the files of an export, and the chain of hashes that ties them to their checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gplq.checkpoint import Checkpoint, at_image_size, load_checkpoint
from gplq.convert import structure_of
from gplq.errors import MissingError, ModelError, PrecisionError, UsageError
from gplq.files import printable, sha256
from gplq.models import FloatModel, is_weights_file, load_model
from gplq_export.check.gates import Judge
from gplq_export.check.report import File, Subject
from gplq_export.kernels import KERNELS
from gplq_export.manifest import CHECKPOINT, MANIFEST, input_shape, is_intact, read_manifest
from gplq_export.onnx_file import read_onnx

EXPORT = "export"  # what gates on the files are filed under, where others have a pair


@dataclass
class Files:
    """Files by kind: "int4", "cpu", "fp32", "trt-int4" (ONNX) and "trt-int4.plan" (engines).

    Attributes:
        manifest: of the export that they belong to; None if they are by themselves.
        broken: kind -> why a file is not what it should be; such a plan is not run.
    """

    paths: dict[str, Path]
    manifest: dict[str, Any] | None = None
    broken: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: Sequence[Path]) -> "Files":
        """The files of an export's folder, or these files, with the manifest that lies beside them.

        Raises:
            UsageError: a folder is none of an export, a file is missing, or is neither an ONNX file of ours nor a plan.
        """
        manifest: dict[str, Any] | None = None
        if len(paths) == 1 and paths[0].is_dir():
            folder = paths[0]
            manifest = read_manifest(folder)
            named = [folder / name for name in manifest["files"]]
        else:
            named = list(paths)
            if missing := [path for path in named if not path.is_file()]:
                raise UsageError(f"{missing[0]} does not exist: name the folder of an export, or files of it.")
            folders = {path.parent for path in named}
            folder = folders.pop()
            if folders:
                raise UsageError("files to check must lie in one folder, that of their export.")
            if (folder / MANIFEST).exists():
                manifest = read_manifest(folder)
        found: dict[str, Path] = {}
        for path in named:
            if path.suffix in (".onnx", ".plan") and (other := found.setdefault(_kind(path), path)) != path:
                raise UsageError(f"{path} and {other.name} are both for {_kind(path)}: one is a copy. Export again.")
        if not found:
            raise UsageError(f"{folder} holds neither ONNX files nor plans.")
        return cls(found, manifest)

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return next(iter(self.paths.values())).parent


def _kind(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"{path} does not exist. Export again, or name files that do.")
    name = path.name.removeprefix("model.")
    if path.suffix == ".plan":
        return name
    target = read_onnx(path).metadata_props.get("gplq.target")
    if target is None:
        raise UsageError(
            f"{path} was not written by gplq-export: it does not say what it is for. See lint and inspect."
        )
    return target


def find_checkpoint(files: Files, given: Path | None) -> Checkpoint:
    """The checkpoint that the files were made from, for images of their size.

    Raises:
        UsageError: there is none.
        CheckpointError: it cannot be read.
    """
    path = given or files.folder / CHECKPOINT
    if given is None and not path.exists():
        raise UsageError(f"{files.folder} has no {CHECKPOINT}: name the checkpoint with --checkpoint.")
    checkpoint = load_checkpoint(path)
    if files.manifest is not None:
        size = input_shape(files.folder, files.manifest)
        if size != checkpoint.preprocessing.input_size:
            checkpoint = at_image_size(checkpoint, size[-1])
    return checkpoint


def find_float_model(checkpoint: Checkpoint, given: str | None = None) -> FloatModel | None:
    """The model that was quantised: where it was then, if it is still there; or the one that is ``given``.

    Raises:
        UsageError: the given one has other weights, is for other images, or cannot be loaded.
    """
    source = given or str(checkpoint.provenance.get("source", ""))
    if not given and not Path(source).exists():
        return None  # a name, whose weights would be downloaded: only if the user says so
    spec = checkpoint.spec
    is_file = is_weights_file(source)
    try:
        found = load_model(
            source,
            arch=spec.architecture if is_file else None,
            model_args=spec.model_args,
            num_classes=spec.num_classes if is_file or spec.num_classes == 0 else None,
            checkpoint_key=checkpoint.provenance.get("source_key") if Path(source).exists() else None,
            preprocessing=checkpoint.preprocessing.settings(),
        )
    except ModelError as error:
        if given:
            raise UsageError(
                f"{given}: the checkpoint was made from other weights, or these cannot be read: {error}"
            ) from error
        return None
    if found.sha256 != checkpoint.provenance.get("source_sha256") or found.preprocessing != checkpoint.preprocessing:
        if given:
            raise UsageError(f"{given}: the checkpoint was made from other weights, or for other images.")
        return None
    return found


def judge_files(files: Files, checkpoint: Checkpoint, judge: Judge, *, trust_engine: bool) -> None:
    """The chain of hashes: every file is the one that was exported, and was made from this checkpoint."""
    manifest = files.manifest
    made_from = None if manifest is None else _get(manifest, "checkpoint", "sha256")
    if made_from is not None:
        same = made_from == checkpoint.sha256
        judge.add(
            EXPORT,
            "checkpoint",
            same,
            f"the export was made from {str(made_from)[:16]}…, "
            + ("which is this checkpoint." if same else f"this checkpoint is {checkpoint.sha256[:16]}…: another one."),
        )
    for kind, path in files.paths.items():
        problem = _problem(kind, path, files, checkpoint.sha256, trust_engine)
        if problem is not None:
            files.broken[kind] = problem
        judge.add(EXPORT, f"hash.{kind}", problem is None, problem or f"{path.name} is what was exported.")


def judge_precision(files: Files, judge: Judge) -> None:
    """What multiplies in what: of engines as it was read back from the builder, of CPU files as it is here and now."""
    for name, entry in (files.manifest or {}).get("engines", {}).items():
        rows = _get(entry, "precision", "rows")
        if f"{name}.plan" not in files.paths or not isinstance(rows, list):
            continue
        lost = [str(row.get("name")) for row in rows if not row.get("kept")]
        _judge_lost(
            judge,
            f"{name}.plan",
            lost,
            "layers",
            f"read back from the builder: {_get(entry, 'precision', 'summary')}",
            "; not as promised: ",
            "An engine that computes in another precision than its types promise is slower, or is something else.",
        )
    for kind, read in KERNELS.items():
        if kind not in files.paths:
            continue
        try:
            kernels = read(files.paths[kind])
        except MissingError as error:
            judge.skip(EXPORT, f"precision.{kind}", str(error))
            continue
        except PrecisionError as error:
            judge.add(EXPORT, f"precision.{kind}", False, str(error))
            continue
        wrong = [name for name, kernel in kernels.items() if kernel.promised and not kernel.integer]
        integer = sum(kernel.integer for kernel in kernels.values())
        _judge_lost(
            judge,
            kind,
            wrong,
            "multiplications",
            f"{integer} of {len(kernels)} multiplications run in 8-bit integers on this CPU",
            "; promised, too, but not: ",
            "What the runtime does not recognise is computed in floating point: right, but slower than FP32.",
        )


def _judge_lost(judge: Judge, kind: str, lost: list[str], unit: str, found: str, but: str, why: str) -> None:
    """The gate on what does not compute in the promised precision: nothing may be ``lost``."""
    judge.add(
        EXPORT,
        f"precision.{kind}",
        not lost,
        found + (f"{but}{', '.join(lost[:5])}." if lost else "."),
        layer=lost[0] if lost else None,
        found=len(lost),
        limit=0,
        unit=unit,
        why=why,
    )


def _problem(kind: str, path: Path, files: Files, checkpoint: str, trust_engine: bool) -> str | None:
    """What is wrong with a file's place in the chain."""
    manifest, name = files.manifest, path.name
    plan = path.suffix == ".plan"
    if manifest is None:
        if plan and not trust_engine:
            return f"{name}: no manifest.json says what its hash must be, and a plan is a program (--trust-engine)."
    elif name not in manifest["files"]:
        return f"{name} is not in the manifest of its folder: it is no part of this export."
    elif not is_intact(files.folder, manifest, name) and not (plan and trust_engine):
        return f"{name} is not the file that was exported: it was replaced or altered. Export again."
    if not plan:
        made_from = read_onnx(path).metadata_props.get("gplq.checkpoint_sha256")
        if made_from != checkpoint:
            return f"{name} was made from another checkpoint, {str(made_from)[:16]}…: not {checkpoint[:16]}…"
        return None
    onnx = path.with_suffix(".onnx").name
    built_from = _get(manifest, "engines", kind.removesuffix(".plan"), "onnx_sha256")
    if manifest is not None and onnx in manifest["files"] and built_from != manifest["files"][onnx]["sha256"]:
        return f"{name} is stale: it was built from another {onnx} than the one beside it. Export again."
    return None


def _get(content: Any, *keys: str) -> Any:
    """A nested entry; None where there is none."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def describe(files: Files, checkpoint: Checkpoint) -> Subject:
    """For the report."""
    provenance, manifest = checkpoint.provenance, files.manifest or {}
    hashes = {path.name: sha256(path) for path in files.paths.values()}
    source = str(provenance.get("source_sha256", "unknown"))
    chain = [
        f"float weights {source}  {printable(str(provenance.get('source', '')))}".rstrip(),
        f"checkpoint {checkpoint.sha256}  from the weights, and {_get(provenance, 'train_data', 'sha256')}",
        *(f"{name} {digest}  from the checkpoint" for name, digest in hashes.items() if name.endswith(".onnx")),
        *(
            f"{name} {digest}  from {_get(manifest, 'engines', Path(name).stem.removeprefix('model.'), 'onnx_sha256')}"
            for name, digest in hashes.items()
            if name.endswith(".plan")
        ),
    ]
    precision = {
        f"{name}.plan": str(_get(entry, "precision", "summary")) for name, entry in manifest.get("engines", {}).items()
    }
    for name, kernels in manifest.get("kernels", {}).items():
        integer = sum(bool(kernel.get("integer")) for kernel in kernels.values())
        precision[f"{name}.onnx"] = f"{integer} of {len(kernels)} multiplications in 8-bit integers"
    structure = structure_of(checkpoint.model)
    return Subject(
        architecture=checkpoint.spec.architecture,
        checkpoint="" if checkpoint.path is None else checkpoint.path.name,
        checkpoint_sha256=checkpoint.sha256,
        recipe=checkpoint.recipe.to_dict(),
        files={path.name: File(bytes=path.stat().st_size, sha256=hashes[path.name]) for path in files.paths.values()},
        chain=chain,
        bytes={str(what): int(size) for what, size in manifest.get("int4_onnx_bytes", {}).items()},
        precision=precision,
        floats=dict(structure.floats),
    )
