"""Draws docs/images/numbers.png: the first training images of the main job.

python docs/figures/digit_rows.py
"""

from pathlib import Path

from PIL import Image

from cl_prompts.runs.images import load_image_data


COUNT, SCALE, GAP = 12, 2, 4


def main() -> None:
    """Write the picture."""
    rows = load_image_data("numbers", None, None, 0.0, 0).train["image"][:COUNT]
    side = SCALE * rows[0].width
    picture = Image.new("L", (COUNT * (side + GAP) - GAP, side), 255)
    for place, image in enumerate(rows):
        picture.paste(image.resize((side, side), Image.Resampling.NEAREST), (place * (side + GAP), 0))
    picture.save(Path(__file__).parents[1] / "images" / "numbers.png", optimize=True)


if __name__ == "__main__":
    main()
