#!/bin/bash
# Trains on several machines, the same command on each. torchrun is PyTorch's; it only starts the processes.
#
#     MASTER_ADDR=node0 NODES=4 NODE=0 experiments/cluster/torchrun.sh diffusion experiments/ucf101/diffusion.yaml
#
# NODE is this machine's number, from 0, and MASTER_ADDR the name of machine 0. The ` -- ` keeps torchrun from reading
# lvdm's options as its own: without it `--run FOLDER` is refused as ambiguous.
exec torchrun --no-python --nproc-per-node "${GPUS:-8}" --nnodes "${NODES:-1}" --node-rank "${NODE:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" --max-restarts "${RESTARTS:-3}" \
    -- "${LVDM:-target/release/lvdm}" train "$@"
