"""``python -m pytest -p tests.gpu_without_gpu.plugin -m gpu``: tests marked ``gpu`` on the pretended device."""

import pytest

from tests.gpu_without_gpu import pretended

pretended.install()

#: Names of tests that need a real device, and why.
REAL = {
    "test_cuda_nonfinite_steps_raise_a_few_steps_late": "counters are read of plain tensors alone, and these are "
    "a subclass",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name in REAL:
            item.add_marker(pytest.mark.skip(reason=f"needs a real device: {REAL[item.name]}"))
