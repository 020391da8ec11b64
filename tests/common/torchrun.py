"""torchrun out of the wheel that LibTorch is taken from: torchrun.py FOLDER ARGUMENT...

Where LibTorch was installed for the CPU, the CUDA libraries that Python's half of the wheel is linked with are not there.
Nothing calls them without a GPU, so libraries of the same names and symbols, made once in FOLDER, stand in for them.
"""
import os, re, subprocess, sys
from collections import defaultdict
from pathlib import Path

folder, arguments = Path(sys.argv[1]), sys.argv[2:]
wheel = Path(os.environ["LIBTORCH"]).resolve().parent
PREFIXES = ("cu", "nccl", "nvrtc", "nvshmem")  # of symbols without a version


def read(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def stand_ins(libraries):
    there = {library.name for library in [*libraries, *wheel.glob("nvidia/*/lib/*")]}
    needed = {name for library in libraries for name in re.findall(r"NEEDED.*\[(.*)\]", read("readelf", "-d", library))}
    missing = sorted(name for name in needed - there if name.startswith(("libcu", "libnccl", "libnvrtc", "libnvshmem")))
    versions, symbols = defaultdict(set), defaultdict(set)
    for library in libraries if missing else []:
        for entry in re.split(r"Version: 1  File: ", read("readelf", "-VW", library))[1:]:
            versions[entry.split()[0]].update(re.findall(r"Name: (\S+)  Flags", entry))
        for line in read("nm", "-D", "--undefined-only", library).splitlines():
            name, _, version = line.split()[-1].partition("@")
            symbols[version].add(name)
    plain = {name for name in symbols[""] if name.startswith(PREFIXES)}
    for name in missing:
        own = versions[name]
        listed = {version: sorted(symbols[version]) for version in own} if own else {"": sorted(plain)}
        functions = sorted({function for list in listed.values() for function in list})
        source, script = folder / "source.c", folder / "versions"
        source.write_text("".join(f"void {function}(void) {{ __builtin_trap(); }}\n" for function in functions))
        globals = {version: "global: " + "; ".join(list) + ";" if list else "" for version, list in listed.items()}
        script.write_text("".join(f"{version} {{ {words} }};\n" for version, words in globals.items() if version))
        flags = [f"-Wl,--version-script={script}"] if own else []
        read("gcc", "-shared", "-fPIC", "-w", source, "-o", folder / name, f"-Wl,-soname,{name}", *flags)


if not folder.exists():
    folder.mkdir(parents=True)
    stand_ins(sorted((wheel / "torch/lib").glob("*.so")))
paths = [str(wheel), os.environ.get("PYTHONPATH", "")]
environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": ":".join(filter(None, paths))}
os.execve(sys.executable, [sys.executable, "-m", "torch.distributed.run", *arguments], environment)
