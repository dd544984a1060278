"""The micro-batch: how many sequences a forward and backward pass takes.

`--micro_batch=auto` takes the largest that fits the GPU's free memory: model/memory.py predicts it, and a trial pass
confirms it. If a step is out of memory nevertheless, it is begun anew with half as many sequences. Until its update a
step changes no parameter; its gradients are reset, and the random states restored. So the batch stays as it is, and the
loss is that of the large micro-batch up to rounding.
"""

from collections.abc import Callable
from typing import Literal

import torch

from data.batches import micro_batch_size
from model.memory import USABLE, Setup, largest_fit, predict
from runtime.distributed import ALONE, World
from runtime.hardware import HardwareError, check_memory, free_memory, largest_micro_batch, out_of_memory


class MicroBatch:
    """The micro-batch of a run: `size` sequences, which divide the batch. `auto`: whether it may change."""

    def __init__(
        self,
        asked: int | Literal["auto"],
        batch_size: int,
        known: int,
        setup: Setup,
        device: torch.device,
        world: World = ALONE,
    ):
        """`asked` and `batch_size` are options; 0 asks for all sequences of a rank. `known` is the size that an earlier
        process of the run ended with, 0 if there is none. `setup` decides the memory of the run's step, of which
        nothing is on the device yet.

        Raises `DataError` for a batch that the ranks cannot share, and `HardwareError` for a model or a batch that does
        not fit."""
        self.auto, self.device, self.world = asked == "auto", device, world
        self.size = micro_batch_size(batch_size, asked, world.size)
        self.share, self.setup, self.planned = batch_size // world.size, setup, False
        self.limit = int(USABLE * free_memory(device)) if device.type == "cuda" else 0
        if self.auto and known and self.share % known == 0:
            self.size = known
        elif self.auto and device.type == "cuda":
            self.size, self.planned = 1, True
        shape = setup.shape
        activations = shape.n_layer * shape.d_model  # per token: what every model keeps for the backward pass
        check_memory(device, shape.n_parameters() // setup.shards, activations, shape.seq_len, batch_size, self.size)
        if self.planned:
            self.size = min(world.gather(largest_fit(setup, self.share, self.limit)))
        if not self.size:
            least = predict(setup, 1, accumulates=self.share > 1).peak
            raise HardwareError(
                f"a micro-batch of one sequence takes {least / 1e9:.1f} GB, and {self.limit / 1e9:.1f} GB of the GPU's "
                "memory are free for tensors: lower model.n_layer, model.d_model, the vocabulary or model.seq_len, "
                "raise model.recompute, or end what else runs on the GPU"
            )

    def __str__(self) -> str:
        ranks = f" on each of {self.world.size} ranks" if self.world.size > 1 else ""
        return f"{self.share:,} sequences in micro-batches of {self.size:,}{' (auto)' if self.auto else ''}{ranks}"

    @property
    def smaller(self) -> int:
        """At most half as many sequences; 0 if there are no fewer."""
        return largest_micro_batch(self.share, self.size // 2)

    def confirm(self, allocate: Callable[[], None], passes: Callable[[], None]) -> None:
        """If `size` was planned, try forward and backward `passes`, on inputs that `allocate` makes for another size.

        A size that takes more memory than it was planned for is halved, and so is one that does not fit, on any rank.
        """
        while self.planned:
            tried = self.size
            torch.cuda.reset_peak_memory_stats(self.device)
            with torch.random.fork_rng([self.device]):
                fitted = self._halved_if_short(passes)
            if fitted and torch.cuda.max_memory_allocated(self.device) > self.limit:
                self.size = self.smaller or self.size
            self.size = min(self.world.gather(self.size))
            if self.size == tried:
                return
            allocate()

    def attempt(self, passes: Callable[[], None]) -> bool:
        """Run the forward and backward passes of a step. Raises their error, but for a lack of memory if `size` may be
        halved: then it is, the random states are those of before, and this is False.

        Of several ranks the others would wait for the one whose memory does not suffice, so there it is an error."""
        if self.auto and self.world.size == 1:
            return self._halved_if_short(passes)
        try:
            passes()
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error) and self.smaller:
                error.add_note(f"--micro_batch={self._advice()}")
            raise
        return True

    def _advice(self) -> str:
        """A smaller micro-batch for the user, which fits a GPU by its plan."""
        fits = min(self.smaller, largest_fit(self.setup, self.share, self.limit)) if self.limit else 0
        return f"{fits} fits" if fits else f"{self.smaller} needs less memory"

    def _halved_if_short(self, passes: Callable[[], None]) -> bool:
        gpu = self.device.type == "cuda"
        rng = torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if gpu else None
        stream = torch.cuda.current_stream(self.device) if gpu else None
        try:
            passes()
            return True
        except (RuntimeError, MemoryError) as error:
            if not (self.smaller and out_of_memory(error)):
                raise
        # Here the error is gone, and with it the tensors of the frames that it went through.
        self.size = self.smaller
        torch.set_rng_state(rng[0])
        if gpu:
            torch.cuda.set_stream(stream)  # a capture that fails may leave its own as the current one
            torch.cuda.set_rng_state(rng[1], self.device)
        return False
