"""What `transformers.Trainer` needs besides its own defaults to train one task of a model with a prompt pool."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction, Trainer, TrainerCallback

from cl_prompts.interfaces import IGNORE_INDEX, LossPart
from cl_prompts.learner.losses import add_up
from cl_prompts.outputs import PromptPoolOutput


class AttachOptimizer(TrainerCallback):
    """Gives the Trainer's optimizer to the model, for methods that scale its updates (Hash).

    On several processes it also gathers the model's statistics before the model is saved or evaluated.

    `PromptPoolTrainer` has it; pass `callbacks=[AttachOptimizer()]` to another Trainer.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the optimizer.

        Args:
            args: the Trainer's arguments.
            state: not used.
            control: not used.
            kwargs: with `model` and `optimizer`.

        Raises:
            ValueError: `args` ask for evaluations within a task that the model's classifier gets to know after it only.
        """
        adapter = kwargs["model"].adapter
        if adapter.awaits_consolidation and args.eval_strategy != "no":
            raise ValueError(
                f"eval_strategy={args.eval_strategy.value!r}: the {adapter.config.head} head answers for this task's "
                'classes only after model.consolidate(images). Set eval_strategy="no", and call trainer.evaluate() after it'
            )
        kwargs["model"].attach_optimizer(kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gather the statistics of `kwargs`' `model` if `control` says that it is saved or evaluated now.

        `args` and `state` are not used.
        """
        if control.should_save or control.should_evaluate:
            kwargs["model"].gather_statistics()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gather the statistics of `kwargs`' `model`, which may be saved or evaluated now.

        `args`, `state` and `control` are not used.
        """
        kwargs["model"].gather_statistics()


def accuracy_of(model: Any) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for `transformers.Trainer`: the accuracy over all known classes.

    Columns of the logits follow `model.classes`, so `logits.argmax(-1) == labels` would be wrong.

    Args:
        model: the model that the Trainer trains.

    Returns:
        a function that returns {"accuracy": share of correct answers, from 0 to 1}. Labels of -100 are not counted.
    """

    counts = torch.zeros(2, dtype=torch.int64)  # right answers and images of the evaluation so far

    def compute_metrics(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        logits, labels = _whole(prediction.predictions), _whole(prediction.label_ids)
        answers = torch.tensor(model.classes)[logits.argmax(-1)]
        counted = labels != IGNORE_INDEX
        counts.add_(torch.stack([(answers == labels)[counted].sum(), counted.sum()]))
        if not compute_result:  # with `batch_eval_metrics` a call for each batch, the last of them for the result
            return {}
        right, images = counts.tolist()
        counts.zero_()
        return {"accuracy": right / max(images, 1)}

    return compute_metrics


def _whole(values: Any) -> Tensor:
    """An array or tensor, or a list of those of batches, as one tensor on the CPU."""
    parts = values if isinstance(values, list) else [values]
    return torch.cat([torch.as_tensor(part).cpu() for part in parts])


class PromptPoolTrainerMixin:
    """A mixin for `transformers.Trainer` and its subclasses, to stand before them among the bases of a class.

    It attaches the optimizer, uses `accuracy_of(model)` if no `compute_metrics` is given, and computes the losses of
    `label_smoothing_factor` and `compute_loss_func`: these replace the cross entropy, and the method's other loss terms are
    added. Labels are smoothed over the classes that `class_mask` leaves. `compute_loss_func` gets columns of the logits in
    place of class ids, -100 for padding. `args` and `kwargs` are those of the Trainer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        trainer.add_callback(AttachOptimizer())
        if trainer.compute_metrics is None:
            trainer.compute_metrics = accuracy_of(trainer.model)
        # Trainer itself would take the labels out of the batch if it had one of these two.
        self._smoothing = trainer.label_smoother.epsilon if trainer.label_smoother is not None else 0.0
        self._loss_of_user, trainer.label_smoother, trainer.compute_loss_func = trainer.compute_loss_func, None, None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch; `model`, `inputs`, `args` and `kwargs` are those of `Trainer.compute_loss`."""
        trainer: Any = super()
        if "labels" not in inputs or (not self._smoothing and self._loss_of_user is None):
            return trainer.compute_loss(model, inputs, *args, **kwargs)
        return trainer.compute_loss(partial(self._with_other_loss, model), inputs, *args, **kwargs)

    def _with_other_loss(
        self, model: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **inputs: Any
    ) -> PromptPoolOutput:
        """The output of `model` with the user's loss or the smoothed one in place of the cross entropy."""
        trainer: Any = self
        output: PromptPoolOutput = model(labels=labels, num_items_in_batch=num_items_in_batch, **inputs)
        assert output.logits is not None
        assert output.losses is not None
        learner = trainer.accelerator.unwrap_model(model)
        targets, _ = learner.head.to_targets(labels)
        if self._loss_of_user is not None:
            loss = self._loss_of_user(output, targets, num_items_in_batch=num_items_in_batch)
        else:
            temperature = learner.adapter.config.loss_temperature if model.training else 1.0
            each = LossPart(smoothed_cross_entropy(output.logits / temperature, targets, self._smoothing), "mean")
            loss, _ = add_up({"": each}, targets >= 0, num_items_in_batch, over_processes=model.training)
        output.losses = output.losses | {"cross_entropy": loss}
        output.loss = torch.stack(list(output.losses.values())).sum()
        return output


class PromptPoolTrainer(PromptPoolTrainerMixin, Trainer):
    """`transformers.Trainer` for one task of a model with a prompt pool; see `PromptPoolTrainerMixin`."""


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross entropy with smoothed labels, over the classes whose logit is not -inf.

    Args:
        logits: [B, C].
        targets: columns [B]; -100 for padding.
        smoothing: share of the label that is spread evenly over the classes, in [0, 1].

    Returns:
        [B]; the values of padding are of no use.
    """
    allowed = logits.isfinite()
    even = -logits.log_softmax(1).masked_fill(~allowed, 0.0).sum(1) / allowed.sum(1)
    return (1 - smoothing) * F.cross_entropy(logits, targets, reduction="none") + smoothing * even
