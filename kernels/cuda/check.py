"""Checks the machine code of every kernel on every architecture: no spills, registers within budget, the expected
tensor-core and copy instructions there. Prints the occupancy that follows. Usage: check.py NVCC"""

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
ATTENTION = ["HMMA.16816.F32.BF16", "LDGSTS", "LDSM"]
KERNELS = {
    "embed": (256, 40, 0, []),
    "rms_norm": (256, 40, 32, []),
    "layer_norm": (256, 40, 32, []),
    "rms_norm_in_place": (256, 40, 32, []),
    "activate": (256, 40, 0, ["MUFU.EX2"]),
    "to_rows": (256, 40, 0, []),
    "add_bias": (256, 40, 0, []),
    "add_scaled": (256, 40, 0, []),
    "scatter_add": (256, 40, 0, []),
    "rope_table": (128, 40, 0, []),
    "rope_write": (256, 40, 0, []),
    "merge_partitions": (128, 40, 0, ["MUFU.EX2"]),
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
    "attend_split_32": (128, 128, 30720, ATTENTION),
    "attend_split_64": (128, 168, 55296, ATTENTION),
    "attend_split_96": (128, 168, 79872, ATTENTION),
    "attend_split_128": (64, 255, 52224, ATTENTION),
    "attend_split_256": (64, 255, 101376, ATTENTION),
    "attend_shared_32": (128, 128, 15872, ATTENTION),
    "attend_shared_64": (128, 168, 30208, ATTENTION),
    "attend_shared_96": (128, 168, 44544, ATTENTION),
    "attend_shared_128": (128, 255, 58880, ATTENTION),
    "attend_shared_256": (128, 255, 99328, ATTENTION),
}
# sinf and cosf keep the words of 2 / pi for huge angles on the stack.
STACK_ALLOWED = {"rope_table"}


def output(*command):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def occupancy(arch, threads, registers, shared):
    """Blocks an SM: what its threads, registers and shared memory allow."""
    threads_max, registers_max, shared_max, reserved = SM[arch]
    a_warp = (registers * 32 + 255) // 256 * 256
    return min(threads_max // threads, registers_max // (a_warp * threads // 32), shared_max // (shared + reserved), 32)


def main(nvcc):
    cuobjdump = pathlib.Path(nvcc).parent / "cuobjdump"
    seen, wrong = set(), []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(HERE.glob("*.cu")):
            fatbin = pathlib.Path(folder) / (source.stem + ".fatbin")
            codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
            output(nvcc, "-fatbin", "-O3", "-std=c++17", "-fmad=false", *codes, "-o", fatbin, source)
            usage = output(cuobjdump, "-res-usage", fatbin)
            sass = output(cuobjdump, "-sass", fatbin)
            found = {}
            arch = None
            for line in usage.splitlines():
                if match := re.search(r"arch = sm_(\w+)", line):
                    arch = match[1]
                elif match := re.search(r"Function (\w+):", line):
                    name = match[1]
                elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
                    found[arch, name] = [int(number) for number in match.groups()]
            arch, code = None, {}
            for line in sass.splitlines():
                if match := re.search(r"arch = sm_(\w+)", line):
                    arch = match[1]
                elif match := re.search(r"Function : (\w+)", line):
                    name = match[1]
                    code[arch, name] = []
                elif arch is not None and (arch, locals().get("name")) in code:
                    code[arch, name].append(line)
            for (arch, name), (registers, stack, local) in sorted(found.items()):
                if name not in KERNELS:
                    wrong.append(f"{source.name}: {name} has no budget in check.py")
                    continue
                threads, registers_max, shared, wanted = KERNELS[name]
                seen.add((arch, name))
                if (stack or local) and name not in STACK_ALLOWED:
                    wrong.append(f"{name}, sm_{arch}: {stack} bytes of stack, {local} of local memory")
                if registers > registers_max:
                    wrong.append(f"{name}, sm_{arch}: {registers} registers, the budget is {registers_max}")
                text = "\n".join(code.get((arch, name), []))
                for instruction in wanted:
                    if instruction not in text:
                        wrong.append(f"{name}, sm_{arch}: no {instruction}")
                blocks = occupancy(arch, threads, registers, shared)
                if blocks == 0:
                    wrong.append(f"{name}, sm_{arch}: not one block fits an SM")
                print(f"sm_{arch:4} {name:20} {registers:3} registers, {shared:6} bytes shared, "
                      f"{blocks:2} blocks an SM, {blocks * threads // 32:2} warps")
    for arch in ARCHS:
        for name in KERNELS:
            if (arch, name) not in seen:
                wrong.append(f"{name}, sm_{arch}: not compiled")
    if wrong:
        sys.exit("\n".join(wrong))


main(*sys.argv[1:])
