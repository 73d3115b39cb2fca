"""Arguments: each has its effect or is refused. One adapter per image, as PEFT's LoRA has it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.comparison import small_learner
from support.families import build, inputs
from support.methods import METHODS
from torch.testing import assert_close

from cl_prompts import (
    AutoPromptPoolModel,
    HashPromptConfig,
    L2PConfig,
    PromptPoolModel,
    PromptPoolPipeline,
    get_prompt_pool_model,
)
from cl_prompts.sharing.inspect import describe_adapter
from cl_prompts.storage.adapter_files import find_adapter


NAMES = ["default", "other", "third", "default", "third"]


def three_adapters(wrap: Any = get_prompt_pool_model) -> Any:
    """Three methods on one base, with different classes."""
    model = wrap(build("vit"), METHODS["l2p"]())
    model.add_adapter("other", METHODS["coda"]())
    model.add_adapter("third", METHODS["dualprompt prototype"]())
    for number, name in enumerate(("default", "other", "third")):
        model.set_adapter(name)
        model.base_model.begin_task([7, 3, 5][: number + 1])
        if name == "third":  # it compares with the means of its images
            model.train()
            model(**inputs("vit", 4), labels=torch.tensor([7, 3, 5, 7]))
        model.base_model.end_task()
    model.set_adapter("default")
    return model.eval()


@pytest.mark.parametrize("wrap", [get_prompt_pool_model, PeftModel], ids=["ours", "plain"])
@pytest.mark.parametrize("size", [5, 1])
@torch.no_grad()
def test_each_image_gets_the_answer_of_its_adapter(wrap: Any, size: int) -> None:
    model = three_adapters(wrap)
    images, names, labels = inputs("vit", size)["pixel_values"], NAMES[:size], torch.tensor([7, 7, 5, -100, 3])[:size]
    mixed = model(pixel_values=images, labels=labels, adapter_names=names)
    assert model.active_adapters == ["default"]
    each = []
    for row, name in enumerate(names):
        model.set_adapter(name)
        alone = model(pixel_values=images[row : row + 1], labels=labels[row : row + 1])
        each.append(alone.loss if labels[row] >= 0 else None)
        columns = alone.logits.shape[1]
        assert_close(mixed.logits[row, :columns], alone.logits[0], atol=1e-5, rtol=0)
        assert (mixed.logits[row, columns:] == -torch.inf).all()
        assert_close(mixed.features[row], alone.features[0], atol=1e-5, rtol=0)
    assert_close(mixed.loss, torch.stack([loss for loss in each if loss is not None]).mean(), atol=1e-5, rtol=0)
    model.set_adapter("default")
    positional = model(images, adapter_names=names, return_dict=False)
    assert_close(positional[0], mixed.logits)
    with model.disable_adapter():
        assert model(pixel_values=images, adapter_names=names).last_hidden_state.shape[0] == size


@torch.no_grad()
def test_novelty_of_a_mixed_batch_is_that_of_each_image_s_adapter() -> None:
    model: Any = get_prompt_pool_model(
        build("vit"), HashPromptConfig(pool_size=6, top_k=2, layers=[0, 2], head="discriminant")
    )
    images = inputs("vit", 4)["pixel_values"]
    model.add_adapter("own head", L2PConfig(top_k=3))
    for name, classes in (("default", [0, 1]), ("own head", [2, 5, 3])):
        model.set_adapter(name)
        model.begin_task(classes)
        labels = torch.tensor((classes * 2)[:4])
        model.eval().consolidate([{"pixel_values": images, "labels": labels, "sample_ids": [0, 1, 2, 3]}])
        model.end_task()
    names = ["own head", "default", "default", "own head"]
    expected = torch.empty(4)
    for row, name in enumerate(names):
        model.set_adapter(name)
        expected[row] = model.novelty(model(images[row : row + 1]))[0]
    for active in ("default", "own head"):
        model.set_adapter(active)
        assert_close(model.novelty(model(images, adapter_names=names)), expected, atol=1e-5, rtol=0)
    model.add_adapter("wide", L2PConfig(top_k=3, readout="cls_mean"))
    model.set_adapter("wide")
    model.begin_task([0, 1])
    mixed = model.eval()(images, adapter_names=["wide", *names[1:]])
    with pytest.raises(ValueError, match=r"\['default', 'own head', 'wide'\] differ in width: .* one adapter at a time"):
        model.novelty(mixed)


@pytest.mark.parametrize("wrap", [get_prompt_pool_model, PeftModel], ids=["ours", "plain"])
def test_names_that_cannot_be_meant(wrap: Any) -> None:
    model, images = three_adapters(wrap), inputs("vit", 2)["pixel_values"]
    for names, error, message in (
        (["default", "owls"], ValueError, r"no adapter is called \['owls'\]: there are \['default', 'other', 'third'\]"),
        (["__base__", "other"], ValueError, r"no adapter is called \['__base__'\]"),
        (["default"], ValueError, "1 names for 2 images"),
        ("default", TypeError, "must be a list of names"),
    ):
        with pytest.raises(error, match=message):
            model(pixel_values=images, adapter_names=names)
    with pytest.raises(ValueError, match="not for training"):
        model.train()(pixel_values=images, adapter_names=["default", "other"])
    with_copies = wrap(build("vit"), L2PConfig(top_k=3, modules_to_save=["layernorm"]))
    with_copies.base_model.begin_task([0, 1])
    with pytest.raises(ValueError, match=r"cannot be used with modules_to_save, here \['layernorm'\]"):
        with_copies.eval()(pixel_values=images, adapter_names=["default", "default"])


def test_unknown_arguments_are_refused(tmp_path: Path) -> None:
    """None is taken and dropped: not by a forward, a save, a load, or a baseline."""
    model, images = three_adapters(), inputs("vit", 2)["pixel_values"]
    model.get_base_model().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "pool", save_function=torch.save)
    baseline = small_learner("finetune")
    baseline.begin_task([0, 1])
    pool, base = tmp_path / "pool", build("vit")

    def disabled(**arguments: Any) -> None:
        with model.disable_adapter():
            assert model(pixel_values=images, output_hidden_states=True).hidden_states
            model(pixel_values=images, **arguments)

    for call in (
        lambda: model(pixel_values=images, lables=torch.tensor([7, 7])),
        lambda: model(pixel_values=images, alora_offsets=[1, 2]),
        lambda: PeftModel(build("vit"), L2PConfig(num_labels=2, class_mask="none"))(pixel_values=images, nonsense=3),
        lambda: model.extract_features(images, nonsense=3),
        lambda: model.initialize_prompts(images, nonsense=3),
        lambda: model.extract_features(images, labels=torch.tensor([7, 7])),
        lambda: model.initialize_prompts(images, labels=torch.tensor([7, 7])),
        lambda: disabled(nonsense=3),
        lambda: baseline(images, lables=torch.tensor([0, 1])),
        lambda: baseline.extract_features(images, nonsense=3),
        lambda: baseline.compute_features(images, nonsense=3),
        lambda: L2PConfig.from_pretrained(pool, top_k=1),
        lambda: L2PConfig().save_pretrained(tmp_path / "new", push_to_hub=True),
        lambda: find_adapter(pool, nonsense=3),
        lambda: describe_adapter(pool, nonsense=3),
        lambda: model.save_pretrained(tmp_path / "new", nonsense=3),
        lambda: get_prompt_pool_model(build("vit"), L2PConfig(), nonsense=3),
        lambda: PromptPoolModel.from_pretrained(base, pool, nonsense=3),
        lambda: PromptPoolModel.from_pretrained(base, pool, dtype=torch.float16),
        lambda: model.load_adapter(pool, "fourth", nonsense=3),
        lambda: PromptPoolPipeline.from_pretrained(pool, base=base, dtype=torch.float16),
    ):
        with pytest.raises(TypeError, match="argument"):
            call()  # type: ignore[no-untyped-call]
    assert not (tmp_path / "new").exists()
    assert "fourth" not in model.peft_config
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match=f"{name}=True: the output of a model with prompts has none"):
            model(pixel_values=images, **{name: True})
    for name in ("nonsense", "config"):
        with pytest.raises(ValueError, match=name):
            AutoPromptPoolModel.from_pretrained(pool, **{name: 3})
