"""Profile a few training steps: `--profile=STEP[:N]`.

The run's folder gets, in `profile/`:

    step-100.trace.json.gz   the trace, for https://ui.perfetto.dev or chrome://tracing
    step-100.memory.pickle   on a GPU the allocations of the step before, for https://docs.pytorch.org/memory_viz
    step-100.txt             the table below, which is also printed

The table has the time of a step by op and phase. On a GPU it is the time of kernels, and the idle time of the GPU by
what the host did meanwhile. On a CPU it is the time of the main thread. Bytes and FLOPs per second are the least work
of an op (`Cost` in kernels/spec.py) over its time.

An op is found by the label around the call of its kernel, and in the backward pass by autograd's sequence numbers. What
a CUDA graph replays has neither and is found by the names of kernels.
"""

import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, record_function

from runtime.config import ConfigError
from runtime.files import replacing, write_atomically

N_STEPS = 3  # steps to profile by default
STEP = "step"  # label of a whole step
PASSES = ("forward", "backward", "forward+backward", "optimizer")  # phases whose ops the table tells apart
REPLAYED = PASSES[2]  # phase of a kernel in a CUDA graph whose name tells no more
PHASES = {"data": "data wait", "logging": "logging", "checkpoint": "checkpoint", "evaluation": "evaluation",
          "sample": "sample"}  # fmt: skip
LOOP = "loop"  # row of what is in no phase

MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear", "aten::_addmm"}
COMPILED = re.compile(r"^(Torch-Compiled Region|CompiledFunction|triton_(poi|red|per|tem)_|graph_\d+_)")  # Inductor's
KERNELS = {  # kernels of libraries, by op
    "communication": re.compile("^(nccl|rccl)", re.IGNORECASE),
    "attention": re.compile("flash|fmha|mha_|attention|sdpa", re.IGNORECASE),
    "matmul": re.compile("gemm|cutlass|nvjet|xmma|cublas|cijk", re.IGNORECASE),  # cijk: hipBLASLt's
    "torch.compile": COMPILED,
}
BACKWARD_NODE = "autograd::engine::evaluate_function"


class Work(Protocol):
    """Least work of an op in a step."""

    bytes: int
    flops: int


class Ops(Protocol):
    """The ops of a step."""

    def kernels(self) -> Mapping[str, str]:
        """The op of each kernel of ours, by the kernel's name."""

    def labels(self) -> AbstractContextManager:
        """A context in which calls of ops are labelled."""

    def costs(self, labelled: bool) -> Mapping[str, Work]:
        """Work of a step by op, as labels tell ops apart, or as names of kernels do."""


def parse_window(text: str) -> tuple[int, int]:
    """The first step and the number of steps of `STEP` or `STEP:N`; zeros for no text. Raises `ConfigError`."""
    if not text:
        return 0, 0
    match = re.fullmatch(r"([1-9][0-9]{0,17})(?::([1-9][0-9]{0,3}))?", text)
    if match is None:
        raise ConfigError(f"profile must be a step such as 100, or 100:5 for five steps from there on, not {text!r}")
    return int(match[1]), int(match[2] or N_STEPS)


class Profiler:
    """Profiles the steps of the loop within its context that `window` asks for, if it is not empty.

    What the steps compute stays the same to the bit."""

    def __init__(self, window: str, folder: Path, device: torch.device, ops: Ops, say: Callable[[str], None]):
        """`folder` is the run's; `say` prints a line."""
        self.folder, self.device, self.ops, self.say = folder / "profile", device, ops, say
        self.steps = self._steps(*parse_window(window)) if window else None

    def __enter__(self) -> "Profiler":
        if self.steps:
            next(self.steps)
        return self

    def __exit__(self, kind: type | None, *error: Any) -> None:
        if self.steps:
            if kind is None:
                self.step(None)
            self.steps.close()

    def step(self, number: int | None) -> None:
        """Call at the start of step `number`, and so at the end of the one before. None: there is none."""
        if self.steps:
            with suppress(StopIteration):
                self.steps.send(number)

    def _steps(self, first: int, n_steps: int) -> Generator[None, int | None, None]:
        """Takes the number of each step when it starts, and None when there is none."""
        number = yield
        while number is not None and number < first - 1:
            number = yield
        if number is None or number > first:
            return self._say_none(first)
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no lines of its own
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        profile = torch.profiler.profile(activities=activities, acc_events=True)
        profile.prepare_trace()
        self._record_memory()
        if number == first - 1:  # the step before warms up the profiler
            number = yield
            self._save_memory(first)
            if number is None:
                return self._say_none(first)
        self._synchronize()  # so that the trace has the kernels of its steps, and of no other
        taken = 0
        with self.ops.labels():
            profile.start_trace()
            try:
                while number is not None and taken < n_steps:
                    with record_function(STEP):
                        number = yield
                    self._save_memory(first)
                    taken += 1
                self._synchronize()
            finally:
                profile.stop_trace()
        self._write(profile, first)
        while number is not None:
            number = yield

    def _say_none(self, first: int) -> None:
        self.say(f"profile  none: step {first} is not among the steps of this process")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _record_memory(self) -> None:
        self.recording_memory = self.device.type == "cuda"
        if self.recording_memory:
            torch.cuda.memory._record_memory_history(max_entries=200_000)

    def _save_memory(self, first: int) -> None:
        """Write the snapshot of memory, once."""
        if self.recording_memory:
            self.recording_memory = False
            with self._saying_if_lost():
                self.folder.mkdir(exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(self.folder / f"step-{first}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, profile: torch.profiler.profile, first: int) -> None:
        with self._saying_if_lost():
            self.folder.mkdir(exist_ok=True)
            path = self.folder / f"step-{first}.trace.json.gz"
            with replacing(path) as partial:
                plain = partial.with_name(f"{partial.name}.json")
                try:
                    profile.export_chrome_trace(str(plain))
                    trace = plain.read_bytes()
                finally:
                    plain.unlink(missing_ok=True)
                partial.write_bytes(gzip.compress(trace, compresslevel=6))
            table = Table.of(json.loads(trace)["traceEvents"], self.ops)
            lines = table.lines(f"step {first}" + (f" to {first + table.n_steps - 1}" if table.n_steps > 1 else ""))
            write_atomically(path.with_name(f"step-{first}.txt"), "\n".join(lines) + "\n")
            for line in lines:
                self.say(f"profile  {line}")
            self.say(f"profile  {path} is for https://ui.perfetto.dev")

    @contextmanager
    def _saying_if_lost(self) -> Iterator[None]:
        """A run goes on without its profile."""
        try:
            yield
        except OSError as error:
            self.say(f"profile  is lost: {error}")


@dataclass(slots=True)
class Span:
    """An event of the host in a trace: an operator, a label or a call of the runtime. Times are in microseconds."""

    name: str
    kind: str
    thread: int
    start: float
    end: float
    args: Mapping[str, Any]
    parent: "Span | None" = None
    children: float = 0.0  # time of its direct children

    def chain(self) -> Iterator["Span"]:
        """The span, and what it is in, from the inside out."""
        span: Span | None = self
        while span is not None:
            yield span
            span = span.parent


def host_spans(events: Iterable[Mapping[str, Any]]) -> list[Span]:
    """The host's spans of a trace, by start, each with the one that it is directly in."""
    spans = [
        Span(e["name"], e["cat"], e["tid"], e["ts"], e["ts"] + e["dur"], e.get("args", {}))
        for e in events
        if e.get("ph") == "X" and e["cat"].endswith(("cpu_op", "user_annotation", "_runtime", "_driver"))
        if not e["cat"].startswith("gpu_")
    ]
    spans.sort(key=lambda span: (span.start, -span.end))
    open_spans: dict[int, list[Span]] = {}
    for span in spans:
        stack = open_spans.setdefault(span.thread, [])
        while stack and stack[-1].end <= span.start:
            stack.pop()
        if stack:
            span.parent = stack[-1]
            span.parent.children += span.end - span.start
        stack.append(span)
    return spans


class Attribution:
    """Tells the op and phase of spans and kernels."""

    def __init__(self, spans: Iterable[Span], kernels: Mapping[str, str], ops: Container[str]):
        self.kernels, self.ops = kernels, ops
        self.nodes: dict[int, str] = {}  # op by sequence number of an autograd node
        self.main = next(span.thread for span in spans if span.name == STEP)
        self.labelled = False  # whether a forward pass has labels of ops
        for span in spans:
            if (number := span.args.get("Sequence number", -1)) >= 0 and not span.args.get("Fwd thread id"):
                # The number is that of the next node, so the last operator to have it made the node.
                self.nodes[number] = self._label(span)
            self.labelled |= span.name in ops and span.kind == "user_annotation" and self.phase(span) == "forward"

    def _label(self, span: Span) -> str:
        for outer in span.chain():
            if outer.kind == "user_annotation":
                if outer.name in self.ops:
                    return outer.name
                if match := re.fullmatch(r"Optimizer\.step#(\w+)\.step", outer.name):
                    return match[1].lower()
            elif outer.name.startswith(BACKWARD_NODE) and (
                op := self.nodes.get(outer.args.get("Sequence number", -1), "")
            ):
                return op
        return ""

    def op(self, span: Span) -> str:
        """The op that a span is part of; "other" if it is unknown."""
        if label := self._label(span):
            return label
        for outer in span.chain():
            if outer.name in MATMULS:
                return "matmul"
            if "scaled_dot_product" in outer.name:
                return "attention"
            if COMPILED.match(outer.name):
                return "torch.compile"
        return "other"

    def phase(self, span: Span) -> str:
        """The phase that a span is part of; `LOOP` if none."""
        for outer in span.chain():
            if outer.kind == "user_annotation" and (outer.name in PASSES or outer.name in PHASES):
                return outer.name
            if outer.name.startswith(BACKWARD_NODE):  # in autograd's thread of a GPU
                return "backward"
        return LOOP

    def of_kernel(self, name: str, launch: Span | None) -> tuple[str, str]:
        """Op and phase of a kernel that was launched by `launch`."""
        op, where = ("other", LOOP) if launch is None else (self.op(launch), self.phase(launch))
        if op == "other" or KERNELS["communication"].search(name):  # which the ops of a backward or an update launch
            op = self.kernels.get(name) or next((op for op, kind in KERNELS.items() if kind.search(name)), "other")
        if where == LOOP and launch is not None and is_replay(launch):
            where = "forward" if "_fwd_" in name else "backward" if "_bwd_" in name else REPLAYED
        return op, where


def is_replay(span: Span) -> bool:
    """Whether a call of the runtime launches a graph."""
    return "GraphLaunch" in span.name


@dataclass(frozen=True)
class Table:
    """Time of a step in seconds by (row, phase), and the work of a step by row.

    A row is an op in a phase of `PASSES`, and another phase as a whole."""

    n_steps: int
    seconds: float
    times: Mapping[tuple[str, str], float]
    work: Mapping[str, Work]
    on_gpu: bool
    replays: bool
    compiled: bool

    @classmethod
    def of(cls, events: list[Mapping[str, Any]], ops: Ops) -> "Table":
        """The table of the events of a Chrome trace."""
        spans = host_spans(events)
        steps = [span for span in spans if span.name == STEP and span.kind == "user_annotation"]
        found = Attribution(spans, ops.kernels(), ops.costs(True).keys())
        gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        times = Counter()
        begin, end = steps[0].start, steps[-1].end
        if gpu:
            launches = {s.args["correlation"]: s for s in spans if "correlation" in s.args}
            for e in gpu:
                op, where = found.of_kernel(e["name"], launches.get(e.get("args", {}).get("correlation")))
                times[_row(op, where)] += e["dur"]
            busy = sorted((e["ts"], e["ts"] + e["dur"]) for e in gpu)
            end = max(end, busy[-1][1])
            times += _idle(busy, begin, end, [s for s in spans if s.thread == found.main], found)
        else:
            for span in spans:
                if span.thread == found.main and begin <= span.start < end:
                    is_python = span.name == STEP or found.phase(span) == span.name
                    row = _row("python" if is_python else found.op(span), found.phase(span))
                    times[row] += span.end - span.start - span.children
        n_steps = len(steps)
        return cls(
            n_steps,
            (end - begin) / n_steps / 1e6,
            {key: time / n_steps / 1e6 for key, time in times.items()},
            ops.costs(found.labelled),
            on_gpu=bool(gpu),
            replays=any(map(is_replay, spans)),
            compiled=any(COMPILED.match(span.name) for span in spans),
        )

    def total(self, row: str) -> float:
        """Seconds of a row."""
        return sum(time for (name, _), time in self.times.items() if name == row)

    def rate_seconds(self, row: str) -> float:
        """Seconds in which the work of a row was done."""
        passes = sum(self.times.get((row, where), 0.0) for where in PASSES[:3])
        return passes or self.times.get((row, "optimizer"), 0.0)

    def lines(self, title: str) -> list[str]:
        """The table and the advice as text."""
        shown = [where for where in PASSES if any(key[1] == where for key in self.times)]
        what = "kernels of the GPU" if self.on_gpu else "main thread of the host"
        head = "".join(f"{where:>{max(10, len(where) + 2)}}" for where in (*shown, "total", "share"))
        lines = [f"{title}: {1e3 * self.seconds:,.2f} ms a step under the profiler; ms by op and phase, {what}"]
        lines.append(f"{'':22}{head}{'GB/s':>10}{'TFLOP/s':>10}")
        for row in sorted({row for row, _ in self.times}, key=self.total, reverse=True):
            cells = [self.times.get((row, where), 0.0) for where in shown]
            text = "".join(
                f"{f'{1e3 * cell:,.3f}' if cell else '':>{max(10, len(where) + 2)}}"
                for where, cell in zip(shown, cells, strict=True)
            )
            text = f"{row:22}{text}{1e3 * self.total(row):>10,.3f}{self.total(row) / self.seconds:>10.1%}"
            if (work := self.work.get(row)) and (seconds := self.rate_seconds(row)):
                text += f"{work.bytes / seconds / 1e9:>10,.1f}{work.flops / seconds / 1e12:>10.3g}"
            lines.append(text)
        return [*lines, self.advice()]

    def advice(self) -> str:
        """One sentence on where the time goes and what would change it."""
        share = {row: self.total(row) / self.seconds for row, _ in self.times}
        if share.get("data wait", 0) > 0.1:
            return f"data wait is {share['data wait']:.0%} of the step: reading text is slower than training on it"
        for row, option in (("evaluation", "eval_every"), ("sample", "sample_every"), ("checkpoint", "save_every")):
            if share.get(row, 0) > 0.3:
                return f"{row} is {share[row]:.0%} of these steps: profile others, or raise {option}"
        if (gaps := share.get("launch gaps", 0)) > 0.15:
            change = "a larger micro_batch" if self.replays or self.compiled else "--capture=on"
            return f"launch gaps are {gaps:.0%} of the step, in which the GPU waits for the host: {change} would help"
        if (python := share.get("python", 0)) > 0.25:
            change = "a larger micro_batch" if self.compiled else "--compile=on, or a larger micro_batch,"
            return f"python is {python:.0%} of the step: {change} would help"
        ops = {row: value for row, value in share.items() if any((row, where) in self.times for where in PASSES)}
        most = max(ops, key=ops.get)
        return f"{most} takes {ops[most]:.0%} of the step" + ADVICE.get(most, "")


ADVICE = {  # by op, what makes its time shorter
    "attention": ": a model.window or a shorter model.seq_len would cut it",
    "linear_cross_entropy": ": a smaller vocabulary would cut it",
    "matmul": ", and these products are the work of the model itself",
    "adamw": ": a larger batch_size has fewer of its updates per token",
    "muon": ": a larger batch_size has fewer of its updates per token",
    "other": ": --compile=on would fuse such small operators",
}


def _row(op: str, where: str) -> tuple[str, str]:
    """The key in `Table.times` of an op in a phase."""
    return (op, where) if where in PASSES else (PHASES.get(where, LOOP), "")


def _idle(
    busy: list[tuple[float, float]], begin: float, end: float, host: list[Span], found: Attribution
) -> Counter[tuple[str, str]]:
    """Idle time of the GPU between `begin` and `end`, by what the host did: its phases are not nested."""
    gaps, last = [], begin
    for start, stop in busy:
        if start > last:
            gaps.append((last, start))
        last = max(last, stop)
    gaps.append((last, end)) if end > last else None
    phases = [s for s in host if s.kind == "user_annotation" and (s.name in PASSES or s.name in PHASES)]
    idle: Counter[tuple[str, str]] = Counter()
    i = 0
    for start, stop in gaps:
        rest = stop - start
        while i < len(phases) and phases[i].end <= start:
            i += 1
        for span in phases[i:]:
            if span.start >= stop:
                break
            overlap = min(stop, span.end) - max(start, span.start)
            if overlap > 0:
                idle[_row("launch gaps", span.name)] += overlap
                rest -= overlap
        idle[("launch gaps", "")] += max(rest, 0.0)
    return idle
