"""Recipes: every number that decides how a model is quantised, as frozen models; YAML is their text form.

Unknown keys and impossible values are errors that name the nearest valid key. ``gplq recipe`` prints the defaults.
"""

import difflib
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from gplq.errors import ConfigError

Range = Literal["minmax", "percentile", "mse"]
Precision = Literal["fp32", "bf16", "fp16"]
Granularity = Literal["per_channel", "per_tensor"]

# The learning rates that the paper used at each batch size (GPLQ, Table 9).
PAPER_LEARNING_RATES = {128: 5e-6, 64: 2.5e-6, 32: 1e-6, 16: 1e-6}


# Of an operand without codes.
FLOAT_BITS = 16

# What a recipe of before 2026-11-29 meant without naming it.
_BEFORE: dict[str, dict[str, Any]] = {
    "calibration": {"rotate": False, "importance": "none", "centre": False},
    "stage2": {"importance": "none"},
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Calibration(_Section):
    """Where the activation quantisers start."""

    images: int = Field(256, ge=1, description="training images, drawn at random, that are looked at")
    rotate: bool = Field(True, description="exact change of basis that spreads outliers over all channels")
    importance: Literal["none", "gradient"] = Field(
        "gradient", description="errors count by how much the features depend on them; none: all alike"
    )
    centre: bool = Field(True, description="keys and values lose their mean; changes no output")
    linear_range: Range = Field("mse", description="range of the inputs of linears (the paper: minmax)")
    matmul_range: Range = Field("mse", description="range of q, k, v and softmax (the paper: percentile)")
    equalize: bool = Field(
        True, description="queries and keys, values and what is projected exchange ranges; changes no output"
    )
    shift: bool = Field(True, description="what hardly goes below zero (GELU) is shifted onto the unsigned grid")
    percentile: float = Field(1.0, gt=0, lt=50, description="the lower percentile; the upper mirrors it")


class Stage1(_Section):
    """Act-QAT: activations to 4 bits, weights in FP32 and trained at a tiny learning rate."""

    enabled: bool = True
    granularity: Granularity = Field("per_channel", description="activation scales of linears fed by a norm or GELU")
    epochs: int = Field(1, ge=1)
    max_images: int | None = Field(None, ge=1, description="stop an epoch after this many images")
    batch_size: int = Field(128, ge=1, description="images an optimiser step, over all processes")
    accumulate: int = Field(1, ge=1, description="parts in which a process computes its share of a batch, for memory")
    precision: Precision = Field("fp32", description="of matmuls; quantisers stay in FP32")
    teacher_precision: Precision | None = Field(
        None, description="of the teacher's forward pass; none: bf16 where the device computes in it, else as precision"
    )
    gradient_checkpointing: bool = Field(False, description="a third more time for a fraction of the memory")
    lr: float | None = Field(
        None, gt=0, description="AdamW learning rate of weights; none: the paper's for the batch size"
    )
    train_weights: bool = Field(True, description="false: only the scales learn")
    scale_lr: float = Field(1e-3, ge=0, description="learning rate of the scales; 0: they stay as calibrated")
    scale_parametrization: Literal["log", "linear"] = Field(
        "log", description="what is learned; log: scale_lr is a fraction of each scale, linear: an absolute step"
    )
    scale_gradient_factor: bool = Field(True, description="LSQ's 1 / sqrt(values * highest code)")
    weight_decay: float = Field(0.0, ge=0)
    task_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy; 0: labels are not needed")
    alpha: float = Field(1.0, ge=0, description="weight of the PCA loss (Eq 2)")
    pca_variance: float = Field(0.6, gt=0, le=1, description="share of the teacher features' variance that is kept")
    pca_dimensions: int | None = Field(None, ge=1, description="directions that are kept, instead of pca_variance")
    checkpoint_seconds: float = Field(60, gt=0, description="how often the state for resuming is written")

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Stage1":
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        if self.task_weight == self.alpha == 0:
            raise ValueError("task_weight and alpha are both 0, so that there is nothing to learn")
        if not self.train_weights and self.scale_lr == 0:
            raise ValueError("train_weights is false and scale_lr 0, so that nothing learns")
        return self

    def learning_rate(self) -> float:
        """The AdamW learning rate: the recipe's, else the paper's for the nearest batch size not above this one."""
        if self.lr is not None:
            return self.lr
        known = [size for size in PAPER_LEARNING_RATES if size <= self.batch_size]
        return PAPER_LEARNING_RATES[max(known, default=16)]


class LearnedRounding(_Section):
    """Rounding learned by gradient, block by block (AdaRound)."""

    iterations: int = Field(1000, ge=1, description="steps of Adam for each block")
    lr: float = Field(1e-2, gt=0)
    regularisation: float = Field(0.1, gt=0, description="weight of the term that drives each weight to one code")


class Stage2(_Section):
    """Weights to 4 bits, without training."""

    granularity: Granularity = Field("per_channel", description="weight scales: one an output channel, or one in all")
    range: Literal[Range, "output"] = Field(
        "output", description="output: several scales are tried, and the layer's output decides"
    )
    percentile: float = Field(0.1, gt=0, lt=50, description="share of each channel's largest weights that is clipped")
    rounding: Literal["nearest", "gptq", "adaround"] = Field(
        "gptq", description="gptq: second-order, on quantised inputs; adaround: then learned per block, slower"
    )
    compensation: Literal["none", "ridge", "qwt"] = Field(
        "none", description="ridge: regression folded into the linears; qwt: a float linear beside each block (Eq 3)"
    )
    importance: Literal["none", "gradient"] = Field(
        "gradient", description="tokens count by how much the features depend on them; none: all alike"
    )
    bias_correction: bool = Field(False, description="biases absorb the mean error of rounding, over all tokens")
    images: int = Field(512, ge=1, description="training images for all statistics; a fifth of them only to judge")
    damping: float = Field(0.01, gt=0, description="share of the Hessian's mean diagonal that is added to it")
    ridge: float = Field(1.0, gt=0, description="lambda of the regressions, as a share of the mean squared input")
    adaround: LearnedRounding = LearnedRounding()


class Limits(_Section):
    """How close to the float model the result has to be; 0 lets anything pass."""

    agreement: float = Field(66.0, ge=0, le=100, description="per cent of images that get the float model's label")
    cosine: float = Field(0.8, ge=0, le=1, description="of the features, mean over images")

    def misses_agreement(self, interval: tuple[float, float]) -> bool:
        """Whether too few labels agree, given the 95 % interval of the share: few images alone condemn nobody."""
        return interval[1] < self.agreement

    def misses_cosine(self, cosine: float) -> bool:
        """Whether features are too far apart; NaN is no closeness."""
        return not cosine >= self.cosine


class Recipe(_Section):
    """Everything that decides how a model is quantised."""

    weight_bits: int = Field(4, ge=2, le=8)
    activation_bits: int = Field(4, ge=2, le=8)
    matmul_bits: int = Field(
        8,
        ge=2,
        le=16,
        description="queries, keys and values: engines multiply them in INT8 whatever their bits; "
        "16: products of activations stay in floating point",
    )
    first_last_bits: int = Field(8, ge=4, le=8, description="patch embedding and classifier, weights and inputs")
    softmax_bits: int = Field(
        7, ge=2, le=7, description="attention probabilities; 7: all of INT8's, with which engines fuse an attention"
    )
    softmax_scale: Literal["learned", "full"] = Field("learned", description="full: the codes span 0 to 1, always")
    scale_grid: Literal["fp16", "exact"] = Field("fp16", description="which scales are allowed; see gplq.grid")
    seed: int = Field(0, ge=0)
    calibration: Calibration = Calibration()
    stage1: Stage1 = Stage1()
    stage2: Stage2 = Stage2()
    limits: Limits = Limits()

    def bits(self) -> str:
        """Which bits what has, in one line.

        >>> Recipe().bits()
        'W4A4: queries, keys and values 8 bits, attention probabilities 7, first and last layer 8'
        """
        products = f"queries, keys and values {self.matmul_bits} bits, attention probabilities {self.softmax_bits}"
        if not self.quantizes_products():
            products = "attention's products in floating point"
        return f"W{self.weight_bits}A{self.activation_bits}: {products}, first and last layer {self.first_last_bits}"

    def quantizes_products(self) -> bool:
        """Whether the operands of products of activations get codes; if not, ``softmax_bits`` has nothing to say."""
        return self.matmul_bits != FLOAT_BITS

    @pydantic.field_validator("matmul_bits")
    @classmethod
    def _codes_or_float(cls, bits: int) -> int:
        if 8 < bits < FLOAT_BITS:
            raise ValueError("codes have 2 to 8 bits; 16 means none, in floating point")
        return bits

    @classmethod
    def from_yaml(cls, path: Path) -> "Recipe":
        """Read and validate a recipe.

        Raises:
            ConfigError: the file is missing or not YAML, a key is unknown, or a value is of the wrong type or range.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"cannot read the recipe {path}: {error.strerror}. Give the path of a YAML file."
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            first_line = " ".join(str(error).split())
            raise ConfigError(f"the recipe {path} is not valid YAML: {first_line}") from error
        return cls.from_dict({} if content is None else content, source=str(path))

    @classmethod
    def from_dict(cls, content: Any, source: str = "recipe") -> "Recipe":
        """Validate plain data; see :meth:`from_yaml` for what it raises."""
        if not isinstance(content, dict):
            raise ConfigError(f"{source}: a recipe is a mapping of keys to values, not a {type(content).__name__}.")
        try:
            return cls.model_validate(content)
        except pydantic.ValidationError as error:
            lines = [f"  {_explain(problem)}" for problem in error.errors()]
            raise ConfigError("\n".join([f"{source} is not a valid recipe:", *lines])) from error

    @classmethod
    def from_record(cls, content: Any, source: str) -> "Recipe":
        """A recipe out of a checkpoint: settings that did not exist when it was written have the values of that time.

        What was written is complete, so that a missing key is a younger one. See :meth:`from_yaml` for what it raises.
        """
        if isinstance(content, dict):
            sections = {
                key: {**before, **content[key]} for key, before in _BEFORE.items() if isinstance(content.get(key), dict)
            }
            content = {"matmul_bits": content.get("activation_bits", 4), **content, **sections}
        return cls.from_dict(content, source)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: nested dicts of numbers, strings, booleans and None."""
        return self.model_dump()

    def to_yaml(self) -> str:
        """The recipe as YAML, every key written out."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _explain(problem: Any) -> str:
    """One line for one of pydantic's problems, with the nearest key for an unknown one."""
    *parents, key = problem["loc"]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{where}: {problem['msg']}, found {problem['input']!r}"
    section: Any = Recipe
    for parent in parents:
        section = section.model_fields[parent].annotation
    nearest = difflib.get_close_matches(str(key), section.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"known keys: {', '.join(section.model_fields)}."
    return f"{where}: unknown key; {hint}"
