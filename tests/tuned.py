"""Tiny models with adapters, on any layout, and the same models of transformers and PEFT."""

import tiny
import torch
import torch.distributed as dist

from igla_mega.checkpoint import adapters, hugging_face
from igla_mega.checkpoint.load import load_weights
from igla_mega.checkpoint.pieces import read_whole
from igla_mega.config.features import Lora
from igla_mega.distributed.mesh import build_mesh
from igla_mega.engine import ddp, fsdp
from igla_mega.engine.step import Engine, train_step
from igla_mega.model import build, lora, nf4
from igla_mega.model.shards import local_runs, named_shards, shards_of
from igla_mega.model.spec import DTYPES
from igla_mega.plan.choose import choose_layout

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def section(**changes) -> Lora:
    return Lora.model_validate({"rank": 4, "alpha": 8, "target_modules": ALL, **changes})


def engine(recipe, section: Lora | None, *, base=None, start=None, quantized=None, mesh=None):
    """An engine whose adapters train; `lora.Switch` beside it.

    Args:
        base: checkpoint of the base's weights; by default the recipe's initial ones.
        start: whole matrices of the adapters; by default PEFT's initial ones.
        quantized: keep the base in NF4 and compute in this dtype.
        mesh: of an engine made before in this process.
    """
    layout = choose_layout(recipe, dist.get_world_size(), "cpu")
    mesh = mesh or build_mesh(layout, recipe.training.seed)
    sharded, dtype = layout.strategy == "FSDP", DTYPES[recipe.distributed.precision]
    how = build.Execution(torch.float32 if sharded else dtype, torch.device("cpu"), layout.recompute)
    config = build.transformer_config(recipe.model, layout, how)
    chunks = build.build_chunks(config, recipe.model)
    bare = shards_of(chunks, mesh, recipe.model.vocab_size)
    if quantized is not None:
        quantize(chunks, bare, base, mesh, quantized)
    switch = lora.attach(chunks, section, context=(mesh.context.rank, mesh.context.size)) if section else None
    shards = shards_of(chunks, mesh, recipe.model.vocab_size)
    if sharded:
        fsdp.wrap(chunks[0], mesh, dtype, torch.device("cpu"))
    else:
        build.materialize(chunks, torch.device("cpu"))
    if base is None:
        build.initialize(local_runs(chunks, shards), recipe.model, recipe.training.seed)
    else:
        pairs = [(shard, param) for shard, param in named_shards(chunks, shards) if not lora.is_adapter(shard.name)]
        load(base, pairs, mesh, partly=quantized is not None)
    if section:
        lora.initialize(local_runs(chunks, shards), recipe.training.seed)
        lora.initialize_magnitudes(chunks)
        if start is not None:
            with torch.no_grad():
                adapters.place(start, named_shards(chunks, shards))
    if sharded:
        optimizer = fsdp.ShardedAdamW(chunks[0], shards, mesh, config, recipe.training, recipe.optimizer)
        return Engine(mesh, layout, chunks, optimizer), shards, switch
    wrapped = ddp.wrap(
        chunks,
        config,
        distributed_optimizer=layout.distributed_optimizer and mesh.data_context.size > 1,
        overlap=False,
    )
    optimizer = ddp.MegatronAdamW(wrapped, shards, mesh, config, recipe.training, recipe.optimizer)
    return Engine(mesh, layout, wrapped, optimizer), shards, switch


def load(base, pairs, mesh, *, partly: bool) -> None:
    if not partly:
        load_weights(base, pairs, mesh.host_group)
        return
    for shard, param in pairs:
        param.data.copy_(read(base, shard, param.dtype))


def read(base, shard, dtype):
    """This rank's part of one parameter of a checkpoint."""
    whole = read_whole(adapters.Reader(base), shard.name).to(dtype)
    values = torch.empty(shard.local_shape, dtype=dtype).view(-1)
    values.zero_()
    for offset, piece in shard.rectangles(values):
        piece.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))])
    return values.view(shard.local_shape)


def quantize(chunks, shards, base, mesh, compute_dtype) -> None:
    by_name = {shard.name: shard for shard in shards.values()}
    nf4.quantize_chunks(chunks, lambda name: read(base, by_name[name], torch.float32), compute_dtype=compute_dtype)


def gathered(built, shards) -> dict[str, torch.Tensor]:
    """The whole matrices of the adapters, on every rank."""
    parts: dict[str, list] = {}
    for state in built.optimizer.states():
        rectangles = list(state.shard.rectangles(state.values["master"], state.start))
        parts.setdefault(state.shard.name, []).extend((state.shard.shape, o, p.clone()) for o, p in rectangles)
    everyones: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, parts)
    whole = {}
    for part in everyones:
        for name, pieces in part.items():
            for shape, offset, piece in pieces:
                target = whole.setdefault(name, torch.full(shape, float("nan")))
                target[tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))] = piece
    return whole


def steps(built, num_steps: int, learning_rate: float, *, dropout_seed: int | None = None, first: int = 0):
    reports = []
    for step in range(first, num_steps):
        rows = tiny.batches(step, built.layout, built.mesh.data.rank)
        if dropout_seed is not None:
            rows = seeded(rows, built, step, dropout_seed)
        report = train_step(built, rows, step=step, seed=1, learning_rate=learning_rate)
        reports.append((report.loss, report.grad_norm))
    return reports


def seeded(batches, built, step, seed):
    layout = built.layout
    for m, batch in enumerate(batches):
        first = step * tiny.ROWS + (m * layout.data + built.mesh.data.rank) * layout.micro_batch_size
        yield batch._replace(dropout_seed=(seed, first))


def llama(path, **changes):
    """A folder of transformers with a model of tiny's shape; returns the model too."""
    import transformers

    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "vocab_size": tiny.VOCAB,
            "max_position_embeddings": tiny.SEQUENCE,
            "initializer_range": 0.05,
            "rms_norm_eps": 1e-5,
            **changes,
        }
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(path)
    hugging_face.import_folder(path, path.parent / f"{path.name}-native", say=print)
    return model


def with_peft(model, section: Lora, *, seed: int = 3):
    """PEFT's model, its lora_B not zero, so that every matrix has a gradient from the first step."""
    import peft

    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=section.rank,
            lora_alpha=section.alpha,
            lora_dropout=section.dropout,
            target_modules=list(section.target_modules),
            use_rslora=section.use_rslora,
            use_dora=section.use_dora,
            task_type="CAUSAL_LM",
        ),
    )
    for name, param in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.02)
    return wrapped


def peft_adapters(wrapped) -> dict[str, torch.Tensor]:
    import peft

    state = peft.get_peft_model_state_dict(wrapped)
    return {adapters.native_name(name): tensor.detach().clone() for name, tensor in state.items()}


def peft_steps(wrapped, num_steps: int, recipe):
    """The same steps with torch's AdamW over all that PEFT trains: mean over targets, clipped."""
    params = [p for p in wrapped.parameters() if p.requires_grad]
    training, betas = recipe.training, (recipe.optimizer.beta1, recipe.optimizer.beta2)
    adam = torch.optim.AdamW(
        params,
        weight_decay=training.weight_decay,
        lr=training.learning_rate,
        betas=betas,
        eps=recipe.optimizer.epsilon,
    )
    reports = []
    layout = choose_layout(recipe, 1, "cpu")
    for step in range(num_steps):
        adam.zero_grad()
        batches = list(tiny.batches(step, layout, 0))
        targets = sum(b.loss_mask.sum() for b in batches)
        total = 0.0
        for b in batches:
            logits = wrapped(b.tokens).logits
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), b.labels.flatten(), reduction="none")
            loss = (losses * b.loss_mask.flatten()).sum() / targets
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(params, training.gradient_clip)
        adam.step()
        reports.append((total, norm.item()))
    return reports
