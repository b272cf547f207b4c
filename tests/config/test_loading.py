"""Config files and overrides: what they set, where it came from, and the one line that each mistake gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zenith_det.config import CfgNode, LoadedConfig, get_cfg, load_config
from zenith_det.config.keys import leaves
from zenith_det.errors import ConfigError


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def error_of(config_file: str | None, *opts: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, list(opts))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_nothing_given_is_the_defaults() -> None:
    loaded = load_config(None)
    assert loaded.sources == {}
    assert loaded.cfg.SOLVER.MAX_ITER == 40000
    assert not loaded.cfg.is_frozen()  # as in Detectron2: whoever starts the run freezes it


def test_a_base_chain_and_the_command_line_override_each_other(tmp_path: Path) -> None:
    root = write(tmp_path / "root.yaml", "SOLVER:\n  BASE_LR: 0.1\n  MAX_ITER: 10\n  STEPS: (3, 5)\n")
    middle = write(tmp_path / "sub" / "middle.yaml", '_BASE_: "../root.yaml"\nSOLVER: {MAX_ITER: 20}\n')
    top = write(tmp_path / "top.yaml", '_BASE_: "sub/middle.yaml"\nMODEL: {MASK_ON: True}\n')
    loaded = load_config(top, ["SOLVER.BASE_LR", "0.5"])
    assert (loaded.cfg.SOLVER.BASE_LR, loaded.cfg.SOLVER.MAX_ITER) == (0.5, 20)
    assert loaded.cfg.SOLVER.STEPS == (3, 5)
    assert loaded.sources == {
        "SOLVER.BASE_LR": "command line",
        "SOLVER.MAX_ITER": middle,
        "SOLVER.STEPS": root,
        "MODEL.MASK_ON": top,
    }


def test_of_several_bases_the_later_one_wins(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "SOLVER: {BASE_LR: 0.1, MAX_ITER: 10}\n")
    write(tmp_path / "b.yaml", "SOLVER: {BASE_LR: 0.2}\n")
    loaded = load_config(write(tmp_path / "c.yaml", '_BASE_: ["a.yaml", "b.yaml"]\n'))
    assert (loaded.cfg.SOLVER.BASE_LR, loaded.cfg.SOLVER.MAX_ITER) == (0.2, 10)


def test_one_base_may_be_reached_twice(tmp_path: Path) -> None:
    write(tmp_path / "root.yaml", "SEED: 3\n")
    write(tmp_path / "a.yaml", "_BASE_: root.yaml\n")
    write(tmp_path / "b.yaml", "_BASE_: root.yaml\n")
    assert load_config(write(tmp_path / "c.yaml", "_BASE_: [a.yaml, b.yaml]\n")).cfg.SEED == 3


def test_the_file_named_in_sources_is_the_one_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "configs" / "base.yaml", "SEED: 3\n")
    write(tmp_path / "configs" / "x.yaml", "_BASE_: base.yaml\nVIS_PERIOD: 2\n")
    monkeypatch.chdir(tmp_path)
    sources = load_config("configs/x.yaml").sources
    assert sources == {"SEED": os.path.join("configs", "base.yaml"), "VIS_PERIOD": "configs/x.yaml"}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SOLVER.BASE_LR", "1e-4", 0.0001),
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.STEPS", "(1, 2)", (1, 2)),
        ("SOLVER.STEPS", "[1, 2]", (1, 2)),
        ("MODEL.PIXEL_MEAN", "(1.0, 2.0, 3.0)", [1.0, 2.0, 3.0]),
        ("DATASETS.TRAIN", "('coco_2017_train',)", ("coco_2017_train",)),
        ("OUTPUT_DIR", "2024", "2024"),
        ("OUTPUT_DIR", "runs/a", "runs/a"),
        ("SOLVER.WEIGHT_DECAY_BIAS", "0.1", 0.1),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", "2", 2.0),
        ("MODEL.MASK_ON", "True", True),
    ],
)
def test_override_texts_become_values_of_the_keys_type(key: str, text: str, value: object) -> None:
    cfg = load_config(None, [key, text]).cfg
    for part in key.split("."):
        cfg = cfg[part]
    assert cfg == value
    assert type(cfg) is type(value)


def test_a_range_of_sizes_is_two() -> None:
    opts = ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", "(640, 800)"]
    assert load_config(None, opts).cfg.INPUT.MIN_SIZE_TRAIN == (640, 800)


def test_a_dumped_configuration_loads_as_the_same_one(tmp_path: Path) -> None:
    loaded = load_config(
        None, ["OUTPUT_DIR", "2024", "SOLVER.STEPS", "(3,)", "DATASETS.TRAIN_JSON", "a b.json"]
    )
    again = load_config(write(tmp_path / "config.yaml", loaded.cfg.dump())).cfg
    assert again.dump() == loaded.cfg.dump()
    assert "&id" not in again.dump()
    assert again.SOLVER == loaded.cfg.SOLVER


def test_override_after_loading_is_remembered() -> None:
    loaded = load_config(None)
    loaded.override("DATASETS.TRAIN_JSON", "1.json", "--train-json")
    assert loaded.cfg.DATASETS.TRAIN_JSON == "1.json"
    assert loaded.sources == {"DATASETS.TRAIN_JSON": "--train-json"}
    with pytest.raises(ConfigError, match=r"--x: unknown key DATASETS.TRAIN_JSN.*DATASETS.TRAIN_JSON"):
        loaded.override("DATASETS.TRAIN_JSN", "x", "--x")


def test_a_deprecated_key_is_ignored_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = LoadedConfig(load_config(None).cfg)
    loaded.cfg.register_deprecated_key("SOLVER.OLD")
    loaded.override("SOLVER.OLD", "3", "x.yaml")
    assert loaded.sources == {}
    assert "x.yaml: SOLVER.OLD is deprecated and ignored" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("BASE_LR: 0.1", "x.yaml:1: unknown key BASE_LR: did you mean SOLVER.BASE_LR?"),
        ("SOLVER:\n  BASE_RL: 0.1", "x.yaml:2: unknown key SOLVER.BASE_RL: did you mean SOLVER.BASE_LR?"),
        ("SOVLER: {BASE_LR: 0.1}", "x.yaml:1: unknown key SOVLER.BASE_LR: did you mean SOLVER.BASE_LR?"),
        ("SOVLER: {}", "x.yaml:1: unknown key SOVLER: did you mean SOLVER?"),
        ("NUM_GPUS: 3", "x.yaml:1: unknown key NUM_GPUS"),
        ("SOLVER.MAX_ITER: 3", "x.yaml:1: SOLVER.MAX_ITER: write the sections of a key as nested mappings"),
        ("SOLVER: {MAX_ITER: many}", "x.yaml:1: SOLVER.MAX_ITER is 'many': an int is needed, such as 40000"),
        ("MODEL: {MASK_ON: 1}", "x.yaml:1: MODEL.MASK_ON is 1: a bool is needed, such as False"),
        ("SOLVER: {MAX_ITER: True}", "x.yaml:1: SOLVER.MAX_ITER is True: an int is needed, such as 40000"),
        ("OUTPUT_DIR: 2024", "x.yaml:1: OUTPUT_DIR is 2024: a text is needed, such as './output'"),
        ("DATASETS: {TRAIN: coco}", "x.yaml:1: DATASETS.TRAIN is 'coco': a tuple is needed"),
        ("SEED: 2024-11-05", "x.yaml:1: SEED is datetime.date(2024, 11, 5): a key can't hold a date"),
        ("SEED: 2024-13-45", "x.yaml:1: SEED can't be read: month must be in 1..12"),
        ("SOLVER: 3", "x.yaml:1: SOLVER is a section: give one of its keys"),
        ("SOLVER:", "x.yaml:1: SOLVER is a section: give one of its keys"),
        ("SOLVER: {BASE_LR: {A: 1}}", "x.yaml:1: SOLVER.BASE_LR is a value, not a section"),
        ("SEED: 1\nSEED: 2", "x.yaml:2: SEED is here a second time, after line 1: merge them"),
        ("SOLVER: {}\nSEED: 1\nSOLVER: {}", "x.yaml:3: SOLVER is here a second time, after line 1"),
        ("yes: 1", "x.yaml:1: True can't be a key: a name is needed"),
        ("MODEL: {WEIGHT: x}", "x.yaml:1: MODEL.WEIGHT has become MODEL.WEIGHTS: use that"),
        ("VERSION: 1", "x.yaml: VERSION is 1: only version 2 is supported"),
        ("SOLVER:\n  MAX_ITER: [1", "x.yaml:2: not valid YAML: "),
        ("SEED: \x00", "x.yaml: not valid YAML: "),
        ("SEED: 1\n---\nSEED: 2", "x.yaml:2: not valid YAML: "),
        ("", "x.yaml: the file is empty"),
        ("- 1", "x.yaml: holds a list, not KEY: value lines"),
        ("hello", "x.yaml: holds a str, not KEY: value lines"),
        ("[" * 5000, "x.yaml: nested too deep"),
        ("{a: " * 40 + "1" + "}" * 40, "x.yaml:1: nested too deep"),
        ("SEED: &a [*a]", "x.yaml:1: not valid YAML: "),
        ("_BASE_: x.yaml", "x.yaml: its _BASE_ chain comes back to it"),
        ("_BASE_: y.yaml", "x.yaml:1: _BASE_: y.yaml: no such config file"),
        ("_BASE_: [1]", "x.yaml:1: _BASE_ is [1]: one or more file names are needed"),
        ("_BASE_:", "x.yaml:1: _BASE_ is None: one or more file names are needed"),
        ("_BASE_: https://host/a.yaml", "x.yaml:1: _BASE_ https://host/a.yaml isn't a local file"),
        ("SOLVER: {BASE_LR: -1}", "x.yaml: SOLVER.BASE_LR is -1.0: it must be a number above 0"),
        ("SOLVER: {BASE_LR: .nan}", "x.yaml: SOLVER.BASE_LR is nan: it must be a number above 0"),
        ("SOLVER: {BASE_LR: null}", "x.yaml:1: SOLVER.BASE_LR is None: a float is needed, such as 0.001"),
        ("SEED: 1\nLOGGERS:", "x.yaml:2: LOGGERS is None: a tuple is needed, such as ()"),
        ("SEED:", "x.yaml:1: SEED is None: an int is needed, such as -1"),
        ("MODEL: {WEIGHTS: ~}", "x.yaml:1: MODEL.WEIGHTS is None: a text is needed, such as ''"),
        ("SOLVER: {MOMENTUM: 1.0}", "x.yaml: SOLVER.MOMENTUM is 1.0: it must be in [0, 1)"),
        ("SOLVER: {IMS_PER_BATCH: 0}", "x.yaml: SOLVER.IMS_PER_BATCH is 0: it must be 1 or more"),
        ("SOLVER: {MAX_ITER: 0}", "x.yaml: SOLVER.MAX_ITER is 0: it must be 1 or more"),
        ("SOLVER: {WARMUP_ITERS: -1}", "x.yaml: SOLVER.WARMUP_ITERS is -1: it must be a number from 0 up"),
        ("SOLVER: {ZENITH: {WINDOW: 0}}", "x.yaml: SOLVER.ZENITH.WINDOW is 0: it must be 1 or more"),
        ("SOLVER:\n  ADAMW: {BETAS: [0.9]}", "x.yaml: SOLVER.ADAMW.BETAS is (0.9,): it must be two numbers"),
        *(
            (
                f"TEST: {{EXPECTED_RESULTS: {rows}}}",
                "x.yaml: TEST.EXPECTED_RESULTS is [['bbox', ",
            )
            for rows in ("[[bbox, AP, 38.5]]", "[[bbox, AP, 38.5, much]]", "[[bbox, AP, 38.5, -1]]")
        ),
        *(
            (
                f"INPUT: {{MIN_SIZE_TRAIN_SAMPLING: range, MIN_SIZE_TRAIN: [{sizes}]}}",
                f"x.yaml: INPUT.MIN_SIZE_TRAIN is {shown}: INPUT.MIN_SIZE_TRAIN_SAMPLING 'range' takes two sizes",
            )
            for sizes, shown in [
                ("800", "(800,)"),
                ("640, 720, 800", "(640, 720, 800)"),
                ("800, 640", "(800, 640)"),
                ("640, many", "(640, 'many')"),
            ]
        ),
        (
            "SOLVER: {ZENITH: {NORM_SOURCE: gradients}}",
            "x.yaml: SOLVER.ZENITH.NORM_SOURCE is 'gradients': it must be one of 'gradient', 'momentum'",
        ),
    ],
)
def test_a_mistake_in_a_file_is_one_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.yaml", text)
    assert error_of("x.yaml").startswith(message)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.MAX_ITER"], "command line: SOLVER.MAX_ITER has no value: overrides are KEY VALUE pairs"),
        (
            ["SOLVER.MAX_ITER=3"],
            "command line: SOLVER.MAX_ITER=3 has no value: write KEY VALUE, with a space",
        ),
        (["SOLVER.BASE_LR", "-1"], "command line: SOLVER.BASE_LR is -1.0: it must be a number above 0"),
        (["SOLVER.MAXITER", "3"], "command line: unknown key SOLVER.MAXITER: did you mean SOLVER.MAX_ITER?"),
        (["solver.base_lr", "3"], "command line: unknown key solver.base_lr: did you mean SOLVER.BASE_LR?"),
        (["MODEL_WEIGHTS", "x"], "command line: unknown key MODEL_WEIGHTS: did you mean MODEL.WEIGHTS?"),
        (["MODEL_DEVICE", "cpu"], "command line: unknown key MODEL_DEVICE: did you mean MODEL.DEVICE?"),
        (["SOLVER.MASK_ON", "1"], "command line: unknown key SOLVER.MASK_ON: did you mean MODEL.MASK_ON?"),
        (["_BASE_", "x.yaml"], "command line: unknown key _BASE_"),
        (["SOLVER", "3"], "command line: SOLVER is a section: give one of its keys"),
        (["SOLVER.BASE_LR.X", "3"], "command line: SOLVER.BASE_LR is a value, not a section"),
        (
            ["SOLVER.OPTIMIZER", "None"],
            "command line: SOLVER.OPTIMIZER is None: a text is needed, such as 'ZENITH'",
        ),
        (["SOLVER.STEPS", "{1: 2}"], "command line: SOLVER.STEPS is {1: 2}: a key can't hold a dict"),
        (["SOLVER.STEPS", "(" * 5000], "command line: SOLVER.STEPS is '((("),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(opts: list[str], message: str) -> None:
    assert error_of(None, *opts).startswith(message)


NONE_TOO = {"SOLVER.WEIGHT_DECAY_BIAS", "MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.SEM_SEG_HEAD.NORM"}
NONE_TOO |= {f"MODEL.{head}.NORM" for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "RETINANET")}


@pytest.mark.parametrize("key", [key for key, _ in leaves(get_cfg())])
def test_none_is_refused_where_it_means_nothing(key: str) -> None:
    if key in NONE_TOO:
        assert dict(leaves(load_config(None, [key, None]).cfg))[key] is None
    else:
        assert error_of(None, key, "None").startswith(f"command line: {key} is None: ")


def test_none_within_a_section_and_for_an_add_ons_key() -> None:
    cfg = get_cfg()
    with pytest.raises(ConfigError, match="STEPS is None: a tuple is needed"):
        cfg.SOLVER.merge_from_list(["STEPS", "None"])
    cfg.merge_from_list(["SOLVER.WEIGHT_DECAY_BIAS", 0.1, "SOLVER.WEIGHT_DECAY_BIAS", None])
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS is None
    cfg.MODEL.MY_HEAD = CfgNode({"DIM": 3})
    cfg.merge_from_list(["MODEL.MY_HEAD.DIM", "None"])
    assert cfg.MODEL.MY_HEAD.DIM is None


def test_a_longer_base_cycle_is_told(tmp_path: Path) -> None:
    a = write(tmp_path / "a.yaml", "_BASE_: b.yaml\n")
    write(tmp_path / "b.yaml", "_BASE_: c.yaml\n")
    write(tmp_path / "c.yaml", "_BASE_: a.yaml\n")
    assert "a.yaml: its _BASE_ chain comes back to it" in error_of(a)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    write(tmp_path / "mask_rcnn.yaml", "SEED: 1\n")
    assert error_of(str(tmp_path / "mask_rcn.yaml")).endswith(f"did you mean {tmp_path / 'mask_rcnn.yaml'}?")
    assert "can't be read: Is a directory" in error_of(str(tmp_path))
    assert "no such config file" in error_of("/nowhere/at/all.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"SEED: \xff\xfe\xfa")
    assert "bytes.yaml: not valid YAML" in error_of(str(tmp_path / "bytes.yaml"))


def test_a_value_of_aliases_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    levels = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    message = error_of(write(tmp_path / "x.yaml", "\n".join(levels)))
    assert "too many or too deeply nested values" in message


EXPLOITS = [
    "!!python/object/apply:os.system ['touch hacked']",
    "SEED: !!python/object/apply:os.system ['touch hacked']",
    "SEED: !!python/object/new:os.system ['touch hacked']",
    "SEED: !!python/object/apply:eval [\"open('hacked', 'w')\"]",
    "SEED: [1, !!python/object/apply:os.system ['touch hacked']]",
    "SEED: !!python/name:os.system",
    "SEED: !!python/module:os",
    "SEED: !!python/tuple [1]",
    "MODEL: !!python/object/apply:os.system {args: ['touch hacked']}",
    "? !!python/object/apply:os.system ['touch hacked']\n: 1",
    "_BASE_: !!python/object/apply:os.system ['touch hacked']",
    "SEED: !mine 3",
]


@pytest.mark.parametrize("text", EXPLOITS)
def test_yaml_that_would_run_code_is_refused_and_runs_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "evil.yaml", text)
    message = error_of("evil.yaml")
    tag = next(word for word in text.split() if word.startswith("!"))
    assert message.startswith("evil.yaml:1: the YAML tag " + tag)
    write(tmp_path / "innocent.yaml", "_BASE_: evil.yaml\n")
    assert error_of("innocent.yaml").startswith("evil.yaml:1: the YAML tag")
    assert sorted(os.listdir()) == ["evil.yaml", "innocent.yaml"]


def test_the_command_line_evaluates_literals_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load_config(None, ["OUTPUT_DIR", "__import__('os').system('touch hacked')"])
    assert os.listdir() == []


def test_retinanets_anchor_expression_is_known_by_its_text(tmp_path: Path) -> None:
    text = "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"
    config = 'MODEL: {ANCHOR_GENERATOR: {SIZES: !!python/object/apply:eval ["%s"]}}'
    sizes = load_config(write(tmp_path / "x.yaml", config % text)).cfg.MODEL.ANCHOR_GENERATOR.SIZES
    assert sizes == eval(text)
    assert "the YAML tag" in error_of(write(tmp_path / "y.yaml", config % (text + " ")))
