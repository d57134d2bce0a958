"""Pictures beside the prompts of a family that edits or continues them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from families.family import Family


def pictures_of(family: Family) -> list[Image.Image]:
    """Return two pictures, a lying and a standing one; none for a family that takes none."""
    if family.picture is None:
        return []
    return [family.draw(1), family.draw(2).transpose(Image.Transpose.ROTATE_90)]


def with_pictures(
    prompts: Sequence[str], pictures: Sequence[Image.Image], folder: Path
) -> list[str]:
    """Write prompts with a picture each into a new folder, and return the overrides that make them
    a run's.
    """
    folder.mkdir()
    lines = []
    for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        picture.save(folder / f"{number}.png")
        lines.append(json.dumps({"prompt": prompt, "image": f"{number}.png"}) + "\n")
    file = folder / "edits.jsonl"
    file.write_text("".join(lines))
    return ["data=jsonl", f"data.prompts.path={file}"]
