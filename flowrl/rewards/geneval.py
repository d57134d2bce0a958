"""GenEval's reward: a detector finds the objects, CLIP their colours, and a prompt's metadata say
what there should be.

Ghosh et al. 2023, arXiv 2310.11513. Published numbers come from Mask2Former of mmdet with a Swin-S
(`mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco`). Numbers of another detector are not comparable
with them: they order images alike at best, and a table must name the detector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from flowrl.errors import UserError
from flowrl.rewards.colours import NamesColours, cut_out
from flowrl.rewards.detection import Detection, Detector, counted_by_name
from flowrl.rewards.geneval_task import Task, read_task
from flowrl.rewards.geneval_verdict import first_fault, share_fulfilled, to_be_coloured
from flowrl.rewards.images import to_pictures
from flowrl.rewards.outputs import REASON, finite_valid
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import BelowOne, Portion
from flowrl.values.check import checked

MAX_OBJECTS = 16
"""Objects of a class that count at most, as published."""


class GenEval(nn.Module):
    """`strict`: 1 where an image is correct in the published sense, else 0
    (`flowrl.rewards.geneval_verdict.first_fault`). `graded`: flow_grpo's training score, at most 1
    (`share_fulfilled`), whose 1 means that every count is exact, flow_grpo's "strict" accuracy.

    A detection counts with a score above `threshold`, and above `counting_threshold` for the tag
    `counting`; published are 0.3 and 0.9, which belong to the published detector. Detections that
    overlap by `max_overlap` or more are one object; published is 1, none, for a detector that finds
    each object once. `detector` is any `flowrl.rewards.detection.Detector`.

    Parts: strict and graded. A sample whose prompt has no such metadata, an unknown tag, or a class
    that the detector does not know is missing. The published score of a model is the mean over the
    six tags of the mean of strict.
    """

    only_computes = True
    part_names = ("strict", "graded")

    @checked("reward")
    def __init__(
        self,
        *,
        score: Literal["strict", "graded"],
        threshold: BelowOne,
        counting_threshold: BelowOne,
        max_overlap: Portion,
        detector: Detector,
        colours: NamesColours,
    ) -> None:
        super().__init__()
        self.score = score
        self.threshold = threshold
        self.counting_threshold = counting_threshold
        self.max_overlap = max_overlap
        self.detector = detector
        self.colours = colours

    def forward(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        pictures = to_pictures(images)
        tasks, reasons = self._read_tasks(prompts)
        objects = self._find(pictures, tasks)
        colours = self._name_colours(pictures, tasks, objects)
        strict = torch.full((len(prompts),), torch.nan)
        graded = strict.clone()
        info: list[Mapping[str, Any]] = [{REASON: reasons.get(row)} for row in range(len(prompts))]
        for row, task in tasks.items():
            fault = first_fault(task, objects[row], colours[row])
            strict[row] = float(fault is None)
            graded[row] = share_fulfilled(task, objects[row], colours[row])
            info[row] = {"fault": fault}
        parts = {"strict": strict, "graded": graded}
        # A prompt without a task is NaN in every column, which marks it as missing.
        return finite_valid(parts[self.score], parts, info)

    def _read_tasks(self, prompts: Sequence[Prompt]) -> tuple[dict[int, Task], dict[int, str]]:
        """Return what each prompt asks for by its number, or why that cannot be judged."""
        tasks = {}
        reasons = {}
        for row, prompt in enumerate(prompts):
            try:
                task = read_task(prompt)
                self._check_names(prompt, task)
            except UserError as error:
                reasons[row] = str(error)
            else:
                tasks[row] = task
        return tasks, reasons

    def _check_names(self, prompt: Prompt, task: Task) -> None:
        for clause in (*task.include, *task.exclude):
            if clause.name not in self.detector.names:
                raise UserError(
                    f"prompt {prompt.text!r}: {clause.name!r} is none of the "
                    f"{len(self.detector.names)} classes of {type(self.detector).__name__}"
                )

    def _find(
        self, pictures: Sequence[Image.Image], tasks: Mapping[int, Task]
    ) -> dict[int, dict[str, list[Detection]]]:
        """Detect what counts in the pictures that have a task, by their numbers."""
        if not tasks:
            return {}
        min_score = min(self.threshold, self.counting_threshold)
        found = self.detector([pictures[row] for row in tasks], min_score)
        objects = {}
        for (row, task), detections in zip(tasks.items(), found, strict=True):
            is_counting = task.tag == "counting"
            objects[row] = counted_by_name(
                detections,
                threshold=self.counting_threshold if is_counting else self.threshold,
                max_overlap=self.max_overlap,
                max_objects=MAX_OBJECTS,
            )
        return objects

    def _name_colours(
        self,
        pictures: Sequence[Image.Image],
        tasks: Mapping[int, Task],
        objects: Mapping[int, Mapping[str, Sequence[Detection]]],
    ) -> dict[int, dict[int, list[str]]]:
        """Name the colours that decide, by the numbers of the picture and of the clause."""
        crops = []
        names = []
        places = []
        colours: dict[int, dict[int, list[str]]] = {row: {} for row in tasks}
        for row, task in tasks.items():
            for number, detections in to_be_coloured(task, objects[row]).items():
                for detection in detections:
                    crops.append(cut_out(pictures[row], detection))
                    names.append(detection.name)
                    places.append((row, number))
        # All objects of a call go through CLIP together.
        for (row, number), colour in zip(places, self.colours(crops, names), strict=True):
            colours[row].setdefault(number, []).append(colour)
        return colours
