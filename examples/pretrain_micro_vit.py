"""Train the micro ViT that ships in `src/cl_prompts/runs/micro_vit`: a 32x32 backbone of 1M parameters for glyphs.

    python examples/pretrain_micro_vit.py --data PATH --output src/cl_prompts/runs/micro_vit

`PATH` is a folder of parquet files with the columns `img` and `label` (gray glyphs, white on black). Every twentieth image
is held out; the accuracy on these is written to the model card. Only the backbone is saved, without the classifier.
"""

import argparse
import time
from pathlib import Path

import kornia.augmentation as K
import torch
from datasets import load_dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel, set_seed


CONFIG = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 384,
}

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [vision, vit, glyphs, continual-learning]
---

# Micro ViT for glyphs

A Vision Transformer of {parameters:,} parameters (6 blocks, width 128, patch 4, input 3x32x32, values (x - 0.5) / 0.5)
that ships with cl_prompts so that its examples and tests run without a network.

- **Made by** `python examples/pretrain_micro_vit.py --data PATH --epochs {epochs} --seed {seed}`
- **Trained on** {images:,} gray glyphs of {classes} classes: Omniglot (MIT) and a copy of notMNIST (MIT as distributed;
  glyphs of third-party fonts)
- **Held-out accuracy** {accuracy:.1f} % over {held_out:,} glyphs, every twentieth image ({seconds:.0f} s on {threads} CPU
  threads)
- **License** Apache-2.0

Do not evaluate it on Omniglot or notMNIST, which it was trained on. It was not trained on natural images.
"""


def load_images(path: str) -> tuple[Tensor, Tensor]:
    """uint8 images [N, 32, 32] and labels [N] of every parquet file in a folder."""
    rows = load_dataset("parquet", data_files=sorted(map(str, Path(path).glob("*.parquet"))), split="train")
    rows = rows.with_format("torch")
    images = torch.stack([image.squeeze() for image in rows["img"]])
    return images, torch.as_tensor(rows["label"])


def to_input(images: Tensor) -> Tensor:
    """uint8 [B, 32, 32] -> float [B, 3, 32, 32] in [-1, 1]."""
    return (images.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


@torch.no_grad()
def accuracy(backbone: ViTModel, classifier: nn.Linear, images: Tensor, labels: Tensor) -> float:
    """Accuracy in percent."""
    backbone.eval()
    hits = 0
    for batch, target in zip(images.split(256), labels.split(256), strict=True):
        hits += int((classifier(backbone(to_input(batch)).last_hidden_state[:, 0]).argmax(1) == target).sum())
    backbone.train()
    return 100 * hits / len(labels)


def main() -> None:
    """Train the backbone, print the accuracy, and save backbone, image processor and model card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", default="src/cl_prompts/runs/micro_vit")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    started = time.perf_counter()
    images, labels = load_images(args.data)
    held = torch.arange(len(images)) % 20 == 0
    test_images, test_labels, images, labels = images[held], labels[held], images[~held], labels[~held]
    classes = int(labels.max()) + 1

    backbone = ViTModel(ViTConfig(**CONFIG), add_pooling_layer=False)
    classifier = nn.Linear(CONFIG["hidden_size"], classes)
    augment = K.AugmentationSequential(
        K.RandomAffine(degrees=15.0, translate=(0.1, 0.1), scale=(0.75, 1.15), shear=10.0, p=1.0),
        K.RandomGaussianBlur((3, 3), (0.3, 1.2), p=0.3),
        data_keys=["input"],
    )
    parameters = [*backbone.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.05)
    steps = args.epochs * (len(images) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.1)

    for epoch in range(args.epochs):
        order = torch.randperm(len(images))
        for index in order[: len(order) // args.batch_size * args.batch_size].split(args.batch_size):
            # Kornia pads with zeros and the background is black, so augment in [0, 1], then scale to [-1, 1].
            batch = augment(images[index].float()[:, None] / 255) * 2 - 1
            with torch.autocast("cpu", torch.bfloat16):
                features = backbone(batch.expand(-1, 3, -1, -1)).last_hidden_state[:, 0]
            loss = F.cross_entropy(classifier(features.float()), labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        held_out = accuracy(backbone, classifier, test_images, test_labels)
        print(f"epoch {epoch + 1}/{args.epochs}  loss {loss:.3f}  held-out {held_out:.1f} %", flush=True)

    output = Path(args.output)
    backbone.eval().save_pretrained(output)
    size = {"height": CONFIG["image_size"], "width": CONFIG["image_size"]}
    ViTImageProcessorPil(size=size).save_pretrained(output)
    card = CARD.format(
        parameters=sum(p.numel() for p in backbone.parameters()),
        epochs=args.epochs,
        seed=args.seed,
        images=len(images),
        classes=classes,
        accuracy=held_out,
        held_out=len(test_images),
        seconds=time.perf_counter() - started,
        threads=torch.get_num_threads(),
    )
    (output / "README.md").write_text(card)


if __name__ == "__main__":
    main()
