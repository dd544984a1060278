"""What the tensor cores of an H100 would do in a kernel's loops, estimated from its machine code.

A multiprocessor has four schedulers, each with pipes of its own, and an instruction of a warp holds its pipe for some
cycles. An iteration is taken to last as long as the tensor core, the fullest other pipe and the latencies, one after
the other. What other warps do meanwhile is not counted: those of a block wait for one another in every iteration.

Plain Triton's attention on an H100 reaches 0.82 to 0.97 of this, so that it is right to 20%: it rejects a kernel whose
mask, softmax or spills cost as much as its products, and does not say which of two within 15% is the faster.

Cycles: CUDA C++ Programming Guide, "Arithmetic Instructions", throughput for compute capability 9.0: 32 lanes over the
results a clock of a scheduler, a quarter of a multiprocessor's. Shared memory moves 128 bytes a clock for all four.
"""

import re
from collections import Counter

INSTRUCTION = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)"  # a line of nvdisasm's, and the name in it
CLOCK, MULTIPROCESSORS = 1.755e9, 132  # Hz; an H100 SXM
LATENCY = 120  # cycles: a barrier, the shuffles of a reduction, the end of a product
CYCLES = {
    name: (pipe, cycles)
    for pipe, cycles, names in [
        ("float", 1, "FFMA FMUL FADD HFMA2 HMUL2 HADD2"),
        ("float", 2, "IMAD"),
        (
            "integer",
            2,
            "FMNMX FSETP FSEL ISETP SEL LOP3 PLOP3 IADD3 VIADD IMNMX VIMNMX LEA SHF PRMT F2FP I2FP MOV IABS",
        ),
        ("special", 8, "MUFU"),
        ("memory", 4, "SHFL LDS STS LDSM STSM LDG STG LDGSTS LDL STL ATOMG RED"),
    ]
    for name in names.split()
}
WORDS = {"64": 2, "2": 2, "128": 4, "4": 4}  # in a memory instruction's name: bits a lane, or 8x8 matrices


def is_serialized(code: str) -> bool:
    """Whether a kernel waits for its HGMMAs one by one, as ptxas makes it where registers do not suffice.

    Products into the same registers are the steps of one `tl.dot`, to be issued back to back with a wait at their end.
    """
    chained = waiting = 0
    into, waits = None, False
    for name, operands in re.findall(rf"{INSTRUCTION}(.*)", code, re.MULTILINE):
        if name.startswith("WARPGROUP.DEPBAR"):
            waits = True
        elif name.startswith("HGMMA"):
            target = operands.split(",")[0].strip()
            chained += target == into
            waiting += target == into and waits
            into, waits = target, False
    return waiting > chained / 2


def tensor_tflops(code: str) -> float:
    """TFLOP/s of the best loop of an sm_90 listing (`nvdisasm -c -ndf`), the one that does the bulk; 0 without any."""
    rates = []
    for loop in _loops(code):
        tensor, flops, others = 0.0, 0, Counter(issue=len(loop))
        for name in loop:
            kind, *words = name.split(".")
            if kind == "HGMMA":  # by a warpgroup, one warp on each scheduler
                m, n, k = map(int, words[0].split("x"))
                tensor += n / 2
                flops += 2 * m * n * k
            elif kind in CYCLES:
                pipe, cycles = CYCLES[kind]
                others[pipe] += cycles * max((WORDS.get(word, 1) for word in words), default=1)
        rates.append(flops / (tensor + max(others.values()) + LATENCY))
    return max(rates, default=0.0) * CLOCK * MULTIPROCESSORS / 1e12


def _loops(code: str) -> list[list[str]]:
    """The innermost loops that multiply, as names of instructions: from a label to a branch back to it.

    Code out of line, beyond the kernel's EXIT, branches back too, and is no loop.
    """
    names, labels, loops, latest = [], {}, [], -1
    for label, name, operands in re.findall(rf"^(\.\w+):|{INSTRUCTION}(.*)", code, re.MULTILINE):
        if label:
            labels[label] = len(names)
            continue
        names.append(name)
        target = re.search(r"\((\.\w+)\)", operands)
        if name.partition(".")[0] != "BRA" or not target or target[1] not in labels:
            continue
        start = labels[target[1]]
        loop = names[start:]
        # A loop that ended before and began later is inside this one.
        if start > latest and "EXIT" not in loop and any(name.startswith("HGMMA") for name in loop):
            loops.append(loop)
            latest = start
    return loops
