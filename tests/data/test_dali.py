"""The DALI loader, beside the torchvision one."""

import contextlib
import gc
import io
import os
import weakref
from dataclasses import replace

import damage
import numpy as np
import pytest
import torch
from PIL import Image

import fastkd.data.dali_files as dali_files
import fastkd.data.scan as scan_module
from fastkd.data import DataOptions, create_loaders, dali_start
from fastkd.data.base import IMAGENET_MEAN, IMAGENET_STD, first_batch
from fastkd.data.dali_source import Source
from fastkd.data.order import training_slices
from fastkd.data.scan import scan
from fastkd.errors import UserError
from fastkd.run.folder import claim_folder

Pipeline = pytest.importorskip("nvidia.dali").Pipeline
DaliLoader = pytest.importorskip("fastkd.data.dali").DaliLoader
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


def by_number(root, loader, world=1, first=0, **more):
    """{number of the image: (image, label)} of epoch 3, from a step on, over all processes."""
    found = {}
    for rank in range(world):
        options = DataOptions(str(root), loader=loader, workers=int(loader == "dali"), image_size=48, **more)
        train, _ = create_loaders(options, torch.device("cpu"), seed=7, rank=rank, world_size=world)
        train.load_state_dict({"loader": loader, "epoch": 3, "step": first})
        for step, (images, target) in enumerate(train, first):
            for number, *pair in zip(train.samples_of(3, step).tolist(), images, target.tolist(), strict=True):
                assert number not in found
                found[number] = pair
    return found


def level_apart(got, want) -> float:
    """The largest difference between images of the same number, in 255ths."""
    assert all(got[number][1] == want[number][1] for number in got)
    steps = [(got[number][0] - want[number][0]).abs().amax((1, 2)) for number in got]
    return float((torch.stack(steps) * torch.tensor(IMAGENET_STD) * 255).max())


@pytest.mark.parametrize(
    "world, batch_size, first, seen", [(1, 8, 0, 27), (2, 4, 0, 27), (3, 6, 0, 27), (1, 5, 2, 17), (2, 3, 1, 21)]
)
def test_training_images_are_those_of_torchvision(pictures, world, batch_size, first, seen):
    """The same crop, flip and label of each image, however many processes, images per batch and steps there were."""
    got = by_number(pictures, "dali", world, first, batch_size=batch_size)
    assert len(got) == seen and level_apart(got, by_number(pictures, "folder", batch_size=9)) < 1.01


@pytest.mark.parametrize("more", [{"exif": True}, {"flip": "off"}, {"views": 2}])
def test_the_options_of_the_training_images_are_those_of_torchvision(tmp_path, more):
    root, plain = spoilt(tmp_path, {}, samples=1), {}
    for orientation in range(1, 9):
        plain[0x0112] = orientation
        exif = Image.Exif()
        exif.update(plain)
        (root / "train" / "one" / f"{orientation}.jpg").write_bytes(
            damage.saved(damage.noisy(80, 60), "JPEG", exif=exif)
        )
    want, other = by_number(root, "folder", **more), by_number(root, "folder")
    assert level_apart(by_number(root, "dali", **more), want) < 1.01 and level_apart(other, want) > 50


def test_the_side_may_differ_between_epochs(pictures, monkeypatch):
    """Images that DALI decodes ahead have the side of their own epoch."""
    monkeypatch.setattr(DaliLoader, "size_of", lambda loader, number: 32 + 16 * (number % 2))
    train, _ = loaders(pictures)
    got = [epoch(train)[0] for _ in range(3)]
    for number, side in enumerate((32, 48, 32)):
        folder, _ = loaders(pictures, "folder", image_size=side, workers=0)
        folder.load_state_dict({"loader": "folder", "epoch": number, "step": 0})
        assert (got[number] - epoch(folder)[0]).abs().max() < 0.02


def test_a_file_that_shrank_during_the_run_is_named(pictures, tmp_path):
    """Its crop may lie outside: DALI's message names no file."""
    root = spoilt(tmp_path, {"big.jpg": damage.saved(damage.noisy(300, 200), "JPEG")})
    train, _ = loaders(root)
    (root / "train" / "one" / "big.jpg").write_bytes(damage.saved(damage.noisy(30, 20), "JPEG"))
    with pytest.raises(UserError, match="big.jpg' has 30 x 20 pixels and had 300 x 200 when the run began"):
        list(train)


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
    with pytest.raises(UserError, match="--workers 0: DALI decodes in at least one thread"):
        loaders(pictures, workers=0)
    train, _ = loaders(pictures)
    with pytest.raises(UserError, match="'folder' loader and this run uses 'dali'"):
        train.load_state_dict({"loader": "folder", "epoch": 1})


def test_a_loader_ends_with_its_last_reference(pictures):
    """The garbage collector would end its pipeline in a process that was forked from this one, and kill that one."""
    gc.disable()
    try:
        for train in (True, False):
            loader = loaders(pictures)[0 if train else 1]
            next(iter(loader))
            epoch(loader)
            loader.start()
            ends = weakref.ref(loader), weakref.ref(loader._pipeline)
            del loader
            assert [end() for end in ends] == [None, None]
    finally:
        gc.enable()


def test_auto_takes_dali_and_says_so(pictures):
    said = []
    train, _ = create_loaders(DataOptions(data=str(pictures)), torch.device("cpu"), log=said.append)
    assert type(train).__name__ == "DaliLoader" and len(said) == 2 and "DALI" in said[0]


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
    with pytest.raises(UserError, match="--loader dali: DALI cannot start here: CUDA driver is too old; --loader f"):
        chosen(pictures, "dali")


def test_all_processes_take_torchvision_if_one_cannot_start_dali(pictures):
    gathered = []

    def gather(problem):
        gathered.append(problem)
        return [problem, "DALI cannot start here: no GPU"]

    names, said, _ = chosen(pictures, "auto", gather=gather)
    assert gathered == [""] and names == ["FolderLoader"] * 2  # DALI starts in this process
    assert said == ["data: decoding with torchvision (process 1 of 2: DALI cannot start here: no GPU)"]
    with pytest.raises(UserError, match="--loader dali: process 1 of 2: DALI cannot start here: no GPU"):
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


@pytest.mark.parametrize("local_rank", [0, 1])
def test_one_process_of_a_machine_reads_the_headers_first(pictures, monkeypatch, local_rank):
    """The others find what it has kept."""
    happened, sizes_of = [], dali_start.sizes_of
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(dali_start, "sizes_of", lambda *how: happened.append("read") or sizes_of(*how))
    _, _, train = chosen(pictures, "dali", rank=1, world_size=2, gather=lambda it: happened.append("met") or [it] * 2)
    assert happened == (["read", "met", "met"] if local_rank == 0 else ["met", "read", "met"])
    assert len(epoch(train)[1]) == 14


def test_a_damaged_header_ends_every_process(pictures):
    def gather(problem):
        return ["'x.jpg' cannot be decoded (because)", problem]

    with pytest.raises(UserError, match="process 0 of 2: 'x.jpg' cannot be decoded .because."):
        chosen(pictures, "dali", rank=1, world_size=2, gather=gather)


def test_a_pipeline_is_built_once_for_the_first_epoch(pictures, monkeypatch):
    defined, define = [], DaliLoader._define
    monkeypatch.setattr(DaliLoader, "_define", lambda loader, *how: defined.append(loader) or define(loader, *how))
    train = chosen(pictures, "auto")[2]
    list(train)
    assert defined == [train]


def spoilt(tmp_path, odd: dict[str, bytes], samples: int = 6):
    """A folder of good JPEGs whose train/ also holds the files `odd`, name: content."""
    for part in ("train", "val"):
        for label in ("one", "two"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(samples):
                (tmp_path / part / label / f"{i}.jpg").write_bytes(damage.saved(damage.noisy(40, 31, i), "JPEG"))
    for name, data in odd.items():
        with open(os.path.join(os.fsencode(tmp_path / "train" / "one"), os.fsencode(name)), "wb") as stream:
            stream.write(data)
    return tmp_path


def test_names_in_any_bytes_are_read_in_the_same_order(tmp_path):
    """DALI takes UTF-8 only: a name in Latin-1 was a traceback."""
    names = [b"caf\xe9", b"a b", b"a\nb", b"a'\"b", b" x", "ü✓".encode(), b"\\n{0}%s", b"\xff\xfe", b"tab\t"]
    root = labelled(tmp_path, len(names) + 1)  # the last one stays as it is
    for i, name in enumerate(names):
        for part in ("train", "val"):
            os.rename(root / part / "one" / f"{i:03}.png", os.fsencode(root / part / "one") + b"/" + name + b".png")
    train, val = loaders(root, batch_size=4, image_size=8)
    folder_val = loaders(root, "folder", batch_size=4, image_size=8, workers=0)[1]
    assert numbers(epoch(val)[0]) == numbers(epoch(folder_val)[0])
    assert sorted(numbers(epoch(train)[0])) == list(range(len(names) + 1))


def test_a_damaged_file_whose_name_is_not_utf8_is_named_by_its_own_name(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    for length in (100, 700):  # within the header, and behind it
        root = spoilt(tmp_path / str(length), {name: damage.good_files()["jpeg"][:length]})
        assert repr(str(root / "train" / "one" / name)) in error_of(root)


def error_of(root, **more) -> str:
    """The message with which training stops, before the first epoch or within it."""
    with pytest.raises(UserError) as caught:
        epoch(loaders(root, **more)[0])
    return str(caught.value)


BAD = {
    "png": lambda file: file[: len(file) // 2],  # DALI stops here without a name
    "bmp_alpha": lambda file: file[:-50],  # and decodes the next ones
    "jpeg": lambda file: file[:700] + damage.good_files()["jpeg_gray"][20:],
    "jpeg_progressive": lambda file: file[: len(file) * 3 // 4],
    "webp": lambda file: file[: len(file) // 2],
    "webp_lossless": lambda file: file[:-40],
}


@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_file_is_named(kind, tmp_path):
    message = error_of(spoilt(tmp_path, {f"bad.{kind}.jpg": BAD[kind](damage.good_files()[kind])}), batch_size=4)
    assert f"bad.{kind}.jpg' cannot be decoded" in message and "\n" not in message
    assert ("epoch 0, batch" in message) != kind.startswith("webp")  # whose header has the length of the file


@pytest.mark.parametrize("step", [0, 3, 5])
def test_a_look_at_the_first_batch_forgets_no_damaged_file(step, tmp_path):
    """Training looks at one batch before it begins. The check of the next ones has begun then, and is done again."""
    root, good = tmp_path, damage.good_files()["jpeg"]
    for i in range(64):
        folder = root / ("train", "val")[i % 2] / ("one", "two")[i // 2 % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(good)
    train, _ = loaders(root, batch_size=4, image_size=16)
    bad = train.source.files[int(train.samples_of(0, step)[1])]
    with open(bad, "wb") as stream:
        stream.write(BAD["jpeg"](good))  # of the same size in pixels, and DALI decodes it
    with contextlib.suppress(UserError):
        first_batch(train)
    with pytest.raises(UserError) as caught:
        epoch(train)
    assert f"{bad!r} cannot be decoded" in str(caught.value) and f"epoch 0, batch {step}, rank 0" in str(caught.value)


def test_a_file_is_checked_before_dali_reads_it(tmp_path, monkeypatch):
    root, checked, read = labelled(tmp_path, 23), [], []
    monkeypatch.setattr(dali_files, "inspect", lambda file, side, **_: checked.append(file) or ("PNG", ""))
    inputs = Source.inputs

    def give(source, numbers, view):
        files = [source.files[number] for number in numbers.tolist()]
        assert set(files) <= set(checked)
        read.extend(files)
        return inputs(source, numbers, view)

    monkeypatch.setattr(Source, "inputs", give)
    for rank in range(2):
        for loader in loaders(root, batch_size=4, image_size=8, rank=rank, world_size=2):
            assert len(epoch(loader)[1]) in (11, 12)
    assert len(set(read)) == 46


def test_a_header_with_a_huge_size_takes_no_memory(tmp_path):
    file = bytearray(damage.good_files(64, 64)["jpeg"])
    at = file.find(b"\xff\xc0")
    file[at + 5 : at + 9] = b"\xff\xdc\xff\xdc"  # 65,500 x 65,500 pixels
    root = spoilt(tmp_path, {"huge.jpg": bytes(file)})
    assert "huge.jpg' cannot be decoded (Image size (4290250000 pixels) exceeds" in error_of(root)
    os.rename(root / "train" / "one" / "huge.jpg", root / "val" / "one" / "huge.jpg")
    with pytest.raises(UserError, match="huge.jpg' cannot be decoded"):
        list(loaders(root)[1])


def test_a_file_that_dali_alone_refuses_is_named_and_the_way_out_works(tmp_path):
    """A JPEG with bytes between two segments of its header: libjpeg passes over them."""
    jpeg = damage.good_files()["jpeg"]
    at = jpeg.find(b"\xff\xda")
    root = spoilt(tmp_path, {"odd.jpg": jpeg[:at] + b"\0\1\2\3" + jpeg[at:]})
    train, _ = loaders(root)
    with pytest.raises(UserError, match="odd.jpg' cannot be decoded by DALI .epoch 0.*a new run with --loader folder"):
        list(train)
    assert len(epoch(loaders(root, "folder", workers=0)[0])[1]) == 13


def test_formats_that_dali_cannot_decode_are_found_before_the_run(tmp_path, monkeypatch):
    """The ending does not count: a GIF named .jpg is a GIF."""
    gif = damage.good_files()["gif"]
    root = spoilt(tmp_path, {"a.jpg": gif, "b.jpg": gif})
    monkeypatch.setattr(scan_module, "image_kind", lambda head: "gif" if head[:3] == b"GIF" else "jpeg")
    said = []
    options = DataOptions(data=str(root), workers=1, batch_size=4, image_size=32)
    train, _ = create_loaders(options, torch.device("cpu"), log=said.append)
    assert type(train).__name__ == "FolderLoader" and len(epoch(train)[1]) == 14
    (line,) = [line for line in said if "decoding" in line]
    assert "DALI cannot decode 2 GIF files, such as" in line and "a.jpg" in line
    with pytest.raises(UserError, match="--loader dali: DALI cannot decode 2 GIF files"):
        loaders(root)


def test_a_format_that_came_later_is_named(tmp_path):
    root = spoilt(tmp_path, {"late.jpg": damage.good_files()["jpeg"]})
    train, _ = loaders(root)
    (root / "train" / "one" / "late.jpg").write_bytes(damage.good_files()["tiff"])
    with pytest.raises(UserError, match="late.jpg' is a TIFF, which DALI cannot decode"):
        list(train)


def test_exif_turns_as_in_the_folder_loader(tmp_path):
    root = spoilt(tmp_path, {}, samples=1)
    for kind in ("JPEG", "PNG", "WEBP"):
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            data = damage.saved(damage.noisy(80, 60), kind, exif=exif)
            (root / "val" / "one" / f"{kind}{orientation}.jpg").write_bytes(data)
    options = DataOptions(data=str(root), workers=1, batch_size=16, image_size=48)
    ways = (("dali", True), ("folder", True), ("folder", False))
    choices = [replace(options, loader=name, exif=exif) for name, exif in ways]
    got, want, off = (epoch(create_loaders(choice, torch.device("cpu"))[1])[0] for choice in choices)
    assert (got - want).abs().mean((1, 2, 3)).max() < 0.03
    turned = (want - off).abs().mean((1, 2, 3)) > 0.1
    assert turned.tolist() == [False, *[False, *[True] * 7] * 3, False]  # 0.jpg, orientations 1 to 8 three times, 0.jpg


@pytest.mark.parametrize("loader", ["dali", "folder"])
def test_a_long_picture_does_not_fill_the_memory(loader, tmp_path):
    """1 x 20,000 pixels: evaluation would resize it to 256 x 5,120,000 pixels, 4 GB."""
    root = spoilt(tmp_path, {"long.jpg": damage.saved(damage.noisy(1, 20_000), "JPEG")})
    workers = int(loader == "dali")
    assert len(epoch(loaders(root, loader, workers=workers)[0])[1]) == 13
    os.rename(root / "train" / "one" / "long.jpg", root / "val" / "one" / "long.jpg")
    with pytest.raises(UserError, match="long.jpg' cannot be decoded .its 1 x 20000 pixels become 1,310,720,000 when"):
        list(loaders(root, loader, workers=workers, image_size=224)[1])


def test_resume_with_another_loader(tmp_path):
    """The options may differ, since a run that stopped in its first epoch can go on; a state of DALI is refused."""
    claim_folder(tmp_path, {"loader": "auto", "epochs": 2}, resume=False)
    claim_folder(tmp_path, {"loader": "folder", "epochs": 2}, resume=True)
    with pytest.raises(UserError, match="epochs was 2, now 3; give the old ones to go on, add --extend"):
        claim_folder(tmp_path, {"loader": "dali", "epochs": 3}, resume=True)
    train, _ = loaders(labelled(tmp_path / "images", 4), "folder", image_size=8, workers=0)
    with pytest.raises(UserError, match="resume with --loader dali, or begin a new run"):
        train.load_state_dict({"loader": "dali", "epoch": 1})


def test_every_file_is_looked_at_once(pictures, monkeypatch):
    """In the first epoch and evaluation, and not in a resumed run."""
    seen = []
    monkeypatch.setattr(dali_files, "inspect", lambda file, side, **_: seen.append(file) or ("JPEG", ""))
    train, val = loaders(pictures)
    for loader, files in ((train, scan(str(pictures / "train")).files), (val, scan(str(pictures / "val")).files)):
        for _ in range(2):
            epoch(loader)
        assert sorted(set(seen)) == sorted(files) and len(seen) < len(files) + 8  # DALI pads the last batch
        seen.clear()
    again, _ = loaders(pictures)
    again.load_state_dict(train.state_dict())
    epoch(again)
    assert seen == []
