"""The whole of GPLQ: a float model and images in, a checkpoint out; resumable at any point."""

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from gplq import golden, stage1, stage2
from gplq.calibrate import calibrate, calibrate_on
from gplq.checkpoint import Checkpoint, read_plain, save_checkpoint, write_plain
from gplq.convert import convert
from gplq.data import BadImages, ImageSet, open_images
from gplq.doubt import trusted_top1
from gplq.errors import CheckpointError, ConfigError, DataError, GateError, UsageError
from gplq.evaluate import Accuracy, Agreement, Similarity, agreement, similarity, top1
from gplq.files import atomic_path
from gplq.labels import check_labels, check_same_classes, class_names
from gplq.models import FloatModel
from gplq.processes import processes
from gplq.provenance import environment
from gplq.recipe import Recipe
from gplq.stage1 import Loss, micro_batch_size
from gplq.transforms.rotate import Rotation, rotate

Say = Callable[[str], None]

# On so many test images the quantised model is compared with the float model, beside its accuracy.
_FEW_IMAGES = 128
# Of top-1, in points: so much less is still as good.
NOISE_POINTS = 1.0


def quantize(
    source: FloatModel,
    data: str | Path,
    out: Path,
    recipe: Recipe,
    *,
    eval_data: str | Path | None = None,
    eval_images: int | None = None,
    bad_images: BadImages = "fail",
    class_order: str | None = None,
    trust_labels: bool = False,
    force: bool = False,
    say: Say = print,
) -> dict[str, Accuracy | Similarity]:
    """Quantise ``source`` and write the checkpoint ``out``.

    While it works, its state is kept in ``<out>.resume``; the same call after an interruption goes on from there. The
    state is removed when ``out`` is written. It runs on a GPU if there is one, and on several GPUs or in several CPU
    processes if ``accelerate launch`` started it; then only the first process prints and writes.

    Args:
        source: the float model; it is not changed.
        data: training images, named as in :mod:`gplq.data`; also test images, if it has a split of them.
        out: the checkpoint to write, such as ``model.pt``.
        recipe: every setting.
        eval_data: test images, if ``data`` has none.
        eval_images: measure on this many of them, evenly spread; all if None.
        bad_images: whether an image that cannot be read ends the run ("fail") or is left out ("skip").
        class_order: how the model numbers class folders that its own label names do not name: "alphabetical" (as
            torchvision), "natural" (as timm's train.py), or the path of a text file with one class a line. Needed
            where the orders differ; the names become those of the checkpoint's labels.
        trust_labels: go on although the float model's answers speak against the labels, see :mod:`gplq.doubt`.
        force: overwrite ``out``.
        say: where progress messages go.

    Returns:
        Top-1 of "FP32", "W32A4" (after Stage 1) and "W4A4"; the names follow the recipe's bits. Without labels
        (``stage1.task_weight`` 0 and no ``eval_data``): how far the latter two agree with the float model. Without a
        classifier: how close their features are to the float model's.

    Raises:
        UsageError: something is wrong with the inputs or ``out``; nothing is written.
        GateError: the training diverged; or the result is farther from the float model than ``recipe.limits`` allow:
            ``out`` is written all the same.
    """
    first = processes().is_main_process
    if first:
        check_output(out, force)
    else:
        say = _say_nothing
    train_set, test_set, label_names = _open_data(source, data, recipe, eval_data, bad_images, class_order, say)
    test_set = test_set.head(eval_images)
    classifies = source.spec.num_classes > 0
    labelled = classifies and (recipe.stage1.task_weight > 0 or eval_data is not None)
    measured = "top1" if labelled else "agreement" if classifies else "similarity"
    what = {"top1": "top-1", "agreement": "agreement with FP32", "similarity": "cosine with FP32"}[measured]

    run = _Run(out.with_name(f"{out.name}.resume"), _fingerprint(source, train_set, test_set, recipe), say)
    if source.assumed:
        say(f"assumed: {source.assumed}")
    say(f"bits: {recipe.bits()}")
    results: dict[str, Accuracy | Similarity] = {}
    activations = f"A{recipe.activation_bits}"
    quantised = f"W{recipe.weight_bits}{activations}"
    device = processes().device

    teacher, rotation = prepared(source, recipe)
    if rotation is not None:
        say(str(rotation))

    def reference() -> nn.Module:
        # Made where it is needed: in training it would take memory beside the teacher.
        return copy.deepcopy(teacher).to(device)

    def measure(name: str, model: nn.Module, accuracy: Callable[..., Accuracy] = top1) -> None:
        if labelled:
            results[name] = run.recall(name, lambda: accuracy(model, test_set, what=name))
        else:
            closeness = agreement if classifies else similarity
            results[name] = run.recall(name, lambda: closeness(model, reference(), test_set, name))
        say(f"{name:6} {what} {results[name]}   (n = {results[name].n})")

    if labelled:
        judged = partial(trusted_top1, num_classes=source.spec.num_classes, trust_labels=trust_labels, say=say)
        measure("FP32", reference(), judged)
    student = convert(copy.deepcopy(teacher), recipe).to(device)
    few = test_set.head(_FEW_IMAGES)

    closenesses: dict[str, Accuracy | Similarity] = {}

    def closeness(name: str) -> Accuracy | Similarity:
        compared = agreement if classifies else similarity
        found = run.recall(f"{name}, closeness", lambda: compared(student, reference(), few, name))
        closenesses[name] = found
        return found

    _quantize_activations(student, teacher, train_set, recipe, run, closeness)
    measure(f"W32{activations}", student)
    say(f"Stage 2: weights to {recipe.weight_bits} bits ({recipe.stage2.rounding})")
    # Every process does the same work: it is deterministic, and one that waits for another is given up after minutes.
    reports = stage2.quantize_weights(student, train_set, recipe)
    for report in reports:
        say(str(report))
    measure(quantised, student)
    final = closeness(quantised)
    provenance = {
        **environment(),
        "source": source.source,
        "source_sha256": source.sha256,
        "source_key": source.checkpoint_key,
        "arguments": {
            "data": str(data),
            "eval_data": None if eval_data is None else str(eval_data),
            "eval_images": eval_images,
            "bad_images": bad_images,
            "class_order": class_order,
            "trust_labels": trust_labels,
        },
        "preprocessing": source.origins,
        "train_data": train_set.to_dict(),
        "test_data": test_set.to_dict(),
        "seed": recipe.seed,
        "processes": processes().num_processes,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "stage2": [report.to_dict() for report in reports],
        measured: {name: result.to_dict() for name, result in results.items()},
        "rotation": None if rotation is None else rotation.to_dict(),
        "closeness": {name: result.to_dict() for name, result in closenesses.items()},
    }
    student.cpu()
    if first:
        provenance["golden"] = golden.record(student, test_set)
    checkpoint = Checkpoint(student, source.spec, source.preprocessing, label_names, recipe, provenance)
    if first:
        save_checkpoint(checkpoint, out)
    run.finish()
    processes().wait_for_everyone()
    # With labels of its own a network may leave the float model behind: what is as accurate is not lost.
    as_good = labelled and _percent(results[quantised]) >= _percent(results["FP32"]) - NOISE_POINTS
    if not as_good and (why := too_far(final, recipe)):
        raise GateError(f"the quantised model is not close to the float model: {why}. {out} is kept. {_ADVICE}")
    return results


def prepared(source: FloatModel, recipe: Recipe) -> tuple[nn.Module, Rotation | None]:
    """What is quantised and what teaches: the source itself, or a copy of it on other bases, as the recipe wants.

    They must be the same: features that are pulled back to the basis of before the rotation destroy the network.
    """
    if not recipe.calibration.rotate:
        return source.model, None
    model = copy.deepcopy(source.model)
    return model, rotate(model, source.preprocessing.input_size, seed=recipe.seed)


def too_far(found: Accuracy | Similarity, recipe: Recipe) -> str | None:
    """How a quantised model misses ``recipe.limits``, in words; None if it keeps them."""
    limits = recipe.limits
    if isinstance(found, Similarity):
        if not limits.misses_cosine(found.mean):
            return None
        return f"cosine of its outputs {found.mean:.4f}, limit {limits.cosine} (n = {found.n})"
    assert isinstance(found, Agreement)
    misses = []
    if limits.misses_agreement(found.interval()):
        misses.append(f"{found.percent:.1f} % of its labels agree, limit {limits.agreement} %")
    if limits.misses_cosine(found.cosine):
        misses.append(f"cosine of its features {found.cosine:.4f}, limit {limits.cosine}")
    return f"{', '.join(misses)} (n = {found.n})" if misses else None


def _percent(found: Accuracy | Similarity) -> float:
    assert isinstance(found, Accuracy)
    return found.percent


_ADVICE = (
    "More training images or epochs (stage1.max_images, stage1.epochs) bring it closer; so does "
    "activation_bits: 8 (recipes/w4a8.yaml), at no cost where INT8 multiplies. The limits are the recipe's."
)


def train_activations(
    student: nn.Module,
    data: Collection[Any],
    *,
    loss: Loss,
    recipe: Recipe,
    state_file: Path | None = None,
    say: Say = print,
) -> None:
    """Stage 1 for any task: calibrate and train a converted model on a loss of your own, in place.

    Detection with torchvision, for instance, where a batch is (list of images, list of target dicts) and a model in
    training mode returns its losses by name::

        from gplq import convert, stage2  # modules

        convert.convert(detector.backbone.body, recipe, image_size=(3, 224, 320))
        gplq.train_activations(detector, loader, loss=lambda model, batch: model(*batch), recipe=recipe)
        stage2.quantize_weights(detector.backbone.body, images, recipe)

    ``examples/detector.py`` of the repository goes from there to a checkpoint and its export.

    Optimiser, precision, accumulation, resuming and the checks for NaN are those of :func:`quantize`. Of
    ``recipe.stage1`` the keys ``task_weight``, ``alpha`` and those of the PCA have no effect: the loss is yours.

    Args:
        student: a model with converted parts, on the device to train on, in the mode that the loss wants.
        data: batches of ``batch_size / accumulate / processes`` images: any nesting of tuples, lists, dicts and
            tensors, which are moved to the model's device. It is iterated once an epoch, with PyTorch's random
            generator seeded, and must give the same batches each time; a DataLoader does, shuffled or not. With
            several processes each gives its own share.
        loss: called with (model, batch); returns the mean loss of the batch, or its terms by name, which are summed.
            It should use this model, which with FSDP is a copy of ``student``; with several processes it depends on the
            same parameters in each of them and in each step (a term that does not apply is multiplied by 0).
        recipe: every setting.
        state_file: where the state for resuming is kept; removed at the end. None: an interruption loses the work.
        say: where progress messages go.

    Raises:
        UsageError: ``data`` has fewer batches than one step of the optimiser takes; or the loss does not depend on the
            same parameters throughout, see above.
        GateError: the loss or a gradient became NaN or infinite.
    """
    settings = recipe.stage1
    size = micro_batch_size(recipe)
    most = len(data) if settings.max_images is None else min(len(data), settings.max_images // size)
    steps = most // settings.accumulate  # an epoch
    if steps == 0:
        raise UsageError(f"{most} batches are fewer than one step takes (stage1.accumulate is {settings.accumulate}).")
    run = _Run(state_file, _own_fingerprint(student, recipe), say if processes().is_main_process else _say_nothing)

    def epoch(number: int, skip: int) -> Iterator[Any]:
        torch.manual_seed(recipe.seed + 1 + number)
        return itertools.islice(data, skip * settings.accumulate, steps * settings.accumulate)

    def micro_batches(step: int) -> Iterator[Any]:
        for number in range(step // steps, settings.epochs):
            yield from epoch(number, max(step - number * steps, 0))

    calibrate_on(
        student,
        lambda batch: _scalar(loss(student, batch)),
        epoch(0, 0),
        min(most, math.ceil(recipe.calibration.images / size / processes().num_processes)),
        recipe,
    )
    if settings.enabled:
        stage1.optimise(
            student,
            loss,
            micro_batches,
            steps * settings.epochs,
            recipe,
            run.state.get("stage1"),
            lambda content: run.save("stage1", content),
        )
    run.finish()


def check_output(out: Path, force: bool) -> None:
    """Refuse an output that exists, or a folder that cannot be written to, before any work is done.

    Raises:
        UsageError: see above.
    """
    if out.is_dir():
        raise UsageError(f"{out} is a folder; --out takes the name of a file, such as {out / 'model.pt'}.")
    if out.exists() and not force:
        raise UsageError(f"{out} exists. Choose another --out, or overwrite it with --force.")
    with atomic_path(out.with_name(f"{out.name}.probe")) as probe:
        probe.touch()
    out.with_name(f"{out.name}.probe").unlink()


def _quantize_activations(
    student: nn.Module,
    teacher: nn.Module,
    images: ImageSet,
    recipe: Recipe,
    run: "_Run",
    closeness: Callable[[str], Accuracy | Similarity],
) -> None:
    state = run.state.get("stage1")
    run.say(f"Stage 1: activations to {recipe.activation_bits} bits")
    # Calibration also gives the scales their shapes, so that a stored state fits.
    calibrate(student, images, recipe)
    found = closeness("calibrated")
    run.say(f"calibrated: {'agreement' if isinstance(found, Agreement) else 'cosine'} with the float model {found}")
    if why := too_far(found, recipe):
        then = "Stage 1 may mend it" if recipe.stage1.enabled else "nothing trains it, as the recipe wants"
        run.say(f"WARNING: calibration alone leaves the model far from the float model: {why}. {then}.")
    if recipe.stage1.enabled:
        if state is not None:
            run.say(f"resuming Stage 1 at step {state['step']}")
        stage1.train(student, teacher, images, recipe, state, lambda content: run.save("stage1", content))


def _open_data(
    source: FloatModel,
    data: str | Path,
    recipe: Recipe,
    eval_data: str | Path | None,
    bad_images: BadImages,
    class_order: str | None,
    say: Say,
) -> tuple[ImageSet, ImageSet, list[str] | None]:
    """The training and the test images, with labels where the recipe or the measurement needs them; label names."""
    classifies = source.spec.num_classes > 0
    train_labels = classifies and recipe.stage1.task_weight > 0
    if not classifies and recipe.stage1.enabled and recipe.stage1.task_weight > 0:
        raise ConfigError(
            f"{source.spec.architecture} has no classifier that could learn from labels: set stage1.task_weight to 0."
        )
    test_labels = train_labels or (classifies and eval_data is not None)
    train_set = open_images(data, "train", source.preprocessing, need_labels=train_labels, bad_images=bad_images)
    try:
        test_set = open_images(
            eval_data or data, "test", source.preprocessing, need_labels=test_labels, bad_images=bad_images
        )
    except DataError:
        if test_labels:
            raise
        test_set = train_set  # how far the models agree can be measured on any images
    label_names = source.label_names
    if class_order is not None:
        labelled = next((images for images, used in ((train_set, train_labels), (test_set, test_labels)) if used), None)
        if labelled is None:
            raise UsageError("--class-order has no effect: no labels are read.")
        if label_names and set(labelled.classes or []) <= set(label_names):
            raise UsageError(
                f"--class-order has no effect: the classes of {labelled.source} are matched by the model's own names."
            )
        label_names = class_names(labelled, source.spec.num_classes, class_order)
    for images, labels in ((train_set, train_labels), (test_set, test_labels)):
        if labels and (assumed := check_labels(images, source.spec.num_classes, label_names)):
            say(f"assumed: {assumed}")
    if train_labels and test_labels:
        check_same_classes(train_set, test_set)
    if eval_data is None and test_labels and test_set.fingerprint == train_set.fingerprint:
        raise UsageError(f"{data} has no test images apart from its training images: give some with --eval.")
    return train_set, test_set, label_names


def _scalar(loss: object) -> Tensor | None:
    """What can be run backwards of a loss; a model that is not in training mode may return something else."""
    if isinstance(loss, Mapping):
        return torch.stack(list(loss.values())).sum() if loss else None
    return loss if isinstance(loss, Tensor) else None


def _own_fingerprint(student: nn.Module, recipe: Recipe) -> str:
    """Identifies a run on a user's own data, as far as it can be seen: the recipe, and how the model is built."""
    shapes = {name: list(p.shape) for name, p in student.named_parameters() if not name.endswith("raw_scale")}
    return hashlib.sha256(json.dumps([shapes, recipe.to_dict()], sort_keys=True).encode()).hexdigest()


def _fingerprint(source: FloatModel, train_set: ImageSet, test_set: ImageSet, recipe: Recipe) -> str:
    """Identifies a run: only with the same inputs and recipe does it make sense to go on with it."""
    parts = [source.sha256, source.spec.architecture, json.dumps(source.spec.model_args, sort_keys=True, default=str)]
    parts += [
        str(source.spec.num_classes),
        str(source.checkpoint_key),
        train_set.fingerprint,
        test_set.fingerprint,
        json.dumps(recipe.to_dict(), sort_keys=True),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class _Run:
    """The state of a run on disk: written atomically, taken up if it belongs to the same inputs, removed at the end."""

    def __init__(self, path: Path | None, fingerprint: str, say: Say) -> None:
        self.path, self.say = path, say
        self.state: dict[str, Any] = {"fingerprint": fingerprint, "accuracies": {}}
        # The others take what the first process reads: one may not see its disk, or see it a moment later.
        shared = [self._read(fingerprint) if processes().is_main_process else None]
        stored = broadcast_object_list(shared)[0]
        if stored is not None:
            self.state = stored

    def _read(self, fingerprint: str) -> dict[str, Any] | None:
        if self.path is None or not self.path.exists():
            return None
        try:
            stored = read_plain(self.path)
        except CheckpointError as error:
            self.say(f"ignoring the state of an earlier run: {error}")
            return None
        if isinstance(stored, dict) and stored.get("fingerprint") == fingerprint:
            return stored
        self.say(f"starting anew: {self.path} belongs to another model, data set or recipe")
        return None

    def recall(self, name: str, measure: Callable[[], Accuracy | Similarity]) -> Accuracy | Similarity:
        """An accuracy that an interrupted run has already measured, or a new measurement."""
        known = self.state["accuracies"].get(name)
        if known is not None:
            kind = Agreement if "cosine" in known else Similarity if "mean" in known else Accuracy
            return kind(**known)
        accuracy = measure()
        self.state["accuracies"][name] = asdict(accuracy)
        return accuracy

    def save(self, key: str, content: dict[str, Any]) -> None:
        self.state[key] = content
        if self.path is not None and processes().is_main_process:
            write_plain(self.state, self.path)

    def finish(self) -> None:
        if self.path is not None and processes().is_main_process:
            self.path.unlink(missing_ok=True)


def _say_nothing(_: str) -> None:
    """Where the messages of all processes but the first go."""
