"""One file to pixels: those of Pillow, or an error that names the file. No file may end the process."""

import io
import os
import warnings

import damage
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps, features

from fastkd.data import decode as decode_module
from fastkd.data.decode import decode, inspect
from fastkd.data.scan import scan
from fastkd.errors import UserError

ALL = damage.good_files()


@pytest.fixture(params=["torchvision", "PIL"])
def decoder(request, monkeypatch):
    if request.param == "PIL":
        monkeypatch.setattr(decode_module, "decode_jpeg", None)
    elif decode_module.decode_jpeg is None:
        pytest.skip("this torchvision decodes no images")


def pillow(data: bytes, turn: bool = False) -> np.ndarray:
    """[H, W, 3]: what a user's own script reads, and a shift by 8 bits for 16 bits of gray."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I"):
            return np.stack([(np.asarray(image) >> 8).astype(np.uint8)] * 3, -1)
        return np.asarray((ImageOps.exif_transpose(image) if turn else image).convert("RGB"))


def written(folder, data: bytes, name: str = "x.jpg") -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


def decoded(folder, data: bytes, exif: bool = False) -> np.ndarray:
    pixels = decode(written(folder, data), exif)
    assert pixels.dtype == torch.uint8 and pixels.shape[0] == 3
    return pixels.permute(1, 2, 0).numpy()


def refusal(folder, data: bytes) -> str:
    file = written(folder, data)
    with pytest.raises(UserError) as caught:
        decode(file)
    message = str(caught.value)
    assert repr(file) in message and "cannot be decoded" in message and "\n" not in message
    return message


@pytest.mark.parametrize("name", ALL)
def test_large_pictures_are_converted_in_strips(tmp_path, monkeypatch, name):
    data = ALL[name]
    whole = decoded(tmp_path, data)
    monkeypatch.setattr(decode_module, "LARGE", 130)  # 3 rows
    monkeypatch.setattr(decode_module, "decode_jpeg", None)
    assert (decoded(tmp_path, data) == whole).all()


def test_both_decoders_give_the_pixels_of_pil(pictures, decoder):
    for file in scan(str(pictures / "val")).files:
        assert (decode(file).permute(1, 2, 0).numpy() == np.asarray(Image.open(file).convert("RGB"))).all(), file


@pytest.mark.parametrize("name", ALL)
def test_every_format_and_mode_has_the_pixels_of_pil_whatever_its_name(name, tmp_path):
    assert (decoded(tmp_path, ALL[name]) == pillow(ALL[name])).all()
    assert inspect(str(tmp_path / "x.jpg"))[1] == ""


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("jpeg")])
def test_every_kind_of_jpeg_has_the_pixels_of_pil(name, tmp_path, decoder):
    assert (decoded(tmp_path, ALL[name]) == pillow(ALL[name])).all()
    refusal(tmp_path, ALL[name][: len(ALL[name]) // 2])


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif(tmp_path):
    data = damage.saved(damage.noisy(40, 30), "AVIF")
    assert (decoded(tmp_path, data) == pillow(data)).all()
    refusal(tmp_path, data[: len(data) // 2])


@pytest.mark.parametrize("save", ["L", "P", "RGBA", "LA", "1", "I;16"])
def test_every_png_becomes_rgb(save, tmp_path, decoder):
    gray = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (40, 1))
    image = Image.fromarray(gray.astype(np.uint16) * 257) if save == "I;16" else Image.fromarray(gray).convert(save)
    want = gray[..., None].repeat(3, -1) if save == "I;16" else np.asarray(image.convert("RGB"))
    assert (decoded(tmp_path, damage.saved(image, "PNG")) == want).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_extreme_shapes(kind, size, tmp_path, decoder):
    data = damage.saved(damage.noisy(*size), kind)
    assert (decoded(tmp_path, data) == pillow(data)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_as_pillow_does(kind, orientation, tmp_path, decoder):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = damage.saved(damage.noisy(30, 20), kind, exif=exif)
    assert (decoded(tmp_path, data, exif=True) == pillow(data, turn=True)).all()
    assert (decoded(tmp_path, data) == pillow(data)).all()  # off: ignored, but Pillow always turns a TIFF


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_unknown_orientation_changes_nothing(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = damage.saved(damage.noisy(30, 20), "PNG", exif=exif)
    assert (decoded(tmp_path, data, exif=True) == pillow(data)).all()


@pytest.mark.parametrize("name", ALL)
def test_half_a_file_is_named(name, tmp_path):
    refusal(tmp_path, ALL[name][: len(ALL[name]) // 2])


def test_what_is_missing_is_not_filled_with_gray_if_another_library_asks_for_that(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for name in ("jpeg", "jpeg_progressive", "png", "bmp", "tiff"):
        refusal(tmp_path, ALL[name][:-200])


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "header is damaged"),
        (b"GIF89a", "header is damaged"),
        (b"\xff\xd8\xff" + bytes(50), "header is damaged"),
        (ALL["jpeg"][:200], ""),
    ],
)
def test_the_reason_is_one_line(data, reason, tmp_path):
    assert reason in refusal(tmp_path, data)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    for file, reason in (("x.jpg", "Is a directory"), ("gone.jpg", "No such file")):
        with pytest.raises(UserError, match=reason):
            decode(str(tmp_path / file))
        assert reason in inspect(str(tmp_path / file))[1]


def test_pixels_of_32_bits_are_refused(tmp_path):
    real = damage.saved(Image.fromarray(np.random.default_rng(0).random((8, 8)).astype(np.float32)), "TIFF")
    assert "32 bits" in refusal(tmp_path, real)


def test_pictures_above_the_limit_of_pillow(tmp_path, monkeypatch):
    """Up to twice MAX_IMAGE_PIXELS a picture is read, without a warning; above it is named, before memory is taken."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode_module.ignore_warnings()
        assert decoded(tmp_path, ALL["png"]).shape == (31, 40, 3)
    assert [str(warning.message) for warning in caught] == []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    for name in ("jpeg", "png", "webp", "bmp", "gif", "tiff"):
        message = refusal(tmp_path, ALL[name])
        assert "1240 pixels" in message and "limit of 1200" in message and "bomb" not in message
        assert "1240 pixels" in inspect(str(tmp_path / "x.jpg"))[1]


def test_one_wrong_byte_in_a_png(tmp_path):
    """torchvision's decoder ends the process with SIGSEGV here."""
    for place in range(len(ALL["png"]) // 2, len(ALL["png"]) // 2 + 20):
        data = bytearray(ALL["png"])
        data[place] ^= 0x55
        refusal(tmp_path, bytes(data))


def outcome(read, *arguments) -> np.ndarray | None:
    try:
        return np.asarray(read(*arguments))
    except Exception:
        return None


def is_whole(data: bytes) -> bool:
    """False for a PNG with a wrong checksum or without an end. Pillow makes up the pixels that are lost."""
    try:
        Image.open(io.BytesIO(data)).verify()
    except Exception:
        return data[:4] != b"\x89PNG"
    return True


def rot(name: str) -> bytes:
    """The first two thirds of a file, then zeros: what a download leaves that was cut off."""
    return ALL[name][: len(ALL[name]) * 2 // 3] + bytes(len(ALL[name]) // 3)


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith(("jpeg", "png", "webp"))])
def test_lost_pixels_are_not_made_up(name, tmp_path, decoder):
    """Pillow reads most of these files without an error."""
    refusal(tmp_path, rot(name))
    assert inspect(str(tmp_path / "x.jpg"))[1]


@pytest.mark.parametrize("tail", [bytes(100), b"\xff\xd9" + bytes(100), b"of a camera"])
def test_bytes_behind_the_end_are_no_damage(tail, tmp_path, decoder):
    for name in ("jpeg", "jpeg_progressive", "png"):
        assert (decoded(tmp_path, ALL[name] + tail) == pillow(ALL[name])).all()
        assert inspect(str(tmp_path / "x.jpg"))[1] == ""


def test_a_jpeg_without_its_end_marker_alone_is_read(tmp_path, decoder):
    """No pixel is lost; all libjpeg programs read it."""
    data = ALL["jpeg"][:-2]
    assert outcome(pillow, data) is None or (decoded(tmp_path, data) == pillow(data)).all()


def test_damaged_files_are_named_if_pillow_refuses_them_and_equal_otherwise(tmp_path):
    """400 files. `python tests/data/fuzz.py` tries as many as wanted, through both loaders."""
    good = bad = 0
    for name, data in damage.damaged(400, seed=1):
        want = outcome(pillow, data)
        if want is None or not is_whole(data):
            refusal(tmp_path, data)
            bad += 1
        else:
            assert (decoded(tmp_path, data) == want).all(), name
            assert inspect(str(tmp_path / "x.jpg"))[1] == "", name
            good += 1
    assert good > 80 and bad > 200


def test_inspection_finds_what_dali_passes_over(tmp_path):
    spliced = ALL["jpeg"][:700] + ALL["jpeg_gray"][20:]
    for data in (ALL["bmp"][:-1], ALL["bmp_alpha"][:-100], spliced, ALL["png"][:-40], ALL["webp_lossless"][:-40]):
        assert inspect(written(tmp_path, data))[1]


def test_a_bmp_that_other_decoders_read_otherwise_is_told_from_a_plain_one(tmp_path):
    """Pillow finds the pixels without their place in the header, DALI does not."""
    file = bytearray(ALL["bmp_alpha"])
    file[10:14] = bytes(4)
    assert (decoded(tmp_path, bytes(file)) == pillow(ALL["bmp_alpha"])).all()
    assert inspect(str(tmp_path / "x.jpg")) == ("BMP without the place of its pixels", "")


def test_inspection_decodes_nothing_that_is_plain(tmp_path, monkeypatch):
    """Else the first epoch would pay for each picture twice."""
    monkeypatch.setattr(decode_module, "_pixels", None)
    for name, kind in (
        ("jpeg", "JPEG"),
        ("jpeg_restarts", "JPEG"),
        ("jpeg_cmyk", "JPEG"),
        ("png", "PNG"),
        ("webp", "WEBP"),
    ):
        assert inspect(written(tmp_path, ALL[name])) == (kind, "")


def test_a_file_name_in_any_bytes(tmp_path):
    file = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9 '\n.jpg")
    with open(file, "wb") as stream:
        stream.write(ALL["jpeg"])
    assert decode(file).shape == (3, 31, 40) and inspect(file) == ("JPEG", "")
    with open(file, "wb") as stream:
        stream.write(b"no image")
    with pytest.raises(UserError) as caught:
        decode(file)
    assert str(caught.value).encode() and "\n" not in str(caught.value)
