"""``MODEL.CHANNELS_LAST`` and ``MODEL.COMPILE_BACKBONE``: the same training, the same checkpoints."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.conftest import SmallSet
from tests.engines.torchvision_engine.small_models import samples, small_config, square_targets
from tests.engines.torchvision_engine.test_precision import losses_of, trainer_for
from zenith_det.config import LoadedConfig
from zenith_det.engines import model_format
from zenith_det.engines.run import resume
from zenith_det.engines.torchvision_engine.rcnn import build_model
from zenith_det.errors import ConfigError
from zenith_det.training.course.starting import Start

KEYPOINTS = {"mask": 0, "keypoint": 17}


def assert_like(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("task", ["mask", "keypoint"])
def test_channels_last_changes_no_loss_and_no_gradient(task: str) -> None:
    results = []
    for wanted in (False, True):
        torch.manual_seed(0)
        model = build_model(small_config(task, MODEL__CHANNELS_LAST=wanted).cfg)
        seen: list[torch.Tensor] = []
        model.backbone.fpn.register_forward_hook(lambda _m, _i, out, to=seen: to.extend(out.values()))
        torch.manual_seed(1)
        targets = square_targets(KEYPOINTS[task])
        losses = model(samples(targets, targets))
        sum(losses.values()).backward()
        innermost = [x.is_contiguous(memory_format=torch.channels_last) for x in seen]
        assert all(innermost) == wanted
        results.append((losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (plain, plain_grads), (last, last_grads) = results
    assert {k: float(v) for k, v in last.items()} == pytest.approx(
        {k: float(v) for k, v in plain.items()}, rel=1e-4
    )
    for name, grad in plain_grads.items():
        torch.testing.assert_close(last_grads[name], grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["ZENITH", "ZENITHAdamW", "SGD", "AdamW"])
def test_a_checkpoint_goes_on_with_the_other_order(optimizer: str, shapes: SmallSet, tmp_path: Path) -> None:
    """Fused kernels want parameter and momentum in one order, and torch's do not check it on the CPU."""

    def trainer(**keys: Any) -> Any:
        return trainer_for(shapes, tmp_path / "run", SOLVER__OPTIMIZER=optimizer, **keys)

    first = trainer()
    losses_of(first, 2)
    path = first.checkpointer.save("model", first._state())

    def next_weights(**keys: Any) -> list[torch.Tensor]:
        resumed = trainer(**keys)
        start = Start.load(path)
        held = weakref.ref(next(iter(start.state["model"].values())))
        resume(resumed, start)
        assert held() is None  # the checkpoint's copy of the weights
        generator = torch.Generator().manual_seed(0)
        trained = [p for p in resumed.model.parameters() if p.requires_grad]
        for parameter in trained:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
            for value in resumed.optimizer.state[parameter].values():
                assert value.ndim == 0 or value.stride() == parameter.stride()
        resumed.optimizer.step()
        return trained

    for mine, theirs in zip(next_weights(MODEL__CHANNELS_LAST=True), next_weights(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_weights_saved_with_channels_last_load_into_any_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(small_config("mask", MODEL__CHANNELS_LAST=True).cfg)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    other = build_model(small_config("mask").cfg)
    other.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    for mine, theirs in zip(other.state_dict().values(), model.state_dict().values()):
        assert torch.equal(mine, theirs)
        assert mine.is_contiguous()


def test_a_compiled_backbone_trains_alike_and_saves_the_same_names(
    shapes: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The compiler's front, which sees what it must not change; what it makes of it takes a minute.
    monkeypatch.setattr(model_format, "BACKEND", "eager")
    plain = trainer_for(shapes, tmp_path / "plain")
    expected = losses_of(plain, 2)
    compiled = trainer_for(shapes, tmp_path / "compiled", MODEL__COMPILE_BACKBONE=True)
    assert compiled.model.backbone._compiled_call_impl is not None
    assert_like(losses_of(compiled, 2), expected)
    graphs = counters["stats"]["unique_graphs"]
    for height, width in ((64, 64), (64, 96), (96, 64)):
        compiled.model.backbone(torch.zeros(2, 3, height, width))
    assert counters["stats"]["unique_graphs"] == graphs, "images of another size compiled the backbone anew"
    assert list(compiled._state()["model"]) == list(plain._state()["model"])


def test_without_a_compiler_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no_such_compiler"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "no_such_compiler")))
    loaded: LoadedConfig = small_config("mask", MODEL__COMPILE_BACKBONE=True)
    model = build_model(loaded.cfg)
    with pytest.raises(
        ConfigError, match=r"torch.compile does not work here \(.+\): set it to False"
    ) as error:
        model_format.compile_backbone(loaded.cfg, model)
    assert "\n" not in str(error.value)


def test_a_model_without_backbone_is_refused() -> None:
    cfg = small_config("mask", MODEL__CHANNELS_LAST=True).cfg
    with pytest.raises(ConfigError, match=r"MODEL.CHANNELS_LAST is True, but Linear .* has no backbone"):
        model_format.use_channels_last(cfg, torch.nn.Linear(2, 2))
