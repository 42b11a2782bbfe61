"""``gplq-export client``: images to a Triton server over HTTP or gRPC, labels with scores back.

A model that takes encoded images (``image``, UINT8 [-1]) gets the bytes of the file. For a network (FP32 [C, H, W])
they are preprocessed here, as its own configuration says, or a checkpoint or an exported folder; the server names its
classes.

Nothing is tried twice: a request that fails is an error, and one that came back is the answer of the model asked for.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from gplq.cli import positive
from gplq.errors import DataError, GplqError, MissingError, UsageError
from gplq_export.manifest import MANIFEST, read_manifest
from gplq_export.runtimes import package
from gplq_export.triton.config import PREPROCESSING

if TYPE_CHECKING:
    from gplq_export.triton.preprocess import Preprocess

Protocol = Literal["http", "grpc"]
Feeds = dict[str, np.ndarray]  # by the name of the input or output
_ENCODED = "UINT8"  # the input type of a model that takes encoded images


@dataclass(frozen=True)
class Tensor:
    """An input or output of a served model. ``shape``: with the batch, if the model batches; -1 is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class TritonRun:
    """A served model as a function: arrays by input name -> its outputs in order; a :data:`gplq_export.runtimes.Run`.

    A context manager; for one thread at a time, as the HTTP client is.

    Attributes:
        inputs, outputs: as the server describes them. ``max_batch_size``: 0 if the model does not batch.
        parameters: of its configuration.

    Args:
        url: "HOST:PORT". ``model``: its name. ``protocol``: "http" or "grpc".
        version: of the model, such as "2"; the server's choice if empty.
        timeout: seconds that an answer may take.

    Raises:
        UsageError: there is no such model. MissingError: no server answers there, or tritonclient is not installed.
    """

    def __init__(
        self, url: str, model: str, protocol: Protocol = "http", *, version: str = "", timeout: float = 60
    ) -> None:
        host, _, port = url.rpartition(":")
        if not host or "/" in host or not port.isdigit():
            raise UsageError(f"--url {url}: takes HOST:PORT, such as localhost:8000, without http:// and path.")
        self.url, self.model, self.protocol, self.version = url, model, protocol, version
        self._library = package(
            f"tritonclient.{protocol}", "tritonclient is not installed: pip install 'gplq[triton]'."
        )
        if protocol == "http":
            self._client = self._library.InferenceServerClient(url, connection_timeout=timeout, network_timeout=timeout)
            self._limit: dict[str, Any] = {}
        else:
            self._client = self._library.InferenceServerClient(url)
            self._limit = {"client_timeout": timeout}
        try:
            self._describe()
        except BaseException:
            self.close()
            raise

    def _describe(self) -> None:
        metadata = self._ask("get_model_metadata", self.model, self.version)
        self.inputs, self.outputs = (
            [Tensor(each["name"], each["datatype"], tuple(map(int, each["shape"]))) for each in metadata[kind]]
            for kind in ("inputs", "outputs")
        )
        config = self._ask("get_model_config", self.model, self.version)
        config = config.get("config", config)  # gRPC wraps it
        self.max_batch_size = int(config.get("max_batch_size", 0))
        values = config.get("parameters", {})
        self.parameters = {key: str(value.get("string_value", "")) for key, value in values.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, which a server waits for when it ends."""
        self._client.close()

    def __call__(self, feeds: Feeds) -> list[np.ndarray]:
        """Run any number of images, in as few requests as the model's largest batch allows.

        Raises:
            UsageError: the model takes other inputs. MissingError: the server does not answer, or fails.
        """
        total = len(next(iter(feeds.values())))
        step = self.max_batch_size or total
        answers = [
            self.infer({name: array[start : start + step] for name, array in feeds.items()})
            for start in range(0, total, step)
        ]
        return [np.concatenate([answer[output.name] for answer in answers]) for output in self.outputs]

    def infer(self, feeds: Feeds, classes: dict[str, int] | None = None) -> Feeds:
        """One request: arrays by input name -> arrays by output name.

        With ``classes``, only these outputs, and of each so many of the largest values, as the server writes them:
        "value:index:label" in bytes, without the last where the server knows no labels.

        Raises:
            UsageError: the model takes other inputs. MissingError: the server does not answer, or fails.
        """
        types = {tensor.name: tensor.datatype for tensor in self.inputs}
        if feeds.keys() != types.keys():
            raise UsageError(f"{self} takes {', '.join(types)}; given {', '.join(feeds)}.")
        inputs = []
        with self._translated():
            for name, array in feeds.items():
                inputs.append(self._library.InferInput(name, array.shape, _datatype(array)))
                inputs[-1].set_data_from_numpy(np.ascontiguousarray(array))
            asked = classes if classes is not None else {tensor.name: 0 for tensor in self.outputs}
            outputs = [self._library.InferRequestedOutput(name, class_count=count) for name, count in asked.items()]
            answer = self._client.infer(self.model, inputs, self.version, outputs, **self._limit)
            found = {name: answer.as_numpy(name) for name in asked}
        for name, array in found.items():
            if array is None:
                raise MissingError(f"{self} returned no {name}; look at the server's log.")
        return found

    def statistics(self) -> dict[str, int]:
        """What the server has counted for the model since it was loaded: requests, images, runs and nanoseconds.

        Raises:
            MissingError: the server does not answer.
        """
        counted = self._ask("get_inference_statistics", self.model, self.version)["model_stats"]
        found = {"requests": 0, "images": 0, "runs": 0, "queue_ns": 0, "compute_ns": 0}
        for each in counted:  # one for each version
            parts = each.get("inference_stats", {})
            times = {key: int(value.get("ns", 0)) for key, value in parts.items()}
            found["requests"] += int(parts.get("success", {}).get("count", 0))
            found["images"] += int(each.get("inference_count", 0))
            found["runs"] += int(each.get("execution_count", 0))
            found["queue_ns"] += times.get("queue", 0)
            found["compute_ns"] += sum(times.get(f"compute_{part}", 0) for part in ("input", "infer", "output"))
        return found

    def __str__(self) -> str:
        return f"{self.model}{f', version {self.version},' * bool(self.version)} at {self.url}"

    def _ask(self, method: str, *arguments: str) -> Any:
        as_json = {} if self.protocol == "http" else {"as_json": True, **self._limit}
        with self._translated():
            return getattr(self._client, method)(*arguments, **as_json)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Everything that the client libraries raise, as one of our errors."""
        try:
            yield
        except (GplqError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise self._translation(error) from error

    def _translation(self, error: Exception) -> GplqError:
        status = str(error.status() or "") if hasattr(error, "status") else None  # of InferenceServerException
        text = str(error.message()).strip() if hasattr(error, "message") else f"{type(error).__name__}: {error}"
        first = text.splitlines()[0].removeprefix("[request id: <id_unknown>] ") if text else type(error).__name__
        if status in ("404", "StatusCode.NOT_FOUND"):
            return UsageError(f"{self.url}: {first.rstrip('.')}. {self._index()}")
        if status in ("400", "StatusCode.INVALID_ARGUMENT"):
            return UsageError(f"{self}: {first}")
        if self._answered(status):
            ready = f" {self._index()}" if "ready" in first or "no available versions" in first else ""
            return MissingError(f"{self} failed: {first.rstrip('.')}. Look at the server's log.{ready}")
        return MissingError(
            f"no answer from {self.url} over {self.protocol.upper()}: {first}. Is the server there, and is it this "
            "port? 8000 is for HTTP by default, 8001 for gRPC (--grpc)."
        )

    def _answered(self, status: str | None) -> bool:
        """Whether the server itself sent an error."""
        if self.protocol == "http":
            return bool(status)
        if status == "StatusCode.UNAVAILABLE":  # no connection, or a model that is not ready
            try:
                return bool(self._client.is_server_live(**self._limit))
            except Exception:
                return False
        return status not in (None, "", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.CANCELLED")

    def _index(self) -> str:
        """Which models there are; for a message, so it does not fail."""
        try:
            extra = {} if self.protocol == "http" else {"as_json": True, **self._limit}
            index = self._client.get_model_repository_index(**extra)
        except Exception:
            return "The server does not say which models it has."
        models = index.get("models", []) if isinstance(index, dict) else index
        ready = sorted({f"{each['name']}:{each['version']}" for each in models if each.get("state") == "READY"})
        return f"Ready are (name:version): {', '.join(ready) or 'none'}."


def _datatype(array: np.ndarray) -> str:
    name: str = package("tritonclient.utils", "").np_to_triton_dtype(array.dtype)
    return name


@dataclass(frozen=True)
class Label:
    """A class that a model named. ``score``: its probability."""

    index: int | None
    name: str
    score: float


def classify(model: TritonRun, encoded: bytes, top: int, preprocess: "Preprocess | None" = None) -> list[Label]:
    """The most likely classes of one image, best first; at most as many as the model returns.

    Args:
        model: one that takes encoded images, or a network with one output of values by class.
        encoded: the bytes of an image file.
        top: so many.
        preprocess: for a network; what its own configuration says if None.

    Raises:
        DataError: the image cannot be read.
        UsageError: the model is none of these, or does not say how to preprocess. MissingError: see :class:`TritonRun`.
    """
    if takes_encoded(model):
        answer = model.infer({model.inputs[0].name: np.frombuffer(encoded, np.uint8)})
        try:
            names, scores = answer["labels"].ravel(), answer["scores"].ravel()
        except KeyError as error:
            raise UsageError(f"{model} returns {', '.join(answer)}, not labels and scores.") from error
        return [Label(None, name.decode(), float(score)) for name, score in zip(names, scores, strict=True)][:top]
    preprocess = preprocess or own_preprocessing(model)
    [images], [logits] = model.inputs, _class_outputs(model)
    image = preprocessed(encoded, preprocess)
    # All of them, because the probability of one takes all.
    [texts] = model.infer({images.name: image[None]}, {logits.name: logits.shape[-1]}).values()
    found = [_class(text.decode()) for text in texts.ravel()]  # in falling order
    weights = np.exp([value - found[0][0] for value, _, _ in found])
    scores = (weights / weights.sum()).tolist()
    return [Label(index, name, score) for (_, index, name), score in zip(found, scores, strict=True)][:top]


def preprocessed(encoded: bytes, preprocess: "Preprocess") -> np.ndarray:
    """The bytes of an image file -> float32 [C, H, W].

    Raises:
        DataError: it cannot be read.
    """
    try:
        return preprocess(encoded)
    except Exception as error:  # Pillow's decoders raise nearly every type there is for damaged files
        raise DataError(f"cannot read the image: {error}") from error


def takes_encoded(model: TritonRun) -> bool:
    """Whether a model takes the bytes of an image file."""
    return [(tensor.datatype, tensor.shape) for tensor in model.inputs] == [(_ENCODED, (-1,))]


def own_preprocessing(model: TritonRun) -> "Preprocess":
    """What a network's configuration says of its preprocessing.

    Raises:
        UsageError: nothing that can be used.
    """
    text = model.parameters.get(PREPROCESSING)
    if text is None:
        raise UsageError(
            f"{model} does not say how its images are preprocessed. Name a checkpoint or an exported folder with "
            "--preprocessing, or ask a model that takes encoded images."
        )
    try:
        return _preprocess(json.loads(text))
    except (ValueError, TypeError, LookupError) as error:
        raise UsageError(f"{model}: its parameter {PREPROCESSING} is damaged: {error}") from error


def read_preprocessing(path: Path) -> "Preprocess":
    """The preprocessing of a checkpoint, or of a folder that gplq-export wrote.

    Raises:
        UsageError: it is neither.
    """
    if not path.is_dir():
        from gplq.checkpoint import load_checkpoint

        return _preprocess(load_checkpoint(path).preprocessing.to_dict())
    manifest = read_manifest(path)
    try:
        return _preprocess(manifest["preprocessing"])
    except (ValueError, TypeError, LookupError) as error:
        raise UsageError(f"{path / MANIFEST} does not say how images are preprocessed: it is damaged.") from error


def _preprocess(settings: dict[str, Any]) -> "Preprocess":
    from gplq_export.triton.preprocess import Preprocess

    return Preprocess(settings)


def _class_outputs(model: TritonRun) -> list[Tensor]:
    """The output with a value for each class.

    Raises:
        UsageError: the model has another number of inputs or of such outputs than one.
    """
    batch = 1 if model.max_batch_size else 0
    found = [tensor for tensor in model.outputs if len(tensor.shape) == 1 + batch and tensor.shape[-1] > 0]
    if len(model.inputs) != 1 or len(found) != 1 or not batch:
        ports = ", ".join(f"{tensor.name} {tensor.datatype} {list(tensor.shape)}" for tensor in model.outputs)
        raise UsageError(f"{model} is no classifier that takes a batch of images; it returns {ports}.")
    return found


def _class(text: str) -> tuple[float, int, str]:
    """What the server's classification extension writes.

    >>> _class("0.5:3:a: b"), _class("-2:1")
    ((0.5, 3, 'a: b'), (-2.0, 1, 'class 1'))
    """
    value, index, *label = text.split(":", 2)
    return float(value), int(index), label[0] if label else f"class {index}"


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a served model is; for every command that asks one."""
    parser.add_argument("--url", required=True, metavar="HOST:PORT", help="of the server's HTTP (or gRPC) endpoint")
    parser.add_argument("--grpc", action="store_true", help="speak gRPC (default: HTTP)")
    parser.add_argument("--model", required=True, metavar="NAME", help="which of its models")
    parser.add_argument("--model-version", default="", metavar="N", help="which version (default: the server's choice)")
    parser.add_argument("--timeout", type=positive, default=60, help="seconds that an answer may take (default: 60)")


def connect(arguments: argparse.Namespace) -> TritonRun:
    """What :func:`add_connection_arguments` names; raises as :class:`TritonRun` does."""
    protocol: Protocol = "grpc" if arguments.grpc else "http"
    return TritonRun(
        arguments.url, arguments.model, protocol, version=arguments.model_version, timeout=arguments.timeout
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``gplq-export client``."""
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="JPEG, PNG and whatever Pillow reads")
    add_connection_arguments(parser)
    parser.add_argument("--top", type=positive, default=5, help="so many labels each (default: 5)")
    parser.add_argument(
        "--preprocessing", type=Path, metavar="PATH", help="a checkpoint or exported folder (default: the model says)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Classify and print.

    Raises:
        UsageError: an argument is wrong, or the model cannot be used. DataError: an image cannot be read.
        MissingError: no server answers, or it fails.
    """
    with connect(arguments) as model:
        preprocess = None
        if arguments.preprocessing is not None:
            if takes_encoded(model):
                raise UsageError(f"{model} preprocesses itself: --preprocessing has no effect.")
            preprocess = read_preprocessing(arguments.preprocessing)
        for path in arguments.images:
            try:
                labels = classify(model, path.read_bytes(), arguments.top, preprocess)
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror or error}.") from error
            except (DataError, UsageError) as error:
                raise type(error)(f"{path}: {error}") from error
            sys.stdout.write(f"{path}\n" + "".join(f"  {label.score:.4f}  {label.name}\n" for label in labels))
