"""What a benchmark found: a table on the terminal, JSON and a plot in a folder. Ratios come first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from zenith_det.benchmarking.machine import describe_machine
from zenith_det.benchmarking.measuring import Samples
from zenith_det.errors import UserError

__all__ = ["Comparison", "Ratio", "Report"]

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#8a8a8a"


@dataclass(frozen=True)
class Ratio:
    """The time of case ``of`` over that of case ``to``; ``at_most`` is what it should not exceed."""

    of: str
    to: str
    at_most: float | None = None


@dataclass
class Comparison:
    """Cases that were measured together.

    Args:
        title: what of.
        samples: case -> times.
        ratios: which times to divide by which, the one that matters most first.
        columns: case -> column -> value (a number or a text), shown beside the times.
        facts: what else was found, such as whether results agree.
        x: a number that places this comparison among others of its kind (images, parameters), if there is one.
    """

    title: str
    samples: Mapping[str, Samples]
    ratios: Sequence[Ratio] = ()
    columns: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    x: float | None = None

    def ratio(self, ratio: Ratio) -> float:
        """The ratio of the medians."""
        return self.samples[ratio.of].median / self.samples[ratio.to].median

    def ratio_of_least(self, ratio: Ratio) -> float:
        """The ratio of the shortest times: what a machine with nothing else to do would show."""
        return self.samples[ratio.of].least / self.samples[ratio.to].least

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "x": self.x,
            "ratios": [
                {
                    "of": ratio.of,
                    "to": ratio.to,
                    "ratio": self.ratio(ratio),
                    "ratio_of_least": self.ratio_of_least(ratio),
                    "at_most": ratio.at_most,
                }
                for ratio in self.ratios
            ],
            "cases": [
                {
                    "name": name,
                    "median_s": samples.median,
                    "quartiles_s": list(samples.quartiles),
                    "least_s": samples.least,
                    "seconds": list(samples.seconds),
                    **self.columns.get(name, {}),
                }
                for name, samples in self.samples.items()
            ],
            "facts": dict(self.facts),
        }


@dataclass
class Report:
    """All that one subcommand measured, with its settings; the machine is described when this is made."""

    command: str
    settings: Mapping[str, Any]
    comparisons: Sequence[Comparison]
    machine: Mapping[str, Any] = field(default_factory=describe_machine)

    def show(self, console: Console | None = None) -> None:
        """Print the tables."""
        console = console or Console(highlight=False)
        for comparison in self.comparisons:
            console.print(f"\n[bold]{comparison.title}[/bold]")
            if comparison.ratios:
                console.print(_ratio_table(comparison))
            console.print(_time_table(comparison))
            for name, value in comparison.facts.items():
                console.print(f"{name}: {value}")
        told = ("cpu", "cores", "torch_threads", "load_average", "torch", "gpu")
        console.print("\n" + ", ".join(f"{key} {self.machine[key]}" for key in told if key in self.machine))

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write ``<command>.json`` and ``<command>.png`` to ``folder``, and return their paths.

        Raises:
            UserError: the folder can't be written to.
        """
        json_file, picture = folder / f"{self.command}.json", folder / f"{self.command}.png"
        content = {
            "command": self.command,
            "settings": dict(self.settings),
            "machine": dict(self.machine),
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(content, indent=1) + "\n")
            self._draw(picture)
        except OSError as error:
            raise UserError(f"--output {folder}: can't be written to ({error.strerror or error})") from error
        return json_file, picture

    def _draw(self, path: Path) -> None:
        by_size = [comparison for comparison in self.comparisons if comparison.x is not None]
        with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
            figure = _lines(self.comparisons) if by_size else _bars(self.comparisons)
            FigureCanvasAgg(figure).print_png(str(path))


def _ratio_table(comparison: Comparison) -> Table:
    table = Table("ratio of medians", "", "at most", "of the shortest", box=None, pad_edge=False)
    for column in (1, 2, 3):
        table.columns[column].justify = "right"
    for ratio in comparison.ratios:
        value = comparison.ratio(ratio)
        limit = "" if ratio.at_most is None else f"{ratio.at_most:.3f}"
        style = "red" if ratio.at_most is not None and value > ratio.at_most else "bold"
        table.add_row(
            f"{ratio.of} / {ratio.to}",
            f"[{style}]{value:.3f}[/]",
            limit,
            f"{comparison.ratio_of_least(ratio):.3f}",
        )
    return table


def _time_table(comparison: Comparison) -> Table:
    extra = list(dict.fromkeys(name for row in comparison.columns.values() for name in row))
    table = Table("case", "median", "half of the runs", "shortest", *extra, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, samples in comparison.samples.items():
        first, third = samples.quartiles
        row = comparison.columns.get(name, {})
        table.add_row(
            name,
            _time(samples.median),
            f"{_time(first)} … {_time(third)}",
            _time(samples.least),
            *(_value(row.get(column, "")) for column in extra),
        )
    return table


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _value(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _bars(comparisons: Sequence[Comparison]) -> Figure:
    """Medians over that of the reference (the first ratio's denominator), with the quartiles; a panel each."""
    heights = [len(comparison.samples) * 0.32 + 1.0 for comparison in comparisons]
    figure = Figure(figsize=(8, sum(heights)), dpi=130, layout="constrained")
    panels = figure.subplots(len(comparisons), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, comparison in zip(panels, comparisons):
        names = list(comparison.samples)
        reference = comparison.ratios[0].to if comparison.ratios else names[0]
        unit = comparison.samples[reference].median
        middle = [comparison.samples[name].median / unit for name in names]
        spread = [comparison.samples[name].quartiles for name in names]
        low = [max(m - first / unit, 0.0) for m, (first, _) in zip(middle, spread)]
        high = [max(third / unit - m, 0.0) for m, (_, third) in zip(middle, spread)]
        colours = [GREY if name == reference else VERMILION if _is_ours(name) else BLUE for name in names]
        axes.barh(names, middle, color=colours, height=0.62, xerr=(low, high), ecolor="#444444")
        for row, value in enumerate(middle):
            axes.annotate(
                f"{value:.2f}", (middle[row] + high[row], row), (4, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        axes.invert_yaxis()
        axes.axvline(1.0, color="#444444", linewidth=0.8)
        axes.margins(x=0.1)
        axes.set_title(comparison.title, loc="left", fontweight="bold", fontsize=10)
        axes.set_xlabel(f"time / {reference}")
    return figure


def _lines(comparisons: Sequence[Comparison]) -> Figure:
    """Medians over ``x``, a panel for each group of comparisons with the same title up to the colon."""
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.x is not None:
            groups.setdefault(comparison.title.partition(":")[0], []).append(comparison)
    figure = Figure(figsize=(8, 2.8 * len(groups)), dpi=130, layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axes, (title, group) in zip(panels, groups.items()):
        for name in dict.fromkeys(name for comparison in group for name in comparison.samples):
            points = [(c.x, c.samples[name].median) for c in group if name in c.samples]
            axes.plot(*zip(*points), marker="o", markersize=4, label=name)
        axes.set(xscale="log", yscale="log", ylabel="seconds", xlabel=str(group[0].facts.get("x", "")))
        axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(color="#e6e6e6", linewidth=0.7)
    return figure


def _is_ours(name: str) -> bool:
    return name.startswith(("ZENITH", "zenith_det", "built-in"))
