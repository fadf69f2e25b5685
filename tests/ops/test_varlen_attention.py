import pytest
import torch

from igla_mega.ops.ring_attention import ring_attention
from igla_mega.ops.varlen_attention import flat_offsets, varlen_attention


def test_documents_of_all_rows_stand_one_behind_the_other():
    # The second row ends with padding, which is a document of its own.
    assert flat_offsets([[0, 3, 10], [0, 4, 8]], 10) == ([0, 3, 10, 14, 18, 20], 7)


def test_a_row_without_borders_is_one_document():
    assert flat_offsets([[0, 6], [0, 6]], 6) == ([0, 6, 12], 6)


@pytest.mark.parametrize("says_grouped", [True, False], ids=["torch 2.12", "torch 2.11"])
def test_fewer_heads_of_keys_are_said_only_where_torch_has_a_word_for_it(says_grouped, monkeypatch):
    from torch.nn.attention import varlen

    def with_word(q, k, v, *borders, scale, window_size, enable_gqa=False):
        assert enable_gqa and window_size == (-1, 0)
        return q

    def without(q, k, v, *borders, scale, window_size):
        return q

    monkeypatch.setattr(varlen, "varlen_attn", with_word if says_grouped else without)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    q, k = torch.randn(6, 1, 4, 8), torch.randn(6, 1, 2, 8)
    assert torch.equal(varlen_attention(q, k, k, [[0, 2, 6]], 0.5), q)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_one_call_for_all_documents_equals_ring_attention_by_blocks():
    generator = torch.Generator().manual_seed(0)
    rows = [[0, 100, 101, 256], [0, 30, 200]]
    shapes = [(256, 2, 8, 64), (256, 2, 2, 64), (256, 2, 2, 64)]
    inputs = [torch.randn(shape, generator=generator).cuda().bfloat16() for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator).cuda().bfloat16()
    upstream[200:, 1] = 0  # padding counts for nothing
    found = []
    for attend in (
        lambda q, k, v: varlen_attention(q, k, v, rows, 0.125),
        lambda q, k, v: ring_attention(q, k, v, None, scale=0.125, cu_seqlens=rows),
    ):
        given = [t.clone().requires_grad_() for t in inputs]
        out = attend(*given)
        out.backward(upstream)
        found.append([out[:200], out[200:, 0], *(t.grad for t in given)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
