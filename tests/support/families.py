"""Tiny random models of every supported family, and inputs for them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers as T
from torch import Tensor, nn


SIZES: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
)
TEXT: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
NAFLEX: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, num_patches=16, patch_size=8
)


def siglip_text(cls: Any) -> Any:
    return cls(**TEXT, vocab_size=64, max_position_embeddings=8)


BARE: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: T.ViTModel(T.ViTConfig(**SIZES)),
    "deit": lambda: T.DeiTModel(T.DeiTConfig(**SIZES)),
    "vit_mae": lambda: T.ViTMAEModel(T.ViTMAEConfig(**SIZES)),
    "vit_msn": lambda: T.ViTMSNModel(T.ViTMSNConfig(**SIZES)),
    "ijepa": lambda: T.IJepaModel(T.IJepaConfig(**SIZES)),
    "beit": lambda: T.BeitModel(T.BeitConfig(**SIZES)),
    "beit_relative": lambda: T.BeitModel(T.BeitConfig(**SIZES, use_relative_position_bias=True)),
    "beit_shared": lambda: T.BeitModel(
        T.BeitConfig(**SIZES, use_shared_relative_position_bias=True, use_mean_pooling=False)
    ),
    "dinov2": lambda: T.Dinov2Model(T.Dinov2Config(**SIZES)),
    "dinov2_registers": lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**SIZES)),
    "dinov3": lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**SIZES, num_register_tokens=4)),
    "clip": lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**SIZES)),
    "siglip": lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**SIZES)),
    "siglip2": lambda: T.Siglip2VisionModel(T.Siglip2VisionConfig(**NAFLEX)),
}

CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: T.ViTForImageClassification(T.ViTConfig(**SIZES, num_labels=5)),
    "deit": lambda: T.DeiTForImageClassification(T.DeiTConfig(**SIZES, num_labels=5)),
    "deit_teacher": lambda: T.DeiTForImageClassificationWithTeacher(T.DeiTConfig(**SIZES, num_labels=5)),
    "vit_msn": lambda: T.ViTMSNForImageClassification(T.ViTMSNConfig(**SIZES, num_labels=5)),
    "ijepa": lambda: T.IJepaForImageClassification(T.IJepaConfig(**SIZES, num_labels=5)),
    "beit": lambda: T.BeitForImageClassification(T.BeitConfig(**SIZES, num_labels=5)),
    "dinov2": lambda: T.Dinov2ForImageClassification(T.Dinov2Config(**SIZES, num_labels=5)),
    "dinov2_registers": lambda: T.Dinov2WithRegistersForImageClassification(
        T.Dinov2WithRegistersConfig(**SIZES, num_labels=5)
    ),
    "clip": lambda: T.CLIPForImageClassification(T.CLIPConfig(vision_config=SIZES, text_config=TEXT, num_labels=5)),
    "siglip": lambda: T.SiglipForImageClassification(T.SiglipConfig(vision_config=SIZES, text_config=TEXT, num_labels=5)),
    "siglip2": lambda: T.Siglip2ForImageClassification(
        T.Siglip2Config(vision_config=NAFLEX, text_config=TEXT, num_labels=5)
    ),
}


def build(name: str, *, classifier: bool = False, attention: str = "sdpa", seed: int = 0) -> Any:
    """A family's model in eval mode, with random weights so large that attention is far from uniform."""
    torch.manual_seed(seed)
    model: Any = (CLASSIFIERS if classifier else BARE)[name]()
    model.set_attn_implementation(attention)
    return randomized(model)


def randomized(model: Any) -> Any:
    """A model in eval mode, with random weights so large that attention is far from uniform."""
    with torch.no_grad():
        for name_, parameter in model.named_parameters():
            if "lambda" in name_:  # layer scales start near zero and would hide every change
                parameter.fill_(1.0)
            noise = torch.randn_like(parameter)
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.eval()


def inputs(name: str, batch: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of a forward."""
    generator = torch.Generator().manual_seed(seed)
    if name.startswith("siglip2"):
        return {
            "pixel_values": torch.randn(batch, 16, 192, generator=generator),
            "pixel_attention_mask": torch.ones(batch, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * batch),
        }
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}


def with_noise(name: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs with the masking model's random numbers fixed."""
    if name != "vit_mae":
        return values
    generator = torch.Generator().manual_seed(1)
    return {**values, "noise": torch.rand(len(values["pixel_values"]), 16, generator=generator)}


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of a base model's output."""
    values = output.to_tuple()
    values = [part for v in values for part in (v if isinstance(v, tuple) else (v,))]
    return [copy.copy(v) for v in values if isinstance(v, Tensor)]
