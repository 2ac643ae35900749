"""Padding, crop and flip against torchvision's at equal offsets, bit for bit; each path gives the same."""

import pytest
import torch
from torchvision.transforms import functional as F

from fastkd.kernels.gpu.pad_crop import launch
from fastkd.kernels.pad_crop import pad_crop, pad_crop_reference

MEAN, STD = [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def kernel(images, index, corners, flips, output, mean, std, *, reflect):
    launch(images, index, corners, flips, output, mean, std, reflect)


PATHS = [pad_crop, kernel]


def pixels(n=6, H=9, W=11, channels=3, device="cpu"):
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, H, W, channels), generator=g, dtype=torch.uint8).to(device)


def poisoned(n, h, w, dtype=torch.float32, device="cpu"):
    full = torch.full((n, 3, h, w), torch.nan, dtype=dtype, device=device)
    return full.contiguous(memory_format=torch.channels_last)


def draws(pad, n=6, device="cpu"):
    """index, corners with every pair of the ends and the middle, flips."""
    ends = torch.tensor([-pad, 0, pad])
    corners = torch.cartesian_prod(ends, ends)
    index = torch.arange(len(corners)).flip(0) % n
    return index.to(device), corners.to(device), (torch.arange(len(corners)) % 2 == 1).to(device)


def torchvision_s(images, index, corners, flips, pad, reflect):
    """[B, 3, H, W] fp32 by torchvision's functions, then (x / 255 - mean) / std by torch."""
    H, W = images.shape[1:3]
    rows = []
    for i, (top, left), flip in zip(index.tolist(), corners.tolist(), flips.tolist(), strict=True):
        padded = F.pad(images[i].permute(2, 0, 1), [pad], padding_mode="reflect" if reflect else "constant")
        crop = F.crop(padded, top + pad, left + pad, H, W)
        rows.append(F.hflip(crop) if flip else crop)
    mean, std = (torch.tensor(three).view(3, 1, 1) for three in (MEAN, STD))
    return (torch.stack(rows) / 255 - mean) / std


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", PATHS)
@pytest.mark.parametrize("reflect", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_torchvision_s(function, dtype, reflect, device):
    for pad, (H, W) in ((4, (9, 11)), (4, (18, 16)), (1, (2, 2)), (0, (1, 1))):  # 288 pixels are two blocks
        images, drawn = pixels(H=H, W=W), draws(pad)
        output = poisoned(9, H, W, dtype, device)
        address = output.data_ptr()
        moved = (tensor.to(device) for tensor in (images, *drawn))
        assert function(*moved, output, MEAN, STD, reflect=reflect) is None
        # Triton's interpreter cuts off the bits that bfloat16 lacks; a GPU rounds
        rtol = 2**-7 if dtype == torch.bfloat16 and function is kernel else 0
        want = torchvision_s(images, *drawn, pad, reflect).to(dtype)
        torch.testing.assert_close(output.cpu(), want, rtol=rtol, atol=0)
        assert output.data_ptr() == address and output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("function", PATHS)
@pytest.mark.parametrize("reflect", [True, False])
def test_any_strides(function, reflect):
    grey, wide = pixels(channels=1).expand(-1, -1, -1, 3), pixels(12, 20, 24)[::2, 3:12, 1:23:2]
    for images in (grey, wide, pixels().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
        index, corners, flips = draws(3)
        output = poisoned(9, 9, 11)
        shuffled = torch.stack([corners, corners], 1)[:, 1]
        function(images, index, shuffled, flips, output, MEAN, STD, reflect=reflect)
        assert torch.equal(output, torchvision_s(images, index, corners, flips, 3, reflect))


@pytest.mark.parametrize("reflect", [True, False])
def test_reference(reflect):
    images, drawn, output = pixels(), draws(4), poisoned(9, 9, 11)
    pad_crop_reference(images, *drawn, output, MEAN, STD, reflect)
    torch.testing.assert_close(output, torchvision_s(images, *drawn, 4, reflect), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", PATHS)
def test_a_crop_beyond_the_image_is_black(function):
    corners = torch.tensor([[9, 0], [0, -11], [-40, 90]])
    output = poisoned(3, 9, 11)
    function(pixels(), torch.arange(3), corners, torch.zeros(3, dtype=torch.bool), output, MEAN, STD, reflect=False)
    assert torch.equal(output[:, :, 0, 0], output[:, :, 8, 10]) and (output == output[:, :, :1, :1]).all()


@pytest.mark.parametrize("reflect", [True, False])
def test_the_kernel_reads_nothing_outside_the_set(reflect):
    memory = torch.full((4, 9, 11, 3), 255, dtype=torch.uint8)
    memory[1:3] = 0
    index, flips = torch.tensor([-5, 7, 0, 1]), torch.zeros(4, dtype=torch.bool)
    corners = torch.tensor([[-90, 90], [90, -90], [-20, 0], [0, 40]])
    output = poisoned(4, 9, 11)
    launch(memory[1:3], index, corners, flips, output, [0.0] * 3, [1.0] * 3, reflect)
    assert (output == 0).all()


def test_empty_batch():
    index, corners, flips = (tensor[:0] for tensor in draws(1))
    assert pad_crop(pixels(), index, corners, flips, poisoned(0, 9, 11), MEAN, STD, reflect=True) is None


def test_opcheck():
    torch.library.opcheck(
        torch.ops.fastkd.pad_crop.default, (pixels(), *draws(2), poisoned(9, 9, 11).zero_(), MEAN, STD, True)
    )


INDEX, CORNERS, FLIPS = draws(2)
GOOD = {
    "images_NHWC": pixels(),
    "index": INDEX,
    "corners": CORNERS,
    "flips": FLIPS,
    "output": poisoned(9, 9, 11),
    "mean": MEAN,
    "std": STD,
}


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"images_NHWC": pixels(channels=1)}, r"\[6, 9, 11, 1\]"),
        ({"index": INDEX.int()}, "index must be torch.int64.*int32"),
        ({"index": INDEX + 1}, "index must be 0 to 5 for 6 images, got 1 to 6"),
        ({"index": INDEX - 1}, "index must be 0 to 5 for 6 images, got -1 to 4"),
        ({"corners": CORNERS[:, :1]}, r"corners.*\[9, 2\], got.*\[9, 1\]"),
        ({"corners": CORNERS * 5}, r"9 x 11 can be mirrored by up to 8 and 10.*\[-10, -10\] to \[10, 10\]"),
        ({"flips": FLIPS.byte()}, "flips must be torch.bool.*uint8"),
        ({"flips": FLIPS.to("meta")}, "meta"),
        ({"output": poisoned(8, 9, 11)}, r"\[9, 3, 9, 11\] for 9 images, got \[8, 3, 9, 11\]"),
        ({"output": torch.zeros(9, 3, 9, 11)}, "channels-last"),
        ({"std": [0.2, 0.0, 0.2]}, "std must be above 0"),
    ],
)
def test_bad_input(wrong, words):
    pad_crop(**GOOD, reflect=True)
    with pytest.raises(ValueError, match=words):
        pad_crop(**{**GOOD, **wrong}, reflect=True)
