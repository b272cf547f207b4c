"""Curves show what metrics.json says, however the run ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.tools.called import called
from zenith_det.commands import plot
from zenith_det.errors import UserError
from zenith_det.report import curves
from zenith_det.report.curves import plot_curves, plot_curves_compare, smooth
from zenith_det.training.course.metrics_file import by_test_set, read_metrics


def training_line(iteration: int, **extra: float) -> dict[str, float]:
    return {
        "iteration": iteration,
        "total_loss": 3.0 / (1 + iteration / 50),
        "loss_cls": 1.0 / (1 + iteration / 50),
        "loss_box_reg": 2.0 / (1 + iteration / 50),
        "lr": 0.02,
        "zenith/ratio": 0.75,
        "zenith/grad_norm": 2.0 + (iteration // 10) % 2,
        "zenith/window_mean": 2.5,
        "zenith/zenith": 3.25,
        "zenith/skipped_steps": 0,
        "time": 0.1,
        **extra,
    }


def write(folder: Path, lines: list[dict[str, Any] | str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metrics.json").write_text("\n".join(text))
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures drawn, to look at their lines and not only at their files."""
    drawn: list[Figure] = []

    class Kept(Figure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            drawn.append(self)

    monkeypatch.setattr(curves, "Figure", Kept)
    return drawn


def panels(figure: Figure) -> dict[str, Any]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def labelled(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}


def test_all_panels_with_their_lines(tmp_path: Path, figures: list[Figure]) -> None:
    lines: list[Any] = [training_line(i) for i in range(9, 400, 10)]
    lines += [{"iteration": 199, "bbox/AP": 40.0, "segm/AP": 30.0, "bbox/AP50": 60.0, "bbox/AP-cat": 1.0}]
    lines += [{"iteration": 399, "bbox/AP": 35.0, "segm/AP": 33.0, "bbox/AP50": 61.0}]
    path = plot_curves(write(tmp_path / "run", lines))
    assert path == tmp_path / "run" / "curves.png"
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []
    with Image.open(path) as image:
        assert image.width > 1000
        assert len(image.convert("L").getcolors() or []) > 10
    found = panels(figures[0])
    assert list(found) == [
        "Total loss",
        "Loss components",
        "Average precision",
        "Effective learning rate",
        "LR ratio: window mean / zenith",
        "Gradient norm",
    ]
    ap = labelled(found["Average precision"])
    assert {"box AP 35.0 (best 40.0 at 199)", "mask AP 33.0"} <= set(ap)
    assert list(ap["mask AP 33.0"].get_xdata()) == [199, 399]
    assert list(ap["mask AP 33.0"].get_ydata()) == [30.0, 33.0]
    assert found["LR ratio: window mean / zenith"].get_ylim() == (0, 1.06)
    norm = labelled(found["Gradient norm"])
    assert set(norm) == {"each step", "window mean", "zenith"}
    assert set(norm["zenith"].get_ydata()) == {3.25}
    assert list(labelled(found["Loss components"])) == ["box reg", "cls"]
    # One time axis for all.
    assert len({axes.get_xlim() for axes in found.values()}) == 1


def several_test_sets() -> list[Any]:
    """A run with two test sets, averaged weights and the validation loss."""
    lines: list[Any] = [training_line(i) for i in range(9, 400, 10)]
    for iteration, gain in ((199, 0.0), (399, 5.0)):
        scalars = {
            "street/bbox/AP": 40.0, "averaged/street/bbox/AP": 41.0, "street/bbox/AP-car": 40.0,
            "street/validation/total_loss": 0.5, "averaged/street/validation/total_loss": 9.0,
            "my/woods/bbox/AP": 20.0, "my/woods/bbox/AP50": 30.0, "my/woods/validation/total_loss": 0.7,
        }  # fmt: skip
        lines.append({"iteration": iteration, **{name: value + gain for name, value in scalars.items()}})
    return lines


def test_each_of_several_test_sets_has_its_panel(tmp_path: Path, figures: list[Figure]) -> None:
    plot_curves(write(tmp_path, several_test_sets()))
    found = panels(figures[0])
    assert [title for title in found if "precision" in title] == [
        "Average precision: street",
        "Average precision: my/woods",
    ]
    street = labelled(found["Average precision: street"])
    assert list(street["box AP, averaged 46.0"].get_ydata()) == [41.0, 46.0]
    assert "dashed: trained weights" in street
    assert list(labelled(found["Average precision: my/woods"])["box AP 25.0"].get_ydata()) == [20.0, 25.0]
    loss = labelled(found["Total loss"])
    assert list(loss) == ["total", "validation: street", "validation: my/woods"]
    assert list(loss["validation: my/woods"].get_ydata()) == [0.7, 5.7]


def test_scalars_by_test_set(tmp_path: Path) -> None:
    name = "street/bbox/AP-a/bbox/AP-b"  # a class may be called what it wants
    plain = [
        {"iteration": 9, "bbox/AP": 1.0, "averaged/segm/AP50": 2.0, "validation/loss_cls": 3.0, "lr": 4.0}
    ]
    sets = by_test_set(read_metrics(write(tmp_path / "one", list(plain))))
    assert {key: list(value) for key, value in sets.items()} == {
        "": ["bbox/AP", "averaged/segm/AP50", "validation/loss_cls"]
    }
    sets = by_test_set(
        read_metrics(write(tmp_path / "two", [{"iteration": 9, name: 1.0, "bbox/bbox/AP": 2.0}]))
    )
    assert {key: list(value) for key, value in sets.items()} == {
        "street": ["bbox/AP-a/bbox/AP-b"],
        "bbox": ["bbox/AP"],
    }


def test_panels_without_data_are_left_out(tmp_path: Path, figures: list[Figure]) -> None:
    plot_curves(write(tmp_path, [{"iteration": i, "total_loss": 1.0, "lr": 0.1} for i in (1, 2, 3)]))
    assert list(panels(figures[0])) == ["Total loss", "Effective learning rate"]


def test_one_line_is_enough(tmp_path: Path) -> None:
    assert plot_curves(write(tmp_path, [training_line(0)])).is_file()


def test_skipped_steps_are_told(tmp_path: Path, figures: list[Figure]) -> None:
    lines: list[Any] = [training_line(i, **{"zenith/skipped_steps": 3}) for i in range(30)]
    plot_curves(write(tmp_path, lines))
    assert "3 steps skipped: not finite" in labelled(panels(figures[0])["Gradient norm"])


def test_a_spike_does_not_press_the_rest_flat(tmp_path: Path, figures: list[Figure]) -> None:
    lines: list[Any] = [training_line(i) for i in range(200)]
    lines[120]["zenith/grad_norm"] = 5000.0
    lines[0]["total_loss"] = 9000.0
    plot_curves(write(tmp_path, lines))
    found = panels(figures[0])
    assert found["Gradient norm"].get_ylim()[1] < 300
    assert found["Total loss"].get_ylim()[1] < 5


def test_torn_lines_are_skipped(tmp_path: Path) -> None:
    text = json.dumps(training_line(20))
    # A crash tore a line; the resumed run went on behind it, and was torn again.
    lines: list[Any] = [
        training_line(10),
        text[:25] + json.dumps(training_line(15)),
        "",
        "[1, 2]",
        "{}",
        text[:40],
    ]
    assert list(read_metrics(write(tmp_path, lines))["total_loss"].iterations) == [10]


def test_a_line_cut_within_a_letter_is_skipped(tmp_path: Path) -> None:
    folder = write(tmp_path, [training_line(10)])
    with (folder / "metrics.json").open("ab") as stream:
        stream.write(b'\n{"iteration": 20, "loss_\xc3')
    assert list(read_metrics(folder)["lr"].iterations) == [10]


def test_a_resumed_run_replaces_what_it_repeats_and_drops_what_no_longer_counts(tmp_path: Path) -> None:
    first: list[Any] = [training_line(i, lr=1.0) for i in (10, 20, 30, 40, 50)] + [
        {"iteration": 50, "bbox/AP": 1.0}
    ]
    second: list[Any] = [training_line(i, lr=2.0) for i in (25, 35)]
    series = read_metrics(write(tmp_path, [*first, *second]))
    assert list(series["lr"].iterations) == [10, 20, 25, 35]
    assert list(series["lr"].values) == [1.0, 1.0, 2.0, 2.0]
    assert "bbox/AP" not in series


def test_a_value_logged_twice_counts_as_last_logged(tmp_path: Path) -> None:
    lines: list[Any] = [
        training_line(10),
        {"iteration": 10, "lr": 7.0, "bbox/AP": 3.0},
        {"iteration": 5, "bbox/AP": 1.0},
    ]
    series = read_metrics(write(tmp_path, lines))
    assert list(series["lr"].values) == [7.0]
    assert list(series["bbox/AP"].iterations) == [5, 10]
    assert list(series["total_loss"].iterations) == [10]


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    lines: list[Any] = [
        training_line(10),
        '{"iteration": 20, "lr": NaN, "total_loss": Infinity}',
        training_line(30),
    ]
    series = read_metrics(write(tmp_path, lines))
    assert list(series["lr"].iterations) == [10, 30]
    plot_curves(tmp_path)


def test_no_metrics_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.json: cannot read"):
        plot_curves(tmp_path)
    write(tmp_path, ["{"])
    with pytest.raises(UserError, match="no metrics in it yet"):
        plot_curves(tmp_path)
    write(tmp_path, [{"iteration": 1, "time": 0.1}])
    with pytest.raises(UserError, match="nothing to draw"):
        plot_curves(tmp_path)


def test_comparison_draws_each_run_under_its_name(tmp_path: Path, figures: list[Figure]) -> None:
    one = write(tmp_path / "a" / "output", [training_line(i, **{"bbox/AP": 10.0 + i}) for i in (10, 20, 30)])
    plain = [{"iteration": i, "total_loss": 1.0, "lr": 0.1, "bbox/AP": 5.0} for i in (10, 20)]
    two = write(tmp_path / "b" / "output", list(plain))
    path = plot_curves_compare([one, two], tmp_path / "new" / "both.png")
    assert path.is_file()
    found = panels(figures[0])
    assert set(labelled(found["Total loss"])) == {"a/output", "b/output"}
    assert set(labelled(found["Box AP"])) == {"a/output  40.0", "b/output  5.0"}
    assert set(labelled(found["LR ratio: window mean / zenith"])) == {"a/output"}
    assert "Mask AP" not in found


def test_comparison_of_runs_with_several_test_sets(tmp_path: Path, figures: list[Figure]) -> None:
    one = write(tmp_path / "one", several_test_sets())
    two = write(tmp_path / "two", [training_line(9), {"iteration": 9, "street/bbox/AP": 7.0}])
    plot_curves_compare([one, two], tmp_path / "both.png")
    found = panels(figures[0])
    assert set(labelled(found["Box AP: street"])) == {"one, averaged  46.0", "two  7.0"}
    assert set(labelled(found["Box AP: my/woods"])) == {"one  25.0"}


def test_comparison_of_one_run_or_of_a_run_with_itself(tmp_path: Path) -> None:
    run = write(tmp_path, [training_line(1)])
    with pytest.raises(UserError, match="two runs or more"):
        plot_curves_compare([run])
    with pytest.raises(UserError, match="named twice"):
        plot_curves_compare([run, run])


def test_smoothing_keeps_a_constant_and_does_not_lag() -> None:
    assert smooth(np.full(20, 3.0), 7) == pytest.approx(np.full(20, 3.0))
    ramp = np.arange(40.0)
    assert smooth(ramp, 9)[10:30] == pytest.approx(ramp[10:30])
    noise = np.random.default_rng(0).normal(size=400)
    assert smooth(noise, 30).std() < 0.5 * noise.std()
    assert list(smooth(np.array([5.0]), 9)) == [5.0]


def test_the_tool(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [training_line(i) for i in range(0, 50, 10)])
    done = called(plot.main, str(run))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == run / "curves.png"
    failed = called(plot.main, str(tmp_path / "none"))
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1


def test_a_single_point_is_seen(tmp_path: Path, figures: list[Figure]) -> None:
    """A run of one line in the log, evaluated once: a line alone would show nothing."""
    lines = [training_line(0), {"iteration": 0, "bbox/AP": 12.0, "bbox/AP50": 30.0}]
    folders = [write(tmp_path / name, lines) for name in "ab"]
    plot_curves(folders[0])
    plot_curves_compare(folders, tmp_path / "both.png")
    drawn = [
        line
        for figure in figures
        for axes in figure.axes
        for line in axes.lines
        if len(line.get_xdata()) == 1
    ]
    # Three losses, AP and AP50, LR, ratio, three of the norm; then loss, AP, LR, ratio and mean of both runs.
    assert len(drawn) == 10 + 10
    assert all(line.get_marker() not in ("None", "", None) for line in drawn)
