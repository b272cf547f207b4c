"""Trains on the pretended device and prints what it found there: a JSON object.

``python -m tests.gpu_without_gpu.train compare|amp ENGINE CONFIG ANNOTATIONS IMAGES FOLDER``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.gpu_without_gpu import pretended
from zenith_det.benchmarking.loops import loaded_config
from zenith_det.engines.engine import load_engine
from zenith_det.engines.probe import iteration_of, make_trainer
from zenith_det.engines.trainer import Trainer

ITERATIONS, COUNTED_FROM, BATCH = 6, 2, 2
OTHER_BATCHES = (1, 4)
KEYS = [
    "SOLVER.BASE_LR", "0.001", "SOLVER.WARMUP_ITERS", "2", "SOLVER.ZENITH.WINDOW", "2", "DATALOADER.NUM_WORKERS", "0",
]  # fmt: skip


def make(words: list[str], device: str, batch: int, *keys: str) -> tuple[Trainer, Callable[[], None]]:
    engine_name, config, annotations, images, folder = words
    engine = load_engine(engine_name)
    data = ["DATASETS.TRAIN_JSON", annotations, "DATASETS.TRAIN_IMAGES", images]
    loaded = loaded_config(
        config, [*KEYS, *keys], data, Path(folder) / device, batch, 64, torch.device(device)
    )
    trainer = make_trainer(engine, loaded, fixed_batches=3)
    return trainer, iteration_of(engine, trainer)


def train(words: list[str], device: str, batch: int = BATCH, iterations: int = ITERATIONS) -> Trainer:
    trainer, iterate = make(words, device, batch)
    pretended.WAITS.clear()
    for iteration in range(iterations):
        if iteration < COUNTED_FROM:
            iterate()
        else:
            with pretended.counting():
                iterate()
    return trainer


def compare(words: list[str]) -> dict[str, Any]:
    """Six iterations on the CPU and on the device."""
    on_cpu = train(words, "cpu")
    pretended.install()
    on_device = train(words, "cuda")
    off = 0.0
    for p, q in zip(on_cpu.model.parameters(), on_device.model.parameters(), strict=True):
        assert q.is_cuda
        off = max(off, float((p.detach() - q.detach().cpu()).abs().max()))
    try:
        torch.ones(2, device="cuda") + torch.ones(2)
        mixed = "passes"
    except pretended.DevicesMixedError:
        mixed = "raises"
    counted = ITERATIONS - COUNTED_FROM
    found: dict[str, Any] = {
        "off": off,
        "mixed": mixed,
        "loss": on_device.take_loss(),
        "waits": {BATCH: pretended.WAITS.total() / counted},
        "operations": pretended.OPERATIONS.total() / counted,
        "where": [f"{n / counted:g} {kind}: {line}" for (kind, line), n in pretended.WAITS.most_common()],
    }
    for batch in OTHER_BATCHES if words[0] == "torchvision" else ():
        train(words, "cuda", batch, COUNTED_FROM + 1)
        found["waits"][batch] = pretended.WAITS.total()
    return found


def amp(words: list[str]) -> dict[str, Any]:
    """Three steps in float16 with BatchNorm, the second one's loss NaN; and the third again, from a checkpoint."""
    pretended.install()
    batch_norm = ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN"]
    keys = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16", *batch_norm]
    trainer, iterate = make(words, "cuda", BATCH, *keys)
    model, scaler = trainer.model, trainer.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 8.0})
    types = {p.dtype for p in model.parameters()}
    model.backbone.fpn.register_forward_hook(lambda module, args, out: types.add(out["pool"].dtype))

    def values(of: Trainer) -> list[torch.Tensor]:
        return [t.cpu().clone() for t in of.model.state_dict().values()]

    saved, changed, scale = Path(words[-1]) / "saved.pth", [], []
    for step in range(3):
        before = values(trainer)
        poison = model.roi_heads.box_predictor.register_forward_hook(
            lambda module, args, out, step=step: (out[0] * (torch.nan if step == 1 else 1.0), out[1])
        )
        if step == 2:
            torch.save(trainer._state(), saved)
        pretended.WAITS.clear()
        with pretended.counting():
            iterate()
        poison.remove()
        changed.append(not all(map(torch.equal, before, values(trainer))))
        scale.append(scaler.get_scale())
    waits = pretended.WAITS.total()

    resumed, iterate = make(words, "cuda", BATCH, *keys)
    for _ in range(2):  # whose batches the other has seen
        next(resumed.batches)
    resumed.load(torch.load(saved, weights_only=True), str(saved))
    resumed.progress.iteration = 2
    iterate()
    off = max(float((a.double() - b.double()).abs().max()) for a, b in zip(values(trainer), values(resumed)))
    trainer.guard.inspect()
    return {
        "types": sorted(str(t).removeprefix("torch.") for t in types),
        "changed": changed,
        "scale": scale,
        "waits": waits,
        "skipped": trainer.guard.skipped,
        "off_after_resuming": off,
    }


if __name__ == "__main__":
    print(json.dumps({"compare": compare, "amp": amp}[sys.argv[1]](sys.argv[2:])))
