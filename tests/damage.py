"""Small pictures in every format and mode, and ways to damage them. `damaged(n, seed)` gives n files as bytes."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

Seeded = np.random.Generator


def noisy(width: int, height: int, seed: int = 0) -> Image.Image:
    """RGB: a gradient with noise, so that most bytes of a compressed file matter."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 200 // width, y * 200 // height, (x + y) * 200 // (width + height)], -1)
    return Image.fromarray((base + random.integers(0, 55, base.shape)).astype(np.uint8))


def saved(image: Image.Image, kind: str, **how: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return stream.getvalue()


def good_files(width: int = 40, height: int = 31) -> dict[str, bytes]:
    """{a name that tells format and mode: the file}"""
    rgb = noisy(width, height)
    alpha = Image.fromarray(np.asarray(noisy(width, height, 1))[..., 0])
    rgba, cmyk, gray = rgb.copy(), rgb.convert("CMYK"), rgb.convert("L")
    rgba.putalpha(alpha)
    la = gray.copy()
    la.putalpha(alpha)
    deep = Image.fromarray(np.random.default_rng(2).integers(0, 65536, (height, width), dtype=np.uint16))
    other = noisy(width, height, 3)
    return {
        "jpeg": saved(rgb, "JPEG", quality=90),
        "jpeg_progressive": saved(rgb, "JPEG", progressive=True),
        "jpeg_restarts": saved(rgb, "JPEG", restart_marker_blocks=2),
        "jpeg_gray": saved(gray, "JPEG"),
        "jpeg_cmyk": saved(cmyk, "JPEG"),
        "jpeg_444": saved(rgb, "JPEG", subsampling=0),
        "png": saved(rgb, "PNG"),
        "png_gray": saved(gray, "PNG"),
        "png_deep": saved(deep, "PNG"),
        "png_alpha": saved(rgba, "PNG"),
        "png_gray_alpha": saved(la, "PNG"),
        "png_palette": saved(rgb.quantize(16), "PNG"),
        "png_palette_clear": saved(rgb.quantize(16), "PNG", transparency=3),
        "png_rgb_clear": saved(rgb, "PNG", transparency=(0, 0, 0)),
        "png_bits": saved(rgb.convert("1"), "PNG"),
        "png_animated": saved(rgb, "PNG", save_all=True, append_images=[other]),
        "webp": saved(rgb, "WEBP"),
        "webp_lossless": saved(rgb, "WEBP", lossless=True),
        "webp_alpha": saved(rgba, "WEBP"),
        "webp_animated": saved(rgb, "WEBP", save_all=True, append_images=[other]),
        "bmp": saved(rgb, "BMP"),
        "bmp_gray": saved(gray, "BMP"),
        "bmp_bits": saved(rgb.convert("1"), "BMP"),
        "bmp_alpha": saved(rgba, "BMP"),
        "gif": saved(rgb, "GIF"),
        "gif_clear": saved(rgb.quantize(16), "GIF", transparency=3),
        "gif_animated": saved(rgb, "GIF", save_all=True, append_images=[other]),
        "tiff": saved(rgb, "TIFF"),
        "tiff_lzw": saved(rgb, "TIFF", compression="tiff_lzw"),
        "tiff_deflate": saved(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "tiff_jpeg": saved(rgb, "TIFF", compression="jpeg"),
        "tiff_gray": saved(gray, "TIFF"),
        "tiff_deep": saved(deep, "TIFF"),
        "tiff_cmyk": saved(cmyk, "TIFF"),
        "tiff_palette": saved(rgb.quantize(16), "TIFF"),
        "tiff_alpha": saved(rgba, "TIFF"),
        "tiff_bits": saved(rgb.convert("1"), "TIFF", compression="group4"),
        "ppm": saved(rgb, "PPM"),
        "pgm": saved(gray, "PPM"),
        "pgm_deep": saved(deep, "PPM"),
    }


def flip_bytes(data: bytearray, other: bytes, random: Seeded) -> bytearray:
    for place in random.integers(12, len(data), random.integers(1, 6)):
        data[place] ^= int(random.integers(1, 256))
    return data


def truncate(data: bytearray, other: bytes, random: Seeded) -> bytearray:
    return data[: int(random.integers(16, len(data)))]


def splice(data: bytearray, other: bytes, random: Seeded) -> bytearray:
    """The beginning of one file and the end of another."""
    return data[: int(random.integers(16, len(data)))] + other[int(random.integers(0, len(other))) :]


def zero_header(data: bytearray, other: bytes, random: Seeded) -> bytearray:
    start, length = int(random.integers(8, 64)), int(random.integers(1, 32))
    data[start : start + length] = bytes(min(length, max(0, len(data) - start)))
    return data


def cut_out(data: bytearray, other: bytes, random: Seeded) -> bytearray:
    start = int(random.integers(16, len(data)))
    return data[:start] + data[start + int(random.integers(1, 200)) :]


def huge_size(data: bytearray, other: bytes, random: Seeded) -> bytearray:
    """Width and height in the header become huge; PNG's checksum is made right."""
    width, height = (int(value) for value in random.choice([1, 40, 30_000, 65_000, 65_535], 2))
    if data[:4] == b"\x89PNG":
        data[16:24] = struct.pack(">II", width * 16, height * 16)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif data[:2] == b"\xff\xd8":
        for marker in (b"\xff\xc0", b"\xff\xc2"):
            if (at := data.find(marker)) > 0:
                data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    elif data[:2] == b"BM":
        data[18:26] = struct.pack("<ii", width, height)
    elif data[:3] == b"GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif data[:4] == b"RIFF" and data[12:16] == b"VP8 ":
        data[26:30] = struct.pack("<HH", width & 0x3FFF, height & 0x3FFF)
    elif data[:4] == b"RIFF" and data[12:16] == b"VP8X":
        data[24:30] = struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3]
    elif data[:2] in (b"P5", b"P6"):
        return bytearray(data[:3] + b"%d %d" % (width, height) + data[data.find(b"\n", 3) :])
    elif data[:4] == b"II*\0":
        _tiff_size(data, width, height)
    return data


def _tiff_size(data: bytearray, width: int, height: int) -> None:
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag = struct.unpack_from("<H", data, entry)[0]
        if tag in (256, 257):
            struct.pack_into("<HIHH", data, entry + 2, 3, 1, width if tag == 256 else height, 0)


WAYS = (flip_bytes, truncate, splice, zero_header, cut_out, huge_size)


def damaged(count: int, seed: int, side: int | None = None) -> Iterator[tuple[str, bytes]]:
    """(format and mode_the damage, the file): the formats in turn, the damage at random; `side`: square pictures."""
    random = np.random.default_rng(seed)
    files = good_files(side, side) if side else good_files()
    names = list(files)
    for i in range(count):
        name, other = names[i % len(names)], names[int(random.integers(len(names)))]
        way = WAYS[int(random.integers(len(WAYS)))]
        yield f"{name}_{way.__name__}", bytes(way(bytearray(files[name]), files[other], random))
