"""What PEFT promises its users, row by row, for our string-typed method; run before a bound on PEFT is raised.

Several adapters, `modules_to_save` and torch's own tools: test_peft_adapters.py.
"""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from packaging.version import Version
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from support.adapters import LEARNED, METHODS, heads, learn, logits, methods, trainable, trained
from support.families import build
from support.paths import TESTS
from torch.testing import assert_close
from transformers.integrations.peft import MIN_PEFT_VERSION

from cl_prompts import (
    AutoPromptPoolModel,
    HashPromptConfig,
    L2PConfig,
    PromptPoolConfig,
    PromptPoolModel,
    PromptPoolOutput,
    get_prompt_pool_model,
)
from cl_prompts.runtime.after_import import call_after_import
from cl_prompts.tuner.tuner import PromptPoolTuner


pytestmark = pytest.mark.by_turns(3, always=())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Folders of a saved tiny ViT, bare and with a head: Auto classes load them without a network."""
    folder = tmp_path_factory.mktemp("bases")
    for classifier in (False, True):
        build("vit", classifier=classifier).save_pretrained(folder / str(classifier))
    return {classifier: folder / str(classifier) for classifier in (False, True)}


def load_base(bases: dict[bool, Path], classifier: bool = False) -> Any:
    return (T.ViTForImageClassification if classifier else T.ViTModel).from_pretrained(bases[classifier])


# ---- one behaviour, whoever wraps -----------------------------------------------------------------------------------


@heads
@methods
def test_plain_peft_model_learns_as_ours(method: str, classifier: bool) -> None:
    models = []
    for wrap in (get_peft_model, get_prompt_pool_model):
        torch.manual_seed(3)
        models.append(wrap(build("vit", classifier=classifier), METHODS[method]()))
    plain, ours = models
    assert type(plain) is PeftModel
    assert type(ours) is PromptPoolModel
    for task, classes in enumerate(([7, 3], [1, 5])):
        outputs = []
        for model in models:
            torch.manual_seed(task)  # new rows of the head are random
            outputs.append(learn(model, classes, seed=task))
        for a, b in zip(*outputs, strict=True):
            assert type(a) is type(b) is PromptPoolOutput
            assert torch.equal(a.loss, b.loss)
            assert torch.equal(a.logits, b.logits)
            assert a.losses.keys() == b.losses.keys()
            assert all(torch.equal(a.losses[part], b.losses[part]) for part in a.losses)
            assert_close(sum(a.losses.values()), a.loss)
        grads, expected = ({n: p.grad for n, p in trainable(m).items()} for m in models)
        assert {n.partition(".default.")[2] for n in grads} == LEARNED[method]
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert grad.abs().sum() > 0, name
            assert torch.equal(grad, expected[name]), name
    assert torch.equal(logits(plain), logits(ours))
    assert plain.classes == ours.classes == [7, 3, 1, 5]
    for model in models:
        base = [p for n, p in model.named_parameters() if ".prompt_pool." not in n]
        assert base
        assert all(p.grad is None and not p.requires_grad for p in base)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saver", [PeftModel, PromptPoolModel])
@heads
@methods
def test_saved_by_either_loads_with_all(
    method: str, classifier: bool, saver: type, bases: dict[bool, Path], tmp_path: Path
) -> None:
    model = trained(load_base(bases, classifier), method)
    expected, names = logits(model), trainable(model).keys()
    saver.save_pretrained(model, tmp_path / "adapter")
    card = {"README.md"} if saver is PromptPoolModel else set()
    files = {"adapter_config.json", "adapter_model.safetensors"} | card
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == files
    path = str(tmp_path / "adapter")
    for loader, kind in (
        (PeftModel, PeftModel),
        (PromptPoolModel, PromptPoolModel),
        (AutoPeftModel, PeftModel),
        (AutoPromptPoolModel, PromptPoolModel),
    ):
        for is_trainable in (False, True):
            base = [] if "Auto" in loader.__name__ else [load_base(bases, classifier)]
            loaded = loader.from_pretrained(*base, path, is_trainable=is_trainable)
            assert type(loaded) is kind
            assert type(loaded.get_base_model()) is type(model.get_base_model())
            assert loaded.classes == [7, 3, 1, 5]
            assert torch.equal(logits(loaded), expected)
            assert trainable(loaded).keys() == (names if is_trainable else set())
            if is_trainable:
                learn(loaded, [4, 2], seed=2)
                assert loaded.classes == [7, 3, 1, 5, 4, 2]
                assert all(p.grad is not None and p.grad.any() for p in trainable(loaded).values())


@methods
def test_low_memory_load(method: str, tmp_path: Path) -> None:
    model = trained(build("vit"), method)
    model.save_pretrained(tmp_path)
    for kind in (PeftModel, PromptPoolModel):
        loaded = kind.from_pretrained(build("vit"), str(tmp_path), low_cpu_mem_usage=True)
        assert torch.equal(logits(loaded), logits(model))


PEFT_FIRST = """
from peft import AutoPeftModel
try:
    AutoPeftModel.from_pretrained(str(folder / "l2p"))
except KeyError as error:
    assert error.args == ("PROMPT_POOL",), error
else:
    raise AssertionError("loaded without the import")
import cl_prompts
"""
OURS_FIRST = """
import cl_prompts
assert not {"torch", "transformers", "peft", "numpy", "huggingface_hub"} & set(sys.modules)
from peft import AutoPeftModel
"""
THREADS_FIRST = """
import cl_prompts
from concurrent.futures import ThreadPoolExecutor
sys.setswitchinterval(1e-5)
with ThreadPoolExecutor(8) as threads:
    found = list(threads.map(lambda name: getattr(cl_prompts, name), cl_prompts.__all__))
assert {*cl_prompts.__all__} < {*dir(cl_prompts)}
from peft import AutoPeftModel
"""
LOADS = """
import torch
from support.families import inputs
for method in ("l2p", "hash"):
    for auto in (AutoPeftModel, cl_prompts.AutoPromptPoolModel):
        with torch.no_grad():
            logits = auto.from_pretrained(str(folder / method)).eval()(**inputs("vit", seed=99)).logits
        assert torch.equal(logits, torch.load(folder / f"{method}.pt")), method
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", [PEFT_FIRST, OURS_FIRST, THREADS_FIRST], ids=["peft", "cl_prompts", "threads"])
def test_fresh_process_needs_the_import(first: str, bases: dict[bool, Path], tmp_path: Path) -> None:
    """In either order; `import cl_prompts` itself imports none of the libraries."""
    for method in ("l2p", "hash"):
        model = trained(load_base(bases), method)
        model.save_pretrained(tmp_path / method)
        torch.save(logits(model), tmp_path / f"{method}.pt")
    script = "import sys\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n" + first + LOADS
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_failed_import_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function is called once, after the import that succeeds."""
    (tmp_path / "late_package.py").write_text("import os\nif 'LATE' not in os.environ:\n    raise ImportError('not yet')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("LATE", raising=False)
    called: list[bool] = []
    call_after_import("late_package", lambda: called.append("late_package" in sys.modules))
    with pytest.raises(ImportError, match="not yet"):
        importlib.import_module("late_package")
    assert not called
    monkeypatch.setenv("LATE", "1")
    module = importlib.import_module("late_package")
    importlib.reload(module)
    assert called == [True]
    assert inspect.getsource(module).startswith("import os")
    call_after_import("late_package", lambda: called.append(False))
    assert called == [True, False]
    monkeypatch.delitem(sys.modules, "late_package")


# ---- configs --------------------------------------------------------------------------------------------------------


def test_method_chooses_the_config_class() -> None:
    assert PromptPoolConfig(method="l2p", pool_size=7) == L2PConfig(pool_size=7)
    assert type(PromptPoolConfig(method="hash", layers=[2])) is HashPromptConfig
    with pytest.raises(ValueError, match=r"unknown method 'l3p': choose one of \['apt', .*'l2p', .*\]"):
        PromptPoolConfig(method="l3p")
    with pytest.raises(TypeError, match="layers"):
        L2PConfig(layers=[0])


@methods
def test_unknown_key_drops_no_other(method: str, tmp_path: Path) -> None:
    config = METHODS[method](max_adapter_bytes=12345678, strict_base=True, verify=False, class_mask="none")
    model = get_prompt_pool_model(build("vit"), config)
    model.begin_task([4, 2])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    assert not {"max_adapter_bytes", "strict_base", "verify"} & set(values)
    file.write_text(json.dumps({**values, "from_the_future": 1, "verify": False}))
    for kind in (PeftConfig, PromptPoolConfig, type(config)):
        with pytest.warns(UserWarning, match=r"unknown fields \['from_the_future', 'verify'\]"):
            read = kind.from_pretrained(str(tmp_path))
        assert type(read) is type(config)
        assert (read.pool_size, read.class_mask, read.state.tasks) == (7, "none", [[4, 2]])
        assert read.to_dict() == values
        assert (read.max_adapter_bytes, read.strict_base, read.verify) == (8 * 2**30, False, True)
    other = HashPromptConfig if method == "l2p" else L2PConfig
    with (
        pytest.warns(UserWarning, match="unknown fields"),
        pytest.raises(ValueError, match=f"holds a {type(config).__name__}"),
    ):
        other.from_pretrained(str(tmp_path))


@methods
def test_models_of_one_config_share_no_state(method: str) -> None:
    config = METHODS[method]()
    one, two = (wrap(build("vit"), config) for wrap in (get_prompt_pool_model, get_peft_model))
    one.begin_task([1])
    assert (one.classes, two.classes, config.state.tasks) == ([1], [], [])
    two.begin_task([2, 3])
    one.add_adapter("other", config)
    assert (one.classes, two.classes, config.state.tasks) == ([1], [2, 3], [])
    one.set_adapter("other")
    assert one.classes == []


# ---- refused --------------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    model = trained(build("vit"), "l2p")
    with pytest.raises(TypeError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="safe_serialization=False would write a pickle"):
        model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert not (tmp_path / "pickle").exists()
    base = build("vit")
    with pytest.raises(ValueError, match="use `get_peft_model` instead"):
        peft.inject_adapter_in_model(L2PConfig(), base)
    too_old = Version(peft.__version__) < Version(MIN_PEFT_VERSION)  # for transformers, which says so first
    with pytest.raises(ValueError, match="is not compatible" if too_old else "use `get_peft_model` instead"):
        base.add_adapter(L2PConfig())
    assert all(p.requires_grad for p in base.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_a_tuner_without_a_model_is_refused() -> None:
    """As `inject_adapter_in_model` of PEFT before 0.21 makes it; later versions refuse by themselves."""
    base = build("vit")
    with pytest.raises(ValueError, match="use `get_peft_model` instead"):
        PromptPoolTuner(base, L2PConfig(), "default")
    assert all(p.requires_grad for p in base.parameters())
