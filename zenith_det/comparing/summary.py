"""The tables of a comparison: for the terminal, ``compare.csv`` and ``compare.json``."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zenith_det.comparing.results import AP_TITLES, AVERAGED, Comparison, Group, Outcome
from zenith_det.comparing.runner import duration
from zenith_det.comparing.statistics import Estimate
from zenith_det.files import write_whole

CSV_FILE, JSON_FILE = "compare.csv", "compare.json"


def describe_final(final: Mapping[str, float]) -> str:
    """``"box AP 61.2, mask AP 58.3"``; the averaged weights' beside, where there are any."""
    words = []
    for task, title in AP_TITLES.items():
        for name, value in final.items():
            if re.fullmatch(rf"(?!{AVERAGED})([^/]+/)?{task}/AP", name):
                averaged = final.get(AVERAGED + name)
                beside = "" if averaged is None else f" (averaged weights {averaged:.1f})"
                words.append(f"{title} {value:.1f}{beside}")
                break
    return ", ".join(words) or "no AP"


def show(value: Estimate | None, *, sign: bool = False, interval: bool = False) -> str:
    """``"61.2 ± 0.8"``: a mean with its standard deviation, or with half its confidence interval."""
    if value is None:
        return "–"
    text = f"{value.mean:{'+' if sign else ''}.1f}"
    spread = value.half_width if interval else value.std
    return text if math.isnan(spread) else f"{text} ± {spread:.1f}"


def text_table(comparison: Comparison) -> str:
    """The arms, each at its best learning rate, as lines for a terminal."""
    tasks = comparison.tasks
    header = ["arm", "eta0", "runs"]
    for task in tasks:
        header += [AP_TITLES[task], "difference"]
    header += ["iterations", "time", "CPU time", "s/iter"]
    rows = [header]
    for arm in comparison.arms:
        group = comparison.best(arm)
        done = [o for o in group.outcomes if o.ok]
        row = [arm.name, group.arm.lr_text(group.lr), f"{len(done)}/{len(group.outcomes)}"]
        for task in tasks:
            is_reference = arm == comparison.reference
            difference = "reference" if is_reference else _shown_difference(comparison.difference(arm, task))
            row += [show(group.final(task)), difference]
        reaching = comparison.reaching(arm, tasks[0]) if tasks else None
        if reaching is None:
            row += ["–", "–", "–"]
        else:
            missed = f" ({reaching.never} never)" if reaching.never else ""
            cpu = reaching.cpu_seconds
            row += [f"{reaching.iterations.mean:.0f}{missed}", duration(reaching.seconds.mean)]
            row.append("–" if cpu is None else duration(cpu.mean))
        pace = mean_of(done, "seconds_per_iteration")
        row.append("–" if pace is None else f"{pace:.3f}")
        rows.append(row)
    widths = [max(len(row[n]) for row in rows) for n in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += notes(comparison)
    failed = [o for o in comparison.outcomes if not o.ok]
    if failed:
        lines += ["", "without a result:"]
        lines += [f"  {o.run.title}: {o.result.status + ': ' + o.result.reason if o.result else 'not started'}"
                  for o in failed]  # fmt: skip
    return "\n".join(lines)


def _shown_difference(value: Estimate | None) -> str:
    if value is None:
        return "–"
    return show(value, sign=True, interval=True) + f" (n={value.n})"


def notes(comparison: Comparison) -> list[str]:
    """What the columns mean."""
    lines = [
        "AP: mean ± standard deviation over seeds, after the last iteration.",
        f"difference: from {comparison.reference.name}, mean ± half the 95 % confidence interval (Student's t) "
        "of the n differences paired by seed.",
    ]
    if comparison.tasks and (target := comparison.target(comparison.tasks[0])) is not None:
        lines.append(
            f"iterations, time, CPU time: to {target:.1f} {AP_TITLES[comparison.tasks[0]]}, 95 % of "
            f"{comparison.reference.name}'s final; in training steps alone."
        )
    if any(len(comparison.groups_of(arm)) > 1 for arm in comparison.arms):
        lines.append("eta0: the best of those tried, by the mean AP over seeds.")
    if comparison.chosen_on:
        lines.append(f"eta0: {comparison.chosen_on}")
    return lines


def mean_of(outcomes: Sequence[Outcome], attribute: str) -> float | None:
    """The mean of a figure of the runs that have it."""
    values = [value for o in outcomes if (value := getattr(o, attribute)) is not None]
    return sum(values) / len(values) if values else None


def run_row(outcome: Outcome, comparison: Comparison) -> dict[str, Any]:
    """A run as a row of ``compare.csv``."""
    run, result = outcome.run, outcome.result
    row: dict[str, Any] = {
        "arm": run.arm.name,
        "lr": run.lr,
        "seed": run.seed,
        "status": result.status if result else "not started",
        "reason": result.reason if result else "",
        "seconds": round(result.seconds, 1) if result else None,
        "seconds_per_iteration": outcome.seconds_per_iteration,
        "rss_mb": round(result.rss_mb) if result else None,
        "max_mem_mb": outcome.max_mem_mb,
    }
    for task in comparison.tasks:
        row[f"{task}/AP"] = outcome.final_ap(task)
        target = comparison.target(task)
        reach = outcome.reach(task, target) if target is not None else None
        row[f"{task}/iterations_to_target"] = reach[0] if reach else None
        row[f"{task}/seconds_to_target"] = reach[1] if reach else None
        row[f"{task}/cpu_seconds_to_target"] = reach[2] if reach and not math.isnan(reach[2]) else None
    row["output_dir"] = str(run.folder)
    return row


def arm_summary(group: Group, comparison: Comparison) -> dict[str, Any]:
    """An arm at one learning rate, as an entry of ``compare.json``."""
    best = comparison.best(group.arm) is group
    entry: dict[str, Any] = {
        "arm": group.arm.name,
        "label": group.arm.label,
        "lr": group.lr,
        "best_lr": best,
        "seeds": [o.run.seed for o in group.outcomes if o.ok],
        "tasks": {},
    }
    for task in comparison.tasks:
        values: dict[str, Any] = {"final": _plain(group.final(task))}
        if best:
            values["difference"] = _plain(comparison.difference(group.arm, task))
            reaching = comparison.reaching(group.arm, task)
            if reaching:
                values["iterations_to_target"] = _plain(reaching.iterations)
                values["seconds_to_target"] = _plain(reaching.seconds)
                values["cpu_seconds_to_target"] = _plain(reaching.cpu_seconds)
                values["never"] = reaching.never
        entry["tasks"][task] = values
    return entry


def _plain(value: Estimate | None) -> dict[str, Any] | None:
    if value is None:
        return None
    numbers = {"mean": value.mean, "std": value.std, "ci95_half_width": value.half_width, "n": value.n}
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in numbers.items()}


def save(comparison: Comparison, output: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write ``compare.csv``, a row a run, and ``compare.json``, with the means over seeds.

    Args:
        facts: what the comparison was made with; goes into the JSON file.

    Raises:
        UserError: they cannot be written.
    """
    rows = [run_row(outcome, comparison) for outcome in comparison.outcomes]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    content = {
        **facts,
        "reference": comparison.reference.name,
        "target": {task: comparison.target(task) for task in comparison.tasks},
        "arms": [arm_summary(group, comparison) for group in comparison.groups],
        "runs": rows,
    }
    files = {CSV_FILE: table.getvalue(), JSON_FILE: json.dumps(content, indent=1) + "\n"}
    return [write_whole(output / name, text) for name, text in files.items()]
