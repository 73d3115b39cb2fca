"""What an adapter remembers of its base in training: image size, arguments of the forward, and precision."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.families import SIZES, build
from support.methods import METHODS, WITH_CLASSIFIER
from support.small_runs import small_stream
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTImageProcessor, ViTModel

from cl_prompts import AutoPromptPoolModel, PromptPoolConfig, PromptPoolModel, PromptPoolPipeline, get_prompt_pool_model
from cl_prompts.baselines import get_baseline
from cl_prompts.continual import ContinualArguments, ContinualTrainer
from cl_prompts.storage.adapter_state import AdapterState


pytestmark = pytest.mark.by_turns(3)


INTERPOLATE = {"interpolate_pos_encoding": True}


def images(side: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(side))


def train(model: Any, side: int, classes: tuple[int, int] = (0, 1), **arguments: Any) -> Any:
    model.begin_task(list(classes))
    model.train()
    labels = torch.tensor(classes)
    model(pixel_values=images(side), labels=labels, **arguments).loss.backward()
    if model.needs_consolidation:
        model.eval()
        model.consolidate([{"pixel_values": images(side), "labels": labels}])
    model.end_task()
    return model.eval()


@torch.no_grad()
def answers(model: Any, side: int, **arguments: Any) -> torch.Tensor:
    return model(pixel_values=images(side), **arguments).logits


def processor(side: int) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": side, "width": side})


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("head", [{}, {"head": "discriminant"}])
def test_interpolated_positions(head: dict[str, str], declared: bool, tmp_path: Path) -> None:
    """A ViT of 32 pixels, trained at 48: declared in the config, or passed to the training forward."""
    build("vit").save_pretrained(tmp_path / "base")
    config = METHODS["l2p"](base_arguments=INTERPOLATE if declared else None, **head)
    model = get_prompt_pool_model(ViTModel.from_pretrained(tmp_path / "base"), config)
    train(model, 48, **({} if declared else INTERPOLATE))
    state = model.adapter.config.state
    assert (state.image_size, state.base_arguments) == ([48, 48], INTERPOLATE)
    found = answers(model, 48)
    assert torch.equal(found, answers(model, 48, **INTERPOLATE))
    features = model.extract_features(images(48))
    assert torch.equal(features, model.extract_features(images(48), **INTERPOLATE))
    model.save_pretrained(tmp_path / "adapter")
    for again in (
        AutoPromptPoolModel.from_pretrained(tmp_path / "adapter").eval(),
        PeftModel.from_pretrained(ViTModel.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")).eval(),
    ):
        assert torch.equal(answers(again, 48), found)
        PromptPoolPipeline(again, processor(48))
        with pytest.raises(ValueError, match="makes images of 32x32 pixels, the adapter was trained on 48x48"):
            PromptPoolPipeline(again, processor(32))


def test_a_base_of_any_size_says_if_images_are_not_those_of_training(tmp_path: Path) -> None:
    base = Dinov2Model(Dinov2Config(**SIZES | {"image_size": 56, "patch_size": 14})).eval()
    model = train(get_prompt_pool_model(base, METHODS["l2p"]()), 56)
    model.save_pretrained(tmp_path)
    again = PromptPoolModel.from_pretrained(model.unload(), tmp_path, is_trainable=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers(again, 56)
    with pytest.warns(UserWarning, match="trained on images of 56x56 pixels, these are 28x28"):
        answers(again, 28)
    PromptPoolPipeline(again, processor(56))
    PromptPoolPipeline(again, ViTImageProcessor(do_resize=False))  # keeps proportions
    with pytest.raises(ValueError, match="makes images of 28x28 pixels, the adapter was trained on 56x56"):
        PromptPoolPipeline(again, processor(28))
    with pytest.warns(UserWarning, match="trained on images of 56x56 pixels, these are 28x28"):
        train(again, 28, (2, 3))
    assert again.adapter.config.state.several_sizes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers(again, 42)


@pytest.mark.parametrize("learner", ["l2p", "none analytic", "finetune"])
def test_the_trainer_uses_them(learner: str) -> None:
    """Images of 32 pixels for a base of 16."""
    base = ViTModel(ViTConfig(**SIZES | {"image_size": 16})).eval()
    methods = {**METHODS, **WITH_CLASSIFIER}
    model = (
        get_prompt_pool_model(base, methods[learner](base_arguments=INTERPOLATE))
        if learner in methods
        else get_baseline(learner, base, base_arguments=INTERPOLATE)
    )
    trainer = ContinualTrainer(model, small_stream(2), ContinualArguments(num_train_epochs=1, batch_size=4))
    trainer.train()
    assert len(trainer.matrix.columns) == 2


def test_baselines_take_them_too() -> None:
    learner = get_baseline("frozen", build("vit"), base_arguments=INTERPOLATE)
    train(learner, 48)
    assert answers(learner, 48).shape == (2, 2)
    assert learner.cache_key() != get_baseline("frozen", build("vit")).cache_key()


def test_they_are_part_of_the_cache_key() -> None:
    keys = [get_prompt_pool_model(build("vit"), METHODS["l2p"](base_arguments=a)).cache_key() for a in (INTERPOLATE, None)]
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    "arguments",
    [{"labels": 3}, {"return_dict": False}, {"output_attentions": True}, {"x": [1]}, {1: 2}, [], {"x": "a" * 999}],
)
def test_arguments_that_cannot_be_remembered(arguments: Any) -> None:
    with pytest.raises(ValueError, match=r"base_arguments.* must map arguments of the base's forward to numbers"):
        PromptPoolConfig(method="l2p", base_arguments=arguments)
    with pytest.raises(ValueError, match=r"state.base_arguments.* must map arguments"):
        AdapterState.from_dict({"base_arguments": arguments})


def test_arguments_that_the_base_does_not_take() -> None:
    with pytest.raises(
        ValueError, match=r"\['interpolate_pos_encoding'\]: the forward of Dinov2Model takes no such argument"
    ):
        get_prompt_pool_model(build("dinov2"), METHODS["l2p"](base_arguments=INTERPOLATE))


# ---- precision ------------------------------------------------------------------------------------------------------


def test_precision_is_remembered(tmp_path: Path) -> None:
    build("vit").save_pretrained(tmp_path / "base")
    halved = ViTModel.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = get_prompt_pool_model(halved, METHODS["l2p"]())
    model.begin_task([0, 1])
    model.end_task()
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["state"]["base_precision"] == "bfloat16"
    again = AutoPromptPoolModel.from_pretrained(tmp_path / "adapter", strict_base=True)
    assert again.get_base_model().dtype == torch.bfloat16
    unchosen = AutoPromptPoolModel.from_pretrained(tmp_path / "adapter", strict_base=True, dtype="auto")
    assert unchosen.get_base_model().dtype == torch.bfloat16
    assert (
        PromptPoolPipeline.from_pretrained(
            tmp_path / "adapter", base=tmp_path / "base", image_processor=processor(32), strict_base=True
        )
        .model.get_base_model()
        .dtype
        == torch.bfloat16
    )
    text = "trained on a base in bfloat16, this one is in float32: another precision of the same weights"
    with pytest.warns(UserWarning, match=rf"{text}\. Load .* with dtype=torch.bfloat16"):
        chosen = AutoPromptPoolModel.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert chosen.get_base_model().dtype == torch.float32
    with pytest.raises(ValueError, match=text):
        AutoPromptPoolModel.from_pretrained(tmp_path / "adapter", dtype=torch.float32, strict_base=True)
    with pytest.warns(UserWarning, match="another precision, and other weights"):
        PromptPoolModel.from_pretrained(build("vit", seed=1), tmp_path / "adapter")
    with pytest.warns(UserWarning, match="same shape, other weights"):
        PromptPoolModel.from_pretrained(build("vit", seed=1).bfloat16(), tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"this one is in float16: another precision, so that weights cannot be compared"):
        PromptPoolModel.from_pretrained(copy.deepcopy(chosen.unload()).half(), tmp_path / "adapter")


@pytest.mark.parametrize("text", ["", "a b", "x" * 101, "<script>"])
def test_precisions_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"state.base_precision.* must name kinds of numbers"):
        AdapterState.from_dict({"base_precision": text})
