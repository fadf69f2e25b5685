"""Fully sharded data parallelism: torch's `fully_shard` on GPTModel, alone or under tensor parallelism.

torch's own clipping and state dicts know only the data-parallel mesh, and are silently wrong under tensor
parallelism; what stands here counts each parameter once over both.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from igla_mega.config.schema import Optimizer as OptimizerSection
from igla_mega.config.schema import Training
from igla_mega.model.shards import Shards, Slot, local_values, named_shards
from igla_mega.parallel import Mesh
from igla_mega.train.optimizer import moments_of, set_num_steps


def wrap(chunk: GPTModel, mesh: Mesh, dtype: torch.dtype) -> GPTModel:
    """Shard every layer, and the rest as one unit, over the data-parallel ranks; compute in `dtype`."""
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        # The default casts every input of a layer, the rotary angles too: bf16 has no room for position 2048.
        cast_forward_inputs=False,
    )
    device_type = next(chunk.parameters()).device.type
    device_mesh = DeviceMesh.from_group(mesh.data.group, "cuda" if device_type == "cuda" else "cpu")
    for module in (*chunk.decoder.layers, chunk):
        fully_shard(module, mesh=device_mesh, mp_policy=policy)
    for module in chunk.modules():
        if isinstance(module, FSDPModule):
            # Sum, not mean: ranks may hold unequal numbers of targets, so the division comes once, at the end.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return chunk


class ShardedAdamW:
    """torch's fused AdamW on the fp32 shards, with a gradient norm over data and tensor ranks."""

    def __init__(
        self,
        chunk: GPTModel,
        shards: Shards,
        mesh: Mesh,
        config: TransformerConfig,
        training: Training,
        optimizer: OptimizerSection,
    ):
        self.mesh, self.max_norm = mesh, training.gradient_clip or math.inf
        self.params = list(named_shards([chunk], shards))
        matrices = [param for shard, param in self.params if len(shard.shape) > 1]
        norms = [param for shard, param in self.params if len(shard.shape) == 1]
        self.adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": training.weight_decay}, {"params": norms, "weight_decay": 0.0}],
            lr=training.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            fused=True,
        )
        # Gradients are reduced in every micro-batch, so that only shards of them are kept.
        config.no_sync_func = None
        config.grad_scale_func = None
        config.finalize_model_grads_func = self._finalize

    def zero_grad(self) -> None:
        self.adam.zero_grad()

    @torch.no_grad()
    def _finalize(self, model, num_tokens: Tensor, *_, **__) -> None:
        """Divide the summed gradients by the number of targets in the global batch."""
        num_tokens = num_tokens.clone()
        dist.all_reduce(num_tokens, group=self.mesh.data_context.group)
        for shard, param in self.params:
            grad = _local(param.grad)
            if shard.sequence_parallel:
                dist.all_reduce(grad, group=self.mesh.tensor.group)
            grad.div_(num_tokens.clamp(min=1))

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        grads = [(_local(param.grad), shard.is_first_copy) for shard, param in self.params]
        norms = torch._foreach_norm([grad for grad, counts in grads if counts], 2.0, dtype=torch.float32)
        squares = torch.stack(norms).double().square().sum()
        for axis in (self.mesh.data_context, self.mesh.model):
            dist.all_reduce(squares, group=axis.group)
        grad_norm = squares.sqrt().item()
        if grad_norm > self.max_norm:
            torch._foreach_mul_([grad for grad, _ in grads], self.max_norm / (grad_norm + 1e-6))
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()
        return grad_norm

    def slots(self) -> Iterator[Slot]:
        for shard, param in self.params:
            values = {"master": param, **moments_of(self.adam, param)}
            runs = {name: local_values(tensor) for name, tensor in values.items()}
            yield Slot(shard, runs["master"][1], {name: flat for name, (flat, _) in runs.items()}, replicated=False)

    def loaded(self, num_steps: int) -> None:
        set_num_steps(self.adam, num_steps)


def _local(grad: Tensor | None) -> Tensor:
    assert grad is not None, "every parameter takes part in the loss"
    return grad.to_local() if isinstance(grad, DTensor) else grad
