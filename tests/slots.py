"""Values of an optimizer's slots, cut on each rank, put together to whole parameters."""

import numpy as np


def pieces(engine, values):
    """What this rank is the one to count, as (name, whole shape, offset, array)."""
    found = []
    for slot, tensor in zip(engine.optimizer.slots(), values, strict=True):
        if slot.shard.is_first_copy and (
            not slot.replicated or engine.mesh.replicas(expert=slot.shard.expert).rank == 0
        ):
            for offset, piece in slot.shard.rectangles(tensor, slot.start):
                found.append((slot.shard.name, slot.shard.shape, offset, piece.numpy().copy()))
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
