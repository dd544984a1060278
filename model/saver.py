"""Writing a run's checkpoints in a thread while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from model import checkpoint
from model.tensors import is_sharded, local
from runtime.distributed import ALONE, NO_LIMIT, REPORT_S, World
from runtime.phase import phase

if TYPE_CHECKING:
    from torch.distributed.tensor import DeviceMesh, DTensor


class Saver:
    """Writes the checkpoints of a run in a thread, one at a time, while training goes on.

    The thread writes a copy of the state, which is kept in host memory and written over by the next save. For a GPU it
    is pinned, which torch rounds up to powers of two, and copied on a stream of its own. As a context, a saver waits
    for its thread at the end."""

    def __init__(self, folder: Path, device: torch.device, world: World = ALONE, sharded: bool = False):
        """A saver of `folder/last.pt`, for a state on `device` or the CPU. Rank 0 writes it; if the model is `sharded`,
        all ranks of `world` write their parts, and have to call the same methods."""
        self.folder, self.world, self.is_idle = folder, world, not (world.is_main or sharded)
        self.group = dist.new_group(backend="gloo", timeout=NO_LIMIT) if sharded else None
        self.host_mesh: DeviceMesh | None = None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: dict[tuple, Tensor] = {}
        self.thread = ThreadPoolExecutor(1)
        self.newest: Future = Future()  # of the thread's tasks
        self.newest.set_result(None)

    @phase("checkpoint")
    def save(self, state: dict[str, Any]) -> None:
        """Copy `state` and begin to write it as `checkpoint.save` does, after waiting for the save before,
        whose error is raised.

        On a GPU only copying begins: `before_update` is to be called before any tensor of `state` changes."""
        if self.is_idle:
            return
        self.wait()
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            copies: dict[tuple, Tensor] = {}
            copy = checkpoint.map_tensors(lambda name, x: self._copy(name, x, copies), state)
        self._then(self._write, copy)

    def before_update(self) -> None:
        """Make the GPU finish copying before it runs what is launched from here on. Does nothing on a CPU."""
        if self.stream:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def mark_best(self) -> None:
        """Keep the newest checkpoint as `best.pt` too, once it is written."""
        if self.world.is_main:
            self._then(checkpoint.mark_best, self.folder)

    def check(self) -> None:
        """Raise the error of the thread if it has failed."""
        if self.newest.done():
            self.newest.result()

    def wait(self) -> None:
        """Wait until all is written. Raises the error of the thread: `WriteError`, as in `checkpoint.save`."""
        self.newest.result()

    def settle(self) -> None:
        """Wait until the thread is idle, whether it has failed or not. A sharded checkpoint may need a rank that has
        died, so the wait for one has a limit."""
        wait([self.newest], REPORT_S if self.group else None)

    def _then(self, task: Callable[..., None], *args: Any) -> None:
        """Give the thread a task, which fails if the one before it has failed."""

        def run(before: Future = self.newest) -> None:
            before.result()
            task(*args)

        self.newest = self.thread.submit(run)

    def _copy(self, name: str, value: Tensor, copies: dict[tuple, Tensor]) -> Tensor:
        """Copy a tensor to host memory, or this rank's part of it. Those at one address, such as tied weights, are
        copied once into `copies`."""
        if value.is_meta:
            return value
        part = local(value)
        source = part.data_ptr(), part.shape, part.stride(), part.dtype
        if source not in copies:
            key = name, part.shape, part.dtype
            if key not in self.buffers:
                pin = self.stream is not None
                self.buffers[key] = torch.empty(part.shape, dtype=part.dtype, device="cpu", pin_memory=pin)
            copies[source] = self.buffers[key].copy_(part, non_blocking=True)
        return self._on_host(copies[source], value) if is_sharded(value) else copies[source]

    def _on_host(self, part: Tensor, value: "DTensor") -> "DTensor":
        """The DTensor `value` in host memory, with `part` as this rank's."""
        from torch.distributed.tensor import DeviceMesh, DTensor

        if self.host_mesh is None:
            mesh = value.device_mesh
            self.host_mesh = mesh if value.is_cpu else DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        options = {"run_check": False, "shape": value.shape, "stride": value.stride()}
        return DTensor.from_local(part, self.host_mesh, value.placements, **options)

    def _write(self, state: dict[str, Any]) -> None:
        if self.stream:
            self.stream.synchronize()
        if self.group is None:
            checkpoint.save(self.folder, state)
        else:
            self._write_sharded(state)

    def _write_sharded(self, state: dict[str, Any]) -> None:
        """Write the shards, and then `last.pt`, which names them."""
        from model import shards

        parts = {part: state[part] for part in checkpoint.SHARDED}
        tensors = checkpoint.stored_tensors(parts, state["model_config"])
        written = shards.write(self.folder, state["step"], tensors, self.group)
        failure = None
        if self.world.is_main:
            meta = checkpoint.map_tensors(lambda name, x: torch.empty(x.shape, dtype=x.dtype, device="meta"), parts)
            try:
                checkpoint.save(self.folder, state | meta | {"shards": written})
                shards.clean(self.folder, {checkpoint.shards_folder(path) for path in self.folder.glob("*.pt")})
            except OSError as error:
                failure = error
        box = [failure]
        dist.broadcast_object_list(box, group_src=0, group=self.group)
        if box[0]:
            raise box[0]

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Wait for the thread. Its error is raised, or noted on another `error` that ended the run."""
        self.thread.shutdown()
        failure = self.newest.exception()
        if failure and error is None:
            raise failure
        if failure and failure is not error:
            error.add_note(str(failure))
