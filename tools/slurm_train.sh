#!/usr/bin/env bash
# Train under SLURM on any number of machines; saved before a time limit or a pre-emption, queued again, resumed.
#
#   sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 tools/slurm_train.sh \
#       --config-file configs/mask_rcnn_zenith.yaml OUTPUT_DIR /shared/disk/run
#
# Arguments are tools/train_net.py's, without --num-gpus, --num-machines, --machine-rank, --dist-url and --resume.
# Submit from the root of the checkout. PYTHON: the environment's Python (default: .venv/bin/python, else python3).
#SBATCH --job-name=zenith_det
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGUSR1 to each step two minutes before the end of the time limit: it finishes its iteration and saves.
#SBATCH --signal=USR1@120
set -euo pipefail

python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
gpus=${SLURM_GPUS_ON_NODE:-0}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A port that follows from the job, so that two jobs on one machine don't meet.
url="tcp://$first:$((20000 + SLURM_JOB_ID % 20000))"

# The first time there is no checkpoint to resume from, and the run starts at 0.
code=0
srun --kill-on-bad-exit=1 bash -c '
    exec "$0" tools/train_net.py --num-gpus "$1" --num-machines "$SLURM_NNODES" --machine-rank "$SLURM_NODEID" \
        --dist-url "$2" --resume "${@:3}"
' "$python" "$gpus" "$url" "$@" || code=$?

if [ "$code" -eq 75 ]; then
    echo "stopped and saved: queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
