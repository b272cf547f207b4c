"""``zenith-det``: each command by its word, said in the way it was typed, and started without loading the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
from zenith_det import __version__, cli, commands
from zenith_det.commands import COMMANDS, check_dataset, dispatch
from zenith_det.errors import UserError

SCRIPTS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))


def typed(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )  # fmt: skip


def console_script(folder: Path) -> Path:
    """What pip makes of the entry point in setup.py."""
    (setup_line,) = [s for s in (ROOT / "setup.py").read_text().splitlines() if "console_scripts" in s]
    name, _, target = setup_line.split('"')[3].partition(" = ")
    module, _, function = target.partition(":")
    path = folder / name
    path.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    return path


def test_each_script_is_a_command() -> None:
    assert sorted(cli.script_name(word) for word in COMMANDS) == SCRIPTS


def test_a_command_is_shown_as_it_was_typed(tmp_path: Path) -> None:
    word, script = "convert-dataset", "convert_dataset.py"
    for words, shown in (
        ([console_script(tmp_path), word], f"zenith-det {word}"),
        (["-m", "zenith_det", word], f"python -m zenith_det {word}"),
        ([ROOT / "tools" / script], f"python {ROOT}/tools/{script}"),
    ):
        done = typed(*words, "--help", cwd=tmp_path)
        assert done.stdout.startswith(f"usage: {shown} [-h]"), done.stderr
        assert f"\n    {shown} " in done.stdout, "the examples"
        assert "%(prog)s" not in done.stdout


def test_another_command_is_named_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.command("find-lr") == "zenith-det find-lr"  # from a program that is none of ours
    for argv, start, shown in (
        ("/env/bin/zenith-det", commands, "zenith-det find-lr"),
        ("/env/lib/zenith_det/__main__.py", commands, "python -m zenith_det find-lr"),
        ("../tools/check_dataset.py", check_dataset, "python ../tools/find_lr.py"),
    ):
        monkeypatch.setattr(sys, "argv", [argv])
        monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(main=start.main))
        assert cli.command("find-lr") == shown
        assert cli.command("train") == shown.replace("find-lr", "train").replace("find_lr", "train_net")


def test_a_users_own_script_of_that_name_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "train_net.py").write_text("from zenith_det import cli\nprint(cli.command('find-lr'))\n")
    assert typed(tmp_path / "train_net.py", cwd=tmp_path).stdout == "zenith-det find-lr\n"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["help"], ["-h"]):
        assert dispatch(words) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {word} " in out for word in COMMANDS)
    assert dispatch(["--version"]) == 0
    assert capsys.readouterr().out == f"zenith_det {__version__}\n"
    with pytest.raises(SystemExit, match="0"):
        dispatch(["help", "plot"])
    assert capsys.readouterr().out.startswith("usage: zenith-det plot")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("trian", "did you mean train?"),
        ("train_net.py", "did you mean train?"),
        ("check_dataset", "did you mean check-dataset?"),
        ("--resume", "a command comes before its flags: zenith-det train --resume"),
        ("xyzzy", "xyzzy: no such command; zenith-det --help lists them"),
    ],
)
def test_an_unknown_word(word: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        dispatch([word])
    assert told in str(caught.value)


def test_help_loads_no_library() -> None:
    code = (
        "import sys; from zenith_det.commands import dispatch; dispatch(['--help'])\n"
        "assert not {'torch', 'numpy', 'fvcore', 'yaml'} & set(sys.modules)"
    )
    assert typed("-c", code, cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("encoding", "into", "code", "error"),
    [
        ("ascii", "", 2, r"error: caf\xe9: no such command; zenith-det --help lists them"),
        ("utf-8", "| head -c 1 > /dev/null", 141, ""),
        ("utf-8", "> /dev/full", 2, "error: standard output: cannot be written: No space left on device"),
    ],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written_as_it_is(
    encoding: str, into: str, code: int, error: str, tmp_path: Path
) -> None:
    word = "café" if encoding == "ascii" else "--help"
    # The help is printed again and again, since it fits into a pipe.
    again = "import sys; sys.argv[0] = 'zenith-det'; from zenith_det import cli, commands;"
    again += " cli.run(lambda: [commands.dispatch(sys.argv[1:]) for _ in range(1000)] and 0)"
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "$0" "$1" {into}; exit ${{PIPESTATUS[0]}}', again, word],
        capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.stderr == (f"{error}\n" if error else "")
    assert done.returncode == code
