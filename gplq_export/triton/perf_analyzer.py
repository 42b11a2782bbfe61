"""NVIDIA's load generator, where it is installed: what it is asked, and what it says."""

import base64
import csv
import io
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gplq.errors import MissingError
from gplq.files import write_json
from gplq_export.triton.client import Feeds, TritonRun
from gplq_export.triton.served import Served


def find_perf_analyzer() -> str | None:
    """The perf_analyzer on the path, if it runs: newer ones want a newer C library than many systems have."""
    found = shutil.which("perf_analyzer")
    if found is None:
        return None
    try:
        subprocess.run([found, "--version"], capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found


def load_with_perf_analyzer(
    program: str, model: TritonRun, feeds: Sequence[Feeds], concurrency: int, *, batch: int, seconds: float
) -> Served:
    """Put a served model under load with perf_analyzer, for about so long.

    Args:
        program: the executable.
        model: what it is pointed at.
        feeds: of one image each; it puts batches together itself.
        concurrency: so many requests are under way at any time.
        batch: images in each request.
        seconds: how long to measure.

    Raises:
        MissingError: it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, table = Path(folder, "data.json"), Path(folder, "table.csv")
        write_json(data, {"data": [_as_data(each, batched=model.max_batch_size > 0) for each in feeds]})
        command = [program, "-m", model.model, "-u", model.url, "-i", model.protocol, "-b", str(batch)]
        command += ["-x", model.version] if model.version else []
        command += ["--concurrency-range", str(concurrency), "--input-data", str(data), "-f", str(table)]
        # It wants three windows; that they agree is no condition here, where a time is asked for.
        window = max(500, round(1000 * seconds / 3))
        command += ["--measurement-interval", str(window), "--max-trials", "3", "--stability-percentage", "999"]
        command += ["--percentile", "95"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 10 * seconds, check=False)
            [row] = csv.DictReader(io.StringIO(table.read_text(encoding="utf-8")))
            images_per_second = float(row["Inferences/Second"])
            latency_ms = {f"p{q}": float(row[f"p{q} latency"]) / 1000 for q in (50, 95, 99)}
        except subprocess.TimeoutExpired as error:
            raise MissingError(f"perf_analyzer did not end in {error.timeout:.0f} s; use --client gplq.") from error
        except (OSError, ValueError, LookupError) as error:
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or [repr(error)]
            raise MissingError(f"perf_analyzer failed: {said[-1].strip()}; use --client gplq.") from error
    measured = 3 * window / 1000
    return Served(
        "perf_analyzer", concurrency, batch, round(images_per_second * measured / batch), measured, latency_ms
    )


def _as_data(feeds: Feeds, *, batched: bool) -> dict[str, Any]:
    """An entry of perf_analyzer's input file."""
    return {
        name: {"content": {"b64": base64.b64encode(array.tobytes()).decode()}, "shape": list(array.shape[batched:])}
        for name, array in feeds.items()
    }
