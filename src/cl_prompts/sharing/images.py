"""Images in any form as 8-bit RGB: files, URLs, PIL images, arrays and tensors.

transformers' `load_image` is not used: it makes 16-bit gray images white, takes any text that names no file for base64,
and ignores the status of a web server's answer.
"""

from __future__ import annotations

import os
from io import BytesIO
from typing import TypeAlias

import numpy as np
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


ImageSource: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor

CHANNELS = (1, 3, 4)
MAX_DOWNLOAD_BYTES = 64 * 2**20
TIMEOUT = 20.0  # seconds without a byte


def rgb_image(source: ImageSource) -> Image.Image:
    """An image as 8-bit RGB, upright.

    Args:
        source: one of

            - a path, or a URL with http or https (at most 64 MiB);
            - a PIL image of any mode;
            - a numpy array [height, width] or [height, width, channels], or a torch tensor [height, width] or
              [channels, height, width], with 1 (gray), 3 (RGB) or 4 (RGBA) channels; uint8, uint16, or floating in [0, 1],
              which is rounded to 8 bits.

            EXIF orientation is applied, 16 bits are scaled to 8, and alpha is dropped, as in training images that
            `convert("RGB")` made. Of several frames the first is taken.

    Raises:
        ValueError: the image cannot be found, read or understood; the message names the file and what to do.
        TypeError: `source` is none of these.
    """
    if isinstance(source, Image.Image):
        return _from_pil(source, getattr(source, "filename", "") or f"the PIL image {source.mode} {source.size}")
    if isinstance(source, np.ndarray):
        return _from_array(source, "numpy array", "[height, width] or [height, width, channels]", source.shape)
    if isinstance(source, Tensor):
        values = source.detach().float() if source.is_floating_point() else source
        array = (values.movedim(0, -1) if values.dim() == 3 else values).cpu().numpy()
        return _from_array(array, "tensor", "[height, width] or [channels, height, width]", source.shape)
    if isinstance(source, (str, os.PathLike)):
        return _from_file(os.fspath(source))
    raise TypeError(f"an image is a path, a URL, a PIL image, an array or a tensor, got {type(source).__name__}")


def _from_file(name: str) -> Image.Image:
    if name.startswith(("http://", "https://")):
        content: str | BytesIO = BytesIO(_download(name))
    elif os.path.isdir(name):
        raise ValueError(f"{name} is a folder: name the images in it")
    elif not os.path.isfile(name):
        raise ValueError(f"there is no file {name}: check the path")
    else:
        content = name
    try:
        image = Image.open(content)
    except Exception as error:
        raise _unreadable(name, error) from error
    with image:
        return _from_pil(image, name)


def _download(url: str) -> bytes:
    content = bytearray()
    try:
        with httpx.stream("GET", url, timeout=TIMEOUT, follow_redirects=True) as response:
            response.raise_for_status()
            for part in response.iter_bytes():
                content += part
                if len(content) > MAX_DOWNLOAD_BYTES:
                    raise ValueError(f"{url} has more than {MAX_DOWNLOAD_BYTES:,} bytes: fetch it yourself if it is right")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{url} cannot be fetched ({reason}): check the address and the network") from error
    return bytes(content)


def _from_pil(image: Image.Image, name: str) -> Image.Image:
    # PIL keeps pixels on disk until they are needed, and on damaged files its readers raise anything: OSError, ValueError,
    # SyntaxError, struct.error, IndexError, DecompressionBombError.
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "I" or upright.mode.startswith("I;16"):
            upright = _from_16_bits(np.asarray(upright))
        elif upright.mode == "F":
            raise ValueError("floating pixels, whose range is unknown")
        if upright.mode == "P":
            upright = upright.convert("RGBA")  # in one step PIL warns of transparency by color
        upright = upright.convert("RGB")
    except Exception as error:
        raise _unreadable(name, error) from error
    if 0 in upright.size:
        raise ValueError(f"{name} is {upright.size[0]}x{upright.size[1]} pixels: there is nothing to see")
    return upright


def _from_16_bits(pixels: np.ndarray) -> Image.Image:
    # 16-bit PGM files are opened as 32-bit integers.
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("32-bit pixels, whose range is unknown")
    return Image.fromarray(np.rint(pixels / 257).astype(np.uint8))


def _from_array(array: np.ndarray, what: str, layout: str, shape: tuple[int, ...]) -> Image.Image:
    described = f"the {what} {array.dtype}{list(shape)}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in CHANNELS):
        raise ValueError(f"{described} is no image: give {layout} with 1, 3 or 4 channels; several images as a list")
    if not array.size:
        raise ValueError(f"{described} has no pixels: there is nothing to see")
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # NaN is neither
            raise ValueError(
                f"{described} has values outside [0, 1]: divide by 255, or cast to uint8, if they are in [0, 255]; "
                "normalized pixels go to model(pixel_values=...)"
            )
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    elif array.dtype == np.uint16:
        array = np.rint(array / 257).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"{described} has pixels of unknown range: cast it to uint8 [0, 255], or to floats in [0, 1]")
    pixels = array[:, :, None] if array.ndim == 2 else array[:, :, :3]
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))))


def _unreadable(name: str, error: Exception) -> ValueError:
    said = (str(error) or type(error).__name__).splitlines()[0]
    reason = "no format that PIL knows" if isinstance(error, UnidentifiedImageError) else said
    return ValueError(f"{name} cannot be read as an image ({reason}): convert it to 8-bit PNG or JPEG, or fetch it again")
