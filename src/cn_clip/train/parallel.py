"""One model on several processes: replicas (DDP), or sharded weights (FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from cn_clip import distributed
from cn_clip.errors import UsageError
from cn_clip.model.clip import CLIP
from cn_clip.train.model.lora import plain_state
from cn_clip.train.recipe.schema import Machine
from cn_clip.train.step import Towers
from cn_clip.translation import _

_BLOCKS = ("visual.transformer.resblocks", "bert.encoder.layer")


def pick(machine: Machine) -> torch.device:
    """Return this process's device; with several GPUs, that of its ``LOCAL_RANK``.

    Raises:
        UsageError: the device is not available.
    """
    from cn_clip.backends.torch import pick_device

    name, local_rank = machine.device, os.environ.get("LOCAL_RANK")
    uses_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    if local_rank is not None and uses_cuda:
        name = f"cuda:{local_rank}"
    return pick_device(name)


def shard(model: CLIP) -> None:
    """Shard the weights over the processes, block by block (FSDP2), in place.

    Raises:
        UsageError: there is only one process, or the image tower is not a ViT.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if distributed.world_size() == 1:
        raise UsageError(
            _("machine.parallel = fsdp shards weights over processes; start several with torchrun")
        )
    if model.config.vision.kind != "vit":
        raise UsageError(
            _(
                "machine.parallel = fsdp shards ViT towers only, not {kind}; use --parallel ddp",
                kind=model.config.vision.kind,
            )
        )
    mesh = init_device_mesh(model.logit_scale.device.type, (distributed.world_size(),))
    for name in _BLOCKS:
        for block in model.get_submodule(name).children():
            fully_shard(block, mesh=mesh)
    # A scalar cannot be sharded: every process has a copy, and its gradient is averaged.
    fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)


def wrap(towers: Towers, device: torch.device) -> nn.Module:
    """Wrap the towers in DDP, unless there is one process or FSDP averages the gradients."""
    if distributed.world_size() == 1 or is_sharded(towers):
        return towers
    return nn.parallel.DistributedDataParallel(
        towers,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def is_sharded(module: nn.Module) -> bool:
    """Return whether any weight is sharded."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def reshard(model: CLIP) -> None:
    """Reshard the weights after a forward pass without a backward pass."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def average_unsharded_gradients(towers: Towers) -> None:
    """Average the gradients that FSDP leaves out: of the logit scale and the heads."""
    if distributed.world_size() == 1 or not is_sharded(towers):
        return
    for parameter in (towers.model.logit_scale, *towers.heads.parameters()):
        if parameter.grad is not None:
            summed = distributed.all_reduce_sum(parameter.grad)
            parameter.grad.copy_(summed / distributed.world_size())


@torch.no_grad()
def average_batch_norm(model: CLIP) -> None:
    """Average the running statistics of BatchNorm over processes."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    if distributed.world_size() == 1 or not norms:
        return
    statistics = [
        x for norm in norms for x in (norm.running_mean, norm.running_var) if x is not None
    ]
    flat = distributed.all_reduce_sum(torch.cat(statistics)) / distributed.world_size()
    means = torch.split(flat, [len(x) for x in statistics])
    for own, mean in zip(statistics, means, strict=True):
        own.copy_(mean)


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> float:
    """Return the gradient norm of all parameters; clip it to ``max_norm``, if given.

    Unlike torch's function, this takes sharded and unsharded parameters together.
    """
    sharded: list[Tensor] = []
    whole: list[Tensor] = []
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            sharded.append(gradient.to_local())
        elif gradient is not None:
            whole.append(gradient)
    squared = torch.zeros((), device=parameters[0].device)
    if sharded:
        squared = distributed.all_reduce_sum(squared + _squared_norm(sharded))
    if whole:
        squared = squared + _squared_norm(whole)
    norm = float(squared.sqrt())
    if max_norm is not None and norm > max_norm:
        torch._foreach_mul_(sharded + whole, max_norm / norm)
    return norm


def _squared_norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


@torch.no_grad()
def full_state(model: CLIP) -> dict[str, Tensor]:
    """Return all weights, unsharded, under official names, on the CPU; on every process."""
    state = {}
    for name, tensor in plain_state(model).items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        state[name] = full.detach().cpu()
    return state
