"""The downloadable adapter: a zip file that can be unpacked and loaded."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from opening import MICRO_VIT, OpenPool

from cl_prompts.runtime.text import markdown_text
from cl_prompts.sharing.base_models import BASE_FOLDER
from cl_prompts.sharing.card import CARD_FILE, write_card
from cl_prompts.sharing.inspect import describe_adapter
from cl_prompts.storage.declared import CONFIG_FILE


FOLDER, PREFIX = "taught-pool", "lesson-"


def packed(pool: OpenPool, lessons: list[str], place: Path) -> Path:
    """Write a zip file with adapter, card and image processor, and with the base if it is not on the Hub.

    Updates `pool.facts`. The record of the run is left out, because it describes other weights. The zip file of an earlier
    lesson is removed.

    Args:
        pool: the pool to save.
        lessons: a line for the card on each class taught.
        place: folder of the visit; the zip file is written into a new folder in it, so that each has another address.
    """
    with tempfile.TemporaryDirectory(prefix="cl-prompts-download-") as room:
        folder = Path(room, FOLDER)
        pool.model.save_pretrained(folder, image_processor=pool.pipe.image_processor)
        if pool.on_micro_vit:
            config = folder / CONFIG_FILE
            content = json.loads(config.read_text()) | {"base_model_name_or_path": None, "revision": None}
            config.write_text(json.dumps(content, indent=2, sort_keys=True))
            shutil.copytree(MICRO_VIT, folder / BASE_FOLDER)
        said = "\n".join(f"- {markdown_text(lesson)}" for lesson in lessons)
        (folder / CARD_FILE).write_text(f"Taught on a page of cl_prompts:\n\n{said}\n")
        write_card(folder, name=FOLDER)
        pool.facts = describe_adapter(folder) | {"adapter": pool.name}
        pool.taught = True
        older = [file.parent for file in place.glob(f"{PREFIX}*/{FOLDER}.zip")]
        new = tempfile.mkdtemp(prefix=PREFIX, dir=place)
        file = Path(shutil.make_archive(os.path.join(new, FOLDER), "zip", room, FOLDER))
        for old in older:
            shutil.rmtree(old)
        return file
