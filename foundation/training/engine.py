"""The one seam between the run and the machines it runs on.

This file knows one process, groups of processes and replicas (DDP); `sharded.py` knows FSDP2, `zero.py` DeepSpeed.
Nothing else of the trainer imports torch.distributed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from foundation.config import Config
from foundation.errors import LaunchError
from foundation.models.initialise import Given, initialise
from foundation.training.average import Average, followed, trained
from foundation.training.blocks import on_meta, poison, prepare, with_features
from foundation.training.declared import declared
from foundation.training.optim import MOMENTS, build_optimizer, direction_square, rules, schedule
from foundation.training.ranks import ALONE, Ranks

JOIN = timedelta(minutes=10)  # until all processes of a run have met
LONG = timedelta(minutes=30)  # of a collective: the first ones wait for compilers and slow disks


class Engine:
    """One process that trains alone; the other engines change what they must."""

    name = "single"
    pieces = 1  # processes that one copy of the moments is spread over

    def __init__(self, config: Config) -> None:
        self.config = config
        self.rank, self.local_rank, self.world_size = 0, 0, 1
        self._followed: tuple[list[Tensor], list[Tensor]] | None = None
        cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")  # launch/accelerate/cpu.yaml
        self.device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")

    def setup(
        self, build: Callable[[], nn.Module], given: Mapping[str, Given] | None = None
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model as this engine trains it, with its initial weights, drawn or `given` by name, and the optimiser."""
        model = with_features(prepare(on_meta(build), self.config.train)).to_empty(device=self.device)
        poison(model)
        initialise(model, self.config.seed, given=given)
        optimizer = build_optimizer(model, rules(model, self.config.optim.weight_decay), self.config.optim)
        return model, optimizer

    def autocast(self) -> AbstractContextManager[Any]:
        """Around the forward pass: the arithmetic of `train.precision`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: gradients meet across processes only on the `last` one."""
        return nullcontext()

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        """Add the gradients of a loss; over processes they become means."""
        loss.backward()

    def update(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, weight_decay: float | None = None
    ) -> Tensor:
        """Clip, step at this learning rate (and weight decay, where it changes) and drop the gradients.

        Returns the norm of the gradient of the global batch before clipping, on the device. When it is not finite,
        weights, moments and their number of steps stay as they are.
        """
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if (
            limit := self.config.optim.grad_clip
        ) is not None:  # a factor of 1 would pass over all gradients for nothing
            nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
        norm = self.whole(norm)
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  # fused AdamW looks at it
        schedule(optimizer, lr, weight_decay)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.detach().to(self.device)

    def update_norm(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """The norm of the direction of Adam's last step, see `optim.direction_square`: fp32 [], on the device.

        Like the gradient norm it is that of the whole model, whatever this process holds of it.
        """
        moments = [
            [self.local(state[name]) for name in MOMENTS] for state in self.states(optimizer) if MOMENTS[0] in state
        ]
        square = direction_square(moments).to(self.device)
        return (square if self.pieces == 1 else self.mean(square) * self.pieces).sqrt()

    def states(self, optimizer: torch.optim.Optimizer) -> Iterable[Any]:
        """The optimiser's state of each tensor that it holds here, always in the same order."""
        return (optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"])

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Around forward passes that nothing is learnt from, and that leave no trace in what is.

        All processes make equally many, since engines gather weights in them. What was compiled runs as written: images
        of another shape would otherwise have it compiled anew, from then on also for training.
        """
        eager = torch.compiler.set_stance("force_eager") if self.config.train.compile else nullcontext()
        model.eval()
        try:
            with torch.no_grad(), self.autocast(), eager:
                yield
        finally:
            model.train()

    def features(self, model: nn.Module, images: Tensor) -> Tensor:
        """Pooled features of the encoder as it is now, whole or in pieces: fp32 [B, C, S, S] → fp32 [B, dim]."""
        with self.watching(model):
            return model(images, features=True).float()

    def predict(self, model: nn.Module, arguments: Sequence[Tensor]) -> Any:
        """What the model as it is now returns for the arguments of a micro-batch (`Inputs.model_args`)."""
        with self.watching(model):
            return model(*arguments)

    def whole(self, value: Tensor) -> Tensor:
        """A scalar of this engine as a plain tensor."""
        return value

    def average(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Average | None:
        """The running average of the weights that the configuration asks for, beginning now."""
        half_life, stride = self.config.optim.ema_half_life, self.config.train.global_batch
        return Average(self.weights(model, optimizer), half_life, stride, self.local) if half_life else None

    def weights(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The fp32 weights that the optimiser changes, in the pieces that it holds."""
        return {**trained(unwrap(model))}

    @torch.no_grad()
    def follow(self, model: nn.Module, kept: float) -> None:
        """The teacher of a model becomes `kept` of itself and 1 - `kept` of its encoder, piece by piece, in fp32."""
        self._followed = self._followed or self.followed(model)
        torch._foreach_lerp_(*self._followed, 1 - kept)

    def followed(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """What this process holds of the teacher and, in the same order, of the encoder, sharing their memory."""
        teacher, encoder = ([self.local(p.detach()) for p in part] for part in followed(unwrap(model)))
        return teacher, encoder

    def local(self, tensor: Tensor) -> Tensor:
        """The part of such a piece that lies in this process, sharing its memory."""
        return tensor

    def tensors(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None = None
    ) -> dict[str, Tensor]:
        """What a checkpoint holds of model and optimiser: the tensors themselves, to be read or filled in place.

        `model.NAME` for every parameter, `exp_avg.NAME` and `exp_avg_sq.NAME` for every trained one, under names that
        no engine changes; `ema.NAME` with an average. Moments that no step has made yet are zero.
        """
        found = {f"ema.{name}": value for name, value in average.values.items()} if average else {}
        for name, parameter in unwrap(model).named_parameters():
            found[f"model.{name}"] = parameter.detach()
            if not parameter.requires_grad:
                continue
            state = optimizer.state[parameter]
            for moment in MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
            # Where the fused optimiser expects it; it would make none of its own beside the moments.
            state.setdefault("step", torch.zeros((), dtype=torch.float32, device=parameter.device))
            found |= {f"{moment}.{name}": state[moment] for moment in MOMENTS}
        return found

    def copies(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same values in host memory of their own, for a save that goes on beside the training."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    def loaded(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: Average | None,
        filled: dict[str, Tensor],
        steps: int,
    ) -> None:
        """Go on from `tensors` that a checkpoint has filled, after so many updates."""
        for state in optimizer.state.values():
            state["step"].fill_(steps)

    def ranks(self) -> Ranks:
        """A group of its own on the CPU, for what happens beside the training."""
        return ALONE

    def agree(self, flag: bool) -> Callable[[], bool]:
        """Begin to ask all processes; the function that is returned waits for the answer: whether any says yes."""
        return lambda: flag

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        return value

    def sum_int(self, value: int) -> int:
        """The sum of an integer below 2^48 over all processes."""
        return value

    def close(self) -> None:
        """Leave the process group."""


class Group(Engine):
    """What engines of several processes share: gloo on CPUs, nccl on GPUs, one device per process."""

    name = "group"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        launched = declared()
        if launched.missing:
            raise LaunchError(
                f"engine {self.name} needs {', '.join(launched.missing)} in the environment",
                where="train.engine",
                do="start with: torchrun --nproc-per-node N -m foundation train CONFIG",
            )
        self.local_rank = launched.local_rank
        self._agreement: Any = None
        if self.device.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise LaunchError(
                    f"process {self.local_rank} of this node has no GPU: {torch.cuda.device_count()} are seen",
                    where=socket.gethostname(),
                    do="start as many processes per node as it has GPUs",
                )
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
        self._own = not dist.is_initialized()
        if self._own:
            self.join()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._check(launched.world_size)

    def join(self) -> None:
        """Enter the process group. Raises LaunchError when the others cannot be reached."""
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "cpu:gloo"
        try:
            store, rank, size = next(rendezvous("env://", timeout=JOIN))
            store.set_timeout(LONG)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LONG)
        except (dist.DistError, ValueError, OSError) as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise LaunchError(
                f"the process group cannot be formed: {error}",
                where=place,
                do="see that this address resolves and can be reached from every node, and that all processes start",
            ) from error

    def _check(self, declared_size: int) -> None:
        """Raise LaunchError unless all processes are parts of the same training, each on a device of its own."""
        mine = (self.name, self.world_size, declared_size, socket.gethostname(), str(self.device), os.getpid())
        every: list[Any] = [None] * self.world_size
        dist.all_gather_object(every, mine)
        problem = ""
        if {row[:3] for row in every} != {(self.name, declared_size, declared_size)}:
            problem = "the processes disagree on engine or world size"
        elif self.device.type == "cuda" and len({row[3:5] for row in every}) < self.world_size:
            problem = "two processes share a GPU"
        if problem:
            rows = "; ".join(f"rank {rank}: {' '.join(map(str, row))}" for rank, row in enumerate(every))
            what = f"{problem} (engine, world size, declared world size, host, device, process): {rows}"
            raise LaunchError(what, do="start all processes with one launcher and the same configuration")

    def ranks(self) -> Ranks:
        """A new gloo group; every process has to ask for it at the same time."""
        group: Any = dist.new_group(backend="gloo", timeout=LONG)

        def gather(value: Any) -> list[Any]:
            every: list[Any] = [None] * self.world_size
            dist.all_gather_object(every, value, group)
            return every

        return Ranks(self.rank, self.world_size, gather, group)

    def agree(self, flag: bool) -> Callable[[], bool]:
        """An asynchronous maximum on the CPU, in a group that nothing else uses."""
        self._agreement = self._agreement or dist.new_group(backend="gloo", timeout=LONG)
        value = torch.tensor(int(flag))
        work = dist.all_reduce(value, dist.ReduceOp.MAX, self._agreement, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(value)

        return answer

    def mean(self, value: Tensor) -> Tensor:
        """All-reduced mean."""
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.world_size

    def sum_int(self, value: int) -> int:
        """All-reduced sum, which is also a barrier."""
        total = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(total)
        return int(total)

    def close(self) -> None:
        """Destroy the group, so that a finished run leaves no socket behind."""
        if self._own:
            dist.destroy_process_group()


class DDP(Group):
    """Replicas with averaged gradients."""

    name = "ddp"

    def setup(
        self, build: Callable[[], nn.Module], given: Mapping[str, Given] | None = None
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A replica; every process computes the same initial weights."""
        model, optimizer = super().setup(build, given)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True), optimizer

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """`no_sync` on all but the last micro-batch."""
        assert isinstance(model, DistributedDataParallel)
        return nullcontext() if last else model.no_sync()


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model inside an engine's wrapper; checkpoints never show it."""
    return model.module if isinstance(model, DistributedDataParallel) else getattr(model, "module", model)
