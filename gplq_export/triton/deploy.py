"""README.md, Dockerfile and compose.yaml beside a repository: how it is served, as safe as it can be by default.

No root, no write access to the models, no way to load models over the network, and nothing listens but on the loopback
interface: who can write a model folder, or load a model, can run code in the server.
"""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gplq.files import write_text
from gplq_export.triton.config import ENGINE_CACHE
from gplq_export.triton.export_folder import Network
from gplq_export.triton.images import TritonImage, release_tensorrt

USER = 1000  # triton-server in NVIDIA's images
_EXIT_SECONDS = 10  # what connections that are kept open delay the end by
_PORTS = {8000: "HTTP", 8001: "gRPC", 8002: "metrics"}


def write_deployment(
    folder: Path, name: str, image: TritonImage, networks: Sequence[Network], *, batch_max: int, end_to_end: bool
) -> None:
    """Write the files. ``batch_max``: of ONNX files."""
    write_text(folder / "Dockerfile", _dockerfile(image, networks, end_to_end=end_to_end))
    write_text(folder / ".dockerignore", "*\n")  # the image needs nothing of this folder
    write_text(folder / "compose.yaml", yaml.safe_dump(_compose(name, networks), sort_keys=False))
    write_text(folder / "README.md", _readme(name, image, networks, batch_max, end_to_end))


def _server(networks: Sequence[Network]) -> list[str]:
    command = [
        "tritonserver",
        "--model-repository=/models",
        "--model-control-mode=none",  # no loading over the network, no polling
        "--disable-auto-complete-config",  # what was checked is what is served
        "--exit-on-error=false",  # a model that does not load does not end the others; readiness tells
        f"--exit-timeout-secs={_EXIT_SECONDS}",
    ]
    if any(_version_compatible(network) for network in networks):
        command.append("--backend-config=tensorrt,version-compatible=true")
    return command


def _version_compatible(network: Network) -> bool:
    return bool(network.engine and network.engine["options"].get("version_compatible"))


def _dockerfile(image: TritonImage, networks: Sequence[Network], *, end_to_end: bool) -> str:
    lines = [
        f"# {image.name}: ONNX Runtime {image.onnxruntime}; by {image.source} (read {image.read})",
        f"FROM {image.name}",
        "",
    ]
    if end_to_end:
        pillow = importlib.metadata.version("pillow")
        lines += [
            "# The image has NumPy, but nothing that decodes pictures: Pillow, in the version that was tested.",
            f"RUN pip install --no-cache-dir --break-system-packages pillow=={pillow}",
            "",
        ]
    if _builds_engines(networks):
        lines += [f"RUN install --directory --owner={USER} --group={USER} {ENGINE_CACHE}", ""]
    command = ", ".join(f'"{part}"' for part in _server(networks))
    lines += [
        "# The models are mounted, not copied: whoever updates them needs no new image.",
        "ENV PYTHONDONTWRITEBYTECODE=1",
        f"USER {USER}:{USER}",
        f"EXPOSE {' '.join(map(str, _PORTS))}",
        "HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \\",
        '    CMD ["curl", "--fail", "--silent", "--show-error", "http://127.0.0.1:8000/v2/health/ready"]',
        f"CMD [{command}]",
    ]
    return "\n".join(lines) + "\n"


def _builds_engines(networks: Sequence[Network]) -> bool:
    return any(not network.on_cpu and not network.profiles for network in networks)


def _compose(name: str, networks: Sequence[Network]) -> dict[str, Any]:
    service: dict[str, Any] = {
        "build": ".",
        "image": f"{name.lower()}-triton",
        "user": f"{USER}:{USER}",
        "read_only": True,
        "tmpfs": ["/tmp"],
        "shm_size": "256mb",  # where the Python backend passes tensors
        "volumes": ["./models:/models:ro"],
        "ports": [f"127.0.0.1:{port}:{port}" for port in _PORTS],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "init": True,
        "stop_grace_period": f"{2 * _EXIT_SECONDS}s",
        "restart": "unless-stopped",
    }
    content: dict[str, Any] = {"services": {"triton": service}}
    if _builds_engines(networks):
        service["volumes"].append(f"engines:{ENGINE_CACHE}")
        content["volumes"] = {"engines": {}}
    if any(not network.on_cpu for network in networks):
        device = {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return content


def _readme(name: str, image: TritonImage, networks: Sequence[Network], batch_max: int, end_to_end: bool) -> str:
    gpus = " --gpus=1" if any(not network.on_cpu for network in networks) else ""
    cache = f" \\\n    --volume=engines:{ENGINE_CACHE}" if _builds_engines(networks) else ""
    ports = " ".join(f"--publish=127.0.0.1:{port}:{port}" for port in _PORTS)
    batches = [max((profile[2] for profile in it.profiles), default=batch_max) for it in networks]
    table = [
        f"| `{name}-{it.suffix}` | {it.file.name} | {_runs(it)} | {batch} |"
        for it, batch in zip(networks, batches, strict=True)
    ]
    first = networks[0]
    if end_to_end:
        table.insert(0, f"| `{name}` | an encoded picture in, labels out | around `{name}-{first.suffix}` | 1 |")
    tensorrt = _tensorrt_note(image, networks)
    parts = [
        f"""\
# {name}, served by Triton

Written by gplq-export. `gplq-export triton --check .` checks it again, without a server.

| model | what it is | runs in | batch, at most |
|---|---|---|---|
{chr(10).join(table)}

## Start

```sh
docker compose up --build --detach --wait
```

or, without compose:

```sh
docker build --tag {name.lower()}-triton .
docker run --rm{gpus} --read-only --tmpfs=/tmp --shm-size=256m --cap-drop=ALL --security-opt=no-new-privileges \\
    {ports} \\
    --volume="$PWD/models:/models:ro"{cache} {name.lower()}-triton
```

The image is `{image.name}`, with ONNX Runtime {image.onnxruntime}
([NVIDIA's table]({image.source}), read {image.read}).
{tensorrt}
Ports are open on 127.0.0.1 only: 8000 HTTP, 8001 gRPC, 8002 metrics. Triton has no passwords; put a proxy in front of
it before others may reach it.""",
    ]
    if end_to_end:
        parts.append(f"""\
## Ask

```sh
gplq-export client picture.jpg --url 127.0.0.1:8000 --model {name}
curl --fail --data-binary @picture.jpg --header 'Inference-Header-Content-Length: 0' --output - \\
    http://127.0.0.1:8000/v2/models/{name}/infer
```

`{name}` takes one encoded JPEG, PNG, WebP, BMP, PPM, TIFF or GIF in `image` (UINT8, [bytes]) and returns `labels`,
`scores` (softmax) and `logits`. Pictures of several requests at a time share a batch. What cannot be read is answered
with status 400 and the reason.""")
    parts.append(f"""\
## Update

```sh
gplq-export triton EXPORT --add-version .      # a new version of each network, beside what is served
docker compose restart                         # the server reads the models when it starts
```

The newest versions are served side by side, as many as `version_policy` says; a client that names none gets the
newest, one that asks for `/v2/models/{name}-{first.suffix}/versions/1/infer` the first. To go back, remove the newest
version's folder and restart. A version that does not load leaves the others serving, and the server *not ready*: its
log says why.

## When something is wrong

- **Not ready**: `docker compose logs`; for a mistake in a config.pbtxt its line is in the log only, or said by
  `gplq-export triton --check .`.
- **"Stub process is not healthy"**: the Python process of `{name}-preprocess` died. Older servers do not start it
  again, although they say that they are ready: `docker compose restart`.
- **Stopping takes {_EXIT_SECONDS} s**: a client keeps an HTTP connection open.""")
    return "\n\n".join(parts) + "\n"


def _runs(network: Network) -> str:
    if network.profiles:
        return "TensorRT, GPU"
    return "ONNX Runtime, CPU" if network.on_cpu else "ONNX Runtime with TensorRT, GPU: builds its engine at the start"


def _tensorrt_note(image: TritonImage, networks: Sequence[Network]) -> str:
    versions = sorted({str(it.engine["backend_version"]) for it in networks if it.engine is not None})
    if not versions:
        return ""
    theirs = release_tensorrt(image) or "unknown to the table"
    return (
        f"The engines were built by TensorRT {', '.join(versions)} and load in that version alone, on a GPU of the "
        f"kind they were built on. TensorRT of release {image.release}: {theirs}. To be sure:\n"
        f"`docker run --rm {image.name} bash -c 'dpkg -l | grep libnvinfer'`.\n"
    )
