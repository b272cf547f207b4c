"""The configuration object: misspelt attributes raise, and else it is the CfgNode that users know."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
from fvcore.common.config import CfgNode as FvcoreCfgNode

from zenith_det.config import CfgNode, get_cfg
from zenith_det.errors import ConfigError


def test_a_misspelt_attribute_raises_and_names_the_key() -> None:
    cfg = get_cfg()
    with pytest.raises(ConfigError, match=r"^unknown key BASE_LR: did you mean SOLVER.BASE_LR\?$"):
        cfg.BASE_LR = 0.1
    with pytest.raises(ConfigError, match=r"^unknown key SOLVER.BASE_RL: did you mean SOLVER.BASE_LR\?$"):
        cfg.SOLVER.BASE_RL = 0.1
    cfg.SOLVER.BASE_LR = 0.1
    assert cfg.SOLVER.BASE_LR == 0.1
    assert "BASE_LR" not in cfg


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, CfgNode.clone, lambda cfg: pickle.loads(pickle.dumps(cfg))]
)
def test_copies_are_equal_independent_and_protected(copied: object) -> None:
    cfg = get_cfg()
    other = copied(cfg)  # type: ignore[operator]
    assert other == cfg
    assert type(other.SOLVER.ZENITH) is CfgNode
    other.SOLVER.BASE_LR = 0.5
    assert cfg.SOLVER.BASE_LR == 0.001
    with pytest.raises(ConfigError, match=r"SOLVER\.BASE_LR"):
        other.BASE_LR = 0.5


def test_add_ons_can_add_sections_and_after_asking_keys() -> None:
    cfg = get_cfg()
    cfg.MODEL.MY_HEAD = CfgNode()
    cfg.MODEL.MY_HEAD.DIM = 3
    cfg.merge_from_list(["MODEL.MY_HEAD.DIM", "4"])
    assert cfg.MODEL.MY_HEAD.DIM == 4
    cfg.MODEL.set_new_allowed(True)
    cfg.MODEL.MY_KEY = 1
    cfg.merge_from_list(["MODEL.NEW.KEY", "(1, 2)"])
    assert (cfg.MODEL.MY_KEY, cfg.MODEL.NEW.KEY) == (1, (1, 2))


def test_a_frozen_configuration_stays_as_it_is() -> None:
    cfg = get_cfg()
    cfg.freeze()
    with pytest.raises(AttributeError, match="immutable"):
        cfg.SOLVER.BASE_LR = 0.1
    assert cfg.clone().is_frozen()
    cfg.defrost()
    cfg.SOLVER.BASE_LR = 0.1


def test_yacs_merges_raise_config_errors(tmp_path: Path) -> None:
    cfg = get_cfg()
    path = tmp_path / "x.yaml"
    path.write_text("SOLVER: {BASE_LR: 0.5}\nMODEL: {MASK_ON: True}\n")
    cfg.merge_from_file(str(path))
    cfg.merge_from_other_cfg(CfgNode({"SOLVER": {"MAX_ITER": 3}}))
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.MODEL.MASK_ON) == (0.5, 3, True)
    assert CfgNode.load_yaml_with_base(str(path)) == {"SOLVER": {"BASE_LR": 0.5}, "MODEL": {"MASK_ON": True}}
    with pytest.raises(ConfigError, match=r"unknown key SOLVER.MAXITER"):
        cfg.merge_from_other_cfg(CfgNode({"SOLVER": {"MAXITER": 3}}))
    with pytest.raises(ConfigError, match="unsafe YAML is never loaded"):
        cfg.merge_from_file(str(path), allow_unsafe=True)
    with pytest.raises(ConfigError, match="unsafe YAML is never loaded"):
        CfgNode.load_yaml_with_base(str(path), allow_unsafe=True)


def test_a_python_file_is_not_run_as_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(f"open({str(tmp_path / 'hacked')!r}, 'w')\ncfg = {{}}\n")
    with path.open() as stream, pytest.raises(ConfigError, match="never run"):
        CfgNode.load_cfg(stream)
    assert not (tmp_path / "hacked").exists()


def test_fvcores_nodes_take_our_dump(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(get_cfg().dump())
    plain = FvcoreCfgNode(get_cfg())
    plain.merge_from_file(str(path))
    assert plain.SOLVER.ZENITH.WINDOW == 100
