"""Serving against calling: a genuine Triton server on this CPU and ONNX Runtime in this process, in one run.

    make .tritonserver
    python benchmarks/serving.py demo/dist --data calib/fashion_mnist/fashion_mnist.npz --out benchmarks/results

1. Proof: on the default settings, over each protocol, 16 requests at a time, until 10,000 are answered. Every answer is
   compared bit for bit with ONNX Runtime's; what is wrong or lost is counted.
2. Speed: one image a request, 1, 4 and 16 requests at a time, to servers with 1 and 2 instances of 1 and 2 threads, and
   to ONNX Runtime directly with 1 and 2 threads. All servers run at the same time, idle but for the one in turn; each
   round asks all of them once, so that what else the machine does hits all alike.

The server is the one of the tests (``tests/triton_server.py``): Triton's own front end, core and batching, with ONNX
Runtime in a Python process for each instance in place of the back end in C++, so the served figures are lower bounds.
Client and server share the CPU.
"""

import argparse
import functools
import itertools
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from cpu_speed import cpu_name

from gplq.data import open_images
from gplq.files import write_json
from gplq.preprocessing import Preprocessing
from gplq.provenance import environment
from gplq_export.triton.client import Feeds, TritonRun
from gplq_export.triton.config import ServingOptions
from gplq_export.triton.export_folder import Export
from gplq_export.triton.load import load
from gplq_export.triton.repository import write_repository
from gplq_export.triton.served import Served

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from triton_server import TritonServer, missing, serve

NAME = "bench"
DIRECT = "ONNX Runtime"
CONCURRENCY = (1, 4, 16)
IMAGES = 64


class Direct:
    """ONNX Runtime in this process, with the face of a served model: one session for all threads."""

    def __init__(self, path: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def infer(self, feeds: Feeds) -> Feeds:
        """One batch."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, feeds), strict=True))

    def statistics(self) -> dict[str, int]:
        """None."""
        return dict.fromkeys(("requests", "images", "runs", "queue_ns", "compute_ns"), 0)


def requests_of(arguments: argparse.Namespace) -> list[Feeds]:
    """Test images, or noise; a request each."""
    export = Export(arguments.export)
    preprocessing = Preprocessing.from_dict(export.preprocessing)
    if arguments.data is None:
        images = np.random.default_rng(0).standard_normal((IMAGES, *preprocessing.input_size), dtype=np.float32)
        return [{"images": image[None]} for image in images]
    found = open_images(arguments.data, "test", preprocessing, need_labels=False).head(IMAGES)
    return [{"images": found[index][0].numpy()[None]} for index in range(len(found))]


def start(stack: ExitStack, export: Path, options: ServingOptions) -> TritonServer:
    """A server with the settings that are given."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()), "repository")
    write_repository(export, folder, serve=["cpu"], name=NAME, options=options, say=lambda _: None)
    # Only the network: the steps around it would be processes of their own.
    return stack.enter_context(serve(folder / "models", "--model-control-mode=explicit", f"--load-model={NAME}-cpu"))


def prove(server: TritonServer, feeds: list[Feeds], answers: list[Feeds], count: int) -> list[dict[str, Any]]:
    """So many requests over each protocol, each answer compared."""
    rows = []
    for protocol, url in (("http", server.http), ("grpc", server.grpc)):
        memory = [sum(stub.memory_info().rss for stub in server.stubs())]
        connect = functools.partial(TritonRun, url, f"{NAME}-cpu", protocol)
        found = load(connect, feeds, answers, 16, requests=count)
        memory.append(sum(stub.memory_info().rss for stub in server.stubs()))
        rows.append({"protocol": protocol, **found.to_dict(), "stub_rss_bytes_before_and_after": memory})
        print(
            f"{protocol}: {found.requests} requests, {found.wrong} wrong, {found.lost} lost; largest difference "
            f"{found.largest_difference}; stubs' memory {memory[0] / 1e6:.0f} -> {memory[1] / 1e6:.0f} MB",
            flush=True,
        )
    return rows


def compare(openers: dict[str, Any], feeds: list[Feeds], answers: list[Feeds], rounds: int, seconds: float) -> Any:
    """By name and concurrency: what each round gave."""
    found: dict[tuple[str, int], list[Served]] = {}
    for turn, concurrency in itertools.product(range(rounds), CONCURRENCY):
        for name, opener in openers.items():
            served = load(opener, feeds, answers, concurrency, seconds=seconds)
            found.setdefault((name, concurrency), []).append(served)
        print(f"round {turn + 1} of {rounds}, concurrency {concurrency}", flush=True)
    return found


def row(name: str, concurrency: int, rounds: list[Served]) -> dict[str, Any]:
    """The median of the rounds, and each of them."""
    rates = [found.images_per_second for found in rounds]
    return {
        "name": name,
        "concurrency": concurrency,
        "images_per_second": round(statistics.median(rates), 1),
        "images_per_second_rounds": [round(rate, 1) for rate in rates],
        **{
            f"{quantile}_ms": round(statistics.median(found.latency_ms[quantile] for found in rounds), 3)
            for quantile in ("p50", "p95", "p99")
        },
        "wrong": sum(found.wrong or 0 for found in rounds),
        "lost": sum(found.lost for found in rounds),
        "server": rounds[-1].server,
    }


def main() -> None:
    """Prove, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="a folder that gplq-export wrote")
    parser.add_argument("--data", help="real images to send (default: noise)")
    parser.add_argument("--requests", type=int, default=10_000, help="of the proof, over each protocol")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="a measurement")
    parser.add_argument("--out", type=Path, help="the folder to write dated JSON into")
    parser.add_argument("--name", default="serving", help="of that file")
    arguments = parser.parse_args()
    if (reason := missing()) is not None:
        sys.exit(f"error: {reason}")
    path = arguments.export / "model.cpu.onnx"
    feeds = requests_of(arguments)
    answers = [Direct(path, 1).infer(each) for each in feeds]
    load_before = os.getloadavg()
    with ExitStack() as stack:
        openers: dict[str, Any] = {f"{DIRECT}, {threads} thread(s)": Direct(path, threads) for threads in (1, 2)}
        openers = {name: functools.partial(lambda model: model, model) for name, model in openers.items()}
        default = start(stack, arguments.export, ServingOptions())
        proof = prove(default, feeds, answers, arguments.requests)
        openers["Triton, default, HTTP"] = functools.partial(TritonRun, default.http, f"{NAME}-cpu", "http")
        for instances, threads in itertools.product((1, 2), (1, 2)):
            server = start(stack, arguments.export, ServingOptions(instances=instances, threads=threads))
            name = f"Triton, {instances} instance(s) of {threads} thread(s), gRPC"
            openers[name] = functools.partial(TritonRun, server.grpc, f"{NAME}-cpu", "grpc")
        found = compare(openers, feeds, answers, arguments.rounds, arguments.seconds)
    rows = [row(name, concurrency, rounds) for (name, concurrency), rounds in found.items()]
    rows.sort(key=lambda each: (each["concurrency"], -each["images_per_second"]))
    titles = ("at a time", "images/s", "lowest", "highest", "p50 ms", "p95 ms")
    print(f"\n{'':42}{''.join(f'{title:>10}' for title in titles)}  wrong, lost")
    for each in rows:
        rates = each["images_per_second_rounds"]
        numbers = (each["images_per_second"], min(rates), max(rates), each["p50_ms"], each["p95_ms"])
        cells = "".join(f"{number:10.2f}" for number in numbers)
        print(f"{each['name']:42}{each['concurrency']:10}{cells}  {each['wrong']}, {each['lost']}")
    if arguments.out is not None:
        day = datetime.now(UTC).strftime("%Y-%m-%d")
        content = {
            "settings": {
                **{key: value for key, value in vars(arguments).items() if key != "out"},
                "export": str(arguments.export),
                "default": vars(ServingOptions()),
                "images": len(feeds),
                "server": "Triton 2.51.0, Python-based ONNX Runtime back end",
            },
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "load_average_before": load_before,
            "load_average_after": os.getloadavg(),
            "proof": proof,
            "speed": rows,
        }
        write_json(arguments.out / f"{day}-{arguments.name}.json", {**environment(), **content})


if __name__ == "__main__":
    main()
