"""What the fuzzer, and the replay of what it found, do with one input: make files of it and read them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.data.builders import picture

from .readers import read_annotations, read_checkpoint, read_config, refusal

CORPUS = Path(__file__).parent / "corpus"
FILE_MARK = b"=== "  # in a config's input: the start of another file, or of overrides


def prepare(target: str, folder: Path) -> None:
    """What stays the same from input to input."""
    if target == "annotations":
        (folder / "images").mkdir(exist_ok=True)
        for number in (1, 2):
            picture().save(folder / f"images/{number}.png")


def run_annotations(data: bytes, folder: Path) -> str | None:
    """The input is the annotation file; its images may be ``1.png`` and ``2.png``, 40 x 30."""
    (folder / "set.json").write_bytes(data)
    return refusal(read_annotations, str(folder / "set.json"), str(folder / "images"))


def run_config(data: bytes, folder: Path) -> str | None:
    """The input is the config file; lines ``=== b.yaml`` and ``=== opts`` begin a base file and overrides."""
    for old in folder.glob("*.yaml"):
        old.unlink()
    opts: list[str] = []
    name, body = b"x.yaml", b""

    def end() -> None:
        if name == b"opts":
            for line in body.decode("utf-8", "surrogateescape").split("\n"):
                opts.extend(line.split(" ", 1) if line else [])
        elif name in (b"x.yaml", b"a.yaml", b"b.yaml", b"c.yaml"):
            (folder / name.decode()).write_bytes(body)

    for line in data.split(b"\n"):
        if line.startswith(FILE_MARK):
            end()
            name, body = line[len(FILE_MARK) :], b""
        else:
            body += line + b"\n"
    end()
    return refusal(read_config, str(folder / "x.yaml"), opts)


def run_checkpoint(data: bytes, folder: Path) -> str | None:
    """The input's first byte says what follows.

    ``z``: the ``data.pkl`` of a zip, whose ``data/0`` and ``data/1`` have 64 bytes; ``p``: a ``.pkl``; ``f``: a ``.pth``, byte by
    byte.
    """
    kind, data = data[:1], data[1:]
    path = folder / ("x.pkl" if kind == b"p" else "x.pth")
    if kind == b"z":
        buffer = io.BytesIO()
        parts = {"data.pkl": data, "byteorder": b"little"}
        parts |= {"data/0": bytes(range(64)), "data/1": bytes(64)}
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, part in parts.items():
                archive.writestr(f"x/{name}", part)
        data = buffer.getvalue()
    path.write_bytes(data)
    return refusal(read_checkpoint, str(path))


RUN: dict[str, Callable[[bytes, Path], str | None]] = {
    "annotations": run_annotations,
    "config": run_config,
    "checkpoint": run_checkpoint,
}
