"""Left and right in the names of keypoints and classes: what a mirror makes of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_LEFT_AND_RIGHT = (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"), ("左", "右"))
# The letter where it stands alone (l_hip, "hip L"), or is a word of its own in camel case (LHip, hipL).
_LETTER = r"(?<![^\W_])[lrLR](?=[\W_]|\Z|[A-Z][a-z])|(?<=[a-z])[LR](?=[\W_]|\Z)"
# By the word anywhere: left_upright has two, and so has its partner.
_ANYWHERE = re.compile("|".join((*(side for pair in _LEFT_AND_RIGHT for side in pair), _LETTER)))
# By a word that begins with it: upright and bright have no side.
_WORD = r"(?<![^\W\d_])(?i:left|right)|(?<=[a-z])(?:Left|Right|LEFT|RIGHT)|左|右"
_WORD_OR_LETTER = re.compile(f"{_WORD}|{_LETTER}")
_OTHER_SIDE = {a: b for pair in (*_LEFT_AND_RIGHT, ("l", "r"), ("L", "R")) for a, b in (pair, pair[::-1])}
_SWAPPED = str.maketrans("lr", "rl")


def has_side(name: str) -> bool:
    """Whether a name says left or right by a word."""
    return re.search(_WORD, name) is not None


def mirrored_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names that change places in a mirror, the surest first; no name is in two."""
    found: list[tuple[str, str]] = []
    unpaired = set(names)

    def pair_up(partners: Sequence[str | None]) -> None:
        for name, partner in zip(names, partners, strict=True):
            if partner is not None and name != partner and {name, partner} <= unpaired:
                found.append((name, partner))
                unpaired.difference_update((name, partner))

    # All sides at once (left_eye_r is right_eye_l), then one word alone: left_upright is right_upright.
    pair_up([_ANYWHERE.sub(lambda side: _OTHER_SIDE[side[0]], name) for name in names])
    for left, right in _LEFT_AND_RIGHT:
        pair_up([name.replace(left, right) for name in names])
    # Other spellings of the same: "left elbow" and "right_elbow", LeftElbow and "elbow right".
    parts = {name: _side_and_rest(name) for name in names}
    count = Counter(parts.values())
    by_parts = {part: name for name, part in parts.items() if count[part] == 1}
    pair_up(
        [
            by_parts.get((sides.translate(_SWAPPED), rest)) if count[sides, rest] == 1 else None
            for sides, rest in map(parts.__getitem__, names)
        ]
    )
    return found


def _side_and_rest(name: str) -> tuple[str, str]:
    """("l", "elbow") of "Left elbow": its sides in order, and the letters and digits of what is left."""
    sides = "".join(
        "l" if side.lower() in ("l", "left", "左") else "r" for side in _WORD_OR_LETTER.findall(name)
    )
    rest = _WORD_OR_LETTER.sub(" ", name).casefold()
    return sides, "".join(letter for letter in rest if letter.isalnum())
