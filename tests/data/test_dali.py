"""The DALI loader, beside the torchvision one."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.data import DataOptions, create_loaders
from fastkd.data.base import IMAGENET_MEAN, IMAGENET_STD, training_slices
from fastkd.data.scan import scan
from fastkd.errors import UserError

Pipeline = pytest.importorskip("nvidia.dali").Pipeline
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])


def loaders(root, loader="dali", batch_size=8, image_size=64, workers=2, device="cpu", **more):
    options = DataOptions(data=str(root), loader=loader, workers=workers, batch_size=batch_size, image_size=image_size)
    return create_loaders(options, torch.device(device), **more)


def epoch(loader):
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


def labelled(tmp_path, samples: int):
    """A folder whose images tell which they are: one flat gray in each, and the number of grays apart."""
    for part in ("train", "val"):
        for i in range(samples):  # the last one is of another class
            folder = tmp_path / part / ("one" if i < samples - 1 else "two")
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (i * 5,) * 3).save(folder / f"{i:03}.png")
    return tmp_path


def numbers(images) -> list[int]:
    gray = images[:, 0, 0, 0].float().cpu() * IMAGENET_STD[0] + IMAGENET_MEAN[0]
    return (gray * 51).round().int().tolist()


@DEVICES
def test_batches_have_the_promised_form(pictures, device):
    train, val = loaders(pictures, device=device)
    assert train.classes == ("ant", "bee", "cow") and (train.samples, val.samples) == (27, 36)
    for loader, sizes in ((train, [8, 8, 8, 3]), (val, [8, 8, 8, 8, 4])):
        for _ in range(2):
            batches = list(loader)
            assert [len(target) for _, target in batches] == sizes and len(loader) == len(sizes)
            for images, target in batches:
                assert images.shape == (len(target), 3, 64, 64) and images.dtype == torch.float32
                assert images.is_contiguous(memory_format=torch.channels_last) and target.dtype == torch.int64
                assert images.device.type == target.device.type == device
                assert -2.2 < images.min() and images.max() < 2.7
    assert sorted(epoch(train)[1].tolist()) == [0] * 9 + [1] * 9 + [2] * 9


@DEVICES
def test_evaluation_agrees_with_torchvision(pictures, device, capsys):
    """Mean absolute difference below 2/255 before normalisation, for each image: RGB, gray, CMYK, up and down."""
    got, target = epoch(loaders(pictures, image_size=224, device=device)[1])
    want, want_target = epoch(loaders(pictures, "folder", image_size=224, workers=0)[1])
    assert torch.equal(target.cpu(), want_target)
    steps = (got.cpu() - want).abs() * torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255
    per_image = steps.mean((1, 2, 3))
    files = scan(str(pictures / "val")).files
    with capsys.disabled():
        for mode in ("RGB.jpg", "L.jpg", "CMYK.jpg", "RGB.png", "RGB.bmp", "RGB.webp"):
            some = [float(value) for file, value in zip(files, per_image, strict=True) if file.endswith("_" + mode)]
            print(f"\n{device} {mode:9} n={len(some):2} mean {np.mean(some):.3f} worst {max(some):.3f} of 255", end="")
    assert per_image.max() < 2, files[int(per_image.argmax())]


def test_evaluation_agrees_on_every_resized_size_and_crop(tmp_path):
    """Odd and even margins on both sides: a crop that is off by one pixel would show in a steep ramp."""
    for part in ("train", "val"):
        for name in ("one", "two"):
            (tmp_path / part / name).mkdir(parents=True)
        for i, (width, height) in enumerate([(80, 73), (73, 97), (99, 73), (73, 101), (73, 73), (103, 73), (75, 105)]):
            ramp = np.add.outer(np.arange(height) * 1.2, np.arange(width) * 1.2)[..., None].repeat(3, -1)
            Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / part / ("one" if i < 6 else "two") / f"{i}.png")
    got, want = (epoch(loaders(tmp_path, name, batch_size=2)[1])[0] for name in ("dali", "folder"))
    steps = (got - want).abs() * torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255
    assert steps.mean((1, 2, 3)).max() < 0.6 and steps.max() < 2.1


def test_exif_orientation_is_ignored_as_by_torchvision(small):
    image = Image.open(next((small / "val" / "ant").iterdir()))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(small / "val" / "ant" / "turned.jpg", exif=exif)
    got, want = (epoch(loaders(small, name)[1])[0] for name in ("dali", "folder"))
    assert (got - want).abs().mean((1, 2, 3)).max() < 0.03


@DEVICES
@pytest.mark.parametrize(
    "samples, batch_size, world", [(23, 4, 3), (17, 4, 2), (18, 8, 2), (10, 4, 2), (9, 8, 1), (21, 4, 5)]
)
def test_processes_share_each_epoch_and_every_epoch_is_shuffled(tmp_path, device, samples, batch_size, world):
    root = labelled(tmp_path, samples)
    ranks = [
        loaders(root, batch_size=batch_size, image_size=8, device=device, rank=r, world_size=world)
        for r in range(world)
    ]
    orders = []
    for _ in range(3):
        parts = []
        for rank, (train, _) in enumerate(ranks):
            batches = [numbers(images) for images, _ in train]
            sizes = [stop - start for start, stop in training_slices(samples, batch_size, rank, world)]
            assert [len(batch) for batch in batches] == sizes
            parts += sum(batches, [])
        assert sorted(parts) == list(range(samples))
        orders.append(tuple(parts))
    assert len({*orders, tuple(range(samples))}) == 4
    evaluated = [i for _, val in ranks for images, _ in val for i in numbers(images)]
    assert evaluated == list(range(samples))


def test_evaluation_of_more_processes_than_images(small):
    shares = [list(loaders(small, rank=rank, world_size=3)[1]) for rank in range(3)]
    assert sum(len(target) for share in shares for _, target in share) == 2 and [] in shares


def test_the_order_depends_on_the_seed(tmp_path):
    root = labelled(tmp_path, 23)
    seen = []
    for seed in (0, 1, 0):
        train, _ = loaders(root, image_size=8, seed=seed)
        seen.append([numbers(epoch(train)[0]) for _ in range(2)])
    assert seen[0] == seen[2] and seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]


@DEVICES
@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_bit_exact(pictures, device, world):
    for rank in range(world):
        train, _ = loaders(pictures, batch_size=4, device=device, rank=rank, world_size=world)
        states, epochs = [], []
        for _ in range(4):
            file = io.BytesIO()
            torch.save(train.state_dict(), file)
            states.append(file)
            epochs.append(epoch(train))
        for n, file in enumerate(states):
            again, _ = loaders(pictures, batch_size=4, device=device, rank=rank, world_size=world)
            file.seek(0)
            again.load_state_dict(torch.load(file, weights_only=True))
            for images, target in epochs[n:]:
                got, got_target = epoch(again)
                assert torch.equal(got, images) and torch.equal(got_target, target), (rank, n)
        assert not torch.equal(epochs[0][0], epochs[1][0])


def test_an_epoch_left_in_its_middle_is_given_again(pictures):
    train, _ = loaders(pictures, batch_size=4)
    epoch(train)
    start = next(iter(train))[0].clone()
    assert train.state_dict()["epoch"] == 1
    assert torch.equal(next(iter(train))[0], start) and torch.equal(epoch(train)[0][:4], start)


def test_the_processes_crop_differently(tmp_path):
    """Two processes that draw the same numbers would halve the augmentation."""
    root = labelled(tmp_path, 4)
    for file in (root / "train").glob("*/*"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file)
    images = [epoch(loaders(root, rank=rank, world_size=2)[0])[0] for rank in range(2)]
    assert not torch.equal(images[0], images[1])


@DEVICES
def test_batches_are_not_written_over(pictures, device):
    train, _ = loaders(pictures, batch_size=2, device=device)
    kept = [(images, images.clone()) for _ in range(3) for images, _ in train]
    assert len(kept) > 30 and all(torch.equal(images, copy) for images, copy in kept)


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_rounded_float(pictures, device, dtype):
    half, _ = epoch(loaders(pictures, device=device, dtype=dtype)[1])
    full, _ = epoch(loaders(pictures, device=device)[1])
    assert half.dtype == dtype and torch.allclose(half.float(), full, atol=1e-3 if dtype == torch.float16 else 1e-2)


def test_crops_and_flips_are_those_of_random_resized_crop(tmp_path):
    """The area of the crop, read off a ramp, is distributed as in the torchvision loader, and half are flipped."""
    ramp = np.stack(np.broadcast_arrays(np.arange(200)[None, :], np.arange(200)[:, None], 0), -1).astype(np.uint8)
    for part in ("train", "val"):
        for name in ("one", "two"):
            (tmp_path / part / name).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(ramp).save(tmp_path / part / ("one" if i < 39 else "two") / f"{i}.png")
    areas, flips = {}, {}
    for name in ("dali", "folder"):
        train, _ = loaders(tmp_path, name, batch_size=20, image_size=32)
        images = torch.cat([epoch(train)[0] for _ in range(10)])
        across = (images[:, 0, :, -1] - images[:, 0, :, 0]).mean(1) * IMAGENET_STD[0] * 255 / 200 * 32 / 31
        down = (images[:, 1, -1] - images[:, 1, 0]).mean(1) * IMAGENET_STD[1] * 255 / 200 * 32 / 31
        areas[name], flips[name] = across.abs() * down, (across < 0).float().mean()
    for name in areas:
        assert 0.42 < flips[name] < 0.58 and 0.06 < areas[name].min() and areas[name].max() < 1.04, name
    assert abs(areas["dali"].mean() - areas["folder"].mean()) < 0.06
    assert abs(areas["dali"].std() - areas["folder"].std()) < 0.05


def test_a_truncated_jpeg_is_named(truncated):
    train, _ = loaders(truncated.parents[2])
    with pytest.raises(UserError) as caught:
        list(train)
    message = str(caught.value)
    assert repr(str(truncated)) in message and "epoch 0, batch 0, rank 0" in message and "\n" not in message


def test_a_file_that_went_away_is_named(small):
    train, _ = loaders(small)
    gone = sorted((small / "train" / "bee").iterdir())[0]
    gone.unlink()
    with pytest.raises(UserError, match=gone.name) as caught:
        list(train)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused(pictures):
    with pytest.raises(UserError, match="workers=0: DALI decodes in at least one thread"):
        loaders(pictures, workers=0)
    train, _ = loaders(pictures)
    with pytest.raises(UserError, match="world_size=1 and this run has world_size=2"):
        loaders(pictures, world_size=2)[0].load_state_dict(train.state_dict())
    with pytest.raises(UserError, match="'folder' loader and this run uses 'dali'"):
        train.load_state_dict({"loader": "folder", "epoch": 1})


def test_auto_takes_dali_and_says_so(pictures):
    said = []
    train, _ = create_loaders(DataOptions(data=str(pictures)), torch.device("cpu"), log=said.append)
    assert type(train).__name__ == "DaliLoader" and len(said) == 1 and "DALI" in said[0]


@pytest.fixture
def no_driver(monkeypatch):
    """A DALI that cannot start."""

    def build(pipeline):
        raise RuntimeError("CUDA driver\n is too old")

    monkeypatch.setattr(Pipeline, "build", build)


def chosen(pictures, loader, **more):
    """(names of the loaders, what was logged, the training loader)"""
    said = []
    options = DataOptions(data=str(pictures), loader=loader, workers=1, batch_size=8, image_size=32)
    train, val = create_loaders(options, torch.device("cpu"), log=said.append, **more)
    return [type(train).__name__, type(val).__name__], said, train


def test_auto_takes_torchvision_if_dali_cannot_start_and_says_why(pictures, no_driver):
    names, said, _ = chosen(pictures, "auto")
    assert names == ["FolderLoader"] * 2
    assert said == ["data: decoding with torchvision (DALI cannot start here: CUDA driver is too old)"]


def test_dali_that_cannot_start_is_an_error_if_it_was_asked_for(pictures, no_driver):
    with pytest.raises(UserError, match="loader='dali': DALI cannot start here: CUDA driver is too old; .*'folder'"):
        chosen(pictures, "dali")


def test_all_processes_take_torchvision_if_one_cannot_start_dali(pictures):
    gathered = []

    def gather(problem):
        gathered.append(problem)
        return [problem, "DALI cannot start here: no GPU"]

    names, said, _ = chosen(pictures, "auto", gather=gather)
    assert gathered == [""] and names == ["FolderLoader"] * 2  # DALI starts in this process
    assert said == ["data: decoding with torchvision (process 1 of 2: DALI cannot start here: no GPU)"]
    with pytest.raises(UserError, match="loader='dali': process 1 of 2: DALI cannot start here: no GPU"):
        chosen(pictures, "dali", gather=gather)


def test_a_process_whose_dali_cannot_start_tells_the_others(pictures, no_driver):
    gathered = []
    chosen(pictures, "auto", gather=lambda problem: gathered.append(problem) or [problem] * 2)
    assert gathered == ["DALI cannot start here: CUDA driver is too old"]


def test_a_run_begun_with_dali_is_not_resumed_with_torchvision(pictures, request):
    state = chosen(pictures, "auto")[2].state_dict()
    request.getfixturevalue("no_driver")
    with pytest.raises(UserError, match="'dali' loader and this run uses 'folder'"):
        chosen(pictures, "auto")[2].load_state_dict(state)


def test_a_pipeline_is_built_once_for_the_first_epoch(pictures, monkeypatch):
    built, build = [], Pipeline.build
    monkeypatch.setattr(Pipeline, "build", lambda pipeline: built.append(pipeline) or build(pipeline))
    train = chosen(pictures, "auto")[2]
    list(train)
    assert len(set(built)) == 1  # run() calls build() too
