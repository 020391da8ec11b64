"""Times PyTorch peers of lvdm's networks in turn with `lvdm bench`, so that a claim of speed is a ratio from one run.

The peers, at the sizes of experiments/bench/*.yaml (or of the files that are named):
  research   the U-Net and the video autoencoder the way the released LVDM code runs them: eager, contiguous layout,
             space-only convolutions as 1x3x3 Conv3d, norm and SiLU apart, attention by explicit einsum and softmax,
             torch.optim.AdamW. `--check` compares them with the parity cases: what is timed is the right network.
  diffusers  for `attention: text`: UNet2DConditionModel, the frames as a batch of images, eager and compiled, float32
             and bfloat16. `work` is lvdm's FLOPs over the peer's, so near 1.
  conv2d     3x3 convolutions alone, at the U-Net's widths: a measure of the machine itself.

Needed: pip install torch==2.11.0 diffusers safetensors numpy pyyaml (in a virtual environment), and for torch.compile
a C++ compiler and Python's headers (`--no-compile` does without).
  python peers.py --check DIR                                  parity cases, with synth.py and names/ beside them
  python peers.py --lvdm target/release/lvdm [--json] [FILE...]
Every peer of a file has its calls, then lvdm, then again (`--rounds`). Of a peer the median and the least of all calls
after the warm-up are given; of lvdm the median of its runs' medians, and their least. Ratio: peer's median / lvdm's.
Both run as many threads as there are CPUs to run on. On a busy machine threads wait for each other, one call takes
ten times another's, and even agreeing calls mean nothing: `taskset -c 0 python peers.py` then compares on one core.
"""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional

# The U-Net. Modules have the names of the released state dict.


def space_conv(inputs, outputs, kernel=3, stride=1):
    half = kernel // 2
    return nn.Conv3d(inputs, outputs, (1, kernel, kernel), stride=(1, stride, stride), padding=(0, half, half))


class ResBlock(nn.Module):
    def __init__(self, inputs, outputs, embedding, adaptive):
        super().__init__()
        self.adaptive = adaptive
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), space_conv(inputs, outputs))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs * (2 if adaptive else 1)))
        out_layers = [nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(0.0), space_conv(outputs, outputs)]
        self.out_layers = nn.Sequential(*out_layers)
        self.skip_connection = nn.Identity() if inputs == outputs else space_conv(inputs, outputs, 1)

    def forward(self, x, embedding):
        h = self.in_layers(x)
        of_time = self.emb_layers(embedding)[:, :, None, None, None]
        if self.adaptive:
            scale, shift = of_time.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + of_time)
        return self.skip_connection(x) + h


class RelativePosition(nn.Module):
    def __init__(self, distance, width):
        super().__init__()
        self.distance = distance
        self.embeddings_table = nn.Parameter(torch.randn(2 * distance + 1, width) * 0.1)

    def forward(self, length):
        i = torch.arange(length, device=self.embeddings_table.device)
        rows = (i[None] - i[:, None]).clamp(-self.distance, self.distance) + self.distance
        return self.embeddings_table[rows]  # [T, T, d]


class FactorizedAttention(nn.Module):
    """Over the positions of each frame, then over the frames of each position."""

    def __init__(self, channels, heads, distance):
        super().__init__()
        self.heads, self.relative = heads, distance is not None
        for kind in "st":
            self.add_module(f"norm_{kind}", nn.GroupNorm(32, channels))
            self.add_module(f"qkv_{kind}", nn.Conv1d(channels, 3 * channels, 1))
            self.add_module(f"proj_out_{kind}", nn.Conv1d(channels, channels, 1))
        if self.relative:
            self.relative_position_k = RelativePosition(distance, channels // heads)
            self.relative_position_v = RelativePosition(distance, channels // heads)

    def attend(self, qkv, positions):
        n, width, length = qkv.shape  # [N, 3·C, T]
        d = width // 3 // self.heads
        q, k, v = (part.reshape(n * self.heads, d, length) for part in qkv.chunk(3, dim=1))
        q, k = q * d**-0.25, k * d**-0.25
        weights = torch.einsum("ndt,nds->nts", q, k)
        if positions:  # as released: the key term is transposed
            weights = weights + torch.einsum("nds,std->nts", q, positions[0])
        weights = weights.softmax(dim=-1)
        h = torch.einsum("nts,nds->ndt", weights, v)
        if positions:
            h = h + torch.einsum("nts,tsd->ntd", weights, positions[1]).transpose(1, 2)
        return h.reshape(n, -1, length)

    def forward(self, x, embedding):
        b, c, f, h, w = x.shape
        frames = x.transpose(1, 2).reshape(b * f, c, h * w)
        frames = self.proj_out_s(self.attend(self.qkv_s(self.norm_s(frames)), None))
        x = x + frames.reshape(b, f, c, h, w).transpose(1, 2)
        tracks = x.permute(0, 3, 4, 1, 2).reshape(b * h * w, c, f)
        positions = (self.relative_position_k(f), self.relative_position_v(f)) if self.relative else None
        tracks = self.proj_out_t(self.attend(self.qkv_t(self.norm_t(tracks)), positions))
        return x + tracks.reshape(b, h, w, c, f).permute(0, 3, 4, 1, 2)


class Resample(nn.Module):
    """Halves height and width (its parameters are `op`), or doubles them (`conv`)."""

    def __init__(self, channels, name):
        super().__init__()
        self.add_module(name, space_conv(channels, channels, stride=2 if name == "op" else 1))

    def forward(self, x, embedding):
        if hasattr(self, "op"):
            return self.op(x)
        f, h, w = x.shape[2:]
        return self.conv(functional.interpolate(x, (f, 2 * h, 2 * w), mode="nearest"))


class UNet(nn.Module):
    def __init__(
        self, inputs, outputs, channels, multipliers, blocks, factors, heads, distance, adaptive=True, classes=0
    ):
        super().__init__()
        self.channels, width = channels, 4 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        if classes:
            self.label_emb = nn.Embedding(classes, width)

        def block(level, inputs):  # a residual block, and attention where the level has it
            c = multipliers[level] * channels
            attention = [FactorizedAttention(c, heads, distance)] if 2**level in factors else []
            return nn.ModuleList([ResBlock(inputs, c, width, adaptive), *attention])

        c, levels = channels, len(multipliers)
        self.input_blocks, skips = nn.ModuleList([nn.ModuleList([space_conv(inputs, c)])]), [c]
        for level in range(levels):
            for _ in range(blocks):
                self.input_blocks.append(block(level, c))
                c = multipliers[level] * channels
                skips.append(c)
            if level + 1 < levels:
                self.input_blocks.append(nn.ModuleList([Resample(c, "op")]))
                skips.append(c)
        res = [ResBlock(c, c, width, adaptive) for _ in range(2)]
        self.middle_block = nn.ModuleList([res[0], FactorizedAttention(c, heads, distance), res[1]])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            for i in range(blocks + 1):
                self.output_blocks.append(block(level, c + skips.pop()))
                c = multipliers[level] * channels
                if level > 0 and i == blocks:
                    self.output_blocks[-1].append(Resample(c, "conv"))
        self.out = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), space_conv(c, outputs))

    def forward(self, x, t, y=None):
        half = self.channels // 2
        angles = t[:, None] * torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device))
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        if y is not None:
            embedding = embedding + self.label_emb(y)

        def run(layers, h):
            for layer in layers:
                h = layer(h, embedding)
            return h

        skips = [self.input_blocks[0][0](x)]
        for layers in self.input_blocks[1:]:
            skips.append(run(layers, skips[-1]))
        h = run(self.middle_block, skips[-1])
        for layers in self.output_blocks:
            h = run(layers, torch.cat([h, skips.pop()], dim=1))
        return self.out(h)


# The video autoencoder


class PaddedConv(nn.Module):
    """Repeats edges by kernel - stride an axis, the larger half in front; then the convolution, or its transpose."""

    def __init__(self, inputs, outputs, kernel, stride=(1, 1, 1), transposed=False):
        super().__init__()
        pads = [(math.ceil((kernel - s) / 2), (kernel - s) // 2) for s in reversed(stride)]
        self.pads, self.transposed = sum(pads, ()), transposed
        if transposed:
            self.convt = nn.ConvTranspose3d(inputs, outputs, kernel, stride, padding=kernel - 1)
        else:
            self.conv = nn.Conv3d(inputs, outputs, kernel, stride)
            self.weight = self.conv.weight  # the released state dict has it under both names

    def forward(self, x):
        x = functional.pad(x, self.pads, mode="replicate")
        return self.convt(x) if self.transposed else self.conv(x)


def silu(x):
    return x * torch.sigmoid(x)  # so the released autoencoder has it


class VideoResBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(32, channels, eps=1e-6) for _ in range(2))
        self.conv1, self.conv2 = (PaddedConv(channels, channels, 3) for _ in range(2))

    def forward(self, x):
        return x + self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))


class VideoAutoencoder(nn.Module):
    def __init__(self, channels, factors, z, latent):
        super().__init__()
        blocks = int(math.log2(max(factors)))
        strides = [tuple(2 if f > 2**i else 1 for f in factors) for i in range(blocks)]
        self.encoder, self.decoder = encoder, decoder = nn.Module(), nn.Module()
        encoder.conv_first = PaddedConv(3, channels, 3)
        encoder.conv_blocks, c = nn.ModuleList(), channels
        for stride in strides:
            down = PaddedConv(c, 2 * c, 4, stride)
            encoder.conv_blocks.append(nn.ModuleDict({"down": down, "res": VideoResBlock(2 * c)}))
            c = 2 * c
        norm = nn.GroupNorm(32, c, eps=1e-6)
        encoder.final_block = nn.ModuleList([norm, nn.Identity(), PaddedConv(c, 2 * z, 3)])
        decoder.conv_blocks, inputs = nn.ModuleList(), z
        for stride in strides:
            up = PaddedConv(inputs, c, 4, stride, transposed=True)
            decoder.conv_blocks.append(nn.ModuleDict({"up": up, "res1": VideoResBlock(c), "res2": VideoResBlock(c)}))
            inputs, c = c, c // 2
        decoder.conv_out = PaddedConv(inputs, 3, 3)
        self.quant_conv, self.post_quant_conv = PaddedConv(2 * z, 2 * latent, 1), PaddedConv(latent, z, 1)

    def encode(self, x):
        h = self.encoder.conv_first(x)
        for block in self.encoder.conv_blocks:
            h = block["res"](block["down"](h))
        norm, _, conv = self.encoder.final_block
        mean, logvar = self.quant_conv(conv(silu(norm(h)))).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        h = self.post_quant_conv(z)
        for block in self.decoder.conv_blocks:
            h = block["res2"](block["res1"](block["up"](h)))
        return self.decoder.conv_out(h)


# Are they the right networks?


def check(folder):
    """Outputs against the parity cases, weights by the folder's synth.py; names against names/*.json."""
    from safetensors import safe_open

    specification = importlib.util.spec_from_file_location("synth", folder / "synth.py")
    synth = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(synth)
    failed = []

    def row(name, found, ok):
        print(f"{name:30} {found:30} {'ok' if ok else 'FAIL'}")
        failed.extend([] if ok else [name])

    with torch.device("meta"):
        papers = {"unet_short": UNet(4, 4, 256, [1, 2, 3, 4], 3, [2, 4, 8], 4, 4),
                  "autoencoder_3d": VideoAutoencoder(32, [4, 8, 8], 4, 4)}  # fmt: skip
    for name, network in papers.items():
        told = json.loads((folder / "names" / f"{name}.json").read_text())
        shapes = [[told["prefix"] + key, list(value.shape)] for key, value in network.state_dict().items()]
        row(name, f"{len(shapes)} names and shapes", sorted(shapes) == sorted(told["tensors"]))

    for path in sorted([*folder.glob("unet3d*.safetensors"), *folder.glob("autoencoder_f*.safetensors")]):
        with safe_open(path, "pt") as file:
            about, case = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
        c = json.loads(about["config"])
        if c.get("use_temporal_transformer"):
            print(f"{path.stem:30} passed over: a text network")
            continue
        if about["component"] == "unet3d":
            distance = c["temporal_length"] if c["use_relative_position"] else None
            network = UNet(c["in_channels"], c["out_channels"], c["model_channels"], c["channel_mult"],
                           c["num_res_blocks"], c["attention_resolutions"], c["num_heads"], distance,
                           c["use_scale_shift_norm"], c.get("num_classes", 0))  # fmt: skip
        else:
            network = VideoAutoencoder(c["n_hiddens"], c["downsample"], c["z_channels"], c["embed_dim"])
        state = network.state_dict()
        for name, tensor in state.items():
            if name.removesuffix("weight") + "conv.weight" not in state:  # one tensor of two names
                tensor.copy_(torch.from_numpy(synth.param(name, tensor.shape)))
        with torch.no_grad():
            if about["component"] == "unet3d":
                out = {"eps": network(case["in.x"], case["in.t"], case.get("in.y"))}
            else:
                mean, logvar = network.encode(case["in.video"])
                sample = mean + (logvar / 2).exp() * case["in.noise"]
                out = dict(mean=mean, logvar=logvar, sample=sample, reconstruction=network.decode(sample))
        assert out.keys() == {key[4:] for key in case if key.startswith("out.")}
        error = max(((out[key] - case["out." + key]).norm() / case["out." + key].norm()).item() for key in out)
        row(path.stem, f"relative error {error:.1e}", error <= 1e-4)
    assert not failed, failed


# Time


class Peer:
    """A call to time, and the name of the line of `lvdm bench` that it stands beside."""

    def __init__(self, name, label, precision, call, flops=None, calls=1):
        self.name, self.label, self.precision, self.call = name, label, precision, call
        self.flops, self.calls, self.seconds = flops, calls, []

    def time(self, warmup, repeats):
        wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        allow_tf32(self.precision)
        for _ in range(warmup):
            self.call()
        for _ in range(repeats):
            wait()
            start = time.perf_counter()
            for _ in range(self.calls):
                self.call()
            wait()
            self.seconds.append((time.perf_counter() - start) / self.calls)


def allow_tf32(precision):
    """As in lvdm, only where it is asked for; PyTorch's own default rounds convolutions."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def kind(precision):
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(device, precision):
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def only(network, **known):
    """The network's settings; one that the peer does not have is an error."""
    for key, value in network.items():
        if value is not None and (key not in known or known[key] not in (None, value)):
            raise SystemExit(f"the peers have no {key} = {value}")
    return network


def unet_peers(bench, device, precision):
    n = only(bench["network"], kind="unet3d", channels=None, multipliers=None, blocks_per_level=None, attention_factors=None,
             heads=None, attention="factorized", relative_position=True, adaptive_norm=True, norm_groups=32,
             norm_per_frame=False, context_width=None, temporal=True, recompute=False)  # fmt: skip
    (c, f, h, w), batch = bench["latent"], bench.get("batch", 1)
    with torch.device(device):
        unet = UNet(c, c, n["channels"], n["multipliers"], n["blocks_per_level"], n["attention_factors"], n["heads"], f)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, weight_decay=0.01)
    z, target = (torch.randn(batch, c, f, h, w, device=device) for _ in range(2))
    t = torch.full([batch], 500, device=device)

    @torch.no_grad()
    def forward():
        with autocast(device, precision):
            unet(z, t)

    def train_step():
        optimizer.zero_grad()
        with autocast(device, precision):
            prediction = unet(z, t).float()
        functional.l1_loss(prediction, target).backward()
        optimizer.step()

    yield Peer("unet_forward", "research", precision, forward)
    yield Peer("unet_train_step", "research", precision, train_step)


def autoencoder_peers(bench, device, precision):
    n = only(bench["network"], kind="video_autoencoder", channels=None, factors=None, z_channels=None, latent_channels=None, norm_groups=32,
             padding="replicate")  # fmt: skip
    with torch.device(device):
        autoencoder = VideoAutoencoder(n["channels"], n["factors"], n["z_channels"], n["latent_channels"])
    batch, size = bench.get("batch", 1), [bench["frames"], bench["resolution"], bench["resolution"]]
    x = torch.randn(batch, 3, *size, device=device).clamp(-1, 1)
    z, noise = (torch.randn(batch, n["latent_channels"], *(s // f for s, f in zip(size, n["factors"])), device=device)
                for _ in range(2))  # fmt: skip

    @torch.no_grad()
    def without_gradient(half, x):
        with autocast(device, precision):
            half(x)

    def forward_backward():
        autoencoder.zero_grad()
        with autocast(device, precision):
            mean, logvar = autoencoder.encode(x)
            reconstruction = autoencoder.decode(mean + (logvar / 2).exp() * noise).float()
        functional.l1_loss(reconstruction, x).backward()

    yield Peer("encoder", "research", precision, lambda: without_gradient(autoencoder.encode, x))
    yield Peer("decoder", "research", precision, lambda: without_gradient(autoencoder.decode, z))
    yield Peer("autoencoder_forward_backward", "research", precision, forward_backward)


def diffusers_peers(bench, device, precision, compiled):
    from diffusers import UNet2DConditionModel, logging
    from torch.utils.flop_counter import FlopCounterMode

    n = only(bench["network"], kind="unet3d", channels=None, multipliers=None, blocks_per_level=None, attention_factors=None,
             heads=None, attention="text", relative_position=True, adaptive_norm=False, norm_groups=32,
             norm_per_frame=True, context_width=None, temporal=False, recompute=False)  # fmt: skip
    logging.set_verbosity_error()
    c, f, h, w = bench["latent"]
    cross = ["CrossAttn" if 2**level in n["attention_factors"] else "" for level in range(len(n["multipliers"]))]
    unet = UNet2DConditionModel(
        in_channels=c, out_channels=c, layers_per_block=n["blocks_per_level"],
        block_out_channels=[m * n["channels"] for m in n["multipliers"]],
        down_block_types=[name + "DownBlock2D" for name in cross],
        up_block_types=[name + "UpBlock2D" for name in cross[::-1]],
        cross_attention_dim=n["context_width"], attention_head_dim=n["heads"],  # that is their number
    ).eval().requires_grad_(False)  # fmt: skip
    images = bench.get("batch", 1) * f
    z, t, text = torch.randn(images, c, h, w), torch.full([images], 500), torch.randn(images, 77, n["context_width"])
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        unet(z, t, text)
    unet, t = unet.to(device, kind(precision)), t.to(device)
    z, text = (x.to(device, kind(precision)) for x in (z, text))
    ways = {"diffusers": unet} | ({"diffusers compiled": torch.compile(unet)} if compiled else {})
    for label, run in ways.items():
        call = torch.no_grad()(lambda run=run: run(z, t, text, return_dict=False))
        yield Peer("unet_forward", label, precision, call, counter.get_total_flops())


def convolutions(bench, device, precision):
    """3x3 from width to width at every level, the frames a batch of images."""
    images = bench["latent"][1] * bench.get("batch", 1)
    for level, multiplier in enumerate(bench["network"]["multipliers"]):
        c, h, w = multiplier * bench["network"]["channels"], bench["latent"][2] >> level, bench["latent"][3] >> level
        for label, layout in {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}.items():
            x, kernel = (torch.randn(shape, device=device, dtype=kind(precision)).contiguous(memory_format=layout)
                         for shape in [(images, c, h, w), (c, c, 3, 3)])  # fmt: skip
            call = lambda x=x, kernel=kernel: functional.conv2d(x, kernel, padding=1)
            yield Peer(f"conv2d {images}x{c}x{h}x{w}", label, precision, call, 2 * images * h * w * 9 * c * c, calls=20)


def read(file):
    """What a file of experiments/bench says; as JSON where `lvdm bench --json` wrote it down."""
    if file.suffix == ".json":
        return json.loads(file.read_text())
    import yaml

    return yaml.safe_load(file.read_text())


def peers_of(config, options):
    """The peers of one file of experiments/bench."""
    unet, autoencoder, device = config.get("unet"), config.get("autoencoder"), options.device
    text = unet and unet["network"].get("attention") == "text"
    for precision in options.precision or (["f32", "bf16"] if text else ["f32"]):
        if text:
            yield from diffusers_peers(unet, device, precision, not options.no_compile)
        elif unet:
            yield from unet_peers(unet, device, precision)
        if autoencoder:
            yield from autoencoder_peers(autoencoder, device, precision)
        if unet and not options.no_convolutions:
            yield from convolutions(unet, device, precision)


def lvdm(options, file, config, precision, overrides):
    """What `lvdm bench` says of a file, by name."""
    left_out = [f"{key}=null" for key in ("i3d", "loader") if key in config]
    left_out += [f"unet.{key}={none}" for key, none in {"samplers": "[]", "checkpoint": "false"}.items()
                 if key in (config.get("unet") or {})]  # fmt: skip
    command = [options.lvdm, "bench", file, f"device={options.device}", *left_out, *overrides]
    command += ["tf32=true"] if precision == "tf32" else [f"precision={precision}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return {line["name"]: line for line in map(json.loads, run.stdout.splitlines())}


def report(file, peer, runs, as_json):
    """One row: a peer and lvdm's runs (none without --lvdm, or for a convolution)."""
    lines = [run[peer.name] for run in runs if peer.name in run]
    seconds, flops = median(peer.seconds), peer.flops or (lines[0]["flops"] if lines else None)
    row = {"file": file.stem, "name": peer.name, "peer": peer.label, "precision": peer.precision,
           "peer_seconds": seconds, "peer_least": min(peer.seconds), "peer_flops": flops}  # fmt: skip
    if lines:
        ours, least = median(line["seconds"] for line in lines), min(line["least_seconds"] for line in lines)
        row |= {"lvdm_seconds": ours, "lvdm_least": least, "lvdm_flops": lines[0]["flops"], "ratio": seconds / ours,
                "least_ratio": row["peer_least"] / least, "work": lines[0]["flops"] / flops}  # fmt: skip
    if as_json:
        return print(json.dumps(row), flush=True)
    cells = [f"{row['name']:28} {row['peer']:18} {row['precision']:4} {seconds:9.4f} {row['peer_least']:9.4f}",
             f"{flops / seconds / 1e9:9.1f}" if flops else " " * 9]  # fmt: skip
    if lines:
        cells.append(f"{ours:9.4f} {least:9.4f} {row['lvdm_flops'] / ours / 1e9:9.1f} "
                     f"{row['ratio']:6.2f} {row['least_ratio']:6.2f} {row['work']:6.2f}")  # fmt: skip
    print(*cells, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="files of lvdm bench (default: the small ones beside this)")
    parser.add_argument("--check", type=Path, metavar="DIR", help="compare with the parity cases, and time nothing")
    parser.add_argument("--lvdm", metavar="PATH", help="the command to compare with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", nargs="+", choices=["f32", "tf32", "bf16"],
                        help="of the networks (default: f32; beside diffusers bf16, too); bf16 is autocast")
    parser.add_argument("--no-convolutions", action="store_true", help="without the convolutions alone")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--rounds", type=int, default=3, help="how often the peers and lvdm take turns")
    parser.add_argument("--quick", action="store_true", help="two calls each: does it work? Not a measurement")
    parser.add_argument("--json", action="store_true", help="a line of JSON a row in place of the table")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    allow_tf32("f32")
    if options.check:
        return check(options.check)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"peers.py: something else runs here (load {load:.1f}): not a measurement", file=sys.stderr)
    beside = [Path(__file__).with_name(name + ".yaml") for name in ("unet_c64", "clip64", "text_c160")]
    if not options.json:
        print(f"PyTorch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads; seconds, GFLOP/s")
        print(f"{'':52}", *(f"{word:>9}" for word in ["peer", "least", "GFLOP/s", "lvdm", "least", "GFLOP/s"]),
              " ratio  least   work")  # fmt: skip
    for file in options.files or [path for path in beside if path.exists()]:
        config = read(file)
        warmup, repeats = (1, 2) if options.quick else (config.get("warmup", 2), config.get("repeats", 7))
        peers, runs = list(peers_of(config, options)), {}
        for _ in range(1 if options.quick else options.rounds):
            for peer in peers:
                peer.time(warmup, repeats)
            for precision in dict.fromkeys(peer.precision for peer in peers) if options.lvdm else []:
                overrides = [f"warmup={warmup}", f"repeats={repeats}"]
                runs.setdefault(precision, []).append(lvdm(options, file, config, precision, overrides))
        for peer in peers:
            report(file, peer, runs.get(peer.precision, []), options.json)


if __name__ == "__main__":
    main()
