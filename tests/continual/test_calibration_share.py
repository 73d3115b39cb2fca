"""Images that no prompt is trained on: training leaves them out, and scores are calibrated on them."""

from typing import Any

import numpy as np
import pytest
import torch
from support.small_runs import PER_CLASS, small_model, small_trainer
from support.stream_data import birds, to_tensor

from cl_prompts.continual import ContinualArguments, ContinualTrainer, IterableClassIncrementalStream
from cl_prompts.continual.left_out import left_out
from cl_prompts.heads.calibration import fit_temperature
from cl_prompts.heads.refit import held_out_logits


def test_a_share_of_each_class_is_left_out() -> None:
    labels = np.array([3] * 20 + [1] * 9 + [3] * 10)
    chosen = left_out(labels, 0.1)
    assert np.flatnonzero(chosen).tolist() == [9, 19, 38]  # class 1 has fewer than ten images
    assert not left_out(labels, 0.0).any()
    assert left_out(labels, 0.5).sum() == 15 + 4


def used_rows(share: float) -> tuple[Any, list[int]]:
    """A trainer after one task, and the rows of the images that its model was trained on."""
    trainer, seen = small_trainer("l2p", tasks=1, calibration_share=share, save_steps=0), set[int]()

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            seen.update(int(number) for number in kwargs["sample_ids"] if number >= 0)

    trainer.model.register_forward_pre_hook(keep, with_kwargs=True)
    trainer.train()
    return trainer, sorted(seen)


def test_training_leaves_them_out_and_the_temperature_is_theirs() -> None:
    trainer, seen = used_rows(0.4)
    rows = trainer.stream.tasks[0].train_rows
    assert seen == [int(row) for row in rows if row % PER_CLASS not in (2, 4)]
    model = trainer.model
    batches = list(trainer.feature_provider.task_images(trainer.stream.tasks[0]))
    untrained = torch.cat([batch["untrained"] for batch in batches])
    assert torch.equal(untrained, torch.tensor([row % PER_CLASS in (2, 4) for row in rows]))
    features = torch.cat([model.features_of(batch) for batch in batches]).detach()
    targets = model.head.to_targets(torch.cat([batch["labels"] for batch in batches]))[0]
    chosen = [held_out_logits(model.head, features, targets, True, mask) for mask in (untrained, None)]
    with_them, without = (fit_temperature(*held) for held in chosen)
    assert model.adapter.config.state.temperature == pytest.approx(with_them, rel=1e-5)
    assert without != pytest.approx(with_them, rel=1e-3)
    assert used_rows(0.0)[1] == [int(row) for row in rows]


def test_a_share_needs_tasks_and_images_by_number() -> None:
    with pytest.raises(ValueError, match=r"calibration_share=0.6 must be from 0 to 0.5"):
        small_trainer("l2p", calibration_share=0.6)
    source = birds([0, 1, 2, 3]).to_iterable_dataset()
    stream = IterableClassIncrementalStream(source, source, [[0, 1], [2, 3]], to_tensor, train_images=[2, 2])
    with pytest.raises(ValueError, match="so the stream must have tasks and be loaded whole"):
        ContinualTrainer(small_model("l2p"), stream, ContinualArguments(calibration_share=0.1))
