"""The PEFT tuner for prompt pools: adapters, tasks, the forward."""

from cl_prompts.tuner.tuner import PromptPoolTuner


__all__ = ["PromptPoolTuner"]
