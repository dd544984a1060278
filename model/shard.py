"""FSDP2: each rank keeps a part of every parameter, gradient and moment, and gathers a block's parameters to run it."""

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from kernels import Kernels
from model.gpt import GPT, ModelConfig


def build_sharded(
    config: ModelConfig, kernels: Kernels, device: torch.device, half: torch.dtype | None, ranks: int
) -> GPT:
    """Build a model that is sharded over groups of `ranks` ranks, and replicated across them if there are several.

    Its weights are those that `GPT` has after the same seed, and so is the random state; no rank ever holds the whole
    model. With `half`, parameters are gathered in that dtype, and gradients reduced in float32. Gradients are summed
    over the ranks."""
    groups = dist.get_world_size() // ranks
    shape, names = ((ranks,), ("shard",)) if groups == 1 else ((groups, ranks), ("replicate", "shard"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    with torch.device("meta"):
        model = GPT(config, kernels)
    policy = MixedPrecisionPolicy(half, torch.float32 if half else None, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # embedding, head and final norm: a tied head is the embedding
    for module in (*model.blocks, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # the sum, by one operation that Gloo has too
    for method in ("hidden", "logits"):
        register_fsdp_forward_method(model, method)
    # Of blocks and of `hidden`, which nothing changes in place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(.*\) returned a view tensor")
    model.to_empty(device=device)
    with device:
        for module in model.modules():  # what these draw where they are built on a device
            if isinstance(module, nn.Linear):
                nn.Linear(module.in_features, module.out_features, module.bias is not None)
            elif isinstance(module, nn.Embedding):
                nn.Embedding(module.num_embeddings, module.embedding_dim)
    model.init_weights()
    return model
