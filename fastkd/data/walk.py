"""The files below a folder: each entry is an image by its name, or is skipped with a reason, or is wrong.

os.scandir tells files from folders without asking for each of them: about 4 us an entry, as ImageFolder takes. It
follows links.
"""

import os
from collections.abc import Iterable
from contextlib import suppress

from ..errors import UserError

# Those of torchvision's ImageFolder, and the other names of the same formats, GIF and AVIF.
EXTENSIONS = tuple(".jpg .jpeg .jfif .jpe .png .bmp .dib .webp .tif .tiff .ppm .pgm .pbm .pnm .gif .avif".split())
# What macOS, Windows, Synology and ext4 put into folders, in lower case. Hidden names are skipped too.
SYSTEM = (
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin"),
    *("system volume information", "@eadir", "lost+found"),
)
SHOWN = 5  # names per message
HOW = "; `fastkd check-data` finds all such files, and --skip-bad leaves them out"
DEEPEST = 100  # folders within one another
REPEATED = 1000  # readings of folders that were read before, through links: each level of links may double them
INDEX = ".fastkd-index"  # how the files begin in which image_index.py keeps what it has read

Identity = tuple[int, int]  # device and inode of a folder


class Found:
    """What a walk has met. It is filled by `files_below` and `look`."""

    def __init__(self) -> None:
        self.skipped: dict[str, tuple[int, str]] = {}  # by the reason: the number of entries, and one of them
        self.wrong: list[tuple[str, str]] = []  # an entry, and what is wrong with it
        self.folders: dict[Identity, str] = {}  # that were read
        self.repeated: list[tuple[str, str]] = []  # two paths of one folder

    def skip(self, reason: str, path: str, count: int = 1) -> None:
        before, first = self.skipped.get(reason, (0, path))
        self.skipped[reason] = before + count, first

    def add(self, other: "Found") -> None:
        """Take over what another walk has met."""
        for reason, (count, path) in other.skipped.items():
            self.skip(reason, path, count)
        self.wrong += other.wrong
        for identity, path in other.folders.items():
            self.enter(identity, path)
        self.repeated += other.repeated

    def enter(self, identity: Identity, path: str) -> None:
        """Note that a folder is read."""
        first = self.folders.setdefault(identity, path)
        if first != path:
            self.repeated.append((path, first))
        if len(self.repeated) > REPEATED:
            raise UserError(
                f"{first!r:.300} and others are reached more than {REPEATED:,} times, through links that lead back and "
                f"forth, such as {path!r:.300}: remove the links"
            )

    def skipped_text(self, root: str) -> str:
        """Such as "2 ending in .txt (such as a/x.txt), 1 hidden (a/.x)"; "" if nothing was skipped."""
        parts = []
        for reason, (count, path) in sorted(self.skipped.items()):
            example = shown(os.path.relpath(path, root))
            parts.append(f"{count:,} {reason} ({'such as ' if count > 1 else ''}{example})")
        return ", ".join(parts[:SHOWN]) + (f", and others for {len(parts) - SHOWN} reasons" if parts[SHOWN:] else "")

    def notes(self, root: str) -> tuple[str, ...]:
        """Lines for the user: what was skipped, and folders that were read twice."""
        lines = [f"data: skipped in {shown(root)}: {self.skipped_text(root)}"] if self.skipped else []
        if self.repeated:
            pairs = [f"{shown(path)} and {shown(first)}" for path, first in self.repeated]
            lines.append(f"WARNING: the images of a folder are read twice, through links: {some(pairs, quote=False)}")
        return tuple(lines)

    def refuse_wrong(self) -> None:
        """Raise UserError for what cannot be read."""
        if self.wrong:
            (path, problem), *rest = self.wrong
            more = f" and {len(rest)} more: {some([repr(name) for name, _ in rest], quote=False)};" if rest else ";"
            raise UserError(f"{path!r} {problem}{more} repair or remove these files{HOW}")


def files_below(folder: str, found: Found, above: tuple[Identity, ...] = ()) -> list[str]:
    """The paths of the images in `folder` and its folders, in the order of torchvision's ImageFolder.

    `above` are the folders that hold this one. A link that leads back to one of them, or to one that holds them, is
    skipped.
    """
    by_folder: dict[str, list[str]] = {}
    _collect(folder, found, above or holders(folder), by_folder)
    return [file for name in sorted(by_folder) for file in by_folder[name]]


def _collect(folder: str, found: Found, above: tuple[Identity, ...], by_folder: dict[str, list[str]]) -> None:
    here = identity(folder)
    if here in above:
        found.skip("link to a folder above it", folder)
        return
    if len(above) > DEEPEST:
        raise UserError(f"{folder!r:.300}... lies below more than {DEEPEST} folders: move the images up")
    found.enter(here, folder)
    files, folders = look(folder, found)
    by_folder[folder] = files
    for name in folders:
        _collect(os.path.join(folder, name), found, (*above, here), by_folder)


def holders(folder: str) -> tuple[Identity, ...]:
    """The folders that hold this one, up to the root of the file system."""
    place, above = os.path.realpath(folder), []
    while (upper := os.path.dirname(place)) != place:
        place = upper
        with suppress(UserError):  # one that cannot be read is no place to come back to
            above.append(identity(place))
    return tuple(above)


def look(folder: str, found: Found) -> tuple[list[str], list[str]]:
    """(sorted paths of the images in a folder, sorted names of its folders). Raises UserError if it cannot be read."""
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if reason := _sort(entry, files, folders, found):
                    found.skip(reason, entry.path)
    except OSError as error:
        raise UserError(f"{folder!r} cannot be read ({error.strerror}): check its permissions") from None
    return sorted(files), sorted(folders)


def _sort(entry: "os.DirEntry[str]", files: list[str], folders: list[str], found: Found) -> str:
    """Put an entry into one of the lists. Gives the reason if it is skipped."""
    if entry.name[0] == ".":
        return "" if entry.name.startswith(INDEX) else "hidden"
    if entry.name.lower() in SYSTEM:
        return "made by the operating system"
    try:
        if entry.is_file():
            ending = os.path.splitext(entry.name)[1].lower()
            if ending not in EXTENSIONS:
                return f"ending in {shown(ending)}" if ending else "without an ending"
            files.append(entry.path)
        elif entry.is_dir():
            folders.append(entry.name)
        else:
            entry.stat()  # raises for a link that leads nowhere
            return "neither file nor folder"  # a pipe, a socket or a device: opening it might wait for ever
    except OSError as error:
        found.wrong.append((entry.path, f"cannot be opened ({error.strerror})"))
    return ""


def identity(folder: str) -> Identity:
    """Equal for all paths of one folder. Raises UserError if it cannot be read."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise UserError(f"{folder!r} cannot be read ({error.strerror}): check its permissions") from None
    return status.st_dev, status.st_ino


def shown(name: str) -> str:
    """A name as it is, or quoted and escaped if it holds line breaks, bytes that are no text, or spaces at an end."""
    return name if name.isprintable() and name == name.strip() else repr(name)


def some(names: Iterable[str], *, quote: bool = True) -> str:
    """The first names of a list, and how many more there are."""
    names = [shown(name) if quote else name for name in names]
    return ", ".join(names[:SHOWN]) + (f", and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
