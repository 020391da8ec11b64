#!/usr/bin/env bash
# What needs a GPU, on a machine that has one, Python with PyTorch 2.11 and CUDA 13, and nothing else of ours.
#
#   experiments/bench/gpu.sh pack       on the machine that builds: fills .gpu/ (at most 64 MiB), which travels with the checkout
#   experiments/bench/gpu.sh            there: everything, in at most nine minutes → .gpu/report.json, .gpu/report.md
#   experiments/bench/gpu.sh rehearse   anywhere, with tiny sizes and target/release/lvdm: do all parts work? No measurement.
#                                       SIMULATED_GPU=FOLDER puts a libtorch_cuda.so of that folder before LibTorch's
#
# gpu.py beside this has the parts, and how many seconds each of them is given. LPIPS (59 MB) does not fit into .gpu/; where
# .gpu/vgg16.ckpt is not there, the autoencoder trains without that loss, and the page says so.
set -eu
cd "$(dirname "$0")/../.."
OUT=.gpu

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
    mkdir -p $OUT/kit/cases
    cargo build --release --locked --no-default-features --target-dir target/gpu
    cp target/gpu/release/lvdm $OUT/kit/
    strip $OUT/kit/lvdm
    # CUDA graphs and NCCL, where the headers were there to build them; they are looked for beside the program
    for part in graph nccl; do
        newest=$(ls -t target/gpu/release/build/lvdm-*/out/liblvdm_$part.so 2>/dev/null | head -1)
        [ -z "$newest" ] || cp "$newest" $OUT/kit/
    done
    cp tests/parity/*.safetensors $OUT/kit/cases/
    pack_clips target/release/lvdm $OUT/kit 64 96
    tar -C $OUT -czf $OUT/kit.tar.gz kit
    rm -r $OUT/kit
    cp "${LVDM_WEIGHTS:-weights}/i3d-kinetics-400.ckpt" $OUT/
    size=$(du -sk $OUT | cut -f1)
    echo "$OUT: $size KiB"
    [ "$size" -le 65536 ] || { echo "that is more than 64 MiB" >&2; exit 1; }
    ;;
all)
    if [ -e $OUT/kit.tar.gz ] && [ ! -e $OUT/kit ]; then
        tar -C $OUT -xzf $OUT/kit.tar.gz
    fi
    exec python3 experiments/bench/gpu.py --program $OUT/kit/lvdm --kit $OUT/kit --weights $OUT --out $OUT
    ;;
rehearse)
    kit=$(mktemp -d)
    trap 'rm -rf "$kit"' EXIT
    mkdir "$kit/cases"
    cp tests/parity/{unet3d_factorized,sample_ddim_eta1,schedule_lvdm}.safetensors "$kit/cases/"
    pack_clips target/release/lvdm "$kit" 8 8
    python3 experiments/bench/gpu.py --tiny --program target/release/lvdm --kit "$kit" --weights "${LVDM_WEIGHTS:-weights}" --out $OUT/rehearsal
    ;;
*)
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
