"""Make the page's photographs: balls, boxes and rings on a table, computed by following rays of light.

    python examples/space/make_photographs.py

Nobody photographed them, so they are free of rights. Each has its own camera, light, colors and noise.
`samples/photographs` has six to classify, `samples/teach-photograph` ten others to teach.
"""

import shutil
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image


SAMPLES = Path(__file__).resolve().parent / "samples"
SIZE = 112  # pixels
STEPS, NEAR, FAR = 60, 1e-3, 12.0  # of a ray
FOLDERS = {"photographs": 6, "teach-photograph": 10}  # of the samples, with the number of pictures

Array = np.ndarray
Distance = Callable[[Array], Array]  # of points [..., 3] to a surface


def ball(points: Array) -> Array:
    """A ball of radius 0.8 on the table."""
    return np.linalg.norm(points - (0, 0, 0.8), axis=-1) - 0.8


def box(points: Array) -> Array:
    """A box with edges of 1.4, 1 and 1.2."""
    outside = np.abs(points - (0, 0, 0.6)) - (0.7, 0.5, 0.6)
    return np.linalg.norm(np.maximum(outside, 0), axis=-1) + np.minimum(outside.max(-1), 0)


def ring(points: Array) -> Array:
    """A thick ring that stands on the table."""
    x, y, z = np.moveaxis(points - (0, 0, 0.95), -1, 0)
    return np.hypot(np.hypot(x, z) - 0.7, y) - 0.25


THINGS: dict[str, Distance] = {"ball": ball, "box": box, "ring": ring}


def photograph(thing: Distance, random: np.random.Generator) -> Image.Image:
    """One thing, seen from a random place."""
    turn, angle = random.uniform(0, 2 * np.pi, 2)
    eye = np.array((*(random.uniform(3.6, 4.6) * np.array((np.cos(turn), np.sin(turn)))), random.uniform(1.6, 2.8)))
    light = np.array((np.cos(angle), np.sin(angle), random.uniform(1, 1.8)))
    light /= np.linalg.norm(light)
    color, table = random.uniform(0.25, 1, 3), random.uniform(0.35, 0.8, 3)
    rays = looking(eye, np.array((*random.uniform(-0.15, 0.15, 2), 0.7)))

    def scene(points: Array) -> Array:
        return np.minimum(thing(points), points[..., 2])

    points = eye + rays * followed(scene, np.broadcast_to(eye, rays.shape), rays)[..., None]
    normal = slope(scene, points)
    on_thing = thing(points) < points[..., 2]
    grain = 0.05 * np.sin(4 * points[..., 0] + 2 * np.sin(2 * points[..., 1]))  # of the table's wood
    surface = np.where(on_thing[..., None], color, table + grain[..., None])
    lit = followed(scene, points + 0.02 * normal, np.broadcast_to(light, rays.shape)) > FAR / 2
    diffuse = np.clip(normal @ light, 0, 1) * lit
    shine = np.clip(2 * (normal @ light)[..., None] * normal - light, -1, 1)
    gloss = 0.5 * on_thing * lit * np.clip(-(shine * rays).sum(-1), 0, 1) ** 20
    picture = surface * (0.3 + 0.7 * diffuse)[..., None] + gloss[..., None]
    picture += random.normal(0, 0.015, picture.shape)
    return Image.fromarray((255 * np.clip(picture, 0, 1) ** (1 / 1.6)).astype(np.uint8))


def looking(eye: Array, at: Array) -> Array:
    """Unit directions [SIZE, SIZE, 3] from the eye through the pixels of a picture with a point in its middle."""
    forward = (at - eye) / np.linalg.norm(at - eye)
    right = np.cross(forward, (0, 0, 1))
    right /= np.linalg.norm(right)
    across = np.linspace(-0.36, 0.36, SIZE)
    rays = forward + across[None, :, None] * right - across[:, None, None] * np.cross(right, forward)
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


def followed(scene: Distance, start: Array, rays: Array) -> Array:
    """How far each ray goes until it meets a surface, at most about `FAR`: steps as long as the distance to the nearest."""
    way = np.zeros(rays.shape[:-1])
    for _ in range(STEPS):
        left = scene(start + way[..., None] * rays)
        way += np.where((left > NEAR) & (way < FAR), left, 0)
    return way


def slope(scene: Distance, points: Array) -> Array:
    """The surface's unit normals: where the distance grows."""
    steps = 1e-3 * np.eye(3)
    normal = np.stack([scene(points + step) - scene(points - step) for step in steps], -1)
    return normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)


def main() -> None:
    """Write the photographs."""
    random = np.random.default_rng(0)
    for folder, count in FOLDERS.items():
        shutil.rmtree(SAMPLES / folder, ignore_errors=True)
        (SAMPLES / folder).mkdir(parents=True)
        for number, name in zip(range(count), cycle(THINGS)):
            photograph(THINGS[name], random).save(SAMPLES / folder / f"{name}-{number}.jpg", quality=85)


if __name__ == "__main__":
    main()
