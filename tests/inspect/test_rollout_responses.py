"""Rollout responses of DCAL: the row of the rollout, and that it needs no table."""

from __future__ import annotations

import pytest
import timm
import torch

from heedful.inspect import AttentionRollout, Site, capture, high_responses, rollout_responses
from tests.inspect.test_capture import largest


def tables(depth=3, batch=2, heads=3, n=7):
    torch.manual_seed(0)
    return [torch.randn(batch, heads, n, n, dtype=torch.float64).mul(2).softmax(-1) for _ in range(depth)]


def test_equals_the_row_of_the_product():
    layers = tables()
    for b in range(2):
        product = torch.eye(7, dtype=torch.float64)
        for s in layers:  # the last layer leftmost
            mixed = torch.zeros(7, 7, dtype=torch.float64)
            for i in range(7):
                for j in range(7):
                    mixed[i, j] = 0.5 * sum(s[b, h, i, j] for h in range(3)) / 3 + 0.5 * (i == j)
            product = mixed @ product
        exact = {"rtol": 1e-12, "atol": 1e-14}  # float64
        torch.testing.assert_close(rollout_responses(layers)[b], product[0], **exact)
        torch.testing.assert_close(rollout_responses(layers, token=4)[b], product[4], **exact)
        mean = rollout_responses(layers, token=slice(1, None))[b]
        torch.testing.assert_close(mean, product[1:].mean(0), **exact)
    one = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(rollout_responses(layers, residual=0.2).sum(-1), one)


def test_of_a_model_equals_the_rollout():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=12, num_heads=3).eval()
    whole, sites = AttentionRollout(), []
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), capture(model, whole):
        model(x)
    with torch.no_grad(), capture(model, sites.append):
        model(x)
    assert whole.table is not None
    torch.testing.assert_close(rollout_responses(sites), whole.table[:, 0])


def test_rows_that_do_not_add_up_to_one_are_made_to():
    layers = [0.5 * s for s in tables()]  # as with a sink logit
    whole = AttentionRollout(residual=0.25)
    for s in layers:
        whole.add(s)
    assert whole.table is not None
    torch.testing.assert_close(rollout_responses(layers, residual=0.25), whole.table[:, 0])


def test_no_table_for_long_inputs():
    torch.manual_seed(0)
    n = 8192
    kept = {"pattern": None, "bias": None, "key_mask": None, "query_offset": 0}
    q, k = torch.randn(2, 1, 1, n, 4)
    site = Site(torch.nn.Identity(), "0.attn", 0, False, q, k, k, 0.5, kept)
    site.pieces = lambda: (slice(i, i + 512) for i in range(0, n, 512))
    with largest() as seen:
        row = rollout_responses([site])
    assert seen.most <= 512 * n  # pieces alone
    expected = 0.5 * (q[0, 0, :1] @ k[0, 0].T * 0.5).softmax(-1)
    expected[0, 0] += 0.5
    torch.testing.assert_close(row, expected)


def test_high_responses():
    response = torch.tensor([[0.1, 0.5, 0.2, 0.05, 0.15], [0.3, 0.1, 0.0, 0.4, 0.2]])
    assert high_responses(response, share=0.4).tolist() == [[1, 2], [0, 3]]
    assert high_responses(response).tolist() == [[1], [3]]  # one at least
    assert high_responses(torch.rand(1, 10), share=0.3).shape == (1, 3)
    assert high_responses(response, share=1.0).tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="layers is empty"):
        rollout_responses([])
    with pytest.raises(ValueError, match="weights of 5 x 5, must be square and of one length"):
        rollout_responses([torch.ones(1, 1, 5, 5), torch.ones(1, 1, 4, 4)])
    with pytest.raises(ValueError, match=r"share is 1.5, must lie in \(0, 1\]"):
        high_responses(torch.ones(1, 4), share=1.5)
