#!/bin/sh
# FVD and KVD of the demo's samples by sampler and number of network calls; after `make demo`.
#
#   experiments/bench/solvers.sh [setting=value …]     the settings replace those of experiments/demo/evaluate.yaml
set -eu
cd "$(dirname "$0")/../.."

for steps in 5 10 20 50; do
    for sampler in "ddim, eta: 0.0" "ddim, eta: 1.0" dpm_solver unipc; do
        printf '%-16s%3s steps  ' "$sampler" $steps
        target/release/lvdm evaluate experiments/demo/evaluate.yaml out=runs/demo/solvers \
            "generated.sampler={kind: $sampler, steps: $steps}" "$@" 2>runs/demo/solvers.log | grep '^samples  '
    done
done
