"""Whole training iterations of both engines, ZENITH's beside SGD's."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zenith_det.benchmarking.measuring import Case, Samples, interleave
from zenith_det.benchmarking.memory import peak_memory
from zenith_det.benchmarking.reporting import Comparison, Ratio
from zenith_det.config import LoadedConfig, load_config
from zenith_det.data.synthetic import generate, split_files
from zenith_det.engines.engine import load_engine
from zenith_det.engines.probe import iteration_of, make_trainer
from zenith_det.engines.selection import probe_detectron2

__all__ = [
    "TRAINING_KINDS",
    "compare_iterations",
    "compare_training",
    "generated_images",
    "images_per_second",
    "loaded_config",
]

BUILT_IN, DETECTRON2 = "built-in", "Detectron2"
FIXED_BATCHES = 4
_LAST, _COMPILED = ["MODEL.CHANNELS_LAST", "True"], ["MODEL.COMPILE_BACKBONE", "True"]
_FP16 = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16"]
_BF16 = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"]
#: What ``train`` compares, and the KEY VALUE pairs that make it.
TRAINING_KINDS: dict[str, list[str]] = {
    "fp32": ["SOLVER.AMP.ENABLED", "False"],
    "fp32 channels_last": ["SOLVER.AMP.ENABLED", "False", *_LAST],
    "bf16": _BF16,
    "bf16 channels_last": [*_BF16, *_LAST],
    "fp16": _FP16,
    "fp16 channels_last": [*_FP16, *_LAST],
    "fp32 compiled": ["SOLVER.AMP.ENABLED", "False", *_COMPILED],
    "bf16 channels_last compiled": [*_BF16, *_LAST, *_COMPILED],
}
NEVER = 10**8


def compare_iterations(
    config_file: str,
    opts: Sequence[str] = (),
    *,
    batch_size: int,
    size: int,
    rounds: int,
    warmup: int,
    device: torch.device,
) -> Comparison:
    """One iteration under ZENITH and under SGD, on each engine that is there.

    All start from the same weights and go round the same four batches, loaded beforehand, so that forward and
    backward pass have the same to do.
    """
    engines, problem = _engines()
    with generated_images(config_file, opts, batch_size * FIXED_BATCHES, size) as (images, folder):
        images = [*images, *shared_weights(config_file, opts, images, folder)]
        cases = []
        for engine in engines:
            for optimizer in ("ZENITH", "SGD"):
                name = f"{engine}, {optimizer}"
                loaded = loaded_config(config_file, opts, images, folder / name, batch_size, size, device)
                loaded.override("SOLVER.OPTIMIZER", optimizer, "the benchmark")
                cases.append(Case(name, _one_iteration(engine, loaded, FIXED_BATCHES)))
        samples = interleave(cases, rounds=rounds, warmup=warmup, device=device)
    limit = 1.005 if device.type == "cuda" else None
    ratios = [Ratio(f"{engine}, ZENITH", f"{engine}, SGD", limit) for engine in engines]
    if len(engines) > 1:
        ratios.append(Ratio(f"{BUILT_IN}, ZENITH", f"{DETECTRON2}, ZENITH", 1.00))
    return Comparison(
        f"iteration: {config_file}, {batch_size} images of {size} pixels, {device}",
        samples,
        ratios,
        images_per_second(samples, batch_size),
        {"without Detectron2": problem} if problem else {},
    )


def compare_training(
    config_file: str,
    opts: Sequence[str] = (),
    *,
    batch_sizes: Sequence[int],
    kinds: Sequence[str],
    size: int,
    rounds: int,
    warmup: int,
    device: torch.device,
) -> list[Comparison]:
    """Iterations with the loader's part in them, for each batch size, each of ``kinds`` and each engine.

    Beside the times stands the peak memory of two iterations in a process of their own.

    Args:
        kinds: names in :data:`TRAINING_KINDS`.
    """
    engines, problem = _engines()
    comparisons = []
    for batch_size in batch_sizes:
        with generated_images(config_file, opts, batch_size * FIXED_BATCHES, size) as (images, folder):
            images = [*images, *shared_weights(config_file, opts, images, folder)]
            cases: list[Case] = []
            columns: dict[str, dict[str, float | str]] = {}
            for kind in kinds:
                for engine in engines:
                    name = f"{engine}, {kind}"
                    words = [*opts, *TRAINING_KINDS[kind]]
                    how = (config_file, words, images, folder / name, batch_size, size, device)
                    peak = peak_memory(_train_briefly, engine, how, device=device)
                    columns[name] = {"peak memory, MB": round(peak / 1e6)}
                    cases.append(Case(name, _one_iteration(engine, loaded_config(*how), 0)))
            samples = interleave(cases, rounds=rounds, warmup=warmup, device=device)
        for name, speed in images_per_second(samples, batch_size).items():
            columns[name] |= speed
        facts = {"without Detectron2": problem} if problem else memory_ratios(columns, kinds)
        comparisons.append(
            Comparison(
                f"training: batches of {batch_size}, images of {size} pixels, {config_file}, {device}",
                samples,
                training_ratios(engines, kinds),
                columns,
                facts,
            )
        )
    return comparisons


def training_ratios(engines: Sequence[str], kinds: Sequence[str]) -> list[Ratio]:
    """Each kind of both engines, and each kind beside the first one on the same engine."""
    ratios = []
    if DETECTRON2 in engines:
        ratios = [Ratio(f"{BUILT_IN}, {kind}", f"{DETECTRON2}, {kind}", 1.00) for kind in kinds]
        ratios += [
            Ratio(f"{BUILT_IN}, {kind}", f"{DETECTRON2}, fp32", 0.75)
            for kind in kinds
            if kind in ("fp16 channels_last", "bf16 channels_last") and "fp32" in kinds
        ]
    ratios += [
        Ratio(f"{engine}, {kind}", f"{engine}, {kinds[0]}") for engine in engines for kind in kinds[1:]
    ]
    return ratios


def memory_ratios(columns: Mapping[str, Mapping[str, float | str]], kinds: Sequence[str]) -> dict[str, str]:
    """The built-in engine's peak memory over Detectron2's, by kind."""
    ratios = {}
    for kind in kinds:
        one, other = (
            float(columns[f"{engine}, {kind}"]["peak memory, MB"]) for engine in (BUILT_IN, DETECTRON2)
        )
        ratios[f"peak memory, {kind}, {BUILT_IN} / {DETECTRON2}"] = f"{one / other:.2f} (at most 1.00)"
    return ratios


def _train_briefly(engine: str, how: tuple[Any, ...]) -> None:
    iterate = _one_iteration(engine, loaded_config(*how), 0)
    for _ in range(2):
        iterate()


def _engines() -> tuple[list[str], str]:
    """The engines that can be timed here, and why Detectron2 is not among them ("" where it is)."""
    probe = probe_detectron2()
    return [BUILT_IN, *([DETECTRON2] if probe.usable else [])], probe.problem.partition(";")[0]


def _one_iteration(engine: str, loaded: LoadedConfig, fixed_batches: int) -> Callable[[], None]:
    library = load_engine("detectron2" if engine == DETECTRON2 else "torchvision")
    return iteration_of(library, make_trainer(library, loaded, fixed_batches))


@contextmanager
def generated_images(
    config_file: str, opts: Sequence[str], count: int, size: int
) -> Iterator[tuple[list[str], Path]]:
    """The KEY VALUE pairs of a generated training set, and a folder to write to; both gone afterwards."""
    keypoints = load_config(config_file, opts).cfg.MODEL.KEYPOINT_ON
    task = "keypoints" if keypoints else "instances"
    with tempfile.TemporaryDirectory(prefix="zenith_det_benchmark_") as name:
        folder = Path(name)
        # Some to spare: images without objects are left out.
        generate(folder / "set", train=6 * count + 8, val=0, size=size, task=task)
        json_file, images = split_files(folder / "set", "train", task)
        _keep_one_shape(json_file)
        yield ["DATASETS.TRAIN_JSON", str(json_file), "DATASETS.TRAIN_IMAGES", str(images)], folder


def shared_weights(config_file: str, opts: Sequence[str], images: Sequence[str], folder: Path) -> list[str]:
    """The KEY VALUE pair of random weights for both engines, in a file in ``folder``.

    With weights of its own each would find other numbers of boxes, and the second stage other work: twice as much
    has been seen.
    """
    from zenith_det.engines.torchvision_engine import conversion

    loaded = loaded_config(config_file, opts, images, folder / "weights", 1, 64, torch.device("cpu"))
    path = folder / "weights.pth"
    weights = conversion.to_detectron2(
        make_trainer(load_engine("torchvision"), loaded).model.state_dict(),
        conversion.lowest_level(loaded.cfg),
    )
    torch.save({"model": weights, "__author__": "zenith_det"}, path)
    return ["MODEL.WEIGHTS", str(path)]


def _keep_one_shape(json_file: Path) -> None:
    """Leave the images of the most frequent height and width: the engines draw them in orders of their own,
    and larger ones would count as slower training."""
    content = json.loads(json_file.read_text())
    shapes = Counter((image["height"], image["width"]) for image in content["images"])
    ((shape, _),) = shapes.most_common(1)
    content["images"] = [i for i in content["images"] if (i["height"], i["width"]) == shape]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    json_file.write_text(json.dumps(content))


def loaded_config(
    config_file: str,
    opts: Sequence[str],
    images: Sequence[str],
    output_dir: Path,
    batch_size: int,
    size: int,
    device: torch.device,
) -> LoadedConfig:
    output_dir.mkdir(parents=True, exist_ok=True)  # for reports of bad steps
    settings = {
        "MODEL.DEVICE": str(device),
        "MODEL.WEIGHTS": "",
        "OUTPUT_DIR": str(output_dir),
        "SOLVER.IMS_PER_BATCH": batch_size,
        # So little that all cases find about the same boxes, and none diverges.
        "SOLVER.BASE_LR": 1e-5,
        "SOLVER.AVERAGE.KIND": "",
        "SOLVER.MAX_ITER": NEVER,
        "SOLVER.CHECKPOINT_PERIOD": NEVER,
        "TEST.EVAL_PERIOD": 0,
        "DATASETS.TEST": (),
        "INPUT.MIN_SIZE_TRAIN": (size,),
        "INPUT.MAX_SIZE_TRAIN": 2 * size,
        "SEED": 0,
    }
    pairs = [item for pair in settings.items() for item in pair]
    return load_config(config_file, [*pairs, *images, *opts])


def images_per_second(samples: dict[str, Samples], batch_size: int) -> dict[str, dict[str, float | str]]:
    return {name: {"images/s": batch_size / one.median} for name, one in samples.items()}
