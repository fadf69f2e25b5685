"""Data parallelism by megatron-core: gradients in one buffer, optimizer state whole or split over the ranks."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from igla_mega.config.schema import Optimizer as OptimizerSection
from igla_mega.config.schema import Training
from igla_mega.model.shards import Shards, Slot, named_shards
from igla_mega.train.optimizer import moments_of, set_num_steps


def wrap(
    chunks: list[GPTModel], config: TransformerConfig, *, distributed_optimizer: bool, overlap: bool
) -> list[nn.Module]:
    """Give each chunk a gradient buffer (fp32) that is summed over the data and context ranks."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed_optimizer,
    )
    # Only the first chunk's gradients come last in the backward pass: buckets of the others would overlap nothing.
    return [
        DistributedDataParallel(config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


class MegatronAdamW:
    """megatron-core's AdamW: fp32 main weights under bf16, clipping over every axis of the mesh."""

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        shards: Shards,
        config: TransformerConfig,
        training: Training,
        optimizer: OptimizerSection,
    ):
        ddp: Any = chunks[0].ddp_config
        settings = OptimizerConfig(
            optimizer="adam",
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.epsilon,
            # 0 means no clipping; the norm is wanted all the same.
            clip_grad=training.gradient_clip or float("inf"),
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=ddp.use_distributed_optimizer,
            overlap_param_gather=ddp.overlap_param_gather,
        )
        self.chunks, self.shards = chunks, shards
        self.megatron = get_megatron_optimizer(settings, chunks)
        for part in self._parts():
            for group in part.optimizer.param_groups:
                # mcore leaves the multiplier (0 on norms) to its own scheduler, which is not used here.
                group["weight_decay"] = training.weight_decay * group["wd_mult"]
                if isinstance(part.optimizer, torch.optim.AdamW):
                    group.update(fused=True, foreach=False)
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.megatron.scale_loss
        if ddp.overlap_grad_reduce:
            config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
            config.param_sync_func = None

    def _parts(self) -> list[MegatronOptimizer]:
        parts = getattr(self.megatron, "chained_optimizers", [self.megatron])
        return [part for part in parts if not part.is_stub_optimizer]

    def zero_grad(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.megatron.zero_grad()

    def step(self, learning_rate: float) -> float:
        for group in self.megatron.param_groups:
            group["lr"] = learning_rate
        _, grad_norm, _ = self.megatron.step()
        return float(grad_norm)

    def slots(self) -> Iterator[Slot]:
        shard_of = {param: shard for shard, param in named_shards(self.chunks, self.shards)}
        for part in self._parts():
            for param, master, start in _masters(part):
                values = {"master": master, **moments_of(part.optimizer, master)}
                flat = {name: tensor.detach().view(-1) for name, tensor in values.items()}
                yield Slot(shard_of[param], start, flat, replicated=not hasattr(part, "gbuf_ranges"))

    def loaded(self, num_steps: int) -> None:
        for part in self._parts():
            set_num_steps(part.optimizer, num_steps)


def _masters(part: MegatronOptimizer) -> Iterator[tuple[nn.Parameter, Tensor, int]]:
    """Model parameters that this rank updates, the fp32 tensor updated, and where that starts in the flat parameter."""
    if hasattr(part, "gbuf_ranges"):  # DistributedOptimizer: a flat range of each parameter
        for param, (group, order) in part.model_param_group_index_map.items():
            run = part._get_model_param_range_map(param)["param"]
            yield param, part.optimizer.param_groups[group]["params"][order], run.start
        return
    if hasattr(part, "float16_groups"):
        pairs = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
        for params, masters in [*pairs, *((group, group) for group in part.fp32_from_fp32_groups)]:
            yield from ((param, master, 0) for param, master in zip(params, masters, strict=True))
        return
    for group in part.optimizer.param_groups:
        yield from ((param, param, 0) for param in group["params"])
