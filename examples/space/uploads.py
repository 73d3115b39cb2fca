"""Uploaded files: their number, size and format are checked before they are used. Nothing in them is executed."""

import shutil
import zipfile
from collections.abc import Container, Iterable, Sequence
from itertools import chain, count
from pathlib import Path, PurePosixPath

from PIL import Image

from cl_prompts.runtime.images import UnreadableImage, read_rgb
from cl_prompts.runtime.text import first_line
from cl_prompts.sharing.image_processor import PROCESSOR_FILE
from cl_prompts.sharing.run_record import RESULTS_FILE
from cl_prompts.storage.bounded_read import MAX_CONFIG_BYTES, MAX_PROCESSOR_BYTES, MAX_RESULTS_BYTES, check_bounded
from cl_prompts.storage.declared import CONFIG_FILE, WEIGHTS_FILE


MAX_IMAGES = 20
MAX_IMAGE_BYTES = 10 * 2**20
MAX_PIXELS = 40_000_000
LONGEST_SIDE = 1024  # a larger picture is scaled down on arrival

MAX_ADAPTER_BYTES = 64 * 2**20
ADAPTER_FILES = {
    CONFIG_FILE: MAX_CONFIG_BYTES,
    WEIGHTS_FILE: MAX_ADAPTER_BYTES,
    PROCESSOR_FILE: MAX_PROCESSOR_BYTES,
    RESULTS_FILE: MAX_RESULTS_BYTES,
}
MAX_DIRECTORY_BYTES = 2**18  # of a zip file: some thousand entries
SHORTEST_END, LONGEST_END = 22, 22 + 2**16  # of a zip file: the record of its directory, and a comment
NEEDED = f"give {CONFIG_FILE} and {WEIGHTS_FILE}, perhaps with {PROCESSOR_FILE} and {RESULTS_FILE}, or the zip of this page"


def take_images(paths: Sequence[str | Path], beside: Iterable[str] = ()) -> tuple[dict[str, Image.Image], list[str]]:
    """Pictures as 8-bit RGB by name, and an error line for each file that cannot be read.

    Args:
        paths: uploaded files.
        beside: names that are already used.

    Raises:
        ValueError: more than `MAX_IMAGES`.
    """
    if len(paths) > MAX_IMAGES:
        raise ValueError(f"{len(paths)} files are too many: at most {MAX_IMAGES} at a time")
    images: dict[str, Image.Image] = {}
    problems = []
    for path in map(Path, paths):
        try:
            images[_free_name(path.name, {*images, *beside})] = _image(path)
        except ValueError as error:
            problems.append(first_line(error))
    return images, problems


def _free_name(name: str, taken: Container[str]) -> str:
    return next(free for free in chain([name], (f"{name} ({number})" for number in count(2))) if free not in taken)


def _image(path: Path) -> Image.Image:
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_IMAGE_BYTES // 2**20} MB: scale it down")
    try:
        image = read_rgb(path, MAX_PIXELS)
    except UnreadableImage as error:
        raise ValueError(f"{path.name} is no picture that can be read here: {error}") from error
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return image


def take_adapter(paths: Sequence[str | Path], folder: Path) -> None:
    """Copy the files of one adapter into a folder, under the names that they must have.

    Args:
        paths: uploaded files: those of the adapter, or one zip that holds them.
        folder: destination.

    Raises:
        ValueError: a file is missing, unknown or too large, or the zip cannot be read.
    """
    files = [Path(path) for path in paths]
    if len(files) == 1 and files[0].suffix.lower() == ".zip":
        _unpack(files[0], folder)
    else:
        if len(files) > len(ADAPTER_FILES):
            raise ValueError(f"{len(files)} files are too many: {NEEDED}")
        for file in files:
            if file.name not in ADAPTER_FILES:
                raise ValueError(f"{file.name} is no file of an adapter: {NEEDED}")
            _check_size(file.name, check_bounded(file, None))
            shutil.copyfile(file, folder / file.name)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is missing: {NEEDED}")


def _unpack(file: Path, folder: Path) -> None:
    try:
        _check_directory(file)
        found = _unpacked(file)
    except Exception as error:  # on damaged files zipfile raises anything
        raise ValueError(f"{file.name} is no zip that can be read ({first_line(error)}): {NEEDED}") from error
    for name, content in found.items():
        _check_size(name, len(content))
        (folder / name).write_bytes(content)


def _check_directory(file: Path) -> None:
    """Raise ValueError if the directory of a zip file is large: `zipfile` reads all its entries when it opens the file."""
    size = check_bounded(file, None)
    with file.open("rb") as content:
        content.seek(max(0, size - LONGEST_END))
        end = content.read(LONGEST_END)
    place = end.rfind(b"PK\5\6")
    if place < 0 or len(end) - place < SHORTEST_END:
        raise ValueError("it has no directory")
    length = int.from_bytes(end[place + 12 : place + 16], "little")
    if length > MAX_DIRECTORY_BYTES or end[:place][-20:].startswith(b"PK\6\7"):  # the place of a directory of 64 bits
        raise ValueError(f"its directory has more than {MAX_DIRECTORY_BYTES:,} bytes")


def _unpacked(file: Path) -> dict[str, bytes]:
    """The contents of an adapter's files in a zip file, by name, each up to one byte more than is accepted."""
    found = {}
    with zipfile.ZipFile(file) as archive:
        entries = {PurePosixPath(entry.filename): entry for entry in archive.infolist()}
        root = min((path.parent for path in entries if path.name == CONFIG_FILE), key=lambda p: len(p.parts), default=None)
        for name, limit in ADAPTER_FILES.items():
            entry = entries.get(root / name) if root is not None else None
            if entry is None:
                continue
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others may ask for gigabytes
                raise ValueError(f"{name} is compressed in another way than by deflating")
            with archive.open(entry) as packed:
                found[name] = packed.read(limit + 1)  # the size that the entry states may be wrong
    return found


def _check_size(name: str, size: int) -> None:
    if size > ADAPTER_FILES[name]:
        raise ValueError(f"{name} has {size:,} bytes, more than {ADAPTER_FILES[name]:,}")


def forget(paths: Iterable[str | Path] | None) -> None:
    """Remove uploaded files and their folders if these are then empty."""
    for path in map(Path, paths or ()):
        path.unlink(missing_ok=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
