"""A comparison as one HTML page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import escape

from zenith_det.comparing.figures import MIN_BAND, figures, legend_entries
from zenith_det.comparing.results import AP_TITLES, Comparison, Group, Outcome
from zenith_det.comparing.runner import LOG_FILE, duration
from zenith_det.comparing.statistics import Estimate, signed
from zenith_det.comparing.summary import mean_of, show
from zenith_det.comparing.verdict import verdict_lines
from zenith_det.data import read_image
from zenith_det.errors import UserError
from zenith_det.files import write_whole
from zenith_det.report.figures import Picture
from zenith_det.report.html import (
    Html,
    Page,
    bullets,
    code,
    figure,
    grid,
    heading,
    legend,
    paragraph,
    photo,
    table,
    verdict,
)
from zenith_det.report.pictures import Instances, draw_instances
from zenith_det.report.run_data import Evaluated, read_evaluated

HTML_FILE = "compare.html"
PICTURES = "figures"
SAMPLED_IMAGES = 4
SCORE_THRESHOLD = 0.5


def write_report(comparison: Comparison, output: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write ``compare.html``, and its drawings as PNG and SVG under ``figures/``.

    Args:
        facts: what the comparison was made with: ``command``, ``config_file``, ``keys``, ``machine`` (a
            mapping), ``date``.

    Returns:
        the page, then the pictures.

    Raises:
        UserError: a file cannot be written.
    """
    pictures = figures(comparison)
    page = _page(comparison, pictures, facts)
    files = [page.save(output / HTML_FILE)]
    for picture in [p for group in pictures.values() for p in group]:
        files.append(write_whole(output / PICTURES / f"{picture.name}.png", picture.png))
        write_whole(output / PICTURES / f"{picture.name}.svg", _standalone(picture))
    return files


def _standalone(picture: Picture) -> str:
    return f'<?xml version="1.0" encoding="utf-8"?>\n<!-- {escape(picture.alt).replace("--", "-")} -->\n{picture.svg}'


def _page(comparison: Comparison, pictures: Mapping[str, list[Picture]], facts: Mapping[str, Any]) -> Page:
    seeds = sorted({o.run.seed for o in comparison.outcomes})
    iterations = max(o.run.max_iter for o in comparison.outcomes)
    page = Page(
        f"Comparison: {Path(str(facts.get('config_file', ''))).stem or 'runs'}",
        f"{len(comparison.arms)} arms, {len(seeds)} seeds, {iterations} iterations each; {facts.get('date', '')}",
    )
    done = any(o.ok for o in comparison.outcomes)
    page.lead(verdict(verdict_lines(comparison), warn=not done))
    page.section("Results", _results_table(comparison), bullets(_notes(comparison)))
    key = legend(legend_entries(comparison))
    uncertainty = (
        "Lines are means over seeds. "
        f"With {MIN_BAND} seeds or more, bands are 95 % confidence intervals of the mean (Student's t); with 2, "
        "thin lines are the seeds."
    )
    page.section(
        "Average precision",
        key if pictures["iterations"] else "",
        grid([figure(p) for p in pictures["iterations"]]),
        heading("Over training time") if pictures["time"] else "",
        grid([figure(p) for p in pictures["time"]]),
        paragraph(
            f"{uncertainty} Training time is that of the steps, without evaluations and saving.", "soft"
        )
        if pictures["iterations"]
        else "",
    )
    page.section(
        "Differences, paired by seed",
        grid([figure(p) for p in pictures["differences"]]),
        paragraph(
            f"Final AP minus {comparison.reference.label}'s with the same seed: the mean, and its 95 % confidence "
            "interval. An interval that contains 0 leaves open which is better.",
            "soft",
        )
        if pictures["differences"]
        else "",
    )
    page.section("Time to target", _targets(comparison))
    page.section(
        "Learning rate, ratio and gradient norm",
        key if pictures["signals"] else "",
        *[figure(p, wide=True) for p in pictures["signals"]],
    )
    page.section("Loss", key if pictures["loss"] else "", *[figure(p, wide=True) for p in pictures["loss"]])
    page.section(
        "Sensitivity to the learning rate",
        grid([figure(p) for p in pictures["sensitivity"]]),
        _sensitivity_table(comparison) if pictures["sensitivity"] else "",
    )
    page.section("Cost", _cost_table(comparison))
    page.section("Runs without a result", _failed_table(comparison))
    page.section("Predictions side by side", *_samples(comparison))
    page.section("How it was made", *_made(comparison, facts))
    return page


def _results_table(comparison: Comparison) -> Html:
    tasks = comparison.tasks
    header = ["arm", "η₀", "runs"]
    for task in tasks:
        header += [AP_TITLES[task], "difference (95 % CI)"]
    rows, marked = [], []
    for n, arm in enumerate(comparison.arms):
        group = comparison.best(arm)
        ok = sum(o.ok for o in group.outcomes)
        row: list[str] = [arm.label, arm.lr_text(group.lr), f"{ok}/{len(group.outcomes)}"]
        for task in tasks:
            if arm == comparison.reference:
                shown: str = "reference"
            else:
                shown = _interval(comparison.difference(arm, task))
            row += [show(group.final(task)), shown]
        if arm in comparison.zenith_arms:
            marked.append(n)
        rows.append(row)
    return table("Final AP by arm; ZENITH's are shaded", header, rows, marked=marked)


def _notes(comparison: Comparison) -> list[str]:
    lines = [
        "AP is that of the weights after the last iteration: mean ± standard deviation over the seeds.",
        f"Differences are from {comparison.reference.label}, paired by seed, with the 95 % confidence interval "
        "(Student's t over the n seeds that both have). Bold: the interval leaves out 0.",
    ]
    if any(arm.averaged for arm in comparison.arms):
        lines.append("Arms that are called averaged are evaluated with their averaged weights.")
    if any(len(comparison.groups_of(arm)) > 1 for arm in comparison.arms):
        lines.append(
            "η₀ is the best of those tried, by the mean AP over the seeds, chosen on the images that are reported: "
            "each arm gains a little by its choice."
        )
    if comparison.chosen_on:
        lines.append(f"η₀: {comparison.chosen_on}")
    return lines


def _interval(value: Estimate | None) -> str:
    """A difference, coloured where it is decided; the sign and the interval tell the same without colours."""
    if value is None:
        return "–"
    if value.n == 1:
        return f"{signed(value.mean)} (n=1)"
    text = f"{signed(value.mean)} ({signed(value.low)} to {signed(value.high)}, n={value.n})"
    if not value.decided:
        return text
    return Html('<strong class="{}">{}</strong>').format("good" if value.mean > 0 else "bad", text)


def _targets(comparison: Comparison) -> Html:
    rows = []
    for task in comparison.tasks:
        target = comparison.target(task)
        if target is None:
            continue
        reference = comparison.reaching(comparison.reference, task)
        for arm in comparison.arms:
            reaching = comparison.reaching(arm, task)
            if reaching is None:
                ran = comparison.best(arm).final(task) is not None
                rows.append(
                    [AP_TITLES[task], f"{target:.1f}", arm.label, "never" if ran else "–", "–", "–", "–"]
                )
                continue
            iterations, seconds, missed = reaching.iterations, reaching.seconds, reaching.never
            cpu = "–" if reaching.cpu_seconds is None else duration(reaching.cpu_seconds.mean)
            base = reference.iterations.mean if reference else 0
            share = f"{iterations.mean / base:.2f}" if base > 0 else "–"
            spread = "" if np.isnan(iterations.std) else f" ± {iterations.std:.0f}"
            never = f" ({missed} of {missed + iterations.n} never)" if missed else ""
            rows.append(
                [AP_TITLES[task], f"{target:.1f}", arm.label, f"{iterations.mean:.0f}{spread}{never}",
                 share, duration(seconds.mean), cpu]
            )  # fmt: skip
    return table(
        f"Iterations and training time to 95 % of {comparison.reference.label}'s final AP, by straight lines "
        "between evaluations; the mean over the seeds that reach it, and the iterations as a share of the reference's",
        ["task", "AP", "arm", "iterations", "share", "time", "CPU time"],
        rows,
        text_columns=(0, 2),
    )


def _sensitivity_table(comparison: Comparison) -> Html:
    rows = []
    for arm in comparison.arms:
        for group in comparison.groups_of(arm):
            best = "best" if group is comparison.best(arm) else ""
            ok = sum(o.ok for o in group.outcomes)
            finals = [show(group.final(task)) for task in comparison.tasks]
            rows.append([arm.label, arm.lr_text(group.lr), f"{ok}/{len(group.outcomes)}", *finals, best])
    header = ["arm", "η₀", "runs", *[AP_TITLES[task] for task in comparison.tasks], ""]
    return table("Final AP at each learning rate tried", header, rows)


def _cost_table(comparison: Comparison) -> Html:
    rows = []
    for arm in comparison.arms:
        group = comparison.best(arm)
        done = [o for o in group.outcomes if o.metrics]
        pace, memory = mean_of(done, "seconds_per_iteration"), mean_of(done, "max_mem_mb")
        resident = [o.result.rss_mb for o in done if o.result and o.result.rss_mb]
        whole = [o.result.seconds for o in done if o.result and o.ok]
        rows.append(
            [
                arm.label,
                "–" if pace is None else f"{pace:.3f} s",
                "–" if memory is None else f"{memory:.0f} MiB",
                f"{max(resident):.0f} MiB" if resident else "–",
                duration(sum(whole) / len(whole)) if whole else "–",
            ]
        )
    return table(
        "Cost: seconds per iteration (median of the run, mean over seeds), peak memory on the GPU as logged, "
        "highest resident memory of the process as sampled, whole run with start-up and evaluations. Runs that "
        "shared a machine slow one another.",
        ["arm", "iteration", "GPU memory", "resident", "whole run"],
        rows,
    )


def _failed_table(comparison: Comparison) -> Html:
    rows = []
    for outcome in comparison.outcomes:
        if outcome.ok:
            continue
        result, run = outcome.result, outcome.run
        last = outcome.metrics.get("total_loss")
        rows.append(
            [
                run.arm.label,
                run.arm.lr_text(run.lr),
                run.seed,
                result.status if result else "not started",
                "–" if last is None else int(last.iterations[-1]) + 1,
                (result.reason if result else "") or "–",
                str(run.folder / LOG_FILE) if result else "–",
            ]
        )
    return table(
        "Runs that failed, diverged or are not finished, with the reason that they gave",
        ["arm", "η₀", "seed", "status", "iterations done", "reason", "log"],
        rows,
        text_columns=(0, 3, 5, 6),
        wrap_columns=(5, 6),
    )


def _samples(comparison: Comparison) -> list[str]:
    """The same images by every arm, beside the ground truth."""
    shown: list[tuple[Group, Evaluated]] = []
    problems = []
    for arm in comparison.arms:
        group = comparison.best(arm)
        outcome: Outcome | None = next((o for o in group.outcomes if o.ok), None)
        if outcome is None:
            continue
        try:
            shown.append((group, read_evaluated(outcome.run.folder, averaged=arm.averaged)))
        except UserError as error:
            problems.append(f"{arm.label}: no pictures: {error}")
    if not shown:
        return [bullets(problems)]
    records = shown[0][1].records
    candidates = [record for record in records if record["annotations"]] or records
    count = SAMPLED_IMAGES if len(shown) <= 6 else SAMPLED_IMAGES - 1
    metadata = shown[0][1].dataset.metadata
    parts: list[str] = []
    for record in candidates[:: max(1, len(candidates) // count)][:count]:
        image_id = record["image_id"]
        try:
            image = read_image(record["file_name"], value_range=record.get("value_range"))
        except UserError as error:
            problems.append(f"image {image_id}: {error}")
            continue
        truth = Instances.from_record(record)
        name = Path(record["file_name"]).name
        cells = [
            photo(
                _drawn(image, truth, metadata),
                f"Ground truth of {name}: {len(truth)} objects",
                "ground truth",
            )
        ]
        for group, evaluated in shown:
            found = Instances.from_results(evaluated.by_image.get(image_id, []), metadata)
            assert found.scores is not None
            highest = f", the highest is {found.scores.max() * 100:.0f} %" if len(found) else ""
            found = found.pick(found.scores >= SCORE_THRESHOLD)
            what = f"{len(found)} detections" if len(found) else f"no score from 50 % on{highest}"
            alt = f"{group.arm.label} on {name}: {what}"
            caption = group.arm.label if len(found) else f"{group.arm.label}: {what}"
            cells.append(photo(_drawn(image, found, metadata), alt, caption))
        parts += [heading(name), grid(cells, "cells")]
    seeds = {next(o.run.seed for o in group.outcomes if o.ok) for group, _ in shown}
    lead = paragraph(
        f"Detections from a score of 50 % on, after the last iteration, of seed "
        f"{', '.join(map(str, sorted(seeds)))}, each arm at its best learning rate.",
        "soft",
    )
    return [lead, *parts, bullets(problems)]


def _drawn(image: Any, found: Instances, metadata: Any) -> Any:
    return draw_instances(
        image, found.boxes, found.classes, found.scores, found.masks, found.keypoints, metadata,
        crowd=found.crowd,
    )  # fmt: skip


def _made(comparison: Comparison, facts: Mapping[str, Any]) -> Sequence[str]:
    machine = facts.get("machine") or {}
    engines = sorted({e for o in comparison.outcomes if (e := _engine(o.run.folder))})
    about = [["date", facts.get("date", "–")], ["config file", facts.get("config_file", "–")]]
    about += [
        ["engine", "; ".join(engines) or "–"],
        ["keys of all runs", " ".join(facts.get("keys", [])) or "–"],
    ]
    devices = sorted({o.result.device for o in comparison.outcomes if o.result and o.result.device})
    about += [["devices", ", ".join(devices) or "as the config says"]]
    about += [[name.replace("_", " "), str(value)] for name, value in machine.items()]
    arms = []
    for arm in comparison.arms:
        group = comparison.best(arm)
        run = group.outcomes[0].run
        keys = " ".join(f"{key} {run.keys[key]}" for key in arm.keys(run.max_iter))
        weights = "averaged" if arm.averaged else "last"
        tried = ", ".join(arm.lr_text(g.lr) for g in comparison.groups_of(arm))
        arms.append([arm.label, arm.name, keys or "–", tried, weights])
    return [
        code(str(facts.get("command", ""))),
        table("What all runs share", ["", ""], about, text_columns=(0, 1), wrap_columns=(1,)),
        table(
            "What the arms set; SOLVER.BASE_LR is the η₀ tried",
            ["arm", "name", "keys", "η₀ tried", "weights evaluated"],
            arms,
            text_columns=(0, 1, 2, 3, 4),
            wrap_columns=(2,),
        ),
    ]


def _engine(folder: Path) -> str:
    """The line in which a run says which engine it takes."""
    try:
        with (folder / LOG_FILE).open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("engine: "):
                    return line.removeprefix("engine: ").partition(";")[0].strip()
    except OSError:
        pass
    return ""
