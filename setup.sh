#!/bin/sh
# Installs what building and testing need and the machine lacks; `make setup` calls it.
#
#   apt packages    compilers, FFmpeg, OpenCV, and for four tests a browser, qemu, `ip` and the command ffmpeg
#   .libtorch/      LibTorch, unless LIBTORCH names one: the CUDA set beside an NVIDIA GPU, else the CPU set. On a login
#                   node, which has no GPU itself, `CUDA=1 make setup` takes the CUDA set
#   .python/        TensorBoard's reader, safetensors, CLIP's vocabulary and what torchrun imports, for four tests
#
# What is there already is left alone, so a second call only looks.
set -eu
cd "$(dirname "$0")"

export PIP_ROOT_USER_ACTION=ignore
TORCH=2.11.0
PACKAGES="g++ pkg-config clang libclang-dev libavutil-dev libavcodec-dev libavformat-dev libavfilter-dev
    libavdevice-dev libswscale-dev libswresample-dev libopencv-dev iproute2"
BROWSER=chromium-headless-shell

say() { echo "setup: $*"; }
fail() {
    echo "setup: $*" >&2
    exit 1
}

# Packages of the arguments that dpkg does not know as installed.
missing() {
    for package in "$@"; do
        dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || printf '%s ' "$package"
    done
}

# One that tests/common/browser.rs knows.
has_browser() {
    for browser in ${LVDM_BROWSER:-chromium-headless-shell chromium chromium-browser google-chrome google-chrome-stable}; do
        command -v "$browser" >/dev/null && return
    done
    return 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif [ -t 0 ]; then
        sudo "$@"
    else
        sudo -n "$@" # nobody is there to type a password
    fi
}

system_packages() {
    needed=$PACKAGES
    python3 -m pip --version >/dev/null 2>&1 || needed="$needed python3-pip"
    if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
        for tool in g++ clang pkg-config python3; do
            command -v $tool >/dev/null || fail "no apt here; install by hand what these Debian packages hold:" $needed
        done
        pkg-config --exists libavcodec libavformat libavfilter libavdevice libswscale libswresample opencv4 ||
            fail "no apt here; install by hand what these Debian packages hold:" $needed
        return
    fi
    has_browser || needed="$needed $BROWSER"
    command -v qemu-x86_64 >/dev/null || needed="$needed qemu-user" # tests/processors.rs
    command -v ffmpeg >/dev/null || needed="$needed ffmpeg" # tests/video_files.rs
    needed=$(missing $needed)
    [ -n "$needed" ] || return 0
    by_hand="install by hand, as root: apt-get install --no-install-recommends $needed"
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null || fail "neither root nor sudo; $by_hand"
    say "apt packages: $needed"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q update || fail "apt-get update failed; $by_hand"
    # Ubuntu has browsers as snaps only
    case "$needed" in *"$BROWSER"*)
        if ! apt-cache show "$BROWSER" >/dev/null 2>&1; then
            say "apt has no $BROWSER here; for tests/report.rs install Chromium or Chrome by hand, or set LVDM_BROWSER to one"
            needed=$(missing $(echo "$needed" | sed "s/$BROWSER//"))
            [ -n "$needed" ] || return 0
        fi ;;
    esac
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $needed ||
        fail "apt-get failed; $by_hand"
}

has_gpu() { [ -e /dev/nvidia0 ] || nvidia-smi >/dev/null 2>&1; }

# CUDA=1 prepares for a GPU that another machine has, as on the login node of a cluster.
case "${CUDA:-}" in
"" | 1) ;;
*) fail "CUDA is set to $CUDA; CUDA=1 installs LibTorch with CUDA on a machine without a GPU, and without it the machine decides" ;;
esac
wants_cuda() { [ "${CUDA:-}" = 1 ] || has_gpu; }

# Wheels for one fixed Python (the libraries in them are the same for all), whatever runs here.
pip_libtorch() {
    platforms="--platform manylinux2014_x86_64 --platform linux_x86_64"
    for minor in $(seq 5 28); do
        platforms="$platforms --platform manylinux_2_${minor}_x86_64"
    done
    python3 -m pip install --quiet --disable-pip-version-check --no-compile --target .libtorch.partial \
        --only-binary=:all: --implementation cp --python-version 3.11 --abi cp311 --abi abi3 --abi none $platforms "$@"
}

libtorch() {
    if [ -n "${LIBTORCH:-}" ]; then
        [ -e "$LIBTORCH/lib/libtorch_cpu.so" ] ||
            fail "LIBTORCH is set to $LIBTORCH, where there is no lib/libtorch_cpu.so; correct it, or unset it to have LibTorch $TORCH downloaded"
        [ "${CUDA:-}" != 1 ] || [ -d "$LIBTORCH/../nvidia/cudnn" ] || ls "$LIBTORCH"/lib/libcudnn* >/dev/null 2>&1 ||
            fail "CUDA=1 asks for LibTorch with CUDA, and LIBTORCH is set to $LIBTORCH, which has no cuDNN; point it at a build with CUDA 13, or unset it to have one downloaded"
        return
    fi
    if grep -qs "'$TORCH[+']" .libtorch/torch/version.py && [ -e .libtorch/torch/lib/libtorch_cpu.so ]; then
        if [ -d .libtorch/nvidia/cudnn ] || { ! wants_cuda && [ -e .libtorch/nvidia/cu13/lib/libnvrtc.so.13 ]; }; then
            return
        fi
    fi
    by_hand="check the network and the disk and run make setup again, or download LibTorch $TORCH yourself and set LIBTORCH to its folder"
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "LibTorch is downloaded for Linux on x86-64 only; install LibTorch $TORCH by hand and set LIBTORCH to its folder"
    rm -rf .libtorch.partial
    if wants_cuda; then
        say "LibTorch $TORCH with CUDA (a download of about 2.5 GB, 4.6 GB on disk)"
        # the last two are headers with which the parts for GPUs are compiled
        pip_libtorch "torch==$TORCH" nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85 || fail "LibTorch could not be installed; $by_hand"
    else
        say "LibTorch $TORCH for the CPU (1.2 GB on disk)"
        # two NVIDIA libraries that libtorch_cpu.so refers to even where there is no GPU, headers with which the graphs'
        # part is compiled, and the compiler of kernels for GPUs, with which the tests compile them
        pip_libtorch --no-deps "torch==$TORCH" nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85 \
            nvidia-cuda-crt==13.0.88 nvidia-cuda-nvrtc==13.0.88 ||
            fail "LibTorch could not be installed; $by_hand"
    fi
    rm -rf .libtorch
    mv .libtorch.partial .libtorch
}

has_readers() {
    [ -e .python/clip/bpe_simple_vocab_16e6.txt.gz ] && PYTHONPATH=.python python3 -c '
import numpy, safetensors, sympy, typing_extensions
from tensorboard.backend.event_processing import event_accumulator' 2>/dev/null
}

python_readers() {
    has_readers && return
    say "TensorBoard's reader, safetensors, CLIP's vocabulary and what torchrun imports, for the tests"
    rm -rf .python
    python3 -m pip install --quiet --disable-pip-version-check --no-compile --target .python --no-deps \
        --only-binary=:all: tensorboard protobuf numpy absl-py safetensors clip-anytorch==2.6.0 \
        typing_extensions sympy mpmath && has_readers ||
        fail "they could not be installed; by hand: python3 -m pip install --target .python tensorboard safetensors clip-anytorch==2.6.0 sympy typing_extensions"
}

command -v python3 >/dev/null || fail "Python 3 is missing; install by hand, as root: apt-get install python3"
command -v cargo >/dev/null ||
    fail "Rust is missing (1.89 or newer is needed); install it by hand with rustup"
system_packages
libtorch
python_readers
