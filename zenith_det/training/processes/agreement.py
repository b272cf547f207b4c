"""Processes of one run that don't train the same thing are told, before or while they do."""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch

from zenith_det.errors import RanksDisagreeError, UserError
from zenith_det.training.processes.distributed import (
    agree_on_maximum,
    all_gather_objects,
    barrier,
    get_world_size,
)
from zenith_det.training.processes.stopping import EvaluationStopped

MOST_SHOWN = 3
#: Records of a set that are looked at: those of COCO would take seconds, each time that a run starts.
MOST_COMPARED = 20_000
COMPARED = ("lr", "zenith/ratio", "zenith/zenith")


def versions() -> dict[str, str]:
    """The libraries whose version can change what is computed."""
    return {
        "Python": ".".join(map(str, sys.version_info[:2])),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def fingerprint(records: Sequence[Mapping[str, Any]]) -> str:
    """A short text that two copies of a dataset share only if they have the same images and objects.

    Args:
        records: Detectron2's standard dicts; folders may differ from machine to machine. Of more than
            :data:`MOST_COMPARED` every second, third, … is looked at.
    """
    digest = hashlib.sha256()
    count = len(records)
    for index in range(0, count, -(-count // MOST_COMPARED) or 1):
        record = records[index]
        # Sets that Detectron2 alone reads need not have all of these.
        boxes = [
            (a.get("category_id"), *map(float, a.get("bbox") or ())) for a in record.get("annotations", ())
        ]
        facts = *(record.get(key) for key in ("image_id", "height", "width")), boxes
        digest.update(repr(facts).encode())
    return f"{count} images, {digest.hexdigest()[:16]}"


class AgreedError(UserError):
    """What some process of a run could not go on after, raised on all of them, at the same point."""


def raise_together(failure: Exception | None) -> None:
    """Raise what has failed on some process on all; all call it, with a ``failure`` on one at least.

    Raises:
        AgreedError: with the message of the first process whose failure is a ``UserError``.
        Exception: ``failure`` itself, where none is.
    """
    own = None if failure is None else str(failure) if isinstance(failure, UserError) else ""
    told = [one for one in all_gather_objects(own) if one is not None]
    if message := next(filter(None, told), ""):
        raise AgreedError(message) from failure
    if failure is not None:
        raise failure
    barrier()  # ends with the process that raises


@contextlib.contextmanager
def agreeing(should_stop: Callable[[], int]) -> Iterator[None]:
    """Around an evaluation's loop on each rank: what ends it on one ends it on all.

    Args:
        should_stop: anything but 0: the run has to end.

    Raises:
        EvaluationStopped: any rank was told to stop; raised on all.
        AgreedError: any rank has failed; raised on all.
    """
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    stopped, failed = agree_on_maximum([should_stop(), int(failure is not None)])
    if failed:
        raise_together(failure)
    if stopped:
        raise EvaluationStopped


def check_same_on_all_ranks(facts: Mapping[str, Any]) -> None:
    """Compare what every process is about to do with what rank 0 is; all must call it together.

    Args:
        facts: name -> value (plain values), such as configuration keys, the dataset's fingerprint, the
            iteration to start at.

    Raises:
        RanksDisagreeError: on every process; it names the ranks, and what differs with both values.
    """
    if get_world_size() == 1:
        return
    everyone = all_gather_objects(dict(facts))
    told = []
    for rank, theirs in enumerate(everyone[1:], start=1):
        differing = [name for name in {**everyone[0], **theirs} if everyone[0].get(name) != theirs.get(name)]
        if differing:
            shown = [
                f"{name} is {theirs.get(name)!r}, on rank 0 {everyone[0].get(name)!r}"
                for name in differing[:MOST_SHOWN]
            ]
            more = f" and {len(differing) - MOST_SHOWN} more" if len(differing) > MOST_SHOWN else ""
            told.append(f"rank {rank}: {', '.join(shown)}{more}")
    if told:
        raise RanksDisagreeError(
            "the processes of this run would not train the same: "
            f"{'; '.join(told)}; start all with the same files and command"
        )


def check_steps_agree(iteration: int, scalars: Mapping[str, float]) -> None:
    """Compare what an optimizer's step was made from, which all processes must have alike; all call it together.

    Args:
        iteration: for the message.
        scalars: of :func:`zenith_det.training.logs.zenith_metrics.optimizer_scalars`; LR, ratio and zenith count.
            NaN equals NaN.

    Raises:
        RanksDisagreeError: naming the ranks, on every process.
    """
    gathered = all_gather_objects(dict(scalars))
    values = {name: [float(rank[name]) for rank in gathered] for name in COMPARED if name in scalars}
    for name, numbers in values.items():
        reference = numbers[0]
        others = [
            rank
            for rank, number in enumerate(numbers)
            if not math.isclose(number, reference, rel_tol=1e-6)
            and not (math.isnan(number) and math.isnan(reference))
        ]
        if others:
            shown = ", ".join(f"rank {rank} {numbers[rank]:.9g}" for rank in others[:MOST_SHOWN])
            raise RanksDisagreeError(
                f"iteration {iteration}: the processes have drifted apart: {name} is {reference:.9g} on rank 0, "
                f"{shown}: their gradients or weights differ; go on from the last checkpoint with --resume"
            )
