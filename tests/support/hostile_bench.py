"""Where hostile adapters are loaded: bases that are used again and again, and what must be as it was afterwards."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_prompts import PromptPoolModel
from cl_prompts.storage.integrity import CLASSES_SUFFIX, digest
from support.base_condition import condition
from support.closed_form_models import answers
from support.hostile_files import CONFIG, WEIGHTS, Case
from support.make_adapter_fixtures import NEWEST, base_of, fixture_of, images_of


LONGEST = 2000  # characters of a message; paths of pytest's folders are long
Change = Callable[[dict[str, Any]], Any]


@cache
def contents(method: str) -> tuple[str, bytes]:
    folder = fixture_of(NEWEST, method)
    return (folder / CONFIG).read_text(), (folder / WEIGHTS).read_bytes()


class Loaded(NamedTuple):
    """An adapter, told by its logits and the checksum of its tensors."""

    logits: Tensor
    sha256: str

    def same_as(self, other: "Loaded") -> bool:
        return self.sha256 == other.sha256 and torch.equal(self.logits, other.logits)


class Bench:
    """One base for all loads, and one with an adapter beside which others are loaded."""

    def __init__(self) -> None:
        self.images = images_of(NEWEST)[:2]
        self.base, self.other = base_of(NEWEST), base_of(NEWEST)
        self.load(fixture_of(NEWEST, "vpt"))  # freezes it
        self.model = PromptPoolModel.from_pretrained(self.other, fixture_of(NEWEST, "vpt"))
        self.untouched, self.answer = self.seen(), answers(self.model, self.images)

    def seen(self) -> Any:
        names = [name for name, _ in self.model.named_parameters()]
        return condition(self.base), condition(self.other), names, list(self.model.peft_config)

    def load(self, folder: Path, *, beside: bool = False, verify: bool = True) -> Loaded:
        """What the adapter in a folder is and answers; base and model are given back as they were."""
        if not beside:
            model = PromptPoolModel.from_pretrained(self.base, folder, verify=verify)
            try:
                return self._of(model)
            finally:
                model.unload()
        self.model.load_adapter(folder, "second")
        try:
            self.model.set_adapter("second")
            return self._of(self.model)
        finally:
            self.model.delete_adapter("second")
            self.model.set_adapter("default", inference_mode=True)

    def _of(self, model: Any) -> Loaded:
        # The classes in a state dict are those of the config, which some cases change on purpose.
        tensors = {n: t for n, t in model.adapter.state_dict().items() if n != CLASSES_SUFFIX}
        return Loaded(answers(model, self.images), digest(tensors.items()))


@cache
def original(method: str) -> Loaded:
    return _for_originals().load(fixture_of(NEWEST, method))


@cache
def _for_originals() -> Bench:
    return Bench()


def check_told(error: Exception) -> None:
    """One line that a person can read."""
    text = str(error)
    assert 10 < len(text) < LONGEST, text[:LONGEST]
    assert "\n" not in text
    assert text.isprintable(), ascii(text)


def edited(method: str, room: Path, change: Change) -> Path:
    config, weights = contents(method)
    case = Case(json.loads(config), weights, {}, room / "mark")
    change(case.config)
    case.write(room / "adapter")
    return room / "adapter"


def in_state(**values: Any) -> Change:
    return lambda config: config["state"].update(values)
