"""What was found in a dataset, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from zenith_det.errors import one_line

#: What was done about a problem.
#:   stops: nothing sensible can be done, the dataset is refused;
#:   dropped: left out (an image, an annotation, or the part that the reason names);
#:   filled: the missing value was worked out; nothing is lost;
#:   kept: used as it is; worth knowing.
Action = Literal["stops", "dropped", "filled", "kept"]
_ACTION_ORDER: tuple[Action, ...] = ("stops", "dropped", "filled", "kept")

#: The kind of what concerns a set's boxes as a whole, and is said before training.
SUSPICIOUS = "suspicious boxes"
#: The kind of what keeps a set's keypoints from being trained.
NO_KEYPOINTS = "keypoints that can't be trained"
#: The kind of an image that is not of the size that the annotation file says.
WRONG_SIZE = "wrong image size"
#: The kind of what is said of images of more than 8 bits.
DEPTH = "images of more than 8 bits"
#: The kind of what crowd regions as a whole are taken for.
CROWDS = "crowd regions"
#: Kinds that concern a set as a whole, and are said before training.
_OF_THE_SET = (SUSPICIOUS, CROWDS)
#: Per kind of problem, how many are kept with their file and id; all are counted.
EXAMPLES_KEPT = 10_000
_NAMES_SHOWN = 10
MAX_REASON = 240  # characters


class Fault(Exception):
    """One thing wrong with one value: its kind (for counting) and its reason (for the reader)."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: what, what was done about it, where, and why."""

    kind: str
    action: Action
    image: str | None  # file name as in the annotation file
    image_id: int | None
    annotation_id: int | None
    reason: str

    def where(self) -> str:
        parts = []
        if self.image is not None:
            parts.append(self.image)
        elif self.image_id is not None:
            parts.append(f"image id {self.image_id}")
        if self.annotation_id is not None:
            parts.append(f"annotation {self.annotation_id}")
        return ", ".join(parts)

    def __str__(self) -> str:
        where = self.where()
        return f"{where}: {self.reason}" if where else self.reason


@dataclass
class DatasetReport:
    """What was found in a dataset, and what became of it.

    Attributes:
        name: the dataset's name or annotation file.
        num_images, num_annotations: what is left after dropping.
        num_without_objects: images among them that have no annotation, or only crowd regions.
        problems: the first :data:`EXAMPLES_KEPT` of each kind.
        counts: (kind, action) -> how many.
        hint: where all images are missing, what finds them; "" where nothing does.
        listed_images, bad_images: of the file's images, all, and those that are missing or can't be used.
    """

    name: str
    num_images: int = 0
    num_annotations: int = 0
    num_classes: int = 0
    num_without_objects: int = 0
    problems: list[Problem] = field(default_factory=list)
    counts: dict[tuple[str, Action], int] = field(default_factory=dict)
    hint: str = ""
    listed_images: int = 0
    bad_images: int = 0

    def add(
        self,
        kind: str,
        action: Action,
        reason: str,
        *,
        image: str | None = None,
        image_id: int | None = None,
        annotation_id: int | None = None,
    ) -> None:
        count = self.counts.get((kind, action), 0)
        self.counts[kind, action] = count + 1
        if count < EXAMPLES_KEPT:
            shown = None if image is None else one_line(image)
            self.problems.append(
                Problem(kind, action, shown, image_id, annotation_id, one_line(reason, MAX_REASON))
            )

    def count(self, *actions: Action) -> int:
        """How many problems were met with one of these actions (all, when none is named)."""
        return sum(n for (_, action), n in self.counts.items() if not actions or action in actions)

    def suspicions(self) -> list[str]:
        """What boxes or crowd regions as a whole look like, if not like COCO's: each a line."""
        return [problem.reason for problem in self.problems if problem.kind in _OF_THE_SET]

    def remarks(self) -> list[str]:
        """What to know of a set before training, that nothing is wrong with: each a line."""
        return [problem.reason for problem in self.problems if problem.kind == DEPTH]

    def kinds(self, action: Action, *but: str) -> str:
        """The kinds met with this action, ``but`` some, and their counts: ``missing file 2, box without area 1``."""
        found = [(n, kind) for (kind, act), n in self.counts.items() if act == action and kind not in but]
        return ", ".join(f"{kind} {n}" for n, kind in sorted(found, key=lambda item: (-item[0], item[1])))

    def refusal(self, action: Action, image_root: str) -> str:
        """What is met with this action, the first of it, and what to do: missing images by their names."""
        missing = [p for p in self.problems if p.kind == "missing file" and p.action == action]
        count = self.counts.get(("missing file", action), 0)
        told = []
        if missing:
            told.append(
                f"{count} of {_plural(self.listed_images, 'image')} {'is' if count == 1 else 'are'} missing in "
                f"{image_root}: {', '.join(str(p.image) for p in missing[:_NAMES_SHOWN])}"
                + (f" and {count - _NAMES_SHOWN} more" if count > _NAMES_SHOWN else "")
            )
        first = next((p for p in self.problems if p.action == action and p.kind != "missing file"), None)
        if first is not None:
            told.append(f"{self.kinds(action, 'missing file')}; the first: {first}")
        if (WRONG_SIZE, action) in self.counts:
            told.append(
                "if the objects are right on the pictures, take height and width out of images: they are then read"
            )
        if self.hint:
            told.append(self.hint)
        elif action == "stops" and self.bad_images == self.count(action) < self.listed_images:
            told.append(
                f"DATASETS.MAX_BAD_IMAGES {self.bad_images} (--max-bad-images {self.bad_images}) does without them"
            )
        return "; ".join(told)

    def summary(self) -> str:
        """One line: what the dataset holds and what was done to it."""
        text = (
            f"{self.name}: {_plural(self.num_images, 'image')} ({self.num_without_objects} without objects), "
            f"{_plural(self.num_annotations, 'annotation')}, {_plural(self.num_classes, 'class', 'classes')}"
        )
        found = [
            f"{'can not be used' if action == 'stops' else action}: {self.kinds(action)}"
            for action in ("stops", "dropped")
            if self.count(action)
        ]
        told = {problem.kind for problem in self.problems}
        found += [kind for kind in (NO_KEYPOINTS, *_OF_THE_SET) if kind in told]
        # What is left out of a file and has one meaning only is no problem of it, nor is what is merely unusual.
        filled = self.kinds("filled", *_OF_THE_SET)
        kept = self.kinds("kept", NO_KEYPOINTS, DEPTH, *_OF_THE_SET)
        besides = [f"{name}: {kinds}" for name, kinds in (("filled", filled), ("kept", kept)) if kinds]
        return "; ".join([text, *(found or ["no problems"]), *besides])

    def table(self, examples: int = 3) -> str:
        """Counts of all that was found, the worst first, with the first examples: file, annotation id, reason."""
        if not self.counts:
            return "no problems found"
        by_key: dict[tuple[str, Action], list[Problem]] = {}
        for problem in self.problems:
            shown = by_key.setdefault((problem.kind, problem.action), [])
            if len(shown) < examples:
                shown.append(problem)
        keys = sorted(self.counts, key=lambda key: (_ACTION_ORDER.index(key[1]), -self.counts[key], key[0]))
        wide = max(len("found"), *(len(kind) for kind, _ in keys))
        lines = [f"{'found':<{wide}}  {'action':<7}  {'count':>7}  first examples"]
        lines.append("-" * len(lines[0]))
        for kind, action in keys:
            start = f"{kind:<{wide}}  {action:<7}  {self.counts[kind, action]:>7}  "
            for problem in by_key[kind, action]:
                lines.append(start + str(problem))
                start = " " * len(start)
        return "\n".join(lines)


def _plural(count: int, word: str, plural: str | None = None) -> str:
    return f"{count} {word if count == 1 else plural or word + 's'}"
