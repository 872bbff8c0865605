"""FSDP2 and HSDP: parameters, gradients and moments in pieces, gathered block by block (torch `fully_shard`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from foundation.config import Config, TrainConfig
from foundation.models.initialise import Given, Piece, initialise
from foundation.training.blocks import eight_bits, on_meta, poison, prepare, units, with_features
from foundation.training.declared import declared
from foundation.training.engine import Group
from foundation.training.optim import build_optimizer, rules


class FSDP2(Group):
    """Every process holds 1 / world_size of everything; a block is whole only while it computes."""

    name = "fsdp2"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        shape = self.mesh_shape()
        names = ("replicate", "shard")[-len(shape) :]
        self.pieces = shape[-1]
        self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        self.host_mesh = (
            self.mesh if self.device.type == "cpu" else init_device_mesh("cpu", shape, mesh_dim_names=names)
        )

    def mesh_shape(self) -> tuple[int, ...]:
        """All processes in one line."""
        return (self.world_size,)

    def setup(
        self, build: Callable[[], nn.Module], given: Mapping[str, Given] | None = None
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Shard on the meta device, block by block and then the root, and only then take memory."""
        model, train = shard(on_meta(build), self.mesh, self.config.train), self.config.train
        model.to_empty(device="cpu" if train.offload else self.device)
        poison(model)
        initialise(model, self.config.seed, local_piece, given)
        return model, build_optimizer(model, rules(model, self.config.optim.weight_decay), self.config.optim)

    def autocast(self) -> AbstractContextManager[Any]:
        """Nothing: the parameters themselves are gathered in bf16."""
        return nullcontext()

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Gradients stay whole on this process until the last micro-batch scatters them."""
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        return nullcontext()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Afterwards the root is in pieces again, too, which otherwise waits for a backward pass."""
        assert isinstance(model, FSDPModule)
        with super().watching(model):
            yield
        model.reshard()

    def copies(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pieces in host memory, on a mesh of the same shape there."""

        def copy(tensor: Tensor) -> Tensor:
            assert isinstance(tensor, DTensor)
            local, place = tensor.to_local().to("cpu", copy=True), (self.host_mesh, tensor.placements)
            return DTensor.from_local(local, *place, run_check=False, shape=tensor.shape, stride=tensor.stride())

        return {name: copy(tensor) for name, tensor in tensors.items()}

    def local(self, tensor: Tensor) -> Tensor:
        """The rows that this process holds, maybe none."""
        assert isinstance(tensor, DTensor)
        return tensor.to_local()

    def whole(self, value: Tensor) -> Tensor:
        """The value behind a DTensor."""
        return value.full_tensor() if isinstance(value, DTensor) else value


class HSDP(FSDP2):
    """Spread over `train.shard_size` neighbouring processes (null: those of a node), replicated between such groups."""

    name = "hsdp"

    def mesh_shape(self) -> tuple[int, ...]:
        """Replicas, pieces; the processes form whole groups."""
        size = self.config.train.shard_size or declared().local_world_size
        return (self.world_size // size, size)


def shard(model: nn.Module, mesh: DeviceMesh, train: TrainConfig) -> nn.Module:
    """A model on the meta device in pieces, block by block and then the root, after all else that changes blocks."""
    half = train.precision == "bf16"
    options: dict[str, Any] = {
        "mesh": mesh,
        # Gradients are averaged in fp32: small ones of many processes would vanish in bf16.
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy(),
    }
    if train.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    # Nothing here changes the result of a forward pass in place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
    model = prepare(eight_bits(model, emulate=mesh.device_type == "cpu") if train.float8 else model, train)
    with_features(model)
    for unit in units(model):
        fully_shard(unit, **options)
    fully_shard(model, **options)
    return model


def local_piece(parameter: nn.Parameter) -> Piece:
    """What this process holds of a sharded parameter: whole rows, maybe none."""
    assert isinstance(parameter, DTensor)
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    local = parameter.to_local()
    return Piece(local.detach(), offset[0] * parameter.shape[1:].numel(), parameter.shape)
