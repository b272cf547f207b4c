"""``tools/train_net.py`` as people run it: a process, files, exit codes, and no traceback for a mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, SmallSet
from tests.reliability import runs

Command = Callable[..., subprocess.CompletedProcess[str]]

SMALL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.FPN.OUT_CHANNELS", "32",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "32",
    "MODEL.ROI_MASK_HEAD.CONV_DIM", "32",
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(32, 32)",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
    "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "INPUT.MIN_SIZE_TEST", "64",
    "DATALOADER.NUM_WORKERS", "1",
    "SOLVER.IMS_PER_BATCH", "4",
    "SOLVER.BASE_LR", "0.02",
    "SOLVER.WARMUP_ITERS", "2",
    "SOLVER.ZENITH.WINDOW", "3",
    "SOLVER.CHECKPOINT_PERIOD", "3",
    "SEED", "7",
]  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"


def train_net(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own, forked after the imports."""
    return runs.forked(["--engine", "torchvision", *arguments], one_stream=False)


def typed(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as people type it."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train_net.py"), "--engine", "torchvision", *arguments],
        cwd=ROOT, env=runs.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def small_run(
    data: SmallSet, task: str, output: Path, max_iter: int, *more: str, command: Command = train_net
) -> subprocess.CompletedProcess[str]:
    """A run of a small model; ``more`` is flags, then KEY VALUE pairs, which win over :data:`SMALL`."""
    config = str(ROOT / "configs" / "quickstart" / f"{task}_rcnn_zenith.yaml")
    split = next((i for i, word in enumerate(more) if "." in word and word[0].isupper()), len(more))
    return command(
        "--config-file", config, *data.flags, *more[:split], *SMALL,
        "OUTPUT_DIR", str(output), "SOLVER.MAX_ITER", str(max_iter), *more[split:],
    )  # fmt: skip


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    model: dict[str, torch.Tensor] = torch.load(output / "model_final.pth", weights_only=True)["model"]
    return model


@pytest.fixture(scope="module")
def mask_run(shapes: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Six iterations of Mask R-CNN: the output folder and what was printed."""
    output = tmp_path_factory.mktemp("mask_run")
    done = small_run(shapes, "mask", output, 6, command=typed)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_a_run_leaves_the_files_that_scripts_look_for(mask_run: tuple[Path, str]) -> None:
    output, _ = mask_run
    names = {p.name for p in output.iterdir()}
    assert {
        "config.yaml", "log.txt", "metrics.json", "last_checkpoint", "model_final.pth", "model_0000002.pth",
        "curves.png", "predictions.png",
    } <= names  # fmt: skip
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert isinstance(json.loads((output / "inference" / "coco_instances_results.json").read_text()), list)
    assert (output / "curves.png").read_bytes().startswith(PNG)
    assert (output / "predictions.png").read_bytes().startswith(PNG)


def test_what_a_run_says(mask_run: tuple[Path, str]) -> None:
    _, printed = mask_run
    assert "engine: torchvision (asked for)" in printed
    assert re.search(
        r"\d+ images, batch 4, 6 iterations = [\d.]+ epochs, ZENITH: eta0 = 0\.02, window = 3", printed
    )
    assert "copypaste: Task: bbox" in printed
    assert "copypaste: Task: segm" in printed
    assert "copypaste: AP,AP50,AP75,APs,APm,APl" in printed
    assert re.search(r"pictures: .*curves\.png, .*predictions\.png", printed)


def test_metrics_hold_the_effective_lr(mask_run: tuple[Path, str]) -> None:
    output, _ = mask_run
    last = next(line for line in metrics(output) if "total_loss" in line)
    assert last["lr"] == pytest.approx(0.02 * last["zenith/ratio"])
    assert last["zenith/ratio"] == pytest.approx(last["zenith/window_mean"] / last["zenith/zenith"])
    assert {"zenith/grad_norm", "zenith/skipped_steps", "loss_mask", "loss_rpn_cls", "time"} <= set(last)
    assert any("bbox/AP" in line and "segm/AP" in line for line in metrics(output))


def test_every_checkpoint_loads_safely(mask_run: tuple[Path, str]) -> None:
    for path in mask_run[0].glob("*.pth"):
        state = torch.load(path, weights_only=True)
        to_resume = set() if "averaged" in path.name else {"optimizer", "scheduler", "seed"}
        assert {"model", "iteration", "dataset"} | to_resume <= set(state)


def test_eval_only_repeats_the_evaluation_from_the_saved_config(
    mask_run: tuple[Path, str], tmp_path: Path
) -> None:
    output, _ = mask_run
    done = train_net(
        "--config-file", str(output / "config.yaml"), "--eval-only",
        "MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name = Path("inference") / "coco_instances_results.json"
    assert json.loads((tmp_path / name).read_text()) == json.loads((output / name).read_text())
    assert re.search(r"weights: loaded (\d+)/\1 tensors", done.stdout)


def test_keypoint_run_and_epochs(figures: SmallSet, tmp_path: Path) -> None:
    done = small_run(figures, "keypoint", tmp_path, 99, "--epochs", "0.5")
    assert done.returncode == 0, done.stderr
    assert "copypaste: Task: keypoints" in done.stdout
    assert re.search(r"3 iterations = 0\.5\d* epochs|2 iterations", done.stdout)


def test_keypoints_of_which_no_pair_is_known_are_warned_of_once(figures: SmallSet, tmp_path: Path) -> None:
    def number(content: dict) -> None:
        names = content["categories"][0]["keypoints"]
        content["categories"][0].pop("flip_pairs", None)
        content["categories"][0]["keypoints"] = [str(i) for i in range(len(names))]

    done = small_run(edited(figures, tmp_path, number), "keypoint", tmp_path / "out", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("give the category flip_pairs") == 1


def test_two_processes_train_and_evaluate_one_model(shapes: SmallSet, tmp_path: Path) -> None:
    def two(*arguments: str) -> subprocess.CompletedProcess[str]:
        return runs.forked(["--engine", "torchvision", *arguments], one_stream=False, processes=2)

    done = small_run(shapes, "faster", tmp_path, 3, command=two)
    assert done.returncode == 0, done.stderr
    assert "over 2 processes" in done.stdout
    assert metrics(tmp_path)[0]["zenith/ratio"] <= 1
    assert "copypaste: Task: bbox" in done.stdout


def test_accumulation_sees_the_same_images(shapes: SmallSet, tmp_path: Path) -> None:
    done = small_run(shapes, "faster", tmp_path, 2, "--epochs", "0.4", "SOLVER.GRADIENT_ACCUMULATION", "2")
    assert done.returncode == 0, done.stderr
    assert "(2 x 2)" in done.stdout


# ---- mistakes: one line, exit code 2, no traceback


def expect_one_line(done: subprocess.CompletedProcess[str], *fragments: str, code: int = 2) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.stdout + done.stderr
    for fragment in fragments:
        assert fragment in lines[0]


def edited(data: SmallSet, tmp_path: Path, change: object) -> SmallSet:
    """A copy of the set's training annotations, changed."""
    content = json.loads(Path(data.train[0]).read_text())
    assert callable(change)
    change(content)
    copy = SmallSet.__new__(SmallSet)
    copy.root, copy.val = data.root, data.val
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    copy.train = (str(path), data.train[1])
    return copy


def test_mistake_no_config() -> None:
    expect_one_line(train_net(), "--config-file is missing")


def test_mistake_typo_in_a_key(tmp_path: Path) -> None:
    config = tmp_path / "typo.yaml"
    config.write_text(
        f'_BASE_: "{ROOT}/configs/quickstart/mask_rcnn_zenith.yaml"\nSOLVER:\n  BASE_LT: 0.01\n'
    )
    expect_one_line(train_net("--config-file", str(config)), "SOLVER.BASE_LT", "typo.yaml", "SOLVER.BASE_LR")


def test_mistake_missing_image(shapes: SmallSet, tmp_path: Path) -> None:
    def rename(content: dict) -> None:
        content["images"][4]["file_name"] = "nowhere.png"

    done = small_run(edited(shapes, tmp_path, rename), "mask", tmp_path / "out", 1, command=typed)
    expect_one_line(done, "nowhere.png", "missing")


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_mistake_no_validation_set(engine: str, shapes: SmallSet, tmp_path: Path) -> None:
    """The config's own is not there: the line says how to do without, and that works."""
    runs.need(engine)
    words = [
        "--engine", engine, "--config-file", str(ROOT / "configs" / "quickstart" / "mask_rcnn_zenith.yaml"),
        *shapes.flags[:4], *SMALL, "OUTPUT_DIR", str(tmp_path / "out"), "SOLVER.MAX_ITER", "2",
    ]  # fmt: skip
    done = runs.forked([*words, "DATASETS.TEST", "('coco_2014_minival',)"], one_stream=False)
    advice = (
        'give --val-json and --val-images, --val-share 0.2, or DATASETS.TEST "()" to train without evaluation'
    )
    expect_one_line(done, "dataset coco_2014_minival: annotation file ", "does not exist", advice)
    done = runs.forked([*words, "DATASETS.TEST", "()"], one_stream=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model_final.pth").exists()
    assert "copypaste" not in done.stdout


def test_mistake_truncated_jpeg(shapes: SmallSet, tmp_path: Path) -> None:
    from PIL import Image

    def cut(content: dict) -> None:
        name = content["images"][0]["file_name"]
        folder = Path(shapes.train[1])
        whole = folder / "cut_whole.jpg"
        Image.open(folder / name).convert("RGB").save(whole, quality=95)
        (folder / "cut.jpg").write_bytes(whole.read_bytes()[:-400])
        content["images"][0]["file_name"] = "cut.jpg"

    done = small_run(edited(shapes, tmp_path, cut), "mask", tmp_path / "out", 1)
    expect_one_line(done, "cut.jpg", "truncated")


def test_mistake_undeclared_category(shapes: SmallSet, tmp_path: Path) -> None:
    def relabel(content: dict) -> None:
        content["annotations"][2]["category_id"] = 77

    done = small_run(edited(shapes, tmp_path, relabel), "mask", tmp_path / "out", 1)
    expect_one_line(done, "77", "train.json")


def test_mistake_empty_training_set(shapes: SmallSet, tmp_path: Path) -> None:
    def empty(content: dict) -> None:
        content["images"], content["annotations"] = [], []

    done = small_run(edited(shapes, tmp_path, empty), "mask", tmp_path / "out", 1)
    expect_one_line(done, "no image")


def test_mistake_masks_wanted_and_none_there(shapes: SmallSet, tmp_path: Path) -> None:
    def boxes_alone(content: dict) -> None:
        for annotation in content["annotations"]:
            del annotation["segmentation"]

    done = small_run(edited(shapes, tmp_path, boxes_alone), "mask", tmp_path / "out", 1)
    expect_one_line(done, "MODEL.MASK_ON is True, but no object of", "train.json has a mask")


@pytest.mark.parametrize("minimum", ["0", "1"])
def test_mistake_keypoints_wanted_and_none_labelled(figures: SmallSet, minimum: str, tmp_path: Path) -> None:
    def unlabel(content: dict) -> None:
        for annotation in content["annotations"]:
            annotation["keypoints"][2::3] = [0] * (len(annotation["keypoints"]) // 3)

    key = "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE"
    done = small_run(edited(figures, tmp_path, unlabel), "keypoint", tmp_path / "out", 1, key, minimum)
    expect_one_line(done, "MODEL.KEYPOINT_ON is True, but no object of", "train.json has a labelled keypoint")


def test_mistake_output_directory_that_cannot_be_written(shapes: SmallSet, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    expect_one_line(small_run(shapes, "mask", blocked / "out", 1), "OUTPUT_DIR", str(blocked / "out"))


def test_mistake_negative_learning_rate(shapes: SmallSet, tmp_path: Path) -> None:
    done = small_run(shapes, "mask", tmp_path, 1, *["SOLVER.BASE_LR", "-1"])
    expect_one_line(done, "SOLVER.BASE_LR", "-1")


def test_mistake_number_of_classes(shapes: SmallSet, tmp_path: Path) -> None:
    done = small_run(shapes, "mask", tmp_path, 1, *["MODEL.ROI_HEADS.NUM_CLASSES", "80"])
    expect_one_line(done, "MODEL.ROI_HEADS.NUM_CLASSES is 80", "6 classes")


def test_mistake_weights_that_cannot_be_fetched(shapes: SmallSet, tmp_path: Path) -> None:
    done = small_run(shapes, "mask", tmp_path, 1, *["MODEL.WEIGHTS", "https://127.0.0.1:9/none.pth"])
    expect_one_line(done, "https://127.0.0.1:9/none.pth")
