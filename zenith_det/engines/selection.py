"""Which engine a command trains with, and why.

Nothing heavy is imported with this module: Detectron2 and torchvision are imported only while an
engine that needs them is being looked at.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from dataclasses import dataclass

from zenith_det.errors import ConfigError

ENGINES = ("auto", "detectron2", "torchvision")

DETECTRON2_INSTALL_PAGE = "https://detectron2.readthedocs.io/tutorials/install.html"
DETECTRON2_INSTALL_COMMAND = (
    'pip install "setuptools<81" wheel && '
    "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2.git"
)

_HOW_TO_INSTALL = f"to install it: {DETECTRON2_INSTALL_COMMAND} (see {DETECTRON2_INSTALL_PAGE})"


@dataclass(frozen=True)
class EngineChoice:
    """The engine a command runs on: ``name`` is "detectron2" or "torchvision", ``reason`` one line."""

    name: str
    reason: str


@dataclass(frozen=True)
class EngineStatus:
    """Whether an engine's library can be used here.

    ``problem`` is "" where ``usable``, else one line that says what is wrong and what to do.
    ``version`` and ``location`` are "" where they cannot be known.
    """

    name: str
    usable: bool
    problem: str = ""
    version: str = ""
    location: str = ""


def select_engine(name: str = "auto") -> EngineChoice:
    """The engine for the command-line value ``name``: one of "auto", "detectron2" and "torchvision".

    "auto" takes Detectron2 where it imports, else the built-in torchvision engine. Detectron2 is
    imported only for "auto" and "detectron2".

    Raises:
        ConfigError: an unknown name, or an engine that cannot be used here; the line says why.
    """
    if name not in ENGINES:
        raise ConfigError(f"--engine {name}: no such engine, take one of {', '.join(ENGINES)}")
    if name == "torchvision":
        status = probe_torchvision()
        if not status.usable:
            raise ConfigError(f"--engine torchvision: {status.problem}")
        return EngineChoice("torchvision", "asked for")
    status = probe_detectron2()
    if name == "detectron2":
        if not status.usable:
            raise ConfigError(f"--engine detectron2: {status.problem}")
        return EngineChoice("detectron2", f"asked for; detectron2 {status.version} in {status.location}")
    if status.usable:
        return EngineChoice("detectron2", f"detectron2 {status.version} imports from {status.location}")
    built_in = probe_torchvision()
    if not built_in.usable:
        raise ConfigError(f"no engine can be used: {status.problem}; {built_in.problem}")
    return EngineChoice("torchvision", status.problem)


def probe_detectron2() -> EngineStatus:
    """Try to import Detectron2 and its compiled part; never raises for a broken installation."""
    spec = importlib.util.find_spec("detectron2")
    if spec is None:
        return EngineStatus("detectron2", False, f"detectron2 is not installed; {_HOW_TO_INSTALL}")
    if spec.origin is None:
        # Python takes any folder of that name, such as the root of a checkout, for a package.
        folder = next(iter(spec.submodule_search_locations or []), "detectron2")
        return EngineStatus(
            "detectron2",
            False,
            f"detectron2 is not installed: the folder {folder} has its name but is no package; "
            f"run from another folder, or {_HOW_TO_INSTALL}",
        )
    version = _version("detectron2")
    location = spec.origin.removesuffix("/__init__.py")
    # detectron2._C holds the compiled operators: it is what breaks when torch changes underneath.
    problem = import_problem("torch", "detectron2", "detectron2._C", "detectron2.engine")
    if problem:
        problem = (
            f"detectron2 {version} in {location} cannot be imported ({problem}); "
            f"it must be built with the torch it runs with: {DETECTRON2_INSTALL_PAGE}"
        )
    return EngineStatus("detectron2", not problem, problem, version, location)


def probe_model_zoo() -> EngineStatus:
    """Whether ``detectron2.model_zoo``, which gives the zoo's config files by name, can be imported.

    It imports ``pkg_resources``, which setuptools announced to drop from version 81 on and which
    today's releases no longer have. Training with a config file of one's own does not need it.
    """
    problem = import_problem("detectron2.model_zoo")
    if "pkg_resources" in problem:
        problem = (
            f"detectron2.model_zoo cannot be imported ({problem}; setuptools {_version('setuptools')}); "
            'to fix it: pip install "setuptools<81"'
        )
    elif problem:
        problem = f"detectron2.model_zoo cannot be imported ({problem})"
    return EngineStatus("detectron2.model_zoo", not problem, problem)


def detectron2_build() -> tuple[str, str]:
    """What an importable Detectron2 was compiled with, and what is wrong with that here ("" if nothing)."""
    import detectron2._C as compiled
    import torch

    compiler = compiled.get_compiler_version()
    if compiled.has_cuda():
        return f"{compiler}, {compiled.get_cuda_version()}", ""  # "CUDA 13.0"
    problem = ""
    if torch.cuda.is_available():
        problem = (
            "detectron2 was built without CUDA but torch sees a GPU: models with deformable convolutions or "
            "rotated boxes fail on it; build it again where nvcc is found, with FORCE_CUDA=1"
        )
    return f"{compiler}, for the CPU only", problem


def probe_torchvision() -> EngineStatus:
    """Try to import torchvision with its detection operators; never raises for a broken installation."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return EngineStatus(
            "torchvision", False, "torchvision is not installed; to install it: pip install torchvision"
        )
    version = _version("torchvision")
    location = spec.origin.removesuffix("/__init__.py")
    problem = import_problem("torchvision", "torchvision.ops")
    if problem:
        problem = (
            f"torchvision {version} in {location} cannot be imported ({problem}); "
            "torch and torchvision must be a matching pair: pip install --force-reinstall torch torchvision"
        )
    return EngineStatus("torchvision", not problem, problem, version, location)


def import_problem(*modules: str) -> str:
    """Import ``modules`` in turn; "" if all went well, else the first error as one line."""
    with warnings.catch_warnings():
        # What these libraries warn of while they are imported (pkg_resources, torch.jit) is about
        # their own code: whoever runs a training cannot act on it.
        warnings.simplefilter("ignore")
        for module in modules:
            try:
                importlib.import_module(module)
            # A library built for another torch raises anything from OSError to RuntimeError.
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                return f"{type(error).__name__}: {lines[0].strip()}"
    return ""


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
