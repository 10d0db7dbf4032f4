"""One model over several processes: whole copies (DDP), or weights in shares (FSDP2)."""

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

_BLOCKS = ("visual.transformer.resblocks", "bert.encoder.layer")


def pick(machine: Machine) -> torch.device:
    """Return this process's device: with several GPUs, the one of its ``LOCAL_RANK``.

    Raises:
        UsageError: there is no such device.
    """
    from cn_clip.backends.torch import pick_device

    name, mine = machine.device, os.environ.get("LOCAL_RANK")
    if mine is not None and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        name = f"cuda:{mine}"
    return pick_device(name)


def shard(model: CLIP) -> None:
    """Share the weights among the processes, block by block (FSDP2), in place.

    Raises:
        UsageError: there is one process only, or the image tower is no ViT.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if distributed.world_size() == 1:
        raise UsageError(
            "machine.parallel = fsdp shares weights among processes; start several with torchrun"
        )
    if model.config.vision.kind != "vit":
        raise UsageError(
            f"machine.parallel = fsdp shares ViT towers only, not {model.config.vision.kind}; "
            "take --parallel ddp"
        )
    mesh = init_device_mesh(model.logit_scale.device.type, (distributed.world_size(),))
    for name in _BLOCKS:
        for block in model.get_submodule(name).children():
            fully_shard(block, mesh=mesh)
    # A scalar cannot be shared out: every process keeps its own, and its gradient is averaged.
    fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)


def wrap(towers: Towers, device: torch.device) -> nn.Module:
    """Return the towers so that gradients are averaged over the processes."""
    if distributed.world_size() == 1 or sharded(towers):
        return towers
    return nn.parallel.DistributedDataParallel(
        towers,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def sharded(module: nn.Module) -> bool:
    """Tell whether weights are in shares."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def reshard(model: CLIP) -> None:
    """Share the weights out again after a forward pass that no backward pass follows."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def average_unshared(towers: Towers) -> None:
    """Average the gradients that neither DDP nor FSDP does: of the scalar and the heads."""
    if distributed.world_size() == 1 or not sharded(towers):
        return
    for parameter in (towers.model.logit_scale, *towers.heads.parameters()):
        if parameter.grad is not None:
            summed = distributed.all_reduce_sum(parameter.grad)
            parameter.grad.copy_(summed / distributed.world_size())


@torch.no_grad()
def average_statistics(model: CLIP) -> None:
    """Average what the processes' BatchNorms have seen, so that all have one model."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    if distributed.world_size() == 1 or not norms:
        return
    seen = [x for norm in norms for x in (norm.running_mean, norm.running_var) if x is not None]
    flat = distributed.all_reduce_sum(torch.cat(seen)) / distributed.world_size()
    for mine, mean in zip(seen, torch.split(flat, [len(x) for x in seen]), strict=True):
        mine.copy_(mean)


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], most: float | None) -> float:
    """Return how long the gradient of all parameters is; shorten it to ``most``, if given.

    Weights in shares and whole ones together, which torch's own function does not take.
    """
    shares: list[Tensor] = []
    whole: list[Tensor] = []
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            shares.append(gradient.to_local())
        elif gradient is not None:
            whole.append(gradient)
    squared = torch.zeros((), device=parameters[0].device)
    if shares:
        squared = distributed.all_reduce_sum(squared + _squared_norm(shares))
    if whole:
        squared = squared + _squared_norm(whole)
    norm = float(squared.sqrt())
    if most is not None and norm > most:
        torch._foreach_mul_(shares + whole, most / norm)
    return norm


def _squared_norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


@torch.no_grad()
def whole_state(model: CLIP) -> dict[str, Tensor]:
    """Return all weights under official names, on the CPU, on every process."""
    state = {}
    for name, tensor in plain_state(model).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        state[name] = whole.detach().cpu()
    return state
