"""The commands that the documents show are ones that the tools take."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import ROOT
from zenith_det import cli
from zenith_det.commands import COMMANDS, train
from zenith_det.commands.model_arguments import parse_model_arguments
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
    if name == "compare":
        args = module.parse_arguments(words)
    elif name in ("demo", "export"):
        args = parse_model_arguments(module.argument_parser(), words)
    elif name in WITH_KEYS:
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


def test_flags_may_follow_keys() -> None:
    parser = train.argument_parser()
    words = [
        "--epochs",
        "3",
        "OUTPUT_DIR",
        "out",
        "--resume",
        "SOLVER.BASE_LR",
        "-0.5",
        "--train-json",
        "a.json",
        "SEED",
        "1",
    ]
    args = cli.parse_arguments(parser, words)
    assert (args.epochs, args.resume, args.train_json) == (3, True, "a.json")
    assert args.opts == ["OUTPUT_DIR", "out", "SOLVER.BASE_LR", "-0.5", "SEED", "1"]


def test_a_key_without_a_value_before_a_flag_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    args = cli.parse_arguments(train.argument_parser(), ["OUTPUT_DIR", "--resume"])
    assert args.resume
    assert args.opts == ["OUTPUT_DIR"]
    with pytest.raises(SystemExit):
        cli.parse_arguments(train.argument_parser(), ["OUTPUT_DIR", "out", "--reusme"])
    assert "--reusme" in capsys.readouterr().err
