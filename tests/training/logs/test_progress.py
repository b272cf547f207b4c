from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from zenith_det.errors import UserError
from zenith_det.training.logs.events import EventStorage
from zenith_det.training.logs.logging_setup import reset_logging, setup_logging
from zenith_det.training.logs.progress import ConsoleWriter, EvaluationProgress, format_duration


@pytest.fixture(autouse=True)
def ordinary_logging() -> Iterator[None]:
    yield
    reset_logging()


def scalars(storage: EventStorage) -> None:
    storage.put_scalars(time=0.5, data_time=0.01, loss_cls=1.0, loss_box_reg=0.25, total_loss=1.25)
    storage.put_scalars(smoothing=False, lr=0.0142, **{"zenith/ratio": 0.71, "zenith/grad_norm": 3.2})


def test_without_a_terminal_plain_lines_go_out_and_into_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path)
    storage = EventStorage()
    writer = ConsoleWriter(100, iters_per_epoch=25, batch_size=16)
    for storage.iter in range(20):
        scalars(storage)
        writer.update(storage)
    writer.write(storage)
    writer.close()
    out = capsys.readouterr().out
    line = re.fullmatch(r"\[\d\d/\d\d [\d:]{8} zenith_det\.training\.logs\.progress\]: (.*)\n", out)
    assert line is not None
    rss = line[1].rpartition("  rss: ")
    assert re.fullmatch(r"\d+M", rss[2])
    assert rss[0] == (
        "eta: 0:00:40  iter: 19  epoch: 0.80  total_loss: 1.25  loss_cls: 1  loss_box_reg: 0.25  "
        "time: 0.5000  last_time: 0.5000  data_time: 0.0100  last_data_time: 0.0100  "
        "lr: 0.0142  ratio: 0.7100  grad_norm: 3.2  images/s: 32"
    )
    assert (tmp_path / "log.txt").read_text() == out
    assert storage.latest()["eta_seconds"] == (40.0, 19)


def test_nan_losses_and_missing_scalars_are_shown_and_no_obstacle(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    storage = EventStorage()
    storage.put_scalar("total_loss", float("nan"))
    writer = ConsoleWriter(10)
    writer.write(storage)
    assert "total_loss: nan" in capsys.readouterr().out
    storage.iter = 10  # after the last iteration there is nothing to report
    writer.write(storage)
    assert capsys.readouterr().out == ""


def test_skipped_steps_are_shown_once_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    storage = EventStorage()
    writer = ConsoleWriter(10)
    for count in (0, 2):
        storage.put_scalar("zenith/skipped_steps", count, smoothing=False)
        writer.write(storage)
    first, second = capsys.readouterr().out.splitlines()
    assert "skipped" not in first
    assert "skipped_steps: 2" in second


@pytest.mark.parametrize(("seconds", "text"), [(None, "?"), (float("nan"), "?"), (-1, "?"), (1e300, "?"),
                                               (80.9, "0:01:20"), (93784, "1 day, 2:03:04")])  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


def test_evaluation_without_a_terminal_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    now = 0.0
    with EvaluationProgress(40, "val", clock=lambda: now) as progress:
        for _ in range(20):
            now += 1.0
            progress.update(2)
    lines = [line.split("]: ")[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "Inference done 10/40 of val. 2 images/s. ETA=0:00:15",
        "Inference done 20/40 of val. 2 images/s. ETA=0:00:10",
        "Inference done 30/40 of val. 2 images/s. ETA=0:00:05",
        "Inference done 40/40 of val in 0:00:20, 2 images/s",
    ]


def test_a_silent_rank_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    with EvaluationProgress(0) as progress:
        progress.update(3)
    assert capsys.readouterr().out == ""


# --- on a terminal ---------------------------------------------------------------------------------------


LIVE = """
import logging, os, sys
from zenith_det.training.logs.events import EventStorage
from zenith_det.training.logs.logging_setup import setup_logging
from zenith_det.training.logs.progress import ConsoleWriter, EvaluationProgress
log = setup_logging(sys.argv[1])
storage = EventStorage()
writer = ConsoleWriter(40, iters_per_epoch=10, batch_size=16)
for storage.iter in range(40):
    storage.put_scalars(time=0.5, total_loss=2.5, loss_cls=2.5)
    storage.put_scalars(smoothing=False, lr=0.0142, **{"zenith/ratio": 0.71, "zenith/grad_norm": 3.2})
    if storage.iter % 10 == 9:
        writer.write(storage)
    writer.update(storage)
    if storage.iter == 15:
        log.info("copypaste: " + "12.3456," * 20 + "end")
        log.warning("[bold]brackets[/bold] stay")
        print("a print")
        if os.fork() == 0:
            log.info("from a worker")
            os._exit(0)
        os.wait()
        with EvaluationProgress(8, "coco_2017_val") as progress:
            for _ in range(8):
                progress.update()
        sys.exit("stopped") if "stop" in sys.argv else None
writer.close()
log.info("the end")
"""


def on_a_terminal(arguments: list[str], columns: int) -> tuple[str, int]:
    """Everything the program sent to its terminal, and its exit code."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    import fcntl
    import struct
    import termios

    pid, master = pty.fork()
    if pid == 0:
        environment = {**os.environ, "TERM": "xterm-256color"}
        for name in ("NO_COLOR", "COLUMNS", "LINES"):
            environment.pop(name, None)
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        os.execve(sys.executable, [sys.executable, "-c", LIVE, *arguments], environment)
    received = b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # Linux ends a terminal so
            break
        if not data:
            break
        received += data
    os.close(master)
    return received.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def screen(stream: str) -> list[str]:
    """The lines that stay, by the few controls that a bar uses (cursor up, erase line, return)."""
    lines = [""]
    row = 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", stream):
        if token == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif token.startswith("\x1b"):
            if token[-1] == "A":
                row -= int(token[2:-1] or 1)
                assert row >= 0
            elif token[-1] == "K":
                lines[row] = ""
        elif token != "\r":
            lines[row] += token
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("columns", [80, 120])
def test_the_bar_stays_below_and_log_lines_are_whole(tmp_path: Path, columns: int) -> None:
    stream, code = on_a_terminal([str(tmp_path)], columns)
    assert code == 0, stream
    shown = screen(stream)
    plain = [re.sub(r"^\[[\d/]+ [\d:]+\] ", "", line) for line in shown]
    assert "copypaste: " + "12.3456," * 20 + "end" in plain
    assert "WARNING [bold]brackets[/bold] stay" in plain
    assert "a print" in plain
    assert any(line.startswith("Inference done 8/8 of coco_2017_val") for line in plain)
    # The last state of the bar, once, then the line that came after it.
    bars = [i for i, line in enumerate(shown) if "40/40" in line]
    assert len(bars) == 1
    rest = shown[bars[0] :]
    assert all(len(line) <= columns for line in rest)
    text = " ".join(rest)
    for part in ("eta 0:00:00", "loss\u00a02.5", "cls\u00a02.5", "lr\u00a00.0142", "ratio\u00a00.7100",
                 "grad\u00a0norm\u00a03.2", "images/s\u00a032"):  # fmt: skip
        assert part in text
    assert "epoch 4.0/4" in shown[bars[0]]
    assert rest[0].startswith("Training  ━━━")
    assert plain[bars[0] + 1 :][-2:] == ["the end", ""]
    assert stream.rindex("\x1b[?25h") > stream.rindex("\x1b[?25l")  # the cursor is visible again
    # Periodic lines are in the file, though the terminal shows the bar in their place.
    log = (tmp_path / "log.txt").read_text()
    assert log.count("total_loss: 2.5") == 4
    assert "from a worker" in log
    assert "\x1b" not in log
    assert not any("total_loss" in line for line in shown)


def test_a_run_that_stops_in_the_middle_leaves_an_ordinary_terminal(tmp_path: Path) -> None:
    stream, code = on_a_terminal([str(tmp_path), "stop"], 80)
    assert code == 1
    assert "stopped" in stream
    assert stream.rindex("\x1b[?25h") > stream.rindex("\x1b[?25l")


def test_forced_colours_make_no_bar_in_a_pipe(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIVE, str(tmp_path)],
        env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert done.stdout.count("total_loss: 2.5") == 4


# --- the log ---------------------------------------------------------------------------------------------


def test_setting_up_twice_logs_once_and_a_resumed_run_appends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("one", "two"):
        for _ in range(2):
            logger = setup_logging(tmp_path)
        logger.info(text)
    assert [line.split("]: ")[1] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        "one",
        "two",
    ]
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_other_ranks_write_their_own_file_and_no_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path, rank=1).info("hello")
    assert capsys.readouterr().out == ""
    assert "hello" in (tmp_path / "log.txt.rank1").read_text()
    assert not (tmp_path / "log.txt").exists()


def test_a_root_logger_that_someone_configured_does_not_double_lines(
    capfd: pytest.CaptureFixture[str],
) -> None:
    handler = logging.StreamHandler(sys.__stderr__)
    logging.getLogger().addHandler(handler)
    try:
        setup_logging().info("once")
    finally:
        logging.getLogger().removeHandler(handler)
    out, err = capfd.readouterr()
    assert (out + err).count("once") == 1


def test_tracebacks_are_logged(tmp_path: Path) -> None:
    logger = setup_logging(tmp_path)
    try:
        raise KeyError("x")
    except KeyError:
        logger.exception("it failed")
    assert "ERROR it failed\nTraceback" in (tmp_path / "log.txt").read_text()


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        setup_logging(tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_does_not_end_training_and_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    logger = setup_logging(tmp_path)
    for _ in range(3):
        logger.info("a line")
    out, err = capsys.readouterr()
    assert out.count("a line") == 3
    assert err.count("log lines are lost: No space left") == 1
    assert len(err.splitlines()) == 1
