"""What a prompt learner measures: how novel an image is, and how well the newest drift was followed."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from cl_prompts.outputs import PromptPoolOutput
from cl_prompts.runtime.gathered import gather_statistics
from cl_prompts.tuner.adapter import PoolAdapter


class MeasuresAPI:
    """Statistics of a task's images, novelty of images and R^2 of the drift map, of the active adapter."""

    def gather_statistics(self) -> None:
        """Sum over processes what each has counted in the current task. All processes must call it.

        `end_task`, `consolidate` and `evaluate` do it. In your own loop on several processes, call it before the model is
        saved (`accelerator.save_state`) or answers within a task. With one process it does nothing.
        """
        gather_statistics(self._adapter)

    @property
    def needs_task(self) -> bool:
        """False: a prompt learner answers over all known classes."""
        return False

    @property
    def novelty_threshold(self) -> float | None:
        """Novelty beyond which an image is taken for none of the known classes; None if it is unknown.

        A share `false_alarm_rate` of held-out training images exceeds it; `consolidate` chooses it.
        """
        return self._adapter.config.state.novelty_threshold

    @property
    def drift_explained(self) -> float | None:
        """R^2 of the newest drift map on held-out images of the newest task; None without a map. Not saved.

        1: the map explains how the task changed their features. 0: no better than leaving the statistics of old classes as
        they were.
        """
        classifier = self._adapter.classifier
        return None if classifier is None else classifier.drift_explained

    @torch.no_grad()
    def novelty(self, output: PromptPoolOutput) -> Tensor:
        """How unlike the known classes images are. High: probably of none of them.

        The discriminant head compares features with the class means (1 - the largest cosine where the pooled covariance is
        the identity); other heads give the energy of their logits.

        Args:
            output: of a forward in eval mode. With `adapter_names`, each image's novelty is that of its own adapter.

        Returns:
            float32 [B]; only differences, and the comparison with the adapter's `novelty_threshold`, have a meaning.

        Raises:
            ValueError: the adapters of a batch read features of different widths, which one output cannot hold.
        """
        features, logits, names = output.features, output.logits, output.adapter_names
        if features is None and names is not None:
            raise ValueError(
                f"the features of adapters {sorted(set(names))} differ in width: ask for the novelty of one adapter at a "
                "time, after set_adapter(name)"
            )
        assert features is not None
        assert logits is not None
        with torch.autocast(features.device.type, enabled=False):
            if names is None:
                return self._adapter.novelty(features, logits)
            novelty = features.new_empty(len(names))
            for name in dict.fromkeys(names):
                rows = torch.tensor([row for row, own in enumerate(names) if own == name], device=features.device)
                adapter = cast(PoolAdapter, self._adapters[name])
                novelty[rows] = adapter.novelty(features[rows], logits[rows, : len(adapter.classes)])
            return novelty

    @property
    def _adapters(self) -> nn.ModuleDict:
        """All adapters by name."""
        adapters: nn.ModuleDict = self.pools.prompt_pool  # type: ignore[attr-defined]  # of the tuner
        return adapters

    @property
    def _adapter(self) -> PoolAdapter:
        adapter: PoolAdapter = self.adapter  # type: ignore[attr-defined]  # of `TaskAPI`
        return adapter
