#!/usr/bin/env bash
# What needs a GPU, on a machine that has one, Python with PyTorch 2.11 and CUDA 13, and nothing else of ours.
#
#   experiments/bench/gpu.sh pack       on the machine that builds: fills .gpu/ (about 27 MB), which travels with the checkout
#   experiments/bench/gpu.sh            there: everything, in at most nine minutes → .gpu/report.json, .gpu/report.md
#   experiments/bench/gpu.sh rehearse   anywhere, with tiny sizes and target/release/lvdm: do all parts work? No measurement.
#                                       SIMULATED_GPU=FOLDER puts a libtorch_cuda.so of that folder before LibTorch's
#
# gpu.py beside this has the parts, and how many seconds each of them is given. The files of weights/ (51 and 59 MB) travel too:
# without I3D there is no FVD; without VGG16 the autoencoder trains without LPIPS. The page says so.
set -eu
cd "$(dirname "$0")/../.."
OUT=.gpu
WEIGHTS=${LVDM_WEIGHTS:-weights}

# Videos of the demo, as tensors.
pack_clips() { # PROGRAM FOLDER TRAIN TEST
    "$1" data make-demo --out "$2/videos" --train "$3" --test "$4" --frames 16 --size 32
    for split in train test; do
        "$1" data pack --videos "$2/videos/$split" --frames 16 --resolution 32 --out "$2/$split.safetensors"
    done
    rm -r "$2/videos"
}

case ${1:-all} in
pack)
    rm -rf $OUT
    mkdir -p $OUT
    cargo build --release --locked --no-default-features --target-dir target/gpu
    cp target/gpu/release/lvdm $OUT/
    strip $OUT/lvdm
    # CUDA graphs and NCCL, where the headers were there to build them; they are looked for beside the program
    for part in graph nccl; do
        newest=$(ls -t target/gpu/release/build/lvdm-*/out/liblvdm_$part.so 2>/dev/null | head -1)
        [ -z "$newest" ] || cp "$newest" $OUT/
    done
    pack_clips target/release/lvdm $OUT 64 96
    du -sh $OUT
    ;;
all)
    exec python3 experiments/bench/gpu.py --program $OUT/lvdm --cases tests/parity --clips $OUT --weights "$WEIGHTS" --out $OUT
    ;;
rehearse)
    small=$(mktemp -d)
    trap 'rm -rf "$small"' EXIT
    mkdir "$small/cases"
    cp tests/parity/{unet3d_factorized,sample_ddim_eta1,schedule_lvdm}.safetensors "$small/cases/"
    pack_clips target/release/lvdm "$small" 8 8
    python3 experiments/bench/gpu.py --tiny --program target/release/lvdm --cases "$small/cases" --clips "$small" --weights "$WEIGHTS" --out $OUT/rehearsal
    ;;
*)
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
