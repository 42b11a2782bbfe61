"""What a classifier's answers say about the labels that it is measured with; needs neither names nor metadata.

Labels in another order than the model's, or images prepared in another way than in training, make PyTorch and every
exported file wrong together: no comparison between them can notice.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gplq.data import ImageSet
from gplq.errors import DataError
from gplq.evaluate import Accuracy, answers

Numbers = NDArray[np.int64]

_DEVIATIONS = 3.29  # 99.9 %
_ERRORS = 0.4  # the share of the errors that another numbering must explain
_TOLD_APART = 0.85  # see _told_apart: what networks that were never trained seldom reach
_USEFUL = 0.2  # of the way from guessing to no errors: what is surely below is no classifier
_SHOWN = 3


def trusted_top1(
    model: nn.Module,
    images: ImageSet,
    num_classes: int,
    what: str,
    *,
    trust_labels: bool = False,
    say: Callable[[str], None] = print,
) -> Accuracy:
    """As :func:`gplq.evaluate.top1`, unless the answers speak against the labels.

    An accuracy that is surely below chance, which no other numbering explains, is passed on with a warning to ``say``.

    Raises:
        DataError: see :func:`doubt`; not if ``trust_labels``.
    """
    labels, said = answers(model, images, what).numpy()
    accuracy = Accuracy(int((labels == said).sum()), len(labels))
    if not trust_labels and (why := doubt(labels, said, num_classes, images.classes)):
        raise DataError(f"{what} on {images.source}: top-1 {accuracy} (n = {accuracy.n}), {why}")
    if accuracy.interval(_DEVIATIONS)[1] < 100 / num_classes:
        say(
            f"WARNING: {what} on {images.source}: top-1 {accuracy} (n = {accuracy.n}) is below chance, "
            f"{100 / num_classes:.2f} %. Look whether labels, preprocessing and weights belong together."
        )
    return accuracy


def doubt(labels: Numbers, said: Numbers, num_classes: int, names: Sequence[str] | None = None) -> str | None:
    """Why the labels cannot be the model's, in words; None if nothing speaks for it.

    Two tests, in which few images alone or many classes alone raise no alarm:

    - *Numbering.* On every second image of each class, a one-to-one assignment of labels to answers is found, and held
      against the other images, and the other way round. It is believed if it makes two fifths of the errors right, net
      of the answers that it spoils, and if that is certain at 99.9 % (McNemar's test: of the images that it changes,
      half would improve by chance). An assignment that only fits the images on which it was found, as there always is
      one for few images of many classes, gains nothing on others. And nearly every class must have an answer of its
      own: a network that was never trained also says the same of alike images, but of several classes the same.
    - *Guessing.* The 99.9 % interval (Wilson) holds chance, 1 / classes or what the same answers would give if they
      were dealt out to the images at random, and ends below the accuracy of a classifier that knows a fifth of the
      images and guesses the others.

    Args:
        labels: of the images, class numbers, int64 [n].
        said: what the model answers, likewise.
        num_classes: of the model.
        names: of the classes.
    """
    if num_classes < 2:
        return None
    called = [f"class {k}" if names is None else f"class {k} ('{names[k]}')" for k in range(num_classes)]
    right = labels == said
    half = _place_in_class(labels) % 2
    renamed = np.empty_like(labels)
    for side in (0, 1):
        renamed[half == side] = _assignment(labels[half != side], said[half != side], num_classes)[labels[half == side]]
    gained, lost = int(((renamed == said) & ~right).sum()), int(((renamed != said) & right).sum())
    gain, errors = gained - lost, int((~right).sum())
    certain = gain >= _ERRORS * errors > 0 and gain >= _DEVIATIONS * math.sqrt(gained + lost)
    if certain and _told_apart(all_images := _assignment(labels, said, num_classes), labels, said) >= _TOLD_APART:
        moved = [k for k in np.argsort(-np.bincount(labels, minlength=num_classes)) if all_images[k] not in (-1, k)][
            :_SHOWN
        ]
        examples = "; ".join(f"{called[k]} is mostly taken for {called[all_images[k]]}" for k in moved)
        return (
            f"but {100 * (right.sum() + gain) / len(labels):.2f} % if the classes were numbered otherwise (as one half "
            f"of each class's images suggests for the other half): {examples}. Most often the data numbers its classes "
            "in another order than the model (--class-order, names of folders, label_names); or the images are "
            f"prepared otherwise than in training. {_GO_ON}"
        )
    low, high = Accuracy(int(right.sum()), len(labels)).interval(_DEVIATIONS)
    chance = 100 / num_classes
    shares = [np.bincount(numbers, minlength=num_classes) / len(numbers) for numbers in (labels, said)]
    dealt = 100 * float(shares[0] @ shares[1])
    at_chance = low <= max(chance, dealt) and high >= min(chance, dealt)
    if at_chance and high < chance + _USEFUL * (100 - chance):
        return (
            f"which is guessing: chance is {chance:.2f} % of {num_classes} classes. The labels, the preprocessing "
            f"(size, mean, std) or the weights are not those of the training. {_GO_ON}"
        )
    return None


_GO_ON = "If you know better, --trust-labels goes on with things as they are."


def _told_apart(assignment: Numbers, labels: Numbers, answers: Numbers) -> float:
    """What a one-to-one assignment makes right, as a share of what each class's most frequent answer does."""
    num_classes = len(assignment)
    pairs, counts = np.unique(labels * num_classes + answers, return_counts=True)
    most = np.zeros(num_classes, np.int64)
    np.maximum.at(most, pairs // num_classes, counts)
    return float((assignment[labels] == answers).sum() / most.sum())


def _place_in_class(labels: Numbers) -> Numbers:
    """For each image, how many of its class are before it."""
    order = np.argsort(labels, kind="stable")
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    places = np.empty_like(labels)
    places[order] = np.arange(len(labels)) - np.repeat(first, counts)
    return places


def _assignment(labels: Numbers, answers: Numbers, num_classes: int) -> Numbers:
    """An answer of its own for each class, [num_classes]: the most frequent pairs first, the class itself if tied.

    Where most images of each class get the same answer, this is the best assignment; where it is not, it is one that
    explains less, and never a false one: other images decide. It needs no matrix of classes by classes.
    """
    pairs, counts = np.unique(labels * num_classes + answers, return_counts=True)
    rows, columns = pairs // num_classes, pairs % num_classes
    chosen = np.full(num_classes, -1)  # no answer: what is left for those that come last
    free = np.ones(num_classes, bool)
    for k in np.lexsort((rows != columns, -counts)):
        if chosen[rows[k]] < 0 and free[columns[k]]:
            chosen[rows[k]] = columns[k]
            free[columns[k]] = False
    itself = np.flatnonzero((chosen < 0) & free)
    chosen[itself] = itself
    return chosen
