"""Tests of the geometry of shards by brute force: every element of the whole is on exactly one rank, the right one."""

import random

import torch

from igla_mega.model.shards import Shard, local_values


def local_parts(whole: torch.Tensor, dim: int | None, tensor_size: int, halves: int) -> list[torch.Tensor]:
    """Return each tensor-parallel rank's part, split by megatron-core's rule."""
    if dim is None:
        return [whole.clone() for _ in range(tensor_size)]
    split = [half.chunk(tensor_size, dim) for half in whole.chunk(halves, 0)]
    return [torch.cat([half[rank] for half in split]) for rank in range(tensor_size)]


def random_cases(num_cases: int):
    """Yield parameters of every kind: (whole with padding rows, number of real rows, dim, tensor_size, halves)."""
    draw = random.Random(7)
    for _ in range(num_cases):
        tensor_size = draw.choice([1, 2, 3, 4])
        dim = draw.choice([None, 0, 0, 1])
        halves = draw.choice([1, 2]) if dim == 0 else 1
        rows = draw.randint(1, 5) * (tensor_size * halves if dim == 0 else 1)
        columns = draw.randint(1, 6) * (tensor_size if dim == 1 else 1)
        shape = (rows,) if dim is None and draw.random() < 0.4 else (rows, columns)
        padding = draw.randint(0, min(rows - 1, tensor_size - 1)) if dim == 0 and halves == 1 else 0
        whole = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
        yield draw, whole, rows - padding, dim, tensor_size, halves


def cut(draw: random.Random, num_elements: int) -> list[tuple[int, int]]:
    """Split a flat range at random places, some of the runs empty."""
    places = sorted(draw.randint(0, num_elements) for _ in range(draw.randint(0, 4)))
    return list(zip([0, *places], [*places, num_elements], strict=True))


def test_rectangles_of_all_ranks_and_runs_cover_the_whole_exactly_once():
    num_partial = 0
    for draw, whole, real_rows, dim, tensor_size, halves in random_cases(400):
        real = whole[:real_rows]
        seen, values = torch.zeros(real.shape, dtype=torch.int), torch.zeros(real.shape)
        for rank, local in enumerate(local_parts(whole, dim, tensor_size, halves)):
            shard = Shard("w", tuple(real.shape), tuple(local.shape), dim, rank, tensor_size, halves, False)
            assert shard.is_first_copy == (dim is not None or rank == 0)
            flat = local.reshape(-1)
            for start, stop in cut(draw, flat.numel()):
                num_partial += start % max(1, local.stride(0)) != 0
                for offset, piece in shard.rectangles(flat[start:stop], start):
                    place = tuple(slice(at, at + size) for at, size in zip(offset, piece.shape, strict=True))
                    assert piece.dim() == whole.dim() and piece.numel() > 0
                    assert values[place].shape == piece.shape, "reaches over the edge"
                    if shard.is_first_copy:
                        seen[place] += 1
                    values[place] = piece
        assert (seen == 1).all()
        assert torch.equal(values, real)
    assert num_partial > 100, "no run began inside a row: the test shows nothing"


def test_rectangles_are_views_so_that_writing_to_them_writes_the_parameter():
    whole = torch.zeros(8, 3)
    shard = Shard("w", (8, 3), (4, 3), 0, 1, 2, 2, False)
    run = whole[:4].view(-1)[2:11]
    for _, piece in shard.rectangles(run, 2):
        piece.fill_(1.0)
    assert (run == 1).all() and whole.sum() == 9


def test_rows_that_pad_the_vocabulary_are_dropped():
    # 10 ids on 4 ranks: 3 rows each, the last rank holds id 9 and two rows of padding.
    shard = Shard("output_layer.weight", (10, 2), (3, 2), 0, 3, 4, 1, False)
    [(offset, piece)] = shard.rectangles(torch.arange(6.0))
    assert offset == (9, 0) and piece.tolist() == [[0.0, 1.0]]
    # 5 ids on 4 ranks: the last rank's rows are all padding.
    assert list(Shard("output_layer.weight", (5, 2), (2, 2), 0, 3, 4, 1, False).rectangles(torch.zeros(4))) == []


def test_a_run_of_any_length_is_a_few_rectangles():
    shard = Shard("w", (2000, 64), (1000, 64), 0, 0, 2, 2, False)
    assert len(list(shard.rectangles(torch.zeros(63_990), 5))) <= 4


def test_a_plain_tensor_is_held_whole_from_the_start():
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    values, start = local_values(weight)
    assert start == 0 and not values.requires_grad and values.data_ptr() == weight.data_ptr()
