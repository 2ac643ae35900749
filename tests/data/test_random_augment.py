"""RandAugment, random erasing, repeated augmentation, bicubic resizing and --crop-pct."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastkd.data import DataOptions, create_eval_loader, create_loaders
from fastkd.data.order import COPY, IMAGE, Shard, repeated
from fastkd.data.random_augment import RandomAugment, seeded
from fastkd.data.scan import scan
from fastkd.errors import UserError

CPU = torch.device("cpu")
STRONG = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.5, "aug_repeats": 3, "interpolation": "bicubic"}


def loaders(root, workers=0, batch_size=8, paired=False, rank=0, world_size=1, log=lambda line: None, **options):
    data = DataOptions(data=str(root), workers=workers, batch_size=batch_size, image_size=48, **options)
    return create_loaders(data, CPU, seed=5, rank=rank, world_size=world_size, paired=paired, log=log)


def images_of(loader):
    return torch.cat([images.clone() for images, _ in loader])


def by_sample(loader, first=0):
    """{number of the image and its copy: the crop} of an epoch from step `first` on."""
    found = {}
    for step, (images, _) in enumerate(loader, first):
        found |= dict(zip(loader.samples_of(0, step).tolist(), images, strict=True))
    return found


def test_draws_depend_on_seed_epoch_and_image_alone(pictures):
    wanted = by_sample(loaders(pictures, **STRONG)[0])
    plain = by_sample(loaders(pictures, aug_repeats=3, interpolation="bicubic")[0])
    assert wanted.keys() == plain.keys() and len(wanted) == 27
    assert sum(not torch.equal(image, plain[sample]) for sample, image in wanted.items()) > 20
    for workers, processes, batch_size, first in ((2, 1, 8, 0), (0, 1, 4, 3), (0, 2, 6, 1), (0, 3, 4, 0)):
        for rank in range(processes):
            train, _ = loaders(pictures, workers, batch_size, rank=rank, world_size=processes, **STRONG)
            train.load_state_dict({"loader": "folder", "epoch": 0, "step": first})
            for sample, image in by_sample(train, first).items():
                assert torch.equal(image, wanted[sample]), (processes, sample)


def test_copies_of_an_image_and_epochs_get_draws_of_their_own(pictures):
    train, _ = loaders(pictures, aa="rand-m9", aug_repeats=3)
    first = by_sample(train)
    second = {number: image for number, image in zip(train.order(1).tolist(), images_of(train), strict=True)}
    copies = [[first[i | c << COPY] for c in range(3)] for i in {sample & IMAGE for sample in first}]
    assert len(copies) == 9 and all(not torch.equal(a, b) for a, b, _ in copies)
    assert first.keys() != second.keys()
    assert all(not torch.equal(first[sample], second[sample]) for sample in first.keys() & second.keys())


def test_the_global_generators_are_put_back():
    def numbers():
        return random.random(), np.random.random(), torch.rand(()).item()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    wanted = numbers()
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    with pytest.raises(KeyError), seeded(1, 2, 3):
        inside = numbers()
        raise KeyError
    assert numbers() == wanted != inside
    with seeded(1, 2, 3):
        assert numbers() == inside


def test_rand_augment_is_timms_with_the_parameters_of_its_training():
    from timm.data.transforms_factory import transforms_imagenet_train

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mean = (0.485, 0.456, 0.406)
    for seed in range(8):
        ours = RandomAugment("rand-m7-n3-mstd0.5-inc1", 0.0, mean, "bicubic")
        got = ours(torch.from_numpy(np.array(image)).permute(2, 0, 1), (seed, seed, seed))
        theirs = transforms_imagenet_train(
            64, auto_augment="rand-m7-n3-mstd0.5-inc1", interpolation="bicubic", mean=mean, separate=True
        )[1]
        with seeded(seed, seed, seed):
            wanted = np.array(theirs(image))
        assert np.array_equal(got.permute(1, 2, 0).numpy(), wanted), seed


def test_erasing_fills_a_rectangle_with_the_mean_colour():
    crop, colour = torch.full((3, 40, 40), 250, dtype=torch.uint8), torch.tensor([124, 116, 104]).view(3, 1, 1)
    erased = [RandomAugment("", 1.0, (0.485, 0.456, 0.406), "bilinear")(crop, (1, 1, seed)) for seed in range(40)]
    for image in erased:
        changed = (image != crop).any(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        area = len(rows) * len(columns)
        assert changed.sum() == area and 0.01 < area / 1600 < 0.36  # a full rectangle
        assert torch.equal(image[:, changed], colour.flatten(1).expand(-1, area).to(torch.uint8))
    half = RandomAugment("", 0.5, (0.485, 0.456, 0.406), "bilinear")
    assert 8 < sum(torch.equal(half(crop, (1, 1, seed)), crop) for seed in range(40)) < 32


@pytest.mark.parametrize("samples", [2, 3, 7, 12, 100, 257])
@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_repeated_order_has_the_first_images_each_so_many_times(samples, repeats):
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(samples))
    singles, pairs = (repeated(order, repeats, paired) for paired in (False, True))
    assert len(singles) == len(pairs) == samples
    assert all(len(set(each.tolist())) == samples for each in (singles, pairs))
    assert torch.equal(singles & IMAGE, order.repeat_interleave(repeats)[:samples])  # as timm's sampler
    partners = (pairs[: samples // 2 * 2] & IMAGE).view(-1, 2)
    assert bool((partners[:, 0] != partners[:, 1]).all())
    if samples == 257:  # each copy has another partner, but for those of the last block
        whole = partners[: samples // (2 * repeats) // repeats * repeats * repeats].tolist()
        assert len({tuple(sorted(pair)) for pair in whole}) == len(whole)
    shard = Shard(seed=3, paired=True, repeats=repeats)
    assert torch.equal(shard.order(samples, 1), repeated(Shard(seed=3).order(samples, 1), repeats, True))


def test_evaluation_follows_crop_pct_and_interpolation(pictures):
    split = scan(str(pictures / "val"))
    options = DataOptions(
        data=str(pictures), loader="folder", workers=0, image_size=64, crop_pct=0.95, interpolation="bicubic",
        mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    images = images_of(create_eval_loader(options, CPU))
    transform = v2.Compose([v2.Resize(67, v2.InterpolationMode.BICUBIC), v2.CenterCrop(64)])  # floor(64 / 0.95)
    for image, file in zip(images, split.files, strict=True):
        wanted = np.asarray(transform(Image.open(file).convert("RGB")))
        assert np.abs(image.permute(1, 2, 0).mul(255).numpy() - wanted).mean() < 0.6, file


def test_auto_takes_the_loader_that_follows_the_options(pictures):
    lines = []
    train, _ = loaders(pictures, aa="rand-m5", log=lines.append)
    assert train.name == "folder" and any("--aa rand-m5 is for --loader folder" in line for line in lines)


REFUSED = [
    ({"aa": "rand-m7-foo"}, "--aa 'rand-m7-foo': give RandAugment"),
    ({"aa": "original"}, "--aa 'original': give RandAugment"),
    ({"reprob": 1.5}, "--reprob 1.5: give a probability"),
    ({"crop_pct": 95.0}, "--crop-pct 95.0: give a fraction"),
    ({"aug_repeats": -1}, "--aug-repeats -1: give at least 0"),
    ({"aug_repeats": 1}, "--aug-repeats 1: give 0 for no repeated augmentation, or at least 2"),
    ({"aug_repeats": 3, "views": 4}, "--aug-repeats 3 and --views 4"),
    ({"interpolation": "lanczos"}, "--interpolation must be one of bilinear, bicubic, got 'lanczos'"),
    ({"aa": "rand-m7", "loader": "dali"}, "--aa rand-m7 is for --loader folder, and --loader is dali.*--loader folder"),
    ({"crop_pct": 0.9, "loader": "resident"}, "--crop-pct 0.9 is for --loader folder or dali or packed"),
    ({"reprob": 0.1, "data": "digits"}, "--reprob 0.1 is for --loader folder, and the images of --data digits"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_cannot_be_followed_is_refused_before_a_run(options, words):
    with pytest.raises(UserError, match=words):
        DataOptions(**{"data": "somewhere", **options})


def test_training_options_are_refused_for_evaluation(pictures):
    with pytest.raises(UserError, match="--aa rand-m5 is for training"):
        create_eval_loader(DataOptions(data=str(pictures), aa="rand-m5"), CPU)


@pytest.mark.parametrize("aa", ["rand-m10-inc1", "rand-m2"])
def test_posterize_keeps_a_bit(aa):
    """timm asks for 0 bits at these magnitudes, which Pillow refuses; a crop in 15 had it."""
    augment, crop = RandomAugment(aa, 0.0, (0.5, 0.5, 0.5), "bilinear"), torch.zeros(3, 16, 16, dtype=torch.uint8)
    assert len({augment(crop, (seed, seed, seed)).sum().item() for seed in range(200)}) > 1
