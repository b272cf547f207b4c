"""``zenith-det``: each command by its word, said in the way it was typed, and started without loading the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from zenith_det import __version__, cli
from zenith_det.commands import COMMANDS, dispatch
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


@pytest.mark.parametrize("script", ["check_dataset.py", "train_net.py"])
def test_a_command_is_shown_as_it_was_typed(script: str, tmp_path: Path) -> None:
    (word,) = [word for word in COMMANDS if cli.script_name(word) == script]
    for words, shown in (
        ([console_script(tmp_path), word], f"zenith-det {word}"),
        (["-m", "zenith_det", word], f"python -m zenith_det {word}"),
        ([ROOT / "tools" / script], f"python {ROOT}/tools/{script}"),
    ):
        done = typed(*words, "--help", cwd=tmp_path)
        assert done.stdout.startswith(f"usage: {shown} [-h]"), done.stderr
        assert f"\n    {shown} " in done.stdout, "the examples"
        assert "%(prog)s" not in done.stdout


def test_a_message_names_another_command_in_the_same_way(tmp_path: Path) -> None:
    # An image that isn't there.
    image = {"id": 1, "file_name": "a.jpg", "width": 64, "height": 64}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 20, 20], "area": 400, "iscrowd": 0}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "bad.json").write_text(json.dumps(content))
    words = [
        "--num-gpus",
        "0",
        "--engine",
        "torchvision",
        "--config-file",
        ROOT / "configs/faster_rcnn_zenith.yaml",
    ]
    words += ["--train-json", "bad.json", "--train-images", ".", "MODEL.WEIGHTS", ""]
    for start, shown in (
        ([console_script(tmp_path), "train"], "zenith-det check-dataset"),
        ([ROOT / "tools/train_net.py"], f"python {ROOT}/tools/check_dataset.py"),
    ):
        done = typed(*start, *words, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].endswith(f"({shown} lists them all)")


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
