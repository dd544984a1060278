"""The random state of dropout, which differs by rank and is kept in checkpoints."""

import hashlib
from typing import Any

import torch

from runtime.distributed import World


def seed_rank(seed: int, step: int, world: World) -> None:
    """Seed this rank's generators for the run that goes on from `step`."""
    digest = hashlib.blake2b(f"{seed} {step} {world.rank} {world.size}".encode(), digest_size=8)
    torch.manual_seed(int.from_bytes(digest.digest(), "big"))


def random_states(device: torch.device, world: World) -> dict[str, Any]:
    """The states of all ranks' generators, for a checkpoint: `rng` and `cuda_rng` are rank 0's, `rank_rng` has those of
    the others."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    main, *others = world.gather({"rng": torch.get_rng_state(), "cuda_rng": cuda})
    return main | ({"rank_rng": others} if others else {})


def restore_random_state(state: dict[str, Any], device: torch.device, world: World) -> None:
    """Restore this rank's state from the checkpoint `state`. On another number of ranks it is derived anew."""
    ranks = [state, *state.get("rank_rng", [])]
    if len(ranks) != world.size:
        seed_rank(state["config"]["seed"], state["step"], world)
        return
    torch.set_rng_state(ranks[world.rank]["rng"])
    if device.type == "cuda" and ranks[world.rank].get("cuda_rng") is not None:
        torch.cuda.set_rng_state(ranks[world.rank]["cuda_rng"], device)
