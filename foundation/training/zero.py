"""ZeRO-1, 2 and 3: DeepSpeed's engine behind the same methods as the others."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from foundation.config import Config
from foundation.models.initialise import Given, Piece, initialise
from foundation.training.average import Average, followed, trained
from foundation.training.blocks import on_meta, poison, prepare, with_features
from foundation.training.data import micro_batch
from foundation.training.engine import Group
from foundation.training.optim import MOMENTS, build_optimizer, rules, schedule


class Zero1(Group):
    """Moments spread over all processes; parameters and gradients whole on each."""

    name, stage = "zero1", 1

    def __init__(self, config: Config) -> None:
        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"  # otherwise it guesses, with a warning
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        super().__init__(config)
        # DeepSpeed calls collectives by their old names, once a block and process.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.WARNING)
        deepspeed.ops.__compatible_ops__ = {}  # otherwise it compiles an operation that only inference uses
        deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
        self.mesh = init_device_mesh("cpu", (self.world_size,))
        self.pieces = self.world_size

    def setup(
        self, build: Callable[[], nn.Module], given: Mapping[str, Given] | None = None
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model with its initial weights, handed to DeepSpeed with the optimiser of the rule table."""
        import deepspeed

        options = self.options()
        plain = on_meta(build)
        groups = rules(plain, self.config.optim.weight_decay)  # here, since stage 3 hides the shapes
        if self.stage == 3:
            with deepspeed.zero.Init(config_dict_or_path=options):
                model = build()
        else:
            model = plain.to_empty(device=self.device)
        model = with_features(prepare(model, self.config.train))
        if self.config.train.precision == "bf16":
            model.register_forward_pre_hook(_in_bf16)
        if self.stage < 3:
            poison(model)
        initialise(model, self.config.seed, self.local_piece, given)
        optimizer = build_optimizer(model, groups, self.config.optim)
        engine, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)
        return engine, wrapped

    def options(self) -> dict[str, Any]:
        """DeepSpeed's configuration, complete: nothing is left to its defaults that changes what is learnt."""
        train = self.config.train
        micro = micro_batch(self.config, self.world_size)
        zero: dict[str, Any] = {"stage": self.stage, "overlap_comm": self.device.type == "cuda"}
        if train.offload:
            place = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
            zero |= {"offload_optimizer": place} | ({"offload_param": place} if self.stage == 3 else {})
        half = train.precision == "bf16"
        accumulated = train.global_batch // self.world_size // micro
        if train.activation_checkpointing == "selective":
            # DeepSpeed's own product adds the bias in place, a second time to a result that was kept.
            zero["memory_efficient_linear"] = False
        return {
            "train_batch_size": train.global_batch,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulated,
            "gradient_clipping": self.config.optim.grad_clip or 0.0,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,  # the optimiser is AdamW of the rule table, offloaded or not
            "bf16": {"enabled": half},
            # Stage 1 would change to an optimiser whose parts lie elsewhere.
            **({"data_types": {"grad_accum_dtype": "fp32"}} if half and self.stage > 1 else {}),
            "communication_data_type": "fp32",
            "steps_per_print": 1 << 60,
        }

    def autocast(self) -> AbstractContextManager[Any]:
        """Nothing: DeepSpeed holds the parameters in the precision of the run."""
        return nullcontext()

    def accumulate(self, model: Any, last: bool) -> AbstractContextManager[None]:
        """Tell DeepSpeed which backward pass ends an update."""
        model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, model: Any, loss: Tensor) -> None:
        """The loss is divided by the number of micro-batches already."""
        model.backward(loss, scale_wrt_gas=False)

    def update(
        self, model: Any, optimizer: torch.optim.Optimizer, lr: float, weight_decay: float | None = None
    ) -> Tensor:
        """Clip and step in one; DeepSpeed waits for the norm, and makes no step when it is not finite."""
        schedule(optimizer, lr, weight_decay)
        model.step()
        return torch.as_tensor(model.get_global_grad_norm(), dtype=torch.float32).to(self.device)

    def states(self, optimizer: Any) -> Iterable[Any]:
        """Of this process's parts; none before the first step."""
        return (optimizer.optimizer.state[flat] for flat in self._flats(optimizer))

    def weights(self, model: Any, optimizer: Any) -> dict[str, Tensor]:
        """This process's part of the fp32 weights, which DeepSpeed strings together group by group."""
        return {str(index): flat for index, flat in enumerate(self._flats(optimizer))}

    def followed(self, model: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Whole parameters, or under stage 3 this process's parts of the flattened ones."""
        held = "data" if self.stage < 3 else "ds_tensor"
        teacher, encoder = ([getattr(parameter, held) for parameter in part] for part in followed(model.module))
        return teacher, encoder

    @torch.no_grad()
    def follow(self, model: Any, kept: float) -> None:
        """Small parameters that stage 3 keeps whole are gathered again from their parts."""
        super().follow(model, kept)
        if self.stage == 3:
            _gather_again([p for p in model.module.teacher.parameters() if p.ds_persist])

    def tensors(self, model: Any, optimizer: Any, average: Average | None = None) -> dict[str, Tensor]:
        """Copies in fp32, gathered one tensor at a time and spread again by rows: the layout of all other engines."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._allocate(optimizer)
        found = {}
        for name, parameter in model.module.named_parameters():
            if not parameter.requires_grad:
                found[f"model.{name}"] = self._rows(self._frozen(parameter))
                continue
            found[f"model.{name}"] = self._rows(safe_get_full_fp32_param(parameter))
            for moment in MOMENTS:
                found[f"{moment}.{name}"] = self._rows(safe_get_full_optimizer_state(parameter, moment))
        if average:
            average.exchange()  # DeepSpeed alone knows where in its strings a parameter lies
            for name, parameter in trained(model.module).items():
                found[f"ema.{name}"] = self._rows(safe_get_full_fp32_param(parameter))
            average.exchange()
        return found

    def copies(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """They are copies."""
        return tensors

    def loaded(
        self, model: Any, optimizer: Any, average: Average | None, filled: dict[str, Tensor], steps: int
    ) -> None:
        """Hand the values to DeepSpeed, one whole tensor at a time, and let it bring its working copies up to date."""
        named = list(trained(model.module).items())
        for name, parameter in model.module.named_parameters():
            if not parameter.requires_grad:
                self._give_frozen(parameter, self._whole(filled[f"model.{name}"]))
        if average:
            for name, parameter in named:
                self._give(parameter, "model", self._whole(filled[f"ema.{name}"]))
            average.exchange()
        for name, parameter in named:
            for kind in ("model", *MOMENTS):
                self._give(parameter, kind, self._whole(filled[f"{kind}.{name}"]))
        for state in optimizer.optimizer.state.values():
            state["step"].fill_(steps)
        if self.stage < 3:
            optimizer.update_lp_params()
        else:
            _gather_again(optimizer.persistent_parameters)

    def _flats(self, optimizer: Any) -> list[Tensor]:
        return optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups

    def _rows(self, whole: Tensor) -> Tensor:
        return distribute_tensor(whole.to("cpu"), self.mesh, [Shard(0)], src_data_rank=None).clone()

    def _allocate(self, optimizer: Any) -> None:
        """Moments that no step has made yet, and DeepSpeed's own record of where they are."""
        for flat in self._flats(optimizer):
            state = optimizer.optimizer.state[flat]
            for moment in MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(flat).detach()
            state.setdefault("step", torch.zeros((), dtype=torch.float32, device=flat.device))
        if self.stage < 3:
            # It links once, after the step of the first group, when the moments of the others are not made yet.
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def _give(self, parameter: Any, kind: str, whole: Tensor) -> None:
        """Set the fp32 copy (`model`) or a moment of a parameter."""
        from deepspeed import utils as tools

        if self.stage < 3:
            if kind == "model":
                tools.safe_set_full_fp32_param(parameter, whole)
            else:
                tools.safe_set_full_optimizer_state(parameter, whole, kind)
            return
        # The setter of whole tensors refuses those that the processes do not divide evenly.
        part = parameter.ds_tensor
        local = whole.new_zeros(part.numel())
        mine = whole.flatten()[self.rank * len(local) :][: len(local)]
        local[: len(mine)] = mine
        if kind == "model":
            tools.safe_set_local_fp32_param(parameter, local)
            part.data.copy_(local.view(part.shape))
        else:
            tools.safe_set_local_optimizer_state(parameter, local, kind)

    def _frozen(self, parameter: Any) -> Tensor:
        """A parameter that is not trained, whole, of which DeepSpeed's optimiser knows nothing."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
            return parameter.detach().float().clone()

    def _give_frozen(self, parameter: Any, whole: Tensor) -> None:
        if self.stage < 3:
            parameter.data.copy_(whole)
            return
        part = self.local_piece(parameter)
        part.values.copy_(whole.flatten()[part.first :][: len(part.values)])

    def _whole(self, rows: Tensor) -> Tensor:
        assert isinstance(rows, DTensor)
        return rows.full_tensor().to(self.device)

    def local_piece(self, parameter: Any) -> Piece:
        """A whole parameter, or under stage 3 this process's part of the flattened one."""
        if self.stage < 3:
            return Piece(parameter.detach(), 0, parameter.shape)
        piece = parameter.ds_tensor
        first = self.rank * piece.numel()
        return Piece(piece[: max(0, min(piece.numel(), parameter.ds_numel - first))], first, parameter.ds_shape)


def _gather_again(persistent: list[Any]) -> None:
    """Bring parameters that stage 3 keeps whole up to date with their parts."""
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def _in_bf16(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """DeepSpeed casts parameters, and not what enters the model."""
    return tuple(a.bfloat16() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


class Zero2(Zero1):
    """Moments and gradients spread."""

    name, stage = "zero2", 2


class Zero3(Zero1):
    """Parameters, too, spread; a block is whole only while it computes."""

    name, stage = "zero3", 3

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """DeepSpeed learns the order of blocks in an update, and gathers by it; a look has a record of its own.

        Otherwise a block that is recomputed would not do in the backward pass what it did in the forward pass. Before
        and after a look no block is whole, as between two updates.
        """
        offload, persistent = model.optimizer.parameter_offload, model.optimizer.persistent_parameters

        def spread() -> None:
            offload.empty_partition_cache()  # that of the engine also collects garbage, ten times as long as a look
            if persistent:  # small ones, which stay whole
                persistent[0].all_gather(persistent)

        spread()
        learnt, own = offload.param_coordinator, copy.copy(offload.param_coordinator)
        if not own.is_invalid_trace():
            own._invalidate_trace()
        offload.param_coordinator = own
        try:
            with super().watching(model):
                yield
            spread()
        finally:
            offload.param_coordinator = learnt

    def close(self) -> None:
        """Give torch its own product back, which DeepSpeed has replaced for the whole process."""
        from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patch

        torch.nn.functional.linear = getattr(Patch, "linear_bk", torch.nn.functional.linear)
        super().close()
