"""What the runtimes that are installed say of an ONNX file.

Each is asked in a process of its own, by ``python -m gplq_export.ask RUNTIME FILE``: their parsers are written in C++,
and a stranger's file may take the process down with it.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gplq.errors import BuildError, MissingError
from gplq_export.engine import find_builder, log_recorder, open_parser, parse_errors
from gplq_export.runtimes import onnxruntime, onnxruntime_session

_SECONDS = 300
_LAST_WORDS = 3  # lines of a process that died


@dataclass(frozen=True)
class Refusal:
    """Why a runtime does not take a file, in its own words. ``node``: whose fault it is, "" if it does not say."""

    node: str
    words: str


@dataclass(frozen=True)
class Answer:
    """What a runtime said.

    Attributes:
        runtime: "trt" or "ort".
        name: of the runtime with its version; empty if none could be asked.
        refusals: none if it takes the file.
        silent: why nothing could be asked, or no answer came; empty if one came.
    """

    runtime: str
    name: str
    refusals: tuple[Refusal, ...] = ()
    silent: str = ""

    def __str__(self) -> str:
        if self.silent:
            return f"{self.name or self.runtime} was not asked: {self.silent}"
        takes = "parses" if self.runtime == "trt" else "loads"
        return f"{self.name} {'refuses' if self.refusals else takes} the file"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def ask(path: Path, runtime: str) -> Answer:
    """Let a runtime load a file: "ort" creates a default session, "trt" parses (TensorRT, or else TensorRT-RTX)."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "gplq_export.ask", runtime, str(path)],
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(runtime, "", silent=f"no answer within {_SECONDS} seconds")
    if done.returncode == 0:
        answer = json.loads(done.stdout.decode().splitlines()[-1])
        refusals = tuple(Refusal(**refusal) for refusal in answer.pop("refusals"))
        return Answer(**answer, refusals=refusals)
    last = " / ".join(done.stderr.decode(errors="replace").split("\n")[-_LAST_WORDS:]).strip(" /")
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    words = f"the process that loaded the file ended with {how}" + (f": {last}" if last else "")
    return Answer(runtime, {"ort": "ONNX Runtime", "trt": "TensorRT"}[runtime], (Refusal("", words),))


def _onnx_runtime(path: Path) -> Answer:
    try:
        name = f"ONNX Runtime {onnxruntime().__version__}"
        onnxruntime_session(str(path), "ENABLE_ALL")
    except MissingError as error:
        return Answer("ort", "ONNX Runtime", silent=str(error))
    except BuildError as error:
        return Answer("ort", name, (Refusal("", str(error.__cause__).strip().splitlines()[0]),))
    return Answer("ort", name)


def _tensorrt(path: Path) -> Answer:
    try:
        backend = find_builder()
        owners = open_parser(backend, log_recorder(backend.module))
    except MissingError as error:
        return Answer("trt", "TensorRT", silent=str(error))
    refusals = tuple(Refusal(node, reason) for node, _, reason in parse_errors(owners[-1], path))
    return Answer("trt", f"{backend.name} {backend.version}", refusals)


if __name__ == "__main__":
    _asked = {"ort": _onnx_runtime, "trt": _tensorrt}[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.write(f"\n{json.dumps(_asked.to_dict())}\n")
