"""Stage 1, Act-QAT: one epoch with quantised activations and FP32 weights at a tiny learning rate.

Loss = task_weight * cross-entropy + alpha * L_PCA (GPLQ, Eq 2); the teacher is the float model itself. Another task,
such as detection, brings a loss of its own. The student of a classification runs in evaluation mode: it should mimic
what is deployed, so nothing in it is random (no dropout, no stochastic depth).
"""

import contextlib
import copy
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gplq.calibrate import activation_quantizers
from gplq.data import ImageSet, batches, draw
from gplq.errors import ConfigError, GateError, ModelError, UsageError
from gplq.lsq import recompute_quantized
from gplq.pca import Features, fit_pca, pca_loss
from gplq.processes import are_to_shard, average, computes_in_bf16, device_of, first_says, processes, total
from gplq.progress import progress
from gplq.recipe import Precision, Recipe, Stage1
from gplq.shard import divide_like, gather, gather_on_first, local, shard

SaveState = Callable[[dict[str, Any]], None]
# (model, batch) -> the loss, a mean over the batch's images; or its terms by name, which are summed.
Loss = Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]]
# First optimiser step -> the micro-batches of this process from there on, ``recipe.stage1.accumulate`` for each step.
MicroBatches = Callable[[int], Iterable[Any]]

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    student: nn.Module,
    teacher: nn.Module,
    images: ImageSet,
    recipe: Recipe,
    state: dict[str, Any] | None,
    save: SaveState,
) -> None:
    """Train a converted and calibrated classifier in place.

    Args:
        student: the converted model; changed in place.
        teacher: the float model, on any device. It is not changed: Stage 1 works with a copy, see :func:`make_teacher`.
        images: training images; their labels are not looked at if ``recipe.stage1.task_weight`` is 0.
        recipe: every setting.
        state: what ``save`` was given in an interrupted run with the same inputs, to go on from there; or None.
        save: called with the state every ``recipe.stage1.checkpoint_seconds``, on an interruption, and at the end.

    Raises:
        GateError: the loss or a gradient became NaN or infinite.
    """
    settings = recipe.stage1
    directions: Tensor | None = None
    if settings.alpha > 0:
        teacher = copy.deepcopy(teacher).to(device_of(student))
        if state is not None:
            directions = state["directions"].to(device_of(student))
        else:
            count, variance = recipe.calibration.images, settings.pca_variance
            directions = fit_pca(teacher, images, count, variance, recipe.seed, settings.pca_dimensions)
        make_teacher(teacher, settings)
    order = _order(len(images), recipe)
    micro_batch = micro_batch_size(recipe)

    def micro_batches(step: int) -> Iterable[Any]:
        ours = _ours(order[step * settings.batch_size :], micro_batch)
        return batches(images, micro_batch, ours, never_empty=True)

    with Features(student) as features, Features(teacher) as targets:
        optimise(
            student,
            distillation(teacher, features, targets, directions, settings),
            micro_batches,
            len(order) // settings.batch_size,
            recipe,
            state,
            lambda content: save({**content, "directions": directions}),
        )


def make_teacher(model: nn.Module, settings: Stage1) -> None:
    """Prepare a float model, in place, for the forward passes of a teacher.

    Its linears and convolutions hold their weights in the precision to which autocast would round them at each step.
    """
    model.requires_grad_(False)
    dtype = AUTOCAST[teacher_precision(settings, device_of(model))]
    for module in model.modules():
        if dtype is not None and isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)


def teacher_precision(settings: Stage1, device: torch.device) -> Precision:
    """Of the teacher's forward pass: the recipe's, else BF16 where the device computes in it, else the student's.

    BF16 moves a ViT-S's features by 1.5 %, 4-bit activations before training by 60 %; it takes a third of the time of
    FP32, but on a processor that has to emulate it four times as long.
    """
    if settings.teacher_precision is not None:
        return settings.teacher_precision
    return "bf16" if settings.precision == "fp32" and computes_in_bf16(device) else settings.precision


def _autocast(precision: Precision, device: torch.device) -> torch.autocast:
    dtype = AUTOCAST[precision]
    # A weight is used once in a forward pass, so that keeping its conversion would only cost memory.
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)


def distillation(
    teacher: nn.Module, features: Features, targets: Features, directions: Tensor | None, settings: Stage1
) -> Loss:
    """The objective of :func:`train` on batches (images, labels).

    ``teacher``: see :func:`make_teacher`; ``features``, ``targets``: of the student and of the teacher; ``directions``:
    [D, k], see :func:`gplq.pca.fit_pca`; None for no PCA loss.
    """

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        inputs, labels = batch
        if directions is not None:  # first, while the student's activations do not take memory yet
            with torch.no_grad(), _autocast(teacher_precision(settings, inputs.device), inputs.device):
                teacher(inputs)
        logits = model(inputs)
        terms = {}
        if settings.task_weight > 0:
            terms["task"] = settings.task_weight * F.cross_entropy(logits.float(), labels)
        if directions is not None:
            terms["pca"] = settings.alpha * pca_loss(features.value, targets.value, directions)
        return terms

    return loss


def optimise(
    student: nn.Module,
    loss: Loss,
    micro_batches: MicroBatches,
    steps: int,
    recipe: Recipe,
    state: dict[str, Any] | None,
    save: SaveState,
) -> None:
    """Train a converted and calibrated model for any task, in place; see :func:`train`, which is built on it.

    Args:
        student: the converted model, in the mode (training, evaluation) that the loss wants.
        loss: the objective.
        micro_batches: the data. It must return the same batches in the same order at each call.
        steps: of the optimiser.
        recipe: every setting.
        state: see :func:`train`.
        save: see :func:`train`.

    Raises:
        GateError: the loss or a gradient became NaN or infinite. The step is not taken; what was saved before stays.
        UsageError: with several processes, the loss depends on some parameters in one step and not in another.
    """
    settings = recipe.stage1
    trainer = Trainer(student, loss, recipe)
    if state is not None:
        trainer.load(state)
    last_save = time.monotonic()
    with (
        trainer,
        progress(steps * settings.batch_size, "Stage 1: Act-QAT", "image", trainer.step * settings.batch_size) as bar,
    ):
        try:
            remaining = iter(micro_batches(trainer.step))
            while trainer.step < steps:
                parts = list(itertools.islice(remaining, settings.accumulate))
                with _whole_step():
                    terms = trainer.advance(parts)
                shown = {name: f"{value:.3f}" for name, value in terms.items()}
                bar.set_postfix({**shown, "lr": f"{settings.learning_rate():.1e}"}, refresh=False)
                bar.update(settings.batch_size)
                if first_says(time.monotonic() - last_save > settings.checkpoint_seconds):
                    save(trainer.state())
                    last_save = time.monotonic()
        except KeyboardInterrupt:
            if not trainer.sharded:  # else all processes would have to be here, after the same step
                save(trainer.state())
            raise
    save(trainer.state())


class _Objective(nn.Module):
    """The loss as the module that DDP or FSDP wraps: it works whatever the loss calls on the model."""

    def __init__(self, student: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.student = student
        self.loss = loss

    def forward(self, batch: Any) -> dict[str, Tensor]:
        result = self.loss(self.student, batch)
        return {"loss": result} if isinstance(result, Tensor) else dict(result)


class Trainer:
    """The student with its optimiser: what one step is, and what makes it resumable. A context manager."""

    def __init__(self, student: nn.Module, loss: Loss, recipe: Recipe) -> None:
        self.settings, self.seed = recipe.stage1, recipe.seed
        self.device, self.sharded = device_of(student), are_to_shard()
        if "fp16" in (self.settings.precision, self.settings.teacher_precision) and self.device.type != "cuda":
            raise ConfigError("stage1.precision fp16 needs a CUDA GPU. Use bf16 or fp32.")
        if self.settings.precision == "fp16" and self.sharded:
            raise ConfigError("stage1.precision fp16 does not go with FSDP. Use bf16.")
        self.whole = student
        self.student = copy.deepcopy(student.cpu()) if self.sharded else student
        self.step = 0
        self.quantizers = list(activation_quantizers(self.student).values())
        self.frozen = [] if self.settings.train_weights else self._weights()
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        self._checkpointing(self.settings.gradient_checkpointing)
        for module in _caching(self.student):
            module.training = True  # itself, not what is in it
        self.objective: nn.Module = _Objective(self.student, loss)
        if self.sharded:
            shard(self.objective, [quantizer.raw_scale for quantizer in self.quantizers], self.device)
        elif processes().num_processes > 1:
            index = None if self.device.type == "cpu" else [self.device]
            # Static: which parameters are not part of the loss (the classifier without labels, a bias that conversion
            # has replaced) is seen in the first step, and not looked for in each.
            self.objective = DistributedDataParallel(self.objective, device_ids=index, static_graph=True)
        self.optimizer = self._optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings.precision == "fp16")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._checkpointing(False)
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.optimizer.zero_grad(set_to_none=True)
        if self.sharded:
            if kind is None:  # else the other processes may be elsewhere
                target = self.whole.state_dict()
                for name, tensor in self.student.state_dict().items():
                    target[name].copy_(gather(tensor))
            self.whole.to(self.device)
        for module in _caching(self.whole):
            module.eval()  # drops what it has kept

    def _checkpointing(self, enable: bool) -> None:
        switch = getattr(self.student, "set_grad_checkpointing", None)
        if switch is not None:
            switch(enable)
        elif enable:
            name = type(self.student).__name__
            raise ModelError(f"{name} has no gradient checkpointing: set stage1.gradient_checkpointing to false.")

    def _weights(self) -> list[nn.Parameter]:
        """What learns beside the scales."""
        scales = {id(quantizer.raw_scale) for quantizer in self.quantizers}
        return [p for p in self.student.parameters() if p.requires_grad and id(p) not in scales]

    def _optimizer(self) -> torch.optim.AdamW:
        settings = self.settings
        scales = [quantizer.raw_scale for quantizer in self.quantizers]
        groups: list[dict[str, Any]] = [{"params": scales, "lr": settings.scale_lr, "weight_decay": 0.0}]
        if settings.train_weights:
            weights = {"params": self._weights(), "lr": settings.learning_rate(), "weight_decay": settings.weight_decay}
            groups.append(weights)
        return torch.optim.AdamW(groups)

    def state(self) -> dict[str, Any]:
        """Everything that the steps to come depend on; the tensors are the live ones.

        If they are divided among the processes, all of these have to ask, and the first one is told: see
        :func:`gplq.shard.gather_on_first`. The state does not depend on how many they are.
        """
        state = {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
        }
        return gather_on_first(state) if self.sharded else state

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state, which each process has as a whole."""
        own = self.student.state_dict()
        self.student.load_state_dict(
            {name: divide_like(tensor, own[name]) for name, tensor in state["student"].items()}
        )
        # The optimiser's state has its parameters' numbers for keys.
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = {
            number: {name: divide_like(tensor, parameters[number]) for name, tensor in entry.items()}
            for number, entry in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

    def advance(self, parts: Sequence[Any]) -> dict[str, float]:
        """One optimiser step on some micro-batches; returns the terms of the loss before it, means over all images.

        Raises:
            GateError: see :func:`optimise`.
            UsageError: see :func:`optimise`.
        """
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):
            # A loss that draws random numbers (dropout, sampled boxes) draws the same ones after an interruption.
            torch.manual_seed(1_000_003 * self.seed + self.step)
            try:
                return self._advance([send_to_device(part, self.device) for part in parts])
            except RuntimeError as error:
                if "static_graph" not in str(error):
                    raise
                raise UsageError(
                    f"Stage 1: at step {self.step + 1} the loss depends on other parameters than at first, which "
                    "several processes cannot average: multiply the part of the loss that does not apply by 0."
                ) from error

    def _advance(self, parts: Sequence[Any]) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        for part in parts:
            terms = self._terms(self.objective, part)
            share = torch.stack(list(terms.values())).sum() / len(parts)
            self.scaler.scale(share).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() / len(parts)
        if self.sharded:
            scales = [quantizer.raw_scale.grad for quantizer in self.quantizers]
            average([gradient for gradient in scales if gradient is not None])
        found = total(torch.stack([*sums.values(), self._gradient_norm()])) / processes().num_processes
        *means, norm = found.tolist()
        if not all(map(math.isfinite, [*means, norm])):
            self._diverged(parts, means)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for quantizer in self.quantizers:
            quantizer.guard()
        self.step += 1
        return dict(zip(sums, means, strict=True))

    def _terms(self, objective: nn.Module, part: Any) -> dict[str, Tensor]:
        recompute = contextlib.nullcontext() if self.settings.gradient_checkpointing else recompute_quantized()
        with recompute, _autocast(self.settings.precision, self.device):
            terms: dict[str, Tensor] = objective(part)
            return terms

    def _gradient_norm(self) -> Tensor:
        """Of what this process holds; finite if all of that is."""
        if self.scaler.is_enabled():  # it skips a step that is not by itself, and lowers its factor
            return torch.zeros((), device=self.device)
        gradients = [local(parameter.grad) for parameter in self.student.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _diverged(self, parts: Sequence[Any], means: Sequence[float]) -> None:
        where = next((name for part in parts if (name := self._first_bad_layer(part)) is not None), None)
        what = "a gradient is not finite" if all(map(math.isfinite, means)) else f"the loss is {sum(means)}"
        layer = "every layer's output is finite" if where is None else f"first in layer '{where}'"
        raise GateError(
            f"Stage 1: {what} at step {self.step + 1} ({layer}); that step was not taken. Lower stage1.lr or "
            "stage1.scale_lr, or use stage1.precision fp32."
        )

    @torch.no_grad()
    def _first_bad_layer(self, part: Any) -> str | None:
        """The first layer whose output is not finite on a micro-batch, by running it once more."""
        found: list[str] = []

        def look(name: str, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        handles = [
            module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
            for name, module in self.student.named_modules()
            if next(module.children(), None) is None
        ]
        objective = self.objective.module if isinstance(self.objective, DistributedDataParallel) else self.objective
        self._terms(objective, part)
        for handle in handles:
            handle.remove()
        return found[0] if found else None


def _caching(model: nn.Module) -> list[nn.Module]:
    """Attentions that outside of training mode keep a copy of their biases, which would then never learn (LeViT)."""
    return [module for module in model.modules() if hasattr(module, "attention_bias_cache")]


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


def micro_batch_size(recipe: Recipe) -> int:
    """Images that a process computes at a time.

    Raises:
        ConfigError: the batch cannot be divided evenly.
    """
    settings, count = recipe.stage1, int(processes().num_processes)
    if settings.batch_size % (settings.accumulate * count):
        raise ConfigError(
            f"stage1.batch_size {settings.batch_size} is not divisible by {count} processes times "
            f"stage1.accumulate {settings.accumulate}."
        )
    return settings.batch_size // (settings.accumulate * count)


def _ours(order: list[int], micro_batch: int) -> list[int]:
    """The images of this process: of each micro-batch of all processes together, its part."""
    rank, together = processes().process_index, micro_batch * processes().num_processes
    return [
        index
        for start in range(0, len(order), together)
        for index in order[start + rank * micro_batch : start + (rank + 1) * micro_batch]
    ]


def _order(images: int, recipe: Recipe) -> list[int]:
    """The images of the whole training, in order. Drawn in one go, so that a resumed run sees the same ones."""
    settings = recipe.stage1
    count = min(images, settings.max_images or images)
    # An epoch's incomplete last batch is dropped, unless the set is smaller than one batch.
    count = max(count // settings.batch_size, 1) * settings.batch_size
    order: list[int] = []
    for epoch in range(settings.epochs):
        drawn = draw(images, count, recipe.seed + 1 + epoch)
        order += (drawn * (count // len(drawn) + 1))[:count]
    return order
