"""Pools and pictures for the tests of examples/space."""

import opening
import torch
import uploads
from PIL import Image
from transformers import ViTImageProcessor

from cl_prompts import (
    PromptPoolConfig,
    PromptPoolPipeline,
    get_prompt_pool_model,
)
from support.adapters import learn
from support.families import build


HOSTILE = '<img src=x onerror="alert(1)">${alert(2)}'


def samples(folder: str) -> dict[str, Image.Image]:
    images, problems = uploads.take_images(sorted((opening.HERE / "samples" / folder).iterdir()))
    assert not problems
    return images


def logits(pool: opening.OpenPool) -> torch.Tensor:
    pixels = [
        pool.pipe.image_processor(images=image, return_tensors="pt")["pixel_values"] for image in samples("digits").values()
    ]
    with torch.no_grad():
        found: torch.Tensor = pool.model.eval()(pixel_values=torch.cat(pixels)).logits
    return found


def tiny(config: PromptPoolConfig, tasks: tuple[list[int], ...] = ([7, 3], [1, 5])) -> opening.OpenPool:
    """A pool on the tiny ViT of the tests."""
    torch.manual_seed(0)
    model = get_prompt_pool_model(build("vit"), config)
    for seed, task in enumerate(tasks):
        learn(model, task, seed=seed)
    pipe = PromptPoolPipeline(model.eval(), ViTImageProcessor(size={"height": 32, "width": 32}))
    facts = {"tasks": [[{"id": c, "name": None} for c in task] for task in tasks]}
    return opening.OpenPool("tiny", pipe, facts)
