"""What tests of several parts share: small generated sets, and the real COCO images where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zenith_det.data.annotation_cache import FOLDER_VARIABLE
from zenith_det.data.synthetic import generate, split_files

ROOT = Path(__file__).resolve().parent.parent
#: Files that take minutes start first: begun last, one of them would keep a single core busy at the end.
LONG = (
    "test_kill.py", "test_two_processes.py", "test_several_processes.py", "test_resuming.py", "test_train_net.py",
    "test_stopping.py", "test_real_coco.py", "test_compare.py", "test_benchmark.py", "test_bad_steps.py",
    "test_rollback.py", "test_ending_and_validation_loss.py", "test_lr_range_test.py", "test_run.py",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills",
        default="30",
        help="how often the kill test kills each engine's runs (200: the long version)",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """``-n auto``: one process more than cores, as tests that start processes wait for them."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of :data:`LONG` first (with ``--no-loadscope-reorder``)."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session", autouse=True)
def _no_cache_left_behind(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Annotation files that runs read are remembered here, not in the user's folder."""
    os.environ[FOLDER_VARIABLE] = str(tmp_path_factory.mktemp("cache"))


class SmallSet:
    """A generated set on disk: ``train`` and ``val`` as (annotation file, image folder)."""

    def __init__(self, root: Path, task: str) -> None:
        self.root = root
        self.train = tuple(map(str, split_files(root, "train", task)))
        self.val = tuple(map(str, split_files(root, "val", task)))

    @property
    def flags(self) -> list[str]:
        """The command-line flags of ``tools/train_net.py`` for this set."""
        return [
            "--train-json", self.train[0], "--train-images", self.train[1],
            "--val-json", self.val[0], "--val-images", self.val[1],
        ]  # fmt: skip


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> SmallSet:
    """24 training and 8 validation images of shapes, 96 pixels."""
    root = tmp_path_factory.mktemp("shapes")
    generate(root, train=24, val=8, size=96, seed=3, task="instances")
    return SmallSet(root, "instances")


@pytest.fixture(scope="session")
def figures(tmp_path_factory: pytest.TempPathFactory) -> SmallSet:
    """24 training and 8 validation images of figures with keypoints, 96 pixels."""
    root = tmp_path_factory.mktemp("figures")
    generate(root, train=24, val=8, size=96, seed=3, task="keypoints")
    return SmallSet(root, "keypoints")


@pytest.fixture(scope="session")
def real_coco() -> Path:
    """The root of Detectron2's dataset layout with real COCO images."""
    root = os.environ.get("DETECTRON2_DATASETS")
    if not root or not (Path(root) / "coco" / "annotations" / "instances_val2017.json").exists():
        pytest.skip("needs real COCO images: set DETECTRON2_DATASETS to a folder that holds coco/")
    return Path(root)
