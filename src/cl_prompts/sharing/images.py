"""Images in any form as 8-bit RGB: files, URLs, PIL images, arrays and tensors.

The rule for the pixels is that of `cl_prompts.runtime.images`, which training uses too. transformers' `load_image` is not
used: it makes 16-bit gray images white, takes any text that names no file for base64, opens every format of Pillow, and
ignores the status of a web server's answer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np
from huggingface_hub.utils import httpx
from PIL import Image
from torch import Tensor

from cl_prompts.runtime.images import LAYOUT, MAX_PIXELS, UnreadableImage, array_to_rgb, pil_to_rgb, read_rgb
from cl_prompts.runtime.text import first_line
from cl_prompts.runtime.time_limit import call_within


ImageSource: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor

MAX_DOWNLOAD_BYTES = 64 * 2**20
MAX_SECONDS = 60.0  # of a download as a whole
TIMEOUT = 20.0  # seconds without a byte


def rgb_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image as 8-bit RGB, upright; the rule is in `cl_prompts.runtime.images`.

    Args:
        source: one of

            - a path, or a URL with http or https (at most 64 MiB in 60 seconds);
            - a PIL image of any mode;
            - a numpy array [height, width] or [height, width, channels], or a torch tensor [height, width] or
              [channels, height, width], with 1 (gray), 3 (RGB) or 4 (RGBA) channels; uint8, uint16, or floating in [0, 1],
              which is rounded to 8 bits.

        max_pixels: largest number of pixels, checked before they are decoded; half of it for WebP and progressive CMYK
            JPEG.

    Raises:
        ValueError: the image cannot be found, read or understood; the message names the file and what to do.
        TypeError: `source` is none of these.
    """
    if isinstance(source, (str, os.PathLike)):
        return _from_file(os.fspath(source), max_pixels)
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or f"the PIL image {source.mode} {source.size}"
        return _named(name, partial(pil_to_rgb, source, max_pixels))
    if isinstance(source, np.ndarray):
        array, kind, layout = source, "numpy array", LAYOUT
    elif isinstance(source, Tensor):
        values = source.detach().float() if source.is_floating_point() else source
        array = (values.movedim(0, -1) if values.dim() == 3 else values).cpu().numpy()
        kind, layout = "tensor", "[height, width] or [channels, height, width]"
    else:
        raise TypeError(f"an image is a path, a URL, a PIL image, an array or a tensor, got {type(source).__name__}")
    described = f"the {kind} {array.dtype}{list(source.shape)}"
    return _named(described, partial(array_to_rgb, array, max_pixels, layout))


def _from_file(name: str, max_pixels: int) -> Image.Image:
    mend = ": convert it to 8-bit PNG or JPEG, or fetch it again"
    if name.startswith(("http://", "https://")):
        return _named(name, partial(read_rgb, _download(name), max_pixels), mend)
    if os.path.isdir(name):
        raise ValueError(f"{name} is a folder: name the images in it")
    if not os.path.isfile(name):
        raise ValueError(f"there is no file {name}: check the path")
    return _named(name, partial(read_rgb, name, max_pixels), mend)


def _named(name: str, read: Callable[[], Image.Image], mend: str = "") -> Image.Image:
    try:
        return read()
    except UnreadableImage as error:
        raise ValueError(f"{name} cannot be read as an image ({error}){mend}") from error


def _download(url: str) -> bytes:
    deadline = time.monotonic() + MAX_SECONDS
    try:
        return call_within(MAX_SECONDS, partial(_fetch, url, deadline))
    except TimeoutError as error:
        raise ValueError(f"{url} takes more than {MAX_SECONDS:g} seconds: fetch it yourself if it is right") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{url} cannot be fetched ({first_line(error)}): check the address and the network") from error


def _fetch(url: str, deadline: float) -> bytes:
    content = bytearray()
    # Compressed content could unpack to any size: it is neither asked for nor unpacked.
    headers = {"Accept-Encoding": "identity"}
    with httpx.stream("GET", url, timeout=TIMEOUT, follow_redirects=True, headers=headers) as response:
        response.raise_for_status()
        for part in response.iter_raw():
            content += part
            if len(content) > MAX_DOWNLOAD_BYTES:
                raise ValueError(f"{url} has more than {MAX_DOWNLOAD_BYTES:,} bytes: fetch it yourself if it is right")
            if time.monotonic() > deadline:
                raise TimeoutError
    return bytes(content)
