"""The commands that the documents show are ones that the tools take."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from zenith_det import cli
from zenith_det.commands import COMMANDS, compare, demo, train
from zenith_det.config import load_config

DOCUMENTS = [
    "README.md",
    "datasets/README.md",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
]
# With flags in the middle and keys anywhere.
WITH_KEYS = ("train", "find_lr", "compare")


def commands(document: str) -> list[str]:
    """Indented commands of this project, continued lines joined; those with "…" are not whole."""
    text = re.sub(r"\\\n\s+", "", (ROOT / document).read_text())
    found = re.findall(
        r"^ {4,}(?:python )?((?:tools/\w+\.py|zenith-det [a-z][a-z-]*) .*)$", text, re.MULTILINE
    )
    return [command for command in found if "…" not in command and "..." not in command]


ALL = [(document, command) for document in DOCUMENTS for command in commands(document)]


@pytest.mark.parametrize(("document", "command"), ALL, ids=[f"{d}: {c[:60]}" for d, c in ALL])
def test_a_documented_command_is_understood(
    document: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    start, *words = shlex.split(command, comments=True)
    script = cli.script_name(words.pop(0)) if start == "zenith-det" else Path(start).name
    (word,) = [word for word in COMMANDS if cli.script_name(word) == script]
    name = word.replace("-", "_")
    module = importlib.import_module(f"zenith_det.commands.{name}")
    if "[KEY VALUE" in module.argument_parser().format_usage() and name != "benchmark":
        args = cli.parse_arguments(module.argument_parser(), words)
    else:
        args = module.argument_parser().parse_args(words)
    keys = list(getattr(args, "opts", None) or [])
    assert not [word for word in keys if word.startswith("--")]
    if name in WITH_KEYS and not args.config_file.startswith(("out", "COCO-")):  # a run's, the zoo's
        load_config(args.config_file, keys)  # every KEY is one, and has a VALUE


def test_there_are_commands_to_check() -> None:
    assert len(ALL) > 20
    assert {"README.md"} < {document for document, _ in ALL}


@pytest.mark.parametrize(
    ("command", "words", "opts", "others"),
    [
        (
            train,
            "--epochs 3 OUTPUT_DIR SEED --resume SOLVER.BASE_LR -0.5 --train-json a.json SEED 1",
            "OUTPUT_DIR SEED SOLVER.BASE_LR -0.5 SEED 1",
            {"epochs": 3, "resume": True, "train_json": "a.json"},
        ),
        # What follows a flag of several words; names of files that look like keys.
        # A value too many is no third seed.
        (compare, "--seeds 0 1 SEED 9 2 --jobs 2", "SEED 9 2", {"seeds": [0, 1], "jobs": 2}),
        (
            demo,
            "--output o --input DSC_0001.JPG MODEL SEED.JPG MODEL.DEVICE cpu",
            "MODEL.DEVICE cpu",
            {"input": [Path("DSC_0001.JPG"), Path("MODEL"), Path("SEED.JPG")]},
        ),
        (
            demo,
            "run --opts SOLVER.X 1 --input a --output o",
            "SOLVER.X 1",
            {"run": "run", "input": [Path("a")]},
        ),
        # Misspelt, for whoever reads the keys to say so.
        (train, "--resume SOLVR.BASE_LR 1 --epochs 2", "SOLVR.BASE_LR 1", {"resume": True, "epochs": 2}),
    ],
)
def test_keys_may_stand_anywhere(command: Any, words: str, opts: str, others: dict[str, Any]) -> None:
    args = cli.parse_arguments(command.argument_parser(), words.split())
    assert args.opts == opts.split()
    assert {name: getattr(args, name) for name in others} == others


def test_a_key_without_a_value_before_a_flag_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    args = cli.parse_arguments(train.argument_parser(), ["OUTPUT_DIR", "--resume"])
    assert args.resume
    assert args.opts == ["OUTPUT_DIR"]
    with pytest.raises(SystemExit):
        cli.parse_arguments(train.argument_parser(), ["OUTPUT_DIR", "out", "--reusme"])
    assert "--reusme" in capsys.readouterr().err
