"""Every way from an image file to a model gives the same pixels, for every mode of Pillow, and refuses the same files."""

from __future__ import annotations

import contextlib
import gc
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from PIL import ImageCms
from support.paths import EXAMPLES


sys.path.insert(0, str(EXAMPLES))
sys.path.insert(0, str(EXAMPLES / "space"))

import uploads

from cl_prompts.continual import ClassIncrementalStream, IterableClassIncrementalStream, JointStream, Stream
from cl_prompts.runs.images import ToTensor
from cl_prompts.runtime.images import MAX_PIXELS, array_to_rgb, pil_to_rgb, read_rgb
from cl_prompts.sharing.images import rgb_image


pytestmark = pytest.mark.by_turns(3)


FEATURES = Features({"image": Image(), "label": ClassLabel(names=["owl"])})
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
RGB = PILImage.fromarray(PIXELS)
GRAY = RGB.convert("L")
DEEP = PILImage.fromarray(np.asarray(GRAY).astype(np.uint16) * 257)
GRAY_PIXELS = np.repeat(np.asarray(GRAY)[:, :, None], 3, 2)


def as_tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def tensor_as_tensor(image: torch.Tensor) -> torch.Tensor:
    return image.float()


class Opened:
    """Rows by number whose images are opened by their owner."""

    def __init__(self, open_image: Callable[[], PILImage.Image]) -> None:
        self.open_image = open_image

    def __getitem__(self, key: Any) -> Any:
        return [0] if key == "label" else {"image": self.open_image()}


class Same:
    """An image processor that changes nothing."""

    def __call__(self, image: PILImage.Image, **options: Any) -> dict[str, Any]:
        return {"pixel_values": [as_tensor(image)]}


def rows(cell: Any, mode: str | None = None) -> Dataset:
    features = Features({"image": Image(mode=mode), "label": FEATURES["label"]})
    return Dataset.from_dict({"image": [cell], "label": [0]}, features=features)


def shown(stream: Stream) -> np.ndarray:
    """The pixels of the stream's only image, as the model sees them."""
    (batch,) = stream.train_batches(stream.tasks[0], 1, seed=0, epoch=0)
    pixels: np.ndarray = batch["pixel_values"][0].permute(1, 2, 0).numpy().astype(np.uint8)
    return pixels


def trained(data: Any, transform: Callable[[Any], torch.Tensor] = as_tensor) -> np.ndarray:
    return shown(ClassIncrementalStream(data, data, [[0]], transform))


def streamed(file: Path) -> np.ndarray:
    source = rows(str(file)).to_iterable_dataset()
    return shown(IterableClassIncrementalStream(source, source, [[0]], as_tensor))


def uploaded(file: Path) -> np.ndarray:
    images, problems = uploads.take_images([file])
    if problems:
        raise ValueError(problems[0])
    return np.asarray(images[file.name])


OF_FILES: dict[str, Callable[[Path], Any]] = {
    "training, files": lambda file: trained(rows(str(file))),
    "training, contents": lambda file: trained(rows({"bytes": file.read_bytes(), "path": None})),
    "training, declared RGB": lambda file: trained(rows(str(file), "RGB")),
    "training, format torch": lambda file: trained(rows(str(file)).with_format("torch"), tensor_as_tensor),
    "training, format numpy": lambda file: trained(rows(str(file)).with_format("numpy")),
    "training, streamed": streamed,
    "pipeline and command": lambda file: np.asarray(rgb_image(file)),
    "page": uploaded,
}
OF_IMAGES: dict[str, Callable[[Callable[[], PILImage.Image]], Any]] = {
    "training, PIL images": lambda make: trained(Opened(make)),
    "transform of the examples": lambda make: ToTensor(Same())(make()).permute(1, 2, 0).numpy(),
    "pipeline": lambda make: np.asarray(rgb_image(make())),
}


def encoded(image: PILImage.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned() -> bytes:
    exif = PILImage.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    return encoded(RGB.transpose(PILImage.Transpose.ROTATE_90), "PNG", exif=exif)


def lab() -> PILImage.Image:
    image = ImageCms.profileToProfile(RGB, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    assert image is not None
    return image


def deep_tiff(order: str, bits: int, values: bytes) -> bytes:
    """A gray TIFF file of 4x5 pixels; `order` is "<" or ">"."""
    entries = {256: 4, 257: 5, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: 5, 279: len(values)}
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    directory = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in entries.items())
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return head + struct.pack(order + "H", len(entries)) + directory + struct.pack(order + "I", 0) + values


def in_12_bits() -> bytes:
    """Two pixels in three bytes, 0 and 4095 in turn, as `BLACK_AND_WHITE`."""
    return deep_tiff("<", 12, b"\x00\x0f\xff" * 10)


BLACK_AND_WHITE = np.tile(np.array([0, 255], np.uint8)[None, :, None], (5, 2, 3))
PALETTE = RGB.quantize(16)
PALETTE_PIXELS = np.asarray(PALETTE.convert("RGB"))
BIG = np.asarray(DEEP).astype(">u2").tobytes()

# Content of a file, and the pixels that it stands for; None: what Pillow's own conversion to RGB makes.
FILES: dict[str, tuple[Callable[[], bytes], np.ndarray | None]] = {
    "1": (lambda: encoded(RGB.convert("1"), "PNG"), None),
    "L": (lambda: encoded(GRAY, "PNG"), GRAY_PIXELS),
    "LA": (lambda: encoded(GRAY.convert("LA"), "PNG"), GRAY_PIXELS),
    "P": (lambda: encoded(PALETTE, "PNG"), PALETTE_PIXELS),
    "P transparent": (lambda: encoded(PALETTE, "PNG", transparency=bytes(range(16))), PALETTE_PIXELS),
    "RGB": (lambda: encoded(RGB, "PNG"), PIXELS),
    "RGBA": (lambda: encoded(RGB.convert("RGBA"), "PNG"), PIXELS),
    "BMP": (lambda: encoded(RGB, "BMP"), PIXELS),
    "WebP": (lambda: encoded(RGB, "WEBP", lossless=True), PIXELS),
    "CMYK": (lambda: encoded(RGB.convert("CMYK"), "TIFF"), None),
    "CMYK JPEG": (lambda: encoded(RGB.convert("CMYK"), "JPEG"), None),
    "YCbCr": (lambda: encoded(RGB, "JPEG"), None),
    "LAB": (lambda: encoded(lab(), "TIFF"), None),
    "16 bits": (lambda: encoded(DEEP, "PNG"), GRAY_PIXELS),
    "16 bits, TIFF": (lambda: encoded(DEEP, "TIFF"), GRAY_PIXELS),
    "16 bits, big-endian": (lambda: deep_tiff(">", 16, BIG), GRAY_PIXELS),
    "16 bits, PGM": (lambda: b"P5\n4 5\n65535\n" + BIG, GRAY_PIXELS),
    "12 bits": (in_12_bits, BLACK_AND_WHITE),
    "animated": (lambda: encoded(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]), PALETTE_PIXELS),
    "turned": (turned, PIXELS),
    "color profile": (
        lambda: encoded(RGB, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()),
        PIXELS,
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_has_the_same_pixels_everywhere(case: str, tmp_path: Path) -> None:
    content, expected = FILES[case]
    file = tmp_path / "image"
    file.write_bytes(content())
    if expected is None:
        with PILImage.open(file) as opened:
            expected = np.asarray(opened.convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for name, look in OF_FILES.items():
            assert np.array_equal(look(file), expected), name
        for name, look_at in OF_IMAGES.items():
            assert np.array_equal(look_at(lambda: PILImage.open(BytesIO(file.read_bytes()))), expected), name


IMAGES: dict[str, tuple[Callable[[], PILImage.Image], np.ndarray]] = {
    "PA": (lambda: PALETTE.convert("PA"), PALETTE_PIXELS),
    "RGBX": (lambda: RGB.convert("RGBX"), PIXELS),
    "RGBa": (lambda: RGB.convert("RGBA").convert("RGBa"), PIXELS),
    "La": (lambda: GRAY.convert("LA").convert("La"), GRAY_PIXELS),
    "HSV": (lambda: RGB.convert("HSV"), np.asarray(RGB.convert("HSV").convert("RGB"))),
    "YCbCr": (lambda: RGB.convert("YCbCr"), np.asarray(RGB.convert("YCbCr").convert("RGB"))),
    "I;16": (lambda: DEEP, GRAY_PIXELS),
    "I;16B": (lambda: PILImage.frombytes("I;16B", DEEP.size, BIG), GRAY_PIXELS),
    "I;16L": (lambda: PILImage.frombytes("I;16L", DEEP.size, DEEP.tobytes()), GRAY_PIXELS),
    "I;16N": (lambda: PILImage.frombytes("I;16N", DEEP.size, np.asarray(DEEP).tobytes()), GRAY_PIXELS),
}


@pytest.mark.parametrize("mode", IMAGES)
def test_an_image_in_memory_has_the_same_pixels_everywhere(mode: str) -> None:
    make, expected = IMAGES[mode]
    for name, look in OF_IMAGES.items():
        assert np.array_equal(look(make), expected), name


def test_a_column_declared_gray_stays_gray() -> None:
    data = rows({"bytes": encoded(RGB, "PNG"), "path": None}, mode="L")
    assert np.array_equal(trained(data), GRAY_PIXELS)


def test_a_picture_turned_once_is_not_turned_again() -> None:
    once = read_rgb(turned())
    assert rgb_image(once) is once


def png_of(width: int, height: int) -> bytes:
    """A gray PNG file of few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(ran) print\n%%EOF\n"
REFUSED: dict[str, tuple[bytes, str]] = {
    "32-bit integers": (encoded(PILImage.new("I", (4, 5), 9), "TIFF"), "32-bit integer pixels, whose range is unknown"),
    "floats": (encoded(PILImage.new("F", (4, 5), 0.5), "TIFF"), "floating-point pixels, whose range is unknown"),
    "EPS": (EPS, "it is no JPEG, PNG|EPS files are refused"),
    "bomb": (png_of(16384, 15000), r"16384x15000 pixels, more than \d|exceeds limit"),
    "elongated": (png_of(2, 201), "2x201 pixels, one side more than 100 times the other: cut it into pieces"),
    "truncated": (encoded(RGB, "PNG")[:60], "truncated|cannot be read"),
    "no image": (b"no image", "it is no JPEG, PNG"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_is_refused_everywhere(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS file starts no Ghostscript, and the size of a picture is known before it is decoded."""
    content, why = REFUSED[case]
    file, started = tmp_path / "holiday.jpg", tmp_path / "started"
    file.write_bytes(content)
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # Pillow looks for it once
    for name, look in OF_FILES.items():
        with pytest.raises(ValueError, match=why) as error:
            look(file)
        assert len(str(error.value).splitlines()) == 1, name
    if case in ("32-bit integers", "floats", "EPS"):
        for look_at in OF_IMAGES.values():
            with pytest.raises(ValueError, match=why):
                look_at(lambda: PILImage.open(BytesIO(file.read_bytes())))
    assert not started.exists()


def test_a_damaged_picture_is_not_kept_in_memory() -> None:
    """An error raised from itself held hundreds of megabytes until the garbage collector ran."""
    content = encoded(RGB.resize((400, 400)), "PNG")
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            read_rgb(content[: len(content) // 2])
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_the_largest_number_of_pixels_is_a_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(encoded(RGB, "PNG"))
    data = rows(str(tmp_path / "a.png"))
    stream = ClassIncrementalStream(data, data, [[0]], as_tensor)
    assert stream.max_pixels == MAX_PIXELS == 50_000_000
    stream.max_pixels = 19
    for small in (stream, JointStream(stream)):
        with pytest.raises(ValueError, match=r"row 0, file .*4x5 pixels, more than 19 .max_pixels.: scale it down"):
            shown(small)
    stream.max_pixels = 20
    assert shown(stream).shape == (5, 4, 3)
    for source in (tmp_path / "a.png", RGB, PIXELS):
        with pytest.raises(ValueError, match="4x5 pixels, more than 19"):
            rgb_image(source, max_pixels=19)
    (tmp_path / "a.webp").write_bytes(encoded(RGB, "WEBP"))
    (tmp_path / "a.jpg").write_bytes(encoded(RGB.convert("CMYK"), "JPEG", progressive=True))
    for name in ("a.webp", "a.jpg"):
        with pytest.raises(ValueError, match="4x5 pixels, more than 19"):
            rgb_image(tmp_path / name, max_pixels=39)  # half as many, for the memory of its decoder
        assert rgb_image(tmp_path / name, max_pixels=40).size == (4, 5)
    monkeypatch.setattr("cl_prompts.runtime.images.LARGE", 10)  # the JPEG is decoded at half its size
    monkeypatch.setattr("cl_prompts.runtime.images.SHORTEST_SIDE", 1)
    with pytest.raises(ValueError, match="4x5 pixels, more than 19"):
        rgb_image(tmp_path / "a.jpg", max_pixels=39)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "array"])
def test_a_very_large_picture_is_reduced(kind: str) -> None:
    """As by averaging; a JPEG is not decoded at its full size."""
    ramp = np.linspace(0, 255, 4099, dtype=np.uint8)
    gray = np.broadcast_to(ramp[:, None, None], (4099, 4100, 3))
    image = PILImage.fromarray(gray)
    found = array_to_rgb(gray) if kind == "array" else read_rgb(encoded(image, kind))
    assert found.size == (2050, 2050)
    middle = np.asarray(found)[:-1, 1000, 0].astype(int)
    assert np.abs(middle - ramp[:-1].reshape(-1, 2).mean(1)).max() <= 1
    assert pil_to_rgb(found) is found


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((4096, 4096), (4096, 4096)),
        ((4097, 4096), (2049, 2048)),
        ((9000, 2048), (4500, 1024)),
        ((9000, 2047), (4500, 1024)),
        ((36_000, 500), (36_000, 500)),
        ((5000, 60), (5000, 60)),
    ],
)
def test_an_image_keeps_256_pixels_a_side(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert pil_to_rgb(PILImage.new("L", size)).size == expected
