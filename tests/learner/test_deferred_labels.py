"""Labels that the step must not look at: on a device or in a compiled graph they are ignored, and reported later."""

import pytest
import torch
from support.families import build, inputs

from cl_prompts import L2PConfig, get_prompt_pool_model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(("bad", "why"), [(9, "undeclared"), (0, "of an earlier task")])
def test_wrong_labels_are_ignored_and_reported_at_the_next_log_step(bad: int, why: str) -> None:
    torch._dynamo.reset()
    model = get_prompt_pool_model(build("vit"), L2PConfig())
    model.begin_task([0, 1])
    model.end_task()
    model.begin_task([2, 3])
    model.train()
    images = inputs("vit", 4)["pixel_values"]
    alone = model(images[:3], labels=torch.tensor([2, 3, 2])).loss
    compiled = torch.compile(model, backend="eager")
    loss = compiled(images, labels=torch.tensor([2, 3, 2, bad])).loss
    torch.testing.assert_close(loss, alone, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"1 labels are of no declared class, or .*declared are \[0, 1, 2, 3\]"):
        model.check_labels()
    model.check_labels()
