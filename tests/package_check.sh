#!/usr/bin/env bash
# Tries a built wheel by itself: package_check.sh PYTHON ENVIRONMENT WHEEL
# Makes ENVIRONMENT anew with PYTHON, installs WHEEL into it, and from an empty folder checks the requirements, imports
# and runs what a user would: the console script, a training of 20 iterations, the optimizer's tests. ENVIRONMENT, 6 GB
# that the next check would make anew anyway, goes at the end.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
python="$1"
environment="$(mkdir -p "$(dirname "$2")" && cd "$(dirname "$2")" && pwd)/$(basename "$2")"
wheel="$(cd "$(dirname "$3")" && pwd)/$(basename "$3")"
folder="$(mktemp -d)"
trap 'rm -rf "$folder" "$environment"' EXIT

rm -rf "$environment"
"$python" -m venv "$environment"
bin="$environment/bin"
"$bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$wheel[opencv]"
"$bin/python" -m pip check
cd "$folder"
"$bin/zenith-det" --help > help.txt
"$bin/python" - <<'EOF'
import importlib, pkgutil
import zenith_det

# Whatever needs Detectron2 says so when it is used.
for module in pkgutil.walk_packages(zenith_det.__path__, "zenith_det."):
    if not module.name.startswith(("zenith_det.engines.detectron2_engine", "zenith_det.lazy")) and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
EOF
"$bin/python" "$root/datasets/make_shapes.py" --output shapes --train 24 --val 8 --size 96
OMP_NUM_THREADS=2 "$bin/zenith-det" train --engine torchvision --config-file quickstart/mask_rcnn_zenith.yaml --num-gpus 0 \
    --train-json shapes/annotations/instances_train.json --train-images shapes/train \
    --val-json shapes/annotations/instances_val.json --val-images shapes/val \
    SOLVER.MAX_ITER 20 SOLVER.WARMUP_ITERS 5 SOLVER.ZENITH.WINDOW 5 SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0 OUTPUT_DIR run > run.txt
test -s run/model_final.pth
test -s run/predictions.png
"$bin/python" -m pip install --quiet --disable-pip-version-check pytest pytest-timeout pytest-xdist hypothesis expecttest
# The installed package, not the checkout's.
cp -r "$root/tests" "$root/pyproject.toml" .
OMP_NUM_THREADS=1 "$bin/python" -m pytest -q -p no:cacheprovider -n auto --dist loadfile tests/optim
echo "package check: $("$bin/python" --version), $(basename "$wheel"), all well"
