"""How the model, its gradients and the optimiser's moments lie on the ranks: `ddp`, `fsdp2`, `zero2` or `zero3` (`run.engine`).

An engine takes a model whose trained weights are fp32 and gives the loop six things: a forward, a backward, the gradients' norms before
anything is updated, the update, and the whole state, gathered or set. Whatever the engine, the gradient is that of the sum over all
supervised tokens of a step, and what is saved is the same: plain fp32 tensors by their names, which any engine on any number of ranks can
take up again.

Under `fsdp2`, `zero2` and `zero3` ranks wait for each other inside forward and backward, so every rank has to run every module equally
often (`lockstep`): see `batches.Idle`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from llava_collab.files import read_json
from llava_collab.models.hypernetwork import HyperNetwork
from llava_collab.training.components import EXPERTS, Named, by_component, clip, component_of, gradient_norms, parameter_groups
from llava_collab.training.recipe import Recipe, RecipeError
from llava_collab.training.state import Moments
from llava_collab.training.step import reduce_gradients

MOMENTS = ("exp_avg", "exp_avg_sq")
SHARDS = "shards"


class DataParallel:
    """`ddp`: every rank (or the only one) holds everything; gradients are summed after the backward pass."""

    lockstep = False

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        self.model: Any = None
        self.trainable: Named = {}
        self.optimizer: Any = None

    def start(self, model: Any, trainable: Named) -> None:
        """Take the model over: put it on the device (in shards), and make the optimiser. All ranks get the first rank's weights."""
        nn.Module.to(model, self.accelerator.device)
        self.model, self.trainable = model, trainable
        if self.accelerator.num_processes > 1:
            for parameter in trainable.values():
                torch.distributed.broadcast(parameter.data, src=0)
        self.optimizer = self._adamw()

    def _adamw(self) -> torch.optim.AdamW:
        optim = self.recipe.optim
        return torch.optim.AdamW(parameter_groups(self.trainable, optim), betas=optim.betas, eps=optim.eps, fused=True)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups, with `component` and `peak_lr`."""
        return self.optimizer.param_groups

    def forward(self, **inputs: Any) -> Tensor:
        """The loss of one micro-batch."""
        with self.accelerator.autocast():
            return self.model(**inputs).loss

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add this micro-batch's gradient; `last`: no more follow in this step."""
        self.accelerator.backward(loss)

    def reduce(self) -> set[str]:
        """Sum gradients over ranks; returns the names that got none on any rank."""
        return reduce_gradients(self.trainable, self.accelerator)

    def norms(self) -> dict[str, Tensor]:
        """L2 norm of the whole gradient, by part."""
        return gradient_norms(self.trainable)

    def update(self, norms: dict[str, Tensor]) -> None:
        """Clip, step, forget the gradients."""
        clip(self.trainable, norms, self.recipe.optim)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def local(self, name: str) -> Tensor:
        """This rank's part of a trained parameter."""
        return self.trainable[name].detach()

    def gather(self, trained_only: bool = False) -> dict[str, Tensor]:
        """Whole tensors on the CPU by name, on the main process ({} elsewhere): the state dict, or the trained parameters."""
        if not self.accelerator.is_main_process:
            return {}
        state = self.trainable if trained_only else self.model.state_dict()
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def whole(self, tensors: dict[str, Tensor]) -> Any:
        """A model that holds what `gather()` gave, on the main process, to be saved."""
        return self.model

    def moments(self) -> Moments:
        """The optimiser's state by parameter, whole, on the CPU of the main process."""
        if not self.accelerator.is_main_process:
            return {}
        state = self.optimizer.state
        return {n: {k: v.detach().cpu().contiguous() for k, v in state[p].items()} for n, p in self.trainable.items() if p in state}

    def set_moments(self, moments: Moments) -> None:
        """Put back what `moments` gave (the same on all ranks)."""
        for name, values in moments.items():
            parameter = self.trainable[name]
            self.optimizer.state[parameter] = {moment: value.to(parameter.device) for moment, value in values.items()}

    def anywhere(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is up on any rank."""
        found = torch.tensor(flags, dtype=torch.int32, device=self.accelerator.device)
        if self.accelerator.num_processes > 1 and len(flags):
            torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        return found.bool().tolist()


class Sharded(DataParallel):
    """What engines that shard parameters have in common: ranks keep step, and a whole model has to be put together to be saved."""

    lockstep = True
    kind: type[Any]
    config: Any

    def forward(self, **inputs: Any) -> Tensor:
        return self.model(**inputs).loss

    def whole(self, tensors: dict[str, Tensor]) -> Any:
        with torch.device("meta"):
            model = self.kind(self.config)
        model.load_state_dict(tensors, assign=True)
        model.tie_weights()
        return model


class Fsdp2(Sharded):
    """torch's `fully_shard`: parameters, gradients and moments in shards; units are each decoder block, each generator, and the rest.

    The tower is part of the rest: `fully_shard` makes a new class of a unit, and transformers looks up a tower's hidden states by class.

    With bf16, units compute in bf16 from fp32 masters and reduce gradients in fp32. A generator is a unit of its own, made before the
    rest is wrapped, that computes in fp32; the model calls it once a forward, so it is gathered once.
    """

    def start(self, model: Any, trainable: Named) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.kind, self.config = type(model), model.config
        config = engine_config(self.recipe)
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        shared: dict[str, Any] = dict(mesh=mesh, reshard_after_forward=config["reshard_after_forward"])
        root: dict[str, Any] = shared | {"reshard_after_forward": False}
        exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
        fast = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = fast if self.recipe.run.precision == "bf16" else exact
        for module in model.modules():
            if isinstance(module, HyperNetwork):
                fully_shard(module, **shared, mp_policy=exact)
        for block in model.get_submodule("model.language_model").layers:
            fully_shard(block, **shared, mp_policy=policy)
        fully_shard(model, **root, mp_policy=policy)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.accelerator.device)
        self.model = model
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.trainable.keys() != trainable.keys():
            raise RuntimeError("fully_shard renamed parameters")
        trainable.update(self.trainable)  # the caller's whole tensors are freed: nobody may hold them
        self.optimizer = self._adamw()

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * self.accelerator.num_processes).backward()  # ranks are averaged, and are to be summed

    def reduce(self) -> set[str]:
        return {name for name, parameter in self.trainable.items() if parameter.grad is None}

    def norms(self) -> dict[str, Tensor]:
        squares = {
            component: torch.stack([_local(g).float().square().sum() for n in names if (g := self.trainable[n].grad) is not None]).sum()
            for component, names in by_component(self.trainable).items()
            if any(self.trainable[n].grad is not None for n in names)
        }
        if not squares:
            return {}
        total = torch.stack(list(squares.values())).to(self.accelerator.device)
        torch.distributed.all_reduce(total)
        return dict(zip(squares, total.sqrt().unbind(), strict=True))

    def update(self, norms: dict[str, Tensor]) -> None:
        shards = {}
        for name, parameter in self.trainable.items():
            if parameter.grad is not None:
                shards[name] = nn.Parameter(_local(parameter), requires_grad=True)
                shards[name].grad = _local(parameter.grad)
        clip(shards, norms, self.recipe.optim)  # in place, on this rank's shards
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def local(self, name: str) -> Tensor:
        return _local(self.trainable[name].detach())

    def gather(self, trained_only: bool = False) -> dict[str, Tensor]:
        state = self.trainable if trained_only else self.model.state_dict()
        return self._whole(state)

    def moments(self) -> Moments:
        whole: Moments = {name: {} for name in self.trainable}
        for name, parameter in self.trainable.items():
            if parameter in self.optimizer.state:
                whole[name] = self._whole(self.optimizer.state[parameter])
        return whole if self.accelerator.is_main_process else {}

    def set_moments(self, moments: Moments) -> None:
        for name, values in moments.items():
            parameter: Any = self.trainable[name]
            self.optimizer.state[parameter] = {
                moment: distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
                if value.ndim
                else value.to(self.accelerator.device)
                for moment, value in values.items()
            }

    def save_shards(self, folder: Path) -> None:
        """Write weights and moments, each rank its own shards (torch's DCP); all ranks call it."""
        save(self._sharded(), checkpoint_id=folder)

    def load_shards(self, folder: Path) -> None:
        """Take up what `save_shards` wrote, on any number of ranks."""
        for parameter in self.trainable.values():
            zeros = {key: torch.zeros_like(parameter) for key in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=self.accelerator.device), **zeros}
        load(self._sharded(), checkpoint_id=folder)

    def _sharded(self) -> dict[str, Any]:
        return {
            "weights": {name: parameter.detach() for name, parameter in self.trainable.items()},
            "moments": {name: self.optimizer.state[parameter] for name, parameter in self.trainable.items()},
        }

    def _whole(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """Gathered one by one, so that no rank but the main one ever holds more than one whole tensor."""
        whole = {}
        for name, value in state.items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if self.accelerator.is_main_process:
                whole[name] = full.detach().cpu().contiguous()
        return whole


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Zero(Sharded):
    """DeepSpeed's ZeRO: stage 2 (`zero2`: gradients and moments in shards) or 3 (`zero3`: parameters too).

    DeepSpeed's own engine is driven, not accelerate's wrapper, which updates inside `backward`: a gradient that is not finite has to be
    seen before. With bf16 all weights in the model are bf16, the generators' too, which then compute in fp32 from rounded weights; their
    masters, like all, are fp32.
    """

    def start(self, model: Any, trainable: Named) -> None:
        deepspeed = _deepspeed()
        self.kind, self.config = type(model), model.config
        run, optim = self.recipe.run, self.recipe.optim
        config = engine_config(self.recipe) | {
            "train_micro_batch_size_per_gpu": 1,  # how a step is cut is our business: boundaries are told by `backward`
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optim.clip_norm,
            "bf16": {"enabled": run.precision == "bf16"},
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},  # its default adds micro-batches up in the model's type
        }
        if set(config["zero_optimization"]) & {"offload_optimizer", "offload_param"}:
            raise RecipeError("run.engine_config: offloading is not supported, since gradients are looked at before the update.")
        masters = {name: p.detach().cpu().clone() for name, p in trainable.items()} if run.precision == "bf16" else {}
        self._exact = {  # frozen experts: DeepSpeed would round what is saved of them
            name: p.detach().cpu().clone()
            for name, p in model.named_parameters()
            if name not in trainable and component_of(name) in EXPERTS
        }
        groups = parameter_groups(trainable, optim)
        adamw = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps)
        self.model, self._zero, _, _ = deepspeed.initialize(model=model, optimizer=adamw, config=config, dist_init_required=False)
        self.trainable = {name: p for name, p in self.model.module.named_parameters() if name in trainable}
        self.optimizer = self._zero.optimizer
        self._stage = config["zero_optimization"]["stage"]
        for name, value in masters.items():
            self._scatter(name, None, value)
        self._reached: set[str] = set()
        for name, parameter in self.trainable.items():
            parameter.register_hook(lambda _, name=name: self._reached.add(name))

    def backward(self, loss: Tensor, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss * self.accelerator.num_processes)  # ranks are averaged, and are to be summed
        if not last:
            self.model.step()  # counts a micro-batch; updates nothing

    def reduce(self) -> set[str]:
        reached = self.anywhere([name in self._reached for name in self.trainable])
        self._reached.clear()
        return {name for name, found in zip(self.trainable, reached, strict=True) if not found}

    def norms(self) -> dict[str, Tensor]:
        zero = self._zero
        gradients = zero.averaged_gradients
        held = zero.params_in_partition if self._stage == 2 else zero.fp16_groups
        squares: dict[str, Tensor] = {}
        for index, parameters in enumerate(held):
            group = self.param_groups[index if self._stage == 2 else zero.sub_group_to_group_id[index]]
            norm = torch.as_tensor(zero.get_grad_norm_direct(gradients[index], parameters)).float()
            square = torch.where(norm < 0, torch.inf, norm.square())  # DeepSpeed's -1 stands for not finite
            squares[group["component"]] = squares.get(group["component"], torch.zeros_like(square)) + square
        return {component: square.sqrt() for component, square in squares.items()}

    def update(self, norms: dict[str, Tensor]) -> None:
        self.model.step()

    def local(self, name: str) -> Tensor:
        return getattr(self.trainable[name], "ds_tensor", self.trainable[name]).detach()

    def gather(self, trained_only: bool = False) -> dict[str, Tensor]:
        from deepspeed.runtime.zero import GatheredParameters

        whole: dict[str, Tensor] = {}
        state = self.trainable if trained_only else self.model.module.state_dict(keep_vars=True)
        own = {id(parameter): name for name, parameter in self.trainable.items()}
        for name, value in state.items():
            if name in self._exact:
                full = self._exact[name]
            elif id(value) in own:
                full = self._gathered(own[id(value)], None)
            else:
                with GatheredParameters([value], enabled=hasattr(value, "ds_id")):
                    full = value.detach().clone()
            if self.accelerator.is_main_process:
                whole[name] = full.detach().cpu().contiguous()
        return whole

    def moments(self) -> Moments:
        step = next(iter(self.optimizer.state.values()))["step"].detach().cpu()
        whole: Moments = {}
        for name in self.trainable:
            found = {key: self._gathered(name, key) for key in MOMENTS}
            if self.accelerator.is_main_process:
                whole[name] = {"step": step.clone(), **{key: value.cpu() for key, value in found.items()}}
        return whole

    def set_moments(self, moments: Moments) -> None:
        step = next(iter(moments.values()))["step"]
        for flat in self._flat:
            self.optimizer.state[flat] = {"step": step.clone(), **{key: torch.zeros_like(flat) for key in MOMENTS}}
        for name, values in moments.items():
            for key in MOMENTS:
                self._scatter(name, key, values[key])

    @property
    def _flat(self) -> list[Tensor]:
        """This rank's flat part of each group's fp32 masters."""
        return self._zero.single_partition_of_fp32_groups if self._stage == 2 else self._zero.fp32_partitioned_groups_flat

    def _part(self, name: str, key: str | None) -> tuple[Tensor, int] | None:
        """This rank's part of a trained parameter's master (None) or moment, flat, and where in the flat parameter it begins."""
        parameter: Any = self.trainable[name]
        if self._stage == 3:
            part, _ = self._zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=True, optim_state_key=key)
            return part, part.numel() * self.accelerator.process_index
        mapping = parameter._hp_mapping
        if mapping is None:  # all of it lies on other ranks
            return None
        group = next(index for index, group in enumerate(self.param_groups) if name in group["names"])
        flat = self._flat[group] if key is None else self.optimizer.state[self._flat[group]][key]
        return flat.narrow(0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel), mapping.lp_fragment_address.start

    def _gathered(self, name: str, key: str | None) -> Tensor:
        shape = getattr(self.trainable[name], "ds_shape", self.trainable[name].shape)
        whole = torch.zeros(shape.numel() + self.accelerator.num_processes, device=self.accelerator.device)  # stage 3 pads
        if (part := self._part(name, key)) is not None:
            whole.narrow(0, part[1], part[0].numel()).copy_(part[0])
        torch.distributed.all_reduce(whole)
        return whole[: shape.numel()].reshape(shape)

    @torch.no_grad()
    def _scatter(self, name: str, key: str | None, value: Tensor) -> None:
        if (part := self._part(name, key)) is not None:
            padded = nn.functional.pad(value.flatten(), (0, self.accelerator.num_processes))
            part[0].copy_(padded.narrow(0, part[1], part[0].numel()))


ENGINES: dict[str, type[DataParallel]] = {"ddp": DataParallel, "fsdp2": Fsdp2, "zero2": Zero, "zero3": Zero}


def choose_engine(recipe: Recipe, accelerator: Accelerator) -> DataParallel:
    """The recipe's engine. Raises RecipeError for what it can't do."""
    name = recipe.run.engine
    if name != "ddp" and accelerator.num_processes == 1 and not torch.distributed.is_initialized():
        raise RecipeError(f"run.engine {name} shards over ranks: launch it with torchrun (one rank works too), or use ddp.")
    if name != "ddp" and recipe.tune.llm == "lora4bit":
        raise RecipeError(f"run.engine {name} can't shard a 4-bit base: use ddp, or tune.llm lora.")
    if name.startswith("zero") and recipe.optim.expert_clip_norm is not None:
        raise RecipeError("optim.expert_clip_norm: DeepSpeed clips all gradients together; use ddp or fsdp2, or leave it out.")
    return ENGINES[name](recipe, accelerator)


def engine_config(recipe: Recipe) -> dict[str, Any]:
    """The engine's settings: `run.engine_config`, or the file of its name beside this one."""
    path = recipe.run.engine_config or Path(__file__).with_name("engine_configs") / f"{recipe.run.engine}.json"
    return read_json(Path(path))


def _deepspeed() -> Any:
    if importlib.util.find_spec("deepspeed") is None:
        raise RecipeError("run.engine zero2 and zero3 need DeepSpeed: pip install 'llava_collab[dist]'; fsdp2 needs nothing more.")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.init_distributed(dist_backend=None, dist_init_required=False)
    return deepspeed
