"""Config files by name: what is there under the path wins, then what comes with the toolkit, then the zoo's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from zenith_det.config import finding, follow_dataset, load_config
from zenith_det.config.finding import ConfigFile, find_config_file
from zenith_det.errors import ConfigError

CONFIGS = ROOT / "configs"
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Detectron2 that can't be imported, with its model zoo."""
    package = tmp_path / "site" / "detectron2"
    files = {
        MASK_RCNN: "SOLVER: {MAX_ITER: 90000}\n",
        MASK_RCNN.replace(".yaml", ".py"): "",
        "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml": "SOLVER: {MAX_ITER: 180000}\n",
        "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py": "",
        "mask_rcnn_zenith.yaml": "SOLVER: {MAX_ITER: 1}\n",
    }
    for name, text in files.items():
        path = package / "model_zoo" / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (package / "__init__.py").write_text("raise ImportError('built for another torch')\n")
    monkeypatch.syspath_prepend(str(package.parent))
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("detectron2")}
    yield package / "model_zoo" / "configs"
    sys.modules.update(before)


def error_of(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(name)
    return str(caught.value)


def test_each_shipped_config_is_found_by_its_name_from_any_folder() -> None:
    files = sorted(CONFIGS.rglob("*.yaml"))
    assert len(files) > 30
    for file in files:
        for name in (file.relative_to(CONFIGS), Path("configs", file.relative_to(CONFIGS))):
            assert find_config_file(str(name)) == ConfigFile(str(file), "shipped")
    loaded = load_config("mask_rcnn_zenith.yaml")
    assert loaded.cfg.MODEL.MASK_ON
    assert loaded.sources["MODEL.MASK_ON"] == str(CONFIGS / "mask_rcnn_zenith.yaml")


def test_a_file_name_alone_will_do_where_it_is_unique(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_config_file("mask_rcnn_zenith_adamw.yaml").path == str(
        CONFIGS / "quickstart" / "mask_rcnn_zenith_adamw.yaml"
    )
    # Of two, the one that is not in a subfolder.
    assert find_config_file("mask_rcnn_zenith.yaml").path == str(CONFIGS / "mask_rcnn_zenith.yaml")
    for folder in ("a", "b"):
        (tmp_path / "shipped" / folder).mkdir(parents=True)
        (tmp_path / "shipped" / folder / "x.yaml").touch()
    monkeypatch.setattr(finding, "shipped_folder", lambda: tmp_path / "shipped")
    assert error_of("x.yaml") == "x.yaml: several configs are called that: give a/x.yaml or b/x.yaml"


def test_what_is_there_wins(empty_folder: Path, zoo: Path) -> None:
    for name in ("mask_rcnn_zenith.yaml", MASK_RCNN):
        file = empty_folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("SOLVER: {MAX_ITER: 7}\n")
        assert find_config_file(name) == ConfigFile(name, "path")
        loaded = load_config(name)
        assert (loaded.cfg.SOLVER.MAX_ITER, loaded.cfg.SOLVER.OPTIMIZER) == (7, "ZENITH")


def test_the_zoos_come_last_and_keep_their_recipe(zoo: Path) -> None:
    assert find_config_file("mask_rcnn_zenith.yaml").origin == "shipped"
    for name in (MASK_RCNN, f"configs/{MASK_RCNN}"):
        assert find_config_file(name) == ConfigFile(str(zoo / MASK_RCNN), "zoo")
    loaded = load_config(MASK_RCNN)
    assert (loaded.cfg.SOLVER.MAX_ITER, loaded.cfg.SOLVER.OPTIMIZER) == (90000, "SGD")
    assert load_config(MASK_RCNN, ["SOLVER.OPTIMIZER", "ZENITH"]).cfg.SOLVER.OPTIMIZER == "ZENITH"


def test_a_base_is_found_in_the_same_way(empty_folder: Path, zoo: Path) -> None:
    folder = empty_folder / "mine"
    folder.mkdir()
    mine = folder / "mine.yaml"
    for base, expected in (
        ("mask_rcnn_zenith.yaml", load_config("mask_rcnn_zenith.yaml").cfg.SOLVER.MAX_ITER),
        ("baselines/mask_rcnn_sgd_step.yaml", load_config("mask_rcnn_sgd_step.yaml").cfg.SOLVER.MAX_ITER),
        (MASK_RCNN, 90000),
    ):
        mine.write_text(f"_BASE_: {base}\nSEED: 3\n")
        loaded = load_config("mine/mine.yaml")
        assert (expected, 3) == (loaded.cfg.SOLVER.MAX_ITER, loaded.cfg.SEED)
    # From the file that names it, not from the current folder.
    (folder / "mask_rcnn_zenith.yaml").write_text("SOLVER: {MAX_ITER: 7}\n")
    (empty_folder / "mask_rcnn_zenith.yaml").write_text("SOLVER: {MAX_ITER: 8}\n")
    mine.write_text("_BASE_: mask_rcnn_zenith.yaml\n")
    assert load_config("mine/mine.yaml").cfg.SOLVER.MAX_ITER == 7


def test_the_zoos_number_of_classes_is_for_its_own_data(empty_folder: Path, zoo: Path) -> None:
    (zoo / "voc.yaml").write_text("MODEL: {ROI_HEADS: {NUM_CLASSES: 20}}\n")
    (empty_folder / "mine.yaml").write_text("_BASE_: voc.yaml\n")
    for name in ("voc.yaml", "mine.yaml"):
        loaded = load_config(name)
        follow_dataset(loaded, "animals", 3, 0)
        assert loaded.cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    (empty_folder / "mine.yaml").write_text("MODEL: {ROI_HEADS: {NUM_CLASSES: 20}}\n")
    with pytest.raises(ConfigError, match=r"or give MODEL.ROI_HEADS.NUM_CLASSES 3 at the end"):
        follow_dataset(load_config("mine.yaml"), "animals", 3, 0)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mask_rcnn_zenit.yaml", "mask_rcnn_zenith.yaml"),
        ("mask_rcnn_zenith", "mask_rcnn_zenith.yaml"),
        ("quickstart/mask_rcnn_zenith_adam.yaml", "quickstart/mask_rcnn_zenith_adamw.yaml"),
        ("mask_rcnn_R_50_FPN_1x.yaml", MASK_RCNN),
        ("COCO-InstanceSegmentation/mask_rcnn_R50_FPN_1x.yaml", MASK_RCNN),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(name: str, hint: str, zoo: Path) -> None:
    message = error_of(name)
    assert message.startswith(f"{name}: no such config file")
    assert message.endswith(f"did you mean {hint}?")


@pytest.mark.parametrize("name", ["/nowhere/mask_rcnn_zenith.yaml", "../mask_rcnn_zenith.yaml", "*.yaml", ""])
def test_what_is_no_name_is_a_path_alone(name: str) -> None:
    assert "no such config file" in error_of(name)


def test_a_lazy_config_is_one_line(empty_folder: Path, zoo: Path) -> None:
    lazy = MASK_RCNN.replace(".yaml", ".py")
    assert (
        error_of(lazy) == f"{lazy}: a LazyConfig, which is Python, not YAML: take {MASK_RCNN}, the same model"
    )
    new = "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py"
    assert error_of(new).startswith(
        f"{new}: a LazyConfig, which is Python, not YAML: train it by Detectron2's"
    )
    (empty_folder / "mine.py").write_text("model = 1\n")
    assert "mine.py: a LazyConfig" in error_of("mine.py")
    (empty_folder / "mine.yaml").write_text("_BASE_: mine.py\n")
    assert error_of("mine.yaml").startswith("mine.yaml:1: _BASE_: mine.py: a LazyConfig")
