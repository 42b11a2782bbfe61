"""The whole of GPLQ: a float model and images in, a checkpoint out; resumable at any point."""

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from gplq import stage1, stage2
from gplq.calibrate import calibrate
from gplq.checkpoint import Checkpoint, read_plain, save_checkpoint, write_plain
from gplq.data import ImageSet, check_labels, open_images
from gplq.errors import CheckpointError, UsageError
from gplq.evaluate import Accuracy, top1
from gplq.files import atomic_path
from gplq.layers import convert
from gplq.models import FloatModel
from gplq.provenance import environment
from gplq.recipe import Recipe

Say = Callable[[str], None]


def quantize(
    source: FloatModel,
    data: Path,
    out: Path,
    recipe: Recipe,
    *,
    eval_data: Path | None = None,
    eval_images: int | None = None,
    force: bool = False,
    say: Say = print,
) -> dict[str, Accuracy]:
    """Quantise ``source`` and write the checkpoint ``out``.

    While it works, its state is kept in ``<out>.resume``; the same call after an interruption goes on from there. The
    state is removed when ``out`` is written.

    Args:
        source: the float model; it is not changed.
        data: training images (npz or folder); also test images, if it has a split of them.
        out: the checkpoint to write, such as ``model.pt``.
        recipe: every setting.
        eval_data: test images, if ``data`` has none.
        eval_images: measure on this many of them, evenly spread; all if None.
        force: overwrite ``out``.
        say: where progress messages go.

    Returns:
        Top-1 of "FP32", "W32A4" (after Stage 1) and "W4A4"; the names follow the recipe's bits.

    Raises:
        UsageError: something is wrong with the inputs or ``out``; nothing is written.
        GateError: the training diverged.
    """
    check_output(out, force)
    train_set = open_images(data, "train", source.preprocessing)
    test_set = open_images(eval_data or data, "test", source.preprocessing)
    for images in (train_set, test_set):
        check_labels(images, source.spec.num_classes, source.label_names)
    if eval_data is None and test_set.fingerprint == train_set.fingerprint:
        raise UsageError(f"{data} has no test images apart from its training images: give some with --eval.")
    test_set = test_set.head(eval_images)

    run = _Run(out, _fingerprint(source, train_set, test_set, recipe), say)
    accuracies: dict[str, Accuracy] = {}
    activations, weights = f"A{recipe.activation_bits}", f"W{recipe.weight_bits}"

    def measure(name: str, model: nn.Module) -> None:
        accuracies[name] = run.recall(name, lambda: top1(model, test_set, name))
        say(f"{name:6} top-1 {accuracies[name]}   (n = {len(test_set)})")

    measure("FP32", source.model)
    student = convert(copy.deepcopy(source.model), recipe)
    _quantize_activations(student, source.model, train_set, recipe, run)
    measure(f"W32{activations}", student)
    say(f"Stage 2: weights to {recipe.weight_bits} bits ({recipe.stage2.rounding})")
    stage2.quantize_weights(student, train_set, recipe)
    measure(f"{weights}{activations}", student)
    provenance = {
        **environment(),
        "source": source.source,
        "source_sha256": source.sha256,
        "train_data": {"path": str(train_set.source), "sha256": train_set.fingerprint, "images": len(train_set)},
        "test_data": {"path": str(test_set.source), "sha256": test_set.fingerprint, "images": len(test_set)},
        "seed": recipe.seed,
        "top1": {name: accuracy.to_dict() for name, accuracy in accuracies.items()},
    }
    checkpoint = Checkpoint(student, source.spec, source.preprocessing, source.label_names, recipe, provenance)
    save_checkpoint(checkpoint, out)
    run.finish()
    return accuracies


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
    student: nn.Module, teacher: nn.Module, images: ImageSet, recipe: Recipe, run: "_Run"
) -> None:
    state = run.state.get("stage1")
    run.say(f"Stage 1: activations to {recipe.activation_bits} bits")
    # Calibration also gives the scales their shapes, so that a stored state fits; it takes seconds.
    calibrate(student, images, recipe)
    if recipe.stage1.enabled:
        if state is not None:
            run.say(f"resuming Stage 1 at step {state['step']}")
        stage1.train(student, teacher, images, recipe, state, lambda content: run.save("stage1", content))


def _fingerprint(source: FloatModel, train_set: ImageSet, test_set: ImageSet, recipe: Recipe) -> str:
    """Identifies a run: only with the same inputs and recipe does it make sense to go on with it."""
    parts = [source.sha256, source.spec.architecture, json.dumps(source.spec.model_args, sort_keys=True, default=str)]
    parts += [train_set.fingerprint, test_set.fingerprint, json.dumps(recipe.to_dict(), sort_keys=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class _Run:
    """The state of a run on disk: written atomically, taken up if it belongs to the same inputs, removed at the end."""

    def __init__(self, out: Path, fingerprint: str, say: Say) -> None:
        self.path = out.with_name(f"{out.name}.resume")
        self.say = say
        self.state: dict[str, Any] = {"fingerprint": fingerprint, "accuracies": {}}
        if not self.path.exists():
            return
        try:
            stored = read_plain(self.path)
        except CheckpointError as error:
            say(f"ignoring the state of an earlier run: {error}")
            return
        if isinstance(stored, dict) and stored.get("fingerprint") == fingerprint:
            self.state = stored
        else:
            say(f"starting anew: {self.path} belongs to another model, data set or recipe")

    def recall(self, name: str, measure: Callable[[], Accuracy]) -> Accuracy:
        """An accuracy that an interrupted run has already measured, or a new measurement."""
        known = self.state["accuracies"].get(name)
        if known is not None:
            return Accuracy(**known)
        accuracy = measure()
        self.state["accuracies"][name] = {"correct": accuracy.correct, "n": accuracy.n}
        return accuracy

    def save(self, key: str, content: dict[str, Any]) -> None:
        self.state[key] = content
        write_plain(self.state, self.path)

    def finish(self) -> None:
        self.path.unlink(missing_ok=True)
