"""Whose labels are these? The classes of a data set against those of a model, by name and by order."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import category, normalize

from timm.utils.misc import natural_key

from gplq.errors import DataError

if TYPE_CHECKING:
    from gplq.data import ImageSet


def check_labels(
    images: "ImageSet", num_classes: int, label_names: Sequence[str] | None, *, order_is_known: bool = False
) -> str | None:
    """Make the labels those of the model, or refuse: a wrong class order would look like a broken model.

    Classes (folders, say) that are named like the model's labels are matched by name, others by their order, which is
    only sound if there are as many as the model has classes, if no name that both have stands at another place, and if
    there is one order: torchvision sorts folders alphabetically (1, 10, 2; Zebra, ant), timm naturally and without
    regard to case (1, 2, 10; ant, Zebra).

    Args:
        images: their labels are changed in place.
        num_classes: of the model.
        label_names: of the model, if it has names.
        order_is_known: the alphabetical order is right, even where timm's would be another.

    Returns:
        What was assumed, in words; None if names or numbers say it.

    Raises:
        DataError: the classes do not fit the model, or their order is not known.
    """
    names = list(label_names or [])
    classes = images.classes
    by_name, limit = False, num_classes
    if classes is not None:
        # The very same list: there is nothing to match, and a name may stand for two classes.
        same = classes == names
        by_name = not same and set(classes) <= set(names)
        if by_name:
            twice = [name for name, count in Counter(names).items() if count > 1 and name in classes]
            if twice:
                raise DataError(
                    f"the model has more than one label '{twice[0]}', so that the class of that name in "
                    f"{images.source} cannot be matched. Give the data all {num_classes} classes in the model's order."
                )
        elif len(classes) != num_classes:
            raise DataError(_unmatched(images, num_classes, label_names))
        elif not same:
            _check_places(images, names)
            if not order_is_known:
                _check_order(images, label_names)
        limit = len(classes)
    lowest, highest = min(images.labels), max(images.labels)
    if lowest < 0 or highest >= limit:
        owner = "the model has" if classes is None else "and"
        raise DataError(f"{images.source} has labels {lowest} … {highest}, {owner} {limit} classes.")
    if classes is None or classes == names:
        return None
    if by_name:
        known = {name: index for index, name in enumerate(names)}
        images.labels = [known[classes[label]] for label in images.labels]
        images.classes = names  # in label order again, so that a second call changes nothing
        return None
    if not images.orders_classes and not names:
        return None
    called = f", for the model '{names[0]}' … '{names[-1]}'" if names else ""
    return f"the classes of {images.source} are numbered in this order: '{classes[0]}' … '{classes[-1]}'{called}"


def check_same_classes(images: "ImageSet", others: "ImageSet") -> None:
    """Refuse two sets, both after :func:`check_labels`, in which a number stands for classes of different names.

    Raises:
        DataError: see above.
    """
    if images.classes is None or others.classes is None or images.classes == others.classes:
        return
    raise DataError(
        f"{images.source} and {others.source} have as many classes, but not the same. "
        f"{_sides(images.classes, others.classes, ('the former', 'the latter'))}. Name the classes (folders) alike."
    )


def _unmatched(images: "ImageSet", num_classes: int, label_names: Sequence[str] | None) -> str:
    classes = images.classes or []
    sides = f"{images.source} has {len(classes)} classes, the model {num_classes}: the labels cannot be matched."
    if label_names:
        sides += f" {_sides(classes, label_names, ('the data', 'the model'))}."
    return f"{sides} Name the classes (folders) as the model's labels, or give all of them."


def _sides(ours: Sequence[str], theirs: Sequence[str], owners: tuple[str, str]) -> str:
    """Which names only one side has."""
    ours_only, theirs_only = ([n for n in a if n not in set(b)] for a, b in ((ours, theirs), (theirs, ours)))
    return f"Only {owners[0]} has {_few(ours_only)}; only {owners[1]} has {_few(theirs_only)}"


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"


def _check_places(images: "ImageSet", label_names: Sequence[str]) -> None:
    """Numbering by order is an assumption, which a name that both sides have, or nearly so, can prove wrong."""
    places: dict[str, list[int]] = {}
    for index, name in enumerate(label_names):
        places.setdefault(_plain(name), []).append(index)
    for index, name in enumerate(images.classes or []):
        known = places.get(_plain(name), [index])
        if index not in known:
            raise DataError(
                f"{images.source} has other class names than the model, and by order they contradict each other: its "
                f"class {index} is '{name}', the model's class {known[0]} is '{label_names[known[0]]}'. "
                f"{_sides(images.classes or [], label_names, ('the data', 'the model'))}. "
                "Name the classes (folders) as the model's labels."
            )


def _plain(name: str) -> str:
    """What is left of a name without the differences that writing it down makes.

    >>> _plain("Sea_lion"), _plain("sea-lion ")
    ('sea lion', 'sea lion')
    """
    # macOS writes an umlaut as two characters.
    return normalize("NFC", re.sub(r"[\s_-]+", " ", name).strip().casefold())


def _check_order(images: "ImageSet", label_names: Sequence[str] | None) -> None:
    classes = list(images.classes or [])
    natural = in_order(classes, "natural")
    if not images.orders_classes or natural == classes:
        return
    first = next(index for index, pair in enumerate(zip(classes, natural, strict=True)) if pair[0] != pair[1])
    names = f" The model's own names ({_few(list(label_names))}) are others." if label_names else ""
    raise DataError(
        f"{images.source}: which class is which? In alphabetical order (torchvision) class {first} is "
        f"'{classes[first]}', in natural order (timm's train.py) '{natural[first]}'.{names} Say how the model was "
        "trained: gplq quantize --class-order alphabetical, natural, or a FILE with one class a line."
    )


def class_names(images: "ImageSet", num_classes: int, order: str) -> list[str]:
    """The names of a model's labels, from what ``--class-order`` says of a set of class folders.

    Args:
        images: with class names.
        num_classes: of the model.
        order: "alphabetical", "natural", or the path of a text file with one class a line.

    Raises:
        DataError: the set has no class names, or the file cannot be read, or the two have other classes.
    """
    classes = images.classes
    if classes is None or not images.orders_classes:
        raise DataError(f"--class-order is about folders of classes; {images.source} numbers its classes itself.")
    if order in ("alphabetical", "natural"):
        names = in_order(classes, order)
    else:
        try:
            lines = Path(order).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"--class-order takes alphabetical, natural or a text file with one class a line; cannot read "
                f"{order}: {error}."
            ) from error
        names = [line.strip() for line in lines if line.strip()]
        missing = [name for name in classes if name not in names]
        if missing or len(set(names)) != len(names):
            what = f"lacks {_few(missing)}" if missing else "names a class twice"
            raise DataError(f"{order} {what}; {images.source} has {len(classes)} classes ({_few(classes)}).")
    if len(names) != num_classes:
        raise DataError(f"--class-order {order} gives {len(names)} classes, the model has {num_classes}.")
    return names


def is_text(name: str) -> bool:
    r"""Whether a name fits on a line and into a file of UTF-8, as lists of labels want it.

    >>> is_text("sea lion"), is_text("sea\nlion"), is_text("\udcfc")
    (True, False, False)
    """
    return not any(category(letter) in ("Cc", "Cs") for letter in name)


def in_order(classes: Sequence[str], order: str) -> list[str]:
    """Names of folders in the order in which torchvision ("alphabetical") or timm ("natural") numbers them."""
    return sorted(classes) if order == "alphabetical" else sorted(classes, key=natural_key)
