"""The crop of small images against torchvision's, in both implementations, and against the float64 reference."""

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from fastkd.kernels.gpu.pad_crop import launch
from fastkd.kernels.pad_crop import pad_crop, pad_crop_reference

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def kernel(images, chosen, corners, flips, output, mean, std, *, pad=0, reflect=False):
    launch(images, chosen, corners, flips, output, mean, std, pad, reflect)


PATHS = [pad_crop, kernel]


def drawn(count, pad, samples, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randint(samples, (count,), generator=g)
    corners = torch.randint(2 * pad + 1, (count, 2), generator=g)
    return [part.to(device) for part in (chosen, corners, torch.rand(count, generator=g) < 0.5)]


def pixels(samples, H, W, C, device="cpu"):
    g = torch.Generator().manual_seed(1)
    return torch.randint(256, (samples, H, W, C), generator=g, dtype=torch.uint8).to(device)


def buffer(count, H, W, dtype=torch.float32, device="cpu"):
    """Poisoned."""
    out = torch.full((count, 3, H, W), torch.nan, dtype=dtype, device=device)
    return out.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", PATHS)
@pytest.mark.parametrize("H, W, C, pad, reflect", [(9, 11, 3, 3, True), (9, 11, 1, 3, False), (20, 17, 3, 0, False)])
def test_it_is_torchvision_s_crop_and_flip(function, H, W, C, pad, reflect, device):
    images, (chosen, corners, flips), out = pixels(7, H, W, C), drawn(12, pad, 7), buffer(12, H, W, device=device)
    corners[0], corners[1] = 0, 2 * pad
    given = [part.to(device) for part in (images, chosen, corners, flips)]
    function(*given, out, MEAN, STD, pad=pad, reflect=reflect)
    mean, std = (torch.tensor(three)[:, None, None] for three in (MEAN, STD))
    for n, (index, (top, left), flip) in enumerate(zip(chosen.tolist(), corners.tolist(), flips.tolist(), strict=True)):
        image = images[index].permute(2, 0, 1)
        padded = F.pad(image, [pad], padding_mode="reflect" if reflect else "constant") if pad else image
        crop = F.crop(padded, top, left, H, W)
        want = ((F.hflip(crop) if flip else crop) / 255 - mean) / std
        assert torch.equal(out[n].cpu(), want)  # to the bit


@pytest.mark.parametrize("function", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_round_the_same_value(function, dtype):
    images, args, out = pixels(5, 8, 8, 3), drawn(6, 2, 5), buffer(6, 8, 8, dtype)
    function(images, *args, out, MEAN, STD, pad=2, reflect=True)
    want = buffer(6, 8, 8)
    pad_crop(images, *args, want, MEAN, STD, pad=2, reflect=True)
    step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11  # Triton's interpreter cuts off what bfloat16 lacks
    assert ((out.float() - want).abs() <= (2 * step if function is kernel else step) * want.abs()).all()


@pytest.mark.parametrize("function", PATHS)
@pytest.mark.parametrize("reflect", [True, False])
def test_the_reference(function, reflect):
    images, args, out = pixels(5, 8, 6, 1), drawn(9, 4, 5), buffer(9, 8, 6)
    want = torch.empty(9, 3, 8, 6, dtype=torch.float64)
    function(images, *args, out, MEAN, STD, pad=4, reflect=reflect)
    pad_crop_reference(images, *args, want, MEAN, STD, pad=4, reflect=reflect)
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-6)


def test_more_pixels_than_a_block():
    images, args, out, want = pixels(2, 24, 23, 3), drawn(2, 1, 2), buffer(2, 24, 23), buffer(2, 24, 23)
    kernel(images, *args, out, MEAN, STD, pad=1, reflect=True)
    pad_crop(images, *args, want, MEAN, STD, pad=1, reflect=True)
    assert torch.equal(out, want)


def test_the_kernel_never_reads_outside():
    """An index or a corner that leaves the images is moved; on the CPU the call refuses it."""
    images, (chosen, corners, flips), out = pixels(3, 8, 8, 3), drawn(4, 2, 3), buffer(4, 8, 8)
    chosen[:], corners[:] = torch.tensor([-5, 99, 2, 0]), torch.tensor([[-9, 99], [99, -9], [0, 4], [4, 0]])
    kernel(images, chosen, corners, flips, out, MEAN, STD, pad=2, reflect=True)
    want = buffer(4, 8, 8)
    pad_crop(images, chosen.clamp(0, 2), corners.clamp(0, 4), flips, want, MEAN, STD, pad=2, reflect=True)
    assert torch.equal(out, want)
    with pytest.raises(ValueError, match="chosen must be from 0 to 2, got -5 to 99"):
        pad_crop(images, chosen, corners.clamp(0, 4), flips, out, MEAN, STD, pad=2)
    with pytest.raises(ValueError, match="corners must be from 0 to 4, got -9 to 99"):
        pad_crop(images, chosen.clamp(0, 2), corners, flips, out, MEAN, STD, pad=2)


def test_empty_batch_and_opcheck():
    images, args = pixels(3, 8, 8, 3), drawn(2, 1, 3)
    pad_crop(images, *(part[:0] for part in args), buffer(0, 8, 8), MEAN, STD, pad=1)
    op = torch.ops.fastkd.pad_crop.default
    torch.library.opcheck(op, (images, *args, buffer(2, 8, 8).nan_to_num(), MEAN, STD, 1, True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.zeros(3, 8, 8, 3)}, "images must be uint8"),
        ({"images": torch.zeros(3, 8, 8, 2, dtype=torch.uint8)}, "images must be uint8"),
        ({"chosen": torch.zeros(2, dtype=torch.int32)}, "chosen must be torch.int64"),
        ({"corners": torch.zeros(2, 3, dtype=torch.int64)}, "corners must be torch.int64"),
        ({"flips": torch.zeros(2)}, "flips must be torch.bool"),
        ({"output": torch.zeros(2, 3, 9, 8)}, r"output must be \[2, 3, 8, 8\], got"),
        ({"output": torch.zeros(2, 3, 8, 8)}, "channels-last"),
        ({"pad": 8}, "pad must be from 0 to below 8"),
        ({"std": [0.0, 1, 1]}, "std must be above 0"),
    ],
)
def test_bad_input(change, words):
    chosen, corners, flips = drawn(2, 1, 3)
    given = {"images": pixels(3, 8, 8, 3), "chosen": chosen, "corners": corners, "flips": flips}
    given |= {"output": buffer(2, 8, 8), "mean": MEAN, "std": STD} | change
    pad = given.pop("pad", 1)
    with pytest.raises(ValueError, match=words):
        pad_crop(*given.values(), pad=pad, reflect=True)


@pytest.mark.gpu
def test_captured_in_a_graph():
    images, args, out = pixels(5, 8, 8, 3, "cuda"), drawn(4, 2, 5, "cuda"), buffer(4, 8, 8, device="cuda")
    pad_crop(images, *args, out, MEAN, STD, pad=2, reflect=True)
    want, graph = out.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pad_crop(images, *args, out, MEAN, STD, pad=2, reflect=True)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, want)
