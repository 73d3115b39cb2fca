"""Base repositories of strangers on the Hub: each is refused in a line, or answers as the base in it does.

Nothing is fetched but config, safetensors and image processor, as the Hub's log shows.
"""

import json
import pickle
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from support.hostile_bench import check_told
from support.hostile_files import Bomb
from support.hostile_watch import peak_memory
from support.hub_pools import small
from support.hub_server import Hub
from support.hub_storage import Commit, Repo, StoredFile
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from cl_prompts import PromptPoolPipeline


CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PROCESSOR = "preprocessor_config.json"
ALLOWED = re.compile(r"(config|preprocessor_config|model\.safetensors\.index)\.json|[\w.-]+\.safetensors")
OF_ADAPTERS = {"adapter_config.json", "adapter_model.safetensors", PROCESSOR}
SECONDS, BYTES = 2, 200 * 2**20
IMAGE = Image.linear_gradient("L").convert("RGB")

Files = dict[str, bytes]
Change = Callable[[Files], Any]


class Good(NamedTuple):
    """The files of a base with its image processor, those of an adapter, and what the adapter answers."""

    base: Files
    adapter: Files
    answer: Any


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    base, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16)
    config.patch_size = 8
    ViTModel(config).save_pretrained(base)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(base)
    model = small(ViTModel.from_pretrained(base))
    model.save_pretrained(adapter)
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (base, adapter)]
    return Good(*files, PromptPoolPipeline(model, ViTImageProcessorPil.from_pretrained(base))(IMAGE))


def put(hub: Hub, repo_id: str, files: Files) -> None:
    repo = Repo(repo_id)
    commit = Commit({name: StoredFile(content) for name, content in files.items()})
    repo.refs["main"] = repo.commits[commit.id] = commit
    hub.store.repos[repo_id] = repo


def with_config(**values: Any) -> Change:
    def change(files: Files) -> None:
        files[CONFIG] = json.dumps(json.loads(files[CONFIG]) | values).encode()

    return change


def with_file(name: str, content: Any, without: tuple[str, ...] = ()) -> Change:
    def change(files: Files) -> None:
        files[name] = content if isinstance(content, bytes) else json.dumps(content).encode()
        for gone in without:
            del files[gone]

    return change


def with_processor(**values: Any) -> Change:
    return lambda files: files.update({PROCESSOR: json.dumps(json.loads(files[PROCESSOR]) | values).encode()})


def with_lora(**values: Any) -> Change:
    lora = {"peft_type": "LORA", "base_model_name_or_path": "evil/second", "target_modules": ["query"], "r": 2} | values

    def change(files: Files) -> None:
        files["adapter_config.json"] = json.dumps(lora).encode()
        files["adapter_model.bin"] = pickle.dumps(Bomb(Path("mark")))

    return change


def all_of(*changes: Change) -> Change:
    def change(files: Files) -> None:
        for one in changes:
            one(files)

    return change


def without(*names: str) -> Change:
    return lambda files: [files.pop(name) for name in names]


def in_shards(*names: str) -> Change:
    def change(files: Files) -> None:
        files[INDEX] = json.dumps({"weight_map": {f"{number}": name for number, name in enumerate(names)}}).encode()
        files["part-1.safetensors"] = files.pop(WEIGHTS)

    return change


def wider(files: Files) -> None:
    """One tensor of the weights has more rows than the config says."""
    tensors = load(files[WEIGHTS])
    tensors["layernorm.weight"] = torch.ones(64)
    files[WEIGHTS] = save(tensors)


def renamed(name: str) -> Change:
    """A tensor that the model does not have; transformers prints the names of such tensors."""
    return lambda files: files.update({WEIGHTS: save(load(files[WEIGHTS]) | {name: torch.ones(1)})})


def header(length: int, text: bytes) -> Change:
    return with_file(WEIGHTS, struct.pack("<Q", length) + text)


SWIN = {"model_type": "swin", "architectures": ["SwinModel"]}
LOADS = None  # what stands beside the base is ignored
VARIANTS: dict[str, tuple[Change, str | None]] = {
    "a LoRA whose pattern backtracks": (with_lora(target_modules="(([a-z0-9._])+)+!"), LOADS),
    "a LoRA of 8 GB": (with_lora(r=20_000_000), LOADS),
    "a LoRA alone": (all_of(with_lora(), without(CONFIG, WEIGHTS)), "it has no config.json"),
    "a LoRA on a folder of the machine": (
        all_of(with_lora(base_model_name_or_path="/etc"), without(CONFIG)),
        "it has no config.json",
    ),
    "a LoRA beside a config": (all_of(with_lora(), without(WEIGHTS)), "it has no model.safetensors"),
    "a pickle": (with_file("pytorch_model.bin", pickle.dumps(Bomb(Path("mark"))), (WEIGHTS,)), "a pickle is never loaded"),
    "code": (all_of(with_config(auto_map={"AutoModel": "mine.Mine"}), with_file("mine.py", b"raise SystemExit")), LOADS),
    "code of an unknown type": (
        with_config(auto_map={"AutoConfig": "mine.Mine"}, model_type="mine"),
        "no model type `mine`",
    ),
    "other files": (with_file("generation_config.json", b" " * 2**22), LOADS),
    "a processor of another file": (
        with_file("processor_config.json", {"image_processor": {"image_processor_type": "X"}}),
        LOADS,
    ),
    "processor code": (with_processor(auto_map={"AutoImageProcessor": "mine.Mine"}), LOADS),
    "a processor that is none": (with_processor(image_processor_type="AutoModel"), "'AutoModel' is no image processor"),
    "a padded processor": (with_file(PROCESSOR, b" " * 2**22), "has 4,194,304 bytes, more than the limit of 1,048,576"),
    "no processor": (without(PROCESSOR), "no image processor in"),
    "a byte-order mark": (lambda files: files.update({CONFIG: b"\xef\xbb\xbf" + files[CONFIG]}), LOADS),
    "a padded config": (
        lambda files: files.update({CONFIG: files[CONFIG] + b" " * 2**25}),
        "more than the limit of 4,194,304",
    ),
    "no JSON": (with_file(CONFIG, b"\x00\xff"), "truncated or no JSON"),
    "a list": (with_file(CONFIG, b"[1]"), "holds no JSON object"),
    "brackets": (with_file(CONFIG, b'{"a": ' + b"[" * 2**21), "truncated or no JSON"),
    "lists": (with_file(CONFIG, b'{"a": [' + b"[]," * 2**20 + b"[]]}"), "more than 300,000 entries"),
    "levels": (with_config(a=json.loads("[" * 50 + "]" * 50)), "nested more than 10 levels"),
    "a type that is none": (with_config(model_type=["vit"]), "no model type"),
    "labels": (with_config(num_labels=10**9, id2label=None), "1,000,000,000 labels, more than 100,000"),
    "blocks": (with_config(num_hidden_layers=10**7), "10,000,000 blocks, more than 1,000"),
    "more blocks than tensors": (with_config(num_hidden_layers=999), "999 blocks, more than 40 tensors of its weights"),
    "stages": (with_config(**SWIN, depths=[10**9], num_heads=[2]), "1,000,000,000 blocks"),
    "stages in a part": (with_config(vision_config={"depths": [999, 999]}), "1,998 blocks"),
    "width": (with_config(hidden_size=10**9), "implies"),
    "depth of a block": (
        with_config(intermediate_size=10**8),
        "describes a model of [0-9,]+ numbers, its weights hold 24,576",
    ),
    "positions": (with_config(image_size=2**20, patch_size=1), "implies"),
    "a number beyond all": (with_config(hidden_size=10**400), "has hidden_size="),
    "other weights": (wider, r"has shape \[64\] in its weights, its config implies \[32\]"),
    "a tensor's name on the screen": (renamed("\x1b[31m\nred"), r"a tensor named '\\x1b\[31m\\nred'"),
    "a tensor's long name": (renamed("x" * 9999), "a tensor named 'xxx"),
    "a quantizer": (with_config(quantization_config={"quant_method": "gptq"}), "has quantization_config="),
    "patched classes": (with_config(fusion_config={"patch_embeddings": True}), "has fusion_config="),
    "another model": (with_config(model_type="dpt", backbone="evil/second"), "has backbone='evil/second'"),
    "another model of timm": (
        with_config(model_type="timm_wrapper", architecture="hf-hub:evil/second"),
        "names 'hf-hub:evil/second', which is elsewhere",
    ),
    "kernels": (with_config(attn_implementation="evil/kernel"), "attention 'evil/kernel' from the Hub"),
    "kernels of a part": (
        with_config(attn_implementation={"vision_config": "evil/kernel"}),
        "attention 'evil/kernel' from the Hub",
    ),
    "kernels of transformers": (with_config(attn_implementation="flash_attention_2"), LOADS),
    "a type of no number": (with_config(dtype="load"), "dtype='load', which is no floating type"),
    "weights that the config names": (with_config(transformers_weights="adapter_model.bin"), LOADS),
    "a plan of patterns": (with_config(base_model_tp_plan={"(([a-z])+)+!": "colwise"}), LOADS),
    "shards": (in_shards("part-1.safetensors"), LOADS),
    "shards elsewhere": (in_shards("../../second/resolve/main/x.safetensors"), "does not name 1 to 1,000 safetensors"),
    "shards that are pickles": (in_shards("part-1.bin"), "does not name 1 to 1,000 safetensors"),
    "many shards": (in_shards(*(f"{n}.safetensors" for n in range(1001))), "does not name 1 to 1,000 safetensors"),
    "shards that are not there": (in_shards("part-1.safetensors", "x.safetensors"), r"it has no \['x.safetensors'\]"),
    "no shards": (all_of(with_file(INDEX, {"weight_map": 3}), without(WEIGHTS)), "does not name 1 to 1,000 safetensors"),
    "a header of 3 MB": (header(3 * 2**20, b"{" + b" " * 3 * 2**20), "has a header of 3,145,728 bytes"),
    "a header of exabytes": (header(2**62, b"{}"), "truncated or no safetensors file"),
    "a tensor that is not there": (
        header(61, b'{"x":{"dtype":"F32","shape":[999],"data_offsets":[0,3996]}}  '),
        "truncated or no safetensors file",
    ),
    "no tensors": (header(2, b"{}"), "more than 0 tensors of its weights"),
}


# A base that the adapter brings along takes the same way after its place is known.
CASES = [(name, False) for name in VARIANTS] + [(name, True) for name in list(VARIANTS)[::4]]


@pytest.mark.by_turns(3)
@pytest.mark.parametrize(("name", "brought"), CASES, ids=[f"{name}{' along' * brought}" for name, brought in CASES])
def test_a_hostile_base_repository(
    hub: Hub, good: Good, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, brought: bool
) -> None:
    change, message = VARIANTS[name]
    base, adapter = dict(good.base), dict(good.adapter)
    change(base)
    content = json.loads(adapter["adapter_config.json"])
    content["base_model_name_or_path"] = None if brought else "evil/base"
    adapter["adapter_config.json"] = json.dumps(content).encode()
    put(hub, "evil/pool", adapter | ({f"base/{file}": data for file, data in base.items()} if brought else {}))
    put(hub, "evil/base", base)
    put(hub, "evil/second", good.base)
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    with peak_memory() as peak:
        if message is None:
            pipe = PromptPoolPipeline.from_pretrained("evil/pool")
            assert pipe(IMAGE) == good.answer
        else:
            missing = "names no base model" if brought and CONFIG not in base else message
            with pytest.raises((ValueError, OSError), match=missing) as told:
                PromptPoolPipeline.from_pretrained("evil/pool")
            check_told(told.value)
    seconds, grown = time.process_time() - start, peak()
    print(f"{seconds:.2f} s, {grown / 2**20:.0f} MB")
    assert seconds < SECONDS
    assert grown < BYTES
    assert not list(tmp_path.iterdir())
    check_log(hub, brought)


def check_log(hub: Hub, brought: bool) -> None:
    """Only files of the two repositories, under names that are on the list."""
    assert len(hub.log) > 3
    for method, path in hub.log:
        found = re.fullmatch(r"/(evil/pool|evil/base)/resolve/[^/]+/(base/)?(.+)", path)
        assert found is not None, path
        assert method in ("GET", "HEAD"), path
        if found[1] == "evil/pool" and not found[2]:
            assert found[3] in OF_ADAPTERS, path
        else:
            assert ALLOWED.fullmatch(found[3]), path
            assert not found[3].startswith("adapter"), path
            assert (found[1] == "evil/pool") == brought, path
