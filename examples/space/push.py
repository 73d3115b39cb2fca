"""Assemble the page as a self-contained folder, and push it to the Hub as a Space.

    python examples/space/push.py me/my-space             # to the Hub, with the token of `hf auth login`
    python examples/space/push.py --folder build/space    # only to a folder

A Space needs a copy of the library next to app.py; the micro ViT is part of it.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi


HERE = Path(__file__).resolve().parent
LIBRARY = HERE.parent.parent / "src" / "cl_prompts"
GENERATED = ("__pycache__", ".*")
# Of this folder; the library has a push.py of its own.
NOT_OF_THE_SPACE = ("push.py", "make_digits.py", "make_photographs.py")


def assemble(folder: Path) -> Path:
    """Write the whole Space to a folder.

    Raises:
        FileExistsError: the folder exists already.
    """
    generated = shutil.ignore_patterns(*GENERATED)
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns(*GENERATED, *NOT_OF_THE_SPACE))
    shutil.copytree(LIBRARY, folder / "cl_prompts", ignore=generated)
    return folder


def main() -> None:
    """Push, or write a folder."""
    parser = argparse.ArgumentParser(description="Push the page as a Space of the Hub.")
    parser.add_argument("repo_id", nargs="?", help="name of the Space, like me/my-space; made if it does not exist")
    parser.add_argument("--folder", type=Path, help="write the Space here and push nothing")
    parser.add_argument("--private", action="store_true", help="only you and your organization see it")
    given = parser.parse_args()
    if (given.repo_id is None) == (given.folder is None):
        sys.exit("name a Space to push to, or a --folder to write")
    if given.folder is not None:
        if given.folder.exists():
            sys.exit(f"{given.folder} exists already: remove it, or name another folder")
        print(assemble(given.folder))
        return
    api = HfApi()
    with tempfile.TemporaryDirectory() as room:
        folder = assemble(Path(room, "space"))
        name = api.create_repo(
            given.repo_id, repo_type="space", space_sdk="gradio", private=given.private, exist_ok=True
        ).repo_id
        print(api.upload_folder(repo_id=name, repo_type="space", folder_path=folder, commit_message="The page").commit_url)


if __name__ == "__main__":
    main()
