"""Expert attention: the card in loops, its losses and counts, and leaving heads out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful.convert.shrp_prune import heads_to_keep, prune_heads
from heedful.mixers.heads.shrp import ExpertAttention


def make(**options):
    return ExpertAttention(12, **{"heads": 4, "hidden": 10, "dtype": torch.float64, **options})


def literal(mixer, x, mask):
    """One token at a time; gives outputs, probabilities and heads."""
    d = mixer.head_dim
    outputs, probabilities, heads = [], [], []
    for row, shown in zip(x, mask, strict=True):
        seen = [t for t in range(len(row)) if shown[t]]
        for t, token in enumerate(row):
            source = token if mixer.route == "token" else sum(row[s] for s in seen) / len(seen)
            logits = (mixer.router.weight @ source).exp()
            g = logits / logits.sum()
            h = int(g.argmax())
            own = slice(h * d, (h + 1) * d)
            q, k, v = (
                lambda z, m=m: m.weight[own] @ z + m.bias[own]  # noqa: B023
                for m in (mixer.query, mixer.key, mixer.value)
            )
            weight = [(q(token) @ k(row[s]) / d**0.5).exp() for s in seen]
            o = sum(w * v(row[s]) for w, s in zip(weight, seen, strict=True)) / sum(weight)
            inner = F.gelu(mixer.expand_in.weight @ o + mixer.expand_in.bias)
            outputs.append(g[h] * (mixer.expand_out.weight @ inner + mixer.expand_out.bias))
            if shown[t]:
                probabilities.append(g)
                heads.append(h)
    return torch.stack(outputs).view_as(x), torch.stack(probabilities), heads


@pytest.mark.parametrize("route", ["token", "sequence"])
def test_equals_the_card(route):
    mixer = make(route=route)
    x = torch.randn(2, 6, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 6, [True, True, False, True, False, False]])
    ours = mixer(x, mask=mask)
    expected, probabilities, heads = literal(mixer, x, mask)
    torch.testing.assert_close(ours[mask], expected[mask])
    usage = torch.bincount(torch.tensor(heads), minlength=4)
    assert torch.equal(mixer.usage(x, mask=mask), usage)
    loss = 0.01 * 4 * (usage / len(heads) * probabilities.mean(0)).sum()
    torch.testing.assert_close(mixer.aux_losses["load_balance"], loss)
    weight = torch.randn_like(ours)[mask]
    leaves = [x, *mixer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((ours[mask] * weight).sum() + mixer.aux_losses["load_balance"], leaves),
        torch.autograd.grad((expected[mask] * weight).sum() + loss, leaves),
    )


def test_losses_are_for_training_alone():
    mixer, x = make().eval(), torch.randn(1, 3, 12, dtype=torch.float64)
    mixer(x)
    assert mixer.aux_losses == {}
    one = make(heads=1, head_dim=3)
    one(x)
    assert one.aux_losses == {}


def test_parameters():
    mixer = ExpertAttention(768, device="meta")  # twelve heads of 64, expander 64 - 3072 - 768
    expander = 64 * 3072 + 3072 + 3072 * 768 + 768
    assert sum(p.numel() for p in mixer.parameters()) == 3 * (768 * 768 + 768) + 12 * 768 + expander


def test_heads_to_keep():
    usage = torch.tensor([5, 40, 15, 40])
    assert heads_to_keep(usage, 0.4) == [1]
    assert heads_to_keep(usage, 0.41) == [1, 3]
    assert heads_to_keep(usage, 0.8) == [1, 3]
    assert heads_to_keep(usage, 0.95) == [1, 2, 3]
    assert heads_to_keep(usage, 1.0) == [0, 1, 2, 3]


def test_unused_heads_may_be_left_out_without_loss():
    mixer, x = make(), torch.randn(2, 20, 12, dtype=torch.float64)
    x[..., 0] = 1.0
    with torch.no_grad():
        mixer.router.weight[[0, 2]] -= 1e3 * torch.eye(12, dtype=torch.float64)[0]
        mixer.router.weight[3, 1:] = -mixer.router.weight[1, 1:]
        mixer.router.weight[3, 0] = mixer.router.weight[1, 0]  # the sign of x decides between 1 and 3
    keep = heads_to_keep(mixer.usage(x), 1.0)
    assert keep == [1, 3]
    pruned = prune_heads(mixer, keep)
    # The probabilities of the others are below e^-900, nothing in float64.
    torch.testing.assert_close(pruned(x), mixer(x))


def test_one_head_needs_no_router():
    mixer, x = make(), torch.randn(2, 6, 12, dtype=torch.float64)
    pruned = prune_heads(mixer, [2])
    assert pruned.router is None
    x = x + 100 * mixer.router.weight[2] - 100 * mixer.router.weight[[0, 1, 3]].mean(0)
    with torch.no_grad():
        mixer.router.weight[[0, 1, 3]] = 0.0
        mixer.router.weight[2] *= 100.0
    assert mixer.usage(x)[2] == 12
    torch.testing.assert_close(pruned(x), mixer(x))  # its gate is 1 to rounding
    assert sum(p.numel() for p in pruned.parameters()) == 3 * (12 * 3 + 3) + 3 * 10 + 10 + 10 * 12 + 12


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="route is 'layer', must be one of"):
        make(route="layer")
    with pytest.raises(ValueError, match="share is 0, must be above 0"):
        heads_to_keep(torch.ones(3), 0)
    with pytest.raises(ValueError, match=r"keep is \[4\], must name some of the heads 0 to 3"):
        prune_heads(make(), [4])
