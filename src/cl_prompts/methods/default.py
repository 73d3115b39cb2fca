"""The config for who does not want to choose a method."""

from __future__ import annotations

from cl_prompts.methods.apt import APTConfig


def default_config() -> APTConfig:
    """APT with a discriminant head: the most accurate learner on held-out images that does not grow with tasks.

    docs/results.md has the comparison. An answer takes one pass. Train it with Adam at a learning rate of 0.02 and without
    gradient clipping. Around each task the head needs `record_features`, `begin_task`, `consolidate` and `end_task`.
    """
    return APTConfig(head="discriminant", loss_head="layer_norm")
