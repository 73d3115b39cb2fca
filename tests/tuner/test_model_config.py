"""The config of a model: the classes of its active adapter, and its base's other values."""

import copy
import pickle
from typing import Any

import pytest
from peft import get_peft_model
from PIL import Image
from support.families import build
from support.methods import METHODS
from transformers import ViTImageProcessorPil, pipeline

from cl_prompts import PromptPoolPipeline, get_prompt_pool_model


NAMES = {2: "owl", 0: "jay", 3: "wren"}
wraps = pytest.mark.parametrize("wrap", [get_prompt_pool_model, get_peft_model])


def birds(wrap: Any = get_prompt_pool_model, classifier: bool = True) -> Any:
    model = wrap(build("vit", classifier=classifier), METHODS["l2p"]())
    model.begin_task([2, 0, 3, 1], class_names=NAMES)
    return model


@pytest.mark.parametrize("classifier", [True, False], ids=["classifier", "bare"])
@wraps
def test_the_pipeline_of_transformers_gives_what_ours_gives(wrap: Any, classifier: bool) -> None:
    model = birds(wrap, classifier).eval()
    model.get_base_model().config.problem_type = "multi_label_classification"  # of the base's own head
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    theirs = pipeline("image-classification", model=model, image_processor=processor)
    for classes in ([], [9, 5]):
        if classes:
            model.end_task()
            model.begin_task(classes, class_names={9: "crow"})
        ours = PromptPoolPipeline(model, processor)(image)
        found = theirs(image)
        assert [one["label"] for one in found] == [one["label"] for one in ours]
        assert [one["score"] for one in found] == pytest.approx([one["score"] for one in ours], abs=1e-6)


@wraps
def test_the_classes_follow_the_active_adapter(wrap: Any) -> None:
    model = birds(wrap)
    assert model.config.id2label == {0: "owl", 1: "jay", 2: "wren", 3: "1"}
    assert model.config.label2id == {"owl": 0, "jay": 1, "wren": 2, "1": 3}
    assert model.config.num_labels == 4
    model.add_adapter("b", METHODS["coda"](num_labels=2, class_mask="none"))
    assert model.config.num_labels == 4
    model.set_adapter("b")
    assert model.config.id2label == {0: "0", 1: "1"}
    model.set_adapter("default")
    model.end_task()
    model.rename_class(2, "tawny owl")
    model.begin_task([2, 8], revisit=True, class_names={2: "tawny owl", 8: "crow"})
    assert model.config.id2label == {0: "tawny owl", 1: "jay", 2: "wren", 3: "1", 4: "crow"}
    with model.disable_adapter():
        assert model.config is model.get_base_model().config


def test_models_on_one_base_have_each_their_own_classes() -> None:
    first = birds()
    base = first.get_base_model()
    second = get_prompt_pool_model(base, METHODS["l2p"](num_labels=3, class_mask="none"))
    assert [first.config.num_labels, second.config.num_labels, base.config.num_labels] == [4, 3, 5]
    assert "keys_to_ignore_at_inference" not in base.config.to_dict()
    assert base.config.id2label[0] == "LABEL_0"


def test_all_else_is_the_config_of_the_base() -> None:
    model = birds()
    base = model.get_base_model().config
    assert isinstance(model.config, type(base))
    model.config.output_hidden_states = True
    assert base.output_hidden_states
    with pytest.raises(AttributeError, match=r"begin_task\(classes, class_names="):
        model.config.id2label = {0: "tench"}
    with pytest.raises(AttributeError, match="begin_task"):
        model.config.num_labels = 2


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_copy_is_an_independent_config(copied: Any) -> None:
    model = birds()
    config = copied(model.config)
    assert type(config) is type(model.get_base_model().config)
    assert config.to_dict() == model.config.to_dict()
    assert config.to_json_string() == model.config.to_json_string()
    config.id2label = {0: "tench"}
    assert config.num_labels == 1
    assert model.config.num_labels == 4
