"""Converted checkpoints equal the models of timm that load them, where timm can be imported: also with prompts inside."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from conversion.test_convert import FILES, HEADS, PIXELS, jax_arrays, write
from support.checkpoints import DEPTH, GRID, LABELS, PATCH, WIDTH
from support.oracles import random_prefixes, run
from torch.testing import assert_close

from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.conversion import convert_checkpoint


pytest.importorskip("timm", reason="timm cannot be imported, for example without torchvision", exc_type=ImportError)
SIZES = {"img_size": PATCH * GRID, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
ARCHITECTURES = {"deit distilled": "deit_tiny_distilled_patch16_224", "deit III": "deit3_small_patch16_224"}
JAX: dict[str, dict[str, bool]] = {"jax": {}, "big_vision": {"big_vision": True}}


def of_timm(layout: str, path: Path) -> Any:
    """A checkpoint is written to `path`; the model of timm with its weights, in transformers' wrapper."""
    arguments: dict[str, Any] = SIZES | {"mlp_ratio": 24 / WIDTH}
    state: dict[str, Any] = {} if layout in JAX else FILES[layout][2]
    if state and "blocks.0.attn.qkv.bias" not in state:
        arguments["qkv_bias"] = False
    architecture = ARCHITECTURES.get(layout, "vit_tiny_patch16_224")
    labels = LABELS if layout in JAX or "head.weight" in state else 0
    config = T.TimmWrapperConfig(architecture=architecture, model_args=arguments, num_labels=labels)
    wrapper = (T.TimmWrapperForImageClassification if labels else T.TimmWrapperModel)(config)
    if layout in JAX:
        arrays = jax_arrays(**JAX[layout])
        if layout == "big_vision":
            positions = arrays.pop("Transformer/posembed_input/pos_embedding")
            arrays = {f"params/{name}": array for name, array in {**arrays, "pos_embedding": positions}.items()}
        np.savez(path, **arrays)
        wrapper.timm_model.load_pretrained(str(path))
    else:
        write(path, FILES[layout][1])
        wrapper.timm_model.load_state_dict(state)
    return wrapper.eval()


@torch.no_grad()
@pytest.mark.parametrize("layout", [*FILES, *JAX])
def test_a_converted_checkpoint_equals_timms_model(layout: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.npz" if layout in JAX else FILES[layout][0])
    wrapper = of_timm(layout, path)
    convert_checkpoint(path, tmp_path / "vit", num_heads=HEADS)
    kind = T.AutoConfig.from_pretrained(tmp_path / "vit").architectures[0]
    model = getattr(T, kind).from_pretrained(tmp_path / "vit").eval()
    outputs = model(PIXELS), wrapper(PIXELS)
    name = "last_hidden_state" if wrapper.config.num_labels == 0 else "logits"
    assert_close(outputs[0][name], outputs[1][name], atol=1e-5, rtol=0)

    values, tokens = {"pixel_values": PIXELS}, torch.randn(2, 4, WIDTH)
    prefixes = dict(enumerate(random_prefixes(wrapper, 2).values()))
    backbones = PromptedBackbone(model), PromptedBackbone(wrapper)
    plain = run(backbones[0], values)
    for planned in ({"tokens": tokens, "token_index": 1}, {"prefixes": prefixes}):
        found, expected = (run(backbone, values, **planned) for backbone in backbones)
        assert_close(found, expected, atol=1e-5, rtol=1e-5)  # before the final norm
        assert (found - plain).abs().max() > 1e-3
