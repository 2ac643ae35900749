"""Small shared memory, dead workers, a full or closed stdout, disks that cannot be written, few file handles."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import Done, can_mount, forked, mounted
from PIL import Image
from stopped_run import StoppedRun

from fastkd.commands import train
from fastkd.data.folder import Images
from fastkd.data.shared_memory import check_shared_memory
from fastkd.errors import UserError, lost_worker
from fastkd.files import write_atomic
from fastkd.run import checkpoint

ALONE = ["--method", "ce", "--student", "resnet8", "--no-baseline", "--warmup-epochs", "0", "-b", "32", "--epochs", "1"]
COMMAND = [sys.executable, "-m", "fastkd"]


def command(*arguments, limits=None, **settings):
    """Run the command to its end: (exit status, stderr's lines without torch's warnings)."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "timeout": 120, **settings},
        preexec_fn=(lambda: [resource.setrlimit(name, (value, value)) for name, value in limits]) if limits else None,
    )
    return done.returncode, (done.stderr or b"").decode()


def test_a_closed_stdout_gives_no_file_its_number(tmp_path):
    """Else what a library prints to stderr lands in a checkpoint."""
    script = """
import os, sys
for number in (0, 1, 2):
    os.close(number)
from fastkd.cli import main
sys.argv = ["fastkd", "--version"]
main()
os._exit(os.open(".", os.O_RDONLY))
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path, timeout=60).returncode > 2


def test_a_full_stdout_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        status, err = command("--help", stdout=full)
    assert (status, err) == (2, "fastkd: cannot write the output: No space left on device\n")


@pytest.mark.every
def test_low_limits(tmp_path):
    """Twenty file handles are enough; a bound on the size of files, and a HOME that cannot be written, are no trap."""
    home = {**os.environ, "HOME": "/proc/none"}
    assert command("train", *ALONE, "--out", tmp_path / "a", limits=[(resource.RLIMIT_NOFILE, 20)], env=home)[0] == 0
    status, err = command("train", *ALONE, "--out", tmp_path / "b", limits=[(resource.RLIMIT_FSIZE, 100_000)])
    assert status == 2 and "File too large" in err and err.count("\n") == 1


@pytest.fixture
def folder(tmp_path):
    """Ten images of 80 pixels in two classes, for training and for evaluation."""
    for number in range(20):
        place = tmp_path / "img" / ("train" if number < 10 else "val") / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 80), (number * 12, 90, 40)).save(place / f"{number}.jpg")
    return tmp_path / "img"


def shm(monkeypatch, free: int) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free // 4096, f_frsize=4096))


def test_shared_memory_that_is_too_small_is_said(monkeypatch):
    """Docker's 64 MB: 4 workers of ImageNet batches need 4 x 4 + 1 batches of 19 MB."""
    shm(monkeypatch, 64 * 2**20)
    batch = 128 * 224**2 * 3
    with pytest.raises(UserError, match="need 328 MB of shared memory, and /dev/shm has 67 MB free.*--shm-size=376m"):
        check_shared_memory(4, 4, batch, "lower --workers")
    check_shared_memory(0, 4, batch, "")
    check_shared_memory(4, 4, batch // 8, "")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match="8 processes x 4 workers"):
        check_shared_memory(4, 4, batch // 8, "")


def test_the_folder_loader_looks_at_shared_memory_first(fastkd, folder, monkeypatch):
    shm(monkeypatch, 2**20)
    options = ["--data", folder, "--loader", "folder", "--workers", "2", "--image-size", "64", "-b", "16"]
    status, _, err = fastkd("train", *ALONE[:-4], *options, "--out", "run")
    assert status == 2 and "of shared memory" in err and err.count("\n") == 1 and not os.path.exists("run")
    assert fastkd("train", *ALONE[:-4], *options, "--workers", "0", "--epochs", "1", "--out", "run")[0] == 0


@pytest.mark.parametrize(
    "text, words",
    [
        ("DataLoader worker (pid(s) 77) exited unexpectedly", "a worker process has ended"),
        ("DataLoader worker (pid 77) is killed by signal: Killed. ", "memory of the machine"),
        ("DataLoader timed out after 5 seconds", "--worker-timeout waits longer"),
        ("mat1 and mat2 shapes cannot be multiplied", ""),
    ],
)
def test_a_lost_worker_is_told_from_other_errors(text, words):
    assert words in lost_worker(RuntimeError(text)) and bool(lost_worker(RuntimeError(text))) == bool(words)
    assert not lost_worker(ValueError(text))


WORKERS = ["--loader", "folder", "--workers", "1", "--image-size", "32", "-b", "8"]


def test_a_worker_that_the_system_kills_is_one_line(folder, tmp_path, monkeypatch):
    """As for memory. The state of the first epoch is whole."""
    decode = Images.__getitems__

    def killed(self, keys):
        if self.train and keys[0][0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(self, keys)

    monkeypatch.setattr(Images, "__getitems__", killed)
    arguments = [*ALONE[:-4], "--epochs", "3", "--data", folder, *WORKERS, "--out", tmp_path / "run"]
    done = forked(tmp_path, lambda: train.run([str(argument) for argument in arguments]))
    check_ended(done, "a worker process has ended", "memory of the machine", status=1)
    assert checkpoint.load(tmp_path / "run" / "last.pt")["epoch"] == 1


@pytest.mark.every
@pytest.mark.parametrize(
    "how, words",
    [("killed", "memory of the machine"), ("hangs", "--worker-timeout")],
)
def test_a_worker_that_dies_or_hangs_is_one_line(folder, tmp_path, how, words):
    act = "os.kill(os.getpid(), 9)" if how == "killed" else "time.sleep(1000)"
    script = f"""
import os, sys, time
from fastkd.data.folder import Images
from fastkd.cli import main
decode = Images.__getitems__
def bad(self, keys):
    if self.train and keys[0][0] == 1:
        {act}
    return decode(self, keys)
Images.__getitems__ = bad
sys.argv = ["fastkd", *sys.argv[1:]]
main()
"""
    arguments = ["train", *ALONE[:-4], "--epochs", "3", "--data", folder, *WORKERS]
    arguments += ["--out", tmp_path / "run", *(["--worker-timeout", "3"] if how == "hangs" else [])]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    ours = [line for line in done.stderr.splitlines() if line.startswith("fastkd:")]
    assert done.returncode == 1 and len(ours) == 1 and words in ours[0], done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run/last.pt").exists()
    assert not _alive(str(tmp_path))


def _alive(word: str) -> list[str]:
    listed = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
    return [line for line in listed if word in line]


# The disk, the folder and the streams of a run that has begun. Each happens when three states are written.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield StoppedRun(tmp_path_factory.mktemp("stopped") / "r", patch, 2)


def check_ended(done: Done, *words: str, status: int = 2) -> None:
    """One clear line, and no success."""
    assert done.status == status and done.err.count("\n") == 1, done
    assert done.err.startswith("fastkd: ") and all(word in done.err for word in words), done.err


def check_goes_on(run: StoppedRun, folder: Path) -> None:
    """The last state is whole, and its run ends as the one that nothing happened to."""
    state = checkpoint.load(folder / "last.pt")
    assert (state["epoch"], state["step"]) == (0, 3)
    assert not [file.name for file in folder.iterdir() if file.name.endswith((".tmp", ".new.pt"))]
    assert run.fit(folder).read_bytes() == run.result


def fill(folder: Path) -> None:
    with open(folder / "filler", "wb", buffering=0) as file:
        while file.write(bytes(1 << 16)) == 1 << 16:
            pass


def test_a_disk_that_is_full(run, tmp_path):
    """A small one of its own."""
    if not can_mount():
        pytest.skip("no file system can be mounted here")
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()

    def work():
        mounted(disk, 1 << 20)
        try:
            run.fit(disk / "r", {3: lambda: fill(disk)})
        finally:
            for file in (disk / "r").iterdir():
                (kept / file.name).write_bytes(file.read_bytes())

    check_ended(forked(tmp_path, work), "cannot write", "last.pt", "No space left on device", "--resume")
    check_goes_on(run, kept)


def test_a_disk_that_becomes_read_only(run, tmp_path, monkeypatch):
    """As the system makes it after an error of the disk, also under files that are open."""
    opened = os.open

    def refuse(path, flags, *given, **named):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return opened(path, flags, *given, **named)

    def refuse_all(path, **named):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    def act():
        monkeypatch.setattr(os, "open", refuse)
        monkeypatch.setattr(os, "unlink", refuse_all)  # Linux refuses even what is not there

    def history():
        act()
        write_atomic(tmp_path / "history.csv", "")

    check_ended(forked(tmp_path, history), "cannot write", "history.csv", "Read-only file system")
    done = forked(tmp_path, lambda: run.fit(tmp_path / "r", {3: act}))
    check_ended(done, "cannot write", "last.pt", "Read-only file system", "--resume")
    check_goes_on(run, tmp_path / "r")


def test_a_bound_on_the_size_of_files(run, tmp_path):
    def work():
        run.fit(tmp_path / "r", {3: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))})

    check_ended(forked(tmp_path, work), "cannot write", "last.pt", "File too large", "--resume")
    check_goes_on(run, tmp_path / "r")


def test_a_folder_that_is_renamed(run, tmp_path):
    done = forked(tmp_path, lambda: run.fit(tmp_path / "r", {3: lambda: (tmp_path / "r").rename(tmp_path / "s")}))
    check_ended(done, f"the run folder {tmp_path}/r is gone: it was deleted or renamed", "--out NEW_NAME --resume")
    assert not (tmp_path / "r").exists()
    check_goes_on(run, tmp_path / "s")


def test_a_folder_that_is_deleted(run, tmp_path):
    done = forked(tmp_path, lambda: run.fit(tmp_path / "r", {3: lambda: shutil.rmtree(tmp_path / "r")}))
    check_ended(done, f"the run folder {tmp_path}/r is gone: it was deleted or renamed")
    assert not (tmp_path / "r").exists()


def test_another_folder_with_the_name_of_the_run_stays_as_it_is(run, tmp_path):
    def swap():
        (tmp_path / "r").rename(tmp_path / "s")
        shutil.copytree(run.folder, tmp_path / "r")

    check_ended(forked(tmp_path, lambda: run.fit(tmp_path / "r", {3: swap})), "is gone")
    assert (tmp_path / "r" / "last.pt").read_bytes() == (run.folder / "last.pt").read_bytes()
    check_goes_on(run, tmp_path / "s")


def test_a_lock_that_was_removed_ends_no_run(run, tmp_path):
    assert run.fit(tmp_path / "r", {3: lambda: (tmp_path / "r" / ".lock").unlink()}).read_bytes() == run.result


def full(*_: object) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def unread(*_: object) -> None:
    read, write = os.pipe()
    os.dup2(write, 1)
    os.close(read)


@pytest.mark.parametrize(
    "act, words, status",
    [
        (full, "cannot write the output: No space left on device", 2),
        (unread, "nobody reads the output any more", 1),
    ],
    ids=["full", "unread"],
)
def test_an_output_that_takes_no_more(run, tmp_path, act, words, status):
    """The next line, at the latest that of the first epoch, cannot be printed."""

    def work():
        sys.argv[1] = "train"
        run.fit(tmp_path / "r", {3: act})

    check_ended(forked(tmp_path, work), words, status=status)
    assert checkpoint.load(tmp_path / "r" / "last.pt")["epoch"] < 2
    assert run.fit(tmp_path / "r").read_bytes() == run.result


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("a\nb"), OSError(5, "Input/output error")])
def test_a_writer_that_fails_is_one_line(run, tmp_path, error):
    def fail(*_: object):
        raise error

    with pytest.raises(UserError, match=r"^cannot write .*last.pt: .*--resume(\n|$)") as caught:
        run.fit(tmp_path / "r", {3: fail})
    assert "\n" not in str(caught.value)
    check_goes_on(run, tmp_path / "r")


@pytest.mark.parametrize("jump", [86_400, -86_400])
def test_a_clock_that_jumps_changes_nothing(run, tmp_path, monkeypatch, jump):
    now, day = time.time, []
    monkeypatch.setattr(time, "time", lambda: now() + jump * len(day))
    steps = {number: lambda: day.append(1) for number in range(1, 9)}
    assert run.fit(tmp_path / "r", steps).read_bytes() == run.result and len(day) == 8


def test_no_part_of_a_run_reads_the_clock_of_the_wall():
    """Monotonic clocks do not jump. The benchmarks may print the date."""
    sources = Path(checkpoint.__file__).parents[1].rglob("*.py")
    read = [file for file in sources if re.search(r"\btime\.time\(|datetime\.now|\.st_mtime\b", file.read_text())]
    assert [str(file) for file in read if "bench" not in file.parts] == []


def test_changes_of_the_machine_are_said_at_a_resume(run, tmp_path, capsys):
    folder = Path(shutil.copytree(run.folder, tmp_path / "r"))
    state = checkpoint.load(folder / "last.pt")
    before = state["identity"]["environment"]
    before |= {"cpu_threads": 77, "packages": before["packages"] | {"torch": "1.0"}}
    checkpoint.save_run(folder, {name: value for name, value in state.items() if name != "format"})
    run.fit(folder)
    said = [line for line in capsys.readouterr().out.splitlines() if "the last digits" in line]
    assert len(said) == 2 and "cpu_threads was 77, now 1" in said[0] and "torch was 1.0, now" in said[1]
