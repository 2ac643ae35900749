"""A folder of small images is kept in memory."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.data import DataOptions, create_eval_loader, create_loaders, dali_package, small_folder
from fastkd.errors import UserError
from fastkd.kernels.logit_loss import UNLABELLED

CPU = torch.device("cpu")


def write_images(root, sizes=((20, 20),) * 3, classes=("ant", "bee"), ending="png"):
    random = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i, (width, height) in enumerate(sizes):
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.{ending}")
    return root


@pytest.fixture
def tiny(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", ((20, 20),))
    return tmp_path


def loaders(root, **options):
    said = []
    made = create_loaders(DataOptions(data=str(root), workers=0, batch_size=2, **options), CPU, log=said.append)
    return *made, said


def pixels_of(loader) -> torch.Tensor:
    """The images of an evaluation loader as bytes, [N, H, W, 3]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (loader.mean, loader.std))
    images = torch.cat([images * std + mean for images, _ in loader])
    return images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)


def test_small_images_are_kept_as_they_are_and_a_line_says_so(tiny):
    train, val, said = loaders(tiny)
    assert train.name == val.name == "resident" and train.image_size == 20 and train.samples == 6
    assert train.mean == (0.485, 0.456, 0.406)  # as for every folder
    files = [tiny / "val" / name / "0.png" for name in ("ant", "bee")]
    want = np.stack([np.asarray(Image.open(file)) for file in files])
    assert torch.equal(pixels_of(val), torch.from_numpy(want))
    assert len(said) == 2 and "20 pixels are kept in memory" in said[0] and "--loader folder" in said[0]
    assert "after padding by 4 (reflect), mirrored or not" in said[1]


def test_the_folder_loader_is_there_for_those_who_ask(tiny):
    train, _, said = loaders(tiny, loader="folder")
    assert train.name == "folder" and train.image_size == 224 and not said


@pytest.mark.parametrize(
    "sizes, words",
    [
        (((20, 20), (20, 24), (20, 20)), "has 20 x 24 pixels, another one 20 x 20"),
        (((20, 20), (24, 24), (20, 20)), "has 24 x 24 pixels, another one 20 x 20"),
        (((64, 64), (65, 65), (64, 64)), "has 65 x 65 pixels, another one 64 x 64"),
    ],
)
def test_images_of_several_sizes_are_resized_and_a_line_says_why(tmp_path, sizes, words):
    write_images(tmp_path / "train", sizes)
    write_images(tmp_path / "val", sizes[:1])
    said = []
    options = DataOptions(data=str(tmp_path), workers=0)
    assert small_folder.read_small_folder(splits(tmp_path), options, CPU, said.append, lambda x: [x]) is None
    assert len(said) == 1 and words in said[0]
    with pytest.raises(UserError, match="--augment pad-crop is for squares of one size.*" + words):
        loaders(tmp_path, augment="pad-crop")


def splits(root):
    from fastkd.data.layout import training_splits

    return training_splits(DataOptions(data=str(root)), lambda line: None)


def test_an_image_of_another_size_among_many_is_found(tmp_path, monkeypatch):
    """Not one of those whose headers are looked at first."""
    monkeypatch.setattr(small_folder, "LOOKED_AT", 1)
    write_images(tmp_path / "train", ((20, 20),) * 4 + ((16, 16),))
    write_images(tmp_path / "val", ((20, 20),))
    with pytest.raises(UserError, match=r"--loader resident is for.*4.png has 16 x 16 pixels, another one 20 x 20"):
        loaders(tmp_path, loader="resident")


@pytest.mark.parametrize("size, lines", [((65, 65), 0), ((20, 30), 1), ((64, 20), 1), ((300, 200), 0), ((20, 300), 0)])
def test_large_images_and_rectangles_are_not_kept(tmp_path, size, lines):
    write_images(tmp_path / "train", (size,) * 2)
    write_images(tmp_path / "val", (size,))
    said = []
    options = DataOptions(data=str(tmp_path), workers=0)
    assert small_folder.read_small_folder(splits(tmp_path), options, CPU, said.append, lambda x: [x]) is None
    assert len(said) == lines and all(f"{size[0]} x {size[1]} pixels" in line for line in said)
    for given in ({"augment": "none"}, {"pad": 2}, {"loader": "resident"}):
        with pytest.raises(UserError, match=f"{size[0]} x {size[1]} pixels"):
            loaders(tmp_path, **given)


@pytest.fixture
def no_dali(monkeypatch):
    monkeypatch.setattr(dali_package, "find_spec", lambda name: None)


def test_another_image_size_resizes(tiny, no_dali):
    train, _, said = loaders(tiny, image_size=16)
    assert train.name == "folder" and train.image_size == 16
    assert "--image-size 16 and the images have 20" in said[0]
    assert loaders(tiny, image_size=20)[0].name == "resident"
    with pytest.raises(UserError, match="--pad 2 is for.*--image-size 16 and the images have 20"):
        loaders(tiny, image_size=16, pad=2)


def test_too_much_for_the_memory_is_decoded_in_every_epoch(tiny, monkeypatch):
    monkeypatch.setattr(small_folder, "_free_memory", lambda: 4 * 9599)  # the images take 9,600 bytes
    said = []
    options = DataOptions(data=str(tiny), workers=0)
    assert small_folder.read_small_folder(splits(tiny), options, CPU, said.append, lambda x: [x]) is None
    assert "a quarter of the free memory" in said[0] and "--loader resident takes it" in said[0]
    assert loaders(tiny, loader="resident")[0].name == "resident"


def test_all_processes_choose_the_same(tiny):
    said = []
    options = DataOptions(data=str(tiny), workers=0)
    gather = lambda reason: [reason, "too little memory"]  # noqa: E731
    assert small_folder.read_small_folder(splits(tiny), options, CPU, said.append, gather) is None
    assert "too little memory" in said[0]


def test_a_damaged_image_is_named(tiny):
    file = tiny / "train" / "bee" / "1.png"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"bee/1.png' cannot be decoded"):
        loaders(tiny)


def test_a_damaged_header_is_named_too(tiny):
    file = tiny / "train" / "ant" / "0.png"  # the first of those that are looked at
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=r"ant/0.png' cannot be decoded"):
        loaders(tiny)


def test_the_free_memory_is_that_of_the_machine():
    assert 1 << 20 < small_folder._free_memory() <= 1 << 50


def test_worker_processes_decode_the_same(tiny, monkeypatch):
    one = pixels_of(loaders(tiny)[1])
    monkeypatch.setattr(small_folder, "FEW", 1)
    monkeypatch.setattr(small_folder, "CHUNK", 1)
    options = DataOptions(data=str(tiny), workers=2, batch_size=2)
    assert torch.equal(pixels_of(create_loaders(options, CPU, log=lambda line: None)[1]), one)


def test_the_random_state_of_the_process_is_kept(tiny):
    before = torch.get_rng_state()
    loaders(tiny)
    assert torch.equal(torch.get_rng_state(), before)


def test_val_fraction_unlabelled_and_exif_work(tmp_path):
    write_images(tmp_path / "tree", ((20, 20),) * 4)
    write_images(tmp_path / "more", ((20, 20),) * 3, ("x",))
    train, val, said = loaders(tmp_path / "tree", val_fraction=0.25, unlabelled=str(tmp_path / "more"))
    assert (train.samples, val.samples, train.unlabelled, train.name) == (9, 2, 3, "resident")
    targets = torch.cat([target for _, target in train])
    assert sorted(targets.tolist()) == [UNLABELLED] * 3 + [0] * 3 + [1] * 3
    turned = Image.open(tmp_path / "tree" / "ant" / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    for folder, options in (("train", {}), ("val", exif)):
        for name in ("ant", "bee"):
            (tmp_path / "set" / folder / name).mkdir(parents=True)
            for i in range(2):
                turned.save(tmp_path / "set" / folder / name / f"{i}.png", **({"exif": options} if options else {}))
    with_exif, without = (pixels_of(loaders(tmp_path / "set", exif=on)[1]) for on in (True, False))
    assert torch.equal(with_exif, without.flip(1, 2))


def test_evaluation_keeps_small_images_or_resizes_them(tiny, no_dali):
    options = DataOptions(data=str(tiny), workers=0, image_size=20)
    kept = create_eval_loader(options, CPU, log=lambda line: None)
    resized = create_eval_loader(options, CPU, log=lambda line: None, keep_small=False)
    assert kept.name == "resident" and resized.name == "folder"
    assert kept.classes == ("ant", "bee") and kept.samples == 2


def test_a_run_of_the_folder_loader_is_told_how_to_go_on(tiny):
    train = loaders(tiny)[0]
    with pytest.raises(UserError, match=r"by the 'folder' loader and this run uses 'resident'.*--loader folder"):
        train.load_state_dict({"loader": "folder", "epoch": 1})
    with pytest.raises(UserError, match=r"by the 'digits' loader.*differ: begin a new run"):
        train.load_state_dict({"loader": "digits", "epoch": 1})
