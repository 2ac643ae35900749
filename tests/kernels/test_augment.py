"""The augmentation against one of our own in float64, pixel by pixel, and against torch's interpolation of the crop."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastkd.kernels.augment import augment, augment_reference, normalise, normalise_reference
from fastkd.kernels.gpu.augment import launch, launch_normalise

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HALF = [0.5, 0.5, 0.5]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def kernel(images, boxes, flips, outputs, mean, std):
    launch(images, boxes, flips, outputs, sum(map(list, mean), []), sum(map(list, std), []))


PATHS = [augment, kernel]


def independent(image, box, flip, h, w, mean, std):
    """[3, h, w] in float64, by the formula of the docstring with a loop over the pixels."""
    top, left, height, width = box
    H, W, _ = image.shape
    result = torch.empty(3, h, w, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            y = top + min(max((i + 0.5) * height / h - 0.5, 0), height - 1)
            x = left + min(max(((w - 1 - j if flip else j) + 0.5) * width / w - 0.5, 0), width - 1)
            y0, x0 = math.floor(y), math.floor(x)
            y1, x1 = min(y0 + 1, H - 1), min(x0 + 1, W - 1)
            a, b, c, d = (image[p, q].double() for p in (y0, y1) for q in (x0, x1))
            value = (a * (1 - x + x0) + b * (x - x0)) * (1 - y + y0) + (c * (1 - x + x0) + d * (x - x0)) * (y - y0)
            result[:, i, j] = (value / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    return result


def batch(n=3, H=9, W=11, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, H, W, 3), generator=g, dtype=torch.uint8).to(device)


def buffers(n, h, w, *dtypes, device="cpu"):
    """Poisoned."""
    return [
        torch.full((n, 3, h, w), torch.nan, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
        for dtype in dtypes or (torch.float32,)
    ]


def check(function, images, boxes, flips, h, w, dtype=torch.float32):
    (output,) = buffers(len(images), h, w, dtype, device=images.device)
    address = output.data_ptr()
    assert function(images, boxes, flips, [output], [MEAN], [STD]) is None
    for n, (box, flip) in enumerate(zip(boxes.tolist(), flips.tolist(), strict=True)):
        want = independent(images[n].cpu(), box, flip, h, w, MEAN, STD)
        rtol = TOLERANCE[dtype]
        torch.testing.assert_close(output[n].cpu().double(), want, rtol=rtol, atol=2e-6 if rtol > 1e-4 else 1e-5)
    assert output.data_ptr() == address and output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", PATHS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("h, w", [(4, 5), (13, 17), (1, 1), (9, 11)])
def test_values(function, dtype, h, w, device):
    images = batch(device=device)
    flips = torch.tensor([True, False, True], device=device)
    for boxes in (
        torch.tensor([[0, 0, 9, 11], [3, 2, 1, 1], [8, 4, 1, 7]]),  # the whole image, one pixel, one row
        torch.tensor([[0.0, 0.0, 9.0, 11.0], [1.25, 2.5, 6.4, 3.7], [7.9, 0.3, 1.1, 10.7]]),
    ):
        check(function, images, boxes.to(device), flips, h, w, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", PATHS)
def test_more_pixels_than_a_block(function, device):
    images = batch(2, 20, 24, device)
    boxes = torch.tensor([[2, 3, 16, 18], [0, 0, 20, 24]], dtype=torch.int32, device=device)
    check(function, images, boxes, torch.tensor([0, 1], dtype=torch.uint8, device=device), 19, 23)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", PATHS)
def test_whole_boxes_are_interpolate_of_the_crop(function, device):
    images = batch(4, 300, 16, device)
    boxes = torch.tensor([[251, 1, 37, 13], [0, 0, 300, 16], [260, 3, 7, 8], [4, 4, 8, 8]], device=device)
    (output,) = buffers(4, 8, 8, device=device)
    function(images, boxes, torch.zeros(4, dtype=torch.bool, device=device), [output], [[0.0] * 3], [[1.0] * 3])
    for n, (top, left, height, width) in enumerate(boxes.tolist()):
        crop = images[n, top : top + height, left : left + width].permute(2, 0, 1)[None].float() / 255
        want = F.interpolate(crop, (8, 8), mode="bilinear", align_corners=False, antialias=False)[0]
        torch.testing.assert_close(output[n], want, rtol=1e-6, atol=5e-7)
    assert torch.equal((output[3] * 255).round().byte(), images[3, 4:12, 4:12].permute(2, 0, 1))  # not resized


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", PATHS)
def test_two_outputs(function, device):
    images = batch(device=device)
    boxes = torch.tensor([[0, 1, 5, 6], [2, 2, 7, 9], [1, 0, 3, 3]], device=device)
    flips = torch.tensor([False, True, True], device=device)
    both = buffers(3, 6, 5, torch.bfloat16, torch.float32, device=device)
    function(images, boxes, flips, both, [MEAN, HALF], [STD, HALF])
    for output, mean, std in zip(both, (MEAN, HALF), (STD, HALF), strict=True):
        alone = buffers(3, 6, 5, output.dtype, device=device)
        function(images, boxes, flips, alone, [mean], [std])
        assert torch.equal(output, alone[0]) and output.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", PATHS)
def test_strides(function, device):
    images = batch(3, 9, 11, device)
    boxes = torch.tensor([[0, 1, 5, 6], [2, 2, 7, 9], [1, 0, 3, 3]], device=device)
    flips = torch.tensor([False, True, True], device=device)
    planar = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    sliced = batch(6, 20, 24, device)[::2, 3:12, 1:23:2]
    wide = torch.zeros(3, 8, device=device)
    wide[:, ::2] = boxes.float()
    for source, where in (
        (planar, boxes),
        (sliced, boxes),
        (images, wide[:, ::2]),
        (images[:1].expand(3, 9, 11, 3), boxes),
    ):
        check(function, source, where, flips, 4, 5)


@pytest.mark.parametrize("device", DEVICES)
def test_the_kernel_makes_boxes_fit(device):
    images = batch(5, device=device)
    wrong = [[-3, -4, 4, 5], [7, 9, 4, 5], [0, 0, 90, 110], [2, 3, 0, -1], [99, 99, 1, 1]]
    fitting = [[0, 0, 4, 5], [5, 6, 4, 5], [0, 0, 9, 11], [2, 3, 1, 1], [8, 10, 1, 1]]
    wrong, fitting = (torch.tensor(boxes, dtype=torch.float32, device=device) for boxes in (wrong, fitting))
    flips = torch.zeros(5, dtype=torch.bool, device=device)
    got, want = buffers(5, 4, 4, torch.float32, torch.float32, device=device)
    kernel(images, wrong, flips, [got], [MEAN], [STD])
    kernel(images, fitting, flips, [want], [MEAN], [STD])
    assert torch.equal(got, want) and got.isfinite().all()


def test_reference():
    images, flips = batch(), torch.tensor([True, False, True])
    boxes = torch.tensor([[0.0, 0.0, 9.0, 11.0], [1.25, 2.5, 6.4, 3.7], [7.5, 0.3, 1.5, 10.7]])
    (output,) = buffers(3, 5, 6)
    augment_reference(images, boxes, flips, [output], [MEAN], [STD])
    for n in range(3):
        want = independent(images[n], boxes[n].tolist(), flips[n], 5, 6, MEAN, STD)
        torch.testing.assert_close(output[n].double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", PATHS)
def test_random_batches_equal_the_reference(function):
    g = torch.Generator().manual_seed(1)
    images = batch(6, 13, 10)
    size = torch.tensor([13.0, 10.0])
    extent = 1 + torch.rand(6, 2, generator=g) * (size - 1)
    boxes = torch.cat([torch.rand(6, 2, generator=g) * (size - extent), extent], 1)
    boxes[::2] = boxes[::2].floor()
    flips = torch.rand(6, generator=g) < 0.5
    got, want = buffers(6, 7, 12, torch.float32, torch.float32)
    function(images, boxes, flips, [got], [MEAN], [STD])
    augment_reference(images, boxes, flips, [want], [MEAN], [STD])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device):
    outputs = buffers(0, 4, 4, device=device)
    boxes, flips = torch.zeros(0, 4, device=device), torch.zeros(0, dtype=torch.bool, device=device)
    assert augment(batch(0, device=device), boxes, flips, outputs, [MEAN], [STD]) is None


def test_opcheck():
    arguments = (batch(2), torch.tensor([[0, 0, 4, 4], [1, 1, 5, 3]]), torch.tensor([True, False]))
    outputs = [o.zero_() for o in buffers(2, 3, 4, torch.float32, torch.bfloat16)]
    torch.library.opcheck(torch.ops.fastkd.augment.default, (*arguments, outputs, MEAN + HALF, STD + HALF))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    def step(images, boxes, flips, output):
        augment(images, boxes, flips, [output], [MEAN], [STD])
        return output * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for n in (2, 3) if dynamic else (2,):
        arguments = batch(n), torch.tensor([[1, 0, 4, 5]]).repeat(n, 1), torch.arange(n) > 0
        (got,), (want,) = buffers(n, 4, 6), buffers(n, 4, 6)
        doubled = compiled(*arguments, got)
        augment(*arguments, [want], [MEAN], [STD])
        assert torch.equal(got, want) and torch.equal(doubled, 2 * want)


@pytest.mark.gpu
def test_captured_in_a_graph():
    images = batch(device="cuda")
    boxes, flips = torch.tensor([[0.0, 0, 9, 11]] * 3, device="cuda"), torch.zeros(3, dtype=torch.bool, device="cuda")
    (output,), (want,) = buffers(3, 5, 5, device="cuda"), buffers(3, 5, 5, device="cuda")
    augment(images, boxes, flips, [output], [MEAN], [STD])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        augment(images, boxes, flips, [output], [MEAN], [STD])
    boxes.copy_(torch.tensor([1.5, 2, 4, 5]))
    graph.replay()
    augment(images, boxes, flips, [want], [MEAN], [STD])
    assert torch.equal(output, want)


GOOD = {
    "images_NHWC": torch.zeros(2, 4, 5, 3, dtype=torch.uint8),
    "boxes": torch.tensor([[0, 0, 4, 5], [1, 1, 2, 2]]),
    "flips": torch.zeros(2, dtype=torch.bool),
    "outputs": buffers(2, 3, 3),
    "mean": [MEAN],
    "std": [STD],
}


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"images_NHWC": torch.zeros(2, 4, 5, 3)}, "uint8.*float32"),
        ({"images_NHWC": torch.zeros(2, 3, 4, 5, dtype=torch.uint8)}, r"\[2, 3, 4, 5\]"),
        ({"boxes": torch.zeros(3, 4)}, r"\[3, 4\]"),
        ({"flips": torch.zeros(2)}, "flips.*float32"),
        ({"flips": torch.zeros(2, dtype=torch.bool, device="meta")}, "meta"),
        ({"outputs": [torch.zeros(2, 3, 4, 5)]}, "channels-last"),
        ({"outputs": buffers(2, 3, 3, torch.float64)}, "float64"),
        ({"outputs": buffers(3, 3, 3)}, r"\[3, 3, 3, 3\]"),
        ({"outputs": buffers(2, 3, 3) + buffers(2, 3, 4)}, r"\[2, 3, 3, 4\] and \[2, 3, 3, 3\]"),
        ({"outputs": [buffers(2, 3, 3)[0].requires_grad_()]}, "gradient"),
        ({"outputs": []}, "no output"),
        ({"mean": [[0.5, 0.5]]}, r"mean.*\[0.5, 0.5\]"),
        ({"mean": [MEAN, MEAN]}, "1 output"),
        ({"std": [[0.2, 0.0, 0.2]]}, "std must be above 0.*0.0"),
        ({"mean": [torch.zeros(3, device="meta")]}, "GPU"),
        ({"boxes": torch.tensor([[0, 0, 4, 5], [1, 1, 4, 2]])}, r"4 x 5.*row 1: \[1, 1, 4, 2\]"),
        ({"boxes": torch.tensor([[0, -1, 4, 5], [1, 1, 2, 2]])}, r"row 0: \[0, -1, 4, 5\]"),
        ({"boxes": torch.tensor([[0, 0, 0.5, 5], [1, 1, 2, 2]])}, "row 0"),
        ({"boxes": torch.tensor([[0, 0, 4, 5], [math.nan, 1, 2, 2]])}, "row 1"),
    ],
)
def test_bad_input(wrong, words):
    augment(**GOOD)
    with pytest.raises(ValueError, match=words):
        augment(**{**GOOD, **wrong})


NORMALISE = [normalise, launch_normalise]


def formula(images, mean, std):
    """(x / 255 - mean) / std of every channel, in float64."""
    channels = [(images[..., c].double() / 255 - mean[c]) / std[c] for c in range(3)]
    return torch.stack(channels, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [*NORMALISE, normalise_reference])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n, H, W", [(1, 1, 1), (3, 9, 11), (2, 16, 32), (5, 31, 33)])  # up to 15 blocks of bytes
def test_normalise_values(function, dtype, n, H, W, device):
    images = batch(n, H, W, device)
    (output,) = buffers(n, H, W, dtype, device=device)
    address = output.data_ptr()
    assert function(images, output, MEAN, STD) is None
    rtol = TOLERANCE[dtype]
    want = formula(images, MEAN, STD)
    torch.testing.assert_close(output.double(), want, rtol=rtol, atol=2e-6 if rtol > 1e-4 else 1e-5)
    assert output.data_ptr() == address and output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", NORMALISE)
def test_normalise_is_augment_of_the_whole_image(function, device):
    images = batch(4, 20, 24, device)
    got, want = buffers(4, 20, 24, torch.float32, torch.float32, device=device)
    function(images, got, MEAN, STD)
    boxes, flips = torch.tensor([[0, 0, 20, 24]] * 4, device=device), torch.zeros(4, dtype=torch.bool, device=device)
    augment(images, boxes, flips, [want], [MEAN], [STD])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", NORMALISE)
def test_normalise_reads_any_strides(function, device):
    images = batch(3, 9, 11, device)
    planar = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    sliced = batch(6, 20, 24, device)[::2, 3:12, 1:23:2]
    for source in (planar, sliced, images[:1].expand(3, 9, 11, 3)):
        (output,) = buffers(3, 9, 11, device=device)
        function(source, output, MEAN, STD)
        torch.testing.assert_close(output.double(), formula(source, MEAN, STD), rtol=1e-5, atol=1e-5)


def test_normalise_writes_nothing_beyond_the_output():
    images = batch(2, 7, 5)
    memory = torch.full((2 * 7 * 5 * 3 + 64,), 7.0)
    output = memory[: images.numel()].view(2, 7, 5, 3).permute(0, 3, 1, 2)
    launch_normalise(images, output, MEAN, STD)
    assert (memory[images.numel() :] == 7).all() and not (output == 7).any()


def test_normalise_of_an_empty_batch():
    assert normalise(batch(0), *buffers(0, 9, 11), MEAN, STD) is None


def test_normalise_opcheck():
    (output,) = [o.zero_() for o in buffers(2, 9, 11, torch.bfloat16)]
    torch.library.opcheck(torch.ops.fastkd.normalise.default, (batch(2), output, MEAN, STD))


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"images_NHWC": torch.zeros(2, 3, 3, 3)}, "uint8.*float32"),
        ({"output": buffers(2, 3, 4)[0]}, r"\[2, 3, 3, 3\] on cpu, got \[2, 3, 3, 4\] on cpu"),
        ({"output": buffers(2, 3, 3, device="meta")[0]}, "on cpu, got .* on meta"),
        ({"output": torch.zeros(2, 3, 3, 3)}, "channels-last"),
        ({"output": buffers(2, 3, 3, torch.float64)[0]}, "float64"),
        ({"mean": [0.5, 0.5]}, r"mean.*\[0.5, 0.5\]"),
        ({"std": [0.2, 0.0, 0.2]}, "std must be above 0.*0.0"),
    ],
)
def test_normalise_refuses(wrong, words):
    good = {"images_NHWC": batch(2, 3, 3), "output": buffers(2, 3, 3)[0], "mean": MEAN, "std": STD}
    normalise(**good)
    with pytest.raises(ValueError, match=words):
        normalise(**{**good, **wrong})
