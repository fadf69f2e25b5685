"""Train with fully sharded data parallelism: torch's `fully_shard` on GPTModel, optionally with tensor parallelism.

torch's gradient clipping and state dicts cover only the data-parallel mesh and are silently wrong under tensor
parallelism; this module counts each parameter once over both.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.tensor import DTensor

from igla_mega.config.schema import Optimizer as OptimizerSection
from igla_mega.config.schema import Training
from igla_mega.distributed.mesh import Axis, Mesh
from igla_mega.engine.optimizer import decays, moments_of, set_num_steps, step_with_ewc
from igla_mega.model.shards import ParameterState, Shards, local_values, named_shards
from igla_mega.objective.ewc import Ewc, Pull


def wrap(chunk: GPTModel, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> GPTModel:
    """Shard every layer, and the remaining parameters as one unit, over the data and context ranks; compute in `dtype`.

    Tensors on the meta device are allocated on `device` without values. Experts are separate units, sharded over the
    ranks that hold the same experts. 4-bit codes are buffers and stay whole on every rank.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        # The default casts every input of a layer, including the rotary angles. bf16 has 8 significant bits: an angle
        # of 2000 radians would be off by up to 4.
        cast_forward_inputs=False,
    )
    device_mesh = DeviceMesh.from_group(mesh.data_context.group, device.type)
    if routed := [layer.mlp.experts for layer in chunk.decoder.layers if chunk.config.num_moe_experts]:
        expert_mesh = DeviceMesh.from_group(mesh.expert_data.group, device.type)
        for experts in routed:
            fully_shard(experts, mesh=expert_mesh, mp_policy=policy)
    # The routers' biases get no gradient: every rank updates its copy in the same way, so they stay replicated.
    biases = {param for name, param in chunk.named_parameters() if name.endswith("expert_bias")}
    for module in (*chunk.decoder.layers, chunk):
        fully_shard(module, mesh=device_mesh, mp_policy=policy, ignored_params=biases)
    for module in chunk.modules():
        if isinstance(module, FSDPModule):
            # Sum instead of mean: ranks may hold unequal numbers of targets, so `_finalize` divides once at the end.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return chunk._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t)


class ShardedAdamW:
    """AdamW of torch on the fp32 shards, with a gradient norm over data and tensor ranks."""

    def __init__(
        self,
        chunk: GPTModel,
        shards: Shards,
        mesh: Mesh,
        config: TransformerConfig,
        training: Training,
        optimizer: OptimizerSection,
    ):
        """Create the optimizer and install its callbacks in `config`, which megatron-core's schedule calls.

        Args:
            chunk: sharded model (`wrap`).
            shards: description of its parameters.
            mesh: process groups of this rank.
            config: megatron-core's settings of the chunk; changed in place.
            training: the recipe's `training` section.
            optimizer: the recipe's `optimizer` section.
        """
        self.chunk, self.config = chunk, config
        self.mesh, self.max_norm = mesh, training.gradient_clip or math.inf
        self.params = [(shard, param) for shard, param in named_shards([chunk], shards) if param.requires_grad]
        matrices = [param for shard, param in self.params if decays(shard.name, len(shard.shape))]
        norms = [param for shard, param in self.params if not decays(shard.name, len(shard.shape))]
        self.adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": training.weight_decay}, {"params": norms, "weight_decay": 0.0}],
            lr=training.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            fused=optimizer.fused,
        )
        # No `no_sync`: gradients are reduced in every micro-batch, so that each rank keeps only its shard of them.
        config.no_sync_func = None
        config.grad_scale_func = None
        config.finalize_model_grads_func = self._finalize

    def zero_grad(self) -> None:
        """Free the gradients of the last step."""
        self.adam.zero_grad()

    @torch.no_grad()
    def _finalize(self, model, num_tokens: Tensor, *_, **__) -> None:
        """Divide the summed gradients by the number of targets in the global batch.

        `fully_shard` has already summed them over data and context ranks, but not over tensor ranks: under sequence
        parallelism the gradients of norms cover only a rank's tokens, and their sum is completed here.
        """
        # Cloned: the counter belongs to megatron-core's schedule.
        num_tokens = num_tokens.clone()
        dist.all_reduce(num_tokens, group=self.mesh.data_context.group)
        for shard, param in self.params:
            grad = _local(param.grad)
            if shard.sequence_parallel:
                dist.all_reduce(grad, group=self.mesh.tensor.group)
            grad.div_(num_tokens.clamp(min=1))

    @torch.no_grad()
    def step(self, learning_rate: float, ewc: Ewc | None = None) -> tuple[float, Pull | None]:
        """Clip and update as `Optimizer.step` describes."""
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        held = ewc is not None and ewc.holds
        states, gradients = (list(self.states()), self._gradients()) if held else ([], [])
        return step_with_ewc(ewc, states, gradients, [self.adam], clip=self._clip, update=self.adam.step)

    def _clip(self) -> float:
        """Clip the gradients by their global L2 norm; return the norm before clipping."""
        # Shards with `is_first_copy` are disjoint over all ranks of the world: one all-reduce sums each element once.
        grads = [(_local(param.grad), shard.is_first_copy) for shard, param in self.params]
        norms = torch._foreach_norm([grad for grad, counts in grads if counts], 2.0, dtype=torch.float32)
        squares = torch.stack(norms).double().square().sum()
        dist.all_reduce(squares)
        grad_norm = squares.sqrt().item()
        if grad_norm > self.max_norm:
            torch._foreach_mul_([grad for grad, _ in grads], self.max_norm / (grad_norm + 1e-6))
        return grad_norm

    def _gradients(self) -> list[Tensor]:
        """Return the 1-D gradient of each state, in the order of `states`."""
        return [_local(param.grad).view(-1) for _, param in self.params]

    @property
    def one_sample(self) -> bool:
        """False: every data-parallel rank can process a sample of its own."""
        return False

    @contextmanager
    def per_sample(self) -> Iterator[Callable[[list[Tensor]], None]]:
        """Square gradients per sample, as `Optimizer.per_sample` describes.

        `fully_shard` frees a unit's whole gradient after its reduce-scatter, so the gradient is squared inside of it.
        """

        def add(sums: list[Tensor]) -> None:
            """Add the squared gradient of the last backward pass to `sums`."""
            # Context-parallel ranks hold the same sample, and each of them has added its square.
            torch._foreach_add_(sums, self._gradients(), alpha=1.0 / self.mesh.context.size)

        units = [module for module in self.chunk.modules() if isinstance(module, FSDPModule)]
        saved = self.config.finalize_model_grads_func
        with ExitStack() as hooks:
            self._complete_norms(hooks)
            for unit in units:
                unit.set_custom_reduce_scatter(_SquareAndReduceScatter(self.mesh.context))
            self.config.finalize_model_grads_func = lambda *_, **__: None
            try:
                yield add
            finally:
                self.config.finalize_model_grads_func = saved
                for unit in units:
                    unit.set_custom_reduce_scatter(DefaultReduceScatter())

    def _complete_norms(self, hooks: ExitStack) -> None:
        """Sum the gradients of norms over tensor ranks as soon as they exist, under sequence parallelism.

        Normally `_finalize` completes them, but here they are squared before that. The hooks go on the gathered
        weights, which exist only after a unit's all-gather, so a forward hook of their module adds them.
        """
        partial = {id(param): shard for shard, param in self.params if shard.sequence_parallel}
        hooked: set[int] = set()

        def add_hooks(module: nn.Module, *_) -> None:
            """Forward hook: add the reduction to each gathered weight of the module, once per weight."""
            for name in names[module]:
                weight = getattr(module, name)  # gathered by now
                if id(weight) not in hooked:
                    hooked.add(id(weight))
                    hook = weight.register_post_accumulate_grad_hook(
                        lambda gathered: dist.all_reduce(gathered.grad, group=self.mesh.tensor.group)
                    )
                    hooks.callback(hook.remove)

        names: dict[nn.Module, list[str]] = {}
        for module in self.chunk.modules():
            partial_names = [name for name, param in module.named_parameters(recurse=False) if id(param) in partial]
            if partial_names:
                names[module] = partial_names
                hooks.callback(module.register_forward_hook(add_hooks).remove)

    def states(self) -> Iterator[ParameterState]:
        """Yield this rank's optimizer states: views of the local shards."""
        for shard, param in self.params:
            values = {"master": param, **moments_of(self.adam, param)}
            runs = {name: local_values(tensor) for name, tensor in values.items()}
            yield ParameterState(
                shard, runs["master"][1], {name: flat for name, (flat, _) in runs.items()}, replicated=False
            )

    def loaded(self, num_steps: int) -> None:
        """Set the number of updates after a checkpoint has been read into the states."""
        set_num_steps(self.adam, num_steps)


class _SquareAndReduceScatter(DefaultReduceScatter):
    """Reduce-scatter for `fully_shard` that squares the gradient of a data-parallel rank's sample before summing."""

    def __init__(self, context: Axis):
        """Take the axis of the ranks that share a sample."""
        self.context = context

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args, **kwargs):
        # A sample's gradient is complete only with the tokens of all its context ranks.
        if self.context.size > 1:
            dist.all_reduce(input_tensor, group=self.context.group)
        return super().__call__(output_tensor, input_tensor.square_(), *args, **kwargs)


def _local(grad: Tensor | None) -> Tensor:
    """Return this rank's shard of a gradient."""
    assert grad is not None, "every trained parameter contributes to the loss"
    return grad.to_local() if isinstance(grad, DTensor) else grad
