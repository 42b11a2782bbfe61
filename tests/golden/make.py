"""Makes the golden checkpoint again: the tiny ViT of the tests, trained and quantised, with the images for both.

    python tests/golden/make.py

It is committed, because it stands for the files that users have: every later version must read it and compute what its
golden outputs say. Make it again only if that is given up on purpose.
"""

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from conftest import fast_recipe, make_arrays, write_model  # noqa: E402  found only now

from gplq.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from gplq.data import batches, open_images  # noqa: E402
from gplq.models import load_model  # noqa: E402
from gplq.pipeline import quantize  # noqa: E402


def main() -> None:
    """Write ``model.pt`` and ``images.npz`` beside this file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    arrays = {}
    for split, count, seed in (("train", 256, 1), ("test", 600, 2)):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = make_arrays(count, seed)
    np.savez_compressed(FOLDER / "images.npz", **arrays)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that the checkpoint names its inputs without a place
        Path("images.npz").symlink_to(FOLDER / "images.npz")
        train(write_model(Path("tiny")))
        quantize(load_model("tiny"), "images.npz", FOLDER / "model.pt", fast_recipe(), force=True)
    made = load_checkpoint(FOLDER / "model.pt")
    command = ["tests/golden/make.py"]
    provenance = {key: value for key, value in made.provenance.items() if key != "platform"}
    save_checkpoint(replace(made, provenance={**provenance, "command": command}), FOLDER / "model.pt")


def train(folder: Path) -> None:
    """Train the model in a folder until it knows what it has to do."""
    source = load_model(str(folder))
    images = open_images("images.npz", "train", source.preprocessing)
    optimizer = torch.optim.AdamW(source.model.parameters(), lr=1e-3)
    for _ in range(10):
        for inputs, labels in batches(images, 32, torch.randperm(len(images)).tolist()):
            optimizer.zero_grad()
            F.cross_entropy(source.model(inputs), labels).backward()
            optimizer.step()
    safetensors.torch.save_file(source.model.state_dict(), folder / "model.safetensors")


if __name__ == "__main__":
    main()
