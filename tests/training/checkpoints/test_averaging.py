"""Averaged weights: what they are, and that the model gets its own back."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from zenith_det.errors import CheckpointError
from zenith_det.training.checkpoints.averaging import WeightAverage


def model(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    net[2].bias.requires_grad_(False)
    return net


def walk(net: nn.Module, steps: int, average: WeightAverage | None) -> list[torch.Tensor]:
    """Random steps; the first layer's weights after each."""
    seen = []
    for _ in range(steps):
        net(torch.randn(16, 4))  # moves the statistics of the norm layer
        with torch.no_grad():
            net[0].weight.add_(torch.randn_like(net[0].weight))
        if average is not None:
            average.update()
        seen.append(net[0].weight.detach().clone())
    return seen


def averaged(average: WeightAverage) -> dict[str, torch.Tensor]:
    with average.applied():
        return {name: tensor.clone() for name, tensor in average.model.state_dict().items()}


def test_the_whole_tail_is_torchs_equal_average() -> None:
    net = model()
    average = WeightAverage(net, "tail", tail=1.0)
    theirs = torch.optim.swa_utils.AveragedModel(net)
    for _ in range(30):
        walk(net, 1, average)
        theirs.update_parameters(net)
    torch.testing.assert_close(averaged(average)["0.weight"], theirs.module[0].weight)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_tail_is_as_old_as_the_plain_average_over_its_share(share: float) -> None:
    steps = 2000
    net = nn.Linear(1, 1, bias=False).double()
    average = WeightAverage(net, "tail", tail=share)
    for step in range(1, steps + 1):
        nn.init.constant_(net.weight, step)
        average.update()
    plain = sum(range(round(steps * (1 - share)) + 1, steps + 1)) / (steps * share)
    assert averaged(average)["weight"].item() == pytest.approx(plain, rel=0.002)


def test_exponential_average() -> None:
    net = model()
    average = WeightAverage(net, "ema", decay=0.7)
    expected = net[0].weight.detach().clone()
    for t, weight in enumerate(walk(net, 25, average), start=1):
        decay = min(0.7, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(averaged(average)["0.weight"], expected)


def test_the_norm_layers_statistics_belong_to_the_averaged_weights() -> None:
    """In a stationary walk they come near those of a pass over data with the averaged weights."""
    net = model()
    average = WeightAverage(net, "ema", decay=0.95)
    start = net[0].weight.detach().clone()
    for _ in range(300):
        with torch.no_grad():
            net[0].weight.copy_(start + 0.05 * torch.randn_like(start))
        net(torch.randn(256, 4) + 1.0)
        average.update()
    state = averaged(average)
    outputs = (torch.randn(20_000, 4) + 1.0) @ state["0.weight"].T + state["0.bias"]
    torch.testing.assert_close(state["1.running_mean"], outputs.mean(0), rtol=0.05, atol=0.02)
    torch.testing.assert_close(state["1.running_var"], outputs.var(0), rtol=0.1, atol=0.02)
    assert state["1.num_batches_tracked"] == net[1].num_batches_tracked


def test_the_model_gets_its_weights_back_even_after_an_error() -> None:
    net = model()
    average = WeightAverage(net, "ema")
    walk(net, 5, average)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in net.parameters()]

    def evaluate() -> None:
        with average.applied():
            assert not torch.equal(net[0].weight, before["0.weight"])
            raise RuntimeError("an evaluation that fails")

    with pytest.raises(RuntimeError, match="fails"):
        evaluate()
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [parameter.data_ptr() for parameter in net.parameters()] == addresses


@pytest.mark.parametrize("kind", ["ema", "tail"])
def test_going_on_is_as_if_never_interrupted(kind: str) -> None:
    whole_net = model()
    whole = WeightAverage(whole_net, kind)
    walk(whole_net, 20, whole)

    net = model()
    average = WeightAverage(net, kind)
    walk(net, 8, average)
    checkpoint: dict[str, Any] = {"model": net.state_dict(), "average": average.state_dict()}
    random_state = torch.get_rng_state()
    other = model()
    other.load_state_dict(checkpoint["model"])
    resumed = WeightAverage(other, kind)
    resumed.resume(checkpoint, "model_0000007.pth")
    torch.set_rng_state(random_state)
    walk(other, 12, resumed)
    for name, tensor in averaged(whole).items():
        assert torch.equal(tensor, averaged(resumed)[name]), name


def test_weights_under_two_names_are_saved_averaged_under_both() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    average = WeightAverage(net, "tail", tail=1.0)
    for _ in range(3):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(1.0)
        average.update()
    saved = copy.deepcopy(average.checkpoint({})["model"])
    assert torch.equal(saved["1.weight"], saved["0.weight"])
    assert not torch.equal(saved["1.weight"], net[1].weight)
    with average.applied():
        assert torch.equal(saved["1.weight"], net[1].weight)


def test_a_checkpoint_without_an_average_is_said(caplog: pytest.LogCaptureFixture) -> None:
    net = model()
    average = WeightAverage(net, "ema")
    with caplog.at_level(logging.WARNING):
        average.resume({"model": net.state_dict()}, "model_0000007.pth")
    assert "model_0000007.pth holds no averaged weights" in caplog.text


def test_another_models_average_is_refused() -> None:
    average = WeightAverage(model(), "ema")
    state = WeightAverage(model(width=16), "ema").state_dict()
    with pytest.raises(CheckpointError, match=r"model_final.pth: the averaged 0\.weight has shape \[16, 4\]"):
        average.resume({"average": state}, "model_final.pth")
