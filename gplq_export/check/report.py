"""What a check found, as data: the content of ``parity.json``.

The models below are the schema: ``gplq-export report --schema`` prints it as JSON Schema. Additive changes raise the
minor version, all others the major one; a newer major version is refused.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, field_validator

from gplq.errors import UsageError

SCHEMA_VERSION = "3.0"
_LARGEST = 64 * 2**20  # bytes of a report that is read: ours have a few hundred kilobytes


# What was measured may be infinite or no number at all, for which JSON has no notation.
Number = Annotated[float, WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]})]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    @field_validator("*", mode="before")
    @classmethod
    def _encodable(cls, value: Any) -> Any:
        return _encodable(value)


def _encodable(value: Any) -> Any:
    """Names of files that are not UTF-8 come with lone surrogates, which no JSON file can hold: "?" instead."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list | tuple):
        return [_encodable(each) for each in value]
    if isinstance(value, dict):
        return {_encodable(key): _encodable(each) for key, each in value.items()}
    return value


class Estimate(_Part):
    """A number measured on ``n`` images, and its 95 % interval: shares in per cent, cosines as they are."""

    value: Number
    low: Number
    high: Number
    n: int = Field(ge=0)


class Closeness(_Part):
    """How near some outputs are to the reference's, over ``n`` images.

    Of several outputs (feature maps) each number is the mean, or the worst.
    """

    n: int = Field(ge=0)
    agreement: Estimate | None = Field(description="images with the same label, in per cent; None without a classifier")
    cosine: Estimate = Field(description="of an image's outputs, mean")
    cosine_p01: Estimate = Field(description="the cosine that 99 % of the images exceed; interval by order statistics")
    sqnr_db: Number | None = Field(description="signal over difference, in energy; None: no difference")
    kl: Estimate | None = Field(description="divergence of the softmax, mean, in nats; None: no classifier")
    max_difference: Number = Field(description="largest absolute difference of an output")


class Top(_Part):
    """Accuracy against the labels, in per cent."""

    top1: Estimate
    top5: Estimate | None = Field(description="None with fewer than six classes")


class Flip(_Part):
    """An image that got another label."""

    image: str = Field(description="its name or number in the data")
    label: str | None = Field(description="what it is; None without labels")
    reference: str = Field(description="what the reference says")
    candidate: str
    picture: str | None = Field(description="a thumbnail: PNG in base64; only the first few have one")


class Layer(_Part):
    """A quantiser or a block, in the order in which the network computes them.

    ``steps``: how many codes differ by 1, by 2, and by more.
    """

    name: str
    kind: Literal["quantizer", "block"]
    total: int = Field(ge=0, description="codes compared; 0 for what has none")
    different: int = Field(ge=0)
    steps: tuple[int, int, int]
    max_step: int = Field(ge=0)
    sqnr_db: Number | None = Field(description="of the dequantised codes, or of a block's output; None: no difference")
    share: Estimate | None = Field(description="of an image's codes, how many per cent differ; mean over the images")
    floor: Estimate | None = Field(description="the same between the reference and itself, see Pair")
    inside: bool = Field(description="within the band that the floor gives")


class Forced(_Part):
    """Teacher-forced: fed the reference's own tensors, what comes out?"""

    images: int
    quantizers: list[Layer] = Field(description="fed the reference's input, each must return its codes, all of them")
    grid: dict[str, int] = Field(description="codes that differ for numbers on and around every step and limit")
    linears: dict[str, Number] = Field(description="largest difference of an output channel, relative to its range")
    floats: dict[str, Number] = Field(description="the same of what each quantiser reads, all codes before it fed")
    outputs: dict[str, Number] = Field(description="the same of the network's outputs")
    blocks: list[Layer] = Field(description="fed the reference's block input: codes up to the next block's first")


class Pair(_Part):
    """A reference and what is to compute the same."""

    name: str = Field(description="such as twin-fp32, int4, cpu, trt-int4.plan")
    reference: str
    candidate: str
    file: str | None = Field(description="of the export")
    skipped: str | None = Field(description="why it was not compared; None if it was")
    found: Closeness | None = None
    floor: Closeness | None = Field(None, description="the reference against itself in another order or precision")
    floor_is: str | None = Field(None, description="what the floor is made of, in words")
    reference_top: Top | None = None
    candidate_top: Top | None = None
    lost: int = Field(0, description="images that only the reference gets right")
    won: int = Field(0, description="images that only the candidate gets right")
    flips: list[Flip] = Field(default_factory=list, description="images with another label, the first 200")
    layers: list[Layer] = Field(default_factory=list, description="free-running")
    forced: Forced | None = None
    debug: str | None = Field(None, description="what marking inner tensors changed in a file that is optimised")
    scatter: list[tuple[Number, Number]] = Field(default_factory=list, description="some outputs: reference, candidate")


class Gate(_Part):
    """One thing that is judged. ``found`` and ``limit`` are in ``unit``."""

    id: str = Field(description="pair and metric: cpu.forced.codes; stable from version to version")
    pair: str = Field(description="or export, data, latency")
    metric: str
    layer: str | None
    status: Literal["passed", "failed", "skipped", "reported"]
    found: Number | None
    low: Number | None = Field(description="favourable and unfavourable end of the interval, whichever way they lie")
    high: Number | None
    limit: Number | None
    unit: str
    n: int = Field(ge=0)
    sentence: str = Field(description="what came out; if it failed, what that means and what to do")
    why: str = Field(description="why the limit is what it is")


class File(_Part):
    """A file of the export, as the manifest lists it."""

    bytes: int = Field(ge=0)
    sha256: str


class Data(_Part):
    """What was fed."""

    source: str
    sha256: str
    images: int
    labels: bool
    random: bool = Field(description="random numbers instead of images, asked for by a flag")
    transform: list[str] = Field(description="from the image to the tensor, a step each")


class Subject(_Part):
    """What was checked. ``chain``: SHA-256 from the float weights to the plans, each with what it was made from."""

    architecture: str
    checkpoint: str
    checkpoint_sha256: str
    recipe: dict[str, Any]
    files: dict[str, File]
    chain: list[str]
    bytes: dict[str, int] = Field(description="of the INT4 file, by what they hold")
    precision: dict[str, str] = Field(description="engine or file -> what multiplies in what, as it was read back")
    floats: dict[str, str] = Field(description="modules that stay in floating point, with the reason")


class Latency(_Part):
    """Times of one back end at one batch, from :mod:`gplq_export.bench`."""

    name: str
    baseline: str
    batch: int
    median_ms: Number
    p95_ms: Number
    p99_ms: Number
    quantiles_ms: list[Number] = Field(description="at 0, 5, 10 ... 100 per cent of the calls")
    verdict: str = Field(description="against the baseline: faster, slower, no measurable difference")
    ratio: Number | None = Field(description="of the time to the baseline's; None of the baseline itself")
    spread: Number | None


class Report(_Part):
    """A check as a whole."""

    schema_version: str = SCHEMA_VERSION
    tool: Literal["gplq-export check"] = "gplq-export check"
    tool_version: str
    created_utc: str
    command: list[str]
    seconds: Number
    python: str
    platform: str
    versions: dict[str, str]
    subject: Subject
    data: Data
    thresholds_version: str
    gates: list[Gate]
    pairs: list[Pair]
    latency: list[Latency] = Field(default_factory=list)
    latency_machine: dict[str, Any] = Field(default_factory=dict)

    @property
    def failed(self) -> list[Gate]:
        """The gates that failed, in the order in which a fault travels: what stands first is the cause."""
        return [gate for gate in self.gates if gate.status == "failed"]

    def pair(self, name: str) -> Pair | None:
        """A pair by its name."""
        return next((pair for pair in self.pairs if pair.name == name), None)

    def to_json(self) -> str:
        """As it is written to ``parity.json``."""
        return self.model_dump_json(indent=1) + "\n"


def failure(report: Report) -> str:
    """What failed first, in one sentence, and how many gates more."""
    first, *others = report.failed
    return f"{first.id}: {first.sentence}" + (f" {len(others)} more gates failed." if others else "")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of ``parity.json``."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema(mode="serialization")}


def read_report(path: Path) -> Report:
    """Read a ``parity.json``.

    Raises:
        UsageError: there is none, it is none of ours, it is damaged or from a newer version.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"{path} has {path.stat().st_size:,} bytes: it is no report of gplq-export check.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a report: {error}. 'gplq-export check' writes them.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, str) or content.get("tool") != "gplq-export check":
        raise UsageError(f"{path} is no report of gplq-export check.")
    if version.partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
        raise UsageError(
            f"{path} has schema version {version}, this gplq reads {SCHEMA_VERSION.partition('.')[0]}.x. "
            "Check again with this version, or install the one that wrote it."
        )
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"{path} is damaged or was altered: {where}: {first['msg']}.") from error
