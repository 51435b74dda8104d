#!/bin/bash
#SBATCH --job-name=train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --output=%x-%j.log
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
export SHARDTENSOR_MESH=data=4,domain=8
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
# a rank that fails ends the step
srun --kill-on-bad-exit=1 --label python train.py
