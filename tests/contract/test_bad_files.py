"""Damaged, foreign and hostile files, one by one: what each error says; base and adapters stay as they were.

Thousands more: test_hostile_files.py.
"""

import json
import pickle
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.base_condition import condition
from support.families import SIZES, build
from support.hostile_files import CONFIG, WEIGHTS, Bomb
from test_bad_input import IMAGES, STATES, learner
from torch import Tensor

from cl_prompts import HashPromptConfig, L2PConfig, PromptPoolConfig, PromptPoolModel


pytestmark = pytest.mark.by_turns(3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    torch.manual_seed(0)
    model = learner()
    model.end_task()
    model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def edited(saved: Path, room: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    folder = copied(saved, room)
    edit_config(folder, change)
    return folder


def copied(saved: Path, room: Path) -> Path:
    return Path(shutil.copytree(saved, room / "bad", dirs_exist_ok=True))


def truncate(length: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])


def rewrite(change: Callable[[dict[str, Tensor]], Any], *, checksum: bool = False) -> Callable[[Path], Any]:
    """Other tensors, with the checksum taken out of the config unless it shall be compared."""

    def act(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
        if not checksum:
            edit_config(folder, lambda config: config["state"].update(weights_sha256=None))

    return act


def in_config(**values: Any) -> Callable[[Path], Any]:
    return lambda folder: edit_config(folder, lambda config: config.update(values))


def in_state(**values: Any) -> Callable[[Path], Any]:
    return lambda folder: edit_config(folder, lambda config: config["state"].update(values))


def text(content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / CONFIG).write_bytes(content)


def fill(value: float) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: next(t for n, t in tensors.items() if "head.weight" in n)[0, 0].fill_(value)


def flip(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"prompts": Bomb(folder / "mark")}, folder / "adapter_model.bin")


NO_FIT = r"adapter_model.safetensors does not fit its config: missing .*Are both files from the same save\?"
BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{f"cut at {n}": (truncate(n), r"safetensors is truncated or no safetensors") for n in (0, 7, 8, 99, -1, -4096)},
    "text": (lambda f: (f / WEIGHTS).write_text("<html>"), r"is truncated or no safetensors file .*: fetch or save it"),
    "foreign": (
        lambda f: save_file({"a": torch.zeros(1)}, f / WEIGHTS),
        NO_FIT + r"|unexpected|has \d+ classes, but no tensor in",
    ),
    "one more": (rewrite(lambda t: t.update(extra=torch.zeros(1))), r"missing \[\], unexpected \['extra'\]"),
    "one less": (rewrite(lambda t: t.popitem()), NO_FIT),
    "other shape": (
        in_config(pool_size=20),
        r"is (F32|I64).*10.* in adapter_model.safetensors, the config implies torch.*20.*are both files from the same save",
    ),
    "flipped": (flip, r"checksum of .*safetensors does not match `weights_sha256`.*Fetch it again, or pass verify=False"),
    "changed": (rewrite(fill(7), checksum=True), r"checksum of .* does not match"),
    "nan": (rewrite(fill(float("nan"))), r"head.weight holds NaN or Inf: .*diverged; lower its learning rate"),
    "inf": (rewrite(fill(-float("inf"))), r"head.weight holds NaN or Inf"),
    "no config": (lambda f: (f / CONFIG).unlink(), r"no adapter_config.json in .*bad: name a folder written by"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"no adapter_model.safetensors in .*bad: name a folder written by"),
    "pickle": (pickled, r"holds adapter_model.bin, a pickle, which is never loaded: save as adapter_model.safetensors"),
    "cut config": (lambda f: (f / CONFIG).write_text('{"a"'), r"adapter_config.json is truncated or no JSON .*: fetch"),
    "deep config": (text(b"[" * 10**5), r"adapter_config.json is truncated or no JSON"),
    "binary config": (text(b"\xff\xfe\x00"), r"adapter_config.json is truncated or no JSON"),
    "list config": (text(b"[]"), r"adapter_config.json holds no JSON object: fetch or save it again"),
    "lora": (in_config(peft_type="LORA"), r"has peft_type 'LORA', not 'PROMPT_POOL': it is no prompt pool; load it with"),
    "other method": (in_config(method="magic"), r"unknown method 'magic': choose one of"),
    "modules": (in_config(modules_to_save=["layernorm"]), NO_FIT),
    "no modules": (in_config(modules_to_save=["layers"]), r"modules_to_save cannot be applied to modules of type"),
    "width": (in_state(base_width=64), r"made for a base of width 64, this one has 32: load it on the base it was"),
    "depth": (in_state(base_layers=12), r"made for a base of number of blocks 12, this one has 3: load it on"),
    "heads": (in_state(base_heads=8), r"made for a base of number of heads 8, this one has 4: load it on"),
    **{f"state {number}": (in_state(**state), message) for number, (state, message) in enumerate(STATES)},
}


@pytest.mark.by_turns(5)
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_failed_load_leaves_the_base_as_it_was(saved: Path, tmp_path: Path, name: str) -> None:
    damage, message = BAD_FILES[name]
    folder, base = copied(saved, tmp_path), build("vit").train()
    damage(folder)
    base.embeddings.cls_token.requires_grad_(False)
    base.layernorm.eval()
    before = condition(base)
    with pytest.raises((ValueError, TypeError), match=message):
        PromptPoolModel.from_pretrained(base, folder)
    assert condition(base) == before
    assert not (folder / "mark").exists()
    expected = PromptPoolModel.from_pretrained(build("vit"), saved)(IMAGES).logits
    assert torch.equal(PromptPoolModel.from_pretrained(base, saved)(IMAGES).logits, expected)


@pytest.mark.by_turns(5)
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_failed_load_adapter_leaves_the_model_as_it_was(saved: Path, tmp_path: Path, name: str) -> None:
    damage, message = BAD_FILES[name]
    folder = copied(saved, tmp_path)
    damage(folder)
    model = learner().eval()
    expected, parameters = model(IMAGES).logits, [(n, p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises((ValueError, TypeError), match=message):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(IMAGES).logits, expected)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == parameters
    model.load_adapter(saved, "second")
    model.set_adapter("second")
    assert torch.equal(model(IMAGES).logits, PromptPoolModel.from_pretrained(build("vit"), saved)(IMAGES).logits)


def test_the_pickle_would_have_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_without_verify_a_flipped_bit_is_loaded(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    flip(folder)
    model = PromptPoolModel.from_pretrained(build("vit"), folder, verify=False)
    found = load_file(folder / WEIGHTS)["base_model.pools.prompt_pool.pool.prompts"]
    assert torch.equal(model.base_model.adapter.pool.prompts, found)


@pytest.mark.parametrize(("size", "what"), [({"hidden_size": 64}, "width 32"), ({"num_hidden_layers": 2}, "blocks 3")])
def test_a_base_of_another_shape(saved: Path, size: dict[str, int], what: str) -> None:
    base = T.ViTModel(T.ViTConfig(**{**SIZES, **size}))
    with pytest.raises(ValueError, match=rf"the adapter was made for a base of .*{what}, this one has \d+: load it on"):
        PromptPoolModel.from_pretrained(base, saved)


def test_a_base_of_other_weights(saved: Path) -> None:
    made_for = json.loads((saved / CONFIG).read_text())["state"]["base_fingerprint"][:12]
    message = rf"trained on a base with fingerprint {made_for}, this one has [0-9a-f]{{12}}: same shape, other weights"
    with pytest.warns(UserWarning, match=message + r"\. Load .*, or expect worse answers"):
        PromptPoolModel.from_pretrained(build("vit", seed=1), saved)
    base = build("vit", seed=1)
    before = condition(base)
    with pytest.raises(ValueError, match=message):
        PromptPoolModel.from_pretrained(base, saved, strict_base=True)
    assert condition(base) == before
    PromptPoolModel.from_pretrained(build("vit"), saved, strict_base=True)


# ---- sizes


def peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("size", [10**9, 10**17, 2**63 - 1])
@pytest.mark.parametrize("field", ["pool_size", "prompt_length", "num_labels"])
def test_enormous_adapters_are_refused_before_memory_is_allocated(
    saved: Path, tmp_path: Path, field: str, size: int
) -> None:
    folder = edited(saved, tmp_path, lambda config: config.update({field: size, "class_mask": "none"}))
    if field == "num_labels":
        edit_config(folder, lambda config: config["state"].update(tasks=[]))
    base, start, peak = build("vit"), time.monotonic(), peak_memory()
    message = r"implies .* bytes of tensors, more than max_adapter_bytes=8,589,934,592: raise that limit|impossible size"
    with pytest.raises(ValueError, match=message):
        PromptPoolModel.from_pretrained(base, folder)
    assert time.monotonic() - start < 5
    assert peak_memory() - peak < 64 * 2**20


def test_the_limit_on_bytes_is_the_callers(saved: Path, tmp_path: Path) -> None:
    """This one would fit into memory; nothing is allocated to find out how large it is."""
    folder, peak = edited(saved, tmp_path, lambda config: config.update(pool_size=10**6)), peak_memory()
    with pytest.raises(ValueError, match=r"implies 776,[\d,]+ bytes of tensors, more than max_adapter_bytes=10,000:"):
        PromptPoolModel.from_pretrained(build("vit"), folder, max_adapter_bytes=10_000)
    assert peak_memory() - peak < 64 * 2**20


# ---- anything at all


ANYTHING = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


FIELDS = {"l2p": sorted(L2PConfig().to_dict()), "hash": sorted(HashPromptConfig().to_dict())}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.sampled_from(["uniform", "none", "batch", "power", "cls", 4, 0.5, [0, 1], {"tasks": [[0]]}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@ANYTHING
@given(method=st.sampled_from(sorted(FIELDS)), data=st.data())
def test_any_json_is_refused_or_survives_a_save(saved: Path, tmp_path: Path, method: str, data: st.DataObject) -> None:
    name, value = data.draw(st.sampled_from(FIELDS[method])), data.draw(JSON)
    folder = copied(saved, tmp_path)
    written = PromptPoolConfig(method=method).to_dict() | {name: value}
    (folder / CONFIG).write_text(json.dumps(written))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = PromptPoolConfig.from_pretrained(folder)
        except (ValueError, TypeError):
            return
        config.save_pretrained(folder)
        again = PromptPoolConfig.from_pretrained(folder)
    again.state.weights_sha256 = config.state.weights_sha256  # that of the file
    assert again == config
