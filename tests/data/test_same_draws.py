"""The crop, the flip and the mixture of an image depend on (seed, epoch, image) alone: in every loader, with any number
of processes and any batch size, and from any step on."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.data import DataOptions, create_loaders
from fastkd.data.pack import Packing, pack
from fastkd.data.pack_source import read_source
from fastkd.engine.mixup import Mixup

CPU, SEED, IMAGES = torch.device("cpu"), 11, 26
LEVEL = 1 / 255 / 0.229  # a step of a byte after normalising
WITHOUT_DALI = pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="no DALI")
SHARES = [(1, 8, 0), (1, 6, 2), (2, 4, 1), (3, 4, 0), (3, 6, 1)]  # processes, images in a batch, first step


def write_ramps(root, sizes):
    """Images that tell where a pixel is from: red grows to the right, green downwards, blue is the image's own."""
    for part in ("train", "val"):
        for i in range(IMAGES):
            height, width = sizes[i % len(sizes)]
            y, x = np.mgrid[:height, :width]
            pixels = np.stack([30 + 200 * x / width, 30 + 200 * y / height, np.full(x.shape, 9 * i)], -1)
            folder = root / part / "abc"[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.round().astype(np.uint8)).save(folder / f"{i:02}.png")
    return root


@pytest.fixture(scope="module", params=["one size", "many sizes"])
def ramps(request, tmp_path_factory):
    """{"folder": ..., "dali": ..., "packed": ...}, and "resident" if the images are small squares of one size."""
    root, is_small = tmp_path_factory.mktemp("ramps"), request.param == "one size"
    folder = str(write_ramps(root / "images", [(64, 64)] if is_small else [(70, 100), (128, 90), (75, 75)]))
    packed = str(root / "packed")
    source = read_source(DataOptions(data=folder), lambda line: None)
    pack(packed, Packing("pixels", 128), *source, 0, lambda new, old: None)
    return {"folder": folder, "dali": folder, "packed": packed, **({"resident": folder} if is_small else {})}


def mixed(data, kind, world_size=1, batch_size=8, first=0):
    """{(epoch, number): (mixed image, label)} of two epochs, from step `first` of the first one on."""
    options = DataOptions(
        data=data, loader="auto" if kind == "packed" else kind, augment="rrc", image_size=64, train_size="48",
        batch_size=batch_size, workers=1 if kind in ("dali", "packed") else 0,
    )  # fmt: skip
    found = {}
    for rank in range(world_size):
        train, _ = create_loaders(
            options, CPU, seed=SEED, rank=rank, world_size=world_size, paired=True, epochs=2, log=lambda line: None
        )
        assert train.name == kind
        mixup = Mixup(0.4, 1.0, 0.1, len(train.classes), SEED)
        train.load_state_dict({"loader": kind, "epoch": 0, "step": first})
        for epoch in range(2):
            for step, (images, target) in enumerate(train, 0 if epoch else first):
                samples = train.samples_of(epoch, step)
                mixture = mixup(images, target, train.shard.view(epoch), samples)
                found |= {(epoch, number): pair for number, *pair in zip(samples.tolist(), *mixture, strict=True)}
    return found


@pytest.fixture(scope="module")
def wanted(ramps):
    """Those of torchvision's crops, in one process."""
    return mixed(ramps["folder"], "folder")


@pytest.mark.parametrize("kind", ["folder", pytest.param("dali", marks=WITHOUT_DALI), "packed", "resident"])
def test_every_loader_gives_the_same_crops_flips_and_mixtures(ramps, wanted, kind):
    if kind not in ramps:
        pytest.skip("images of many sizes are not kept in memory")
    alone = mixed(ramps[kind], kind)
    assert alone.keys() == wanted.keys() == {(epoch, number) for epoch in range(2) for number in range(IMAGES)}
    for key, (image, label) in alone.items():
        assert torch.equal(label, wanted[key][1])
        assert float((image - wanted[key][0]).abs().mean()) < 1.5 * LEVEL, (kind, key)
    moved = [float((wanted[0, i][0] - wanted[1, i][0]).abs().mean()) for i in range(IMAGES)]
    assert min(moved) > 3 * LEVEL  # another epoch, another image: the limit above tells them apart
    for share in SHARES:
        found = mixed(ramps[kind], kind, *share)
        assert {key for key in found if key[0] == 1} == {key for key in alone if key[0] == 1}
        assert len(found) == len(alone) if share[2] == 0 else IMAGES < len(found) < len(alone)
        for key, (image, label) in found.items():
            assert torch.equal(label, alone[key][1])
            torch.testing.assert_close(image, alone[key][0], atol=1e-5, rtol=0)
