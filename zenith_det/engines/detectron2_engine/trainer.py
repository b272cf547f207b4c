"""ZENITH under Detectron2's trainer: a mix-in for projects that have one, a trainer for those that don't."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from detectron2.engine import DefaultTrainer, defaults, hooks
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter
from detectron2.utils.logger import setup_logger
from torch import nn

from zenith_det.engines.detectron2_engine.accumulation import accumulated_step, check_accumulation
from zenith_det.engines.detectron2_engine.checkpoint import SafeCheckpointer
from zenith_det.engines.detectron2_engine.data import build_test_loader
from zenith_det.engines.detectron2_engine.data_order import DataOrder, build_train_loader, run_seed
from zenith_det.engines.detectron2_engine.evaluation import build_evaluator
from zenith_det.engines.detectron2_engine.hooks import ZenithMetrics
from zenith_det.engines.detectron2_engine.writers import MetricsWriter
from zenith_det.errors import ConfigError
from zenith_det.solver import build_lr_scheduler, build_optimizer, eval_mode, train_mode
from zenith_det.solver.registry import LR_SCHEDULER_REGISTRY
from zenith_det.training.seeding import seed_all, seed_step

logger = logging.getLogger(__name__)

# Detectron2's schedules that are its own to build under SGD. WarmupStepWithFixedGammaLR is not among them:
# Detectron2's raises at the last iteration, before the final checkpoint is written.
DETECTRON2_SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR")


class ZenithTrainerMixin:
    """Put before a Detectron2 trainer, it trains with what ``SOLVER.OPTIMIZER`` names::

        class Trainer(ZenithTrainerMixin, DefaultTrainer):
            ...

        cfg = get_cfg()
        add_zenith_config(cfg)

    It overrides

    * ``build_optimizer``: from :data:`zenith_det.solver.OPTIMIZER_REGISTRY`; "SGD" is the base class's own,
    * ``build_lr_scheduler``: from :data:`~zenith_det.solver.LR_SCHEDULER_REGISTRY`; under "SGD",
      Detectron2's schedules are the base class's own,
    * ``build_hooks``: adds :class:`ZenithMetrics`, so that ``lr`` in the logs is the one used,
    * ``auto_scale_workers``: rescales this toolkit's iteration keys as well.

    Everything else is the base class's. With ``SOLVER.OPTIMIZER: SGD`` and Detectron2's schedule, training is
    the base class's training, bit for bit.

    A trainer that clips gradients in ``optimizer.step`` keeps doing so; ZENITH measures the norm before. One
    that clips them between ``backward()`` and ``step()`` calls ``optimizer.record_norm()`` before it clips.

    Raises:
        ConfigError: ``cfg`` lacks the keys of :func:`zenith_det.config.add_zenith_config`, or a key cannot be
            honoured.
    """

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        if "OPTIMIZER" not in cfg.SOLVER:
            raise ConfigError(
                "SOLVER.OPTIMIZER is missing: call zenith_det.config.add_zenith_config(cfg) after get_cfg()"
            )
        if not logging.getLogger("zenith_det").isEnabledFor(logging.INFO):
            # Detectron2's default_setup gives handlers to its own and fvcore's loggers alone.
            setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="zenith_det")
        # DefaultTrainer calls its own auto_scale_workers by name, past an override; after this it has
        # nothing left to do.
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        with _ddp_on_the_models_device():
            super().__init__(cfg, *args, **kwargs)  # type: ignore[call-arg]
        check_accumulation(cfg, self._trainer)  # type: ignore[attr-defined]

    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer that ``SOLVER.OPTIMIZER`` names, gradient clipping included.

        Raises:
            ConfigError: see :func:`zenith_det.solver.build_optimizer`.
        """
        clip = cfg.SOLVER.CLIP_GRADIENTS
        # Detectron2 itself has no clipping of the whole model's norm.
        if cfg.SOLVER.OPTIMIZER == "SGD" and not (clip.ENABLED and clip.CLIP_TYPE == "full_model"):
            optimizer: torch.optim.Optimizer = super().build_optimizer(cfg, model)  # type: ignore[misc]
            return optimizer
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(
        cls, cfg: Any, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule that ``SOLVER.LR_SCHEDULER_NAME`` names.

        A name that this toolkit doesn't know goes to the base class.

        Raises:
            ConfigError: see :func:`zenith_det.solver.build_lr_scheduler`.
        """
        name = cfg.SOLVER.LR_SCHEDULER_NAME
        theirs = cfg.SOLVER.OPTIMIZER == "SGD" and name in DETECTRON2_SCHEDULES
        if theirs or (name not in LR_SCHEDULER_REGISTRY and _has_own(cls, "build_lr_scheduler")):
            scheduler: torch.optim.lr_scheduler.LRScheduler = super().build_lr_scheduler(  # type: ignore[misc]
                cfg, optimizer
            )
            return scheduler
        return build_lr_scheduler(cfg, optimizer)

    def run_step(self) -> None:
        """The base class's step; its batch in parts under ``SOLVER.GRADIENT_ACCUMULATION``."""
        parts = self.cfg.SOLVER.GRADIENT_ACCUMULATION  # type: ignore[attr-defined]
        if parts == 1:
            super().run_step()  # type: ignore[misc]
            return
        self._trainer.iter = self.iter  # type: ignore[attr-defined]
        accumulated_step(self._trainer, parts)  # type: ignore[attr-defined]

    def build_hooks(self) -> list[HookBase]:
        """The base class's hooks, and :class:`ZenithMetrics` after the scheduler's."""
        built: list[HookBase] = super().build_hooks()  # type: ignore[misc]
        built = [hook for hook in built if hook is not None]
        metrics = ZenithMetrics(batch_size=self.cfg.SOLVER.IMS_PER_BATCH)  # type: ignore[attr-defined]
        # Before whatever saves and writes: the checkpoint is to hold its state, the writers its values.
        schedulers = [i for i, hook in enumerate(built) if isinstance(hook, hooks.LRScheduler)]
        built.insert(schedulers[-1] + 1 if schedulers else 0, metrics)
        self._evaluate_averaged_weights(built)
        return built

    def _evaluate_averaged_weights(self, built: list[HookBase]) -> None:
        """Evaluate and save the weights that Schedule-Free averages, and train on with its own."""
        optimizer = self.optimizer  # type: ignore[attr-defined]
        if not callable(getattr(optimizer, "eval", None)):
            return
        for hook in built:
            if isinstance(hook, hooks.EvalHook):
                hook._func = _with_averaged_weights(optimizer, hook._func)
        checkpointer = self.checkpointer  # type: ignore[attr-defined]
        checkpointer.save = _with_averaged_weights(optimizer, checkpointer.save)

    @staticmethod
    def auto_scale_workers(cfg: Any, num_workers: int) -> Any:
        """Detectron2's scaling for another number of processes, with this toolkit's keys.

        ``SOLVER.ZENITH.WINDOW`` and ``SOLVER.ZENITH.RECORD_AFTER`` count iterations, like ``WARMUP_ITERS``
        and ``STEPS``, and are divided by the same factor: they span the same number of images as before. The
        window stays at least 1. ``MAX_NONFINITE_STEPS`` counts failures and stays.
        """
        reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is cfg:
            return cfg
        frozen = scaled.is_frozen()
        scaled.defrost()
        zenith = scaled.SOLVER.ZENITH
        factor = num_workers / reference
        zenith.WINDOW = max(1, round(zenith.WINDOW / factor))
        zenith.RECORD_AFTER = round(zenith.RECORD_AFTER / factor)
        logger.info(
            "Auto-scaling SOLVER.ZENITH to WINDOW %d, RECORD_AFTER %d", zenith.WINDOW, zenith.RECORD_AFTER
        )
        if frozen:
            scaled.freeze()
        return scaled


class ZenithTrainer(ZenithTrainerMixin, DefaultTrainer):  # type: ignore[misc]
    """Detectron2's ``DefaultTrainer`` with ZENITH and an evaluator for each of Detectron2's datasets.

    Checkpoints are written whole or not at all and never run code when they are read. A resumed run repeats the
    uninterrupted one bit for bit: the images and all random choices come from ``seed``, see :class:`DataOrder`.

    Attributes:
        seed: ``SEED``, or one drawn at random where that is negative; a resumed run's is its checkpoint's.
    """

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        self.seed = run_seed(cfg)
        seed_all(self.seed)  # the model's initialisation
        super().__init__(cfg, *args, **kwargs)

    def run_step(self) -> None:
        """The step of :class:`ZenithTrainerMixin`, with the random numbers of this iteration."""
        seed_step(self.seed, self.iter)
        super().run_step()

    def build_hooks(self) -> list[HookBase]:
        """The hooks of :class:`ZenithTrainerMixin`, with a checkpointer that is safe to interrupt."""
        # The base class makes a DetectionCheckpointer just before it asks for the hooks that use it.
        self.checkpointer = SafeCheckpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            allow_mismatch=self.cfg.MODEL.WEIGHTS_ALLOW_MISMATCH,
            trainer=weakref.proxy(self),
        )
        built = [*super().build_hooks(), DataOrder()]
        if self.cfg.TEST.AUG.ENABLED and self.cfg.DATASETS.TEST:
            # Before the writers: they close when training ends.
            writers = [i for i, hook in enumerate(built) if isinstance(hook, hooks.PeriodicWriter)]
            place = writers[0] if writers else len(built)
            built.insert(place, hooks.EvalHook(0, lambda: self.test_with_tta(self.cfg, self.model)))
        return built

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's writers, with a ``metrics.json`` that stays one run's when it is resumed."""
        path = os.path.join(self.cfg.OUTPUT_DIR, "metrics.json")
        ours = MetricsWriter(path, weakref.proxy(self))
        return [ours if isinstance(writer, JSONWriter) else writer for writer in super().build_writers()]

    @classmethod
    def build_model(cls, cfg: Any) -> nn.Module:
        """Detectron2's model; see :func:`connect_top_level`."""
        model: nn.Module = super().build_model(cfg)
        connect_top_level(model)
        return model

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        """Detectron2's loader, in an order that a resumed run goes on with."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: Any, dataset_name: str) -> Any:
        """The base class's loader, of the first ``TEST.MAX_IMAGES`` images (0: all)."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(
        cls, cfg: Any, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """See :func:`zenith_det.engines.detectron2_engine.build_evaluator`."""
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test_with_tta(cls, cfg: Any, model: nn.Module) -> OrderedDict[str, Any]:
        """Evaluate with test-time augmentation (``TEST.AUG``): task + "_TTA" -> metric -> percent."""
        logger.info("Evaluating with test-time augmentation")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((f"{task}_TTA", metrics) for task, metrics in results.items())


def connect_top_level(model: nn.Module) -> None:
    """Let an FPN's extra level follow its coarsest one, whatever that is called.

    Detectron2 pools it from a level named "p5", and so fails on a backbone without its last stage
    (``MODEL.RESNETS.OUT_FEATURES`` up to "res4"), which the built-in engine trains. Of no effect on others.
    """
    for module in model.modules():
        if isinstance(module, FPN) and isinstance(module.top_block, LastLevelMaxPool):
            module.top_block.in_feature = module._out_features[-1 - module.top_block.num_levels]


def _has_own(trainer: type, method: str) -> bool:
    """Whether a class between the mix-in and Detectron2's trainer defines ``method``."""
    bases = trainer.__mro__[trainer.__mro__.index(ZenithTrainerMixin) + 1 :]
    owner = next((base for base in bases if method in vars(base)), None)
    return owner is not None and owner is not DefaultTrainer


def _with_averaged_weights(
    optimizer: torch.optim.Optimizer, function: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        eval_mode(optimizer)
        try:
            return function(*args, **kwargs)
        finally:
            train_mode(optimizer)

    return wrapped


@contextlib.contextmanager
def _ddp_on_the_models_device() -> Iterator[None]:
    """Let Detectron2's trainer wrap a model on the CPU for several processes.

    ``create_ddp_model`` pins DDP to the GPU of the process's rank, which DDP refuses for such a model, and
    ``DefaultTrainer`` leaves no way to pass other arguments.
    """
    original = defaults.create_ddp_model

    def create(model: nn.Module, **kwargs: Any) -> nn.Module:
        if all(parameter.device.type == "cpu" for parameter in model.parameters()):
            kwargs.setdefault("device_ids", None)
        wrapped: nn.Module = original(model, **kwargs)
        return wrapped

    defaults.create_ddp_model = create
    try:
        yield
    finally:
        defaults.create_ddp_model = original
