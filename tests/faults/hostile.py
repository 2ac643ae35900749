"""Hostile weights files and pictures, and a child process that reads them one after another.

`python hostile.py weights|pictures FOLDER` prints a JSON line for each file: its name, what was said, the seconds, and
the growth of the process's peak memory.
"""

import collections
import io
import json
import os
import pickle
import socket
import struct
import sys
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

NETWORK, CLASSES = "resnet8", 10


def state() -> dict[str, torch.Tensor]:
    from fastkd import create_model

    torch.manual_seed(0)
    return dict(create_model(NETWORK, CLASSES).state_dict())


# Pickles, instruction by instruction


def op(name: str) -> bytes:
    return getattr(pickle, name)


def text(value: str) -> bytes:
    return op("BINUNICODE") + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(16, "little", signed=True)
    return op("LONG1") + bytes([len(data)]) + data


def call(path: str, *arguments: bytes) -> bytes:
    module, _, name = path.rpartition(".")
    return op("GLOBAL") + f"{module}\n{name}\n".encode() + op("MARK") + b"".join(arguments) + op("TUPLE") + op("REDUCE")


def storage(kind: str, key: str, items: int) -> bytes:
    cls = op("GLOBAL") + f"torch\n{kind}\n".encode()
    place = text("storage") + cls + text(key) + text("cpu") + number(items)
    return op("MARK") + place + op("TUPLE") + op("BINPERSID")


def numbers(*values: int) -> bytes:
    return op("MARK") + b"".join(map(number, values)) + op("TUPLE")


def tensor(items: int, shape: tuple[int, ...], strides: tuple[int, ...], kind: str = "FloatStorage") -> bytes:
    hooks = call("collections.OrderedDict")
    rebuilt = (storage(kind, "0", items), number(0), numbers(*shape), numbers(*strides), op("NEWFALSE"), hooks)
    return call("torch._utils._rebuild_tensor_v2", *rebuilt)


def entry(key: bytes, value: bytes) -> bytes:
    """A dict of one entry."""
    return op("EMPTY_DICT") + op("MARK") + key + value + op("SETITEMS")


def doubled(levels: int, empty: bytes) -> bytes:
    """A tuple that holds twice a tuple that holds twice ...: it takes 2**levels steps to hash."""
    steps = (op("BINPUT") + bytes([level]) + op("BINGET") + bytes([level]) + op("TUPLE2") for level in range(levels))
    return empty + b"".join(steps)


def archive(path: Path, content: bytes, record: bytes = bytes(4), how: int = zipfile.ZIP_STORED) -> Path:
    """A file of torch.save with this pickle and one record of a storage."""
    with zipfile.ZipFile(path, "w", how) as file:
        file.writestr("net/data.pkl", op("PROTO") + b"\x02" + content + op("STOP"))
        file.writestr("net/byteorder", "little")
        file.writestr("net/data/0", record)
        file.writestr("net/version", "3\n")
    return path


def old_format(path: Path, content: bytes) -> Path:
    buffer = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
        pickle.dump(value, buffer, protocol=2)
    buffer.write(op("PROTO") + b"\x02" + content + op("STOP"))
    pickle.dump(["0"], buffer, protocol=2)
    path.write_bytes(buffer.getvalue() + struct.pack("<q", 1) + bytes(4))
    return path


class Touch:
    """Its unpickling makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_archives(folder: Path) -> None:
    """Zip files of torch.save, and the older format."""
    one, huge = tensor(1, (1,), (1,)), 10**10
    zeros = bytes(256 << 20)
    archive(folder / "bomb.pth", entry(text("w"), tensor(64 << 20, (64 << 20,), (1,))), zeros, zipfile.ZIP_DEFLATED)
    padded = entry(text("w"), one) + op("NONE") * (64 << 20)
    archive(folder / "bomb_in_the_pickle.pth", padded, how=zipfile.ZIP_DEFLATED)
    for name, content in {
        "claims_other_memory": entry(text("w"), tensor(10**6, (10**6,), (1,))),
        "claims_less_than_nothing": entry(text("w"), tensor(-8, (1,), (1,))),
        "is_expanded": entry(text("fc.bias"), tensor(1, (10**6, 10**6), (0, 0))),
        "memo": one + op("LONG_BINPUT") + struct.pack("<I", 0xFFFFFFF0),
        "bytearray": call("builtins.bytearray", number(huge)),
        "bytearray8": op("BYTEARRAY8") + struct.pack("<Q", huge),
        "tensor_of_nothing": entry(text("w"), call("torch.FloatTensor", number(huge))),
        "storage_of_nothing": call("torch.storage.UntypedStorage", number(huge)),
        "key_that_cannot_be_hashed": entry(doubled(60, op("EMPTY_TUPLE")), one),
        "set_that_cannot_be_hashed": call("builtins.set", op("EMPTY_LIST") + doubled(60, op("EMPTY_TUPLE")) + b"a"),
        "punycode": call("_codecs.encode", text("\u00e9\u4e00" * 10**6), text("punycode")),
        "void_number": call("numpy.core.multiarray.scalar", call("numpy.dtype", text("V2000000000"))),
        "nested_tensor": call("torch._utils._rebuild_nested_tensor", one, one, one, one),
        "quantised_of_nothing": call(
            "torch._utils._rebuild_qtensor",
            *(storage("QInt8Storage", "0", 1), number(0), numbers(huge), numbers(1)),
            op("MARK") + op("GLOBAL") + b"torch\nper_tensor_affine\n" + op("BINFLOAT") + struct.pack(">d", 1.0),
            number(0) + op("TUPLE") + op("NEWFALSE") + call("collections.OrderedDict"),
        ),
        "long_number_as_key": entry(op("LONG4") + struct.pack("<i", 5000) + b"\x01" * 5000, one),
        "deep_lists": op("EMPTY_LIST") * 10**5 + op("APPEND") * (10**5 - 1),
        "many_steps": op("EMPTY_LIST") * 1_600_000,
    }.items():
        archive(folder / f"{name}.pth", content)
        if name in ("claims_other_memory", "bytearray", "void_number", "nested_tensor"):
            old_format(folder / f"{name}.old.pth", content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(archive(folder / "two_records.pth", entry(text("w"), one)), "a") as file:
            file.writestr("net/DATA/0", b"")


def write_dicts(folder: Path) -> None:
    """What torch.save itself may write."""
    good = state()
    loop: dict = {"epoch": 1}
    loop["state_dict"] = loop
    deep: dict = good
    for _ in range(300):
        deep = {"model": deep}
    listed: list = []
    listed.append(listed)
    weight = good["fc.weight"]
    odd_metadata = []
    for about in (5, {"": 5}, {5: {}}, {"": {"version": "x"}}):
        table = collections.OrderedDict(good)
        table.__dict__["_metadata"] = about
        odd_metadata.append(table)
    files = {
        "loop": loop,
        "loop_of_two": {"model": {"net": loop}},
        "deep": deep,
        "list_in_itself": {"w": listed},
        "sparse": good | {"fc.weight": weight.to_sparse()},
        "sparse_rows": good | {"fc.weight": weight.to_sparse_csr()},
        "meta": good | {"fc.weight": weight.to("meta")},
        "quantised": good | {"fc.weight": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)},
        "complex": good | {"fc.weight": weight.to(torch.complex64)},
        "complex_counter": good | {"bn1.num_batches_tracked": torch.tensor(1j)},
        "quantised_counter": good
        | {"bn1.num_batches_tracked": torch.quantize_per_tensor(torch.ones(()), 1, 0, torch.qint32)},
        "bits": good | {"bn1.num_batches_tracked": torch.zeros((), dtype=torch.uint8).view(torch.bits8)},
        "long_key": good | {"x" * 2_000_000: weight},
        "key_of_two_lines": good | {"a\nb\x1b[2J\ud800": weight},
        "number_in_key": {f"block@{'9' * 6000}.w": weight, "group" + "9" * 6000 + ".block0.conv0": weight},
        "many_keys": dict.fromkeys(map(str, range(100_000)), weight[0, 0]),
        "empty_keys": {"": weight, "module.": weight},
        "touch": {"w": Touch(folder / "touched")},
    }
    for name, content in files.items():
        torch.save(content, folder / f"{name}.pt")
    for number_, table in enumerate(odd_metadata):
        torch.save(table, folder / f"ok_metadata{number_}.pt")


def write_places(folder: Path) -> None:
    """What is no file, folders of transformers, and damaged safetensors."""
    os.mkfifo(folder / "pipe.pth")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "zero.pth").symlink_to("/dev/zero")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    here = os.getcwd()
    os.chdir(folder)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket.pth")
    os.chdir(here)
    with open(folder / "hole.pth", "wb") as file:
        file.truncate(100 << 30)
    shards = {"up": "..", "itself": "again", "outside": "/etc/passwd", "deep": None}
    for name, shard in shards.items():
        (folder / f"index_{name}").mkdir()
        index = '{"weight_map":' + "[" * 10**5 if shard is None else json.dumps({"weight_map": {"w": shard}})
        (folder / f"index_{name}" / "model.safetensors.index.json").write_text(index)
    (folder / "index_itself" / "again").symlink_to(".")
    good = state()
    save_file(good, folder / "long_names.safetensors", metadata={"x" * 10**6: "y" * 10**6})
    save_file(good | {"z" * 10**6: good["fc.bias"].clone()}, folder / "long_key.safetensors")
    head = json.dumps({"w": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}).encode()
    (folder / "claims.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(4))
    head = b'{"a":' * 10**5
    (folder / "header.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(4))
    (folder / "length.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes = b"\0") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def write_images(folder: Path) -> None:
    """Pictures that claim 60,000 x 60,000 pixels, and what no picture is, with its ending."""
    side = 60_000
    (folder / "claims.png").write_bytes(png(side, side))
    (folder / "product.png").write_bytes(png(1 << 31 - 1, 1))
    (folder / "text.png").write_bytes(png(8, 8).replace(b"IDAT", b"zTXt", 1))
    zeros = zlib.compress(bytes(64 << 20))
    comment = chunk(b"zTXt", b"k\0\0" + zeros)
    (folder / "comment.png").write_bytes(png(8, 8, bytes(8 * 25)).replace(chunk(b"IEND", b""), comment))
    profile = chunk(b"iCCP", b"k\0\0" + zeros)
    (folder / "profile.png").write_bytes(png(8, 8, bytes(8 * 25)).replace(chunk(b"IEND", b""), profile))
    (folder / "lines.ppm").write_bytes(b"P6 60000 60000 255\n")
    (folder / "number.ppm").write_bytes(b"P6 " + b"9" * 10**6 + b" 1 255\n")
    header = (
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    )
    (folder / "claims.bmp").write_bytes(header)
    screen = struct.pack("<HH", side, side) + b"\0\0\0"
    frame = b"," + struct.pack("<HHHH", 0, 0, side, side) + b"\0\x02\x01\x44\0;"
    (folder / "claims.gif").write_bytes(b"GIF89a" + screen + frame)
    (folder / "frame.gif").write_bytes(b"GIF89a" + struct.pack("<HH", 1, 1) + b"\0\0\0" + frame)
    tags = [(256, side), (257, side), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, side), (279, 8)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    (folder / "claims.tif").write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4))
    size = struct.pack("<I", 16382)[:3]
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size + size
    (folder / "claims.webp").write_bytes(b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body)
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    start = buffer.getvalue().find(b"\xff\xc0")
    jpeg = bytearray(buffer.getvalue())
    jpeg[start + 5 : start + 9] = struct.pack(">HH", side, side)
    (folder / "claims.jpg").write_bytes(jpeg)
    (folder / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\n")
    with open(folder / "hole.jpg", "wb") as file:
        file.write(buffer.getvalue())
        file.truncate(100 << 30)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")


def peak() -> float:
    """The most memory that this process has had, in MB. getrusage counts its parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def read_weights(path: Path) -> None:
    from fastkd import create_model
    from fastkd.models import load_weights
    from fastkd.weights_file import read_about

    read_about(path)
    load_weights(create_model(NETWORK, CLASSES), path)


def read_picture(path: Path) -> None:
    """All three ways must refuse a file."""
    from fastkd.data.decode import decode, header, inspect
    from fastkd.errors import UserError

    claims = path.name.startswith(("claims", "product", "frame"))
    try:
        height, width, *_ = header(str(path))
        assert not claims, (height, width)
    except ValueError:
        pass
    reason = inspect(str(path))[1]
    try:
        decode(str(path))
    except UserError:
        assert reason
        raise


def measured(path: Path) -> dict[str, object]:
    from fastkd.errors import UserError

    before, start, work = peak(), time.monotonic(), time.process_time()
    try:
        {"weights": read_weights, "pictures": read_picture}[sys.argv[1]](path)
        said = "OK"
    except UserError as error:
        said = f"UserError: {error}"
    except BaseException as error:  # of Rust too
        said = f"{type(error).__name__}: {error}"
    return {
        "name": path.name,
        "said": said,
        "seconds": time.process_time() - work,
        "with_waiting": time.monotonic() - start,
        "grown": peak() - before,
        "peak": peak(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sorted(Path(sys.argv[2]).iterdir()):
        print(json.dumps(measured(each)), flush=True)
