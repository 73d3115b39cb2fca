"""Hidden states behind the blocks below the lowest prompt, which a caller may keep and pass to later forwards."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cl_prompts.backbones.input_checks import check_arguments, check_images
from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.tuner.adapter import PoolAdapter


class LowerBlocks:
    """Methods of a model with prompts about the blocks that prompts do not reach."""

    backbone: PromptedBackbone
    adapter: Any

    @property
    def num_lower_blocks(self) -> int:
        """Number of blocks below the lowest prompt, whose output depends on the image only; 0 if one of them is trained."""
        pool = self.adapter.pool
        return self.backbone.unprompted_blocks(min(pool.layers, default=0))

    def extract_lower_blocks(self, pixel_values: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The un-prompted pass, with what its lower blocks compute.

        Args:
            pixel_values: images [B, 3, H, W].
            kwargs: further inputs of the base.

        Returns:
            The features of `extract_features`, [B, D] float32; and the hidden states behind the lower blocks [B, N, D],
            which the forward takes as `lower_blocks` in place of running them. None if there are no such blocks, or their
            output is not one tensor. Both are without gradient.

        Raises:
            ValueError: the images do not fit the base.
        """
        adapter: PoolAdapter = self.adapter
        backbone = self.backbone
        check_arguments(backbone.model, kwargs)
        kwargs = adapter.base_arguments | kwargs
        check_images(backbone.model, backbone.structure, pixel_values, kwargs)
        given = {"pixel_values": pixel_values, **kwargs}
        features, reuse = backbone.features((), given, adapter.query_pooling, keep_below=self.num_lower_blocks)
        hidden = None if reuse is None else reuse.lower_blocks
        return features, hidden if isinstance(hidden, Tensor) and hidden.dim() == 3 else None
