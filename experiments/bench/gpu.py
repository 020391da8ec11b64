"""The parts of gpu.sh: what needs a GPU, each part within its own seconds → report.json and report.md.

A part that has had its time is cut: what it had found until then stays in the page, with a word that it was cut. What was not
measured says so. Needed: Python with PyTorch; no other package.
"""

import argparse
import array
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parents[1]
NOT = "not measured"
# Seconds of each part, and of all: one call of ten minutes, with some to spare. On an H100 most parts need fewer.
PARTS = {"doctor": 15, "parity f32": 30, "parity bf16": 30, "ten steps": 40, "graphs": 15, "bench": 210, "training": 130,
         "fvd": 40, "paper": 110}  # fmt: skip
ALL = 560


class Cut(Exception):
    """A part's time is over."""


class Machine:
    def __init__(self, options):
        self.options, self.start = options, time.monotonic()
        self.deadline = self.start
        self.work = Path(tempfile.mkdtemp(prefix="lvdm-gpu-"))
        found = subprocess.run(
            [sys.executable, "-c", "import torch; print(torch.__path__[0], torch.__version__, torch.cuda.is_available())"],
            capture_output=True, text=True)  # fmt: skip
        if found.returncode:
            raise SystemExit(f"gpu.py: PyTorch is needed: {found.stderr.strip().splitlines()[-1:]}")
        folder, self.torch, gpu = found.stdout.split()
        self.peer_device = "cuda" if gpu == "True" else "cpu"
        simulated = os.environ.get("SIMULATED_GPU")
        libraries = [simulated, folder + "/lib", os.environ.get("LD_LIBRARY_PATH")]
        self.environment = os.environ | {
            "LD_LIBRARY_PATH": ":".join(filter(None, libraries)), "LVDM_WEIGHTS": str(options.weights)}  # fmt: skip
        self.simulated = bool(simulated)

    def left(self):
        return self.deadline - time.monotonic()

    def lines(self, command, environment=None, on_line=None):
        """Runs a command to its end or the part's, and gives its status and its lines of output."""
        process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT, env=environment or self.environment,
                                   start_new_session=True)  # fmt: skip
        signal.alarm(max(1, math.ceil(self.left())))
        lines = []
        try:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                if on_line:
                    on_line(lines[-1])
            return process.wait(), lines
        except Cut:
            # a training saves and leaves at this signal
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            raise
        finally:
            signal.alarm(0)

    def lvdm(self, *words, on_line=None, graphs=True):
        environment = self.environment | {"LVDM_CUDA_GRAPHS": "1" if graphs else "0"}
        return self.lines([self.options.program, *words], environment, on_line)

    def must(self, *words, **more):
        status, lines = self.lvdm(*words, **more)
        if status:
            told = [line for line in lines if line.startswith("error")] or lines
            raise RuntimeError(f"lvdm {words[0]}: {(told or ['status ' + str(status)])[-1]}")
        return lines

    def clips(self, split):
        return f"{{kind: packed, file: {self.options.clips / split}.safetensors}}"


def alarm(*_):
    raise Cut


# Parts: each puts into `found` what it finds as it finds it.


def doctor(machine, found):
    found["lines"] = []
    status, _ = machine.lvdm("doctor", on_line=found["lines"].append)
    found["status"] = status
    found["gpus"] = machine.lines(["nvidia-smi", "-L"])[1] if shutil.which("nvidia-smi") else []


def parity(machine, found, dtype, cases=None, graphs=False):
    cases = cases or sorted((machine.options.cases).glob("*.safetensors"))
    found |= {"cases": len(cases), "rows": []}

    def row(line):
        words = line.split()
        if len(words) >= 3 and words[0].endswith(".safetensors"):
            verdict = words[5] if len(words) == 6 else "not a case" if "not a case" in line else "FAIL"
            relative = float(words[3]) if len(words) == 6 else None
            found["rows"].append({"case": words[0][:-12], "relative": relative, "verdict": verdict, "line": line})

        elif "CUDA graph could not be recorded" in line:
            found["refused"] = line

    machine.lvdm("verify", "--device", "cuda", "--dtype", dtype, *cases, on_line=row, graphs=graphs)
    wrong = [row["case"] for row in found["rows"] if dtype == "f32" and row["verdict"] == "FAIL"]
    if len(found["rows"]) < len(cases) or wrong:
        raise RuntimeError(f"{len(found['rows'])} of {len(cases)} cases were computed; wrong: {wrong or 'none'}")


def lpips(machine):
    there = (machine.options.weights / "vgg16.ckpt").exists()
    return ("loss.perceptual_weight=0.05", "with LPIPS") if there and not machine.options.tiny else (
        "loss.perceptual_weight=0", "without LPIPS")  # fmt: skip


def metrics(run):
    """Of each step what the log says."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def weights(run):
    """The first network of a run's last checkpoint, as one row of numbers."""
    files = sorted((run / "checkpoints").glob("step-*.safetensors"))
    with open(files[-1], "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        tensors, data = json.loads(file.read(length)), file.read()
    row = array.array("f")
    for name in sorted(tensors):
        if name.startswith("model.") and tensors[name]["dtype"] == "F32":
            first, last = tensors[name]["data_offsets"]
            row.frombytes(data[first:last])
    return row


def apart(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)) / sum(y * y for y in b))


def ten_steps(machine, found):
    """The same ten steps on the CPU and on the GPU: losses and weights, in float32 and in bf16."""
    steps = 2 if machine.options.tiny else 10
    common = [f"trainer.steps={steps}", "trainer.log_every=1", "trainer.picture_every=100000", "trainer.deterministic=true",
              f"data.dataset={machine.clips('train')}"]  # fmt: skip
    small = ["data.frames=4", "data.resolution=16"] if machine.options.tiny else []
    networks = {"autoencoder": [lpips(machine)[0], "loss.adversarial_start=0"],
                "diffusion": ["latents=null", f"autoencoder={machine.work}/autoencoder-cpu-f32"]}  # fmt: skip
    for network, settings in networks.items():
        for device, precision in [("cpu", "f32"), ("cuda", "f32"), ("cuda", "bf16")]:
            run = machine.work / f"{network}-{device}-{precision}"
            machine.must("train", network, f"experiments/demo/{network}.yaml", "--run", run, *common, *small, *settings,
                         f"trainer.device={device}", f"trainer.precision={precision}")  # fmt: skip
            if device == "cpu":
                losses, reference = [line["loss"] for line in metrics(run)], weights(run)
                continue
            own = [line["loss"] for line in metrics(run)]
            found[f"{network} {precision}"] = {
                "steps": len(own), "losses": own, "losses_cpu": losses,
                "worst_loss": max(abs(a - b) / abs(b) for a, b in zip(own, losses)),
                "weights_apart": apart(weights(run), reference),
            }  # fmt: skip


def graphs(machine, found):
    cases = sorted((machine.options.cases).glob("sample_*.safetensors"))
    parity(machine, found, "f32", cases, graphs=True)


def sizes(machine):
    """What is timed: the paper's sizes, or for a rehearsal small ones."""
    tiny = ["unet.network.channels=32", "unet.network.multipliers=[1, 2]", "unet.network.blocks_per_level=1",
            "unet.network.attention_factors=[2]", "unet.latent=[4, 4, 8, 8]", "autoencoder.frames=4",
            "autoencoder.resolution=32", "warmup=1", "repeats=1"]  # fmt: skip
    small = tiny if machine.options.tiny else ["unet.batch=8", "repeats=5"]
    return [BENCH / "ucf101.yaml", *small, "device=cuda", "i3d=null", "loader=null", "unet.checkpoint=false", "--json"]


def bench(machine, found):
    """In bf16 both networks and a sampler, beside the same networks in PyTorch; step and sampler without CUDA graphs; all in TF32."""
    found |= {"rows": [], "samplers": [], "steps": [], "peers": f"PyTorch {machine.torch} on {machine.peer_device}"}
    sampler = "unet.samplers=[{kind: ddim, steps: %d, eta: 1.0}]" % (2 if machine.options.tiny else 50)
    environment = {key: value for key, value in os.environ.items() if key != "SIMULATED_GPU"}

    def timed(precision, *settings, graphs=True, networks=True):
        """Puts lvdm's lines into `found`; gives the rows by name, and what was timed."""
        rows, config = {}, {}

        def own(text):
            line = json.loads(text) if text.startswith("{") else {"name": None}
            if line["name"] == "experiment":
                config.update(line["experiment"])
                return
            if line["name"] == "sample":
                keys = ("steps", "batch", "seconds", "videos_per_second")
                found["samplers"].append({"cuda_graphs": graphs} | {key: line[key] for key in keys})
                return
            if line["name"] == "unet_train_step" and precision == "bf16":
                found["steps"].append({"cuda_graphs": graphs} | {key: line[key] for key in ("batch", "seconds", "least_seconds")})
            if line["name"] and networks:
                rows[line["name"]] = {
                    "name": line["name"], "precision": precision, "batch": line["batch"], "lvdm_seconds": line["seconds"],
                    "lvdm_memory": line["peak_memory_bytes"], "lvdm_flops_per_second": line["flops_per_second"],
                    "share_of_peak": line["share_of_peak"]}  # fmt: skip
                found["rows"].append(rows[line["name"]])
            elif "CUDA graph" in text:
                found["refused"] = text

        machine.must("bench", *sizes(machine), *settings, on_line=own, graphs=graphs)
        return rows, config

    def beside(precision, rows, config):
        file = machine.work / "bench.json"
        file.write_text(json.dumps(config))

        def peer(text):
            line = json.loads(text) if text.startswith("{") else {"name": None}
            if line["name"] in rows:
                row = rows[line["name"]]
                row.update(peer_seconds=line["peer_seconds"], ratio=line["peer_seconds"] / row["lvdm_seconds"])

        status, lines = machine.lines(
            [sys.executable, BENCH / "peers.py", file, "--device", machine.peer_device, "--precision", precision,
             "--rounds", "1", "--json", "--no-convolutions"], environment, peer)  # fmt: skip
        if status:
            found["peers"] = f"PyTorch's networks could not be timed: {lines[-1] if lines else status}"

    beside("bf16", *timed("bf16", "precision=bf16", sampler))
    timed("bf16", "precision=bf16", sampler, "repeats=3", graphs=False, networks=False)
    beside("tf32", *timed("tf32", "tf32=true", "unet.samplers=[]"))


def training(machine, found):
    """The demo's two networks, with the loop and the loader around them."""
    small = ["trainer.steps=2", "data.frames=12", "data.resolution=16"] if machine.options.tiny else []
    found["lpips"] = lpips(machine)[1]
    autoencoder = machine.work / "autoencoder"
    runs = {"autoencoder": [lpips(machine)[0]], "diffusion": ["latents=null", f"autoencoder={autoencoder}"]}
    share = machine.deadline
    for i, (network, settings) in enumerate(runs.items()):
        run = machine.work / network
        # the second network gets half of the time in any case
        machine.deadline = share if i else time.monotonic() + (share - time.monotonic()) / 2
        words = ["train", network, f"experiments/demo/{network}.yaml", "--run", run, "trainer.device=cuda", *settings, *small,
                 f"data.dataset={machine.clips('train')}", "trainer.log_every=1" if machine.options.tiny else "trainer.log_every=20"]  # fmt: skip
        start, cut = time.monotonic(), False
        try:
            machine.must(*words)
        except Cut:
            cut = True
        log = metrics(run)
        last = log[-1] if log else {}
        found[network] = {"seconds": time.monotonic() - start, "cut": cut, "step": last.get("step"), "loss": last.get("loss"),
                          "seconds_per_step": last.get("seconds_per_step"),
                          "seconds_waiting_for_data": last.get("seconds_waiting_for_data")}  # fmt: skip
        if not (run / "checkpoints").exists():
            raise RuntimeError(f"{network}: no checkpoint was written")


def fvd(machine, found):
    """Samples of what was trained, measured three times: the second and third time features of real clips are kept. The
    first two are to be equal to the digit; the third samples without CUDA graphs."""
    small = ["evaluation.clips=8", "generated.sampler.steps=2", "real.frames=12", "real.resolution=16"]
    for attempt, with_graphs in [("first", True), ("second", True), ("without graphs", False)]:
        out, start = machine.work / f"evaluation-{attempt.replace(' ', '-')}", time.monotonic()
        machine.must("evaluate", "experiments/demo/evaluate.yaml", "--device", "cuda", f"generated.run={machine.work}/diffusion",
                     f"out={out}", f"real.dataset={machine.clips('test')}", "train=null",
                     *(small if machine.options.tiny else []), graphs=with_graphs)  # fmt: skip
        figures = json.loads((out / "figures.json").read_text())
        samples = figures["figures"]["samples"]
        found[attempt] = {"seconds": time.monotonic() - start, "of": figures["generated_text"], "device": figures["device"],
                          "fvd": samples["fvd"], "kvd": samples["kvd"], "protocol": figures["protocol_text"],
                          "sample_seconds": figures["sample_seconds"]}  # fmt: skip
    if found["first"]["fvd"] != found["second"]["fvd"]:
        raise RuntimeError(f"FVD of the same samples: {found['first']['fvd']}, then {found['second']['fvd']}")


def noise_clips(file, clips, frames, size):
    """A file of packed clips whose pixels are random: for speed alone."""
    shape = [clips, 3, frames, size, size]
    count = math.prod(shape)
    read = {"dataset": {"kind": "folder", "root": "noise"}, "frames": frames, "frame_stride": 1, "resolution": size, "seed": 0,
            "reading": 1}  # fmt: skip
    header = json.dumps({"__metadata__": {"lvdm": json.dumps(read)},
                         "clips": {"dtype": "U8", "shape": shape, "data_offsets": [0, count]}}).encode()  # fmt: skip
    file.write_bytes(len(header).to_bytes(8, "little") + header + os.urandom(count))


def paper(machine, found):
    """The experiments of UCF-101 as they are shipped, but for steps, batch and data: loop, loader, losses, encoder, checkpoint."""
    tiny = machine.options.tiny
    frames, size, file = (4, 32, machine.work / "noise.safetensors") if tiny else (16, 256, machine.work / "noise.safetensors")
    noise_clips(file, 16, frames, size)
    autoencoder = machine.work / "paper-autoencoder"
    runs = {"autoencoder": ["loss.adversarial_start=0", lpips(machine)[0].replace("0.05", "1"), "trainer.steps=30"],
            "diffusion": [f"autoencoder={autoencoder}", "trainer.steps=60", "trainer.accumulate=1"]}  # fmt: skip
    small = {"autoencoder": ["trainer.steps=2"], "diffusion": ["trainer.steps=2", "unet.channels=32", "unet.multipliers=[1, 2]",
             "unet.blocks_per_level=1", "unet.attention_factors=[2]"]} if tiny else {"autoencoder": [], "diffusion": ["trainer.batch=16"]}  # fmt: skip
    for network, settings in runs.items():
        run, start = machine.work / f"paper-{network}", time.monotonic()
        machine.must("train", network, f"experiments/ucf101/{network}.yaml", "--run", run, "trainer.device=cuda", *settings,
                     *small[network], f"data.dataset={{kind: packed, file: {file}}}", f"data.frames={frames}",
                     f"data.resolution={size}", f"trainer.log_every={1 if tiny else 10}")  # fmt: skip
        last = metrics(run)[-1]
        stored = sum(f.stat().st_size for f in (run / "checkpoints").iterdir())
        found[network] = {"seconds": time.monotonic() - start, "step": last["step"], "checkpoint_bytes": stored} | {
            key: last[key] for key in ("seconds_per_step", "clips_per_second", "seconds_waiting_for_data")}  # fmt: skip


# The page.


def number(value, digits=4):
    return NOT if value is None else f"{value:.{digits}g}"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows] + [""]


def parity_lines(found):
    rows = found.get("rows", [])
    good = [row for row in rows if row["verdict"] == "ok"]
    worst = max((row["relative"] for row in rows if row["relative"] is not None), default=None)
    refused = [f"No graph: {found['refused']}", ""] if "refused" in found else []
    lines = refused + [f"{len(good)} of {found.get('cases', 0)} cases hold their bound, {len(rows)} were run; the largest relative "
             f"error is {number(worst, 3)}.", ""]  # fmt: skip
    return lines + [f"- `{row['line'].strip()}`" for row in rows if row["verdict"] != "ok"] + [""]


def page(report):
    lines = [f"# lvdm on {report['machine']}", "", report["about"], ""]
    lines += table(["part", "seconds", "given", "how it ended"],
                   [[name, number(part.get("seconds"), 3), part["given"], part["status"]] for name, part in report["parts"].items()])  # fmt: skip
    parts = {name: part.get("found", {}) for name, part in report["parts"].items()}
    lines += ["## Doctor", "", "```", *parts["doctor"].get("lines", [NOT]), *parts["doctor"].get("gpus", []), "```", ""]
    for name, title in [("parity f32", "Parity on the GPU, float32"), ("parity bf16", "Parity on the GPU, bf16"),
                        ("graphs", "Sampling by CUDA graphs against the parity cases")]:  # fmt: skip
        lines += [f"## {title}", "", *parity_lines(parts[name])]
    if parts["parity bf16"]:
        lines += ["Tiny networks are beyond the bound of bf16 on the CPU, too: see README.md.", ""]
    keys = [f"{network} {precision}" for network in ("autoencoder", "diffusion") for precision in ("f32", "bf16")]
    steps = [parts["ten steps"].get(key, {}) for key in keys]
    lines += ["## The same steps on the CPU in float32 and on the GPU", ""]
    lines += table(["network", "steps", "largest relative difference of a loss", "distance of the weights after them (relative)"],
                   [[key, step.get("steps", NOT), number(step.get("worst_loss"), 3), number(step.get("weights_apart"), 3)]
                    for key, step in zip(keys, steps)])  # fmt: skip
    bench_found = parts["bench"]
    lines += ["## Speed at the sizes of the bench", "", f"Beside: {bench_found.get('peers', NOT)}.", ""]
    order = [(name, precision) for precision in ("bf16", "tf32") for name in
             ("unet_forward", "unet_train_step", "encoder", "decoder", "autoencoder_forward_backward")]  # fmt: skip
    rows = {(row["name"], row["precision"]): row for row in bench_found.get("rows", [])}
    if "refused" in bench_found:
        lines += [f"No graph: {bench_found['refused']}", ""]
    cells = []
    for key in order:
        row = rows.get(key, {})
        share, memory = row.get("share_of_peak"), row.get("lvdm_memory")
        cells.append([*key, row.get("batch", NOT), number(row.get("lvdm_seconds")), number(row.get("peer_seconds")),
                      number(row.get("ratio"), 3), NOT if share is None else f"{100 * share:.0f} %",
                      NOT if not memory else f"{memory / 1e9:.2f}"])  # fmt: skip
    lines += table(["name", "precision", "batch", "lvdm, s", "PyTorch, s", "ratio", "of the GPU's peak", "lvdm's memory, GB"], cells)
    samplers = {row["cuda_graphs"]: row for row in bench_found.get("samplers", [])}
    steps = {row["cuda_graphs"]: row for row in bench_found.get("steps", [])}
    lines += table(["U-Net's training step, bf16", "batch", "s", "least, s"],
                   [[title, row.get("batch", NOT), number(row.get("seconds")), number(row.get("least_seconds"))]
                    for title, row in [("without graphs", steps.get(False, {})), ("with CUDA graphs", steps.get(True, {}))]])  # fmt: skip
    lines += table(["DDIM, bf16", "batch", "steps", "s", "decoded videos/s"],
                   [[title, *(row.get(key, NOT) for key in ("batch", "steps")), number(row.get("seconds")),
                     number(row.get("videos_per_second"))]
                    for title, row in [("without graphs", samplers.get(False, {})), ("with CUDA graphs", samplers.get(True, {}))]])  # fmt: skip
    trained = parts["training"]
    lines += ["## The demo's training, on packed clips", "", f"The autoencoder {trained.get('lpips', NOT)}.", ""]
    lines += table(["network", "steps", "s", "s a step", "of it waiting for data", "last loss"],
                   [[network, row.get("step", NOT), number(row.get("seconds"), 3), number(row.get("seconds_per_step"), 3),
                     number(row.get("seconds_waiting_for_data"), 3), number(row.get("loss"))]
                    for network, row in [(network, trained.get(network, {})) for network in ("autoencoder", "diffusion")]])  # fmt: skip
    lines += ["## FVD and KVD of its samples", ""]
    lines += table(["evaluation", "FVD", "KVD", "s", "of it sampling", "of"],
                   [[name, number(row.get("fvd"), 6), number(row.get("kvd"), 6), number(row.get("seconds"), 3),
                     number(row.get("sample_seconds"), 3), row.get("of", NOT)]
                    for name, row in [(name, parts["fvd"].get(name, {})) for name in ("first", "second", "without graphs")]])  # fmt: skip
    lines += ["## Training at the paper's sizes, on packed clips of noise", "",
              "The shipped experiments of UCF-101; the denoiser encodes its clips at every step. Means of the last steps.", ""]  # fmt: skip
    lines += table(["network", "steps", "s", "s a step", "of it waiting for data", "clips/s", "its checkpoint, GB"],
                   [[network, row.get("step", NOT), number(row.get("seconds"), 3), number(row.get("seconds_per_step"), 3),
                     number(row.get("seconds_waiting_for_data"), 3), number(row.get("clips_per_second"), 4),
                     number(row["checkpoint_bytes"] / 1e9, 3) if row else NOT]
                    for network, row in [(network, parts["paper"].get(network, {})) for network in ("autoencoder", "diffusion")]])  # fmt: skip
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, required=True, help="lvdm")
    parser.add_argument("--cases", type=Path, required=True, help="folder of the parity cases")
    parser.add_argument("--clips", type=Path, required=True, help="folder of the packed clips")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the weights of I3D and perhaps LPIPS")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.json and report.md")
    parser.add_argument("--tiny", action="store_true", help="small sizes: a rehearsal, no measurement")
    options = parser.parse_args()
    for key in ("program", "cases", "clips", "weights", "out"):
        setattr(options, key, getattr(options, key).resolve())
    signal.signal(signal.SIGALRM, alarm)
    machine = Machine(options)
    calls = {"doctor": doctor, "parity f32": lambda m, f: parity(m, f, "f32"), "parity bf16": lambda m, f: parity(m, f, "bf16"),
             "ten steps": ten_steps, "graphs": graphs, "bench": bench, "training": training, "fvd": fvd,
             "paper": paper}  # fmt: skip
    about = "A rehearsal with small sizes: no figure here is a measurement." if options.tiny else "Measured in one call."
    if machine.simulated:
        about += " The GPU is simulated."
    report = {"machine": "", "about": about, "tiny": options.tiny, "torch": machine.torch,
              "parts": {name: {"given": given, "status": "not run", "found": {}} for name, given in PARTS.items()}}  # fmt: skip
    for name, given in PARTS.items():
        left = ALL - (time.monotonic() - machine.start)
        part = report["parts"][name]
        if left > 5:
            begin = time.monotonic()
            machine.deadline = begin + min(given, left)
            try:
                calls[name](machine, part["found"])
                part["status"] = "done"
            except Cut:
                part["status"] = "cut: its time was over"
            except Exception as error:  # a part that fails must not take the others with it: it is told
                part["status"] = f"failed: {error}"
            part["seconds"] = time.monotonic() - begin
        print(f"gpu.py: {name}: {part['status']} ({part.get('seconds', 0):.0f} s)", flush=True)
        told = report["parts"]["doctor"]["found"].get("gpus") or [
            line[5:] for line in report["parts"]["doctor"]["found"].get("lines", []) if line.startswith("ok   GPU 0")]  # fmt: skip
        report["machine"] = told[0] if told else "a machine whose GPU has no name"
        report["seconds"] = time.monotonic() - machine.start
        # after each part, so that a call that is ended leaves what was found
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "report.json").write_text(json.dumps(report, indent=1))
        (options.out / "report.md").write_text(page(report))
    shutil.rmtree(machine.work, ignore_errors=True)
    print(f"gpu.py: {options.out / 'report.md'} after {report['seconds']:.0f} s")
    failed = [name for name, part in report["parts"].items() if part["status"].startswith(("failed", "not run"))]
    if failed:
        raise SystemExit(f"gpu.py: not done: {', '.join(failed)}")


if __name__ == "__main__":
    main()
