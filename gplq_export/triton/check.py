"""What of a model repository a server would refuse, or serve otherwise than its configuration says; without a server.

The server itself says little: for most mistakes in a ``config.pbtxt`` its API answers "failed to poll", and one model
that does not load ends the process. Rules about the repository as a whole are here, those about one configuration in
:mod:`gplq_export.triton.config_rules`, those about a version's files in :mod:`gplq_export.triton.version_rules`.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gplq.errors import UsageError
from gplq_export.triton.config import CONFIG, parse_config
from gplq_export.triton.config_rules import config_problems, server_shape
from gplq_export.triton.images import TritonImage
from gplq_export.triton.problem import Problem, error
from gplq_export.triton.version_rules import served_versions, version_problems

MODELS = "models"  # the folder of a repository of ours that the server gets


def check_repository(folder: Path, image: TritonImage | None = None) -> list[Problem]:
    """Everything that is wrong with a repository, errors first.

    Args:
        folder: what the server gets as --model-repository, or what gplq-export wrote around it.
        image: the server's image, for the rules about its versions.

    Raises:
        UsageError: there is no model in ``folder``.
        MissingError: tritonclient is not installed.
    """
    models = folder / MODELS if (folder / MODELS).is_dir() and not (folder / MODELS / CONFIG).exists() else folder
    folders = sorted(it for it in models.iterdir() if it.is_dir()) if models.is_dir() else []
    folders = [it for it in folders if not it.name.startswith(".")]
    if not folders:
        raise UsageError(f"{folder} is no model repository: it has no folder with a {CONFIG}.")
    configs: dict[str, Any] = {}
    problems: list[Problem] = []
    for model in folders:
        try:
            configs[model.name] = read_config(model)
        except UsageError as failure:
            rule = "config-parses" if (model / CONFIG).is_file() else "config-exists"
            problems.append(error(rule, model.name, str(failure), "correct it; the server's API would not say why"))
    for name, config in configs.items():
        problems += check_model(models / name, config, image)
        if config.HasField("ensemble_scheduling"):
            problems += _ensemble(name, config, configs, models, [it.name for it in folders])
    return sorted(problems, key=lambda problem: problem.severity != "error")


def check_model(folder: Path, config: Any, image: TritonImage | None = None) -> list[Problem]:
    """What is wrong with one model: its configuration, and every version that is served."""
    problems = list(config_problems(folder, config))
    versions, wrong = served_versions(folder, config)
    problems += wrong
    for version in versions:
        problems += version_problems(config, folder / version, image)
    return [dataclasses.replace(problem, where=f"{folder.name}{problem.where and ': '}{problem.where}")
            for problem in problems]  # fmt: skip


def read_config(model: Path) -> Any:
    """The configuration of a model's folder.

    Raises:
        UsageError: it has none, or it cannot be read.
    """
    path = model / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as missing:
        raise UsageError(f"{path} is missing: the server would guess what this model is.") from missing
    except (OSError, UnicodeDecodeError) as failure:
        raise UsageError(f"{path} cannot be read: {failure}.") from failure
    return parse_config(text, path)


def _ensemble(name: str, config: Any, configs: dict[str, Any], models: Path, folders: list[str]) -> Iterator[Problem]:
    """The rules of the server's own check of ensembles, which runs when everything else is loaded."""
    tensors = {it.name: (it.data_type, server_shape(it, config), name) for it in (*config.input, *config.output)}
    made = {it.name for it in config.input}
    for rule, given in (
        ("instance_group", bool(config.instance_group)),
        ("optimization", config.HasField("optimization")),
        ("model_warmup", bool(config.model_warmup)),
    ):
        if given:
            yield error("ensemble-has", name, f"an ensemble with {rule}", "remove it: its steps have theirs")
    yield from _flow(name, config)
    for step in config.ensemble_scheduling.step:
        if step.model_name not in configs:
            if step.model_name not in folders:  # else its own problem is reported already
                fix = f"one of {', '.join(sorted(configs))}"
                yield error("ensemble-step", name, f"step '{step.model_name}' is no model of the repository", fix)
            continue
        model = configs[step.model_name]
        asked = str(step.model_version)
        if asked != "-1" and asked not in served_versions(models / step.model_name, model)[0]:
            found = f"version {step.model_version} of {step.model_name} is not served"
            yield error("ensemble-step", name, found, "-1 for the newest, or one that is served")
        if 0 < model.max_batch_size < config.max_batch_size:
            found = f"takes batches of {config.max_batch_size}, its step {step.model_name} of {model.max_batch_size}"
            yield error("ensemble-batch", name, found, "give it the smallest max_batch_size of its steps")
        made.update(step.output_map.values())
        for kind, mapping, theirs in (
            ("input", step.input_map, model.input),
            ("output", step.output_map, model.output),
        ):
            known = {it.name: it for it in theirs}
            for key in sorted(set(mapping) - set(known)):
                fix = f"it has {', '.join(sorted(known))}"
                yield error("ensemble-map", name, f"{step.model_name} has no {kind} '{key}'", fix)
            unmapped = {key for key, it in known.items() if kind == "input" and not it.optional} - set(mapping)
            for key in sorted(unmapped):
                yield error("ensemble-map", name, f"input '{key}' of {step.model_name} is mapped to nothing", "map it")
            for key in sorted(set(mapping) & set(known)):
                tensor = known[key]
                ours = (tensor.data_type, server_shape(tensor, model), step.model_name)
                before = tensors.setdefault(mapping[key], ours)
                if before[0] != ours[0] or not _fit(before[1], ours[1]):
                    found = f"'{mapping[key]}' is {list(before[1])} in {before[2]}, {list(ours[1])} in {ours[2]}"
                    yield error("ensemble-tensor", name, found, "types and shapes, batches included, must agree")
    known_steps = all(step.model_name in configs for step in config.ensemble_scheduling.step)
    for tensor in config.output:
        if known_steps and tensor.name not in made:
            yield error("ensemble-map", name, f"no step makes its output '{tensor.name}'", "map a step's output to it")


def _flow(name: str, config: Any) -> Iterator[Problem]:
    """Every tensor of an ensemble is made once and read, and every step gets its inputs at some time."""
    steps = list(config.ensemble_scheduling.step)
    made = Counter(value for step in steps for value in step.output_map.values())
    for tensor, count in made.items():
        if count > 1:
            yield error("ensemble-map", name, f"'{tensor}' is made {count} times", "one step makes a tensor")
    given = {tensor.name for tensor in config.input}
    read = {value for step in steps for value in step.input_map.values()}
    for tensor in sorted(given - read):
        yield error("ensemble-map", name, f"its input '{tensor}' is not used", "map it to a step's input")
    for tensor in sorted(set(made) - read - {tensor.name for tensor in config.output}):
        fix = "leave it out of the output_map"
        yield error("ensemble-map", name, f"'{tensor}' is made by a step, and nobody reads it", fix)
    for tensor in sorted(read - given - set(made)):
        yield error("ensemble-map", name, f"'{tensor}' is read by a step, and nobody makes it", "map an output to it")
    there, waiting = given | (read - set(made)), steps
    while ready := [step for step in waiting if set(step.input_map.values()) <= there]:
        there |= {value for step in ready for value in step.output_map.values()}
        waiting = [step for step in waiting if step not in ready]
    for step in waiting:
        found = f"step '{step.model_name}' waits for what is made of its own output"
        yield error("ensemble-map", name, found, "steps follow each other without a circle")


def _fit(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))
