"""The chain: every pair from the float model in PyTorch to what is served, on the same preprocessed tensors.

=================  ==================================  =================================================
pair               reference                           candidate
=================  ==================================  =================================================
float              the float model, PyTorch            the checkpoint, PyTorch
rounding           the checkpoint, quantisers off      the checkpoint
twin-fp32          the checkpoint, quantisers off      model.fp32.onnx, ONNX Runtime
twin-fp16          the same                            model.fp16.onnx, ONNX Runtime
fp16.plan          the same                            model.fp16.plan, TensorRT
int4               the checkpoint                      model.int4.onnx, ONNX Runtime without optimisation
int4-optimised     the checkpoint                      model.int4.onnx, ONNX Runtime as anybody gets it
cpu, openvino      the checkpoint                      the deployment file, in its runtime
trt-int4 ...       the checkpoint                      what the engine is built from, ONNX Runtime, FP16
trt-int4.plan ...  the checkpoint                      the engine, TensorRT
served             the checkpoint                      a model on a Triton Inference Server
=================  ==================================  =================================================

The checkpoint's own twins come first: an engine that is wrong without any quantisation is not blamed on it. What cannot
run here is skipped with the reason, never passed.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from gplq import __version__
from gplq.checkpoint import Checkpoint, frozen_quantizers
from gplq.convert import units
from gplq.errors import BuildError, GplqError, MissingError, UsageError
from gplq.models import FloatModel
from gplq.provenance import environment
from gplq_export.check.baseline import judge_baseline, judge_closeness, judge_golden, judge_range
from gplq_export.check.capture import AnotherSummationOrder, Capture, HalfPrecision
from gplq_export.check.forced import compare_forced
from gplq_export.check.free import Comparison, Member, Seen, StateFile, compare, stream
from gplq_export.check.gates import Judge, Thresholds, read_thresholds
from gplq_export.check.graph import Part, check_graph, find_taps
from gplq_export.check.images import Images, Source
from gplq_export.check.members import array_member, check_shapes, engine_member, module_member, torch_member
from gplq_export.check.report import Flip, Layer, Pair, Report, Top
from gplq_export.check.subject import Files, describe, judge_files, judge_precision
from gplq_export.onnx_file import read_onnx
from gplq_export.runtimes import (
    Run,
    Runtime,
    onnxruntime_optimised,
    onnxruntime_reference,
    openvino_optimised,
)
from gplq_export.trace import INPUT

Say = Callable[[str], None]
_ORT, _OPTIMISED = "ONNX Runtime without optimisation", "ONNX Runtime with all optimisation"
_CHECKPOINT, _OFF = "the checkpoint in PyTorch", "the checkpoint in PyTorch, quantisers off"
_CAPTURED, _LARGEST_BATCH = 64 * 2**20, 64  # bytes; images
_FLIPS, _PICTURES = 200, 24


@dataclass(frozen=True)
class Back:
    """Where the quantised file of a kind runs on CPUs. ``ties``, ``whole_blocks``: see :func:`compare_forced`."""

    file: str
    runtime: Runtime
    words: str
    ties: bool = False
    whole_blocks: bool = False


_REFERENCE = Back("int4", onnxruntime_reference, _ORT)
# Those that rearrange a file before they run it, by pair.
OPTIMISED = {
    "int4-optimised": Back("int4", onnxruntime_optimised, _OPTIMISED, whole_blocks=True),
    "cpu": Back("cpu", onnxruntime_optimised, _OPTIMISED),
    "openvino": Back("openvino", openvino_optimised, "OpenVINO on the CPU", ties=True),
}
_TWINS: dict[str, type[AnotherSummationOrder | HalfPrecision]] = {"fp32": AnotherSummationOrder, "fp16": HalfPrecision}


@dataclass(frozen=True)
class Settings:
    """How to check.

    Attributes:
        forced_images: so many images for what is teacher-forced, for the twins and for the layers of optimised files;
            everything else takes all.
        batch_size: images at once; None: as many as keep what is captured of them within 64 MB.
        expected_top1: of the float model, in per cent; None: what was measured when the checkpoint was made.
        float_model: the original; without it the pair "float" is skipped.
        served: (name, function) of a served model.
        state: where to keep what was counted, to go on after an interruption; None: nowhere.
        trust_engine: also run plans that no manifest vouches for.
        random: the images are random numbers; accuracy and golden outputs mean nothing.
    """

    forced_images: int = 256
    batch_size: int | None = None
    thresholds: Thresholds = field(default_factory=read_thresholds)
    expected_top1: float | None = None
    float_model: FloatModel | None = None
    served: tuple[str, Run] | None = None
    state: Path | None = None
    trust_engine: bool = False
    random: bool = False


def check(
    checkpoint: Checkpoint, files: Files, images: Images, settings: Settings | None = None, *, say: Say = print
) -> Report:
    """Check files against their checkpoint on images.

    Args:
        checkpoint: what the files were made from, on the CPU.
        files: of an export, or some of them.
        images: with labels or without (all of them -1); or batches [B, C, H, W], just as the model gets them.
        settings: how.
        say: where progress messages go.

    Raises:
        MissingError: ONNX Runtime is not installed.
        UsageError: the state cannot be written.
    """
    started = time.monotonic()
    chain = _Chain(checkpoint, files, Source(images), settings or Settings(), say)
    pairs = chain.run()
    env = environment()
    return Report(
        tool_version=__version__,
        created_utc=env["created_utc"],
        command=env["command"],
        seconds=round(time.monotonic() - started, 1),
        python=env["python"],
        platform=env["platform"],
        versions=env["versions"],
        subject=describe(files, checkpoint),
        data=chain.source.describe(checkpoint.preprocessing, random=chain.settings.random),
        thresholds_version=chain.settings.thresholds.version,
        gates=chain.judge.gates,
        pairs=pairs,
    )


class _Chain:
    """One check: members, comparisons, pairs and gates."""

    def __init__(self, checkpoint: Checkpoint, files: Files, source: Source, settings: Settings, say: Say) -> None:
        self.checkpoint, self.files, self.source, self.settings, self.say = checkpoint, files, source, settings, say
        self.few = source.few(settings.forced_images)
        self.judge = Judge(settings.thresholds)
        self.classifies = checkpoint.spec.num_classes > 0
        self.quantizers = list(frozen_quantizers(checkpoint.model))
        self.pairs: list[Pair] = []
        self.skipped: dict[str, str | GplqError] = {}  # member -> why it cannot run
        self.files_run: set[str] = set()  # members that are files
        self.on_all: dict[str, Comparison] = {}
        self.on_few: dict[str, Comparison] = {}
        self.members: dict[str, Member] = {
            "torch": torch_member(checkpoint.model),
            "torch-order": torch_member(checkpoint.model, AnotherSummationOrder),
            "torch-half": torch_member(checkpoint.model, HalfPrecision),
            "off": torch_member(checkpoint.model, rounding=False),
            "off-order": torch_member(checkpoint.model, AnotherSummationOrder, rounding=False),
            "off-half": torch_member(checkpoint.model, HalfPrecision, rounding=False),
        }

    def run(self) -> list[Pair]:
        """Everything, in order."""
        judge_files(self.files, self.checkpoint, self.judge, trust_engine=self.settings.trust_engine)
        judge_precision(self.files, self.judge)
        self._plan()
        self._stream()
        judge_golden(self.source, self.checkpoint, self.judge)
        ours = next((name for name, each in self.on_all.items() if each.reference == "torch"), "")
        float_top, our_top = self._top("float", "reference"), self._top(ours, "reference")
        if self.classifies:
            judge_baseline(self.judge, self.checkpoint.provenance, float_top, our_top, self.settings.expected_top1)
        self._float()
        self._rounding()
        if any(kind.startswith(("fp16", "trt-")) for kind in self.files.paths):
            # What does not fit is the cause of what the twin in FP16 gets wrong.
            judge_range(self.few, self.checkpoint, next(iter(self._engine_graphs()), "fp16"), self.judge)
        for kind in _TWINS:
            self._twin(kind)
        self._plans(twin=True)
        self._int4()
        for name, back in OPTIMISED.items():
            self._optimised(name, back)
        for kind in self._engine_graphs():
            self._engine_graph(kind)
        self._plans(twin=False)
        self._served()
        if self.state is not None:
            self.state.remove()
        return self.pairs

    # What is to be run: members that can, and comparisons of them.

    def _plan(self) -> None:
        files, few, on_all = self.files, self.on_few, self.on_all
        few["rounding"] = self._compare("off", "torch", units=[name for name, _ in units(self.checkpoint.model)])
        if self.settings.float_model is not None:
            self.members["float"] = module_member(self.settings.float_model.model)
            on_all["float"] = self._compare("float", "torch")
        for kind in _TWINS:
            if kind in files.paths and self._member(kind, partial(self._whole, kind, onnxruntime_optimised)):
                few[f"twin-{kind}"] = self._compare("off", kind)
        if "int4" in files.paths and self._member("int4", self._reference):
            on_all["int4"] = self._compare("torch", "int4", codes=self.quantizers)
        for name, back in OPTIMISED.items():
            if back.file not in files.paths:
                continue
            marked, whole = (partial(make, back.file, back.runtime) for make in (self._marked, self._whole))
            if self._member(f"{name}-marked", marked) and self._member(name, whole):
                on_all[name] = self._compare("torch", name)
                few[f"{name}-marked"] = self._compare("torch", f"{name}-marked", codes=self.quantizers)
                few[f"{name}-debug"] = self._compare(f"{name}-marked", name)
        for kind in self._engine_graphs():
            if self._member(kind, partial(self._whole, kind, onnxruntime_reference)):
                few[kind] = self._compare("torch", kind)
        for kind in [kind for kind in files.paths if kind.endswith(".plan")]:
            if self._member(kind, partial(engine_member, files.paths[kind], self.settings.trust_engine)):
                target = few if kind == "fp16.plan" else on_all
                target[kind] = self._compare("off" if kind == "fp16.plan" else "torch", kind)
        if self.settings.served is not None:
            self.members["served"] = array_member(self.settings.served[1], INPUT)
            on_all["served"] = self._compare("torch", "served")
        self._plan_floors()

    def _plan_floors(self) -> None:
        """The reference against itself, where something is compared with it."""
        few, on_all = self.on_few, self.on_all
        if any(each.reference == "off" and name != "rounding" for name, each in few.items()):
            few["floor-off-order"] = self._compare("off", "off-order")
            few["floor-off-half"] = self._compare("off", "off-half")
        if any(name.endswith("-marked") for name in few):
            few["floor-order"] = self._compare("torch", "torch-order", codes=self.quantizers)
        if any(each.reference == "torch" and name != "float" for name, each in on_all.items()):
            on_all["floor-order"] = self._compare("torch", "torch-order", codes=self.quantizers)
        for table, half in (
            (few, self._engine_graphs()),
            (on_all, [kind for kind in on_all if kind.endswith(".plan")]),
        ):
            if any(kind in table for kind in half):
                table["floor-half"] = self._compare("torch", "torch-half")

    def _engine_graphs(self) -> list[str]:
        """The kinds that engines with quantisers are built from."""
        return [kind for kind in self.files.paths if kind.startswith("trt-") and not kind.endswith(".plan")]

    def _compare(self, reference: str, candidate: str, **layers: Iterable[str]) -> Comparison:
        return compare(reference, candidate, classifies=self.classifies, **layers)

    def _member(self, kind: str, make: Callable[[], Member]) -> bool:
        """Add a member, if it can run here, and computes what has the right shapes."""
        if kind in self.files.broken and kind.endswith(".plan"):
            self.skipped[kind] = self.files.broken[kind]
            return False
        try:
            member = make()
            if not kind.endswith(".plan"):  # which knows its shapes, and takes the batches that it was built for
                check_shapes(member, self.members["torch"], self.one)
        except GplqError as error:
            self.skipped[kind] = error
            return False
        self.members[kind] = member
        self.files_run.add(kind)
        return True

    @cached_property
    def one(self) -> Tensor:
        """An image, [1, C, H, W]."""
        inputs, _ = next(self.few.batches(1))
        return inputs

    def _graph(self, kind: str) -> ir.Model:
        return read_onnx(self.files.paths[kind])

    def _whole(self, kind: str, runtime: Runtime) -> Member:
        """A file as it will run."""
        return array_member(runtime(self.files.paths[kind].read_bytes()), INPUT)

    def _reference(self) -> Member:
        """The INT4 file with its codes as outputs; as nothing is optimised, that changes nothing."""
        return self._marked("int4", onnxruntime_reference)

    def _marked(self, kind: str, runtime: Runtime) -> Member:
        """A file with its codes as further outputs."""
        graph = self._graph(kind)
        check_graph(graph, self.checkpoint.model)
        taps = find_taps(graph, frozen_quantizers(self.checkpoint.model))
        outputs = [str(value.name) for value in graph.graph.outputs]
        part = Part(graph, [INPUT], [*outputs, *(tap.tensor for tap in taps.values())], runtime)

        def run(inputs: Tensor) -> Seen:
            answers = part.run({INPUT: inputs.numpy()})
            codes = {name: tap.codes(answers) for name, tap in taps.items()}
            return Seen([torch.from_numpy(answers[name]) for name in outputs], codes)

        return run

    # Running it.

    @cached_property
    def state(self) -> StateFile | None:
        """Where the stream over all images is written down."""
        if self.settings.state is None:
            return None
        identity = {
            "checkpoint": self.checkpoint.sha256,
            "files": {kind: path.stat().st_size for kind, path in self.files.paths.items()},
            "hashes": [gate.sentence for gate in self.judge.gates],
            "images": [self.source.fingerprint(), self.source.count],
            "comparisons": sorted(self.on_all),
            "versions": environment()["versions"],
        }
        fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return StateFile(self.settings.state, fingerprint, self.say)

    @cached_property
    def batch_size(self) -> int:
        """Images at once."""
        if self.settings.batch_size is not None:
            return self.settings.batch_size
        with torch.inference_mode():
            one = Capture(self.checkpoint.model, self.one).nbytes
        return min(max(_CAPTURED // one, 1), _LARGEST_BATCH)

    def _stream(self) -> None:
        few, whole, on_all = self.few, self.source, self.on_all
        self._run(self.on_few, few, "twins and layers")
        for name in {name for each in self.on_few.values() for name in each.members}:
            if not any(name in each.members for each in on_all.values()):
                del self.members[name]
        if on_all:
            self._run(on_all, whole, f"the chain, {len(on_all)} comparisons", self.state)
        self.members.clear()  # sessions and engines: what follows needs the memory

    def _run(
        self, comparisons: dict[str, Comparison], source: Source, what: str, state: StateFile | None = None
    ) -> None:
        size = self.batch_size
        self.skipped |= stream(
            self.members,
            comparisons,
            lambda start: source.batches(size, start),
            source.count,
            what,
            state,
            may_fail=self.files_run,
        )

    # Pairs and their gates.

    def _pair(
        self, name: str, reference: str, candidate: str, file: str | None, floor: str | None = None,
        floor_is: str | None = None, layers: list[Layer] | None = None, **more: Any,
    ) -> Pair | None:  # fmt: skip
        """A pair that was compared under its name; one that was skipped is noted, and None returned."""
        found = self._found(name)
        base = {"name": name, "reference": reference, "candidate": candidate, "file": file}
        if found is None:
            reason = self.skipped.get(name) or self.skipped.get(f"{name}-marked", "not part of this export")
            self.pairs.append(Pair(**base, skipped=str(reason)))
            # What is missing on this machine proves nothing. What can run nowhere is wrong.
            wrong = isinstance(reason, GplqError) and not isinstance(reason, MissingError)
            self.judge.add(name, "compared", "failed" if wrong else "skipped", str(reason))
            return None
        outputs = found.outputs
        label, reference_said, candidate_said = (outputs.column(c) for c in ("label", "reference", "candidate"))
        lost, won = 0, 0
        if self.source.labelled and self.classifies:
            before, after = reference_said == label, candidate_said == label
            lost, won = int((before & ~after).sum()), int((~before & after).sum())
        whole = name in self.on_all
        source = self.source if whole else self.few
        pair = Pair(
            **base,
            skipped=None,
            found=outputs.closeness(),
            floor=None if floor is None else (self.on_all if whole else self.on_few)[floor].outputs.closeness(),
            floor_is=floor_is,
            reference_top=self._top(name, "reference"),
            candidate_top=self._top(name, "candidate"),
            lost=lost,
            won=won,
            flips=self._flips(source, label, reference_said, candidate_said),
            layers=layers or [],
            scatter=[(float(a), float(b)) for a, b in np.concatenate(outputs.scatter)],
            **more,
        )
        self.pairs.append(pair)
        return pair

    def _found(self, name: str) -> Comparison | None:
        return self.on_all.get(name) or self.on_few.get(name)

    def _top(self, name: str, side: Literal["reference", "candidate"]) -> Top | None:
        found = self._found(name)
        return None if found is None else found.outputs.top(side, self.checkpoint.spec.num_classes)

    def _flips(self, source: Source, label: np.ndarray, reference: np.ndarray, candidate: np.ndarray) -> list[Flip]:
        if not self.classifies:
            return []
        names = self.checkpoint.label_names

        def word(number: int) -> str:
            return names[number] if names is not None and number < len(names) else str(number)

        return [
            Flip(
                image=source.name(index),
                label=word(int(label[index])) if label[index] >= 0 else None,
                reference=word(int(reference[index])),
                candidate=word(int(candidate[index])),
                picture=source.picture(index) if number < _PICTURES else None,
            )
            for number, index in enumerate(np.flatnonzero(reference != candidate)[:_FLIPS].tolist())
        ]

    def _float(self) -> None:
        self.skipped.setdefault("float", "the float model was not found: name it with --float")
        model = self.settings.float_model
        pair = self._pair("float", f"the float model {model.source if model else ''}", _CHECKPOINT, None)
        judge_closeness(self.judge, self.checkpoint, None if self.settings.random else pair)
        if pair is not None:
            self.judge.accuracy(pair, "top1_drop")

    def _rounding(self) -> None:
        layers = self.on_few["rounding"].units.layers()
        pair = self._pair("rounding", _OFF, _CHECKPOINT, None, layers=layers)
        assert pair is not None
        self.judge.free(pair.model_copy(update={"layers": []}))

    def _twin(self, kind: str) -> None:
        if kind not in self.files.paths:
            return
        name, mode = f"twin-{kind}", _TWINS[kind]
        floor = "floor-off-order" if kind == "fp32" else "floor-off-half"
        self.skipped.setdefault(name, self.skipped.get(kind, ""))
        floor_is = f"{mode.words}, quantisers off"
        file = self.files.paths[kind].name
        pair = self._pair(name, _OFF, f"{file}, {_OPTIMISED}", file, floor, floor_is)
        if pair is not None:
            self.judge.free(pair)

    def _int4(self) -> None:
        if "int4" in self.files.paths:
            ran = "int4" in self.on_all
            layers = self._layers(self.on_all["int4"], self.on_all["floor-order"]) if ran else None
            self._quantised("int4", _REFERENCE, layers)

    def _optimised(self, name: str, back: Back) -> None:
        if back.file not in self.files.paths:
            return
        marked, debug = (self.on_few.get(f"{name}-{what}") for what in ("marked", "debug"))
        if name not in self.on_all or marked is None or debug is None:
            self.on_all.pop(name, None)  # one of its builds did not run
            self._quantised(name, back, None)
        else:
            self._quantised(name, back, self._layers(marked, self.on_few["floor-order"]), _debug(debug))

    def _quantised(self, name: str, back: Back, layers: list[Layer] | None, debug: str | None = None) -> None:
        """A file that computes in FP32 between its codes, fed by PyTorch and on its own."""
        file = self.files.paths[back.file].name
        words, order = f"{file}, {back.words}", AnotherSummationOrder.words
        forced = None
        try:
            forced = self._forced(name, back) if name in self.on_all else None
        except (UsageError, BuildError) as error:  # it runs as a whole, and not in the parts that are fed
            self.skipped[name] = error
            del self.on_all[name]
        pair = self._pair(name, _CHECKPOINT, words, file, "floor-order", order, layers, forced=forced, debug=debug)
        if pair is None:
            return
        assert pair.forced is not None
        self.judge.forced(pair, pair.forced)
        self.judge.free(pair)
        self.judge.accuracy(pair, "back_end_drop")

    def _engine_graph(self, kind: str) -> None:
        """What an engine is asked to compute, on any machine; whether it does is for the plan to show."""
        file = self.files.paths[kind].name
        pair = self._pair(kind, _CHECKPOINT, f"{file}, {_ORT}", file, "floor-half", HalfPrecision.words)
        if pair is not None:
            self.judge.free(pair)

    def _plans(self, *, twin: bool) -> None:
        for kind in [kind for kind in self.files.paths if kind.endswith(".plan") and (kind == "fp16.plan") == twin]:
            file = self.files.paths[kind].name
            floor = "floor-off-half" if twin else "floor-half"
            floor_is = HalfPrecision.words + (", quantisers off" if twin else "")
            pair = self._pair(kind, _OFF if twin else _CHECKPOINT, f"{file}, TensorRT", file, floor, floor_is)
            if pair is not None:
                self.judge.free(pair)
                if not twin:
                    self.judge.accuracy(pair, "back_end_drop")

    def _served(self) -> None:
        if self.settings.served is None:
            return
        name, words = self.settings.served[0], AnotherSummationOrder.words
        pair = self._pair("served", _CHECKPOINT, name, None, "floor-order", words)
        if pair is not None:
            self.judge.free(pair)
            self.judge.accuracy(pair, "back_end_drop")

    def _forced(self, name: str, back: Back) -> Any:
        thresholds = self.settings.thresholds
        return compare_forced(
            self.checkpoint.model,
            self._graph(back.file),
            (inputs for inputs, _ in self.few.batches(self.batch_size)),
            self.few.count,
            self.files.paths[back.file].name,
            block_limit=thresholds[thresholds.of("forced_blocks", name)],
            runtime=back.runtime,
            ties=back.ties,
            whole_blocks=back.whole_blocks,
        )

    def _layers(self, found: Comparison, floor: Comparison) -> list[Layer]:
        def layer(name: str) -> Layer:
            share, band = found.codes.share(name), floor.codes.share(name)
            return found.codes.layer(name, "quantizer", band, self.judge.inside(share, band))

        return [layer(name) for name in self.quantizers]


def _debug(comparison: Comparison) -> str:
    """What the build with marked tensors has to do with the one that is tested."""
    closeness = comparison.outputs.closeness()
    if closeness.max_difference == 0:
        return f"marking tensors changed no output of {closeness.n} images"
    return (
        f"marking tensors changes what is merged, and outputs by up to {closeness.max_difference:.2g}: layers are of a "
        "build of their own, outputs of the tested one"
    )
