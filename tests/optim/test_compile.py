"""torch.compile around the step: one graph, compiled once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from zenith_det.optim import ZENITH, ZENITHAdamW

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all of SGD, clipped": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "max_norm": 1.0},
    "momentum norm": {
        "momentum": 0.9,
        "norm_source": "momentum",
        "record_after": 2,
        "half_life": 50,
        "min_ratio": 0.1,
    },
    "AdamW": {"kind": ZENITHAdamW, "max_norm": 1.0},
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_step_has_no_graph_break_and_equals_the_eager_one(name: str, backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    compiled_model = copy.deepcopy(model)
    lrs = [torch.tensor(0.1) for _ in range(2)]
    options = dict(OPTIONS[name])
    kind = options.pop("kind", ZENITH)
    eager, compiled = (
        kind(m.parameters(), lr, window=4, **options) for m, lr in zip((model, compiled_model), lrs)
    )
    graphs: list[int] = []
    settled = 0

    def counting(gm: Any, inputs: Any) -> Any:
        graphs.append(1)
        return gm if backend == "eager" else torch._dynamo.backends.debugging.aot_eager(gm, inputs)

    step = torch.compile(compiled.step, backend=counting, fullgraph=True)  # a graph break raises
    for t in range(20):
        if t == 9:
            settled = len(graphs)
        for p, q in zip(model.parameters(), compiled_model.parameters()):
            p.grad = torch.randn_like(p) / (t + 1)
            if t == 7:
                p.grad.fill_(torch.nan)
            q.grad = p.grad.clone()
        for lr in lrs:
            lr.mul_(0.95)  # a scheduler
        eager.step()
        step()
    for p, q in zip(model.parameters(), compiled_model.parameters()):
        torch.testing.assert_close(p, q)
    assert compiled.zenith_state() == pytest.approx(eager.zenith_state(), rel=1e-6, nan_ok=True)
    assert compiled.effective_lrs() == pytest.approx(eager.effective_lrs())
    # Compiled anew when the momentum buffers exist and when the first NaN comes, not step by step.
    assert len(graphs) == settled <= 4
