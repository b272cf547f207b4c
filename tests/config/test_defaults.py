"""The keys and defaults are Detectron2's, and ours join them in either library's configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from zenith_det.config import CfgNode, add_zenith_config, get_cfg, load_config, old_names
from zenith_det.config.defaults import MOVED_KEYS, RENAMED_KEYS, ZENITH_DEFAULTS
from zenith_det.config.keys import leaves, sections
from zenith_det.config.old_names import moved_value
from zenith_det.errors import ConfigError


def test_our_keys_have_the_documented_defaults() -> None:
    cfg = get_cfg()
    assert cfg.SOLVER.OPTIMIZER == "ZENITH"
    assert dict(cfg.SOLVER.ZENITH) == {
        "WINDOW": 100,
        "MIN_RATIO": 0.0,
        "NORM_SOURCE": "gradient",
        "RECORD_AFTER": 0,
        "HALF_LIFE": 0,
        "KEEP_HISTORY": False,
        "OVER_OWN_OPTIMIZER": True,
        "UNTIL_SETTLED": False,
    }
    assert cfg.SOLVER.AUTO_LR is False
    assert cfg.SOLVER.MAX_NONFINITE_STEPS == 50
    assert cfg.SOLVER.GRADIENT_ACCUMULATION == 1
    assert cfg.TEST.MAX_IMAGES == 0
    assert cfg.DATASETS.STRICT is False


def test_two_configurations_share_nothing() -> None:
    first, second = get_cfg(), get_cfg()
    first.SOLVER.ZENITH.WINDOW = 7
    first.MODEL.PIXEL_MEAN[0] = -1.0
    assert second.SOLVER.ZENITH.WINDOW == 100
    assert get_cfg().MODEL.PIXEL_MEAN[0] == 103.53 == second.MODEL.PIXEL_MEAN[0]


def test_adding_our_keys_twice_keeps_what_was_set() -> None:
    cfg = get_cfg()
    cfg.SOLVER.ZENITH.WINDOW = 7
    add_zenith_config(cfg)
    assert cfg.SOLVER.ZENITH.WINDOW == 7


def test_a_frozen_configuration_gets_no_keys() -> None:
    cfg = CfgNode({"SOLVER": {"BASE_LR": 0.1}})
    cfg.freeze()
    with pytest.raises(AttributeError, match="before freeze"):
        add_zenith_config(cfg)


def test_renamed_keys_lead_to_keys_that_exist() -> None:
    known = {key for key, _ in leaves(get_cfg())}
    assert set(RENAMED_KEYS.values()) <= known
    assert not set(RENAMED_KEYS) & known


@pytest.mark.detectron2
def test_keys_and_defaults_equal_detectron2s() -> None:
    detectron2 = pytest.importorskip("detectron2.config", reason="Detectron2 is not installed")
    theirs = detectron2.get_cfg()
    add_zenith_config(theirs)
    ours = get_cfg()
    assert set(sections(ours)) == set(sections(theirs))
    # It refuses keys that it doesn't have: the old names of ours are among them, not set.
    expected = {key: value for key, value in leaves(theirs) if key not in MOVED_KEYS}
    actual = dict(leaves(ours))
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert actual[key] == value, key
        assert type(actual[key]) is type(value), key


@pytest.mark.detectron2
def test_our_keys_in_detectron2s_configuration_are_its_own_nodes() -> None:
    detectron2 = pytest.importorskip("detectron2.config", reason="Detectron2 is not installed")
    cfg = detectron2.get_cfg()
    add_zenith_config(cfg)
    for name in sections(ZENITH_DEFAULTS):
        node = cfg
        for part in name.split("."):
            node = node[part]
        assert type(node) is detectron2.CfgNode, name


@pytest.mark.detectron2
def test_old_names_are_those_that_detectron2_converts() -> None:
    compat = pytest.importorskip("detectron2.config.compat", reason="Detectron2 is not installed")
    assert dict(compat.ConverterV1.RENAME + compat.ConverterV2.RENAME) == RENAMED_KEYS


# --- names that keys once had -----------------------------------------------------------------------------


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    old_names._tell.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records if record.name == old_names.__name__]


def test_old_names_work_in_files_and_overrides_and_are_told_once(
    tmp_path: Path, told: Callable[[], list[str]]
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("SOLVER: {ZENITH: {MAX_NONFINITE_STEPS: 7, AUTO_LR: true}}\n")
    loaded = load_config(str(file), ["SOLVER.ZENITH.MAX_NONFINITE_STEPS", "8"])
    assert (loaded.cfg.SOLVER.MAX_NONFINITE_STEPS, loaded.cfg.SOLVER.AUTO_LR) == (8, True)
    assert loaded.sources == {"SOLVER.MAX_NONFINITE_STEPS": "command line", "SOLVER.AUTO_LR": str(file)}
    assert sorted(told()) == [
        f"SOLVER.ZENITH.{name} is SOLVER.{name} now, as it concerns every optimizer: the old name works, too"
        for name in ("AUTO_LR", "MAX_NONFINITE_STEPS")
    ]
    with pytest.raises(ConfigError, match=r"SOLVER\.MAX_NONFINITE_STEPS is 0"):
        load_config(None, ["SOLVER.ZENITH.MAX_NONFINITE_STEPS", "0"])


@pytest.mark.detectron2
def test_old_names_work_in_detectron2s_configuration(tmp_path: Path, told: Callable[[], list[str]]) -> None:
    detectron2 = pytest.importorskip("detectron2.config", reason="Detectron2 is not installed")
    cfg = detectron2.get_cfg()
    add_zenith_config(cfg)
    (tmp_path / "x.yaml").write_text("SOLVER: {ZENITH: {MAX_NONFINITE_STEPS: 7}}\n")
    cfg.merge_from_file(str(tmp_path / "x.yaml"))
    cfg.merge_from_list(["SOLVER.ZENITH.AUTO_LR", "True"])
    assert moved_value(cfg, "SOLVER.MAX_NONFINITE_STEPS") == 7
    assert moved_value(cfg, "SOLVER.AUTO_LR") is True
    assert len(told()) == 2
    unset = detectron2.get_cfg()
    add_zenith_config(unset)
    (tmp_path / "dump.yaml").write_text(unset.dump())
    assert load_config(str(tmp_path / "dump.yaml")).cfg.SOLVER.MAX_NONFINITE_STEPS == 50
    cfg.SOLVER.MAX_NONFINITE_STEPS = 9
    with pytest.raises(ConfigError, match=r"is 9, and its old name .* is 7: remove the old one"):
        moved_value(cfg, "SOLVER.MAX_NONFINITE_STEPS")
