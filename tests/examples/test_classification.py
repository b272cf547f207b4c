"""The classification example: every kind of network trains on real digits, the grid resumes, mistakes are told
in one line."""

from __future__ import annotations

import importlib
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from zenith_det.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "classification"
MODULES = ("images", "networks", "noise", "train", "compare", "noise_study", "bad_starts")

SMALL = {"width": 0.125, "limit": 96, "batch_size": 16, "device": "cpu", "window": 5}


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    """The example's modules, importable as its scripts import them, and gone afterwards."""
    pytest.importorskip("sklearn", reason="scikit-learn's digits: pip install zenith_det[classification]")
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.mark.parametrize("model", ["resnet18", "vgg11_bn", "mobilenet_v2", "densenet41"])
def test_networks_train_on_digits(example: SimpleNamespace, model: str) -> None:
    if model == "mobilenet_v2" and torch.__version__ < (2, 7):
        pytest.skip("torch 2.6 gives NaN gradients for MobileNet's convolutions of one pixel on the CPU")
    options = example.train.Options(model=model, epochs=3, lr=0.1, **SMALL)
    result = example.train.train(options, tell=lambda line: None)
    losses = [epoch["train_loss"] for epoch in result["epochs"]]
    assert losses[-1] < losses[0]
    assert [epoch["step"] for epoch in result["epochs"]] == [6, 12, 18]
    for epoch in result["epochs"]:
        assert epoch["lr"] == pytest.approx(0.1 * epoch["ratio"])
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_networks_take_small_images(example: SimpleNamespace, size: int) -> None:
    for name in ("resnet50", "vgg16", "mobilenet_v3_small"):
        model = example.networks.build(name, 7, size, width=0.125)
        assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_a_real_run_learns(
    example: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "run.json"
    flags = ["--width", "0.125", "--epochs", "4", "--window", "10", "--device", "cpu", "--output", str(out)]
    example.train.main(flags)
    result = json.loads(out.read_text())
    assert result["test_accuracy"] > 0.7
    assert result["epochs"][-1]["ratio"] < 0.7  # it fell, without a schedule
    assert f"test {result['test_accuracy']:.2%}" in capsys.readouterr().out


def test_every_regularizer_changes_the_training(example: SimpleNamespace) -> None:
    """Weight decay, label smoothing, and dropout in a network that has none of its own."""
    ends = []
    for regularizer in example.compare.REGULARIZERS.values():
        options = example.train.Options(epochs=1, **SMALL, **regularizer)
        ends.append(example.train.train(options, tell=lambda line: None)["epochs"][-1]["validation_loss"])
    assert len(set(ends)) == len(example.compare.REGULARIZERS)


def test_optimizers_follow_their_schedules(example: SimpleNamespace) -> None:
    last = {}
    for name in example.train.OPTIMIZERS:
        options = example.train.Options(epochs=1, optimizer=name, **SMALL)
        run = example.train.train(options, tell=lambda line: None)
        last[name] = run["epochs"][-1]["ratio"]
    assert last["sgd-constant"] == 1
    assert last["sgd-step"] == pytest.approx(0.01)
    assert 0 < last["sgd-cosine"] < 0.1
    assert last["adamw-cosine"] == pytest.approx(last["sgd-cosine"])
    assert 0 < last["zenith"] <= 1


def test_grid_resumes(example: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--output", str(tmp_path), "--width", "0.125", "--limit", "64", "--epochs", "1", "--device", "cpu",
        "--optimizers", "zenith", "sgd-cosine", "--seeds", "3", "4", "--lr-factors", "0.1", "1",
    ]  # fmt: skip
    example.compare.main(flags)
    capsys.readouterr()
    runs, table = (tmp_path / "runs.jsonl").read_text(), (tmp_path / "table.csv").read_text(encoding="utf-8")
    assert runs.count("\n") == 6  # two η₀ with one seed, one η₀ with the other, for each of two optimizers

    # As a process leaves it that was killed while it wrote the last run.
    (tmp_path / "runs.jsonl").write_text(runs[:-40])
    example.compare.main(flags)
    trained = [line for line in capsys.readouterr().out.splitlines() if "test" in line and " s" in line]
    assert sum("seed" in line for line in trained) == 1
    again = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in runs.splitlines()]
    assert [(run["options"], run["epochs"]) for run in again] == [
        (run["options"], run["epochs"]) for run in before
    ]
    columns = table.splitlines()[0].split(",")
    steady = columns.index("CPU s")
    rows = [
        line.split(",")[:steady] for line in (tmp_path / "table.csv").read_text(encoding="utf-8").splitlines()
    ]
    assert rows == [line.split(",")[:steady] for line in table.splitlines()]
    assert len(rows) == 3
    printed = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert [line.count("|") for line in printed] == [9, 9, 9, 9]  # head, rule and a line for each optimizer
    assert all(line.startswith("| resnet18 | none |") for line in printed[2:])
    with Image.open(tmp_path / "curves-resnet18-none.png") as picture:
        assert picture.size[0] > 1000


def test_learning_rate_and_steps_are_read_off_the_runs(example: SimpleNamespace) -> None:
    def run(lr: float, *accuracies: float, loss: float = 1.0) -> dict[str, object]:
        epochs = [
            {"step": 10 * number, "validation_accuracy": accuracy, "validation_loss": loss}
            for number, accuracy in enumerate(accuracies, start=1)
        ]
        return {"options": {"lr": lr}, "epochs": epochs}

    better, equal = run(0.1, 0.2, 0.9), run(0.3, 0.5, 0.9, loss=0.5)
    diverged = {"options": {"lr": 1.0}, "diverged": "epoch 1"}
    assert example.compare.best_lr([better, run(0.3, 0.9, 0.8), diverged]) == 0.1  # the last epoch counts
    assert example.compare.best_lr([better, equal]) == 0.3  # the loss decides
    assert (
        example.compare.best_lr([better, run(0.1, 0.2, 0.5), equal, {**diverged, "options": {"lr": 0.3}}])
        == 0.1
    )
    assert example.compare.best_lr([diverged]) is None
    assert example.compare._steps_to(0.5, [better, equal]) == 15
    assert example.compare._steps_to(0.95, [better, equal]) is None
    assert example.compare._steps_to(0.5, [better, diverged]) is None


def test_noise_study(example: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--output",
        str(tmp_path),
        "--width",
        "0.125",
        "--limit",
        "64",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    flags += ["--seeds", "0", "1", "--noise-every", "2", "--noise-batch-sizes", "128", "256"]
    example.noise_study.main(flags)
    probes = [run["noise"] for run in json.loads((tmp_path / "noise.json").read_text())]
    assert [(probe["step"], probe["batch_size"]) for probe in probes[1]] == [(0, 128), (0, 256)]
    pooled = sum(run[0]["noise"] for run in probes) / sum(
        run[0]["noise"] + run[0]["signal"] for run in probes
    )
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 0 |"))
    assert f", {100 * pooled:.0f} % (" in row
    assert (tmp_path / "noise.png").exists()


def test_a_diverged_run_is_a_row(
    example: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--output", str(tmp_path), "--width", "0.125", "--limit", "64", "--epochs", "1", "--seeds", "0"]
    flags += ["--optimizers", "sgd-constant", "zenith", "--device", "cpu"]
    example.compare.main([*flags, "--lr-factors", "1", "1e36"])
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [row["options"]["lr"] for row in rows if "diverged" in row] == [3e34, 3e35]
    example.compare.main([*flags, "--lr-factors", "1e36"])
    assert capsys.readouterr().out.count("all diverged") == 2


def _digits_as_files(example: SimpleNamespace, root: Path, per_class: int = 4) -> None:
    """The layout of ImageFolder, from the real digits 0 to 2."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for part, start in (("train", 0), ("val", per_class)):
        for digit in range(3):
            folder = root / part / f"digit{digit}"
            folder.mkdir(parents=True)
            pictures = found.images[found.target == digit][start : start + per_class]
            for number, picture in enumerate(pictures):
                Image.fromarray((picture * 15.9).astype("uint8")).save(folder / f"{number}.png")


def test_folders(example: SimpleNamespace, tmp_path: Path) -> None:
    _digits_as_files(example, tmp_path)
    splits = example.images.load(f"folder:{tmp_path}", size=16)
    assert (splits.classes, len(splits.train), len(splits.validation), len(splits.test)) == (3, 11, 1, 12)
    options = example.train.Options(
        data=f"folder:{tmp_path}", size=16, batch_size=4, epochs=1, width=0.125, device="cpu"
    )
    assert 0 <= example.train.train(options, tell=lambda line: None)["test_accuracy"] <= 1

    broken = tmp_path / "train" / "digit0" / "0.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"0\.png: can't be read as an image"):
        example.train.train(options, tell=lambda line: None)
    (tmp_path / "val" / "digit2").rename(tmp_path / "val" / "digit9")
    with pytest.raises(UserError, match=r"only in one of train/ and val/: digit2, digit9"):
        example.images.load(f"folder:{tmp_path}")
    (tmp_path / "val").rename(tmp_path / "test")
    with pytest.raises(UserError, match=r"no folder .*val; wanted are train/CLASS/ and val/CLASS/"):
        example.images.load(f"folder:{tmp_path}")


def test_mnist_that_is_there_already(example: SimpleNamespace, tmp_path: Path) -> None:
    """MNIST's own files (of 40 and 20 images), read without a network."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 40), ("t10k", 20)):
        pictures = torch.randint(256, (count * 28 * 28,), generator=generator, dtype=torch.uint8)
        header = struct.pack(">4i", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(pictures.tolist()))
        labels = bytes(index % 10 for index in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels)
    splits = example.images.load("mnist", tmp_path)
    assert (splits.classes, splits.size) == (10, 28)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (36, 4, 20)
    image, _ = splits.train[0]
    assert image.shape == (3, 28, 28)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--data", "cifar11"], "--data cifar11: no such dataset; there are digits, mnist, cifar10"),
        (["--data", "cifar10", "--data-dir", "nowhere"], "cifar10: not in nowhere; --download fetches it"),
        (["--data", "mnist", "--data-dir", "nowhere"], "mnist: not in nowhere; --download fetches it"),
        (["--data", "folder:nowhere"], "no folder nowhere/train"),
        (["--model", "resnet19"], "--model resnet19: no such network; did you mean resnet1"),
        (["--model", "alexnet", "--width", "0.5"], "--model alexnet: doesn't take 8-pixel images"),
        (["--width", "0.3"], "--width 0.3: must be 1, 0.5"),
        (["--optimizer", "adam"], "--optimizer adam: there are zenith,"),
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--dropout", "1"], "--dropout 1: must be in"),
        (["--device", "gpu"], "--device gpu: "),
    ],
)
def test_mistakes(
    example: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        example.train.main(flags)
    assert told in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_line() -> None:
    command = [sys.executable, str(FOLDER / "compare.py"), "--data", "folder:nowhere", "--output", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --data folder:nowhere: no folder nowhere/train")
    assert done.stderr.count("\n") == 1


def test_a_file_of_something_else_is_refused(example: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text('{"options": {}}\nhello\n')
    with pytest.raises(UserError, match=r"runs.jsonl, line 2: not a finished run"):
        example.compare.main(["--output", str(tmp_path), "--width", "0.125"])


def test_noise_share_is_what_it_should_be(example: SimpleNamespace) -> None:
    """Against the exact gradient and covariance of a model whose examples don't mix."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(40, 6), torch.randint(3, (40,))
    model, loss_fn = nn.Linear(6, 3), nn.CrossEntropyLoss()

    def gradient(rows: slice) -> torch.Tensor:
        parts = torch.autograd.grad(loss_fn(model(inputs[rows]), labels[rows]), list(model.parameters()))
        return torch.cat([part.flatten() for part in parts]).double()

    each = torch.stack([gradient(slice(row, row + 1)) for row in range(40)])
    signal = float(each.mean(dim=0).square().sum())
    noise = float((each - each.mean(dim=0)).square().sum(dim=1).mean()) / 8  # batches of 8
    found = example.noise.noise_share(
        model, loss_fn, TensorDataset(inputs, labels), 8, torch.Generator().manual_seed(1), pairs=1500
    )
    assert found["signal"] == pytest.approx(signal, rel=0.1)
    assert found["noise"] == pytest.approx(noise, rel=0.05)
    assert found["share"] == pytest.approx(noise / (noise + signal), rel=0.05)
    # A batch of the whole set, drawn without replacement, has no noise at all.
    whole = example.noise.noise_share(
        model, loss_fn, TensorDataset(inputs, labels), 40, torch.Generator().manual_seed(1), pairs=20
    )
    assert whole["share_epoch"] == 0


def test_measuring_noise_changes_nothing(example: SimpleNamespace) -> None:
    """Neither weights, nor batch statistics, nor the order of the data, nor dropout."""
    settings = {"epochs": 2, "dropout": 0.3, **SMALL}
    plain = example.train.train(example.train.Options(**settings), tell=lambda line: None)
    probed = example.train.train(
        example.train.Options(**settings, noise_every=4, noise_batch_sizes=(64,)), tell=lambda line: None
    )
    assert probed["epochs"] == plain["epochs"]
    assert probed["test_loss"] == plain["test_loss"]
    assert [probe["step"] for probe in probed["noise"]] == [0, 4, 8]


def test_a_zenith_that_fades_gets_over_a_steep_start(example: SimpleNamespace) -> None:
    distance, ratio = example.bad_starts.rosenbrock(2000, {})
    assert distance > 0.9
    assert ratio < 0.1
    distance, ratio = example.bad_starts.rosenbrock(2000, {"half_life": 400})
    assert distance < 0.4
    assert ratio > 0.5
