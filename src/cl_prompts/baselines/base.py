"""What all comparison learners share: the way of a batch to its loss. The calls are those of `PromptPoolModel`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.backbones.input_checks import check_images, check_query
from cl_prompts.baselines.growing import GrowingModel
from cl_prompts.interfaces import IGNORE_INDEX, LossPart
from cl_prompts.learner.losses import add_up
from cl_prompts.outputs import PromptPoolOutput
from cl_prompts.runtime.distributed import world_size
from cl_prompts.tuner.validation import check_labels, check_wrapper


Images = Iterable[dict[str, Any]]  # batches with pixel_values, labels, sample_ids; can be gone through again and again


@dataclass
class Batch:
    """A training batch on its way to the loss.

    Args:
        features: [B, D].
        logits: of all known classes, nothing masked [B, C].
        columns: of the labels [B], -100 for padding.
        counted: True for real images [B].
        sample_ids: a number per image, or None.
        taught: what an earlier model answers [B, earlier classes], where the learner keeps one.
    """

    features: Tensor
    logits: Tensor
    columns: Tensor
    counted: Tensor
    sample_ids: Any
    taught: Tensor | None

    @property
    def numbers(self) -> Tensor:
        """`sample_ids` as a tensor [B] where the logits are.

        Raises:
            ValueError: there are none.
        """
        if self.sample_ids is None:
            raise ValueError("this learner knows images by their numbers: pass sample_ids, as the streams do")
        return torch.as_tensor(self.sample_ids, device=self.logits.device)


class ComparisonLearner(GrowingModel):
    """A backbone and a linear head that learn task after task; subclasses say how they avoid forgetting.

    Args:
        backbone: any supported Hugging Face vision transformer; trained in place.
        freeze_backbone: train the head only. Features may then be computed once and passed as `query`.
        pooling: the feature that the head reads: "auto", "cls", "mean", "cls_mean" or "pooler".
        class_mask: which classes the cross entropy sees: "task" (those of the current task, as for the prompts) or "none"
            (all known ones); None: "none" for learners that rehearse, else "task".
        num_labels: of a stream without tasks: ids 0 to num_labels - 1 are known from the start.

    Attributes:
        name: of the learner in `BASELINES`.
        rehearses: "beside" (remembered images join each batch), "only" (it trains on the memory alone) or "never".
        needs_memory: it cannot work without remembered images.
        needs_consolidation: it looks at images after a task's training.
        options: its settings by name.

    Raises:
        TypeError: the backbone is not supported.
        ValueError: a setting is out of range, or does not fit the learner.
    """

    rehearses: ClassVar[str] = "never"
    needs_memory: ClassVar[bool] = False
    needs_consolidation: ClassVar[bool] = False
    needs_features_before: ClassVar[bool] = False
    unknown_labels: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        freeze_backbone: bool = False,
        pooling: str = "auto",
        class_mask: str | None = None,
        num_labels: int | None = None,
    ) -> None:
        super().__init__(backbone, freeze_backbone, pooling, num_labels)
        mask = class_mask or ("task" if self.rehearses == "never" else "none")
        if mask not in ("task", "none") or (mask == "task" and self.rehearses != "never"):
            raise ValueError(f'class_mask={class_mask!r}: choose "none", or "task" for a learner that does not rehearse')
        self.class_mask = self.options["class_mask"] = mask
        # Labels of undeclared classes seen on a device, where a step must not look at them.
        self.register_buffer("unknown_labels", torch.zeros((), dtype=torch.int64), persistent=False)

    # ---- what subclasses override ------------------------------------------------------------------------------------

    def teach(self, pixel_values: Tensor, features: Tensor, **kwargs: Any) -> Tensor | None:
        """What an earlier model answers to a training batch [B, earlier classes]; None: nothing is asked of one.

        It is asked with the images' `pixel_values` [B, 3, H, W], their `features` [B, D] and further inputs `kwargs`.
        """
        return None

    def loss_parts(self, batch: Batch) -> dict[str, LossPart]:
        """The terms of the training loss of a `batch`."""
        return {"cross_entropy": self.cross_entropy(batch)}

    def answer(self, features: Tensor, logits: Tensor) -> Tensor:
        """Test-time logits [B, C] from `features` [B, D] and the head's `logits` [B, C]."""
        return logits

    def consolidate(self, images: Images, memory: Images | None = None) -> None:
        """Look at the task's `images` and the remembered `memory` after its training, in eval mode, before `end_task`."""

    def trains_task(self, number: int) -> bool:
        """Whether task `number` is trained by gradient."""
        return True

    # ---- training ----------------------------------------------------------------------------------------------------

    def parameter_groups(self, lr: float, **lrs: float) -> list[dict[str, Any]]:
        """Optimizer groups "base" and "head"; `lrs` gives one of them another rate than `lr`.

        Raises:
            ValueError: `lrs` names no group.
        """
        if set(lrs) - {"base", "head"}:
            raise ValueError(f"no parameter group is called {sorted(set(lrs) - {'base', 'head'})}: there are base and head")
        groups = {
            name: [p for p in part.parameters() if p.requires_grad]
            for name, part in (("base", self.features), ("head", self.head))
        }
        return [{"name": name, "params": params, "lr": lrs.get(name, lr)} for name, params in groups.items() if params]

    def attach_optimizer(self, optimizer: Any) -> None:
        """Say which `optimizer` trains the task, after every `begin_task`.

        Raises:
            ValueError: it lacks a trainable parameter.
        """
        self.link.attach(optimizer, self, {}, "")
        self.link.check_trains(self.named_parameters())

    def train(self, mode: bool = True) -> ComparisonLearner:
        """Training (`mode`) or eval mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.features.frozen:
            self.features.eval()
        return self

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        *,
        query: Tensor | None = None,
        sample_ids: Any = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> PromptPoolOutput:
        """Logits over the known classes, and with labels the loss; arguments as `PromptPoolModel.forward`.

        Args:
            pixel_values: images [B, 3, H, W].
            labels: class ids [B]; -100 marks padding that counts nowhere.
            query: features of a frozen backbone [B, D], if the caller has them.
            sample_ids: a number per image, the same in every epoch.
            num_items_in_batch: number of images of the whole accumulated batch, a scalar.
            kwargs: go to the backbone.

        Raises:
            ValueError: wrong images, labels of undeclared classes, no class known yet.
        """
        if not self.classes:
            raise ValueError("no class is known yet: call begin_task(classes), or set num_labels")
        check_images(self.features.base, self.features.structure, pixel_values, kwargs)
        learning = self.training and torch.is_grad_enabled()
        columns = None
        if labels is not None:
            check_labels(labels, len(pixel_values))
            columns = self._columns(labels, masked=learning and self.class_mask == "task")
        if learning and columns is not None:
            self._check_ready()
        features = self.read(pixel_values, query, **kwargs)
        taught = self.teach(pixel_values, features, **kwargs) if learning and columns is not None else None
        with torch.autocast(features.device.type, enabled=False):
            logits = self.head(features)
            shown = self.masked(logits) if learning else self.answer(features, logits)
            loss, losses = None, None
            if columns is not None:
                counted = columns >= 0
                if learning:
                    parts = self.loss_parts(Batch(features, logits, columns, counted, sample_ids, taught))
                else:
                    each = F.cross_entropy(shown, columns, reduction="none", ignore_index=IGNORE_INDEX)
                    parts = {"cross_entropy": LossPart(each, "mean")}
                loss, losses = add_up(parts, counted, num_items_in_batch, over_processes=learning)
        return PromptPoolOutput(loss=loss, logits=shown, losses=losses, features=features)

    def read(self, pixel_values: Tensor, query: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Features [B, D] of images, `pixel_values` [B, 3, H, W]; without gradient where the backbone is frozen.

        `query` [B, D] are those of a frozen backbone, if the caller has them; `kwargs` are further inputs of the backbone.

        Raises:
            ValueError: `query` is given, and the backbone is trained.
        """
        if not self.features.frozen:
            if query is not None:
                raise ValueError("query holds features of a frozen backbone, and this one is trained: leave it out")
            return self.features(pixel_values, **kwargs)
        if query is not None:
            check_query(query, len(pixel_values), self.features.width)
            return query.detach().float()
        with torch.no_grad():
            return self.features(pixel_values, **kwargs)

    def features_of(self, batch: Mapping[str, Any]) -> Tensor:
        """Features [B, D] of a `batch` to look at, with `query` if it has one."""
        return self.read(batch["pixel_values"], batch.get("query"))

    def scores(self, features: Tensor) -> Tensor:
        """The head's logits [B, C] of `features` [B, D], in float32 whatever precision is asked for around."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features)

    def cross_entropy(self, batch: Batch) -> LossPart:
        """Cross entropy of a training `batch` over the classes that `class_mask` leaves."""
        each = F.cross_entropy(self.masked(batch.logits), batch.columns, reduction="none", ignore_index=IGNORE_INDEX)
        return LossPart(each, "mean")

    def masked(self, logits: Tensor) -> Tensor:
        """The `logits` [B, C] with -inf at the classes that the cross entropy does not see."""
        return logits.masked_fill(~self.head.current, -math.inf) if self.class_mask == "task" else logits

    def _columns(self, labels: Tensor, *, masked: bool) -> Tensor:
        columns, unknown = self.head.to_columns(labels)
        outside = (columns >= 0) & ~self.head.current[columns.clamp_min(0)] & masked
        wrong = unknown | outside
        if labels.device.type != "cpu":
            self.unknown_labels += wrong.sum()
        elif wrong.any():
            known = self.state.tasks[-1] if masked and self.state.tasks else self.classes
            raise ValueError(
                f"labels {sorted(set(labels[wrong].tolist()))} are of no class that can be learnt now, which are {known}: "
                "see begin_task"
            )
        return torch.where(outside, IGNORE_INDEX, columns)

    def _check_ready(self) -> None:
        if self.num_labels is None and not self.state.task_open:
            raise ValueError("a training forward outside a task: call begin_task(classes) first, or eval()")
        self.link.check_trains(self.named_parameters())
        if self.grown and world_size() > 1:
            check_wrapper(self)
            self.grown = False

    def check_labels(self) -> None:
        """Report labels of undeclared classes that were seen on a device since the last call.

        Raises:
            ValueError: there were some.
        """
        count = int(self.unknown_labels)
        self.unknown_labels.zero_()
        if count:
            raise ValueError(f"{count} labels were of no class that could be learnt then, and ignored: see begin_task")

    # ---- what a trainer asks -----------------------------------------------------------------------------------------

    @property
    def needs_query(self) -> bool:
        """Whether features that were computed once are of use."""
        return self.features.frozen

    @property
    def query_pooling(self) -> str:
        """Which feature is taken."""
        return self.features.pooling

    def get_base_model(self) -> nn.Module:
        """The backbone."""
        return self.features.base

    @property
    def base_model(self) -> ComparisonLearner:
        """Where `cl_prompts.extract_features` finds `extract_features`."""
        return self

    @torch.no_grad()
    def extract_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Features of images, `pixel_values` [B, 3, H, W], as the backbone is now: [B, D] float32, without gradient.

        `kwargs` are further inputs of the backbone.
        """
        return self.features(pixel_values, **kwargs)
