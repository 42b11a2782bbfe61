"""``gplq-export load``: what a served model does under load, and whether every answer is the right one.

What is measured is the *served latency*: from the moment a client begins to send a request until it has read the
answer, with the wire, the server's queue and its batching in between. It is neither what ``gplq-export bench``
measures, a call in the caller's own process, nor what the GPU computes for an engine.

A number of clients, the concurrency, send one request after the other, each as soon as it has the last answer. The
client is NVIDIA's perf_analyzer where one is installed and runs, which is written in C++ and looks at no answer; or our
own, of Python threads, which compares every answer with what the model answers to the same images alone. The report
says which it was: their figures do not compare.
"""

import argparse
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gplq.cli import positive
from gplq.errors import GateError, GplqError, MissingError, UsageError
from gplq.files import write_json
from gplq.provenance import environment
from gplq_export.triton.client import Feeds, TritonRun, add_connection_arguments, connect, takes_encoded
from gplq_export.triton.perf_analyzer import find_perf_analyzer, load_with_perf_analyzer
from gplq_export.triton.samples import in_batches, make_images
from gplq_export.triton.served import CLIENTS, Latencies, Served

SCHEMA_VERSION = "1.0"
_WARM_UP_SECONDS = 1.0
_HOPELESS = 10  # failures in a row after which a client gives up
_MESSAGES = 10  # so many different ones are kept


@dataclass
class _Tally:
    """What one thread has seen; errors also of the warm-up, the rest without."""

    latencies: Latencies = field(default_factory=Latencies)
    answered: int = 0
    wrong: int = 0
    largest_difference: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    last: float = -math.inf  # when the last answer came


def load(
    open_model: Callable[[], TritonRun],
    feeds: Sequence[Feeds],
    expected: Sequence[Feeds],
    concurrency: int,
    *,
    batch: int = 1,
    seconds: float = math.inf,
    requests: int | None = None,
    tolerance: float = 0.0,
) -> Served:
    """Put a served model under load with our own client.

    Args:
        open_model: connects; called once in each thread.
        feeds: requests, sent in turns.
        expected: the outputs of each, by name.
        concurrency: so many requests are under way at any time.
        batch: images in each request.
        seconds: how long to measure, after a warm-up.
        requests: end earlier, after so many.
        tolerance: by how much a number may differ from the expected one; 0: bit for bit.

    Raises:
        MissingError: no connection. UsageError: see :class:`TritonRun`.
    """
    start = time.perf_counter() + _WARM_UP_SECONDS
    left = None if requests is None else iter(range(requests))
    lock, stop = threading.Lock(), threading.Event()

    def measured() -> bool | None:
        """Whether the next request counts; None: there is no next one."""
        now = time.perf_counter()
        if stop.is_set() or now >= start + seconds:
            return None
        if now < start:
            return False
        with lock:
            return True if left is None or next(left, None) is not None else None

    def client(number: int) -> _Tally:
        tally, failures = _Tally(), 0
        turn = number * len(feeds) // concurrency  # clients ask different things at a time
        with open_model() as model:
            while failures < _HOPELESS and (counts := measured()) is not None:
                turn = (turn + 1) % len(feeds)
                answered = _ask(model, feeds[turn], expected[turn], tolerance, tally, counts=counts)
                failures = 0 if answered else failures + 1
        return tally

    with open_model() as observer, ThreadPoolExecutor(concurrency) as threads:
        futures = [threads.submit(client, number) for number in range(concurrency)]
        try:
            time.sleep(max(0.0, start - time.perf_counter()))
            before = _statistics(observer)
            tallies = [future.result() for future in futures]
        finally:
            stop.set()
        server = _per_request(before, _statistics(observer))
    latencies, errors = Latencies(), Counter[str]()
    for tally in tallies:
        latencies.counts += tally.latencies.counts
        errors += tally.errors
    return Served(
        client="gplq",
        concurrency=concurrency,
        batch=batch,
        requests=sum(tally.answered for tally in tallies),
        seconds=max(max(tally.last for tally in tallies) - start, 0.0),
        latency_ms={f"p{q}": latencies.quantile_ms(q / 100) for q in (50, 95, 99)},
        wrong=sum(tally.wrong for tally in tallies),
        largest_difference=max(tally.largest_difference for tally in tallies),
        lost=errors.total(),
        errors=dict(errors.most_common(_MESSAGES)),
        server=server,
    )


def _ask(model: TritonRun, feeds: Feeds, expected: Feeds, tolerance: float, tally: _Tally, *, counts: bool) -> bool:
    """One request, into the tally; returns whether it was answered."""
    began = time.perf_counter()
    try:
        answer = model.infer(feeds)
    except GplqError as error:
        known = str(error) in tally.errors or len(tally.errors) < _MESSAGES
        tally.errors[str(error) if known else "other errors"] += 1
        return False
    ended = time.perf_counter()
    difference = max(_difference(answer[name], array) for name, array in expected.items())
    tally.wrong += not difference <= tolerance
    tally.largest_difference = max(tally.largest_difference, difference)
    if counts:
        tally.answered += 1
        tally.latencies.add(ended - began)
        tally.last = ended
    return True


def _difference(answer: np.ndarray, expected: np.ndarray) -> float:
    """The largest of two arrays; infinite if they are not of one shape and type, or hold other strings or NaN."""
    if answer.shape != expected.shape or answer.dtype != expected.dtype:
        return math.inf
    if np.array_equal(answer, expected):
        return 0.0
    if not np.issubdtype(answer.dtype, np.number):
        return math.inf
    difference = float(np.abs(answer.astype(np.float64) - expected.astype(np.float64)).max())
    return math.inf if math.isnan(difference) else difference


def _statistics(model: TritonRun) -> dict[str, int]:
    """Empty if the server is gone: then what the clients have seen is the result."""
    try:
        return model.statistics()
    except MissingError:
        return {}


def _per_request(before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    """What the server says of the time between two looks at its statistics; empty if it does not."""
    grown = {key: after[key] - before[key] for key in before.keys() & after.keys()}
    if not grown or min(grown["requests"], grown["runs"]) <= 0:  # nothing answered, or the model was loaded anew
        return {}
    return {
        "mean_batch": round(grown["images"] / grown["runs"], 3),
        "queue_ms": round(grown["queue_ns"] / grown["requests"] / 1e6, 4),
        "compute_ms": round(grown["compute_ns"] / grown["requests"] / 1e6, 4),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``gplq-export load``."""
    add_connection_arguments(parser)
    parser.add_argument(
        "--concurrency", type=_numbers, default=(1, 4, 16), help="requests under way at a time (default: 1,4,16)"
    )
    parser.add_argument("--seconds", type=positive, default=10, help="to measure each for (default: 10)")
    parser.add_argument("--batch", type=positive, default=1, help="images in a request (default: 1)")
    parser.add_argument(
        "--images", type=Path, nargs="+", default=[], metavar="IMAGE", help="what to send (default: noise)"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="by how much an answer's numbers may differ (default: 0, no bit)"
    )
    parser.add_argument(
        "--client", choices=["auto", *CLIENTS], default="auto", help="what measures (default: perf_analyzer if it runs)"
    )
    parser.add_argument("--json", type=Path, help="write all numbers")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write.

    Raises:
        UsageError: an argument is wrong. MissingError: no server answers, or perf_analyzer is asked for and not there.
        GateError: answers were wrong or lost.
    """
    program = find_perf_analyzer() if arguments.client != "gplq" else None
    if arguments.client == "perf_analyzer" and program is None:
        raise MissingError("no perf_analyzer that runs is on the path. It is in the image tritonserver:…-py3-sdk.")
    if program is not None and arguments.tolerance:
        raise UsageError("--tolerance has no effect with perf_analyzer, which checks no answer; add --client gplq.")
    with connect(arguments) as model:
        _check_batch(model, arguments.batch)
        images = make_images(model, arguments.images)
        feeds = images if takes_encoded(model) else in_batches(images, arguments.batch)
        expected = [] if program else [model.infer(each) for each in feeds]
        results = []
        _say(f"served latency of {model} over {model.protocol.upper()}, {arguments.batch} image(s) a request")
        _say(f"by {CLIENTS['perf_analyzer' if program else 'gplq']}")
        _say(_HEADER)
        for concurrency in arguments.concurrency:
            size = {"batch": arguments.batch, "seconds": arguments.seconds}
            if program:
                found = load_with_perf_analyzer(program, model, images, concurrency, **size)
            else:
                tolerance = arguments.tolerance
                found = load(lambda: connect(arguments), feeds, expected, concurrency, **size, tolerance=tolerance)
            results.append(found)
            _say(_line(found))
    for text, count in sum((Counter(found.errors) for found in results), Counter[str]()).most_common(_MESSAGES):
        _say(f"{count} x {text}")
    if arguments.json is not None:
        settings = {
            **{key: getattr(arguments, key) for key in ("url", "model", "model_version", "tolerance", "timeout")},
            "protocol": model.protocol,
            "images": [str(path) for path in arguments.images] or "noise",
        }
        content = {"settings": settings, "served_latency": [found.to_dict() for found in results]}
        write_json(arguments.json, {"schema_version": SCHEMA_VERSION, **environment(), **content})
    wrong, lost = sum(found.wrong or 0 for found in results), sum(found.lost for found in results)
    if wrong or lost:
        raise GateError(f"{wrong} wrong and {lost} lost answers.")


_HEADER = (
    "concurrency  requests    p50 ms    p95 ms    p99 ms  images/s   wrong   lost"
    "   server: mean batch, queue ms, compute ms"
)


def _line(found: Served) -> str:
    p50, p95, p99 = (found.latency_ms[key] for key in ("p50", "p95", "p99"))
    wrong = "unknown" if found.wrong is None else str(found.wrong)
    server = ", ".join(str(value) for value in found.server.values()) or "unknown"
    return (
        f"{found.concurrency:11} {found.requests:9} {p50:9.2f} {p95:9.2f} {p99:9.2f} {found.images_per_second:9.1f} "
        f"{wrong:>7} {found.lost:6}   {server}"
    )


def _check_batch(model: TritonRun, batch: int) -> None:
    largest = model.max_batch_size or 1
    if batch > largest:
        raise UsageError(f"--batch {batch}: {model} takes {largest} at most.")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
