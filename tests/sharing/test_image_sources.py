"""Images from files, URLs and memory as RGB."""

import contextlib
import http.server
import re
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.photos import array, picture

from cl_prompts.sharing.images import rgb_image


def test_every_form_of_one_picture(tmp_path: Path) -> None:
    image, pixels = picture(), array()
    image.save(tmp_path / "a.png")
    palette = image.quantize(256)
    forms: dict[str, Any] = {
        "path": tmp_path / "a.png",
        "text": str(tmp_path / "a.png"),
        "PIL": image,
        "RGBA": image.convert("RGBA"),
        "numpy": pixels,
        "numpy RGBA": np.asarray(image.convert("RGBA")),
        "float": pixels / 255,
        "half": (pixels / 255).astype(np.float32),
        "16 bits": pixels.astype(np.uint16) * 257,
        "tensor": torch.tensor(pixels).permute(2, 0, 1),
        "float tensor": torch.tensor(pixels / 255).permute(2, 0, 1).requires_grad_(),
        "reversed": np.ascontiguousarray(pixels[::-1])[::-1],
    }
    for name, form in forms.items():
        found = rgb_image(form)
        assert found.mode == "RGB", name
        assert np.array_equal(np.asarray(found), pixels), name
    assert np.array_equal(np.asarray(rgb_image(palette)), np.asarray(palette.convert("RGB")))
    rounded = rgb_image(torch.tensor(pixels / 255, dtype=torch.bfloat16).permute(2, 0, 1))
    assert np.abs(np.asarray(rounded).astype(int) - pixels).max() <= 1
    assert rgb_image(np.full((2, 2), 0.999)).getpixel((0, 0)) == (255, 255, 255)
    palette.save(tmp_path / "p.png", transparency=bytes(range(256)))  # PIL warns of it where it is converted in one step
    assert np.array_equal(np.asarray(rgb_image(tmp_path / "p.png")), np.asarray(palette.convert("RGB")))


def test_grey_images_of_8_and_16_bits(tmp_path: Path) -> None:
    grey = np.asarray(picture().convert("L"))
    expected = np.repeat(grey[:, :, None], 3, 2)
    deep = grey.astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tiff")
    Image.fromarray(deep).save(tmp_path / "deep.pgm", "PPM")
    forms = [grey, grey[:, :, None], Image.fromarray(grey), deep, torch.tensor(grey), torch.tensor(grey)[None]]
    for form in [*forms, *(tmp_path / f"deep.{kind}" for kind in ("png", "tiff", "pgm"))]:
        assert np.array_equal(np.asarray(rgb_image(form)), expected), form


def test_orientation_is_that_of_the_camera(tmp_path: Path) -> None:
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(np.asarray(rgb_image(tmp_path / "turned.png")), expected)
    with Image.open(tmp_path / "turned.png") as opened:
        assert np.array_equal(np.asarray(rgb_image(opened)), expected)


def test_damaged_files_of_every_kind(tmp_path: Path) -> None:
    """Whatever PIL's readers raise becomes one error that names the file."""
    random = np.random.default_rng(0)
    file = tmp_path / "damaged"
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
        whole = BytesIO()
        picture().save(whole, kind)
        for _ in range(25):
            bytes_ = bytearray(whole.getvalue())
            for position in random.integers(0, min(len(bytes_), 400), 6):
                bytes_[position] = random.integers(256)
            file.write_bytes(bytes_[: random.integers(1, len(bytes_) + 1)])
            try:
                assert rgb_image(file).mode == "RGB"
            except ValueError as error:
                assert str(file) in str(error)  # noqa: PT017 - either outcome is right


class Server(http.server.BaseHTTPRequestHandler):
    """A picture, an error page, a redirect, more bytes than anybody wants, and answers that do not end."""

    def do_GET(self) -> None:
        if self.path.startswith("/slow"):
            return self._drip(b"HTTP/1.1 200 OK\r\n" + (b"" if self.path == "/slow-head" else b"\r\n"))
        whole = BytesIO()
        picture().save(whole, "PNG")
        answers = {"/picture.png": (200, whole.getvalue()), "/page": (200, b"<html>"), "/moved": (302, b"")}
        status, content = answers.get(self.path, (404, b"no such picture"))
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/picture.png")
        self.send_header("Content-Length", str(2**40 if self.path == "/cut" else len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _drip(self, start: bytes) -> None:
        """An answer of three seconds, a byte at a time."""
        self.close_connection = True
        with contextlib.suppress(OSError):  # nobody listens any more
            self.wfile.write(start)
            for _ in range(60):
                time.sleep(0.05)
                self.wfile.write(b"x")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


def test_urls(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert np.array_equal(np.asarray(rgb_image(f"{server}/picture.png")), array())
    assert np.array_equal(np.asarray(rgb_image(f"{server}/moved")), array())
    with pytest.raises(ValueError, match=re.escape(f"{server}/none cannot be fetched (Client error '404")):
        rgb_image(f"{server}/none")
    with pytest.raises(ValueError, match=re.escape(f"{server}/page cannot be read as an image")):
        rgb_image(f"{server}/page")
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/a.png cannot be fetched .*check the address and the network"):
        rgb_image("http://127.0.0.1:9/a.png")
    with pytest.raises(ValueError, match="cannot be fetched"):
        rgb_image("http://[")
    monkeypatch.setattr("cl_prompts.sharing.images.MAX_DOWNLOAD_BYTES", 100)
    with pytest.raises(ValueError, match=r"picture\.png has more than 100 bytes"):
        rgb_image(f"{server}/picture.png")


@pytest.mark.parametrize("path", ["slow-head", "slow-body"])
def test_a_download_as_a_whole_has_a_time_limit(path: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sends a byte now and then reaches no timeout of a socket."""
    monkeypatch.setattr("cl_prompts.sharing.images.MAX_SECONDS", 0.2)
    monkeypatch.setattr("cl_prompts.sharing.images.TIMEOUT", 1.0)
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"{path} takes more than 0\.2 seconds: fetch it yourself"):
        rgb_image(f"{server}/{path}")
    assert time.monotonic() - start < 2
