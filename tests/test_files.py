"""Files that are written whole or not at all, and sealed archives."""

import io
import resource
import tracemalloc
import zipfile
from contextlib import contextmanager

import pytest
import torch
from sealing import sealed

from fastkd.errors import UserError
from fastkd.files import Sealer, second_name
from fastkd.run import checkpoint


def archive(values: int = 1000) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(values)}, buffer)
    return buffer.getvalue()


@contextmanager
def largest_file(size: int):
    """Files cannot grow beyond so many bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("part", [1, 2, 3, 1000])
def test_a_seal_does_not_depend_on_the_parts_in_which_the_archive_comes(part):
    whole, buffer = archive(), io.BytesIO()
    sealer = Sealer(buffer)
    for start in range(0, len(whole), part):
        sealer.write(memoryview(whole)[start : start + part])
    sealer.finish()
    assert buffer.getvalue() == sealed(whole)


def test_a_sealed_archive_is_a_zip_file_and_a_checkpoint():
    content = io.BytesIO(sealed(archive()))
    assert zipfile.ZipFile(content).testzip() is None
    content.seek(0)
    assert torch.load(content, weights_only=True)["weight"].equal(torch.arange(1000))


@pytest.mark.parametrize("room", [0, 10_000, 1_000_000])
def test_a_disk_that_is_full_at_any_byte_keeps_the_state_before(tmp_path, room):
    checkpoint.save_run(tmp_path, {"history": [], "step": 1})
    before = (tmp_path / "last.pt").read_bytes()
    with (
        largest_file(room),
        pytest.raises(UserError, match=r"cannot write .*last.pt: File too large; .*go on with --resume"),
    ):
        checkpoint.save_run(tmp_path, {"history": [], "step": 2, "weight": torch.zeros(1_000_000)})
    assert (tmp_path / "last.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_state_is_written_without_a_copy_of_it_in_memory(tmp_path):
    state = {"history": [], "step": 1, "weight": torch.zeros(5_000_000)}
    tracemalloc.start()
    try:
        checkpoint.save_run(tmp_path, state)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "last.pt").stat().st_size > 20_000_000 and peak < 2_000_000
    assert checkpoint.load(tmp_path / "last.pt")["weight"].equal(state["weight"])


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    MemoryError(),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["device", "host", "Python"])
def test_without_memory_for_the_copy_a_state_is_written_in_the_loop(tmp_path, monkeypatch, error):
    """Said once; the file is complete when `save` returns, so that the next step may change the state."""

    def full(state):
        raise error

    monkeypatch.setattr("copy.deepcopy", full)
    said: list[str] = []
    state = {"history": [], "step": 2, "weights": torch.zeros(3)}
    with checkpoint.Writer(tmp_path, log=said.append) as writer:
        for step in (2, 4):
            writer.save(state | {"step": step})
            state["weights"] += 1
    assert checkpoint.load(tmp_path / "last.pt")["weights"].tolist() == [1, 1, 1]
    assert checkpoint.load(tmp_path / "last-1.pt")["weights"].tolist() == [0, 0, 0]
    assert len(said) == 1 and "no memory for a copy of the state" in said[0]


def test_another_error_of_the_copy_is_raised(tmp_path, monkeypatch):
    def broken(state):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr("copy.deepcopy", broken)
    with checkpoint.Writer(tmp_path) as writer, pytest.raises(RuntimeError, match="illegal"):
        writer.save({"history": [], "step": 2})


def test_a_copy_takes_the_place_of_a_link(tmp_path, monkeypatch):
    """On a file system without links."""

    def refused(*names, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)
    for content in (b"one", b"two"):
        (tmp_path / "last.pt").write_bytes(content)
        second_name(tmp_path / "last.pt", tmp_path / "best.pt")
        assert (tmp_path / "best.pt").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]

    def full(source, target):
        target.write(b"t")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(OSError, match="No space"):
        second_name(tmp_path / "last.pt", tmp_path / "best.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]
