"""Instruction tuning: packed conversations against transformers, one conversation at a time."""

import json

import numpy as np
import ranks
import tiny
import torch
import tuned

from igla_mega.data.micro_batch import SEQUENCES, MicroBatch
from igla_mega.data.packing import Packing, fill_row
from igla_mega.data.tokenizer import load_tokenizer, train_bpe
from igla_mega.data.tuning import chat
from igla_mega.engine.step import evaluate
from igla_mega.model.output import TokenLogProbs
from igla_mega.model.spec import Documents

TEXTS = [
    ("Add 1 and 2.", "3"),
    ("Say hello", "Hello there."),
    ("What is a tuple?", "An immutable list"),
    ("yes?", "no"),
    ("a", "b"),
    ("Count", "one two"),
    ("Zero", "0"),
]
SEQUENCE = 96


def samples(folder):
    """Conversations through a real tokenizer, its template and the mask."""
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"{a} {b} ### user assistant\n"}) + "\n" for a, b in TEXTS) * 4)
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else train_bpe([file], 300, folder)
    plain = chat.load_template(folder, "plain")
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in TEXTS]
    return [chat.tokenize(conversation, tokenizer, plain, "here") for conversation in turns]


def batch_of(rows):
    tensors = [torch.tensor(np.stack([getattr(row, name) for row in rows])) for name in SEQUENCES]
    return MicroBatch(*tensors, documents=[row.documents for row in rows])


def packed(folder):
    found = samples(folder)
    packing = Packing(np.array([len(s.tokens) for s in found]), SEQUENCE, seed=0)
    return found, [fill_row([found[i] for i in packing.samples(row)], SEQUENCE, 0) for row in range(packing.num_rows)]


def recipe(**distributed):
    return tiny.recipe(model={"vocab_size": 300, "max_position": SEQUENCE}, training={"batch_size": 4}, **distributed)


def engine(folder, **distributed):
    return tuned.engine(recipe(**distributed), None, base=folder / "hf-native")[0]


def losses(folder):
    """Ours of packed rows, and transformers' of each conversation by itself."""
    model = tuned.llama(folder / "hf", vocab_size=300, max_position_embeddings=SEQUENCE)
    found, rows = packed(folder)
    assert len(rows) <= 4
    sums, targets = 0.0, 0
    with torch.no_grad():
        for sample in found:
            labels = torch.tensor(np.where(sample.targets, sample.tokens, -100))[None]
            count = int(sample.targets[1:].sum())
            sums += model(torch.tensor(sample.tokens)[None], labels=labels).loss.item() * count
            targets += count
    return packed_loss(folder), sums / targets, len(rows), len(found)


def packed_loss(folder, **distributed):
    built = engine(folder, **distributed)
    rows = packed(folder)[1]
    rows += [fill_row([], SEQUENCE, 0)] * (4 - len(rows))
    size, layout = built.layout.micro_batch_size, built.layout
    starts = [(m * layout.data + built.mesh.data.rank) * size for m in range(layout.num_microbatches)]
    return evaluate(built, iter([batch_of(rows[at : at + size]) for at in starts]), 1)


def test_the_loss_of_packed_conversations_is_that_of_transformers_one_by_one(tmp_path):
    [(ours, theirs, num_rows, num_samples)] = ranks.run(1, losses, tmp_path)
    print(f"{num_samples} conversations in {num_rows} rows: {ours:.7f} nats, transformers {theirs:.7f}")
    assert num_rows < num_samples and abs(ours - theirs) < 1e-6
    for layout in ({}, {"tensor_parallel": 2}, {"context_parallel": 2}, {"pipeline_parallel": 2}):
        num_ranks = 2 if layout else 1
        assert abs(ranks.run(num_ranks, packed_loss_of, tmp_path, layout)[0] - theirs) < 1e-6


def packed_loss_of(folder, layout):
    return packed_loss(folder, **layout)


def neighbours(folder):
    """Log-probabilities of one conversation beside two others of the same length."""
    tuned.llama(folder / "hf", vocab_size=300, max_position_embeddings=SEQUENCE)
    built = engine(folder)
    chunk = built.chunks[0].module
    chunk.output = TokenLogProbs()
    kept = samples(folder)[2]
    found = []
    for seed in (1, 2):
        draw = np.random.default_rng(seed)
        before, behind = (chat.Sample(draw.integers(0, 300, n), np.ones(n, bool)) for n in (13, 20))
        row = fill_row([before, kept, behind], SEQUENCE, 0)
        batch = batch_of([row])
        with torch.no_grad():
            log_probs = chunk(
                batch.tokens,
                batch.position_ids,
                None,
                labels=batch.labels,
                loss_mask=batch.loss_mask,
                packed_seq_params=Documents(rows=batch.documents),
            )
        found.append(log_probs[row.documents[1] : row.documents[2], 0].tolist())
    return found


def test_another_conversation_in_the_row_changes_no_bit(tmp_path):
    [(one, other)] = ranks.run(1, neighbours, tmp_path)
    assert one == other and any(one)
