"""``model.pt``: a quantised model as one file that loads without running code.

It is written by ``torch.save`` and holds a dict of plain data and tensors only, so that ``torch.load`` reads it with
``weights_only=True``:

    schema, schema_version    "gplq.checkpoint", [major, minor]; a newer major is refused
    model                     architecture, model_args, num_classes: what timm.create_model takes
    preprocessing             input_size, interpolation, crop_pct, crop_mode, mean, std
    label_names               list of str, or None
    recipe                    every setting (gplq.recipe)
    provenance                hashes of the inputs, seeds, versions of the tools, measured accuracies
    quantizers                name -> {scale [], pre_scale [C] or None, pre_shift [] or None, bits, signed}
    linears                   name -> {codes uint8 (4-bit: two a byte), shape, scale [N], bias [N] or None, bits}
    floats                    name -> tensor: norms, embeddings and whatever else is not quantised
    compensated               names of the blocks with a compensation, whose tensors are FP16 (absent before 1.1)

Loading rebuilds the architecture with timm, after checking that its size is that of the file's tensors.
"""

import copy
import io
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gplq.compensate import CHILD, attach_compensation, compensations, has_width
from gplq.convert import convert, quant_layers, structure_of, units
from gplq.errors import CheckpointError, ModelError, UsageError
from gplq.files import atomic_path, sha256
from gplq.grid import pack_codes, unpack_codes
from gplq.integer import FrozenQuantizer, IntegerLinear, integer_layer
from gplq.lsq import ActivationQuantizer
from gplq.models import BACKBONE_ARGS, ModelSpec
from gplq.preprocessing import Preprocessing
from gplq.recipe import Recipe

SCHEMA = "gplq.checkpoint"
SCHEMA_VERSION = (1, 1)
_FEW_BLOCKS = 100  # are built within a second
_LARGE = 700_000_000  # parameters, 2.8 GB: more than any network of several stages in timm has
_ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True)
class Checkpoint:
    """A quantised model with everything that belongs to it.

    Attributes:
        model: frozen, in evaluation mode; images [B, C, H, W] -> logits [B, classes], features [B, D] or a list of
            feature maps, as ``spec`` says.
        sha256: of the file that it was read from; empty before it is saved. ``path``: of that file.
    """

    model: nn.Module
    spec: ModelSpec
    preprocessing: Preprocessing
    label_names: list[str] | None
    recipe: Recipe
    provenance: dict[str, Any]
    sha256: str = ""
    path: Path | None = None

    @property
    def trusts_labels(self) -> bool:
        """Whether it was made with labels that the float model's answers spoke against, on purpose."""
        arguments = self.provenance.get("arguments")
        return isinstance(arguments, dict) and arguments.get("trust_labels") is True


def frozen_quantizers(model: nn.Module) -> dict[str, FrozenQuantizer]:
    """The quantisers of a frozen model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenQuantizer)}


def integer_linears(model: nn.Module) -> dict[str, IntegerLinear]:
    """The linears of a frozen model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, IntegerLinear)}


def at_image_size(checkpoint: Checkpoint, size: int) -> Checkpoint:
    """The same network for square images of another size, its position embeddings resampled by timm.

    ``size``: in pixels. Scales and codes stay as they are; how accurate that is, only a test can tell.

    Raises:
        UsageError: the architecture cannot take this size.
    """
    model = copy.deepcopy(checkpoint.model)
    shape = (checkpoint.preprocessing.input_size[0], size, size)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # timm's own, about how it interpolates
            set_input_size: Any = getattr(model, "set_input_size", None)
            if set_input_size is not None:
                set_input_size(img_size=(size, size))
            model(torch.zeros(1, *shape))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{checkpoint.spec.architecture} cannot take images of {size} x {size} pixels: {first_line}"
        ) from error
    structure_of(model).image_size = shape
    return replace(checkpoint, model=model, preprocessing=replace(checkpoint.preprocessing, input_size=shape))


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write ``path`` atomically.

    Raises:
        UsageError: the folder cannot be written to, or ``checkpoint.spec`` does not rebuild ``checkpoint.model``.
    """
    _check_rebuilds(checkpoint)
    quantizers, linears = frozen_quantizers(checkpoint.model), integer_linears(checkpoint.model)
    integer = tuple(f"{name}." for name in (*quantizers, *linears))
    compensated = list(compensations(checkpoint.model))
    content = {
        "schema": SCHEMA,
        "schema_version": list(SCHEMA_VERSION),
        "model": {
            "architecture": checkpoint.spec.architecture,
            "model_args": checkpoint.spec.model_args,
            "num_classes": checkpoint.spec.num_classes,
        },
        "preprocessing": checkpoint.preprocessing.to_dict(),
        "label_names": checkpoint.label_names,
        "recipe": checkpoint.recipe.to_dict(),
        "provenance": checkpoint.provenance,
        "quantizers": {
            name: {
                "scale": q.scale,
                "pre_scale": q.pre_scale,
                "pre_shift": q.pre_shift,
                "bits": q.bits,
                "signed": q.signed,
            }
            for name, q in quantizers.items()
        },
        "linears": {
            name: {
                "codes": pack_codes(linear.codes, linear.bits),
                "shape": list(linear.codes.shape),
                "scale": linear.weight_scale,
                "bias": linear.bias,
                "bits": linear.bits,
            }
            for name, linear in linears.items()
        },
        "floats": {
            # A compensation was rounded to FP16 when it was fitted.
            name: tensor.half() if name.startswith(_inside(compensated)) else tensor
            for name, tensor in checkpoint.model.state_dict().items()
            if not name.startswith(integer)
        },
        "compensated": compensated,
    }
    write_plain(content, path)


def _check_rebuilds(checkpoint: Checkpoint) -> None:
    """Refuse to write what could not be read: the file holds no code, so that timm must be able to build the model."""
    architecture = checkpoint.spec.architecture
    try:
        with torch.device("meta"):
            rebuilt = convert(checkpoint.spec.build(), checkpoint.recipe)
    except ModelError as error:
        problem = str(error).rstrip(".")
    else:
        found, expected = (
            {name: layer.weight_bits for name, layer in quant_layers(model)} for model in (checkpoint.model, rebuilt)
        )
        wrong = sorted(found.items() ^ expected.items())
        problem = f"the quantised layers are not those of {architecture}: {wrong[0][0]}" if wrong else ""
    if problem:
        raise UsageError(
            f"a checkpoint of this model could not be read again, as timm does not rebuild it from its spec: "
            f"{problem}. Of a model of one's own, quantise and save the part that timm made."
        )


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; its model's outputs are bit-identical to those before saving.

    Raises:
        CheckpointError: the file is missing, damaged, hostile, or from a newer version of gplq.
    """
    content = read_plain(path)
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} is not a gplq checkpoint. 'gplq quantize' writes them.")
    version = content.get("schema_version")
    if not isinstance(version, list) or len(version) != 2 or not isinstance(version[0], int):
        raise CheckpointError(f"{path} has no readable schema version: it is damaged.")
    if version[0] > SCHEMA_VERSION[0]:
        raise CheckpointError(
            f"{path} has schema version {version[0]}.{version[1]}, this gplq reads up to {SCHEMA_VERSION[0]}.x. "
            "Upgrade with: pip install --upgrade gplq"
        )
    try:
        return _rebuild(content, path)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, UsageError) as error:
        detail = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is damaged or was altered: {detail}. Quantise the model again.") from error


def load(path: str | Path) -> nn.Module:
    """The quantised model in a checkpoint: images, float32 [B, C, H, W] -> logits, float32 [B, classes], or features.

    Raises:
        CheckpointError: the file is missing, damaged, hostile, or from a newer version of gplq.
    """
    return load_checkpoint(Path(path)).model


def write_plain(content: dict[str, Any], path: Path) -> None:
    """``torch.save`` to ``path``, atomically.

    Raises:
        UsageError: the folder cannot be written to, or is full.
    """
    # Through memory: torch's own file writer reports a full disk as an internal error of its archive format.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_plain(path: Path) -> Any:
    """``torch.load`` of an untrusted file: plain data and tensors only, no more memory than the file is large.

    Raises:
        CheckpointError: the file is missing, damaged, or loading it would run code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. 'gplq quantize' writes checkpoints.")
    try:
        with path.open("rb") as file:
            if file.read(4) != _ZIP_MAGIC:
                raise CheckpointError(f"{path} is not a checkpoint: it is not a file that torch.save wrote.")
        with zipfile.ZipFile(path) as archive:
            # torch.save stores without compression, so that a file cannot unpack to more than its own size.
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise CheckpointError(f"{path} has compressed entries, which torch.save never writes: refused.")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (CheckpointError, KeyboardInterrupt):
        raise
    except Exception as error:  # zipfile, pickle and torch each raise types of their own for a bad file
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be loaded safely: {first_line} It is truncated, or would run code when loaded."
        ) from error


def _rebuild(content: dict[str, Any], path: Path) -> Checkpoint:
    recipe = Recipe.from_record(content["recipe"], source=f"the recipe in {path}")
    spec = ModelSpec(**content["model"])
    quantizers, linears, floats = content["quantizers"], content["linears"], content["floats"]
    compensated = list(content.get("compensated", []))
    _check_size(spec, linears, floats, compensated, path.stat().st_size)
    model = convert(spec.build(), recipe)
    for name, entry in quantizers.items():
        trained = model.get_submodule(name)
        if not isinstance(trained, ActivationQuantizer):
            raise TypeError(f"{spec.architecture} has no quantiser {name}")
        free = trained.signed is None or entry["pre_shift"] is not None
        if entry["bits"] not in trained.possible_bits() or not (free or trained.signed == entry["signed"]):
            raise ValueError(f"the bits of {name} are not those of the recipe")
        if entry["pre_scale"] is not None:
            _check(entry["pre_scale"], (entry["pre_scale"].numel(),), f"{name} (pre_scale)")
        if entry["pre_shift"] is not None:
            _check(entry["pre_shift"], (), f"{name} (pre_shift)")
        _check(entry["scale"], (), name)
        quantizer = FrozenQuantizer(
            entry["scale"], entry["pre_scale"], entry["bits"], bool(entry["signed"]), name, entry["pre_shift"]
        )
        model.set_submodule(name, quantizer)
    # Before any of them is replaced.
    bits = {f"{name}.{child}": layer.weight_bits for name, layer in quant_layers(model) for child in ("linear", *"qkv")}
    for name, entry in linears.items():
        shape = tuple(entry["shape"])
        linear = model.get_submodule(name)
        bias = entry["bias"]
        if not isinstance(linear, nn.Linear | nn.Conv2d) or shape != tuple(linear.weight.shape):
            raise ValueError(f"{spec.architecture} has no linear {name} of shape {list(shape)}")
        if entry["bits"] != bits.get(name):
            raise ValueError(f"the bits of {name} are not those of the recipe")
        if (bias is None) != (linear.bias is None) or (bias is not None and bias.shape != shape[:1]):
            raise ValueError(f"the bias of {name} does not fit")
        _check(entry["scale"], shape[:1], name)
        codes = unpack_codes(entry["codes"], entry["bits"], shape)
        model.set_submodule(name, integer_layer(linear, codes, entry["scale"], bias, entry["bits"], name))
    for name in compensated:
        _compensate(model, name, floats)
    # Whatever the architecture has and the file has not, or the other way round, shows up here.
    expected = {
        name for name in model.state_dict() if not name.startswith(tuple(f"{n}." for n in (*quantizers, *linears)))
    }
    if expected != floats.keys():
        raise ValueError(f"its tensors are not those of {spec.architecture}: {sorted(expected ^ floats.keys())[:3]}")
    model.load_state_dict(floats, strict=False)
    label_names = content["label_names"]
    preprocessing = Preprocessing.from_dict(content["preprocessing"])
    return Checkpoint(model.eval(), spec, preprocessing, label_names, recipe, content["provenance"], sha256(path), path)


def _inside(compensated: list[str]) -> tuple[str, ...]:
    """What the names of the tensors of compensations begin with."""
    return tuple(f"{name}.{CHILD}." for name in compensated)


def _compensate(model: nn.Module, name: str, floats: dict[str, Tensor]) -> None:
    weight, bias = floats[f"{name}.{CHILD}.weight"], floats[f"{name}.{CHILD}.bias"]
    block = dict(units(model)).get(name)
    if block is None or hasattr(block, CHILD):
        raise ValueError(f"'{name}' is no block that can be compensated")
    channels = len(bias)
    if weight.shape != (channels, channels) or bias.shape != (channels,) or not has_width(block, channels):
        raise ValueError(f"the compensation of {name} does not fit")
    if weight.dtype != torch.float16 or bias.dtype != torch.float16:
        raise ValueError(f"the compensation of {name} is not FP16")
    if not bool(weight.isfinite().all() and bias.isfinite().all()):
        raise ValueError(f"the compensation of {name} is not finite")
    attach_compensation(block, weight.float(), bias.float())


def _check_size(
    spec: ModelSpec, linears: dict[str, Any], floats: dict[str, Tensor], compensated: list[str], file_size: int
) -> None:
    """Refuse before allocating anything if the architecture named is not of the size of the file's tensors."""
    depth = [spec.model_args.get(key, 0) for key in ("depth", "depths", "stages")]
    # Building millions of blocks takes long on any device. (A backbone throws those away that no feature needs.)
    if sum(int(blocks) for blocks in tree_leaves(depth)) > max(len(linears), _FEW_BLOCKS):
        raise ValueError(f"a depth of {depth} for {len(linears)} linears")
    declared, built = _parameters(spec), 0
    if spec.model_args.get("features_only"):  # is built as a whole before timm throws parts of it away
        args = {key: value for key, value in spec.model_args.items() if key not in BACKBONE_ARGS}
        built = _parameters(ModelSpec(spec.architecture, args, 0))
    added = sum(tensor.numel() for name, tensor in floats.items() if name.startswith(_inside(compensated)))
    stored = sum(tensor.numel() for tensor in floats.values()) - added
    for entry in linears.values():
        bias = entry["bias"]
        stored += entry["codes"].numel() * (2 if entry["bits"] <= 4 else 1) + (0 if bias is None else bias.numel())
    # The tensors' own sizes prove nothing: many elements of one can lie on the same byte of the file.
    if max(declared, added) > 2 * file_size:
        raise ValueError(f"{spec.architecture} has {declared:,} parameters, the file {file_size:,} bytes")
    if built > max(2 * file_size, _LARGE):
        raise ValueError(f"{spec.architecture} has {built:,} parameters as a whole, the file {file_size:,} bytes")
    # Buffers, and the padding of an odd number of nibbles, are all that the two may differ by.
    if not 0.99 * declared <= stored <= 1.01 * declared + 4096:
        raise ValueError(f"{spec.architecture} has {declared:,} parameters, the file {stored:,}")


def _parameters(spec: ModelSpec) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in spec.build().parameters())


def _check(scale: Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(scale.shape) != shape or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"the scale of {name} is not a positive number of shape {list(shape)}")
