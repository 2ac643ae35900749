"""Training from packed pixels: the crops, flips and order of the other loaders, in any number of processes."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from fastkd.data import DataOptions, create_eval_loader, create_loaders
from fastkd.data.augment import crops_and_flips, resized_boxes
from fastkd.data.decode import decode
from fastkd.data.layout import training_splits
from fastkd.data.pack import Packing, pack
from fastkd.data.pack_format import packed_parts
from fastkd.data.pack_source import read_source
from fastkd.data.packed import PackedLoader, centred, scaled
from fastkd.data.scan import scan
from fastkd.errors import UserError

CPU = torch.device("cpu")


def quiet(line):
    pass


def packed_folder(source, folder, packing, **options):
    pack(str(folder), packing, *read_source(DataOptions(data=str(source), **options), quiet), 0, lambda new, old: None)
    return folder


@pytest.fixture(scope="module")
def squares(pictures, tmp_path_factory):
    return packed_folder(pictures, tmp_path_factory.mktemp("packed") / "squares", Packing("pixels", 128))


def loaders(data, size=48, batch_size=8, log=quiet, seed=5, dtype=torch.float32, rank=0, world_size=1, **more):
    options = DataOptions(data=str(data), workers=2, batch_size=batch_size, image_size=size, **more)
    place = {"rank": rank, "world_size": world_size}
    return create_loaders(options, CPU, seed=seed, dtype=dtype, log=log, **place)


def images_of(loader):
    """Copies of the images by their number, and the targets."""
    epoch, found, targets = loader.epoch, {}, {}
    for step, (images, target) in enumerate(loader):
        for number, image, label in zip(
            loader.samples_of(epoch, step).tolist(), images.clone(), target.tolist(), strict=True
        ):
            found[number], targets[number] = image, label
    return found, targets


@pytest.mark.parametrize(("size", "shown"), [(0, 224), (160, 160), (128, 0), (48, 0)])
def test_squares_smaller_than_the_images_are_said_to_be_enlarged(squares, size, shown):
    lines: list[str] = []
    loaders(squares, size=size, log=lines.append)
    said = [line for line in lines if "enlarged" in line]
    wanted = (
        f"images of 128 pixels are enlarged to {shown}: give --image-size 128, or pack them again with --size {shown}"
    )
    assert len(said) == bool(shown) and all(wanted in line for line in said)


def test_a_crop_is_that_of_the_folder(pictures, squares):
    """Against the same box cut out of the picture itself: the means differ by little, and each is nearest its own."""
    folder, packed = loaders(pictures, loader="folder")[0], loaders(squares)[0]
    for _ in range(2):
        theirs, labels = images_of(folder)
        ours, targets = images_of(packed)
        assert targets == labels and len(ours) == 27
        for number, image in ours.items():
            distances = {other: float((image - theirs[other]).abs().mean()) for other in theirs}
            assert distances[number] < 0.12 and min(distances, key=distances.__getitem__) == number
            assert distances[number] < float((image.flip(2) - theirs[number]).abs().mean())


def test_crops_are_torchvisions_of_the_square_bit_for_bit(squares):
    part = packed_parts(str(squares))["train"]
    pixels = np.load(part.shards[0])
    loader = PackedLoader(part, DataOptions(batch_size=8, workers=1, image_size=40), CPU, train=True)
    numbers = torch.arange(27)
    boxes = scaled(resized_boxes(0, 0, numbers, part.sizes), part.sizes, 128)
    flips = crops_and_flips(0, 0, numbers, pad=0, flip=True)[1]
    found, _ = images_of(loader)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (loader.mean, loader.std))
    for number, box, flip in zip(range(27), boxes.tolist(), flips.tolist(), strict=True):
        want = F.resized_crop(torch.from_numpy(pixels[number]).permute(2, 0, 1), *box, [40, 40])
        want = (want.flip(2) if flip else want).double() / 255
        torch.testing.assert_close(found[number].double(), (want - mean) / std, atol=2e-6, rtol=0)


def test_evaluation_is_the_centre_of_the_picture(pictures, squares):
    split = scan(str(pictures / "val"))
    _, val = loaders(squares, size=56)
    found, targets = images_of(val)
    assert [targets[i] for i in range(36)] == split.labels
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (val.mean, val.std))
    for i, file in enumerate(split.files):
        want = F.center_crop(F.resize(decode(file), [64]), [56]) / 255
        got = found[i] * std + mean
        assert float((got - want).abs().mean()) < 0.02, file


def test_boxes_stay_inside_and_keep_their_place():
    sizes = torch.tensor([[375, 500], [1, 3000], [3000, 1], [1, 1], [256, 256]])
    for view in range(50):
        boxes = scaled(resized_boxes(1, view, torch.arange(5), sizes), sizes, 256)
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all() and (boxes[:, :2] + boxes[:, 2:] <= 256).all()
        assert torch.equal(boxes[4], resized_boxes(1, view, torch.tensor([4]), (256, 256))[0].long())
    assert centred(torch.tensor([[256, 512]]), 224, 256).tolist() == [[16.0, 144.0, 224.0, 224.0]]


@pytest.mark.parametrize("world_size, batch_size", [(1, 5), (2, 8), (3, 4)])
def test_processes_batches_and_steps_change_no_image(squares, world_size, batch_size):
    alone, _ = images_of(loaders(squares)[0])
    found = {}
    for rank in range(world_size):
        train, _ = loaders(squares, batch_size=batch_size, rank=rank, world_size=world_size)
        found |= images_of(train)[0]
    assert found.keys() == alone.keys() and all(torch.equal(found[i], alone[i]) for i in alone)
    train, _ = loaders(squares)
    whole = [images.clone() for images, _ in train]
    train.load_state_dict({"loader": "packed", "epoch": 0, "step": 2})
    rest = [images.clone() for images, _ in train]
    assert len(rest) == len(whole) - 2 and all(map(torch.equal, rest, whole[2:]))


def test_batches_may_be_kept(squares):
    train, _ = loaders(squares)
    kept = [(images, images.clone()) for images, _ in train]
    assert all(torch.equal(*pair) for pair in kept)


def test_batches_have_the_promised_form(squares):
    lines = []
    for loader in loaders(squares, log=lines.append, dtype=torch.bfloat16):
        for images, target in loader:
            assert images.dtype == torch.bfloat16 and images.is_contiguous(memory_format=torch.channels_last)
            assert images.shape == (len(target), 3, 48, 48) and target.dtype == torch.int64
    assert len(lines) == 1 and lines[0].endswith(
        "holds packed images of 128 pixels: 27 images for train, 36 images for val"
    )


def test_eval_loader_and_views(squares):
    options = DataOptions(data=str(squares), workers=0, image_size=48, batch_size=36)
    (images, _), *rest = create_eval_loader(options, CPU, log=quiet)
    assert len(images) == 36 and not rest
    train, _ = loaders(squares, views=2)
    epochs = [images_of(train)[0] for _ in range(3)]
    assert torch.equal(epochs[0][3], epochs[2][3]) and not torch.equal(epochs[0][3], epochs[1][3])


def test_small_squares_are_resident_and_treated_as_their_set(tmp_path):
    digits = packed_folder("digits", tmp_path / "d", Packing("pixels", 32, known="digits"))
    ours, theirs = (loaders(data, size=0)[0] for data in (digits, "digits"))
    assert (ours.name, ours.mean, ours.std) == (theirs.name, theirs.mean, theirs.std) and ours.classes == theirs.classes
    for (images, target), (wanted, labels) in zip(ours, theirs, strict=True):
        assert torch.equal(images, wanted) and torch.equal(target, labels)


def test_small_squares_are_evaluated_as_large_images_are_if_the_network_was_trained_on_such(tmp_path):
    pixels = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    for i in range(16):
        file = tmp_path / "s" / ("train", "val")[i % 2] / "ab"[i // 2 % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels + 5 * i).convert("RGB").save(file)
    options = DataOptions(workers=0, image_size=64, batch_size=8)
    packed = packed_folder(tmp_path / "s", tmp_path / "p", Packing("pixels", 64))
    for keep_small, name in ((True, "resident"), (False, "packed")):
        batches = []
        for data, kind in ((packed, name), (tmp_path / "s", name.replace("packed", "folder"))):
            one = replace(options, data=str(data), loader="folder" if kind == "folder" else "auto")
            loader = create_eval_loader(one, CPU, log=quiet, keep_small=keep_small)
            assert loader.name == kind
            batches.append(next(iter(loader))[0].clone())
        assert float((batches[0] - batches[1]).abs().mean()) < 0.05


@pytest.mark.parametrize(
    "option, value",
    [("loader", "dali"), ("val_fraction", 0.1), ("unlabelled", "x"), ("exif", True), ("augment", "none")],
)
def test_options_that_packed_images_cannot_follow(squares, option, value):
    with pytest.raises(UserError, match=option):
        loaders(squares, **{option: value})


def test_small_squares_that_were_resized_are_not_kept_in_memory(pictures, tmp_path):
    folder = packed_folder(pictures, tmp_path / "p", Packing("pixels", 24))
    with pytest.raises(UserError, match="these were resized to 24 from other sizes when they were packed"):
        loaders(folder, loader="resident")


def test_a_shard_that_is_damaged_is_named(pictures, tmp_path):
    folder = packed_folder(pictures, tmp_path / "p", Packing("pixels", 64))
    train, _ = loaders(folder)
    os.truncate(folder / "train-00000.npy", 5000)
    with pytest.raises(UserError, match="train-00000.npy' cannot be read at image .* cut off"):
        list(train)
    with pytest.raises(UserError, match="train-00000.npy has 5,000 bytes instead of"):
        loaders(folder)
    (folder / "train-00000.npy").unlink()
    with pytest.raises(UserError, match="train-00000.npy is missing"):
        loaders(folder)


def test_a_pack_of_one_part_is_refused_for_training(pictures, tmp_path):
    folder = tmp_path / "one"
    classes, parts = read_source(DataOptions(data=str(pictures)), quiet)
    pack(str(folder), Packing("pixels", 64), classes, {"train": parts["train"]}, 0, lambda new, old: None)
    with pytest.raises(UserError, match="for train and none for val"):
        loaders(folder)


@pytest.mark.parametrize("kind, quality", [("files", 0), ("jpeg", 95)])
def test_tar_packs_are_read_as_shards(pictures, tmp_path, kind, quality):
    folder = packed_folder(pictures, tmp_path / kind, Packing(kind, 300 if quality else 0, quality))
    splits = training_splits(DataOptions(data=str(folder)), quiet)
    source = training_splits(DataOptions(data=str(pictures)), quiet)
    for name, split in splits.items():
        assert split.labels == source[name].labels and split.classes == ("ant", "bee", "cow")
        for i, file in enumerate(source[name].files):
            if kind == "files":
                assert split.places.read(i) == open(file, "rb").read()
            else:
                assert split.places.read(i)[:3] == b"\xff\xd8\xff"
    with open(folder / "train-00000.tar", "ab") as stream:
        stream.write(b"more")
    with pytest.raises(UserError, match="train-00000.tar has .* bytes instead of"):
        training_splits(DataOptions(data=str(folder)), quiet)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_crops_are_those_of_the_cpu(squares):
    """But for the antialiasing, which the kernel lacks: crops that become larger have none."""
    options = DataOptions(data=str(squares), workers=2, batch_size=8, image_size=128)
    for ours, theirs in zip(
        *(create_loaders(options, device, log=quiet) for device in (torch.device("cuda"), CPU)), strict=True
    ):
        for (images, target), (wanted, labels) in zip(ours, theirs, strict=True):
            assert images.is_contiguous(memory_format=torch.channels_last) and images.shape == wanted.shape
            assert torch.equal(target.cpu(), labels)
            assert float((images.cpu() - wanted).abs().max()) < 0.02  # the CPU rounds to bytes
