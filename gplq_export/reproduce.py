"""``reproduce.sh`` of an export: the commands from the float weights to the check, to be run again by anybody.

The script is bash. It verifies its inputs before it starts, sets what decides the last bits (versions on request,
threads, device; the seed is in the recipe, which is part of the script), quantises, says whether the network came out
bit-identical, exports and checks. On the same machine it does. Another one adds up in another order; what must hold
there, too, is what the check tests.

What a checkpoint says about its origin may have been written by anybody: it is quoted, or not used if it has not the
expected form.
"""

import argparse
import hashlib
from collections.abc import Collection, Iterator, Sequence
from shlex import quote
from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints, ValidationError
from torch import nn

from gplq import __version__
from gplq.checkpoint import Checkpoint
from gplq.preprocessing import GIVEN, SETTINGS, option
from gplq.provenance import PACKAGES, environment
from gplq_export.manifest import CHECKPOINT

_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}(/[a-z_]+)?$")]  # see gplq.sources
_Version = Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z.!+]+$")]


class _Arguments(BaseModel):
    data: str
    eval_data: str | None
    eval_images: int | None
    bad_images: Literal["fail", "skip"]
    class_order: str | None = None
    trust_labels: bool = False


class _Images(BaseModel):
    sha256: _Fingerprint


class _Golden(BaseModel):
    fingerprint: _Fingerprint


class _Origin(BaseModel):
    """What of a checkpoint's provenance is needed to make it again."""

    source: str
    source_sha256: _Sha256
    arguments: _Arguments
    train_data: _Images
    golden: _Golden
    preprocessing: dict[str, str] = Field(default_factory=dict)  # where each setting comes from
    processes: int = Field(ge=1)
    threads: int = Field(ge=1)
    device: str
    versions: dict[str, _Version]

    @property
    def test(self) -> str:
        """The test images."""
        return self.arguments.data if self.arguments.eval_data is None else self.arguments.eval_data


def script(checkpoint: Checkpoint, *, export: Sequence[str], check: Sequence[str] = (), data: str | None = None) -> str:
    """The text of ``reproduce.sh``.

    Args:
        checkpoint: as it was read from its file. If it does not say how it was made (by an older version, or by a
            program of one's own), the script starts from that file.
        export: options of ``gplq-export``, see :func:`typed`: all but the checkpoint, --data, --out and --force.
        check: those of ``gplq-export check``: all but the folder and --data.
        data: the images that were checked with; None if there were none.
    """
    try:
        origin = _Origin.model_validate(checkpoint.provenance)
    except ValidationError:
        origin = None
    parts = [_HEAD.format(version=__version__, variables="CHECKPOINT" if origin is None else "MODEL, TRAIN, TEST")]
    if origin is None:
        parts.append(_FROM_CHECKPOINT.format(name=CHECKPOINT, sha256=checkpoint.sha256))
    else:
        parts += _quantize(checkpoint, origin)
    images = []
    if data is not None:
        name = "TEST" if origin is not None and data == origin.test else "IMAGES"
        if name == "IMAGES":
            parts.append(f"{_variable(name, data)}\n")
        images = [f'--data="${name}"']
    parts.append(_EXPORT.format(options=" ".join([*map(quote, export), *images])))
    if images:
        parts.append(_CHECK.format(options=" ".join([*map(quote, check), *images])))
    return "\n".join(parts)


def typed(parser: argparse.ArgumentParser, arguments: argparse.Namespace, without: Collection[str]) -> list[str]:
    """The options that ``arguments`` stand for, but for those whose ``dest`` is in ``without`` and the defaults.

    A list is an option that was given several times, a tuple has its values separated by commas.
    """
    found = []
    for action in parser._actions:
        value = getattr(arguments, action.dest, action.default)
        if not action.option_strings or action.dest in without or value == action.default:
            continue
        flag = action.option_strings[-1]
        if value is True:
            found.append(flag)
        else:
            values = value if isinstance(value, list) else [value]
            found += [f"{flag}={','.join(map(str, it)) if isinstance(it, tuple) else it}" for it in values]
    return found


def network_sha256(model: nn.Module) -> str:
    """SHA-256 of all codes, scales and other tensors of a frozen model: what two bit-identical networks share."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _variable(name: str, value: str) -> str:
    """A line that sets a variable unless the environment has."""
    return f'[ -n "${{{name}:-}}" ] || {name}={quote(value)}'


def _quantize(checkpoint: Checkpoint, origin: _Origin) -> Iterator[str]:
    """The part from the inputs to ``$work/model.pt``."""
    spec, arguments = checkpoint.spec, origin.arguments
    # PyPI has no local versions, such as those with +cpu. What reads and writes ONNX is that of the export, now.
    versions = {**origin.versions, **{k: v for k, v in environment()["versions"].items() if k.startswith("onnx")}}
    wanted = [f"{name}=={versions[name].partition('+')[0]}" for name in PACKAGES if name in versions]
    yield _INSTALL.format(packages=" ".join(map(quote, wanted)))
    named = {"MODEL": origin.source, "TRAIN": arguments.data, "TEST": origin.test}
    yield "".join(f"{_variable(name, value)}\n" for name, value in named.items())
    yield _VERIFY.format(model=origin.source_sha256, architecture=quote(spec.architecture), classes=spec.num_classes)
    images = {"TRAIN": ("train", origin.train_data.sha256), "TEST": ("test", origin.golden.fingerprint)}
    if images["TEST"][1] == images["TRAIN"][1]:  # nothing but training images was there to measure with
        del images["TEST"]
    yield "".join(f'verify_images "${name}" {split} {found}\n' for name, (split, found) in images.items())
    options = [quote(f"--model-arg={name}={value!r}") for name, value in spec.model_args.items()]
    options += ["--num-classes=0"] * (spec.num_classes == 0)
    options += ['--eval="$TEST"'] * (arguments.eval_data is not None)
    options += [f"--eval-images={arguments.eval_images}"] * (arguments.eval_images is not None)
    options += ["--skip-bad-images"] * (arguments.bad_images == "skip")
    options += ["--trust-labels"] * arguments.trust_labels
    settings = checkpoint.preprocessing.settings()
    for key in (key for key in SETTINGS if origin.preprocessing.get(key) == GIVEN):
        value = settings[key]
        text = ",".join(map(repr, value)) if isinstance(value, list) else str(value)
        options.append(quote(f"{option(key)}={text}"))
    order, classes = arguments.class_order, ""
    if order in ("alphabetical", "natural"):
        options.append(f"--class-order={order}")
    elif order is not None:  # a file, whose lines are the checkpoint's labels
        options.append('--class-order="$work/classes.txt"')
        classes = f"printf '%s\\n' {' '.join(map(quote, checkpoint.label_names or []))} >\"$work/classes.txt\"\n"
    yield _QUANTIZE.format(
        classes=classes,
        recipe=checkpoint.recipe.to_yaml(),
        threads=origin.threads,
        cpu="true" if origin.device == "cpu" else "false",
        launcher=_launcher(origin),
        options=" ".join(options),
    )
    made_with = (f"{name}=={version}" for name, version in origin.versions.items() if name in PACKAGES)
    yield _COMPARE.format(network=network_sha256(checkpoint.model), versions=" ".join(map(quote, made_with)))


def _launcher(origin: _Origin) -> str:
    """What starts several processes, see :mod:`gplq.processes`."""
    if origin.processes == 1:
        return ""
    if origin.device == "cpu":
        return f"-m torch.distributed.run --standalone --nproc_per_node {origin.processes} "
    return f"-m accelerate.commands.launch --multi_gpu --num_processes {origin.processes} "


_HEAD = """\
#!/usr/bin/env bash
# From the float weights to the check, as gplq-export {version} was told to: quantise, compare, export, check.
#   usage: reproduce.sh [FOLDER]    what it writes goes there (default: reproduced)
# Run it in the folder in which gplq was run, or say where things are by setting {variables}.
# PYTHON names the interpreter; INSTALL=1 first installs the versions below into its environment.
set -euo pipefail
work=${{1:-reproduced}}
python=${{PYTHON:-python3}}

# verify FILE SHA256
verify() {{
  if ! sha256sum --status -c <(printf '%s  -\\n' "$2") <"$1"; then
    printf 'reproduce.sh: %s is not the file that was used; its SHA-256 was %s\\n' "$1" "$2" >&2
    exit 2
  fi
  printf '%s: verified\\n' "$1"
}}
"""

_FROM_CHECKPOINT = """\
# The checkpoint does not say how it was made; a copy of it lies beside this script.
[ -n "${{CHECKPOINT:-}}" ] || CHECKPOINT=$(dirname -- "$0")/{name}
verify "$CHECKPOINT" {sha256}
mkdir -p -- "$work"
cp -- "$CHECKPOINT" "$work/model.pt"
"""

_INSTALL = """\
if [ "${{INSTALL:-}}" = 1 ]; then
  "$python" -m pip install {packages}
fi
"""

_VERIFY = """\
weights=()
if [ -d "$MODEL" ]; then
  verify "$MODEL/model.safetensors" {model}
elif [ -f "$MODEL" ]; then
  verify "$MODEL" {model}
  weights=(--arch={architecture} --num-classes={classes})
fi  # else timm fetches it by its name; the comparison below tells whether it is the same

# verify_images DATA SPLIT FINGERPRINT: names, sizes and contents, as gplq records them
verify_images() {{
  "$python" - "$@" <<'PYTHON' || exit 2
import sys

from gplq.data import fingerprint
from gplq.errors import GplqError

data, split, expected = sys.argv[1:]
try:
    if fingerprint(data, split) != expected:
        sys.exit(f"reproduce.sh: {{data}} does not hold the {{split}} images that were used")
except GplqError as error:
    sys.exit(f"reproduce.sh: {{error}}")
print(f"{{data}}, {{split}} images: verified")
PYTHON
}}
"""

_QUANTIZE = """\
mkdir -p -- "$work"
{classes}cat >"$work/recipe.yaml" <<'RECIPE'
{recipe}RECIPE
export OMP_NUM_THREADS={threads} ACCELERATE_USE_CPU={cpu}
"$python" {launcher}-m gplq quantize {options} "${{weights[@]}}" \\
  --data="$TRAIN" --recipe="$work/recipe.yaml" --out="$work/model.pt" -- "$MODEL"
"""

_COMPARE = """\
# The same machine and versions give the same bits. Others need not: what must hold there, too, is what the check tests.
"$python" - "$work/model.pt" {network} {versions} <<'PYTHON'
import sys
from pathlib import Path

from gplq.checkpoint import load_checkpoint
from gplq_export.reproduce import network_sha256

path, expected, *versions = sys.argv[1:]
checkpoint = load_checkpoint(Path(path))
if network_sha256(checkpoint.model) == expected:
    print("codes, scales and all other tensors: bit-identical")
else:
    here = {{f"{{name}}=={{version}}" for name, version in checkpoint.provenance["versions"].items()}}
    other = ", ".join(sorted({{*versions}} - here)) or "none, so it is the processor, the device or the weights"
    print(f"the network is not bit-identical to the original one; versions that differ: {{other}}")
PYTHON
"""

_EXPORT = """\
# 3: something for the engines is missing here; the rest of the export is there.
"$python" -m gplq_export "$work/model.pt" --out="$work/dist" --force {options} || [ $? -eq 3 ]
"""

_CHECK = """\
"$python" -m gplq_export check "$work/dist" {options}
"""
