"""Train with megatron-core's data parallelism: one gradient buffer, optimizer state replicated or sharded."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.distributed.finalize_model_grads import (
    _allreduce_non_tensor_model_parallel_grads,
    _allreduce_word_embedding_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from igla_mega.config.schema import Optimizer as OptimizerSection
from igla_mega.config.schema import Training
from igla_mega.distributed.mesh import Mesh
from igla_mega.engine.optimizer import decays, moments_of, set_num_steps, step_with_ewc
from igla_mega.model.shards import ParameterState, Shards, named_shards
from igla_mega.objective.ewc import Ewc, Pull
from igla_mega.ops.fisher import fisher_accumulate_


def wrap(
    chunks: list[GPTModel], config: TransformerConfig, *, distributed_optimizer: bool, overlap: bool
) -> list[nn.Module]:
    """Wrap each chunk with an fp32 gradient buffer that is summed over the data and context ranks.

    Args:
        chunks: this rank's pipeline chunks.
        config: megatron-core's settings of the chunks.
        distributed_optimizer: True to shard the optimizer state over the data and context ranks.
        overlap: True to overlap the reduction of gradients, and the all-gather of parameters, with compute.
    """
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed_optimizer,
    )
    # Buckets let a chunk's reduction start before its backward pass ends. Only the first chunk needs them: it is last
    # in the backward pass, and the reductions of the other chunks already overlap the compute of those before them.
    return [
        DistributedDataParallel(config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


class MegatronAdamW:
    """AdamW of megatron-core, with fp32 master weights for bf16 models and clipping over all axes of the mesh."""

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        shards: Shards,
        mesh: Mesh,
        config: TransformerConfig,
        training: Training,
        optimizer: OptimizerSection,
    ):
        """Create the optimizer and install its callbacks in `config`, which megatron-core's schedule calls.

        Args:
            chunks: wrapped chunks (`wrap`).
            shards: description of their parameters.
            mesh: process groups of this rank.
            config: megatron-core's settings of the chunks; changed in place.
            training: the recipe's `training` section.
            optimizer: the recipe's `optimizer` section.
        """
        ddp: Any = chunks[0].ddp_config
        self.max_norm = training.gradient_clip or math.inf
        settings = OptimizerConfig(
            optimizer="adam",
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.epsilon,
            # An infinite bound instead of 0: without clipping the norm is still computed, checked and logged.
            clip_grad=self.max_norm,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=ddp.use_distributed_optimizer,
            overlap_param_gather=ddp.overlap_param_gather,
        )
        self.chunks, self.shards, self.mesh, self.config = chunks, shards, mesh, config
        # megatron-core's own rule exempts every vector from the decay.
        exempt = ParamWithNamePredicate("not decayed", lambda param, name: not decays(name, param.dim()))
        overrides = {ParamKey(with_name_predicate=exempt): ParamGroupOverride(wd_mult=0.0)}
        self.megatron = get_megatron_optimizer(settings, chunks, config_overrides=overrides)
        for part in self._parts():
            for group in part.optimizer.param_groups:
                # megatron-core applies the multiplier (0 for norms) in its own scheduler, which is not used here.
                group["weight_decay"] = training.weight_decay * group["wd_mult"]
                if isinstance(part.optimizer, torch.optim.AdamW):
                    # `foreach` None is torch's default: one kernel per operation on a GPU, a loop on a CPU.
                    group.update(fused=optimizer.fused, foreach=False if optimizer.fused else None)
        config.finalize_model_grads_func = self._finalize
        config.grad_scale_func = self.megatron.scale_loss
        if ddp.overlap_grad_reduce:
            config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
            config.param_sync_func = None

    @torch.no_grad()
    def _finalize(self, model: list[nn.Module], num_tokens: Tensor | None = None, **groups) -> None:
        """Sum the gradients over ranks and divide them by the number of targets in the global batch.

        The pipeline schedule calls this once per step, after the last backward pass. On return `param.main_grad` is the
        gradient of the mean loss per target, for any distribution of targets over ranks and micro-batches.

        Args:
            model: chunks of this rank.
            num_tokens: number of targets of this rank's micro-batches; 0-d, on the device, valid on the last stage.
            groups: process groups, passed through to megatron-core.
        """
        # None instead of `num_tokens` disables megatron-core's division, which reads the number on the host to test for
        # zero and so waits for the device in every step. The same division without that test follows.
        finalize_model_grads(model, None, **groups)
        if num_tokens is None:
            return
        # Only the last stage sees the loss and counts its targets; the other stages hold zeros.
        last = dist.get_process_group_ranks(self.mesh.pipeline.group)[-1]
        dist.broadcast(num_tokens, last, group=self.mesh.pipeline.group)
        # Data ranks have different sequences, context ranks different tokens of them; tensor ranks have the same ones.
        dist.all_reduce(num_tokens, group=self.mesh.data_context.group)
        # At least 1: in a batch without targets all gradients are 0, and 0 / 0 would turn them into NaN.
        for chunk in self.chunks:
            chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))  # type: ignore[operator]

    def _parts(self) -> list[MegatronOptimizer]:
        """Return the optimizers that own parameters: dense and expert parameters have separate ones."""
        parts = getattr(self.megatron, "chained_optimizers", [self.megatron])
        return [part for part in parts if not part.is_stub_optimizer]

    def zero_grad(self) -> None:
        """Clear the gradient buffers."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.megatron.zero_grad()

    def step(self, learning_rate: float, ewc: Ewc | None = None) -> tuple[float, Pull | None]:
        """Clip and update as `Optimizer.step` describes."""
        for group in self.megatron.param_groups:
            group["lr"] = learning_rate
        self.megatron.prepare_grads()
        held = ewc is not None and ewc.holds
        return step_with_ewc(
            ewc,
            list(self.states()) if held else [],
            self._gradients() if held else [],
            [part.optimizer for part in self._parts()],
            clip=self._clip,
            update=self.megatron.step_with_ready_grads,
        )

    def _clip(self) -> float:
        """Clip the gradients by their global L2 norm; return the norm before clipping."""
        grad_norm = float(self.megatron.get_grad_norm())
        if (factor := self.max_norm / (grad_norm + 1e-6)) < 1:
            # In place: megatron-core's clipping multiplies into a temporary and copies it back.
            params = [param for part in self._parts() for param in part.get_parameters()]
            if grads := [param.grad for param in params if param.grad is not None]:  # a rank may own no parameter
                torch._foreach_mul_(grads, factor)
        return grad_norm

    def _gradients(self) -> list[Tensor]:
        """Return the 1-D gradient of each state in the order of `states`, as views of the fp32 gradient buffer."""
        runs = [(param, start, master.numel()) for part in self._parts() for param, master, start in _masters(part)]
        return [param.main_grad.view(-1)[start : start + size] for param, start, size in runs]  # type: ignore

    @property
    def one_sample(self) -> bool:
        """True if a sample must run on one data-parallel rank at a time (`Optimizer.one_sample`)."""
        # Experts receive tokens of several ranks: their gradient could not be separated into two samples.
        mesh = self.mesh
        return bool(self.config.num_moe_experts) and mesh.tensor.size * mesh.expert.size * mesh.expert_tensor.size > 1

    @contextmanager
    def per_sample(self) -> Iterator[Callable[[list[Tensor]], None]]:
        """Square gradients per sample, as `Optimizer.per_sample` describes.

        Two cases: if the ranks hold one sample in total, its gradient is summed over them and squared once here.
        Otherwise every rank completes the gradient of its own sample, squares it in the buffer, and the usual reduction
        sums the squares.
        """
        config, single_sample = self.config, self.one_sample or self.mesh.data_context.size == 1
        saved = config.finalize_model_grads_func, config.no_sync_func

        def add(sums: list[Tensor]) -> None:
            """Add the squared gradient of the last backward pass to `sums`."""
            if single_sample:
                fisher_accumulate_(sums, self._gradients(), 1.0)
            else:
                # Context-parallel ranks hold the same sample, and each of them has added its square.
                torch._foreach_add_(sums, self._gradients(), alpha=1.0 / self.mesh.context.size)

        with ExitStack() as stack:
            # Without `no_sync` buckets would be summed over ranks during the backward pass, before they are squared.
            for chunk in self.chunks:
                stack.enter_context(chunk.no_sync())  # type: ignore[operator]
            config.no_sync_func = nullcontext
            config.finalize_model_grads_func = self._finish_sample if single_sample else self._square_and_sum
            try:
                yield add
            finally:
                config.finalize_model_grads_func, config.no_sync_func = saved

    def _finish_sample(self, *_, **__) -> None:
        """Complete the gradient of one sample: sum over the ranks of its tokens, and over copies of tied weights."""
        for chunk in self.chunks if self.one_sample or self.mesh.context.size > 1 else ():
            for expert, buffers in ((False, chunk.buffers), (True, chunk.expert_parallel_buffers)):
                axis = self.mesh.replicas(expert=expert) if self.one_sample else self.mesh.context
                for buffer in buffers:  # type: ignore[union-attr]
                    dist.all_reduce(buffer.grad_data, group=axis.group)
        _allreduce_non_tensor_model_parallel_grads(list(self.chunks), self.config, self.mesh.tensor.group)
        _allreduce_word_embedding_grads(list(self.chunks), self.config)

    def _square_and_sum(self, *_, **__) -> None:
        """Complete and square the gradients, then let megatron-core reduce the squares as it reduces gradients."""
        self._finish_sample()
        for buffer in self._buffers():
            buffer.square_()
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_grad_reduce:  # type: ignore[union-attr]
                chunk.start_grad_sync()  # type: ignore[operator]
            chunk.finish_grad_sync()  # type: ignore[operator]

    def _buffers(self) -> list[Tensor]:
        """Return the flat gradient buffers of all chunks, those of experts included."""
        buffers = [[*chunk.buffers, *chunk.expert_parallel_buffers] for chunk in self.chunks]  # type: ignore
        return [buffer.grad_data for of_chunk in buffers for buffer in of_chunk]

    def states(self) -> Iterator[ParameterState]:
        """Yield this rank's optimizer states, all as 1-D views."""
        shard_of = {param: shard for shard, param in named_shards(self.chunks, self.shards)}
        for part in self._parts():
            for param, master, start in _masters(part):
                values = {"master": master, **moments_of(part.optimizer, master)}
                flat = {name: tensor.detach().view(-1) for name, tensor in values.items()}
                yield ParameterState(shard_of[param], start, flat, replicated=not hasattr(part, "gbuf_ranges"))

    def loaded(self, num_steps: int) -> None:
        """Set the number of updates after a checkpoint has been read into the states."""
        for part in self._parts():
            set_num_steps(part.optimizer, num_steps)


def _masters(part: MegatronOptimizer) -> Iterator[tuple[nn.Parameter, Tensor, int]]:
    """Yield each parameter that this rank updates, its fp32 master, and the master's start in the flat parameter."""
    # DistributedOptimizer: a flat range of each parameter, which may be part of a row.
    if hasattr(part, "gbuf_ranges"):
        for param, (group, order) in part.model_param_group_index_map.items():
            run = part._get_model_param_range_map(param)["param"]
            yield param, part.optimizer.param_groups[group]["params"][order], run.start
        return
    # bf16 model: whole fp32 copies; parameters that are fp32 already are their own masters.
    if hasattr(part, "float16_groups"):
        pairs = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
        for params, masters in [*pairs, *((group, group) for group in part.fp32_from_fp32_groups)]:
            yield from ((param, master, 0) for param, master in zip(params, masters, strict=True))
        return
    for group in part.optimizer.param_groups:
        yield from ((param, param, 0) for param in group["params"])
