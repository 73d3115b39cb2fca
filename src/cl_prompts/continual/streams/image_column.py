"""The image column of a data set: from cells to 8-bit RGB, by the rule of `cl_prompts.runtime.images`.

The decoder of `datasets` is not used: it makes 16-bit gray images white, and opens every format of Pillow at any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, DownloadConfig, Image
from datasets.download.streaming_download_manager import xopen
from datasets.utils.file_utils import is_local_path

from cl_prompts.runtime.images import MAX_BYTES, UnreadableImage, pil_to_rgb, read_rgb
from cl_prompts.runtime.text import first_line
from cl_prompts.runtime.time_limit import call_within


MAX_SECONDS = 60.0  # of the download of an image
GRAY = ("1", "L", "LA")  # modes of an `Image` feature that are respected


class ImageColumn:
    """Images of a data set by row number, as 8-bit RGB.

    Args:
        data: data set that gives rows by number. The files of an `Image` column are read here, also under the formats
            "numpy" and "torch". Another format or transform of a `datasets.Dataset` decodes them itself.
        name: name of the column.

    Attributes:
        source: `data` as given.
        files: data set whose column `name` has the files of the images; None: the rows have other values than files.
    """

    def __init__(self, data: Any, name: str) -> None:
        self.source, self.name = data, name
        self.mode: str | None = None
        self.format: str | None = None
        self.files: Dataset | None = None
        if isinstance(data, Dataset) and isinstance(data.features.get(name), Image):
            self.mode = data.features[name].mode
            kind, formatted = data.format["type"], data.format["columns"]
            if kind in (None, "numpy", "torch"):
                self.format = kind if name in formatted else None
                self.files = data.with_format(None).select_columns([name]).cast_column(name, Image(decode=False))
        self.data = data if self.files is None else self.files

    def read(self, row: int, max_pixels: int) -> Any:
        """The image of a row: a PIL image in mode RGB, or the array or tensor that the data set gives.

        Args:
            row: row number.
            max_pixels: largest number of pixels of an image.

        Raises:
            UnreadableImage: there is none, it is too large, or it cannot be decoded.
        """
        try:
            cell = self.data[row][self.name]
        except UnreadableImage:
            raise
        except Exception as error:  # decoders raise nearly every kind of exception for broken files
            raise UnreadableImage(f"{type(error).__name__}: {error}") from error
        image = decode_cell(cell, self.mode, max_pixels)
        if self.format is None:
            return image
        pixels = np.array(image)
        return pixels if self.format == "numpy" else torch.from_numpy(pixels).permute(2, 0, 1)

    def file_note(self, row: int) -> str:
        """The text ", file PATH," for a row whose data set stores the path of the image file, else ""."""
        cell = None if self.files is None else self.files[row][self.name]
        return f", file {cell['path']}," if cell and cell["path"] else ""


def decode_cell(cell: Any, mode: str | None, max_pixels: int) -> Any:
    """The image of a cell as a PIL image in mode RGB. Arrays, tensors and other values are returned as they are.

    Args:
        cell: {"bytes", "path"}, the content of a file, a PIL image, or another value.
        mode: `mode` of the column's `Image` feature. Gray ones make the image gray, others are not needed.
        max_pixels: largest number of pixels of an image.

    Raises:
        UnreadableImage: the cell is empty, or the image is too large or cannot be decoded.
    """
    path = None
    if isinstance(cell, Mapping):
        cell, path = cell.get("bytes"), cell.get("path")
    if cell is None and path is None:
        raise UnreadableImage("the cell is empty")
    if isinstance(cell, PIL.Image.Image):
        image = pil_to_rgb(cell, max_pixels)
    elif isinstance(cell, bytes):
        image = read_rgb(cell, max_pixels)
    elif path is not None:
        image = read_rgb(path if is_local_path(path) else _remote(path), max_pixels)
    else:
        return cell
    return image.convert(mode).convert("RGB") if mode in GRAY else image


def _remote(path: str) -> bytes:
    """The content of a file that a data set reads over the network, or from an archive."""
    try:
        content = call_within(MAX_SECONDS, partial(_fetch, path))
    except Exception as error:  # of any file system
        reason = f"takes more than {MAX_SECONDS:g} seconds" if isinstance(error, TimeoutError) else first_line(error)
        raise UnreadableImage(f"{path}: {reason}") from error
    if len(content) > MAX_BYTES:
        raise UnreadableImage(f"{path} has more than {MAX_BYTES:,} bytes")
    return content


def _fetch(path: str) -> bytes:
    with xopen(path, "rb", download_config=DownloadConfig()) as file:
        content: bytes = file.read(MAX_BYTES + 1)
    return content
