"""From image files, PIL images and arrays to 8-bit RGB, by one rule in training and in prediction.

The rule for the pixels:

- The orientation in the EXIF data is applied. Of several frames the first is taken.
- Modes of 8 bits or less are converted as `PIL.Image.convert` does. Transparency and color profiles are ignored.
- 16-bit gray is scaled from [0, 65535] to [0, 255] (12-bit TIFF from [0, 4095]). Of 16-bit colors Pillow keeps the upper 8
  bits.
- 32-bit integers and floats are refused, since their range is unknown; PNG and PGM files that Pillow opens as 32-bit
  integers hold 16 bits.
- Images of more than 4096 * 4096 pixels are reduced to 1/2, 1/4 or 1/8, as far as both sides keep 256 pixels: JPEG files
  by their decoder, other images by averaging.

Only `FORMATS` are opened, whatever a file is called, because Pillow starts other programs for some formats (Ghostscript for
EPS). The size that a file declares is checked before its pixels are decoded. WebP files and progressive CMYK JPEG files may
have half as many pixels as others, because their decoders take more memory. One side is at most 100 times as long as the
other: image processors that scale the shorter side would make huge images of longer ones.
"""

from __future__ import annotations

import os
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from cl_prompts.runtime.memory import return_freed_memory
from cl_prompts.runtime.text import first_line


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 50_000_000
MAX_BYTES = 256 * 2**20  # of a file
LARGE = 4096**2  # pixels; larger images are reduced
SHORTEST_SIDE = 256  # pixels that a reduced image keeps
MAX_RATIO = 100  # of its sides
STRIP = 256  # rows; a multiple of 8
CHANNELS = (1, 3, 4)
LAYOUT = "[height, width] or [height, width, channels]"
ORIENTATION = 0x0112  # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE = 258  # TIFF tag


class UnreadableImage(ValueError):
    """An image that cannot be read; the message says why, without the name of the image."""


def read_rgb(file: str | os.PathLike[str] | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file as 8-bit RGB.

    Args:
        file: path, or the content of the file.
        max_pixels: largest number of pixels.

    Raises:
        UnreadableImage: the file is missing, damaged, too large or not of `FORMATS`, or its pixels have no known range.
    """
    if not isinstance(file, bytes):
        if not os.path.isfile(file):  # not a device or pipe either, which may have no end
            raise UnreadableImage("there is no such file")
        size = os.path.getsize(file)
        if size > MAX_BYTES:
            raise UnreadableImage(f"the file has {size:,} bytes, more than {MAX_BYTES:,} are refused")
    factor = 1
    try:
        with Image.open(BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            _check_pixels(image.size, _limit(image, max_pixels))  # before `draft`, which changes the size
            factor = _factor(image.size)
            image.draft(None, (image.width // factor, image.height // factor))  # only JPEG files follow it
            return pil_to_rgb(image, max_pixels)
    except UnreadableImage:
        raise  # not from itself: the cycle would keep the half-decoded image until the garbage collector runs
    except Exception as error:
        raise _unreadable(error) from error
    finally:
        if factor > 1:
            del image  # holds the decoded pixels
            return_freed_memory()


def pil_to_rgb(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A PIL image of any mode as 8-bit RGB; the same object if nothing has to be changed.

    Args:
        image: the image. If it is a file that is not decoded yet, the format has to be one of `FORMATS`.
        max_pixels: largest number of pixels.

    Raises:
        UnreadableImage: the image is damaged, empty or too large, its format is refused, or its pixels have no known range.
    """
    try:
        if image.format not in (None, "MPO", *FORMATS):  # MPO: JPEG files with several images
            raise UnreadableImage(f"{image.format} files are refused, known are {', '.join(FORMATS)}")
        _check_pixels(image.size, _limit(image, max_pixels))
        image.load()
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
        factor = _factor(image.size)
        highest = _highest(image)
        image = _converted(image, highest) if factor == 1 else _reduced(image, factor, highest)
        if turn is not None:
            image = image.transpose(turn)
            image.info = {}  # without the EXIF data, so that the image is not turned again
        return image
    except UnreadableImage:
        raise  # not from itself: the cycle would keep the half-decoded image until the garbage collector runs
    except Exception as error:
        raise _unreadable(error) from error


def _limit(image: Image.Image, max_pixels: int) -> int:
    """Half of `max_pixels` where decoding takes far more memory: WebP, and the coefficients of progressive CMYK JPEG."""
    costly = image.format == "WEBP" or (image.mode == "CMYK" and "progressive" in image.info)
    return max_pixels // 2 if costly else max_pixels


def _factor(size: tuple[int, int]) -> int:
    """The number by which the sides of an image are divided: 1, 2, 4 or 8."""
    factor = 1
    while factor < 8 and size[0] * size[1] > LARGE * factor**2 and min(size) >= 2 * factor * SHORTEST_SIDE:
        factor *= 2
    return factor


def _reduced(image: Image.Image, factor: int, highest: int) -> Image.Image:
    """A decoded image as RGB, reduced by averaging. Strips are converted one by one, which needs less memory."""
    width, height = image.size
    small = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    for top in range(0, height, STRIP):
        strip = image.crop((0, top, width, min(top + STRIP, height)))
        small.paste(_converted(strip, highest).reduce(factor), (0, top // factor))
    small.info = dict(image.info)
    return small


def _converted(image: Image.Image, highest: int) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray(_scaled(np.asarray(image), highest))
    elif image.mode == "La":
        image = image.convert("LA")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # in one step Pillow warns of the transparency
    return image if image.mode == "RGB" else image.convert("RGB")


def _highest(image: Image.Image) -> int:
    """The number that stands for white in the pixels of an image."""
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels, whose range is unknown: scale them to 8 bits")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise UnreadableImage("32-bit integer pixels, whose range is unknown: scale them to 8 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return 255
    tags: Any = getattr(image, "tag_v2", {})  # of TIFF files
    return int(2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1)


def array_to_rgb(array: np.ndarray, max_pixels: int = MAX_PIXELS, layout: str = LAYOUT) -> Image.Image:
    """An array as an 8-bit RGB image.

    Args:
        array: pixels [height, width] or [height, width, channels] with 1 (gray), 3 (RGB) or 4 (RGBA) channels; uint8,
            uint16, or floating in [0, 1], which is rounded to 8 bits.
        max_pixels: largest number of pixels.
        layout: the shapes that the caller takes, for the message about another shape.

    Raises:
        UnreadableImage: the array has another shape, type or range.
    """
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in CHANNELS):
        raise UnreadableImage(f"it is not {layout} with 1, 3 or 4 channels; give several images as a list")
    _check_pixels((array.shape[1], array.shape[0]), max_pixels)
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # NaN is neither
            raise UnreadableImage(
                "values outside [0, 1]: divide by 255, or cast to uint8, if they are in [0, 255]; normalized pixels go to "
                "model(pixel_values=...)"
            )
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    elif array.dtype == np.uint16:
        array = _scaled(array, 65535)
    elif array.dtype != np.uint8:
        raise UnreadableImage("pixels of unknown range: cast it to uint8 [0, 255], or to floats in [0, 1]")
    pixels = array[:, :, None] if array.ndim == 2 else array[:, :, :3]
    rgb = np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
    return pil_to_rgb(Image.fromarray(rgb), max_pixels)


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if not width * height:
        raise UnreadableImage(f"{width}x{height} pixels: there is nothing to see")
    if width * height > max_pixels:
        raise UnreadableImage(f"{width}x{height} pixels, more than {max_pixels:,} (max_pixels): scale it down")
    if max(size) > MAX_RATIO * min(size):
        raise UnreadableImage(
            f"{width}x{height} pixels, one side more than {MAX_RATIO} times the other: cut it into pieces"
        )


def _scaled(pixels: np.ndarray, highest: int) -> np.ndarray:
    """Integer pixels of [0, highest] in [0, 255], rounded."""
    table = np.rint(np.arange(highest + 1) * (255 / highest)).astype(np.uint8)
    return table[pixels]


def _unreadable(error: Exception) -> UnreadableImage:
    # On damaged files Pillow's readers raise anything: OSError, ValueError, SyntaxError, struct.error, IndexError.
    if isinstance(error, UnidentifiedImageError):
        return UnreadableImage(f"it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file")
    return UnreadableImage(first_line(error))
