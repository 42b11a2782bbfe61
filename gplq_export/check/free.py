"""Free-running: whole networks on the same images, compared output by output and code by code, streamed.

A *member* computes something from a batch; a *comparison* holds two members side by side. In each batch every member
runs once. Memory is one batch and a few numbers for each image; what has been counted is written down from time to
time, so that an interrupted check goes on where it was.
"""

import io
import time
import zipfile
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gplq.errors import BuildError, GplqError, UsageError
from gplq.files import atomic_path
from gplq.progress import progress
from gplq_export.check.accumulate import CodeCounts, Outputs, State, UnitErrors

_SAVE_SECONDS = 60.0


@dataclass
class Seen:
    """What a member computed: the network's outputs; its codes and what its units return, where they can be seen."""

    outputs: list[Tensor]
    codes: dict[str, np.ndarray] = field(default_factory=dict)
    units: dict[str, np.ndarray] = field(default_factory=dict)


Member = Callable[[Tensor], Seen]


@dataclass
class Comparison:
    """Two members by name, and what was counted of them."""

    reference: str
    candidate: str
    outputs: Outputs
    codes: CodeCounts
    units: UnitErrors

    def add(self, seen: Mapping[str, Seen], labels: Tensor) -> None:
        """A batch that both have seen."""
        reference, candidate = seen[self.reference], seen[self.candidate]
        self.outputs.add(reference.outputs, candidate.outputs, labels)
        for name in self.codes.names:
            self.codes.add(name, reference.codes[name], candidate.codes[name], len(labels))
        for name in self.units.names:
            self.units.add(name, reference.units[name], candidate.units[name])

    @property
    def members(self) -> tuple[str, str]:
        """The names of both."""
        return self.reference, self.candidate

    @property
    def parts(self) -> tuple[Outputs, CodeCounts, UnitErrors]:
        """Everything that was counted."""
        return self.outputs, self.codes, self.units


def compare(
    reference: str, candidate: str, *, classifies: bool, codes: Iterable[str] = (), units: Iterable[str] = ()
) -> Comparison:
    """A comparison that has seen nothing yet; ``codes``, ``units``: of which quantisers and units, if of any."""
    return Comparison(reference, candidate, Outputs(classifies), CodeCounts(codes), UnitErrors(units))


@torch.inference_mode()
def stream(
    members: Mapping[str, Member],
    comparisons: dict[str, Comparison],
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    images: int,
    what: str,
    state: "StateFile | None" = None,
    may_fail: Container[str] = (),
) -> dict[str, GplqError]:
    """Run every member that a comparison needs on all images.

    Args:
        members: by name.
        comparisons: by name; filled in place, without those that a member could not be run for.
        batches: (images [B, C, H, W], labels [B]) from image number so-and-so on.
        images: how many there are.
        what: for the progress line.
        state: where to write down what was counted, and to go on from.
        may_fail: members that are files: one that cannot run an image ends its own comparisons, which are left out.

    Returns:
        Which of them failed, and why.
    """
    failed: dict[str, GplqError] = {}
    done = 0 if state is None else state.restore(comparisons)
    with progress(images, what, "image", initial=done) as bar:
        for inputs, labels in batches(done) if done < images else ():
            seen: dict[str, Seen] = {}
            for name in dict.fromkeys(name for each in comparisons.values() for name in each.members):
                try:
                    seen[name] = members[name](inputs)
                except (UsageError, BuildError) as error:
                    if name not in may_fail:
                        raise
                    failed[name] = error
            for name in [name for name, each in comparisons.items() if not seen.keys() >= {*each.members}]:
                del comparisons[name]
            for each in comparisons.values():
                each.add(seen, labels)
            done += len(labels)
            bar.update(len(labels))
            if state is not None:
                state.save_sometimes(comparisons, done)
    if state is not None:
        state.save(comparisons, done)  # what comes after may be interrupted, too
    return failed


class StateFile:
    """What a stream has counted, on disk: arrays only, written atomically, taken up if they are of the same check."""

    def __init__(self, path: Path, fingerprint: str, say: Callable[[str], None]) -> None:
        self.path, self.fingerprint, self.say = path, fingerprint, say
        self._saved = time.monotonic()

    def restore(self, comparisons: Mapping[str, Comparison]) -> int:
        """Fill the comparisons with what an earlier run counted; returns how many images that was."""
        parts = {_prefix(name, part): part for name, each in comparisons.items() for part in each.parts}
        wanted = {prefix: {key: f"{prefix}{key}" for key in part.state()} for prefix, part in parts.items()}
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                if str(stored["fingerprint"]) != self.fingerprint:
                    return 0
                done = int(stored["done"])
                arrays = {
                    prefix: {key: stored[name] for key, name in names.items()} for prefix, names in wanted.items()
                }
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, TypeError, LookupError, EOFError, zipfile.BadZipFile):
            self.say(f"{self.path} cannot be read: starting anew")
            return 0
        for prefix, part in parts.items():
            part.restore(arrays[prefix])
        if done:
            self.say(f"going on at image {done}, where an earlier check was interrupted")
        return done

    def save_sometimes(self, comparisons: Mapping[str, Comparison], done: int) -> None:
        """Write, if that was long ago."""
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self.save(comparisons, done)

    def save(self, comparisons: Mapping[str, Comparison], done: int) -> None:
        """Write what was counted.

        Raises:
            UsageError: the folder cannot be written to.
        """
        arrays: State = {"fingerprint": np.asarray(self.fingerprint), "done": np.asarray(done)}
        for name, each in comparisons.items():
            for part in each.parts:
                arrays |= {_prefix(name, part) + key: array for key, array in part.state().items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # its stub takes the arrays for allow_pickle
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
        self._saved = time.monotonic()

    def remove(self) -> None:
        """The check is complete."""
        self.path.unlink(missing_ok=True)


def _prefix(comparison: str, part: object) -> str:
    return f"{comparison}/{type(part).__name__}/"
