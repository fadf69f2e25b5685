import torch

from igla_mega.data.micro_batch import ROWS, SEQUENCES, MicroBatch, Routing


def batch(**more) -> MicroBatch:
    tokens = torch.arange(6).view(2, 3)
    return MicroBatch(tokens, tokens + 1, torch.ones(2, 3), tokens * 0, **more)


def test_a_function_reaches_every_tensor_of_the_rows_and_nothing_else():
    routing = Routing(torch.ones(2))
    changed = batch(reference=torch.ones(2), documents=[[0, 3]], dropout_seed=(1, 2), routing=routing).map_tensors(
        lambda tensor: tensor + 1
    )
    assert torch.equal(changed.tokens, torch.arange(6).view(2, 3) + 1)
    assert changed.reference is not None and changed.reference.tolist() == [2.0, 2.0]
    assert (changed.documents, changed.dropout_seed) == ([[0, 3]], (1, 2)) and changed.routing is routing


def test_a_field_that_is_not_given_stays_so():
    assert batch().map_tensors(torch.clone).reference is None


def test_every_tensor_field_is_listed():
    """A new field that holds one tensor per row must also move to the device."""
    annotated = {name for name, kind in MicroBatch.__annotations__.items() if "Tensor" in str(kind)}
    assert annotated == set(ROWS) and set(SEQUENCES) < set(ROWS)
