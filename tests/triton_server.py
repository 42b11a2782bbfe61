"""A genuine Triton Inference Server for the tests and ``benchmarks/serving.py``: on loopback, without a GPU.

The server comes from the wheel ``nvidia-pytriton``, which ``make`` unpacks into ``.tritonserver`` (or wherever
``GPLQ_TRITONSERVER`` points), beside the project's environment and never in it: of the wheel only the executable, its
libraries and the Python back end are used. That back end starts the Python of this process, and so uses its packages,
but for NumPy, of which it wants a 1: under 2, every element that it hands to Python is the first one.

The wheel holds no ONNX Runtime and no TensorRT back end, and no registry does. In their place stand the Python-based
ones of ``triton_backends/``, under the real names: the core reads and checks the ``config.pbtxt`` of production.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
WHEEL = Path(os.environ.get("GPLQ_TRITONSERVER", ROOT / ".tritonserver")).resolve()
STAND_INS = Path(__file__).parent / "triton_backends"
START_SECONDS = 60  # a back end that dies while it starts hangs the server for good
EXIT_SECONDS = 5  # what the server gives open connections and models to end
_STUB_SECONDS = 15  # a stub looks every few seconds whether its server still lives


def missing() -> str | None:
    """Why no server can be started here; None if one can."""
    if not _executable().is_file():
        return f"no Triton server in {WHEEL} ('make {WHEEL.name}' puts one there; Linux x86-64 only)"
    if not _stub().is_file():
        return f"the Triton server in {WHEEL} has no stub for Python {_python()}"
    if not _packages().is_dir():
        return f"no NumPy 1 in {_packages()} for the Python back end ('make {WHEEL.name}' puts one there)"
    library = Path(sysconfig.get_config_var("LIBDIR"), f"libpython{_python()}.so.1.0")
    if sys.version_info < (3, 13) and not library.is_file():  # since 3.13, the wheel brings its own
        return f"{library} is missing, which the stub loads (on Debian: apt install libpython{_python()})"
    return None


class ServerError(Exception):
    """The server did not start, or ended; the message holds its log."""


@dataclass
class TritonServer:
    """A server that runs, or ran.

    Attributes:
        process: of the server itself. ``stubs`` are further ones.
        http, grpc, metrics: "127.0.0.1:PORT". ``folder``: of its own, with the log. ``shm``: prefix of its segments.
    """

    process: subprocess.Popen[bytes]
    http: str
    grpc: str
    metrics: str
    folder: Path
    shm: str
    _seen: list[psutil.Process] = field(default_factory=list)

    def log(self) -> str:
        """What the server and its stubs have said so far, but for the tables of settings."""
        text = (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")
        return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(("+-", "| ")))

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET; the connection is closed, as an open one delays the end of the server."""
        address = self.metrics if path == "metrics" else self.http
        try:
            with urllib.request.urlopen(f"http://{address}/{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all metrics of that name that have these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in self.get("metrics")[1].splitlines() if line.startswith(f"{name}{{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in wanted))

    def stubs(self) -> list[psutil.Process]:
        """The processes in which Python back ends run."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        self._seen += [process for process in found if process not in self._seen]
        return found

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End the server and wait for it, and for its stubs if it was asked to; returns its exit code."""
        if self.process.poll() is None:
            self.stubs()
            self.process.send_signal(how)
        try:
            code = self.process.wait(EXIT_SECONDS + 10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        if how != signal.SIGKILL:
            psutil.wait_procs(self._seen, _STUB_SECONDS)
        return code

    def leftovers(self) -> list[str]:
        """What should have gone with the server: processes, ports, shared memory."""
        found = [f"process {process.pid}" for process in self._seen if _lives(process)]
        for address in (self.http, self.grpc, self.metrics):
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) == 0:
                    found.append(f"port {address}")
        return found + [str(path) for path in Path("/dev/shm").glob(f"{self.shm}*")]

    def sweep(self) -> None:
        """Remove what a server leaves behind that was killed or did not end in time."""
        for process in self._seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._seen, _STUB_SECONDS)
        for path in Path("/dev/shm").glob(f"{self.shm}*"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def serve(repository: Path, *flags: str, wait: bool = True) -> Iterator[TritonServer]:
    """A server for ``repository``, which is ready if ``wait``; ended and swept in any case.

    Raises:
        ServerError: it ended, or was not ready in time.
    """
    with tempfile.TemporaryDirectory(prefix="triton-") as name:
        folder = Path(name)
        _back_ends(folder / "backends")
        server = _start(repository, folder, flags)
        try:
            if wait:
                _wait_until_ready(server)
            yield server
        finally:
            server.stop()
            server.sweep()


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        # A process whose parent is gone waits for somebody to ask for its exit code.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _start(repository: Path, folder: Path, flags: tuple[str, ...]) -> TritonServer:
    http, grpc, metrics = _free_ports(3)
    shm = f"gplq_{os.getpid()}_{http}_"
    command = [
        str(_executable()),
        f"--model-repository={repository.resolve()}",
        f"--backend-directory={folder / 'backends'}",
        # Each of these would listen to the world by default.
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        "--metrics-address=127.0.0.1",
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        f"--metrics-port={metrics}",
        "--allow-gpu-metrics=false",
        f"--exit-timeout-secs={EXIT_SECONDS}",
        f"--backend-config=python,shm-region-prefix-name={shm}",
        "--backend-config=python,shm-default-byte-size=16777216",
        *flags,
    ]
    libraries = [str(WHEEL / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.prefix, "bin")), os.environ["PATH"]]),  # where a stub finds its Python
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
    }
    with (folder / "server.log").open("wb") as log:
        # A stub ignores PYTHONPATH, and looks for packages in its working directory first.
        process = subprocess.Popen(
            command, cwd=_packages(), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    addresses = (f"127.0.0.1:{port}" for port in (http, grpc, metrics))
    return TritonServer(process, *addresses, folder, shm)


def _wait_until_ready(server: TritonServer) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ServerError(f"the server ended with exit code {server.process.returncode}\n{server.log()}")
        with contextlib.suppress(OSError):
            if server.get("v2/health/ready")[0] == 200:
                server.stubs()
                return
        time.sleep(0.1)
    raise ServerError(f"the server was not ready after {START_SECONDS} s\n{server.log()}")


def _back_ends(folder: Path) -> None:
    """The wheel's Python back end with the stub for this Python, and the stand-ins."""
    python = folder / "python"
    shutil.copytree(_server() / "backends" / "python", python)
    shutil.copy(_stub(), python)
    shutil.copytree(STAND_INS, folder, dirs_exist_ok=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _server() -> Path:
    return WHEEL / "pytriton" / "tritonserver"


def _executable() -> Path:
    return _server() / "bin" / "tritonserver"


def _stub() -> Path:
    return _server() / "python_backend_stubs" / _python() / "triton_python_backend_stub"


def _packages() -> Path:
    return WHEEL / "packages"


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
