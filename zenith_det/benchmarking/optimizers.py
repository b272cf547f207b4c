"""Step time and state memory of optimizers on the parameters of real detectors."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from zenith_det.benchmarking.measuring import Case, interleave
from zenith_det.benchmarking.reporting import Comparison, Ratio
from zenith_det.config import load_config
from zenith_det.engines.torchvision_engine.rcnn import build_model
from zenith_det.optim import ZENITH, ZENITHAdamW

__all__ = ["compare_optimizers", "state_bytes"]

WINDOW = 100
MAX_NORM = 1.0
LR, MOMENTUM, WEIGHT_DECAY = 0.02, 0.9, 1e-4

SGD_FUSED, SGD_CLIPPED, ADAMW = "SGD, fused", "SGD, fused + clip_grad_norm_", "AdamW, fused"
ZENITH_PLAIN, ZENITH_CLIPPED = "ZENITH", f"ZENITH, max_norm={MAX_NORM:g}"
ZENITH_ADAMW = "ZENITHAdamW"
ADAMW_SETTINGS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.05}

RATIOS = (
    Ratio(ZENITH_PLAIN, SGD_FUSED, at_most=1.25),
    Ratio(ZENITH_PLAIN, ADAMW, at_most=0.90),
    Ratio(ZENITH_CLIPPED, SGD_CLIPPED, at_most=0.85),
    Ratio(ZENITH_ADAMW, ADAMW),
)
#: Passes over all parameters that an update can't do without: (tensors read, tensors written).
#: SGD reads parameter, gradient and momentum and writes the first and the last; the norm is one read more;
#: clip_grad_norm_ reads for the norm, then reads and writes; the fused kernel writes a divided gradient back.
PASSES = {
    SGD_FUSED: (3, 2),
    SGD_CLIPPED: (5, 3),
    ADAMW: (4, 3),
    ZENITH_ADAMW: (5, 3),
    ZENITH_PLAIN: (4, 2),
    ZENITH_CLIPPED: (4, 3),
}


def compare_optimizers(
    config_file: str, opts: Sequence[str] = (), *, rounds: int, warmup: int, device: torch.device
) -> Comparison:
    """Steps of all optimizers on the trainable parameters of the model that ``config_file`` describes.

    Every optimizer has its own parameters and normally distributed gradients, so that none finds its data in
    a cache because another one has just used it. Optimizers of libraries that aren't installed are left out,
    and named under "left out".
    """
    shapes = parameter_shapes(config_file, opts)
    count = sum(shape.numel() for shape in shapes)
    optimizers: dict[str, Optimizer] = {}
    steps: list[Case] = []
    missing: dict[str, str] = {}
    for name, make in _makers(device).items():
        try:
            optimizer, step = make(_parameters(shapes, device))
        except ImportError as error:
            missing[name] = str(error)
            continue
        optimizers[name] = optimizer
        steps.append(Case(name, step))
    read = torch.randn(count, device=device)
    samples = interleave(
        [*steps, Case("reading the gradients once (sum)", read.sum)],
        rounds=rounds,
        warmup=max(warmup, 1),  # the first step makes the state
        device=device,
    )
    sgd_state = state_bytes(optimizers[SGD_FUSED])
    columns: dict[str, dict[str, float | str]] = {}
    for name, optimizer in optimizers.items():
        held = state_bytes(optimizer)
        columns[name] = {"state bytes": held, "state / SGD": held / sgd_state}
        if name in PASSES:
            reads, writes = PASSES[name]
            moved = (reads + writes) * count * 4
            columns[name] |= {
                "reads + writes": f"{reads} + {writes}",
                "GB/s": moved / samples[name].median / 1e9,
            }
    columns["reading the gradients once (sum)"] = {
        "reads + writes": "1 + 0",
        "GB/s": count * 4 / samples["reading the gradients once (sum)"].median / 1e9,
    }
    return Comparison(
        f"optimizer step: {config_file}, {len(shapes)} tensors, {count / 1e6:.1f} M parameters, {device}",
        samples,
        [*RATIOS, *(Ratio(name, SGD_FUSED) for name in optimizers if name not in (SGD_FUSED, ZENITH_PLAIN))],
        columns,
        {
            "state of ZENITH beyond SGD's, bytes": state_bytes(optimizers[ZENITH_PLAIN]) - sgd_state,
            "of which 8 W": 8 * WINDOW,
            **({"left out": missing} if missing else {}),
        },
    )


def parameter_shapes(config_file: str, opts: Sequence[str] = ()) -> list[torch.Size]:
    """The shapes of the trainable parameters of the built-in engine's model, in the optimizer's order."""
    cfg = load_config(config_file, opts).cfg
    cfg.MODEL.DEVICE = "cpu"
    return [param.shape for param in build_model(cfg).parameters() if param.requires_grad]


def state_bytes(optimizer: Optimizer) -> int:
    """The bytes of all tensors that a checkpoint of ``optimizer`` would hold."""
    seen: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            seen[value.data_ptr() or id(value)] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)

    walk(optimizer.state_dict())
    return sum(seen.values())


def _parameters(shapes: Sequence[torch.Size], device: torch.device) -> list[Parameter]:
    params = [Parameter(torch.randn(shape, device=device) * 0.01) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


_Maker = Callable[[list[Parameter]], tuple[Optimizer, Callable[[], object]]]


def _makers(device: torch.device) -> dict[str, _Maker]:
    """Name -> a function from parameters to an optimizer and what one step with it is."""
    sgd: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}

    def plain(make: Callable[[list[Parameter]], Optimizer]) -> _Maker:
        def build(params: list[Parameter]) -> tuple[Optimizer, Callable[[], object]]:
            optimizer = make(params)
            if callable(getattr(optimizer, "train", None)):
                optimizer.train()  # Schedule-Free refuses to step before
            return optimizer, optimizer.step

        return build

    def clipped(params: list[Parameter]) -> tuple[Optimizer, Callable[[], object]]:
        optimizer = torch.optim.SGD(params, fused=True, **sgd)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
            optimizer.step()

        return optimizer, step

    return {
        SGD_FUSED: plain(lambda params: torch.optim.SGD(params, fused=True, **sgd)),
        ZENITH_PLAIN: plain(lambda params: ZENITH(params, window=WINDOW, **sgd)),
        "SGD, foreach": plain(lambda params: torch.optim.SGD(params, foreach=True, **sgd)),
        SGD_CLIPPED: clipped,
        ZENITH_CLIPPED: plain(lambda params: ZENITH(params, window=WINDOW, max_norm=MAX_NORM, **sgd)),
        ADAMW: plain(lambda params: torch.optim.AdamW(params, fused=True, **ADAMW_SETTINGS)),
        ZENITH_ADAMW: plain(lambda params: ZENITHAdamW(params, window=WINDOW, **ADAMW_SETTINGS)),
        "Schedule-Free SGD": plain(
            lambda params: importlib.import_module("schedulefree").SGDScheduleFree(
                params, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
            )
        ),
        "Prodigy": plain(lambda params: importlib.import_module("prodigyopt").Prodigy(params, lr=1.0)),
    }
