"""Cut the small calibration set beside this file out of the whole of Fashion-MNIST.

    python calib/fashion_mnist/cut.py --source full/fashion_mnist.npz --out calib/fashion_mnist/fashion_mnist.npz

Both files hold ``train_images`` uint8 [N, 28, 28], ``train_labels`` uint8 [N], ``test_images`` and ``test_labels``:
N is 60,000 and 10,000 in the source, 8,192 and 2,048 in the cut. Every class has the same number of images, or one
more; which ones, and in which order, a fixed seed decides. The same source gives the same bytes, and so the same
sha256 as in NOTICE (another zlib may compress differently; the arrays are the same then too).
"""

import argparse
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SEED = 20260101
SIZES = {"train": 8192, "test": 2048}
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # np.savez writes the current time instead, which changes the hash on every run

Bytes = NDArray[np.uint8]


def stratified(labels: Bytes, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Choose ``size`` indices, the same number of each class or one more, in random order.

    >>> chosen = stratified(np.array([0, 0, 0, 1, 1, 1], dtype=np.uint8), 5, np.random.default_rng(0))
    >>> len(set(chosen.tolist())), np.bincount(np.array([0, 0, 0, 1, 1, 1])[chosen]).tolist()
    (5, [3, 2])
    """
    classes = np.unique(labels)
    share, rest = divmod(size, len(classes))
    chosen = []
    for position, label in enumerate(classes):
        wanted = share + (position < rest)
        available = np.flatnonzero(labels == label)
        if len(available) < wanted:
            raise SystemExit(f"class {label} has {len(available)} images, {wanted} are needed: give the full set")
        chosen.append(rng.permutation(available)[:wanted])
    return rng.permutation(np.concatenate(chosen))


def cut(source: Path) -> dict[str, Bytes]:
    """Read the whole data set and return the four arrays of the cut."""
    rng = np.random.default_rng(SEED)
    arrays: dict[str, Bytes] = {}
    with np.load(source, allow_pickle=False) as full:
        for split, size in SIZES.items():
            images, labels = full[f"{split}_images"], full[f"{split}_labels"]
            chosen = stratified(labels, size, rng)
            arrays[f"{split}_images"] = images[chosen]
            arrays[f"{split}_labels"] = labels[chosen]
    return arrays


def write_npz(path: Path, arrays: dict[str, Bytes]) -> None:
    """Write what ``np.savez_compressed`` writes, but with a fixed time, so that equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=ZIP_EPOCH)
            info.create_system = 3  # otherwise 0 on Windows, which changes the hash
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, entry.getvalue(), compresslevel=9)


def main() -> None:
    """Cut, write, and print what NOTICE and the reader want to know."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--source", type=Path, required=True, help="npz of all 70,000 images")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("fashion_mnist.npz"))
    args = parser.parse_args()
    arrays = cut(args.source)
    write_npz(args.out, arrays)
    for split in SIZES:
        print(f"{split}: images a class {np.bincount(arrays[f'{split}_labels']).tolist()}")
    content = args.out.read_bytes()
    print(f"{args.out}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
