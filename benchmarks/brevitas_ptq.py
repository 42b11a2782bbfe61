r"""Brevitas' W4A4 without training on the same model and images as ours, as dated JSON: what a peer's recipe reaches.

    python benchmarks/brevitas_ptq.py dinov2_fashion70.safetensors --arch vit_small_patch14_dinov2 \
        --model-arg img_size=70 --data fashion_mnist.npz --images 2000 --name dinov2-70px
    python benchmarks/brevitas_ptq.py dinov2_clipart224.safetensors --arch vit_small_patch14_dinov2 \
        --model-arg img_size=224 --data clipart-train.tar --test-data clipart-val.tar --name dinov2-224px --products

Needs ``pip install brevitas`` (0.13), best in an environment of its own: it has bounds on torch that we do not have.
The recipe is made of Brevitas' own parts, in the order of its ImageNet example: equalisation of activations before each
linear (SmoothQuant; a multiplication at run time), unsigned activations with a zero point, ranges by percentiles,
weight ranges by squared error for each output channel, GPTQ on quantised inputs block by block, as its example of
language models does it, corrected biases. Patch embedding and classifier have 8 bits. ``--products`` also quantises q,
k, v and the softmax, by its QuantScaledDotProductAttention; without, these products stay in float.

Calibrated on training images; measured on the test images against the float model as ``accuracy.py`` does it. With
``--select`` it measures training images that it was not calibrated on: that is for choosing settings. Every command
adds one row to the file, named after its settings.
"""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import brevitas.nn as qnn
import torch
from accuracy import compare, model_arguments
from brevitas.core.scaling.standalone import ParameterFromStatsFromParameterScaling
from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
from brevitas.graph.equalize import activation_equalization_mode
from brevitas.graph.gpfq import gpfq_mode
from brevitas.graph.gptq import gptq_mode
from brevitas.graph.qronos import Qronos
from brevitas.graph.quantize import layerwise_quantize
from brevitas.quant.scaled_int import (
    Int8ActPerTensorFloat,
    Int8ActPerTensorFloatMSE,
    Int8WeightPerChannelFloat,
    Int8WeightPerChannelFloatMSE,
    Uint8ActPerTensorFloat,
    Uint8ActPerTensorFloatMSE,
)
from brevitas.quant.shifted_scaled_int import ShiftedUint8ActPerTensorFloat, ShiftedUint8ActPerTensorFloatMSE
from torch import Tensor, nn

from gplq import load_model
from gplq.data import ImageSet, batches, draw, open_images
from gplq.evaluate import Accuracy, Similarity
from gplq.files import write_json
from gplq.labels import check_labels
from gplq.pca import Features
from gplq.progress import progress
from gplq.provenance import environment

BATCH = 32
FIRST_LAST_BITS, FIRST_LAST_PERCENTILE = 8, 99.999  # the percentile is Brevitas' default

# By --range and --grid. The grid of the softmax is unsigned without a zero point, as in Brevitas' own attention.
ACTIVATIONS = {
    ("percentile", "asymmetric"): ShiftedUint8ActPerTensorFloat,
    ("percentile", "symmetric"): Int8ActPerTensorFloat,
    ("mse", "asymmetric"): ShiftedUint8ActPerTensorFloatMSE,
    ("mse", "symmetric"): Int8ActPerTensorFloatMSE,
}
PROBABILITIES = {"percentile": Uint8ActPerTensorFloat, "mse": Uint8ActPerTensorFloatMSE}
WEIGHTS = {"minmax": Int8WeightPerChannelFloat, "mse": Int8WeightPerChannelFloatMSE}


class QuantizedAttention(nn.Module):
    """timm's attention with Brevitas' quantised product of q, k, v and softmax in place of the fused one."""

    def __init__(self, attention: Any, products: qnn.QuantScaledDotProductAttention) -> None:
        super().__init__()
        if attention.gate is not None:
            raise ValueError("a gated attention is not handled")
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.qkv, self.q_norm, self.k_norm = attention.qkv, attention.q_norm, attention.k_norm
        self.products, self.norm, self.proj = products, attention.norm, attention.proj

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.products(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj(self.norm(x.transpose(1, 2).reshape(batch, tokens, -1)))


def activation(kind: type[Any], bits: int, percentile: float) -> type[Any]:
    """One of Brevitas' quantisers with so many bits; ranges by squared error have no percentile."""
    if "MSE" in kind.__name__:
        return kind.let(bit_width=bits)
    both = {"low_percentile_q": 100 - percentile} if "Shifted" in kind.__name__ else {}
    return kind.let(bit_width=bits, high_percentile_q=percentile, **both)


def insert_quantizers(model: nn.Module, settings: argparse.Namespace) -> None:
    """Replace every linear, the patch embedding and, if wanted, the attentions. In place."""

    def replace(bits: int, inputs: type[Any], kept: Sequence[str]) -> None:
        weights = WEIGHTS[settings.weight_range].let(
            bit_width=bits, narrow_range=False, scaling_impl=ParameterFromStatsFromParameterScaling
        )
        common = {
            "weight_quant": weights,
            "input_quant": inputs,
            "bias_quant": None,
            "return_quant_tensor": False,
            "dtype": torch.float32,
            "device": "cpu",
        }
        layers = {nn.Linear: (qnn.QuantLinear, common), nn.Conv2d: (qnn.QuantConv2d, common)}
        layerwise_quantize(model, layers, name_blacklist=list(kept))

    inputs = ACTIVATIONS[settings.range, settings.grid]
    replace(4, activation(inputs, 4, settings.percentile), first_and_last(model))
    shifted = ACTIVATIONS["percentile", "asymmetric"]
    replace(FIRST_LAST_BITS, activation(shifted, FIRST_LAST_BITS, FIRST_LAST_PERCENTILE), ())
    if settings.products:
        operand = activation(ACTIVATIONS[settings.range, settings.product_grid], 4, settings.percentile)
        softmax = activation(PROBABILITIES[settings.range], settings.softmax_bits, settings.softmax_percentile)
        for block in model.blocks:
            products = qnn.QuantScaledDotProductAttention(
                q_scaled_quant=operand,
                k_transposed_quant=operand,
                v_quant=operand,
                attn_output_weights_quant=softmax,
            )
            block.attn = QuantizedAttention(block.attn, products)


def first_and_last(model: Any) -> tuple[str, str]:
    """Names of the layers with 8 bits."""
    return "patch_embed.proj", model.pretrained_cfg["classifier"]


def quantize(model: nn.Module, inputs: Sequence[Tensor], settings: argparse.Namespace) -> nn.Module:
    """Brevitas' parts one after the other, on batches of calibration images. In place."""
    with activation_equalization_mode(
        model, alpha=settings.alpha, layerwise=True, enabled=settings.alpha >= 0, blacklist_layers=first_and_last(model)
    ):
        run(model, inputs)
    insert_quantizers(model, settings)
    model.eval()
    model(inputs[0])  # initialises the scales
    with calibration_mode(model):
        run(model, inputs)
    few = inputs[: max(1, settings.rounding_images // BATCH)]
    if settings.rounding == "gptq":
        gptq_by_block(model, few, settings.act_order)
    elif settings.rounding == "qronos":
        with gpfq_mode(model, act_order=settings.act_order, algorithm_impl=Qronos) as algorithm:
            for _ in range(algorithm.num_layers):
                run(algorithm.model, few)
                algorithm.update()
    if settings.bias_correction:
        with bias_correction_mode(model):
            run(model, inputs)
    return model


def gptq_by_block(model: Any, inputs: Sequence[Tensor], act_order: bool) -> None:
    """Each block's linears one after the other, on what the quantised network before them gives."""
    with progress(len(model.blocks), "GPTQ", "block") as bar:
        hidden = []
        handle = model.blocks[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        run(model, inputs)
        handle.remove()
        for block in model.blocks:
            with gptq_mode(block, use_quant_activations=True, act_order=act_order, create_weight_orig=False) as gptq:
                for _ in range(gptq.num_layers):
                    run(gptq.model, hidden)
                    gptq.update()
            hidden = [block(tokens) for tokens in hidden]
            bar.update(1)


def run(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Forward passes for what hooks see."""
    for batch in inputs:
        model(batch)


def outputs_of(model: nn.Module, images: ImageSet, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, classes], penultimate features [n, D] and labels [n]."""
    found = []
    with Features(model) as features, progress(len(indices), "measuring", "image") as bar:
        for inputs, labels in batches(images, BATCH, indices):
            logits = model(inputs)
            found.append((logits, features.value.clone(), labels))
            bar.update(len(labels))
    logits, vectors, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logits, vectors, labels


def main() -> None:
    """Quantise once, measure, add a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--arch")
    parser.add_argument("--model-arg", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--data", required=True, help="training images, and test images unless --test-data")
    parser.add_argument("--test-data")
    parser.add_argument("--images", type=int, help="measure on so many test images, evenly spread (default: all)")
    parser.add_argument("--select", action="store_true", help="measure on training images that calibrated nothing")
    parser.add_argument("--calibration-images", type=int, default=256)
    parser.add_argument("--rounding-images", type=int, default=256, help="of these, so many for the rounding")
    parser.add_argument("--products", action="store_true", help="quantise q, k, v and softmax too")
    parser.add_argument("--product-grid", choices=["symmetric", "asymmetric"], default="asymmetric")
    parser.add_argument("--softmax-bits", type=int, default=7, help="unsigned; 7 as in our recipes")
    parser.add_argument("--softmax-percentile", type=float, default=100.0)
    parser.add_argument("--alpha", type=float, default=0.85, help="of the equalisation; negative: none")
    parser.add_argument("--range", choices=["percentile", "mse"], default="percentile")
    parser.add_argument("--grid", choices=["symmetric", "asymmetric"], default="asymmetric")
    parser.add_argument("--percentile", type=float, default=99.9)
    parser.add_argument("--weight-range", choices=sorted(WEIGHTS), default="mse")
    parser.add_argument("--rounding", choices=["gptq", "qronos", "nearest"], default="gptq")
    parser.add_argument("--act-order", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bias-correction", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration images")
    parser.add_argument("--name", required=True, help="of the result: DATE-brevitas-NAME.json")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    source = load_model(arguments.model, arch=arguments.arch, model_args=model_arguments(arguments.model_arg))
    train = open_images(arguments.data, "train", source.preprocessing)
    order = draw(len(train), len(train), arguments.seed)
    used = order[: arguments.calibration_images]
    if arguments.select:
        measured, indices = train, order[arguments.calibration_images :][: arguments.images]
    else:
        test = open_images(arguments.test_data or arguments.data, "test", source.preprocessing)
        measured = test.head(arguments.images)
        indices = list(range(len(measured)))
    for split in (train, measured):
        check_labels(split, source.spec.num_classes, source.label_names)

    left_out = {"model", "arch", "model_arg", "data", "test_data", "images", "name", "out"}
    settings = {key: value for key, value in vars(arguments).items() if key not in left_out}
    with torch.no_grad():
        reference, targets, labels = outputs_of(source.model, measured, indices)
        fp32 = Accuracy(int((reference.argmax(1) == labels).sum()), len(labels))
        print(f"FP32 {fp32}  (n = {fp32.n})", flush=True)
        begin = time.monotonic()
        torch.manual_seed(arguments.seed)
        inputs = [batch for batch, _ in batches(train, BATCH, used)]
        model = quantize(copy.deepcopy(source.model), inputs, arguments)
        seconds = time.monotonic() - begin
        logits, vectors, _ = outputs_of(model, measured, indices)
    cosines = torch.cosine_similarity(vectors.double(), targets.double())
    row = {
        "settings": settings,
        "seconds": round(seconds, 1),
        **compare((logits, vectors), (reference, targets), labels),
        "features": Similarity.of(len(cosines), float(cosines.sum()), float(cosines.square().sum())).to_dict(),
    }
    path = arguments.out / f"{datetime.now(UTC):%Y-%m-%d}-brevitas-{arguments.name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    defaults = {key: parser.get_default(key) for key in settings}
    name = " ".join(f"{key}={value}" for key, value in settings.items() if value != defaults[key]) or "defaults"
    rows[name] = row
    head: dict[str, Any] = {**environment(), "fp32": fp32.to_dict(), "threads": torch.get_num_threads()}
    head["versions"]["brevitas"] = version("brevitas")
    head |= {"source_sha256": source.sha256, "images": measured.to_dict(), "calibration": train.to_dict()}
    write_json(path, {"schema_version": "1.0", **head, "rows": rows})
    shown = ("top1", "minus_fp32", "kl", "kl_standard_error", "features", "seconds")
    print(f"{name}: " + json.dumps({key: row[key] for key in shown}), flush=True)


if __name__ == "__main__":
    main()
