"""Float models: from a timm name, from a folder that timm exports to, or from a checkpoint file and an architecture."""

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from tqdm import tqdm

from gplq.convert import check_supported
from gplq.errors import ModelError, first_line
from gplq.files import sha256
from gplq.fitting import channels_in, classes_in, classifier_names, load_weights
from gplq.labels import is_text
from gplq.preprocessing import SETTINGS, Preprocessing, resolve
from gplq.weights import Found, find_weights

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
# In a folder that timm wrote; the first that is there, as timm takes it.
_FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
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

    def build(self, pretrained: bool = False) -> nn.Module:
        """A freshly initialised model in evaluation mode.

        Args:
            pretrained: have timm call its loader of weights; only for :func:`gplq.weights.load_weights`.

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
                self.architecture, pretrained=pretrained, num_classes=self.num_classes, **self.model_args
            )
        except ModelError:
            raise
        except Exception as error:  # a constructor stumbles over an argument in any way there is
            raise ModelError(
                f"timm cannot build {self.architecture} with {self.model_args}: {first_line(error)}"
            ) from error
        _keep_size(model, self.model_args)
        check_supported(model)
        return model.eval()


def _keep_size(model: Any, model_args: dict[str, Any]) -> None:
    """Leave the size of the images where :func:`gplq.survey.input_size` looks: some families (VOLO) keep it nowhere."""
    if "img_size" in model_args and not any(hasattr(module, "img_size") for module in model.modules()):
        model.img_size = model_args["img_size"]


@dataclass(frozen=True)
class FloatModel:
    """A float model with what belongs to it.

    Attributes:
        source: what the user named. ``sha256``: of the weights file, or of the weights for a hub model.
        origins: where each setting of ``preprocessing`` comes from, see :mod:`gplq.preprocessing`; plain data.
        assumed: of these settings, in words, those that nobody has stated; empty if there are none.
        checkpoint_key: which weights of the file, as the user chose them.
    """

    model: nn.Module
    spec: ModelSpec
    preprocessing: Preprocessing
    label_names: list[str] | None
    source: str
    sha256: str
    origins: dict[str, str] = field(default_factory=dict)
    assumed: str = ""
    checkpoint_key: str | None = None


def is_weights_file(source: str) -> bool:
    """Whether the user named a file of weights, be it there or not: neither a folder nor a name of timm's."""
    path = Path(source)
    return path.is_file() or (path.suffix in WEIGHT_SUFFIXES and not path.is_dir())


def load_model(
    source: str,
    *,
    arch: str | None = None,
    model_args: dict[str, Any] | None = None,
    num_classes: int | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    checkpoint_key: str | None = None,
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
        checkpoint_key: which weights of a file that holds several, such as "state_dict"; by default averaged ones
            (EMA, a teacher) before raw ones, as timm does.

    Raises:
        ModelError: the model is unknown, the file unreadable, the weights do not fit, or the preprocessing cannot be
            used.
    """
    path, model_args, given = Path(source), model_args or {}, dict(preprocessing or {})
    if foreign := sorted(given.keys() - set(SETTINGS)):
        raise ModelError(f"the preprocessing has no '{foreign[0]}'; it has {', '.join(SETTINGS)}.")
    if model_args.get("features_only"):
        num_classes = 0
    is_file = is_weights_file(source)
    if not is_file and (arch is not None or num_classes):
        raise ModelError(f"--arch and --num-classes (but 0) belong to a weights file, but '{source}' is not one.")
    if path.is_dir():
        return _from_folder(path, model_args, num_classes, given, checkpoint_key)
    if is_file:
        return _from_file(path, arch, model_args, num_classes, given, checkpoint_key)
    if checkpoint_key is not None:
        raise ModelError(f"--checkpoint-key belongs to a file or folder with weights, but '{source}' is not one.")
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
        _keep_size(model, model_args)
    except Exception as error:  # the hub client raises many types; all of them mean the same to the user
        raise ModelError(
            f"timm could not load pretrained weights for '{name}': {first_line(error)} "
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
    folder: Path,
    extra_args: dict[str, Any],
    num_classes: int | None,
    given: dict[str, Any],
    checkpoint_key: str | None,
) -> FloatModel:
    config_file = folder / "config.json"
    weights_file = next((folder / name for name in _FOLDER_WEIGHTS if (folder / name).is_file()), None)
    missing = [] if config_file.is_file() else ["config.json"]
    missing += [] if weights_file is not None else [" or ".join(_FOLDER_WEIGHTS)]
    if missing or weights_file is None:
        raise ModelError(
            f"{folder} lacks {' and '.join(missing)}: not a folder that timm wrote for a model. Weights alone are "
            "named as a file, with --arch."
        )
    try:
        config = _read_config(config_file)
        if "architectures" in config and "architecture" not in config:
            raise ModelError(
                f"{folder} was written by the package transformers ({config.get('model_type')}). gplq takes timm's "
                "models: timm publishes most of the same weights under names of its own (timm.list_pretrained())."
            )
        pretrained = config["pretrained_cfg"]
        architecture = str(config["architecture"])
        # timm repeats the number of classes among the arguments.
        stored_args = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
        spec = ModelSpec(
            architecture,
            model_args={**_implied_args(architecture, pretrained), **stored_args, **extra_args},
            num_classes=_stored_classes(config) if num_classes is None else num_classes,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{config_file} is not a timm model configuration: {error!r}") from error
    weights = find_weights(weights_file, _whole(spec).state_dict(), checkpoint_key).weights
    model = load_weights(spec.build, weights, str(weights_file), extra_args)
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
        checkpoint_key=checkpoint_key,
    )


def _implied_args(architecture: str, pretrained: dict[str, Any]) -> dict[str, Any]:
    """What timm takes from the weights' configuration as arguments, where the architecture has something else."""
    usual: Any = timm.models.get_pretrained_cfg(architecture)
    size, usual_size = pretrained.get("input_size"), getattr(usual, "input_size", None)
    implied: dict[str, Any] = {}
    if size and usual_size and size[0] != usual_size[0]:
        implied["in_chans"] = size[0]
    if size and usual_size and pretrained.get("fixed_input_size") and list(size[1:]) != list(usual_size[1:]):
        implied["img_size"] = list(size[1:])
    pool = pretrained.get("global_pool")
    if pool is not None and pool != getattr(usual, "global_pool", pool):
        implied["global_pool"] = pool
    return implied


def _whole(spec: ModelSpec) -> nn.Module:
    """The architecture with its classifier and all of its parts, without memory: for the names of its weights."""
    args = {key: value for key, value in spec.model_args.items() if key not in BACKBONE_ARGS}
    with torch.device("meta"):
        return ModelSpec(spec.architecture, args, spec.num_classes or 1000).build()


def _from_file(
    path: Path,
    arch: str | None,
    model_args: dict[str, Any],
    num_classes: int | None,
    given: dict[str, Any],
    checkpoint_key: str | None,
) -> FloatModel:
    if not path.is_file():
        raise ModelError(f"{path} does not exist. Give a timm model name, a model folder, or a weights file.")
    if arch is None:
        raise ModelError(f"{path} holds weights only: name their timm architecture with --arch.")
    whole = _whole(ModelSpec(arch, model_args, num_classes or 1000))
    stored = find_weights(path, whole.state_dict(), checkpoint_key)
    named = dict(model_args)
    channels = channels_in(stored.weights, whole)
    if channels not in (None, channels_in(whole.state_dict(), whole)) and "in_chans" not in named:
        tqdm.write(f"{path}: weights for images of {channels} channels, so in_chans={channels}", file=sys.stderr)
        model_args = {**model_args, "in_chans": channels}
    if num_classes is None:
        num_classes = classes_in(stored.weights, whole)
        if num_classes == 0:
            _say_features_alone(path, stored, whole)
    spec = ModelSpec(arch, model_args, num_classes)
    model = load_weights(spec.build, stored.weights, str(path), named)
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
        checkpoint_key=checkpoint_key,
    )


def _say_features_alone(path: Path, found: Found, whole: Any) -> None:
    at = f" at '{found.place}'" if found.place else ""
    # A head of several layers has names of its own, such as head.1.weight behind a dropout.
    heads = tuple(f"{name}." for name in classifier_names(whole))
    inside = {name: tensor for name, tensor in found.weights.items() if name.startswith(heads)}
    for name, tensor in {**inside, **found.beside}.items():
        if tensor.ndim == 2 and tensor.shape[1] == whole.num_features:
            raise ModelError(
                f"the weights in {path}{at} have no classifier, and beside them is {name} {list(tensor.shape)}, which "
                "may be one. If it is, give it the name that it has in timm "
                f"({' or '.join(classifier_names(whole))}, beside the other weights), or take the weights that have it "
                "(--checkpoint-key); to quantise the features alone: --num-classes 0."
            )
    tqdm.write(f"{path}: the weights{at} have no classifier: features alone", file=sys.stderr)


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
