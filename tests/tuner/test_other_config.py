"""A training state, or a file, of a model with another config."""

from pathlib import Path
from typing import Any

import pytest
from support.closed_form_models import answers, learnt_model, new_model
from support.small_runs import CLASSES


@pytest.mark.parametrize(
    ("method", "field", "values"),
    [
        ("hash discriminant", "normalize_features", (True, False)),
        ("hash discriminant", "own_covariance", (0.1, 0.3)),
        ("hash discriminant", "layers", ([0, 2], [0, 1])),
        ("l2p", "class_mask", ("task", "none")),
        ("l2p", "head", ("linear", "layer_norm")),
        ("none analytic", "readout", ("cls", "mean")),
    ],
)
def test_is_refused_by_the_name_of_the_field(method: str, field: str, values: tuple[Any, Any], tmp_path: Path) -> None:
    """Shapes are the same, so that nothing else would tell."""
    theirs, ours = (learnt_model(method, CLASSES[:1], **{field: value}) for value in values)
    before, saved = answers(ours), theirs.training_state_dict()
    theirs.save_pretrained(tmp_path)
    message = rf"is of a config with \{{'{field}': .*, this model has \{{'{field}': .*: make the model with the same config"
    with pytest.raises(ValueError, match=f"the training state {message}"):
        ours.load_training_state_dict(saved)
    with pytest.raises(ValueError, match=f"{tmp_path} {message}"):
        ours.load_adapter(tmp_path, "default")
    assert answers(ours).equal(before)
    del saved["values"]["config"]["own_covariance"]  # as a state from before the field was there
    same = new_model(method, **{field: values[0]})
    same.load_training_state_dict(saved)
    assert answers(same).equal(answers(theirs))
    same.load_adapter(tmp_path, "default")
    assert answers(same).equal(answers(theirs))


def test_where_the_base_is_from_and_limits_may_differ() -> None:
    model, other = learnt_model("l2p", CLASSES[:1]), new_model("l2p", max_adapter_bytes=10_000_000)
    other.adapter.config.base_model_name_or_path = "elsewhere"
    other.load_training_state_dict(model.training_state_dict())
    assert answers(other).equal(answers(model))
