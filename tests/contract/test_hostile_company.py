"""Hostile files around an adapter: the base model that it names, the results beside it, the card that is there."""

import contextlib
import io
import json
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.closed_form_models import answers
from support.hostile_bench import check_told, edited, in_state, original
from support.hostile_cards import CARD_DAMAGES
from support.hostile_files import CONFIG, Bomb
from support.hostile_watch import PLANTED, bounded, planted
from support.make_adapter_fixtures import NEWEST, images_of

from cl_prompts import AutoPromptPoolModel
from cl_prompts.cli import main
from cl_prompts.continual import AccuracyMatrix
from cl_prompts.sharing.card import CARD_FILE, write_card
from cl_prompts.sharing.run_record import RESULTS_FILE, RunRecord


# ---- the base that an adapter names


def base_with(**values: Any) -> Callable[[Path, Path], Any]:
    """Other values in the base's config."""

    def act(adapter: Path, base: Path) -> None:
        content = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(content | values))

    return act


def adapter_with(**values: Any) -> Callable[[Path, Path], Any]:
    def act(adapter: Path, base: Path) -> None:
        content = json.loads((adapter / CONFIG).read_text())
        (adapter / CONFIG).write_text(json.dumps(content | values))

    return act


def named(kind: Any) -> Callable[[Path, Path], Any]:
    return adapter_with(auto_mapping={"base_model_class": kind, "parent_library": PLANTED})


def pickled_base(adapter: Path, base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(base.parent / "mark")))


REMOTE = {"auto_map": {"AutoModel": f"{PLANTED}.Planted", "AutoConfig": f"{PLANTED}.Planted"}}
BASES: dict[str, tuple[Callable[[Path, Path], Any], str | None]] = {
    "remote code beside a known type": (base_with(**REMOTE), None),
    "remote code of an unknown type": (
        base_with(**REMOTE, model_type="mine"),
        r"no model type `mine`; custom code is never run",
    ),
    "unknown type": (base_with(model_type="mine"), r"cannot be loaded \(.*no model type `mine`"),
    "class of nobody": (named("os.system"), r"base class 'os.system', which transformers does not have"),
    "module": (named(PLANTED), rf"base class '{PLANTED}', which transformers does not have"),
    "attribute": (named("__class__"), r"base class '__class__', which transformers does not have"),
    "function": (named("pipeline"), r"base class 'pipeline', which transformers does not have"),
    "abstract class": (named("PreTrainedModel"), r"its class PreTrainedModel is not made for a ViTConfig"),
    "other class": (named("GPT2Model"), r"its class GPT2Model is not made for a ViTConfig"),
    "towers": (named("RagModel"), r"its class RagModel is not made for a ViTConfig"),
    "missing library": (named("TimmBackbone"), r"its class TimmBackbone is not made for a ViTConfig"),
    "number": (named(3), r"base class 3, which transformers does not have"),
    "own class": (named("ViTForImageClassification"), None),
    "a path up": (
        adapter_with(base_model_name_or_path="../../../etc/passwd"),
        r"base '../../../etc/passwd' that .* cannot",
    ),
    "a file": (adapter_with(base_model_name_or_path="/etc/passwd"), r"base '/etc/passwd' that the adapter names cannot be"),
    "control": (adapter_with(base_model_name_or_path="a\0\x1b[31m\nb"), r"base 'a\\x00\\x1b\[31m\\nb' that the adapter"),
    "wide": (base_with(hidden_size=10**9, intermediate_size=10**9), r"cannot be loaded"),
    "deep": (base_with(num_hidden_layers=10**7), r"its config has 10,000,000 blocks, more than 1,000"),
    "kernel": (base_with(attn_implementation="someone/kernel"), r"asks for the attention 'someone/kernel' from the Hub"),
    "act": (base_with(hidden_act="os.system"), r"cannot be loaded \('os.system'\)"),
    "pickle": (pickled_base, r"cannot be loaded \(.*model.safetensors"),
}


@pytest.mark.parametrize("name", BASES)
def test_hostile_bases(tmp_path: Path, name: str) -> None:
    """Nothing of them is run, and no message is longer than a line."""
    change, message = BASES[name]
    base = Path(shutil.copytree(NEWEST / "base", tmp_path / "base"))
    adapter = edited("vpt", tmp_path, lambda config: config.update(base_model_name_or_path=str(base), auto_mapping=None))
    change(adapter, base)
    with planted(tmp_path), bounded(room=2**31):
        shutil.copy(tmp_path / f"{PLANTED}.py", base)
        if message is None:
            model = AutoPromptPoolModel.from_pretrained(adapter)
            assert torch.equal(answers(model, images_of(NEWEST)[:2]), original("vpt").logits)
        else:
            with pytest.raises((ValueError, OSError), match=message) as told:
                AutoPromptPoolModel.from_pretrained(adapter)
            check_told(told.value)


# ---- cards and results


def run_cards(count: int, room: Path) -> Counter[str]:
    """Cards written over hostile ones, from hostile results; and `inspect`."""
    seen, folder = Counter[str](), room / "adapter"
    matrix = AccuracyMatrix()
    matrix.add([90.0], [10])
    matrix.add([80.0, 70.0], [10, 20])
    edited("l2p", room, lambda config: None)
    checksum = json.loads((folder / CONFIG).read_text())["state"]["weights_sha256"]
    RunRecord({"l2p": matrix, "floor": matrix}, data="x", datasets=["a/b"], command="run").save(folder, checksum)
    results, config = (json.loads((folder / name).read_text()) for name in (RESULTS_FILE, CONFIG))

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def one(data: st.DataObject) -> None:
        damage = data.draw(st.sampled_from(CARD_DAMAGES))
        found = damage(data.draw, json.loads(json.dumps(results)), json.loads(json.dumps(config)))
        for name, content in {
            RESULTS_FILE: json.dumps(results),
            CONFIG: json.dumps(config),
            CARD_FILE: "",
            **found,
        }.items():
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        seen.update([damage.__name__])
        with bounded():
            for name in ("someone/pool", None):
                try:
                    write_card(folder, name=name)
                    seen.update(["written"])
                except (ValueError, OSError) as error:
                    check_told(error)
                    seen.update(["refused"])
            out, complaint = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(complaint):
                code = main(["inspect", str(folder)])
        assert all(line.isprintable() for line in out.getvalue().splitlines())
        assert len(complaint.getvalue().splitlines()) == (code != 0)

    with planted(room):
        one()
    return seen


def test_cards_and_results(tmp_path: Path) -> None:
    seen = run_cards(40, tmp_path)
    assert min(seen["written"], seen["refused"]) > 5


@pytest.mark.slow
def test_a_thousand_cards_and_results(tmp_path: Path) -> None:
    seen = run_cards(1000, tmp_path)
    assert min(seen["written"], seen["refused"], *(seen[damage.__name__] for damage in CARD_DAMAGES)) > 50


NESTED = "a: " + "[" * 30_000
ALIASES = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)) + "tags: [*a59, *a58]"


FOR_EVER = {
    "nested": NESTED,
    "aliases": ALIASES,
    "block": "a: " + "- " * 30_000,
    "long": "a: b\n" * 10**5,
    "large": "x" * 2**21,
}


@pytest.mark.parametrize("head", FOR_EVER.values(), ids=FOR_EVER)
def test_cards_that_would_take_for_ever(tmp_path: Path, head: str) -> None:
    folder = edited("vpt", tmp_path, lambda config: None)
    (folder / CARD_FILE).write_text(f"---\n{head}\n---\n# A card\n")
    with (
        bounded(),
        pytest.raises(ValueError, match=r"README.md is no card that can be kept \(.*\): mend its metadata") as told,
    ):
        write_card(folder)
    check_told(told.value)


def test_a_card_with_what_no_text_file_can_hold(tmp_path: Path) -> None:
    folder = edited("vpt", tmp_path, in_state(class_names={"4": "\ud800", "1": "a\nb"}))
    write_card(folder)
    assert "1. ?, a" in (folder / CARD_FILE).read_text()
    assert os.fspath(tmp_path) not in (folder / CARD_FILE).read_text()
