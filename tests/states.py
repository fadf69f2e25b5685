"""Values of an optimizer's states, cut on each rank, put together to whole parameters."""

import numpy as np


def pieces(engine, values):
    """What this rank is the one to count, as (name, whole shape, offset, array)."""
    found = []
    for state, tensor in zip(engine.optimizer.states(), values, strict=True):
        if state.shard.is_first_copy and (
            not state.replicated or engine.mesh.replicas(expert=state.shard.expert).rank == 0
        ):
            for offset, piece in state.shard.rectangles(tensor, state.start):
                found.append((state.shard.name, state.shard.shape, offset, piece.numpy().copy()))
    return found


def whole(ranks_pieces) -> dict[str, np.ndarray]:
    arrays = {}
    for name, shape, offset, piece in (item for part in ranks_pieces for item in part):
        array = arrays.setdefault(name, np.full(shape, np.nan, np.float64))
        at = tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))
        assert np.isnan(array[at]).all(), "each weight once"
        array[at] = piece
    assert not any(np.isnan(array).any() for array in arrays.values())
    return arrays
