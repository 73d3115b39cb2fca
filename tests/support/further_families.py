"""Tiny random models of the families of `docs/families.md` that `families.py` has not: one row of the matrix each."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support.families import SIZES, TEXT, randomized


VIDEO = {"num_frames": 4}
PAIRS: dict[str, Any] = SIZES | {"image_size": [32, 32], "patch_size": [8, 8]}


def tower(family: str, model: str, config: str, **options: Any) -> Callable[[], Any]:
    """Builds a model of a module that transformers does not export at its top."""

    def build() -> Any:
        modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}", exc_type=ImportError)
        configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
        return getattr(modeling, model)(getattr(configuration, config)(**SIZES | options))

    return build


def data2vec(**options: Any) -> Callable[[], Any]:
    def build() -> Any:
        from transformers import Data2VecVisionConfig, Data2VecVisionModel

        return Data2VecVisionModel(Data2VecVisionConfig(**SIZES, **options))

    return build


def metaclip_classifier() -> Any:
    from transformers import MetaClip2Config, MetaClip2ForImageClassification

    return MetaClip2ForImageClassification(MetaClip2Config(vision_config=SIZES, text_config=TEXT, num_labels=5))


FURTHER: dict[str, Callable[[], Any]] = {
    "aimv2": tower("aimv2", "Aimv2VisionModel", "Aimv2VisionConfig"),
    "altclip": tower("altclip", "AltCLIPVisionModel", "AltCLIPVisionConfig"),
    "blip": tower("blip", "BlipVisionModel", "BlipVisionConfig"),
    "blip_2": tower("blip_2", "Blip2VisionModel", "Blip2VisionConfig"),
    "chinese_clip": tower("chinese_clip", "ChineseCLIPVisionModel", "ChineseCLIPVisionConfig"),
    "clipseg": tower("clipseg", "CLIPSegVisionModel", "CLIPSegVisionConfig"),
    "data2vec": data2vec(),
    "data2vec_relative": data2vec(use_relative_position_bias=True),
    "dpt": tower("dpt", "DPTModel", "DPTConfig", backbone_out_indices=[0, 1, 2, 2]),
    "flava": tower("flava", "FlavaImageModel", "FlavaImageConfig"),
    "git": tower("git", "GitVisionModel", "GitVisionConfig"),
    "granite_docling": tower("granite_docling", "GraniteDoclingVisionModel", "GraniteDoclingVisionConfig"),
    "idefics2": tower("idefics2", "Idefics2VisionTransformer", "Idefics2VisionConfig"),
    "idefics3": tower("idefics3", "Idefics3VisionTransformer", "Idefics3VisionConfig"),
    "instructblip": tower("instructblip", "InstructBlipVisionModel", "InstructBlipVisionConfig"),
    "instructblipvideo": tower("instructblipvideo", "InstructBlipVideoVisionModel", "InstructBlipVideoVisionConfig"),
    "internvl": tower("internvl", "InternVLVisionModel", "InternVLVisionConfig", image_size=[32, 32], patch_size=[8, 8]),
    "janus": tower("janus", "JanusVisionModel", "JanusVisionConfig"),
    "kosmos2": tower("kosmos2", "Kosmos2VisionModel", "Kosmos2VisionConfig"),
    "metaclip_2": tower("metaclip_2", "MetaClip2VisionModel", "MetaClip2VisionConfig"),
    "metaclip_2_classifier": metaclip_classifier,
    "mgp_str": tower(
        "mgp_str",
        "MgpstrForSceneTextRecognition",
        "MgpstrConfig",
        **PAIRS | {"num_bpe_labels": 8, "num_wordpiece_labels": 8},
    ),
    "mlcd": tower("mlcd", "MLCDVisionModel", "MLCDVisionConfig"),
    "ovis2": tower("ovis2", "Ovis2VisionModel", "Ovis2VisionConfig"),
    "owlv2": tower("owlv2", "Owlv2VisionModel", "Owlv2VisionConfig"),
    "owlvit": tower("owlvit", "OwlViTVisionModel", "OwlViTVisionConfig"),
    "pixio": tower("pixio", "PixioModel", "PixioConfig"),
    "qianfan_ocr": tower("qianfan_ocr", "QianfanOCRVisionModel", "QianfanOCRVisionConfig", **PAIRS),
    "radio": tower("radio", "RadioModel", "RadioConfig"),
    "sapiens2": tower("sapiens2", "Sapiens2Model", "Sapiens2Config"),
    "smolvlm": tower("smolvlm", "SmolVLMVisionTransformer", "SmolVLMVisionConfig"),
    "tipsv2": tower("tipsv2", "Tipsv2VisionModel", "Tipsv2VisionConfig"),
    "videomae": tower("videomae", "VideoMAEModel", "VideoMAEConfig", **VIDEO),
    "vitpose": tower("vitpose_backbone", "VitPoseBackbone", "VitPoseBackboneConfig", **PAIRS),
    "vivit": tower("vivit", "VivitModel", "VivitConfig", **VIDEO, tubelet_size=[2, 8, 8]),
    "yolos": tower(
        *("yolos", "YolosModel", "YolosConfig"),
        **{"image_size": [32, 32], "num_detection_tokens": 3, "use_mid_position_embeddings": False},
    ),
}


# Attention runs in windows. Grids of 8x8 and 4x4 patches: windows of 3 are filled up, and every second block is shifted.
WINDOWS: dict[str, Any] = dict(
    image_size=32, patch_size=4, embed_dim=16, depths=[1, 3], num_heads=[2, 4], window_size=3, mlp_ratio=2.0
)
WINDOWED = {
    "swin": ("swin.{}_swin", "Swin"),
    "swinv2": ("swinv2.{}_swinv2", "Swinv2"),
    "donut": ("donut.{}_donut_swin", "DonutSwin"),
    "maskformer": ("maskformer.{}_maskformer_swin", "MaskFormerSwin"),
}


def windowed(name: str, **options: Any) -> Any:
    """An untrained model of a family of `WINDOWED`."""
    module, prefix = WINDOWED[name]
    config, model = (
        importlib.import_module(f"transformers.models.{module.format(p)}") for p in ("configuration", "modeling")
    )
    return getattr(model, f"{prefix}Model")(getattr(config, f"{prefix}Config")(**WINDOWS | options))


def build_further(name: str, seed: int = 0) -> Any:
    """A family's model in eval mode, with random weights so large that attention is far from uniform."""
    torch.manual_seed(seed)
    return randomized(windowed(name) if name in WINDOWED else FURTHER[name]())


def further_inputs(name: str, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of a forward: images, or videos of four frames."""
    shape = (batch, 4, 3, 32, 32) if name in ("videomae", "vivit") else (batch, 3, 32, 32)
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


# What docs/families.md calls them.
TITLES = {
    "aimv2": "AIMv2",
    "altclip": "AltCLIP",
    "blip": "BLIP",
    "blip_2": "BLIP-2",
    "chinese_clip": "Chinese-CLIP",
    "clipseg": "CLIPSeg",
    "data2vec": "Data2Vec",
    "data2vec_relative": "Data2Vec, relative positions",
    "donut": "Donut's Swin, last stage",
    "dpt": "DPT",
    "flava": "FLAVA",
    "git": "GIT",
    "granite_docling": "Granite Docling",
    "idefics2": "Idefics2",
    "idefics3": "Idefics3",
    "instructblip": "InstructBLIP",
    "instructblipvideo": "InstructBLIP video (images)",
    "internvl": "InternVL",
    "janus": "Janus",
    "kosmos2": "KOSMOS-2",
    "maskformer": "MaskFormer's Swin, last stage",
    "metaclip_2": "MetaCLIP 2",
    "metaclip_2_classifier": "MetaCLIP 2, classifier",
    "mgp_str": "MGP-STR",
    "mlcd": "MLCD",
    "ovis2": "Ovis2",
    "owlv2": "OWLv2",
    "owlvit": "OWL-ViT",
    "pixio": "Pixio",
    "qianfan_ocr": "Qianfan-OCR, mean pooling",
    "radio": "RADIO",
    "sapiens2": "Sapiens2, equal heads",
    "smolvlm": "SmolVLM",
    "swin": "Swin, last stage",
    "swinv2": "Swin v2, last stage",
    "tipsv2": "TIPSv2",
    "videomae": "VideoMAE (videos)",
    "vitpose": "ViTPose backbone",
    "vivit": "ViViT (videos)",
    "yolos": "YOLOS, no position embeddings between blocks",
}
