"""Checkpoints of vision transformers from elsewhere, as Hugging Face folders."""

from __future__ import annotations

from cl_prompts.conversion.convert import convert_checkpoint


__all__ = ["convert_checkpoint"]
