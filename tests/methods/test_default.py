"""The model of who chooses no method."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from support.families import build
from support.tensors import draw

from cl_prompts import APTConfig, PromptPoolModel, default_config, get_prompt_pool_model


def learn(model: PromptPoolModel, classes: list[int]) -> dict[str, Any]:
    labels = torch.tensor(classes * 6)
    batch = {"pixel_values": draw(len(labels), 3, 32, 32, seed=classes[0]), "labels": labels}
    model.eval().record_features([batch])
    model.begin_task(classes)
    optimizer = torch.optim.Adam(model.parameter_groups(learning_rate=0.02))
    model.attach_optimizer(optimizer)
    model.train()(**batch).loss.backward()
    optimizer.step()
    model.eval().consolidate([batch])
    model.end_task()
    return batch


def test_it_learns_tasks_in_one_pass_and_its_prompts_do_not_grow() -> None:
    model = get_prompt_pool_model(build("vit"))
    assert model.peft_config["default"].method == default_config().method
    learn(model, [4, 1])
    prompts = sum(value.numel() for value in model.adapter.pool.state_dict().values())
    seen = learn(model, [0, 7])
    assert sum(value.numel() for value in model.adapter.pool.state_dict().values()) == prompts
    passes: list[Any] = []
    model.get_base_model().register_forward_hook(lambda *_: passes.append(1))
    answer = model(seen["pixel_values"]).logits.argmax(1)
    assert len(passes) == 1
    assert {model.classes[i] for i in answer.tolist()} <= {0, 7}, "images that it was fitted to"
    assert model.adapter.config.state.temperature is not None


def test_it_is_the_same_config_as_written_out(tmp_path: Any) -> None:
    config = APTConfig(head="discriminant", loss_head="layer_norm", normalize_features=True)
    assert default_config() == config
    model = get_prompt_pool_model(build("vit"))
    seen = learn(model, [2, 5])["pixel_values"]
    model.save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path)
    assert torch.equal(loaded(seen).logits, model(seen).logits)
    assert isinstance(PeftModel.from_pretrained(build("vit"), tmp_path), PeftModel)


def test_no_config_by_mistake() -> None:
    with pytest.raises(TypeError, match="config is 'apt', a name"):
        get_prompt_pool_model(build("vit"), "apt")  # type: ignore[arg-type]
