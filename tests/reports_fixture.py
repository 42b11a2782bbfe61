"""A report with everything that a report can hold, for whoever renders, compares or reads one."""

import base64
import io
import math
from typing import Any

import numpy as np
from PIL import Image

from gplq_export.check.report import (
    Closeness,
    Data,
    Estimate,
    File,
    Flip,
    Forced,
    Gate,
    Latency,
    Layer,
    Pair,
    Report,
    Subject,
    Top,
)

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def make_report(*, layers: int = 40, pairs: int = 3, flips: int = 12, **changes: Any) -> Report:
    """A check of a ViT that failed in two gates: ``pairs`` compared pairs and one that was skipped.

    ``changes`` replace whole fields of the report.
    """
    random = np.random.default_rng(0)
    compared = [make_pair(f"pair-{index}", random, layers, flips) for index in range(pairs)]
    skipped = Pair(
        name="trt-int4.plan",
        reference="model.trt-int4.onnx in ONNX Runtime",
        candidate="model.trt-int4.plan in TensorRT",
        file="model.trt-int4.plan",
        skipped="no NVIDIA GPU on this machine",
    )
    fields: dict[str, Any] = {
        "tool_version": "0.1.0",
        "created_utc": "2026-11-21T12:00:00+00:00",
        "command": ["gplq-export", "check", "dist", "--data", "my images/val"],
        "seconds": 93.5,
        "python": "3.11.9",
        "platform": "Linux-6.1-x86_64",
        "versions": {"torch": "2.15.0", "onnxruntime": "1.31.1"},
        "subject": Subject(
            architecture="vit_small_patch14_dinov2.lvd142m",
            checkpoint="model.pt",
            checkpoint_sha256="c" * 64,
            recipe={"weight_bits": 4, "activation_bits": 4},
            files={"model.int4.onnx": File(bytes=14_300_000, sha256="a" * 64)},
            chain=["weights 1111", "model.pt cccc from 1111", "model.int4.onnx aaaa from cccc"],
            bytes={"weight codes, 4 bits": 10_600_000, "biases, norms, embeddings": 2_900_000, "graph": 800_000},
            precision={"model.trt-int4.plan": "72 linears INT8, 12 attentions INT8, weights stored in INT4"},
            floats={"blocks.0.norm1": "norms are cheap and need the range"},
        ),
        "data": Data(
            source="my images/val",
            sha256="d" * 64,
            images=1000,
            labels=True,
            random=False,
            transform=["resize to 80, bicubic", "crop 70", "subtract mean 0.5, divide by 0.25"],
        ),
        "thresholds_version": "1",
        "gates": make_gates(),
        "pairs": [*compared, skipped],
        "latency": make_latency(),
        "latency_machine": {"cpu": "Some CPU", "cpus": 2, "governor": None},
    }
    return Report(**{**fields, **changes})


HOSTILE = (
    "</td></script><script>alert(1)</script><img src=http://evil.example/x.png onerror=alert(1)>\"'&amp;]]>-->{{7*7}}"
    "\n| `x` ``y`` ![x](http://evil.example/x.png) [x](http://evil.example) <b> *x* @everyone #1"
    "\x00\x1b[2J\x85\ufffe\u202e"
)


def make_hostile(report: Report) -> Report:
    """The same report with :data:`HOSTILE` in every text that comes from files, models or people."""
    fixed = {"schema_version", "tool", "created_utc", "status", "kind", "picture"}
    parts = (Report, Subject, Data, File, Gate, Pair, Closeness, Estimate, Top, Flip, Layer, Forced, Latency)
    names = {name for part in parts for name in part.model_fields}

    def spoil(value: Any) -> Any:
        if isinstance(value, str):
            return value if value in ("export", "latency") else value + HOSTILE
        if isinstance(value, dict):
            return {
                key if key in names else spoil(key): content if key in fixed else spoil(content)
                for key, content in value.items()
            }
        if isinstance(value, list | tuple):
            return [spoil(content) for content in value]
        return value

    return Report.model_validate(spoil(report.model_dump()))


def without_labels(report: Report) -> Report:
    """The same check of a backbone without a classifier, on images without labels."""
    pairs = []
    for pair in report.pairs:
        near = pair.found and pair.found.model_copy(update={"agreement": None, "kl": None})
        nothing = {"reference_top": None, "candidate_top": None, "lost": 0, "won": 0, "flips": []}
        pairs.append(pair.model_copy(update={**nothing, "found": near, "floor": near}))
    return report.model_copy(update={"pairs": pairs, "data": report.data.model_copy(update={"labels": False})})


def make_gates() -> list[Gate]:
    """Of every status one at least; the failed ones in the order in which a fault travels."""

    def gate(name: str, status: Any, sentence: str, **changes: Any) -> Gate:
        pair, metric = name.split(".", 1)
        fields = {"layer": None, "found": 99.9, "low": 99.5, "high": 100.0, "limit": 99.0, "unit": "%", "n": 1000}
        why = "The floor is 99.6 %; twice its distance."
        return Gate(id=name, pair=pair, metric=metric, status=status, sentence=sentence, why=why, **fields | changes)

    return [
        gate("export.hashes", "passed", "All files are those of the manifest.", found=None, low=None, high=None),
        gate("pair-0.forced.codes", "failed", "3 codes differ in blocks.3.attn.qkv.", layer="blocks.3.attn.qkv"),
        gate("pair-0.agreement", "passed", "99.9 % of the labels are the same."),
        gate("pair-1.agreement", "failed", "It is no number.", found=math.nan, low=math.nan, high=math.nan),
        gate("pair-2.top1", "reported", "n < 500: reported, not judged.", found=math.inf, high=math.inf, limit=None),
        gate("trt-int4.plan.agreement", "skipped", "no NVIDIA GPU on this machine", found=None, low=None, high=None),
        gate("latency.regression", "passed", "No slower than the baseline.", unit="x"),
    ]


def make_pair(name: str, random: np.random.Generator, layers: int = 40, flips: int = 12) -> Pair:
    """A compared pair, with what is not finite here and there."""
    near = Closeness(
        n=1000,
        agreement=Estimate(value=98.8, low=98.0, high=99.3, n=1000),
        cosine=Estimate(value=0.99991, low=0.9999, high=0.99992, n=1000),
        cosine_p01=Estimate(value=0.9991, low=0.9989, high=0.9993, n=1000),
        sqnr_db=31.4,
        kl=Estimate(value=0.0004, low=0.0003, high=0.0005, n=1000),
        max_difference=0.31,
    )
    top1 = Estimate(value=91.2, low=89.3, high=92.8, n=1000)
    outputs = random.normal(size=400)
    pairs = zip(outputs, outputs + random.normal(size=400) / 20, strict=True)
    return Pair(
        name=name,
        reference="PyTorch fake-quant, FP32",
        candidate="model.int4.onnx in ONNX Runtime",
        file="model.int4.onnx",
        skipped=None,
        found=near,
        floor=near,
        floor_is="PyTorch, sums in another order",
        reference_top=Top(top1=top1, top5=None),
        candidate_top=Top(top1=top1, top5=None),
        lost=2,
        won=1,
        flips=[make_flip(index, random) for index in range(flips)],
        layers=[make_layer(index, random) for index in range(layers)],
        forced=Forced(
            images=256,
            quantizers=[make_layer(index, random).model_copy(update={"different": 0}) for index in range(layers)],
            grid={"blocks.0.attn.qkv.input_quantizer": 0, "blocks.1.mlp.fc1.input_quantizer": 2},
            linears={"blocks.0.attn.qkv": 1e-7, "blocks.1.mlp.fc1": math.nan},
            floats={},
            outputs={"logits": 2e-6},
            blocks=[make_layer(index, random) for index in range(2)],
        ),
        scatter=[*((float(a), float(b)) for a, b in pairs), (math.nan, 1.0), (math.inf, 2.0)],
    )


def make_layer(index: int, random: np.random.Generator) -> Layer:
    """The deeper, the worse; the last of every ten leaves its band, every seventh is no number or infinite."""
    part = ["attn.qkv.input_quantizer", "attn.proj.input_quantizer", "mlp.fc1.input_quantizer", "mlp"][index % 4]
    block = part == "mlp"
    different = 0 if index < 2 or block else int(10 * 1.2**index)
    total = 0 if block else 50_176_000
    share = 100 * different / max(total, 1)
    sqnr = 45 - index * 0.6 + float(random.normal())
    return Layer(
        name=f"blocks.{index // 4}.{part}",
        kind="block" if block else "quantizer",
        total=total,
        different=different,
        steps=(different, 0, 0),
        max_step=min(different, 1),
        sqnr_db=(None, math.nan, math.inf, sqnr, sqnr, sqnr, sqnr)[index % 7] if index % 14 < 7 else sqnr,
        share=None if block else Estimate(value=share, low=share * 0.8, high=share * 1.2, n=1000),
        floor=None if block else Estimate(value=share * 0.9, low=share * 0.7, high=share * 1.1, n=1000),
        inside=index % 10 != 9,
    )


def make_flip(index: int, random: np.random.Generator) -> Flip:
    """An image that changed its label; the first twenty have a picture."""
    reference, candidate = CLASSES[index % 2], CLASSES[2 + index % 3]
    return Flip(
        image=f"val/{reference}/{index:05}.png",
        label=(reference, candidate, CLASSES[9], None)[index % 4],
        reference=reference,
        candidate=candidate,
        picture=make_picture(random) if index < 20 else None,
    )


def make_picture(random: np.random.Generator) -> str:
    """PNG in base64, 32 x 32 pixels of smooth noise."""
    small = Image.fromarray(random.integers(0, 255, (4, 4, 3)).astype(np.uint8))
    content = io.BytesIO()
    small.resize((32, 32), Image.Resampling.BICUBIC).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def make_latency() -> list[Latency]:
    """Two sizes of batch, an engine and its twin."""

    def times(name: str, batch: int, median: float, ratio: float | None, verdict: str) -> Latency:
        return Latency(
            name=name,
            baseline="fp32",
            batch=batch,
            median_ms=median,
            p95_ms=median * 1.1,
            p99_ms=median * 1.3,
            quantiles_ms=[median * (0.95 + 0.35 * (at / 20) ** 6) for at in range(21)],
            verdict=verdict,
            ratio=ratio,
            spread=None if ratio is None else 0.01,
        )

    return [
        row
        for batch in (1, 8)
        for row in (
            times("fp32", batch, 20.0 * batch, None, "baseline"),
            times("cpu", batch, 11.0 * batch, 0.55, "faster"),
            times("int4", batch, 20.1 * batch, 1.005, "no measurable difference"),
        )
    ]
