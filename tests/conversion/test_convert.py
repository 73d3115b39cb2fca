"""Checkpoints of other layouts become folders of transformers that compute the same."""

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import DEPTH, GRID, LABELS, PATCH, WIDTH, timm_state
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from cl_prompts import L2PConfig, get_prompt_pool_model
from cl_prompts.cli import main
from cl_prompts.conversion import convert_checkpoint


pytestmark = pytest.mark.by_turns(3)


HEADS = 2
State = dict[str, Tensor]
Write = Callable[[Path], Path]


def timm_forward(state: State, pixels: Tensor, heads: int = HEADS) -> Tensor:
    """timm's vision transformer on its tensors: all tokens after the final norm."""
    x = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2)
    special = torch.cat([state[name] for name in ("cls_token", "dist_token") if name in state], 1).expand(len(x), -1, -1)
    positions = state["pos_embed"]
    if positions.shape[1] == x.shape[1]:
        x = torch.cat([special, x + positions], 1)
    else:
        x = torch.cat([special, x], 1) + positions

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    for n in range(DEPTH):
        name = f"blocks.{n}"
        q, k, v = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        out = linear(f"{name}.attn.proj", attended.transpose(1, 2).flatten(2))
        x = x + out * state.get(f"{name}.ls1.gamma", torch.ones(()))
        out = linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))))
        x = x + out * state.get(f"{name}.ls2.gamma", torch.ones(()))
    return norm("norm", x)


def timm_logits(state: State, pixels: Tensor) -> Tensor:
    tokens = timm_forward(state, pixels)
    logits = F.linear(tokens[:, 0], state["head.weight"], state["head.bias"])
    if "dist_token" not in state:
        return logits
    return (logits + F.linear(tokens[:, 1], state["head_dist.weight"], state["head_dist.bias"])) / 2


def jax_arrays(*, big_vision: bool = False, pre_logits: bool = False) -> dict[str, np.ndarray]:
    """Random arrays by the names and in the shapes of Google's files."""
    head_dim, random = WIDTH // HEADS, np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, WIDTH),
        "embedding/kernel": (PATCH, PATCH, 3, WIDTH),
        "embedding/bias": (WIDTH,),
        "Transformer/posembed_input/pos_embedding": (1, GRID**2 + 1, WIDTH),
        "Transformer/encoder_norm/scale": (WIDTH,),
        "Transformer/encoder_norm/bias": (WIDTH,),
        "head/kernel": (WIDTH, LABELS),
        "head/bias": (LABELS,),
    }
    if pre_logits:
        shapes |= {"pre_logits/kernel": (WIDTH, WIDTH), "pre_logits/bias": (WIDTH,)}
    first, attention, second, mlp = (0, 0, 1, 0) if big_vision else (0, 1, 2, 3)
    for n in range(DEPTH):
        block = f"Transformer/encoderblock_{n}"
        for number in (first, second):
            shapes |= {f"{block}/LayerNorm_{number}/{kind}": (WIDTH,) for kind in ("scale", "bias")}
        for part in ("query", "key", "value"):
            name = f"{block}/MultiHeadDotProductAttention_{attention}/{part}"
            shapes |= {f"{name}/kernel": (WIDTH, HEADS, head_dim), f"{name}/bias": (HEADS, head_dim)}
        name = f"{block}/MultiHeadDotProductAttention_{attention}/out"
        shapes |= {f"{name}/kernel": (HEADS, head_dim, WIDTH), f"{name}/bias": (WIDTH,)}
        for number, (inputs, outputs) in enumerate([(WIDTH, 24), (24, WIDTH)]):
            name = f"{block}/MlpBlock_{mlp}/Dense_{number}"
            shapes |= {f"{name}/kernel": (inputs, outputs), f"{name}/bias": (outputs,)}
    return {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def jax_forward(arrays: dict[str, np.ndarray], pixels: Tensor) -> Tensor:
    """Google's vision transformer on its arrays: all tokens after the final norm."""
    of = {name.split("/", 1)[1] if name.startswith("params/") else name: torch.from_numpy(a) for name, a in arrays.items()}
    big_vision = "Transformer/encoderblock_0/LayerNorm_1/scale" in of
    attention, second, mlp = (0, 1, 0) if big_vision else (1, 2, 3)
    patches = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [B, C, row, column, h, w]
    x = torch.einsum("bcijhw,hwcd->bijd", patches, of["embedding/kernel"]).flatten(1, 2) + of["embedding/bias"]
    x = torch.cat([of["cls"].expand(len(x), -1, -1), x], 1) + of["Transformer/posembed_input/pos_embedding"]

    def norm(name: str, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * of[f"{name}/scale"] + of[f"{name}/bias"]

    for n in range(DEPTH):
        block = f"Transformer/encoderblock_{n}"
        inside, heads = norm(f"{block}/LayerNorm_0", x), f"{block}/MultiHeadDotProductAttention_{attention}"
        q, k, v = (
            torch.einsum("bnd,dhk->bhnk", inside, of[f"{heads}/{part}/kernel"]) + of[f"{heads}/{part}/bias"][:, None]
            for part in ("query", "key", "value")
        )
        weights = torch.einsum("bhnk,bhmk->bhnm", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        x = x + torch.einsum("bhnm,bhmk,hkd->bnd", weights, v, of[f"{heads}/out/kernel"]) + of[f"{heads}/out/bias"]
        first, last = (f"{block}/MlpBlock_{mlp}/Dense_{i}" for i in (0, 1))
        inside = F.gelu(norm(f"{block}/LayerNorm_{second}", x) @ of[f"{first}/kernel"] + of[f"{first}/bias"])
        x = x + inside @ of[f"{last}/kernel"] + of[f"{last}/bias"]
    return norm("Transformer/encoder_norm", x)


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def extra(*names: str) -> State:
    return {name: torch.ones(3) for name in names}


HEADLESS = timm_state(labels=None)
OTHER = timm_state(labels=None, seed=1)
TRAINING = {"epoch": 3, "args": argparse.Namespace(arch="vit_base"), "optimizer": {"state": {0: {"step": torch.ones(())}}}}
# What a file holds, the network meant in it, and the default normalization.
FILES: dict[str, tuple[str, Any, State, str]] = {
    "timm": ("a.safetensors", timm_state(), timm_state(), "half"),
    "timm without head": ("a.pth", HEADLESS, HEADLESS, "imagenet"),
    "timm without bias": ("a.bin", timm_state(bias=False), timm_state(bias=False), "half"),
    "deit": ("a.pth", {"model": timm_state(seed=2)}, timm_state(seed=2), "imagenet"),
    "deit distilled": ("a.safetensors", timm_state(distilled=True), timm_state(distilled=True), "imagenet"),
    "deit III": ("a.safetensors", timm_state(scaled=True), timm_state(scaled=True), "half"),
    "an average": ("a.pth", {"state_dict": OTHER, "state_dict_ema": HEADLESS}, HEADLESS, "imagenet"),
    "dino": (
        "a.pth",
        TRAINING
        | {
            "student": under("module.backbone.", OTHER) | extra("module.head.mlp.0.weight"),
            "teacher": under("backbone.", HEADLESS) | extra("head.mlp.0.weight", "head.last_layer.weight_g"),
        },
        HEADLESS,
        "imagenet",
    ),
    "ibot": (
        "a.pth",
        {"state_dict": HEADLESS | extra("masked_embed", "head.mlp.0.weight", "head.last_layer2.weight_v")},
        HEADLESS,
        "imagenet",
    ),
    "moco v3": (
        "a.pth.tar",
        TRAINING
        | {
            "arch": "vit_base",
            "state_dict": under("module.base_encoder.", HEADLESS | extra("head.0.weight", "head.1.running_mean"))
            | under("module.momentum_encoder.", OTHER)
            | extra("module.predictor.0.weight"),
        },
        HEADLESS,
        "imagenet",
    ),
    "mae": ("a.pth", {"model": HEADLESS | extra("mask_token", "decoder_embed.weight")}, HEADLESS, "imagenet"),
}


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    else:
        torch.save(content, path)
    return path


def loaded(folder: Path, kind: Any = AutoModel) -> Any:
    """The model of a folder. No tensor is left but the classifier's, none is missing but a pooler's."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["mismatched_keys"]
    assert all("pooler" in key for key in info["missing_keys"])
    assert all("classifier" in key for key in info["unexpected_keys"])
    return model.eval()


PIXELS = torch.randn(2, 3, PATCH * GRID, PATCH * GRID, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("layout", FILES)
def test_a_torch_network_computes_the_same(layout: str, tmp_path: Path) -> None:
    name, content, state, normalization = FILES[layout]
    done = convert_checkpoint(write(tmp_path / name, content), tmp_path / "vit", num_heads=HEADS)
    with torch.no_grad():
        tokens = loaded(tmp_path / "vit")(PIXELS).last_hidden_state
        torch.testing.assert_close(tokens, timm_forward(state, PIXELS), atol=1e-5, rtol=1e-5)
        if "head.weight" in state:
            logits = loaded(tmp_path / "vit", AutoModelForImageClassification)(PIXELS).logits
            torch.testing.assert_close(logits, timm_logits(state, PIXELS), atol=1e-5, rtol=1e-5)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    assert list(processor.image_mean) == done.mean == ([0.5] * 3 if normalization == "half" else [0.485, 0.456, 0.406])
    assert done.assumed
    assert dict(processor.size) == {"height": 12, "width": 12}
    assert sorted(path.name for path in (tmp_path / "vit").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
@pytest.mark.parametrize("pre_logits", [False, True])
def test_a_jax_network_computes_the_same(prefix: str, pre_logits: bool, tmp_path: Path) -> None:
    arrays = jax_arrays(big_vision=prefix == "params/", pre_logits=pre_logits)
    source = write(tmp_path / "a.npz", {prefix + name: array for name, array in arrays.items()})
    done = convert_checkpoint(source, tmp_path / "vit")
    with torch.no_grad():
        expected, output = jax_forward(arrays, PIXELS), loaded(tmp_path / "vit")(PIXELS)
        torch.testing.assert_close(output.last_hidden_state, expected, atol=1e-5, rtol=1e-5)
        if pre_logits:  # as transformers' own conversion: without the classifier behind it
            weight, bias = (torch.from_numpy(arrays[f"pre_logits/{kind}"]) for kind in ("kernel", "bias"))
            torch.testing.assert_close(output.pooler_output, (expected[:, 0] @ weight + bias).tanh(), atol=1e-5, rtol=1e-5)
        else:
            logits = loaded(tmp_path / "vit", AutoModelForImageClassification)(PIXELS).logits
            weight, bias = (torch.from_numpy(arrays[f"head/{kind}"]) for kind in ("kernel", "bias"))
            torch.testing.assert_close(logits, expected[:, 0] @ weight + bias, atol=1e-5, rtol=1e-5)
    assert done.mean == [0.5] * 3
    assert done.config.num_attention_heads == HEADS


def test_a_timm_model_computes_the_same(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm imports torchvision, which has no CPU build here")
    for name in ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"):
        model = timm.create_model(name, depth=2, img_size=48, num_classes=7).eval()
        convert_checkpoint(write(tmp_path / f"{name}.safetensors", model.state_dict()), tmp_path / name)
        pixels = torch.randn(2, 3, 48, 48)
        with torch.no_grad():
            logits = loaded(tmp_path / name, AutoModelForImageClassification)(pixels).logits
            torch.testing.assert_close(logits, model(pixels), atol=1e-5, rtol=1e-5)


def test_timm_s_own_config_tells_the_normalization(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", timm_state())
    config = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "interpolation": "bilinear"}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit", "pretrained_cfg": config}))
    done = convert_checkpoint(tmp_path, tmp_path / "vit", num_heads=HEADS)
    assert not done.assumed
    assert done.mean == [0.1, 0.2, 0.3]
    assert AutoImageProcessor.from_pretrained(tmp_path / "vit").resample == 2


@pytest.mark.parametrize(
    ("width", "prefix", "heads"), [(384, "module.base_encoder.", 12), (384, "", 6), (192, "", 3), (1280, "", 16)]
)
def test_heads_by_width(width: int, prefix: str, heads: int, tmp_path: Path) -> None:
    state = timm_state(width=width, labels=None)
    done = convert_checkpoint(write(tmp_path / "a.pth", under(prefix, state)), tmp_path / "vit")
    assert done.config.num_attention_heads == heads


class Code:
    """Asks a reader of pickles to call a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Path.touch, Path("called")), ()


def without(name: str) -> State:
    return {key: tensor for key, tensor in timm_state().items() if key != name}


WRONG: dict[str, tuple[str, Any, str]] = {
    "missing": ("a.pth", without("blocks.1.norm2.bias"), "lacks blocks.1.norm2.bias"),
    "missing block": ("a.pth", {k.replace("blocks.1", "blocks.2"): v for k, v in HEADLESS.items()}, "lacks blocks.1"),
    "left": ("a.pth", timm_state() | extra("blocks.0.attn.strange"), "1 tensors .* such as blocks.0.attn.strange"),
    "shape": ("a.pth", timm_state() | {"norm.bias": torch.ones(3)}, r"norm.bias .* \[3\], expected \[16\]"),
    "dimensions": ("a.pth", timm_state() | {"pos_embed": torch.ones(3)}, "pos_embed .* expected 3 dimensions"),
    "positions": ("a.pth", timm_state() | {"pos_embed": torch.ones(1, 8, WIDTH)}, "8 positions"),
    "channels": ("a.pth", timm_state() | {"patch_embed.proj.weight": torch.ones(WIDTH, 1, 4, 4)}, "takes 1 channels"),
    "registers": ("a.pth", timm_state() | extra("reg_token"), "register tokens"),
    "mean pooling": ("a.pth", without("norm.weight") | extra("fc_norm.weight"), "another pooling"),
    "hybrid": ("a.npz", jax_arrays() | {"conv_root/kernel": np.ones(3)}, "convolutions"),
    "no CLS": ("a.pth", without("cls_token"), "no cls_token"),
    "another network": ("a.pth", {"layer1.0.weight": torch.ones(3)}, "no vision transformer .* 'layer1.0"),
    "several": ("a.pth", under("one.", HEADLESS) | under("two.", OTHER), "under 'one.', 'two.': .*--prefix"),
    "empty": ("a.pth", {"epoch": 3}, "holds no tensors"),
    "code": ("a.pth", {"state_dict": Code()}, "damaged, or no"),
    "code in arrays": ("a.npz", {"cls": np.array([Code()], dtype=object)}, "damaged, or no"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_converted_is_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, content, message = WRONG[case]
    words = ["convert", str(write(tmp_path / name, content)), "vit"]
    assert main(words if case == "hybrid" else [*words, "--num-heads", "2"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_wrong_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = str(write(tmp_path / "a.pth", timm_state())), tmp_path / "vit"
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    (tmp_path / "cut.npz").write_bytes(b"cut")
    for words, message in {
        (source, str(target)): "nor does its width 16: pass --num-heads",
        (source, str(target), "--num-heads", "3"): "does not divide the width 16",
        (source, str(target), "--prefix", "teacher"): "no network has the prefix 'teacher'",
        (source, str(tmp_path)): "exists: name a new folder",
        (source, source): "exists: name a new folder",
        (str(tmp_path / "b.pth"), str(target)): "there is no checkpoint",
        (str(tmp_path), str(target)): "name the checkpoint file",
        (str(tmp_path / "cut.safetensors"), str(target)): "is damaged",
        (str(tmp_path / "cut.npz"), str(target)): "is damaged",
    }.items():
        assert main(["convert", *words]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert message in said
        assert not target.exists()


def test_the_command_makes_a_base_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.pth", {"one": timm_state(), "two": timm_state(seed=1)})
    words = ["convert", str(source), str(tmp_path / "vit"), "--prefix", "two", "--num-heads", "2", "--without-head"]
    assert main([*words, "--normalization", "half"]) == 0
    said = capsys.readouterr().out
    assert "ViTModel: 2 blocks of width 16, 2 heads, patches of 4, images 12x12" in said
    assert "assumed" not in said
    assert "left out: 32 tensors" in said
    base = loaded(tmp_path / "vit")
    torch.testing.assert_close(base(PIXELS)[0], timm_forward(timm_state(seed=1), PIXELS), atol=1e-5, rtol=1e-5)
    model = get_prompt_pool_model(base, L2PConfig(pool_size=3, top_k=1, prompt_length=2))
    model.begin_task([0, 1])
    assert model(pixel_values=PIXELS, labels=torch.tensor([0, 1])).loss.isfinite()
