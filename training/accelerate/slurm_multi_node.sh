#!/bin/bash
# Pretraining over several machines of a SLURM cluster: sbatch slurm_multi_node.sh CORPUS OUTPUT [options]
#
# Two minutes before its time is up (or when it is preempted) the processes get SIGTERM, save a checkpoint within the
# 30 seconds that the launcher gives them, and the job is queued again; it goes on from there with the same losses.
#SBATCH --job-name=scbert-pretrain
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

corpus=$1 output=$2
shift 2
gpus_per_node=${SLURM_GPUS_ON_NODE:-8}
main_address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
config=$(python -c 'from importlib.resources import files; print(files("scbert.training") / "accelerate" / "ddp.yaml")')

resume=()
if [[ -d $output.partial ]]; then resume=(--resume True); fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
status=0
# one launcher a machine; SLURM_PROCID is only known inside srun
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
    --config_file "$0" --num_machines "$SLURM_NNODES" --num_processes "$1" --machine_rank "$SLURM_PROCID" \
    --main_process_ip "$2" --main_process_port 29500 --rdzv_backend c10d --max_restarts 0 \
    -m scbert.training.run_pretrain "${@:3}"' \
    "$config" $((SLURM_NNODES * gpus_per_node)) "$main_address" \
    --corpus "$corpus" --output "$output" --streaming True --bf16 True --dataloader_num_workers 6 \
    --save_strategy steps --save_steps 500 "${resume[@]}" "$@" &
launcher=$! stopping=
# to all processes of all machines
trap 'stopping=1; scancel --signal=TERM --quiet "$SLURM_JOB_ID"' TERM
# the trap ends a wait before its time
while kill -0 "$launcher" 2>/dev/null; do status=0; wait "$launcher" || status=$?; done
if [[ $stopping && ! -d $output ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
