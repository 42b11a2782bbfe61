"""Stage 1, Act-QAT: one epoch with quantised activations and FP32 weights at a tiny learning rate.

Loss = cross-entropy + alpha * L_PCA (GPLQ, Eq 2); the teacher is the float model itself. The student runs in
evaluation mode: it should mimic what is deployed, so nothing in it is random (no dropout, no stochastic depth).
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gplq.calibrate import activation_quantizers
from gplq.data import ImageSet, batches, draw
from gplq.errors import GateError
from gplq.pca import classify, fit_pca, pca_loss, penultimate
from gplq.progress import progress
from gplq.recipe import Recipe

SaveState = Callable[[dict[str, Any]], None]


def train(
    student: nn.Module,
    teacher: nn.Module,
    images: ImageSet,
    recipe: Recipe,
    state: dict[str, Any] | None,
    save: SaveState,
) -> None:
    """Train a converted and calibrated ``student`` in place.

    Args:
        student: the converted model; changed in place.
        teacher: the float model.
        images: training images.
        recipe: every setting.
        state: what ``save`` was given in an interrupted run with the same inputs, to go on from there; or None.
        save: called with the state every ``recipe.stage1.checkpoint_seconds``, on an interruption, and at the end.

    Raises:
        GateError: the loss became NaN or infinite.
    """
    settings = recipe.stage1
    optimizer = _optimizer(student, recipe)
    step, directions = 0, None
    if state is not None:
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        step, directions = state["step"], state["directions"]
    if directions is None and settings.alpha > 0:
        directions = fit_pca(teacher, images, recipe.calibration.images, settings.pca_variance, recipe.seed)

    def snapshot() -> dict[str, Any]:
        return {
            "student": student.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "directions": directions,
        }

    order = _order(len(images), recipe)
    steps, batch_size = len(order) // settings.batch_size, settings.batch_size
    remaining = order[step * batch_size : steps * batch_size]
    last_save = time.monotonic()
    with progress(steps * batch_size, "Stage 1: Act-QAT", "image", initial=step * batch_size) as bar:
        try:
            for inputs, labels in batches(images, batch_size, remaining):
                with _whole_step():
                    loss, mimicry = _step(student, teacher, optimizer, inputs, labels, directions, settings.alpha)
                    step += 1
                if not torch.isfinite(torch.tensor(loss)):
                    raise GateError(f"Stage 1: the loss is {loss} at step {step}. Lower stage1.lr or stage1.scale_lr.")
                bar.set_postfix(
                    loss=f"{loss:.3f}", pca=f"{mimicry:.3f}", lr=f"{settings.learning_rate():.1e}", refresh=False
                )
                bar.update(len(labels))
                if time.monotonic() - last_save > settings.checkpoint_seconds:
                    save(snapshot())
                    last_save = time.monotonic()
        except KeyboardInterrupt:
            save(snapshot())
            raise
    save(snapshot())


@contextlib.contextmanager
def _whole_step() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block: a state with half a step in it could not be resumed exactly."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # only the main thread may set a handler, and one that is not Python's own is not ours to replace
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


def _order(total: int, recipe: Recipe) -> list[int]:
    """The images of the whole training, in order. Drawn in one go, so that a resumed run sees the same ones."""
    settings = recipe.stage1
    count = min(total, settings.max_images or total)
    # An epoch's incomplete last batch is dropped, unless the set is smaller than one batch.
    count = max(count // settings.batch_size, 1) * settings.batch_size
    order: list[int] = []
    for epoch in range(settings.epochs):
        drawn = draw(total, count, recipe.seed + 1 + epoch)
        order += (drawn * (count // len(drawn) + 1))[:count]
    return order


def _optimizer(student: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    scales = [quantizer.log_scale for quantizer in activation_quantizers(student).values()]
    ids = {id(parameter) for parameter in scales}
    weights = [parameter for parameter in student.parameters() if id(parameter) not in ids]
    settings = recipe.stage1
    return torch.optim.AdamW(
        [
            {"params": weights, "lr": settings.learning_rate(), "weight_decay": settings.weight_decay},
            {"params": scales, "lr": settings.scale_lr, "weight_decay": 0.0},
        ]
    )


def _step(
    student: nn.Module,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    directions: torch.Tensor | None,
    alpha: float,
) -> tuple[float, float]:
    """One step of training; returns the total loss and the PCA loss before it."""
    features = penultimate(student, inputs)
    loss = F.cross_entropy(classify(student, features), labels)
    mimicry = loss.new_zeros(())
    if directions is not None:
        with torch.no_grad():
            target = penultimate(teacher, inputs)
        mimicry = pca_loss(features, target, directions)
        loss = loss + alpha * mimicry
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item(), mimicry.item()
