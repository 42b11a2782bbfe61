"""Float models: from a timm name, from a folder that timm exports to, or from a checkpoint file and an architecture."""

import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from gplq.convert import check_supported
from gplq.errors import ModelError
from gplq.files import sha256
from gplq.preprocessing import Preprocessing
from gplq.survey import input_size

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# What timm.create_model takes itself and does not pass on to the architecture. ``checkpoint_path`` is the dangerous
# one: timm unpickles that file without weights_only.
_FACTORY_ARGS = frozenset(inspect.signature(timm.create_model).parameters)

# What makes a backbone of a classifier: it returns some of its feature maps, and has no parts that these do not need.
BACKBONE_ARGS = frozenset({"features_only", "out_indices", "feature_cls"})


@dataclass(frozen=True)
class ModelSpec:
    """Everything that rebuilds the float architecture: ``timm.create_model(architecture, **model_args)``.

    Attributes:
        model_args: of the architecture, such as ``{"img_size": 70}``; with ``features_only`` and, if wanted,
            ``out_indices`` the model is a backbone that returns a list of feature maps.
        num_classes: 0 for a model without a classifier, which returns features [B, D]; also for a backbone.
    """

    architecture: str
    model_args: dict[str, Any]
    num_classes: int

    def build(self) -> nn.Module:
        """A freshly initialised model in evaluation mode.

        Raises:
            ModelError: timm does not know the architecture or refuses the arguments, or gplq cannot quantise it.
        """
        # A file may name the architecture, so nothing but a plain timm name may pass: timm also takes hub addresses.
        if not timm.is_model(self.architecture):
            raise ModelError(f"timm {timm.__version__} has no model '{self.architecture}'. See timm.list_models().")
        refused = sorted(_FACTORY_ARGS & self.model_args.keys())
        if refused:
            raise ModelError(f"'{refused[0]}' is no argument of an architecture; remove it from model_args.")
        try:
            model: nn.Module = timm.create_model(
                self.architecture, pretrained=False, num_classes=self.num_classes, **self.model_args
            )
        except (TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError, AttributeError) as error:
            raise ModelError(f"timm cannot build {self.architecture} with {self.model_args}: {error}") from error
        check_supported(model)
        return model.eval()


@dataclass(frozen=True)
class FloatModel:
    """A float model with what belongs to it.

    Attributes:
        source: what the user named. ``sha256``: of the weights file, or of the weights for a hub model.
    """

    model: nn.Module
    spec: ModelSpec
    preprocessing: Preprocessing
    label_names: list[str] | None
    source: str
    sha256: str


def load_model(
    source: str, *, arch: str | None = None, model_args: dict[str, Any] | None = None, num_classes: int | None = None
) -> FloatModel:
    """Load a float model.

    Args:
        source: a timm model name (its pretrained weights are downloaded by timm), a folder with ``config.json`` and
            ``model.safetensors`` as timm writes it, or a weights file, which needs ``arch``.
        arch: timm architecture of a weights file.
        model_args: further arguments of the architecture, such as ``{"img_size": 70}``.
        num_classes: of a weights file; by default found from the classifier's weight. 0 leaves the classifier of
            any model away.

    Raises:
        ModelError: the model is unknown, the file unreadable, or the weights do not fit.
    """
    path, model_args = Path(source), model_args or {}
    if model_args.get("features_only"):
        num_classes = 0
    is_file = path.suffix in WEIGHT_SUFFIXES or path.is_file()
    if not is_file and (arch is not None or num_classes):
        raise ModelError(f"--arch and --num-classes (but 0) belong to a weights file, but '{source}' is not one.")
    if path.is_dir():
        return _from_folder(path, model_args, num_classes)
    if is_file:
        return _from_file(path, arch, model_args, num_classes)
    return _from_name(source, model_args, num_classes)


def _from_name(name: str, model_args: dict[str, Any], num_classes: int | None) -> FloatModel:
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        known = timm.list_models(f"*{architecture[:6]}*")[:3]
        hint = f" Did you mean {', '.join(known)}?" if known else ""
        raise ModelError(f"'{name}' is neither an existing file or folder nor a model of timm.{hint}")
    with torch.device("meta"):  # before anything is downloaded; the head's size does not matter for it
        ModelSpec(architecture, model_args, 1000).build()
    try:
        head: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        model: Any = timm.create_model(name, pretrained=True, **head, **model_args).eval()
    except Exception as error:  # the hub client raises many types; all of them mean the same to the user
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"timm could not load pretrained weights for '{name}': {first_line} "
            f"Without a network, give a weights file and --arch {architecture}."
        ) from error
    config: dict[str, Any] = model.pretrained_cfg
    spec = ModelSpec(architecture, model_args, model.num_classes if num_classes is None else num_classes)
    label_names = _label_names(config.get("label_names"), spec.num_classes, name)
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return FloatModel(model, spec, _preprocessing(model, config), label_names, name, digest.hexdigest())


def _from_folder(folder: Path, extra_args: dict[str, Any], num_classes: int | None) -> FloatModel:
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    missing = [file.name for file in (config_file, weights_file) if not file.is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {' and '.join(missing)}: not a folder that timm wrote for a model.")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        pretrained = config.get("pretrained_cfg", {})
        # timm repeats the number of classes among the arguments.
        stored_args = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
        spec = ModelSpec(
            architecture=config["architecture"],
            model_args={**stored_args, **extra_args},
            num_classes=int(config["num_classes"]) if num_classes is None else num_classes,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{config_file} is not a timm model configuration: {error!r}") from error
    model = spec.build()
    _load_weights(model, _of_model(spec, model, read_weights(weights_file)), weights_file)
    preprocessing = _preprocessing(model, pretrained)
    found = config.get("label_names") or pretrained.get("label_names")
    names = None if num_classes == 0 else _label_names(found, spec.num_classes, str(config_file))
    return FloatModel(model, spec, preprocessing, names, str(folder), sha256(weights_file))


def _from_file(path: Path, arch: str | None, model_args: dict[str, Any], num_classes: int | None) -> FloatModel:
    if not path.is_file():
        raise ModelError(f"{path} does not exist. Give a timm model name, a model folder, or a weights file.")
    if arch is None:
        raise ModelError(f"{path} holds weights only: name their timm architecture with --arch.")
    weights = read_weights(path)
    if num_classes is None:
        num_classes = next((weights[key].shape[0] for key in ("head.weight", "head.bias") if key in weights), 0)
    spec = ModelSpec(arch, model_args, num_classes)
    model = spec.build()
    _load_weights(model, _of_model(spec, model, weights), path)
    return FloatModel(model, spec, _preprocessing(model, {}), None, str(path), sha256(path))


def _label_names(found: Any, num_classes: int, where: str) -> list[str] | None:
    """One name a class, in the order of the classes, from a list or from a dict by index; None if there are none.

    Raises:
        ModelError: there are more or fewer names than classes, or they cannot be put in order.
    """
    if not found or num_classes == 0:
        return None
    if isinstance(found, dict):
        try:
            by_index = {int(index): name for index, name in found.items()}
        except (TypeError, ValueError) as error:
            raise ModelError(f"{where}: label_names is a dict whose keys are no class numbers: {error}.") from error
        if sorted(by_index) != list(range(len(found))):
            raise ModelError(f"{where}: label_names has classes {sorted(by_index)[:5]} …, not 0 to {len(found) - 1}.")
        found = [by_index[index] for index in range(len(found))]
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
        raise ModelError(f"{where}: label_names must be a list of strings, or a dict of them by class number.")
    if len(found) != num_classes:
        raise ModelError(
            f"{where} names {len(found)} labels ('{found[0]}' … '{found[-1]}'), but the classifier has {num_classes} "
            "classes: correct label_names, or remove it."
        )
    return list(found)


def _preprocessing(model: nn.Module, pretrained: dict[str, Any]) -> Preprocessing:
    """What the weights' configuration (or else the architecture's) says, at the size that the model was built for."""
    config = resolve_data_config({}, pretrained_cfg=pretrained, model=model)
    return Preprocessing.from_dict({**config, "input_size": input_size(model)})


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from safetensors, or from a torch file that holds nothing but tensors and plain data.

    Raises:
        ModelError: the file is damaged, or loading it would run code.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    except Exception as error:  # both readers raise types of their own for a damaged or hostile file
        raise ModelError(
            f"{path} cannot be loaded safely: {str(error).strip().splitlines()[0]} "
            "Only safetensors, and torch files of tensors and plain data, are accepted."
        ) from error
    for key in ("state_dict", "model", "model_ema"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path} does not hold a state dict (names of parameters and their tensors).")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _of_model(spec: ModelSpec, model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a whole classifier without those of the parts that ``spec`` leaves away."""
    if spec.model_args.get("features_only"):
        # timm writes layers_0 for layers.0 in one kind of backbone and puts "model." in front of it in another.
        plain = {name.replace(".", "_"): tensor for name, tensor in weights.items()}
        names = {name: name.removeprefix("model.").replace(".", "_") for name in model.state_dict()}
        return {name: plain[old] for name, old in names.items() if old in plain}
    if spec.num_classes == 0:
        heads = model.pretrained_cfg.get("classifier") or ()
        inside = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
        return {name: tensor for name, tensor in weights.items() if not name.startswith(inside)}
    return weights


def _load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    expected = model.state_dict()
    missing = sorted(expected.keys() - weights.keys())
    unexpected = sorted(weights.keys() - expected.keys())
    wrong = [key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape]
    if missing or unexpected or wrong:
        details = [
            f"{len(names)} {what} (first: {names[0]})"
            for names, what in ((missing, "missing"), (unexpected, "unexpected"), (sorted(wrong), "of another shape"))
            if names
        ]
        raise ModelError(
            f"the weights in {path} do not fit the architecture: {', '.join(details)}. "
            "Check --arch, --num-classes and --model-arg (for instance img_size=70)."
        )
    model.load_state_dict({key: value.float() for key, value in weights.items()})
