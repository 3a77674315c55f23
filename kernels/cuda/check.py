"""Checks the machine code of every kernel on every architecture: no spills, registers within budget, the expected
tensor-core and copy instructions there, and the head of each source says what its kernels take. Usage: check.py NVCC
[FOLDER...], where folders may hold what build.rs has compiled already; with --record first, it writes the heads."""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
ARCHS = ["80", "86", "89", "90a"]
# Threads and 32-bit registers an SM, bytes of shared memory an SM and what each block takes beside its own.
SM = {
    "80": (2048, 65536, 164 << 10, 1024),
    "86": (1536, 65536, 100 << 10, 1024),
    "89": (1536, 65536, 100 << 10, 1024),
    "90a": (2048, 65536, 228 << 10, 1024),
}

# kernel: (threads, registers at most, dynamic shared bytes, instructions that must be there)
KERNELS = {
    "embed": (256, 40, 0, []),
    "rms_norm": (256, 40, 32, []),
    "layer_norm": (256, 40, 32, []),
    "rms_norm_in_place": (256, 40, 32, []),
    "activate": (256, 40, 0, ["MUFU.EX2"]),
    "to_rows": (256, 40, 0, []),
    "add_bias": (256, 40, 0, []),
    "add_scaled": (256, 40, 0, []),
    "copy_columns": (256, 40, 0, []),
    "scatter_add": (256, 40, 0, []),
    "low_rank_shrink": (256, 64, 4096, ["HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32"]),
    "low_rank_grow": (256, 64, 2176, ["HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32"]),
    "rope_table": (128, 40, 0, []),
    "merge_partitions": (128, 40, 0, ["MUFU.EX2"]),
    "finish_logits": (256, 40, 0, []),
    "rank_chunks": (256, 80, 128, ["MUFU.EX2"]),
    "merge_chunks": (256, 80, 128, ["MUFU.EX2"]),
    "linear_four_1x1": (256, 64, 512, ["IMMA.16832.S8.S8"]),
    "linear_four_2x4": (256, 128, 4096, ["IMMA.16832.S8.S8"]),
    "linear_eight_1x1": (256, 64, 512, ["IMMA.16832.S8.S8"]),
    "linear_eight_2x4": (256, 128, 4096, ["IMMA.16832.S8.S8"]),
    "linear_brain_1x1": (256, 64, 512, ["HMMA.16816.F32.BF16"]),
    "linear_brain_2x4": (256, 128, 4096, ["HMMA.16816.F32.BF16"]),
    "linear_half_1x1": (256, 64, 512, ["HMMA.1688.F32.TF32"]),
    "linear_half_2x4": (256, 128, 4096, ["HMMA.1688.F32.TF32"]),
    "linear_single_1x1": (256, 128, 512, ["HMMA.1688.F32.TF32"]),
    "linear_single_2x4": (256, 128, 4096, ["HMMA.1688.F32.TF32"]),
}
# Bytes of a stage: 8 tiles of weights, 64 rows.
for name, tile, row, product in [
    ("four", 320, 56, "IMMA.16832.S8.S8"),
    ("eight", 544, 56, "IMMA.16832.S8.S8"),
    ("brain", 512, 96, "HMMA.16816.F32.BF16"),
    ("half", 512, 96, "HMMA.1688.F32.TF32"),
    ("single", 1024, 96, "HMMA.1688.F32.TF32"),
]:
    KERNELS[f"linear_{name}_staged"] = (256, 192, 4 * (8 * tile + 64 * row), [product, "LDGSTS"])
# Kind of cache: its product, bytes a number and bytes of scales a dimension of a stage.
CACHES = {
    "bf16": ("HMMA.16816.F32.BF16", 2, 0),
    "f16": ("HMMA.16816.F32", 2, 0),
    "fp8": ("HMMA.16816.F32", 1, 0),
    "int8": ("HMMA.16816.F32.BF16", 1, 2),
}
# Width of head: registers at most, warps a block of the split kernel, stages of the shared one.
WIDTHS = {32: (128, 4, 3), 64: (168, 4, 3), 96: (168, 4, 3), 128: (255, 2, 3), 256: (255, 2, 2)}
for kind, (product, size, scales) in CACHES.items():
    KERNELS[f"rope_write_{kind}"] = (256, 40, 0, [])
    for dim, (most, warps, stages) in WIDTHS.items():
        stage, wanted = 32 * (dim * size + 16) + scales * dim, [product, "LDGSTS", "LDSM"]
        KERNELS[f"attend_split_{kind}_{dim}"] = (32 * warps, most, warps * 3 * stage, wanted)
        KERNELS[f"attend_shared_{kind}_{dim}"] = (128, most, stages * stage + 256 * dim, wanted)
# sinf and cosf keep the words of 2 / pi for huge angles on the stack.
STACK_ALLOWED = {"rope_table"}


def output(*command):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def occupancy(arch, threads, registers, shared):
    """Blocks an SM: what its threads, registers and shared memory allow."""
    threads_max, registers_max, shared_max, reserved = SM[arch]
    a_warp = (registers * 32 + 255) // 256 * 256
    return min(threads_max // threads, registers_max // (a_warp * threads // 32), shared_max // (shared + reserved), 32)


RECORD = [
    "// check.py records and checks: registers, then blocks an SM, on sm_80, sm_86, sm_89 and sm_90a; bytes of dynamic",
    "// shared memory a block; threads.",
]
A_RECORD = re.compile(r"//   (\w+)((?: +\d+){10})$")


def record(found):
    """What the head of a source says about its kernels, as lines: `found` as examine() gives it."""
    names = sorted({name for _, name in found if name in KERNELS}, key=list(KERNELS).index)
    width = max(len(name) for name in names)
    lines = list(RECORD)
    for name in names:
        threads, _, shared, _ = KERNELS[name]
        registers = [found[arch, name][0] for arch in ARCHS]
        blocks = [occupancy(arch, threads, count, shared) for arch, count in zip(ARCHS, registers)]
        numbers = "".join(f"{n:4}" for n in registers) + "  " + "".join(f"{n:3}" for n in blocks)
        lines.append(f"//   {name:{width}} {numbers} {shared:7} {threads:4}")
    return lines


def recorded(text):
    """The lines of a source that record() wrote."""
    return [line for line in text.splitlines() if line in RECORD or A_RECORD.match(line)]


def write_record(source, lines):
    """Puts the lines at the end of the comment a source begins with."""
    text = [line for line in source.read_text().splitlines() if not (line in RECORD or A_RECORD.match(line))]
    end = next(i for i, line in enumerate(text) if not line.startswith("//"))
    while text[end - 1] == "//":
        del text[end - 1]
        end -= 1
    source.write_text("\n".join([*text[:end], "//", *lines, *text[end:]]) + "\n")


def compiled(nvcc, source, built, folder):
    """The fat binary build.rs made of a source as it is now, in one of the folders `built`; or one made here."""
    made_of = "".join(header.read_text() for header in sorted(HERE.glob("*.cuh"))) + "\n" + source.read_text()
    for out in map(pathlib.Path, built):
        fatbin, stamp = out / (source.stem + ".fatbin"), out / (source.stem + ".stamp")
        if fatbin.is_file() and stamp.is_file() and stamp.read_text().endswith(made_of):
            return fatbin
    fatbin = pathlib.Path(folder) / (source.stem + ".fatbin")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    output(nvcc, "-fatbin", "-O3", "-std=c++17", "-fmad=false", *codes, "-o", fatbin, source)
    return fatbin


def examine(nvcc, source, built, folder):
    """What a source's kernels take and are made of: {(arch, kernel): (registers, stack, local, machine code)}."""
    cuobjdump = pathlib.Path(nvcc).parent / "cuobjdump"
    fatbin = compiled(nvcc, source, built, folder)
    found, code, arch, name = {}, {}, None, None
    for line in output(cuobjdump, "-res-usage", fatbin).splitlines():
        if match := re.search(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\w+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            found[arch, name] = [int(number) for number in match.groups()]
    arch, name = None, None
    for line in output(cuobjdump, "-sass", fatbin).splitlines():
        if match := re.search(r"arch = sm_(\w+)", line):
            arch, name = match[1], None
        elif match := re.search(r"Function : (\w+)", line):
            name = match[1]
            code[arch, name] = []
        elif name is not None:
            code[arch, name].append(line)
    return {key: (*usage, "\n".join(code.get(key, []))) for key, usage in found.items()}


def main(*arguments):
    recording = arguments[0] == "--record"
    nvcc, *built = arguments[recording:]
    seen, wrong = set(), []
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        sources = sorted(HERE.glob("*.cu"))
        for source, found in zip(sources, threads.map(lambda source: examine(nvcc, source, built, folder), sources)):
            for (arch, name), (registers, stack, local, text) in sorted(found.items()):
                if name not in KERNELS:
                    wrong.append(f"{source.name}: {name} has no budget in check.py")
                    continue
                threads_a_block, registers_max, shared, wanted = KERNELS[name]
                seen.add((arch, name))
                if (stack or local) and name not in STACK_ALLOWED:
                    wrong.append(f"{name}, sm_{arch}: {stack} bytes of stack, {local} of local memory")
                if registers > registers_max:
                    wrong.append(f"{name}, sm_{arch}: {registers} registers, the budget is {registers_max}")
                for instruction in wanted:
                    if instruction not in text:
                        wrong.append(f"{name}, sm_{arch}: no {instruction}")
                blocks = occupancy(arch, threads_a_block, registers, shared)
                if blocks == 0:
                    wrong.append(f"{name}, sm_{arch}: not one block fits an SM")
                print(f"sm_{arch:4} {name:24} {registers:3} registers, {shared:6} bytes shared, "
                      f"{blocks:2} blocks an SM, {blocks * threads_a_block // 32:2} warps")
            lines = record(found)
            if recording:
                write_record(source, lines)
            elif recorded(source.read_text()) != lines:
                wrong.append(f"{source.name}: its head does not say what the compiler does; "
                             "kernels/cuda/check.py --record NVCC writes it")
    for arch in ARCHS:
        for name in KERNELS:
            if (arch, name) not in seen:
                wrong.append(f"{name}, sm_{arch}: not compiled")
    if wrong:
        sys.exit("\n".join(wrong))


main(*sys.argv[1:])
