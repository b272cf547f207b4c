"""``INPUT.AUGMENTATIONS``: objects go where their pixels go, the same on either engine, and mistakes are one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from tests.engines.torchvision_engine.small_models import small_config
from tests.reliability import runs
from zenith_det.data.synthetic import generate, split_files
from zenith_det.engines.augmentation import Augmentations, Labels
from zenith_det.engines.engine import load_engine
from zenith_det.errors import ConfigError

moving = pytest.mark.skipif(
    not hasattr(tv_tensors, "KeyPoints"), reason="torchvision moves keypoints from version 0.23 on"
)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        (["ColourJitter"], r"has no 'ColourJitter': did you mean ColorJitter\?"),
        (
            [{"ColorJitter": {"brightnes": 0.3}}],
            r"ColorJitter with \{'brightnes': 0.3\}: .*unexpected keyword",
        ),
        ([{"ColorJitter": {"hue": 3}}], r"ColorJitter with \{'hue': 3\}: "),
        ([{"ColorJitter": [0.3]}], r"ColorJitter wants its arguments by name"),
        ([{"ColorJitter": {}, "GaussianBlur": {}}], r"is neither a name nor one name with its arguments"),
        ([7], r"7 is neither a name"),
        ("ColorJitter", r"give a list"),
        (
            [{"RandomRotation": {"degrees": 5, "interpolation": "best"}}],
            r"no interpolation 'best'; there are nearest",
        ),
        ([{"RandomApply": {"transforms": ["Nope"]}}], r"has no 'Nope'"),
        (["RandomRotation"], r"RandomRotation with .*degrees"),
        ([{"Normalize": {"mean": [0.0] * 3, "std": [1.0] * 3}}], r"Normalize"),
        ([{"ToDtype": {"dtype": None}}], r"ToDtype"),
        (["ToPILImage"], r"ToPILImage"),
        ([{"FiveCrop": {"size": 8}}], r"FiveCrop"),
        (["MixUp"], r"MixUp"),
        (["Lambda"], r"has no 'Lambda'"),
        (["functional"], r"has no 'functional'"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_one_line_at_the_start(entries: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^INPUT\.AUGMENTATIONS.*{told}") as raised:
        Augmentations(entries)
    assert "\n" not in str(raised.value)


def test_a_run_tells_it_before_it_reads_anything(tmp_path: Path) -> None:
    generate(tmp_path / "data", train=1, val=1, size=64, seed=5, task="instances")
    for split in ("train", "val"):
        split_files(tmp_path / "data", split, "instances")[0].write_text("not JSON")
    words = runs.arguments(
        "torchvision", tmp_path / "data", tmp_path / "run", INPUT__AUGMENTATIONS="['Blur']"
    )
    code, printed = runs.run(words)
    assert code == 2, printed
    assert "command line: INPUT.AUGMENTATIONS: torchvision.transforms.v2 has no 'Blur'" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def image(height: int = 40, width: int = 60) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def square(x0: int, y0: int, x1: int, y1: int, size: tuple[int, int] = (40, 60)) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def objects() -> Labels:
    """Two of 10 and 20 pixels, the first without a mask; left and right keypoints, and one that isn't labelled."""
    return Labels(
        torch.tensor([[5.0, 5.0, 15.0, 15.0], [30.0, 10.0, 50.0, 30.0]]),
        torch.stack((torch.zeros(40, 60, dtype=torch.bool), square(30, 10, 50, 30))),
        torch.tensor([False, True]),
        torch.tensor([[[6.5, 7.5, 2], [12.5, 7.5, 1]], [[31.5, 12.5, 2], [0, 0, 0]]]),
    )


def test_colours_are_changed_alike_in_either_order_of_channels() -> None:
    entries = [{"ColorJitter": {"hue": 0.3, "saturation": 0.5}}, {"GaussianBlur": {"kernel_size": 3}}]
    results = {}
    for order, given in (("RGB", image()), ("BGR", image().flip(0))):
        torch.manual_seed(1)
        results[order], moved = Augmentations(entries, order)(given, lambda: pytest.fail("nothing moves"))
        assert moved is None
    assert torch.equal(results["RGB"], results["BGR"].flip(0))
    assert not torch.equal(results["RGB"], image())


@moving
def test_a_mirror_image_exchanges_left_and_right() -> None:
    flipped, moved = Augmentations([{"RandomHorizontalFlip": {"p": 1.0}}], flip_indices=[1, 0])(
        image(), objects
    )
    assert torch.equal(flipped, image().flip(2))
    assert moved is not None
    assert moved.boxes.tolist() == [[45, 5, 55, 15], [10, 10, 30, 30]]
    assert moved.masks is not None
    assert torch.equal(moved.masks[1], square(10, 10, 30, 30))
    assert moved.keypoints is not None
    assert moved.keypoints.tolist() == [[[47.5, 7.5, 1], [53.5, 7.5, 2]], [[0, 0, 0], [28.5, 12.5, 2]]]


@moving
def test_a_quarter_turn_is_exact_and_no_mirror() -> None:
    turn = [{"RandomRotation": {"degrees": [90, 90], "expand": True}}]
    turned, moved = Augmentations(turn, flip_indices=[1, 0])(image(), objects)
    assert torch.equal(turned, torch.rot90(image(), 1, (1, 2)))
    assert moved is not None
    # (x, y) to (y, 60 - x).
    assert moved.boxes.numpy() == pytest.approx(np.array([[5, 45, 15, 55], [10, 10, 30, 30]]), abs=1e-4)
    assert moved.masks is not None
    assert torch.equal(moved.masks[1], square(10, 10, 30, 30, (60, 40)))
    assert moved.keypoints is not None
    assert moved.keypoints[0].numpy() == pytest.approx(np.array([[7.5, 53.5, 2], [7.5, 47.5, 1]]), abs=1e-4)


@moving
def test_what_is_off_the_image_is_gone_and_what_is_half_off_is_cut() -> None:
    """A crop to the left half: the second object keeps a column of its mask, and its keypoint is beyond."""
    crop = [{"CenterCrop": {"size": [20, 22]}}]  # x from 19 to 41, y from 10 to 30
    cut, moved = Augmentations(crop)(image(), objects)
    assert torch.equal(cut, image()[:, 10:30, 19:41])
    assert moved is not None
    assert moved.kept is not None
    assert moved.kept.tolist() == [1]
    assert moved.boxes.tolist() == [[11, 0, 22, 20]]
    assert moved.keypoints is not None
    assert moved.keypoints.tolist() == [[[12.5, 2.5, 2], [0, 0, 0]]]


@moving
def test_boxes_are_drawn_around_masks_that_turn() -> None:
    """The box around a turned box is too wide for a disc; the corners are filled with grey, and no mask is there."""
    yy, xx = np.mgrid[:100, :100] + 0.5
    disc = torch.from_numpy((xx - 50) ** 2 + (yy - 50) ** 2 <= 30**2)[None]
    labels = Labels(torch.tensor([[20.0, 20.0, 80.0, 80.0]]), disc, torch.tensor([True]))
    turn = Augmentations([{"RandomRotation": {"degrees": [45, 45], "fill": 114}}])
    turned, moved = turn(image(100, 100), lambda: labels)
    assert turned[:, 0, 0].tolist() == [114, 114, 114]
    assert moved is not None
    assert moved.masks is not None
    assert not moved.masks[0, 0, 0]
    assert moved.boxes.numpy() == pytest.approx(np.array([[20, 20, 80, 80]]), abs=1.5)


@moving
def test_nothing_is_touched_where_a_transform_did_nothing() -> None:
    same, moved = Augmentations([{"RandomHorizontalFlip": {"p": 0.0}}])(image(), objects)
    assert moved is None
    assert torch.equal(same, image())


RECIPES: dict[str, list[Any]] = {
    "colours": [{"ColorJitter": {"brightness": 0.4, "hue": 0.1}}, {"GaussianBlur": {"kernel_size": 3}}],
    "moved": [
        {"RandomApply": {"transforms": [{"RandomRotation": {"degrees": 25}}], "p": 0.7}},
        {"RandomHorizontalFlip": {"p": 0.5}},
        "RandomIoUCrop",
    ],
    # Of docs/AUGMENTATION.md, small.
    "large-scale jitter": [
        {"ScaleJitter": {"target_size": [64, 64], "scale_range": [0.1, 2.0]}},
        {"RandomCrop": {"size": [64, 64], "pad_if_needed": True, "fill": 128}},
    ],
}


@moving
def test_large_scale_jitter_is_detectron2s() -> None:
    """One size; what is scaled by 0.1 to 2 of that, cut or padded with grey; the sides keep their proportion."""
    augment = Augmentations(RECIPES["large-scale jitter"])
    shares = []
    for seed in range(40):
        torch.manual_seed(seed)
        jittered, moved = augment(torch.full((3, 40, 60), 255, dtype=torch.uint8), objects)
        assert jittered.shape == (3, 64, 64)
        assert moved is not None
        assert ((moved.boxes >= 0) & (moved.boxes <= 64)).all()
        seen = (jittered[0] == 255).nonzero()
        height, width = (seen.amax(dim=0) - seen.amin(dim=0) + 1).tolist()
        assert set(jittered.unique().tolist()) <= {128, 255}
        shares.append(width / 64)
        if width < 64:
            assert height == pytest.approx(width * 40 / 60, abs=1.5)
    assert min(shares) < 0.3
    assert 0.3 < np.mean(np.array(shares) == 1) < 0.7  # a scale of 1 and more, of 0.1 to 2


@pytest.mark.detectron2
@moving
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("task", ["mask", "keypoint"])
def test_both_engines_give_the_same_samples(task: str, recipe: str, tmp_path: Path) -> None:
    runs.need("detectron2")
    kind = "instances" if task == "mask" else "keypoints"
    generate(tmp_path, train=6, val=1, size=64, seed=5, task=kind)
    json_file, images = split_files(tmp_path, "train", kind)
    shown = {}
    for name in ("torchvision", "detectron2"):
        loaded = small_config(
            task, DATASETS__TRAIN_JSON=str(json_file), DATASETS__TRAIN_IMAGES=str(images), DATASETS__TEST=(),
            INPUT__MIN_SIZE_TRAIN=(0,), INPUT__RANDOM_FLIP="none", INPUT__AUGMENTATIONS=RECIPES[recipe],
            MODEL__ROI_HEADS__NUM_CLASSES=number_of_classes(json_file), INPUT__MASK_FORMAT="bitmask",
        )  # fmt: skip
        engine = load_engine(name)
        engine.prepare(loaded)
        data = engine.training_set(loaded)
        mapper = engine.training_mapper(loaded.cfg, data.names, data.metadata)
        before = torch.get_rng_state()
        samples = [mapper(data.records[n % len(data.records)], np.random.default_rng(n)) for n in range(12)]
        assert torch.equal(torch.get_rng_state(), before)
        again = mapper(data.records[3], np.random.default_rng(3))
        assert torch.equal(samples[3]["image"], again["image"])
        shown[name] = [engine.shown(loaded.cfg, sample) for sample in samples]
    for (pixels, ours), (their_pixels, theirs) in zip(shown["torchvision"], shown["detectron2"], strict=True):
        assert np.array_equal(pixels, their_pixels)
        assert ours["classes"].tolist() == theirs["classes"].tolist()
        assert ours["boxes"] == pytest.approx(theirs["boxes"], abs=1e-3)
        if task == "mask":
            assert np.array_equal(ours["masks"], theirs["masks"])
        else:
            assert ours["keypoints"] == pytest.approx(theirs["keypoints"], abs=1e-3)


def number_of_classes(json_file: Path) -> int:
    return len(json.loads(json_file.read_text())["categories"])


@moving
@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_resumed_run_augments_as_an_undisturbed_one(engine: str, tmp_path: Path) -> None:
    """With workers and without."""
    runs.need(engine)
    generate(tmp_path / "data", train=6, val=2, size=64, seed=5, task="instances")
    keys = {
        "SOLVER__CHECKPOINT_PERIOD": 8, "TEST__EVAL_PERIOD": 0, "CHECKPOINT__BEST": "''",
        "INPUT__AUGMENTATIONS": [*RECIPES["colours"], *RECIPES["moved"]],
        # Detectron2 cuts polygons with shapely, which need not be there.
        "INPUT__CROP__ENABLED": engine == "torchvision" or importlib.util.find_spec("shapely") is not None,
        "DATALOADER__SAMPLER_TRAIN": "RepeatFactorTrainingSampler", "DATALOADER__REPEAT_THRESHOLD": 0.9,
        "TEST__VALIDATION_LOSS": True,
    }  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for output, length, workers in ((whole, 12, 0), (parts, 8, 2), (parts, 12, 0)):
        words = runs.arguments(
            engine, tmp_path / "data", output, resume=length == 12 and output == parts,
            SOLVER__MAX_ITER=length, DATALOADER__NUM_WORKERS=workers, **keys,
        )  # fmt: skip
        code, printed = runs.run(words)
        assert code == 0, printed
    runs.assert_same_result(whole, parts)
