"""Float models: from a timm name, from a folder that timm exports to, or from a checkpoint file and an architecture."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from gplq.convert import check_supported
from gplq.errors import ModelError
from gplq.files import sha256
from gplq.labels import is_text
from gplq.preprocessing import SETTINGS, Preprocessing, resolve

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
        origins: where each setting of ``preprocessing`` comes from, see :mod:`gplq.preprocessing`; plain data.
        assumed: of these settings, in words, those that nobody has stated; empty if there are none.
    """

    model: nn.Module
    spec: ModelSpec
    preprocessing: Preprocessing
    label_names: list[str] | None
    source: str
    sha256: str
    origins: dict[str, str] = field(default_factory=dict)
    assumed: str = ""


def load_model(
    source: str,
    *,
    arch: str | None = None,
    model_args: dict[str, Any] | None = None,
    num_classes: int | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> FloatModel:
    """Load a float model.

    Args:
        source: a timm model name (its pretrained weights are downloaded by timm), a folder with ``config.json`` and
            ``model.safetensors`` as timm writes it, or a weights file, which needs ``arch``.
        arch: timm architecture of a weights file.
        model_args: further arguments of the architecture, such as ``{"img_size": 70}``.
        num_classes: of a weights file; by default found from the classifier's weight. 0 leaves the classifier of
            any model away.
        preprocessing: any of mean, std, interpolation, crop_pct and crop_mode, where the weights' configuration (the
            hub's, or a ``config.json`` of timm's with the weights) says nothing or something else.

    Raises:
        ModelError: the model is unknown, the file unreadable, the weights do not fit, or the preprocessing cannot be
            used.
    """
    path, model_args, given = Path(source), model_args or {}, dict(preprocessing or {})
    if foreign := sorted(given.keys() - set(SETTINGS)):
        raise ModelError(f"the preprocessing has no '{foreign[0]}'; it has {', '.join(SETTINGS)}.")
    if model_args.get("features_only"):
        num_classes = 0
    is_file = path.suffix in WEIGHT_SUFFIXES or path.is_file()
    if not is_file and (arch is not None or num_classes):
        raise ModelError(f"--arch and --num-classes (but 0) belong to a weights file, but '{source}' is not one.")
    if path.is_dir():
        return _from_folder(path, model_args, num_classes, given)
    if is_file:
        return _from_file(path, arch, model_args, num_classes, given)
    return _from_name(source, model_args, num_classes, given)


def _from_name(name: str, model_args: dict[str, Any], num_classes: int | None, given: dict[str, Any]) -> FloatModel:
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
    found = resolve(model, config, f"the configuration of {name}", given)
    return FloatModel(
        model,
        spec,
        found.preprocessing,
        label_names,
        name,
        digest.hexdigest(),
        origins=found.origins,
        assumed=found.assumed,
    )


def _from_folder(
    folder: Path, extra_args: dict[str, Any], num_classes: int | None, given: dict[str, Any]
) -> FloatModel:
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    missing = [file.name for file in (config_file, weights_file) if not file.is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {' and '.join(missing)}: not a folder that timm wrote for a model.")
    try:
        config = _read_config(config_file)
        pretrained = config["pretrained_cfg"]
        # timm repeats the number of classes among the arguments.
        stored_args = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
        spec = ModelSpec(
            architecture=config["architecture"],
            model_args={**stored_args, **extra_args},
            num_classes=int(config.get("num_classes") or pretrained["num_classes"])
            if num_classes is None
            else num_classes,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{config_file} is not a timm model configuration: {error!r}") from error
    model = spec.build()
    _load_weights(model, _of_model(spec, model, read_weights(weights_file)), weights_file)
    names = config.get("label_names") or pretrained.get("label_names") or pretrained.get("labels")
    label_names = None if num_classes == 0 else _label_names(names, spec.num_classes, str(config_file))
    found = resolve(model, pretrained, str(config_file), given)
    return FloatModel(
        model,
        spec,
        found.preprocessing,
        label_names,
        str(folder),
        sha256(weights_file),
        origins=found.origins,
        assumed=found.assumed,
    )


def _from_file(
    path: Path, arch: str | None, model_args: dict[str, Any], num_classes: int | None, given: dict[str, Any]
) -> FloatModel:
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
    config, where = _config_beside(path, arch)
    found = resolve(model, config, where, given)
    return FloatModel(
        model,
        spec,
        found.preprocessing,
        None,
        str(path),
        sha256(path),
        origins=found.origins,
        assumed=found.assumed,
    )


def _config_beside(path: Path, arch: str) -> tuple[dict[str, Any] | None, str]:
    """What a ``config.json`` of timm's in the folder of a weights file says, if it is about this architecture."""
    file = path.with_name("config.json")
    try:
        config = _read_config(file)
        if config.get("architecture") == arch.split(".")[0]:
            return config["pretrained_cfg"], str(file)
    except (OSError, ValueError, TypeError, AttributeError):
        pass  # none of timm's: that is no error, as weights were named, and not a folder
    return None, str(path)


def _stored_classes(config: dict[str, Any]) -> int:
    number = config.get("num_classes")
    return int(config["pretrained_cfg"]["num_classes"] if number is None else number)


def _read_config(file: Path) -> dict[str, Any]:
    """Timm's ``config.json``; the older kind has one level, where today's has ``pretrained_cfg``.

    Raises:
        OSError, ValueError, TypeError: it cannot be read, or is nothing of the kind.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not isinstance(config.get("pretrained_cfg", {}), dict):
        raise TypeError("it is no object, or its pretrained_cfg is none")
    return config if "pretrained_cfg" in config else {**config, "pretrained_cfg": config}


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
    if odd := [name for name in found if not is_text(name)]:
        raise ModelError(f"{where}: the label {odd[0]!r} is no line of text.")
    if len(found) != num_classes:
        raise ModelError(
            f"{where} names {len(found)} labels ('{found[0]}' … '{found[-1]}'), but the classifier has {num_classes} "
            "classes: correct label_names, or remove it."
        )
    return list(found)


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
