"""Train one image classifier with ZENITH or one of the baselines, in plain PyTorch.

python examples/classification/train.py                                      # digits, offline, a CPU
python examples/classification/train.py --data cifar10 --download --model resnet18 --epochs 30
python examples/classification/train.py --data folder:flowers --model mobilenet_v2 --optimizer sgd-cosine
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import images
import networks
import noise
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR
from torch.utils.data import DataLoader, Dataset

from zenith_det import cli
from zenith_det.errors import ConfigError, DatasetError, TrainingDivergedError
from zenith_det.optim import ZENITH, global_norm

MOMENTUM = 0.9
#: AdamW's weight decay acts apart from the gradient (Loshchilov and Hutter, arXiv 1711.05101) and is usually
#: chosen this much larger than an L2 penalty: 0.05 beside 5e-4.
ADAMW_DECAY = 100

Schedule = Callable[[torch.optim.Optimizer, int], LRScheduler]
SCHEDULES: dict[str, Schedule] = {
    # Detectron2's: a tenth after 2/3 and 8/9 of the training.
    "step": lambda optimizer, steps: MultiStepLR(optimizer, [steps * 2 // 3, steps * 8 // 9]),
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
}
#: Each with a usual LR for networks with batch normalization, which η₀ is searched around.
OPTIMIZERS = {
    "zenith": 0.3,  # the paper's form: no momentum, hence about ten times the LR
    "zenith-momentum": 0.03,
    "sgd-step": 0.03,
    "sgd-cosine": 0.03,
    "sgd-constant": 0.03,
    "adamw-cosine": 0.003,
}


@dataclass(frozen=True)
class Options:
    """One run; the flags have the same names."""

    data: str = "digits"
    data_dir: str = "output/data"
    download: bool = False
    size: int | None = None
    limit: int | None = None
    model: str = "resnet18"
    width: float = 1.0
    optimizer: str = "zenith"
    lr: float | None = None
    window: int = 100
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    dropout: float = 0.0
    batch_size: int = 32
    epochs: int = 12
    seed: int = 0
    noise_every: int = 0
    noise_batch_sizes: tuple[int, ...] = ()
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"--optimizer {self.optimizer}: there are {', '.join(OPTIMIZERS)}")
        if self.lr is None:
            object.__setattr__(self, "lr", OPTIMIZERS[self.optimizer])
        for name, least in (("window", 1), ("batch_size", 2), ("epochs", 1), ("limit", 2), ("size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{_flag(name)} {value}: must be at least {least}")
        if self.noise_every < 0 or any(size < 2 for size in self.noise_batch_sizes):
            raise ConfigError("--noise-every must be at least 0 and --noise-batch-sizes at least 2 each")
        for name, most in (("weight_decay", math.inf), ("label_smoothing", 1.0), ("dropout", 1.0)):
            if not 0 <= getattr(self, name) < most:
                raise ConfigError(f"{_flag(name)} {getattr(self, name):g}: must be in [0, {most:g})")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ConfigError(f"--lr {self.lr:g}: must be above 0")


def train(
    options: Options, splits: images.Splits | None = None, tell: Callable[[str], None] = print
) -> dict[str, Any]:
    """Trains and tests one network.

    Args:
        options: what and how.
        splits: the data, if it is loaded already.
        tell: gets a line an epoch.

    Returns:
        ``epochs``, a list of dicts (``validation_accuracy`` and ``validation_loss``, cross-entropy without
        label smoothing; ``train_loss``; ``lr``, ``ratio`` = lr / η₀ and ``grad_norm`` of the last step,
        ``mean_grad_norm`` of the epoch); ``test_accuracy`` and ``test_loss`` after the last epoch;
        ``seconds`` and ``cpu_seconds``; ``noise`` where it was asked for. JSON types only.

    Raises:
        TrainingDivergedError: the loss isn't finite any more.
        UserError: a dataset, network or option that can't be used.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    if splits is None:
        splits = images.load(options.data, options.data_dir, options.download, options.size, options.limit)
    if len(splits.train) < 2:  # type: ignore[arg-type]
        raise DatasetError(f"--data {options.data}: fewer than 2 images to train on")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ConfigError(f"--device {options.device}: {error}") from error
    torch.manual_seed(options.seed)  # weights and dropout
    model = networks.build(options.model, splits.classes, splits.size, options.width, options.dropout)
    model.to(options.device)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
    loader = make_loader(splits.train, options, shuffle=True)
    optimizer, scheduler = make_optimizer(model, options, steps=options.epochs * len(loader))
    zenith = isinstance(optimizer, ZENITH)

    probe_draw = torch.Generator().manual_seed(options.seed)
    epochs, probes, step = [], [], 0
    for epoch in range(1, options.epochs + 1):
        model.train()
        losses, norms = [], []
        for batch, labels in loader:
            if options.noise_every and step % options.noise_every == 0:
                for size in options.noise_batch_sizes or (options.batch_size,):
                    # More pairs of small batches: their sums are the noisier ones.
                    pairs = max(4, 512 // size)
                    probe = noise.noise_share(model, loss_fn, splits.train, size, probe_draw, pairs)
                    probes.append({"step": step, "batch_size": size, **probe})
            loss = loss_fn(model(batch.to(options.device)), labels.to(options.device))
            optimizer.zero_grad()
            loss.backward()
            # Kept on the device: reading them here would wait for it in every step. ZENITH has the norm anyway.
            losses.append(loss.detach())
            if not zenith:
                norms.append(global_norm(p.grad for p in model.parameters() if p.grad is not None))
            lr = optimizer.param_groups[0]["lr"]
            try:
                optimizer.step()
            except FloatingPointError as error:
                raise TrainingDivergedError(f"step {step}: {error}") from error
            if zenith:
                norms.append(optimizer.grad_norm)
            if scheduler is not None:
                scheduler.step()
            step += 1
        if zenith:
            lr = optimizer.effective_lrs()[0]
        accuracy, validation_loss = evaluate(model, splits.validation, options)
        if not math.isfinite(validation_loss):
            raise TrainingDivergedError(f"epoch {epoch}: the loss is not finite; a smaller --lr may help")
        epochs.append(
            {
                "epoch": epoch,
                "step": step,
                "train_loss": torch.stack(losses).mean().item(),
                "validation_accuracy": accuracy,
                "validation_loss": validation_loss,
                "lr": lr,
                "ratio": lr / options.lr,
                "grad_norm": norms[-1].item(),
                "mean_grad_norm": torch.stack(norms).mean().item(),
            }
        )
        tell(
            f"epoch {epoch:3d}  train loss {epochs[-1]['train_loss']:.4f}  "
            f"validation {accuracy:6.2%}, loss {validation_loss:.4f}  lr {lr:.3g} (ratio {lr / options.lr:.3f})"
        )
    test_accuracy, test_loss = evaluate(model, splits.test, options)
    result = {
        "epochs": epochs,
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }
    return {**result, "noise": probes} if probes else result


def make_loader(dataset: Dataset[Any], options: Options, shuffle: bool) -> DataLoader[Any]:
    """Batches; in training all of one size, in an order that the seed alone decides."""
    return DataLoader(
        dataset,
        batch_size=options.batch_size if shuffle else 512,
        shuffle=shuffle,
        drop_last=shuffle and len(dataset) > options.batch_size,  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(options.seed),
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        pin_memory=options.device.startswith("cuda"),
    )


def make_optimizer(
    model: nn.Module, options: Options, steps: int
) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
    """The optimizer, and the schedule that it needs if it needs one: ZENITH does not, nor ``steps``."""
    assert options.lr is not None
    kind, _, schedule = options.optimizer.partition("-")
    parameters = model.parameters()
    if kind == "zenith":
        momentum = MOMENTUM if schedule == "momentum" else 0.0
        zenith = ZENITH(
            parameters,
            options.lr,
            momentum=momentum,
            weight_decay=options.weight_decay,
            window=options.window,
        )
        return zenith, None
    if kind == "adamw":
        decay = ADAMW_DECAY * options.weight_decay
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, options.lr, weight_decay=decay)
    else:
        decay = options.weight_decay
        optimizer = torch.optim.SGD(parameters, options.lr, MOMENTUM, weight_decay=decay, fused=True)
    make = SCHEDULES.get(schedule)
    return optimizer, make(optimizer, steps) if make is not None else None


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset[Any], options: Options) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross-entropy (nats), without dropout, augmentation and smoothing."""
    model.eval()
    right, loss, seen = 0, 0.0, 0
    for batch, labels in make_loader(dataset, options, shuffle=False):
        logits: Tensor = model(batch.to(options.device)).float()
        labels = labels.to(options.device)
        right += int((logits.argmax(dim=1) == labels).sum())
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        seen += len(labels)
    return right / seen, loss / seen


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that a single run and a comparison share."""
    defaults = Options()
    add = parser.add_argument
    add("--data", default=defaults.data, metavar="NAME", help=f"{', '.join(images.NAMES)} (default: digits)")
    add("--data-dir", default=defaults.data_dir, metavar="DIR", help="where MNIST and CIFAR are kept")
    add("--download", action="store_true", help="let torchvision fetch MNIST or CIFAR")
    add("--size", type=int, metavar="PIXELS", help="of the images; default the dataset's own")
    add("--limit", type=int, metavar="N", help="only the first N training images")
    add("--width", type=float, default=1.0, metavar="1/N", help="an N-th of the channels in every layer")
    add("--window", type=int, default=defaults.window, metavar="W", help="ZENITH's, in steps")
    add("--batch-size", type=int, default=defaults.batch_size, metavar="B")
    add("--epochs", type=int, default=defaults.epochs, metavar="N")
    add("--device", default=defaults.device, help="cpu, cuda …")
    add("--workers", type=int, default=0, metavar="N", help="processes that load images")


def common(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_data_arguments` and others read, as arguments of :class:`Options`."""
    fields = {field.name for field in dataclasses.fields(Options)}
    found = {name: value for name, value in vars(args).items() if name in fields}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def main(argv: list[str] | None = None) -> int:
    """One run, told epoch by epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    parser.add_argument("--model", default="resnet18", metavar="NAME", help="of torchvision.models")
    parser.add_argument("--optimizer", default="zenith", metavar="NAME", help=", ".join(OPTIMIZERS))
    parser.add_argument("--lr", type=float, help="η₀; default the optimizer's usual one")
    parser.add_argument(
        "--weight-decay", type=float, default=0.0, metavar="L", help="AdamW's is 100 times it"
    )
    parser.add_argument("--label-smoothing", type=float, default=0.0, metavar="E")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--noise-every", type=int, default=0, metavar="N", help="every N steps, tell the norm's noise share"
    )
    parser.add_argument(
        "--noise-batch-sizes", type=int, nargs="+", default=[], metavar="B", help="of batches of these sizes"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write everything measured, as JSON")
    args = parser.parse_args(argv)
    result = train(Options(**common(args)))
    for probe in result.get("noise", []):
        print(
            f"step {probe['step']:5d}, batch {probe['batch_size']:4d}: |G|² {probe['signal']:.4g}, "
            f"noise {probe['noise']:.4g}: {probe['share']:.1%} of the squared norm "
            f"({probe['share_epoch']:.1%} drawn without replacement)"
        )
    print(f"test {result['test_accuracy']:.2%}, loss {result['test_loss']:.4f}, {result['seconds']:.0f} s")
    if args.output is not None:
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1))
        except OSError as error:
            raise ConfigError(f"--output {args.output}: {error.strerror}") from error
    return 0


if __name__ == "__main__":
    cli.run(main)
