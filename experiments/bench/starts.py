"""Counts what networks start on a GPU, without one: a small network is bound by the host that starts its kernels.

For PyTorch's networks every operation that computes something is one start (views and allocations are none), attention
and AdamW are one each, and the first two columns are a forward pass alone and a training step: forward, backward, AdamW.
lvdm runs on the simulated GPU of tests/simulated_gpu, which counts in the same way; a forward pass and a step are counted
together there.

Peers: diffusers' UNet2DConditionModel for `attention: text`, its LatteTransformer3DModel for `kind: latte`, and the way of
the released LVDM code (peers.py) for the others. Counts depend on the depth alone, so theirs are taken at a small width.

  python starts.py [--lvdm target/release/lvdm --simulated-gpu FOLDER] [FILE...]
FOLDER holds the simulated GPU's libtorch_cuda.so; `cargo test --test simulated_gpu` leaves it in target/tmp.
"""

import argparse
import os
import re
import subprocess
from pathlib import Path

import torch
from peers import UNet, only, read
from torch.utils._python_dispatch import TorchDispatchMode

OF_NO_COST = re.compile(r"aten\.(empty|detach|view|_unsafe_view|_reshape_alias|alias|lift_fresh|_to_copy\.default_same)")


class Starts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in operation._schema.arguments)
        self.count += not (is_view or OF_NO_COST.match(str(operation)))
        return result


def starts(body):
    with Starts() as mode:
        body()
    return mode.count


def counted(network, forward, precision):
    """A forward pass without gradients, and a training step."""
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return forward()

    def step():
        optimizer.zero_grad()
        prediction = run().float()
        (prediction - torch.zeros_like(prediction)).abs().mean().backward()
        optimizer.step()

    with torch.no_grad():
        run()
        alone = starts(run)
    step()
    return alone, starts(step)


def peer(bench):
    network = bench["network"]
    c, f, h, w = bench["latent"]
    t = torch.full([2], 500)
    if network.get("kind") == "latte":
        from diffusers import LatteTransformer3DModel

        model = LatteTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=c, out_channels=c, num_layers=network["depth"] // 2,
            sample_size=h, patch_size=network["patch_size"], norm_type="ada_norm_single", caption_channels=8,
            video_length=f, activation_fn="gelu-approximate", norm_elementwise_affine=False, cross_attention_dim=None,
            attention_bias=True,
        )  # fmt: skip
        return "diffusers", model, lambda: model(torch.zeros(2, c, f, h, w), t, torch.zeros(2, 1, 8), return_dict=False)[0]
    if network.get("attention") == "text":
        from diffusers import UNet2DConditionModel

        factors = network["attention_factors"]
        cross = ["CrossAttn" if 2**level in factors else "" for level in range(len(network["multipliers"]))]
        model = UNet2DConditionModel(
            in_channels=c, out_channels=c, layers_per_block=network["blocks_per_level"],
            block_out_channels=[m * 32 for m in network["multipliers"]],
            down_block_types=[name + "DownBlock2D" for name in cross],
            up_block_types=[name + "UpBlock2D" for name in cross[::-1]],
            cross_attention_dim=32, attention_head_dim=4,
        )  # fmt: skip
        text = torch.zeros(2, 77, 32)
        return "diffusers", model, lambda: model(torch.zeros(2, c, h, w), t, text, return_dict=False)[0]
    small = only(network, kind="unet3d", channels=None, multipliers=None, blocks_per_level=None, attention_factors=None,
                 heads=None, attention="factorized", relative_position=True, adaptive_norm=True, norm_groups=32,
                 norm_per_frame=False, context_width=None, temporal=True, recompute=False)  # fmt: skip
    model = UNet(c, c, 32, small["multipliers"], small["blocks_per_level"], small["attention_factors"], small["heads"], f)
    return "research", model, lambda: model(torch.zeros(2, c, f, h, w), t)


def of_lvdm(program, folder, file, precision):
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "SIMULATED_GPU_LOG": "1", "SIMULATED_GPU_OPEN": "1"}

    def run(repeats):
        settings = ["device=cuda", "warmup=0", f"repeats={repeats}", f"precision={precision}", "unet.batch=2"]
        done = subprocess.run([program, "bench", file, *settings], stderr=subprocess.PIPE, text=True, check=True,
                              stdout=subprocess.DEVNULL, env=environment)  # fmt: skip
        launches, gigabytes = re.search(r"in all (\d+) calls ([\d.]+) GB", done.stderr).groups()
        return int(launches), float(gigabytes)

    (one, a), (two, b) = run(1), run(2)
    return two - one, b - a


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--lvdm", type=Path)
    options.add_argument("--simulated-gpu", type=Path)
    options.add_argument("files", nargs="*", type=Path, metavar="FILE")
    options = options.parse_args()
    beside = [Path(__file__).with_name(name + ".yaml") for name in ("unet_c64", "text_c160", "latte")]
    print(f"{'':12} {'':5} {'peer':10} {'forward':>8} {'step':>8} {'both':>8} {'lvdm':>8} {'ratio':>6} {'GB':>7}")
    for file in options.files or beside:
        bench = read(file)["unet"]
        for precision in ("f32", "bf16"):
            label, model, forward = peer(bench)
            alone, step = counted(model, forward, precision)
            row = f"{file.stem:12} {precision:5} {label:10} {alone:8} {step:8} {alone + step:8}"
            if options.lvdm:
                launches, gigabytes = of_lvdm(options.lvdm, options.simulated_gpu, file, precision)
                row += f" {launches:8} {launches / (alone + step):6.2f} {gigabytes:7.2f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
