"""Checks of config fields. Every error is a ValueError that names the field, its value and the values allowed."""

from __future__ import annotations

from typing import Any

from cl_prompts.runtime.text import short_repr


LARGEST = 1e30  # of a number that tensors are multiplied with; float32 ends at 3.4e38


def choice(config: Any, name: str, options: tuple[str, ...]) -> None:
    """The field `name` is one of `options`."""
    if getattr(config, name) not in options:
        raise ValueError(f"{name}={short_repr(getattr(config, name))}: choose one of {list(options)}")


def positive(config: Any, *names: str) -> None:
    """The fields are integers of at least 1."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value < 2**63:
            raise ValueError(f"{name}={short_repr(value)} must be an integer of at least 1 (and below 2**63)")


def flag(config: Any, *names: str) -> None:
    """The fields are True or False."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name}={short_repr(getattr(config, name))} must be True or False")


def kind(config: Any, expected: type, called: str, *names: str) -> None:
    """The fields are None or of the type `expected`, which a message calls `called`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not isinstance(value, expected):
            raise ValueError(f"{name}={short_repr(value)} must be {called} or None")


def not_negative(config: Any, *names: str) -> None:
    """The fields are numbers from 0 to `LARGEST`."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LARGEST:
            raise ValueError(f"{name}={short_repr(value)} must be a finite number of at least 0 (and at most {LARGEST:g})")


def positive_number(config: Any, *names: str, smallest: float = 1 / LARGEST, largest: float = LARGEST) -> None:
    """The fields are numbers above 0, from `smallest` to `largest`."""
    not_negative(config, *names)
    for name in names:
        value = getattr(config, name)
        if value == 0:
            raise ValueError(f"{name}=0 must be larger than 0")
        if not smallest <= value <= largest:
            raise ValueError(f"{name}={short_repr(value)} must be from {smallest:g} to {largest:g}")


def share(config: Any, *names: str) -> None:
    """The fields are weights: numbers from 0 to 1."""
    not_negative(config, *names)
    for name in names:
        if getattr(config, name) > 1:
            raise ValueError(f"{name}={getattr(config, name)!r} is a weight: choose a number from 0 to 1")


def scales_logits(config: Any, *names: str) -> None:
    """The fields multiply or divide logits: numbers above 0 for which the logits stay finite in float32."""
    positive_number(config, *names, smallest=1e-6, largest=1e6)


def check_top_k(config: Any) -> None:
    """`top_k` is at most `pool_size`."""
    if config.top_k > config.pool_size:
        raise ValueError(f"top_k={config.top_k} is larger than pool_size={config.pool_size}: choose at most all prompts")


def check_layers(config: Any, *names: str, empty: bool = False) -> None:
    """The fields are lists of different block numbers; they may be `empty`. They are sorted in place."""
    for name in names or ("layers",):
        layers = getattr(config, name)
        numbers = isinstance(layers, (list, tuple)) and all(type(i) is int and i >= 0 for i in layers)
        if not numbers or not (layers or empty):
            raise ValueError(f"{name}={short_repr(layers)} must be a list of block numbers, counted from 0")
        if len(set(layers)) != len(layers):
            raise ValueError(f"{name}={short_repr(layers)} names a block twice")
        setattr(config, name, sorted(layers))


def no_prompt_readout(config: Any) -> None:
    """`readout` is not "prompt", for methods without prompt tokens behind the last block."""
    if config.readout == "prompt":
        raise ValueError(
            f'readout="prompt" needs prompt tokens that pass all blocks; {config.method} has none here: use "auto"'
        )


def splits_in_two(config: Any, *names: str) -> None:
    """The lengths are even, so that they can be split into keys and values."""
    for name in names:
        if getattr(config, name) % 2:
            raise ValueError(f"{name}={getattr(config, name)} cannot be split into keys and values: use an even number")
