"""Every input of the fuzzer's corpus again, without the fuzzer; and a short run of it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.data.builders import content

from .fuzz_targets import CORPUS, RUN, prepare

INPUTS = sorted(path for path in CORPUS.rglob("*") if path.is_file())
SECONDS = 8


@pytest.mark.timeout(60)
@pytest.mark.parametrize("path", INPUTS, ids=lambda path: str(path.relative_to(CORPUS)))
def test_every_input_of_the_corpus_is_read_or_refused(path: Path, tmp_path: Path) -> None:
    target = path.parent.name
    prepare(target, tmp_path)
    RUN[target](path.read_bytes(), tmp_path)


def test_the_seeds_lead_into_the_readers(tmp_path: Path) -> None:
    """A seed that is refused at the door would fuzz the door alone."""
    for target, names in {
        "annotations": ["bare.json", "keypoints.json", "masks.json", "polygons.json"],
        "config": ["anchors.txt", "base.txt", "opts.txt", "plain.txt"],
        "checkpoint": ["new.bin", "old.bin", "state.bin", "tensor.bin", "uint16.bin", "zoo0.bin", "zoo5.bin"],
    }.items():
        prepare(target, tmp_path)
        for name in names:
            assert RUN[target]((CORPUS / target / name).read_bytes(), tmp_path) is None, name
    assert "refused" in str(RUN["checkpoint"]((CORPUS / "checkpoint/code.bin").read_bytes(), tmp_path))


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in INPUTS) < 200 * 1024


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("target", sorted(RUN))
def test_a_short_fuzz_run_finds_nothing(target: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip('atheris is not installed (pip install -e ".[fuzz]"; wheels for Linux on x86-64 alone)')
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for path in INPUTS:
        if path.parent.name == target:
            (corpus / path.name).write_bytes(path.read_bytes())
    known = set(corpus.iterdir())
    command = [sys.executable, str(ROOT / "tests/reliability/fuzz.py"), target, "--seconds", str(SECONDS)]
    done = subprocess.run(
        [*command, "--corpus", str(corpus)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    found = {path.name: path.read_bytes()[:500] for path in set(corpus.iterdir()) - known}
    assert done.returncode == 0, f"{found}\n{done.stderr[-4000:]}"
    assert not found
    tried = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    assert tried is not None
    assert int(tried[1]) > len(known)


def test_the_fuzzer_keeps_what_it_finds(tmp_path: Path) -> None:
    """With a reader that fails on a word, the run fails and the input with the word is there."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip('atheris is not installed (pip install -e ".[fuzz]"; wheels for Linux on x86-64 alone)')
    import json

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "seed.json").write_text(json.dumps(content(2)).replace("square", "fail here"))
    arguments = ["fuzz.py", "annotations", "--seconds", "5", "--corpus", str(corpus), "--work", str(tmp_path)]
    broken = (
        "import sys, runpy; from tests.reliability import fuzz_targets\n"
        "run = fuzz_targets.RUN['annotations']\n"
        "def failing(data, folder):\n"
        "    assert b'fail here' not in data\n"
        "    return run(data, folder)\n"
        "fuzz_targets.RUN['annotations'] = failing\n"
        f"sys.argv = {arguments!r}\n"
        f"runpy.run_path({str(ROOT / 'tests/reliability/fuzz.py')!r}, run_name='__main__')\n"
    )
    (tmp_path / "inputs").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", broken],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode != 0
    kept = list(corpus.glob("crash-*"))
    assert len(kept) == 1, done.stderr[-2000:]
    assert b"fail here" in kept[0].read_bytes()
