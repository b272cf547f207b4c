"""``python -m pytest -p tests.gpu_without_gpu.plugin -m gpu``: tests marked ``gpu`` on the pretended device."""

from tests.gpu_without_gpu import pretended

pretended.install()
