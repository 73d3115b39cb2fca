"""What pages presuppose, `<!-- given: vit, stream -->`: a factory for each name, of something real and tiny.

A name that is a Python name stands in the page's code from then on; one that is a file or a folder stands in the page's
working directory, one that is a Hub id on the Hub of the tests. The base model of all pages,
`google/vit-base-patch16-224-in21k`, is always there: 12 blocks and images of 224x224 like the real one, but 32 wide, with
patches of 56x56, and random.
"""

import base64
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTImageProcessorPil, ViTModel

from cl_prompts import HashPromptConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.continual import ClassIncrementalStream, ContinualArguments, ContinualTrainer
from cl_prompts.runs import MICRO_VIT
from cl_prompts.runs.images import ToTensor
from support.checkpoints import timm_state
from support.hub_server import Hub
from support.hub_storage import Repo


BASE = "google/vit-base-patch16-224-in21k"
BIRDS = {0: "owl", 1: "jay", 2: "wren", 3: "crow"}
Namespace = dict[str, Any]
GIVENS: dict[str, Callable[[Namespace], Any]] = {}


def given(*names: str) -> Callable[[Callable[[Namespace], Any]], Callable[[Namespace], Any]]:
    """Register a factory under names. It is handed what the page's code has made so far."""

    def register(factory: Callable[[Namespace], Any]) -> Callable[[Namespace], Any]:
        GIVENS.update(dict.fromkeys(names, factory))
        return factory

    return register


def provide(name: str, namespace: Namespace) -> None:
    """Make what a page presupposes.

    Raises:
        AssertionError: nobody knows what that is.
    """
    assert name in GIVENS, f"tests/support/documentation_givens.py does not know {name!r}, only {sorted(GIVENS)}"
    value = GIVENS[name](namespace)
    if name.isidentifier():
        namespace[name] = value


def put_base_on_the_hub(hub: Hub) -> None:
    """The pages' base model, with its image processor, in the name of its owner."""
    repo = hub.repos[BASE] = Repo(BASE)
    header = {"summary": "Upload", "description": ""}
    files = [{"key": "file", "value": {"path": name, "content": content}} for name, content in base_files().items()]
    repo.commit("main", [{"key": "header", "value": header}, *files], as_pull_request=False)


@cache
def base_files() -> dict[str, str]:
    """Name -> content in base64."""
    torch.manual_seed(0)
    config = ViTConfig(patch_size=56, hidden_size=32, num_hidden_layers=12, num_attention_heads=2, intermediate_size=32)
    with tempfile.TemporaryDirectory() as folder:
        ViTModel(config).save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder)
        return {file.name: base64.b64encode(file.read_bytes()).decode() for file in Path(folder).iterdir()}


def picture(seed: int) -> Image.Image:
    """A photograph of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8))


def rows(classes: int, each: int, seed: int) -> Dataset:
    """Images with labels."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(num_classes=classes)})
    labels = [c for c in range(classes) for _ in range(each)]
    return Dataset.from_dict({"image": [picture(seed + n) for n in range(len(labels))], "label": labels}, features=features)


@given("vit")
def _(_: Namespace) -> Any:
    return AutoModel.from_pretrained(BASE)


@given("processor")
def _(_: Namespace) -> Any:
    return AutoImageProcessor.from_pretrained(BASE)


@given("images", "pixel_values")
def _(_: Namespace) -> Any:
    return torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@given("labels")
def _(_: Namespace) -> Any:
    return torch.tensor([0, 1, 0])


@given("image")
def _(_: Namespace) -> Any:
    return picture(0)


@given("array")
def _(_: Namespace) -> Any:
    return np.random.default_rng(0).random((48, 64, 3))


@given("owl.jpg", "jay.jpg")
def _(_: Namespace) -> None:
    for number, name in enumerate(("owl", "jay")):
        picture(number).save(f"{name}.jpg")


@given("ibot_vitb16_teacher.pth")
def _(_: Namespace) -> None:
    torch.save({"state_dict": timm_state(width=192, labels=None)}, "ibot_vitb16_teacher.pth")


@given("timm-vit-tiny")
def _(_: Namespace) -> None:
    Path("timm-vit-tiny").mkdir()
    save_file(timm_state(width=192), "timm-vit-tiny/model.safetensors")


@given("photos", "check")
def _(_: Namespace) -> None:
    for folder, count in (("photos/kingfisher", 4), ("photos/heron", 4), (f"check/{BIRDS[0]}", 1)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(number).save(f"{folder}/{number}.jpg")


@given("stream")
def _(_: Namespace) -> Any:
    """Two tasks of two classes, each with batches like those of a DataLoader."""

    def batches(classes: list[int]) -> list[dict[str, torch.Tensor]]:
        ids = torch.arange(4).split(2)
        return [
            {"pixel_values": torch.randn(2, 3, 224, 224), "labels": torch.tensor(classes), "sample_ids": i} for i in ids
        ]

    return [(classes, batches(classes)) for classes in ([0, 1], [2, 3])]


@given("train")
def _(_: Namespace) -> Any:
    return rows(10, 2, seed=0)


@given("test")
def _(_: Namespace) -> Any:
    return rows(10, 1, seed=100)


@given("transform")
def _(_: Namespace) -> Any:
    return ToTensor(AutoImageProcessor.from_pretrained(BASE))


@given("model")
def _(_: Namespace) -> PromptPoolModel:
    return pool()


@given("me/birds-pool", "me/cars-pool")
def _(_: Namespace) -> None:
    for name in ("me/birds-pool", "me/cars-pool"):
        pool().push_to_hub(name, image_processor=AutoImageProcessor.from_pretrained(BASE))


@given("results/numbers-layer_grouped-seed0/adapter", "results/shapes/adapter")
def _(_: Namespace) -> None:
    base = MICRO_VIT
    model = pool(AutoModel.from_pretrained(base, add_pooling_layer=False))
    for run in ("numbers-layer_grouped-seed0", "shapes"):
        model.save_pretrained(f"results/{run}/adapter", image_processor=AutoImageProcessor.from_pretrained(base))


@given("trainer")
def _(_: Namespace) -> Any:
    """One that has come to its end."""
    images = ToTensor(AutoImageProcessor.from_pretrained(BASE))
    stream = ClassIncrementalStream(rows(4, 1, seed=0), rows(4, 1, seed=100), [[0, 1], [2, 3]], images)
    trainer = ContinualTrainer(pool_without_tasks(), stream, ContinualArguments(num_train_epochs=1))
    trainer.train()
    return trainer


@given("me/lora")
def _(_: Namespace) -> None:
    lora = LoraConfig(target_modules=["q_proj", "v_proj"])
    get_peft_model(AutoModel.from_pretrained(BASE), lora).push_to_hub("me/lora")


def pool_without_tasks(base: Any = None) -> PromptPoolModel:
    """A new prompt pool."""
    set_seed(0)
    base = AutoModel.from_pretrained(BASE) if base is None else base
    return get_prompt_pool_model(base, HashPromptConfig(pool_size=6, top_k=2, layers=[0, 1]))


def pool(base: Any = None) -> PromptPoolModel:
    """A model that knows two tasks of two birds."""
    model = pool_without_tasks(base)
    for classes in ([0, 1], [2, 3]):
        model.begin_task(classes, class_names={c: BIRDS[c] for c in classes})
        model.end_task()
    return model.eval()
