"""Packaging of zenith_det: ``pip install -e ".[test]"`` brings everything but Detectron2."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "zenith_det" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

# Headless: the same cv2, without the X libraries that plain opencv-python wants at import.
OPENCV = "opencv-python-headless>=4.8"

OPTIMIZERS = [
    "schedulefree>=1.4",  # AdamWScheduleFree and SGDScheduleFree with train()/eval() since 1.3
    "prodigyopt>=1.1",  # first with the fix for parameters without gradients
    "pytorch-optimizer>=3.3",  # DAdaptSGD
]

# The machines that atheris has wheels for; building it takes clang's libFuzzer.
FUZZ = [
    "atheris>=3; sys_platform == 'linux' and platform_machine == 'x86_64' "
    "and python_version >= '3.11' and python_version < '3.14'"
]

# What `make lint` checks with, and `make package-check` builds with. Pinned: a new release of a checker, or of somebody
# else's stubs, is taken when it is wanted and not when it comes out.
DEVELOPMENT = ["ruff==0.17.6", "mypy==2.4.1", "types-PyYAML==6.0.12.20261122", "build==1.3.0"]

# The documentation as a site (`make docs`). ProperDocs carries on MkDocs 1, which has had no release since 2024.
DOCUMENTATION = ["properdocs>=1.6.7", "properdocs-theme-readthedocs>=1.6.5"]

# zenith-det export; whoever runs the file needs onnxruntime alone.
ONNX = ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20"]

# Its digits are real images that need no network (examples/classification).
CLASSIFICATION = ["scikit-learn>=1.2"]


class BuildWithConfigs(build_py):
    """Puts ``configs/`` into the built package, as ``zenith_det/configs``; an editable one finds the checkout's."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for file in self._configs():
                self.mkpath(str(Path(self.build_lib, "zenith_det", file).parent))
                self.copy_file(str(file), str(Path(self.build_lib, "zenith_det", file)))

    def get_source_files(self):
        return [*super().get_source_files(), *map(str, self._configs())]

    @staticmethod
    def _configs():
        return sorted(file.relative_to(HERE) for file in (HERE / "configs").rglob("*.yaml"))


setup(
    name="zenith_det",
    version=VERSION,
    description="Train Faster, Mask and Keypoint R-CNN without guessing a learning-rate schedule (ZENITH)",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["zenith_det", "zenith_det.*"]),
    package_data={"zenith_det": ["py.typed", "report/templates/*"]},
    cmdclass={"build_py": BuildWithConfigs},
    python_requires=">=3.10",
    entry_points={"console_scripts": ["zenith-det = zenith_det.commands:main"]},
    install_requires=[
        # Each torchvision goes with one torch (0.29.2 with 2.15.0): no upper bounds, the index pairs them.
        "torch>=2.6",  # weights_only by default, named parameters in optimizers, torch.nn.utils.get_total_norm
        "torchvision>=0.21",  # the one for torch 2.6
        "numpy>=1.25",
        "pillow>=9.1",  # Image.Resampling
        "fvcore>=0.1.5",  # yacs configs with _BASE_, parameter schedulers, registries
        "pycocotools>=2.0.7",  # the first with wheels for Python 3.12
        "orjson>=3.9",  # reads annotation files three times as fast as json does
        "faster-coco-eval>=1.6",  # compiled COCO metrics
        "matplotlib>=3.7",
        "jinja2>=3.1",  # pages; torch has it, too
        "markupsafe>=2.0",  # Jinja2's own
        "tensorboard>=2.12",
        "rich>=13",
        "psutil>=5.9",
        "pyyaml>=6",
        "typing_extensions>=4.10",  # torch's own bound
    ],
    extras_require={
        # Not required: it would overwrite the cv2 of an opencv-python that is there, and its windows.
        "opencv": [OPENCV],
        "optimizers": OPTIMIZERS,
        "fuzz": FUZZ,
        "onnx": ONNX,
        "supervision": ["supervision>=0.21"],  # Prediction.to_supervision
        "wandb": ["wandb>=0.16"],
        "mlflow": ["mlflow>=2.10"],
        "classification": CLASSIFICATION,
        "dev": DEVELOPMENT,
        "docs": DOCUMENTATION,
        "test": [
            OPENCV,
            *OPTIMIZERS,
            *FUZZ,
            *CLASSIFICATION,
            *ONNX,
            *DOCUMENTATION,
            "markdown>=3.6",  # the links of the documents
            "expecttest>=0.2",  # torch's own tables of optimizer inputs import it
            "pytest>=8",
            "pytest-timeout>=2.2",
            "pytest-xdist>=3.8",  # --no-loadscope-reorder
            "hypothesis>=6.100",
            "setuptools>=70.1",  # the first that makes a wheel by itself (tests/test_wheel.py)
        ],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
