"""An engine's short runs: in each precision, waits for the device, memory, and a resume that repeats the run."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zenith_det.config import LoadedConfig, load_config
from zenith_det.engines.engine import load_engine
from zenith_det.engines.options import RunOptions
from zenith_det.engines.probe import iteration_of, make_trainer
from zenith_det.engines.run import run
from zenith_det.engines.trainer import Trainer
from zenith_det.self_check.finding import OK, SLOW, Finding, broken, not_checked
from zenith_det.self_check.images import COUNT
from zenith_det.training.checkpoints.checkpoint import Checkpointer
from zenith_det.training.checkpoints.reading import load_checkpoint

CONFIG = "quickstart/mask_rcnn_small.yaml"
ITERATIONS, BATCH = 6, 2
PRECISIONS = {"fp32": "", "bf16": "bfloat16", "fp16": "float16"}
#: A first loss may differ so much, as a share, between precisions and devices: each draws its own regions.
LOSS_TOLERANCE = 0.25
#: Seconds an iteration of so small a model takes on any machine that has nothing else to do.
MOST_SECONDS = {"cpu": 3.0, "cuda": 0.5}
#: Of an iteration in fp32, what one in half precision may take before something is wrong.
MOST_OVER_FP32 = 1.5
#: Waits for the device in an iteration of the built-in engine, of two images.
MOST_WAITS = {"torchvision": 20}
#: GPU memory, in bytes, that an R50-FPN takes to train with two images of usual size.
ENOUGH_MEMORY = 6e9
RESUMED_AT, RESUME_END = 2, 4


@dataclass
class EngineChecks:
    """The checks of one engine, which share what the first of them measured.

    Attributes:
        engine: its name.
        data: the annotation file and the images' folder.
        folder: to write to.
    """

    engine: str
    data: tuple[Path, Path]
    folder: Path
    device: torch.device
    fp32: tuple[float, float] | None = field(default=None, init=False)
    """The first loss and the seconds of an iteration in fp32."""

    def config(self, output: str, device: torch.device | None = None, **keys: Any) -> LoadedConfig:
        """The small model's configuration; of keys, ``__`` stands for the dots."""
        json_file, images = self.data
        settings: dict[str, Any] = {
            "DATASETS.TRAIN_JSON": json_file,
            "DATASETS.TRAIN_IMAGES": images,
            "DATASETS.TEST": (),
            "DATALOADER.NUM_WORKERS": 0,
            "MODEL.DEVICE": device or self.device,
            "MODEL.WEIGHTS": "",
            "OUTPUT_DIR": self.folder / self.engine / output,
            "SOLVER.AVERAGE.KIND": "",
            "SOLVER.IMS_PER_BATCH": BATCH,
            "SOLVER.WARMUP_ITERS": 2,
            "SOLVER.MAX_ITER": 100,
            "SOLVER.ZENITH.WINDOW": 2,
            "TEST.EVAL_PERIOD": 0,
            "SEED": 0,
        } | {key.replace("__", "."): value for key, value in keys.items()}
        words = [
            str(value) if isinstance(value, Path | torch.device) else value for value in settings.values()
        ]
        loaded = load_config(CONFIG, [word for pair in zip(settings, words) for word in pair])
        Path(loaded.cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)  # for reports of bad steps
        return loaded

    def trainer(self, output: str, **more: Any) -> tuple[Trainer, Callable[[], None]]:
        engine = load_engine(self.engine)
        trainer = make_trainer(engine, self.config(output, **more), fixed_batches=COUNT // BATCH)
        return trainer, iteration_of(engine, trainer)

    def check_precision(self, precision: str) -> Finding:
        """A short run: finite losses, few steps skipped, the first loss that of fp32 (fp32's: that of the CPU)."""
        amp, on_cpu = PRECISIONS[precision], self.device.type == "cpu"
        if why := self._impossible(amp):
            return not_checked(why)
        trainer, iterate = self.trainer(
            precision, SOLVER__AMP__ENABLED=bool(amp), SOLVER__AMP__DTYPE=amp or "float16"
        )
        before = [p.detach().clone() for p in trainer.model.parameters()]
        losses, seconds = [], []
        for _ in range(ITERATIONS):
            start = time.perf_counter()
            iterate()
            losses.append(trainer.take_loss())  # waits for the device
            seconds.append(time.perf_counter() - start)
        trainer.guard.inspect()
        skipped, took = trainer.guard.skipped, statistics.median(seconds[2:])
        found = (
            f"loss {losses[0]:.3g} to {losses[-1]:.3g}, {took * 1e3:.0f} ms an iteration of {BATCH} images"
        )
        found += f", {skipped} steps skipped" if skipped else ""
        figures = {f"loss_{i}": loss for i, loss in enumerate(losses)} | {"seconds": took, "skipped": skipped}
        # GradScaler finds its scale by skipping.
        allowed = ITERATIONS - 1 if amp == "float16" else 0
        if not all(map(math.isfinite, losses)) or skipped > allowed:
            return broken(f"{found}: losses and gradients should be finite")
        if all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters())):
            return broken(f"{found}: no weight has changed")
        wanted, of = (self.fp32[0], "in fp32") if self.fp32 and amp else (losses[0], "")
        if not amp and not on_cpu:
            wanted, of = self._loss_on_cpu(), "on the CPU"
        if abs(losses[0] - wanted) > LOSS_TOLERANCE * abs(wanted):
            return broken(f"{found}: the first loss is {wanted:.3g} {of}")
        if not amp:
            self.fp32 = losses[0], took
        if took > MOST_SECONDS[self.device.type]:
            return Finding(SLOW, found, _speed_advice(self.device), figures)
        if amp and self.fp32 and took > MOST_OVER_FP32 * self.fp32[1]:
            return Finding(SLOW, f"{found}, {took / self.fp32[1]:.1f} times fp32's", "train in fp32", figures)
        return Finding(OK, found, figures=figures)

    def _impossible(self, amp: str) -> str:
        if self.device.type == "cpu":
            if amp == "float16":
                return "float16 trains on a GPU alone"
            if amp and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
                return "this CPU has no instructions for bfloat16, which takes about ten times as long"
        elif amp == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return "this GPU computes no bfloat16: take float16"
        return ""

    def _loss_on_cpu(self) -> float:
        trainer, iterate = self.trainer("cpu", device=torch.device("cpu"))
        iterate()
        return trainer.take_loss()

    def check_waits(self) -> Finding:
        """How often an iteration waits for the device, as torch counts it; only a GPU can be waited for."""
        if self.device.type != "cuda":
            return not_checked("needs a GPU")
        _, iterate = self.trainer("waits")
        for _ in range(3):
            iterate()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                iterate()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchronizing" in str(one.message) for one in told)
        most = MOST_WAITS.get(self.engine)
        found, figures = f"{waits} in an iteration of {BATCH} images", {"waits": float(waits)}
        if most is not None and waits > most:
            return Finding(SLOW, f"{found}, at most {most} expected", "report it", figures)
        return Finding(OK, found, figures=figures)

    def check_memory(self) -> Finding:
        """Enough is free to train, and what the short run takes does not grow from iteration to iteration."""
        if self.device.type != "cuda":
            # Kilobytes, on macOS bytes.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
                1 if sys.platform == "darwin" else 1024
            )
            return Finding(OK, f"{peak / 1e6:.0f} MB at most in this process", figures={"peak": peak})
        _, iterate = self.trainer("memory")
        torch.cuda.reset_peak_memory_stats()
        taken = []
        for _ in range(4):
            for _ in range(COUNT // BATCH):  # once round the same batches
                iterate()
            torch.cuda.synchronize()
            taken.append(torch.cuda.memory_allocated())
        peak = torch.cuda.max_memory_allocated()
        free, total = torch.cuda.mem_get_info()
        free += torch.cuda.memory_reserved()
        found = f"{peak / 1e6:.0f} MB at most; {free / 1e9:.1f} of the GPU's {total / 1e9:.1f} GB are free"
        figures = {"peak": float(peak), "free": float(free), "total": float(total)}
        if taken[-1] > taken[1] + 1e6:
            return broken(f"{found}; {(taken[-1] - taken[1]) / 1e6:.0f} MB more after each few iterations")
        if free < min(ENOUGH_MEMORY, 0.8 * total):
            return Finding(
                SLOW,
                found,
                "end the programs that hold it (nvidia-smi), or lower SOLVER.IMS_PER_BATCH",
                figures,
            )
        return Finding(OK, found, figures=figures)

    def check_resume(self) -> Finding:
        """Under ``DETERMINISTIC`` a run that was stopped and resumed ends with the weights of one that was not."""
        keys: dict[str, Any] = {
            "DETERMINISTIC": True,
            "SOLVER__MAX_ITER": RESUME_END,
            "SOLVER__CHECKPOINT_PERIOD": RESUMED_AT,
            # 0 takes gigabytes on a GPU; see use_deterministic_algorithms.
            "MODEL__ROI_BOX_HEAD__POOLER_SAMPLING_RATIO": 2,
            "MODEL__ROI_MASK_HEAD__POOLER_SAMPLING_RATIO": 2,
        }
        json_file, images = map(str, self.data)
        whole = self.config("whole", DATASETS__VAL_JSON=json_file, DATASETS__VAL_IMAGES=images, **keys)
        scalars = run(self.engine, whole, RunOptions())
        if "bbox/AP" not in scalars:
            return broken("the run's evaluation gave no box AP")
        one, other = (Checkpointer(self.folder / self.engine / name) for name in ("whole", "resumed"))
        resumed = self.config("resumed", **keys)
        halfway = one.output_dir / f"model_{RESUMED_AT - 1:07d}.pth"
        other.mark_last(halfway.rename(other.output_dir / halfway.name))
        run(self.engine, resumed, RunOptions(resume=True))
        models = [load_checkpoint(c.output_dir / "model_final.pth")["model"] for c in (one, other)]
        differ = [name for name, value in models[0].items() if not torch.equal(value, models[1][name])]
        if differ:
            return broken(
                f"{len(differ)} of {len(models[0])} tensors differ after a resume, {differ[0]} first"
            )
        return Finding(
            OK, f"stopped after {RESUMED_AT} of {RESUME_END} iterations: the same weights, bit for bit"
        )


def _speed_advice(device: torch.device) -> str:
    if device.type == "cuda":
        return "end other programs on the GPU (nvidia-smi) and try again"
    return f"end other programs and try again; torch uses {torch.get_num_threads()} threads (OMP_NUM_THREADS)"
