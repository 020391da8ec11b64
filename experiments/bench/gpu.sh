#!/usr/bin/env bash
# Correctness and speed on a GPU machine that has PyTorch 2.11 with CUDA and nothing else of ours.
#
#   experiments/bench/gpu.sh pack       on the machine that builds: fills .gpu/ (binary, parity cases, packed clips)
#   experiments/bench/gpu.sh verify     there: every parity case on CUDA, float32, then bfloat16; sampling with CUDA graphs
#   experiments/bench/gpu.sh train      there: the demo's two networks, on packed clips
#   experiments/bench/gpu.sh bench      there: `lvdm bench` at the paper's sizes, bfloat16 and float32
#   experiments/bench/gpu.sh evaluate   there: samples and their FVD and KVD
#
# .gpu/ travels with the checkout. LPIPS (59 MB) is needed by `train`, I3D (51 MB) by `evaluate` and by one case of
# `verify`: put them into .gpu/ (LVDM_WEIGHTS is set to it); without LPIPS `train` leaves that loss out and says so.
set -eu
cd "$(dirname "$0")/../.."
OUT=.gpu

if [ "$1" = pack ]; then
    mkdir -p $OUT/cases
    cargo build --release --locked --no-default-features --target-dir target/gpu
    cp target/gpu/release/lvdm $OUT/lvdm
    strip $OUT/lvdm
    # CUDA graphs and NCCL, where the headers were there to build them; they are looked for beside the binary
    for part in graph nccl; do
        newest=$(ls -t target/gpu/release/build/lvdm-*/out/liblvdm_$part.so 2>/dev/null | head -1)
        [ -z "$newest" ] || cp "$newest" $OUT/
    done
    cp tests/parity/*.safetensors $OUT/cases/
    for split in train test; do
        target/release/lvdm data pack --videos data/demo/$split --frames 24 --resolution 32 --out $OUT/$split.safetensors
    done
    du -sh $OUT
    exit
fi

torch=$(python3 -c 'import torch; print(torch.__path__[0])')
export LD_LIBRARY_PATH="$torch/lib:${LD_LIBRARY_PATH:-}" LVDM_WEIGHTS=$OUT
packed() { echo "{kind: packed, file: $OUT/$1.safetensors}"; }

case $1 in
verify)
    $OUT/lvdm doctor || true # weights may be missing
    $OUT/lvdm verify --device cuda --dtype f32 $OUT/cases/*.safetensors || true
    # the tiny networks of seven cases are beyond 2e-2 on the CPU too: README.md
    $OUT/lvdm verify --device cuda --dtype bf16 $OUT/cases/*.safetensors || true
    for dtype in f32 bf16; do
        LVDM_CUDA_GRAPHS=1 $OUT/lvdm verify --device cuda --dtype $dtype $OUT/cases/sample_*.safetensors || true
    done
    ;;
train)
    lpips=loss.perceptual_weight=0.05
    [ -e $OUT/vgg16.ckpt ] || { lpips=loss.perceptual_weight=0; echo "without LPIPS: .gpu/vgg16.ckpt is not there"; }
    time $OUT/lvdm train autoencoder experiments/demo/autoencoder.yaml trainer.device=cuda $lpips \
        "data.dataset=$(packed train)"
    time $OUT/lvdm train diffusion experiments/demo/diffusion.yaml trainer.device=cuda latents=null \
        "data.dataset=$(packed train)"
    time $OUT/lvdm train diffusion experiments/demo/diffusion.yaml trainer.device=cuda trainer.precision=bf16 \
        latents=null --run runs/demo/diffusion_bf16 "data.dataset=$(packed train)"
    ;;
bench)
    bench() { $OUT/lvdm bench experiments/bench/ucf101.yaml device=cuda loader=null "$@" --json; }
    # i3d is left out, and says so, where .gpu/ has no weights
    bench precision=bf16 autoencoder=null i3d=null unet.batch=16 unet.checkpoint=false 'unet.samplers=[]'
    for batch in 1 8; do
        bench precision=bf16 unet.batch=$batch unet.checkpoint=false i3d=null
        LVDM_CUDA_GRAPHS=1 bench precision=bf16 unet.batch=$batch unet.checkpoint=false i3d=null
    done
    bench precision=bf16 autoencoder=null 'unet.samplers=[]'
    bench precision=bf16 autoencoder=null i3d=null unet.network.recompute=true unet.checkpoint=false 'unet.samplers=[]'
    bench precision=f32 'unet.samplers=[]'
    bench precision=f32 tf32=true 'unet.samplers=[]' i3d=null
    ;;
evaluate)
    for run in diffusion diffusion_bf16; do
        time $OUT/lvdm evaluate experiments/demo/evaluate.yaml --device cuda generated.run=runs/demo/$run \
            out=runs/demo/evaluation_$run "real.dataset=$(packed test)" "train.dataset=$(packed train)"
    done
    ;;
esac
