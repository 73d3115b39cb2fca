"""`torch.export` of a model with prompts, with a batch of any size."""

from typing import Any

import pytest
import torch
from support.families import build, inputs
from support.methods import METHODS, WITH_CLASSIFIER

from cl_prompts import get_prompt_pool_model


ALL = METHODS | WITH_CLASSIFIER


@torch.enable_grad()
def learnt(config: Any) -> Any:
    torch.manual_seed(0)
    model = get_prompt_pool_model(build("vit"), config)
    for classes in ([0, 1], [2, 3]):
        values = {**inputs("vit", 8), "labels": torch.tensor(classes * 4)}
        if model.needs_features_before and classes != [0, 1]:
            model.record_features([values])
        model.begin_task(classes)
        model.attach_optimizer(torch.optim.SGD(model.parameter_groups(learning_rate=0.1)))
        model.train()(**values)
        if model.needs_consolidation:
            model.eval().consolidate([values])
        model.end_task()
    return model.eval()


@torch.no_grad()
@pytest.mark.by_turns(27, always=())
@pytest.mark.parametrize("method", ALL)
def test_any_batch_size(method: str) -> None:
    model = learnt(ALL[method]())
    model(**inputs("vit", 4))  # once outside: closed-form heads compute their factors, the last block is tried
    dynamic = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(model, (), inputs("vit", 4), dynamic_shapes=dynamic, strict=False).module()
    for batch in (2, 5):
        values = inputs("vit", batch, seed=batch)
        torch.testing.assert_close(exported(**values).logits, model(**values).logits, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused() -> None:
    """Its tracer fails inside the selection of most methods, with errors of its own."""
    model = learnt(METHODS["none"]())
    with pytest.raises(ValueError, match=r"cannot trace prompts: use torch\.export\.export"):
        torch.jit.trace(model, inputs("vit")["pixel_values"], strict=False)
    assert not any(hasattr(module, "bias") for module in model.modules() if "Pool" in type(module).__name__)
