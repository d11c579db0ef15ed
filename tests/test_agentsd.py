from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from heedful.ops.token_merge import match_tokens
from heedful.steer.agentsd import AgentSD, MergePhase, agent_read
from tests.literal import assert_same_with_gradients


class Attention(nn.Module):
    """What diffusion networks have: self-attention, or cross-attention with a context."""

    def __init__(self, dim: int, heads: int, context: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k, self.to_v = (nn.Linear(context or dim, dim, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.seen: list[int] = []

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.seen.append(x.shape[1])
        source = x if context is None else context
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


class Network(nn.Module):
    """Attention on the whole map and on one of half its sides."""

    def __init__(self) -> None:
        super().__init__()
        self.full, self.lower = Attention(8, 2), Attention(8, 2)
        self.cross = Attention(8, 2, context=6)

    def forward(self, latent: Tensor, context: Tensor) -> Tensor:
        x = latent.flatten(2).mT
        x = x + self.full(x)
        x = x + self.cross(x, context=context)
        small = x.mT.unflatten(2, latent.shape[2:])[..., ::2, ::2]
        return x.sum() + self.lower(small.flatten(2).mT).sum()


def network() -> tuple[Network, Tensor, Tensor]:
    torch.manual_seed(0)
    return Network(), torch.randn(2, 8, 9, 8), torch.randn(2, 5, 6)


def literal_merge(x: Tensor, size: tuple, stride: tuple, count: int, agent_count: int):
    """One sequence (n, c): merged tokens, agents, and where each token's row stands."""
    cells = [(a, b) for a in range(size[0] // stride[0]) for b in range(size[1] // stride[1])]
    targets = [a * stride[0] * size[1] + b * stride[1] for a, b in cells]
    best = {}
    for i in range(len(x)):
        if i not in targets:
            cosine = [float((x[i] @ x[t] / (x[i].norm() * x[t].norm())).detach()) for t in targets]
            best[i] = (max(cosine), cosine.index(max(cosine)))
    order = sorted(best, key=lambda i: -best[i][0])

    def merged(r: int) -> Tensor:
        groups = [[x[t]] for t in targets]
        for i in order[:r]:
            groups[best[i][1]].append(x[i])
        return torch.stack([x[i] for i in order[r:]] + [sum(g) / len(g) for g in groups])

    kept = len(order) - count
    place = {i: kept + best[i][1] for i in order[:count]}
    place |= {i: row for row, i in enumerate(order[count:])}
    place |= {t: kept + row for row, t in enumerate(targets)}
    return merged(count), merged(agent_count), [place[i] for i in range(len(x))]


@pytest.mark.parametrize(("size", "stride"), [((6, 6), (3, 2)), ((5, 7), (2, 3))])
def test_merging_equals_one_token_at_a_time(size, stride):
    torch.manual_seed(1)
    x = torch.randn(2, size[0] * size[1], 4, dtype=torch.float64, requires_grad=True)
    match = match_tokens(x, size=size, stride=stride)

    def literal() -> list:
        return [literal_merge(row, size, stride, 12, 20) for row in x]

    assert_same_with_gradients(match.merge(x, 12), torch.stack([rows for rows, _, _ in literal()]), [x])
    assert_same_with_gradients(match.merge(x, 20), torch.stack([rows for _, rows, _ in literal()]), [x])
    back = torch.stack([rows[place] for rows, _, place in literal()])
    assert_same_with_gradients(match.unmerge(match.merge(x, 12), 12), back, [x])


def test_merging_nothing_and_all():
    x = torch.randn(2, 12, 4, dtype=torch.float64)
    match = match_tokens(x, size=(3, 4), stride=(2, 2))
    assert torch.equal(match.unmerge(match.merge(x, 0), 0), x)
    assert match.merge(x, 10).shape == (2, 2, 4)
    whole = match_tokens(x, size=(3, 4), stride=(3, 4))
    assert_close(whole.merge(x, 11), x.mean(1, keepdim=True))


def test_drawn_targets_stay_in_their_cells():
    x = torch.randn(1, 64, 4)
    match = match_tokens(x, size=(8, 8), stride=(4, 2), generator=torch.Generator().manual_seed(0))
    rows, columns = match.target[0] // 8, match.target[0] % 8
    assert sorted(zip((rows // 4).tolist(), (columns // 2).tolist(), strict=True)) == [
        (a, b) for a in range(2) for b in range(4)
    ]
    again = match_tokens(x, size=(8, 8), stride=(4, 2), generator=torch.Generator().manual_seed(1))
    assert not torch.equal(match.target, again.target)


def test_reading_through_agents_equals_the_formula():
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    a = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    first = torch.einsum("bhad,bhnd->bhan", a, k / 3**0.5).exp()
    u = first @ v / first.sum(-1, keepdim=True)
    second = torch.einsum("bhnd,bhad->bhna", q * (3**-0.5) ** 0.3, a).exp()
    expected = second @ u / second.sum(-1, keepdim=True) + 0.075 * v
    assert_same_with_gradients(agent_read(q, k, v, a), expected, [q, k, v, a])


def test_the_context_changes_full_maps_and_leaves_the_model_as_it_was():
    model, latent, context = network()
    before, wanted = dict(model.full.__dict__), model(latent, context)
    for module in (model.full, model.lower, model.cross):
        module.seen.clear()
    phases = (MergePhase(0, (4, 4), 0.4, 0.95), MergePhase(1, (2, 2), 0.4, 0.5))
    steer = AgentSD(phases=phases)
    with steer(model):
        agents = model(latent, context)
        assert model.full.seen == []  # not called: agents read
        merged = model(latent, context)
        assert model.full.seen == [72 - int(0.4 * 72)]  # the module itself, over merged tokens
    assert model.lower.seen == [20, 20] and model.cross.seen == [72, 72]
    assert not torch.allclose(agents, wanted) and not torch.allclose(merged, agents)
    assert dict(model.full.__dict__).keys() == before.keys() and not model._forward_hooks
    assert torch.equal(model(latent, context), wanted)


def test_what_the_context_computes():
    model, latent, context = network()
    x = latent.flatten(2).mT
    found = {}
    with AgentSD()(model):
        model.full.register_forward_hook(lambda m, args, y: found.update(y=y))
        model(latent, context)
    for b in range(2):
        merged, agents, place = literal_merge(x[b], (9, 8), (4, 4), 28, 68)
        q, k, v, a = (
            project(t).view(1, -1, 2, 4).transpose(1, 2)
            for project, t in (
                (model.full.to_q, merged),
                (model.full.to_k, merged),
                (model.full.to_v, merged),
                (model.full.to_q, agents),
            )
        )
        u = (a @ k.mT / 2).softmax(-1) @ v
        y = (q @ a.mT * 0.5**0.3).softmax(-1) @ u + 0.075 * v
        assert_close(found["y"][b], model.full.to_out[0](y.transpose(1, 2).flatten(2))[0][place])


def test_merging_nothing_is_the_model_itself():
    model, latent, context = network()
    wanted = model(latent, context)
    with AgentSD(phases=(MergePhase(0, (2, 2), 0.0, 0.0),), max_downsample=2)(model):
        assert_close(model(latent, context), wanted)


def test_an_exception_restores_too():
    model, latent, context = network()
    wanted = model(latent, context)

    def fail() -> None:
        with AgentSD()(model):
            model(latent, context[..., :3])

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(model(latent, context), wanted) and "forward" not in model.full.__dict__


@pytest.mark.door
def test_errors():
    x = torch.zeros(1, 12, 4)
    with pytest.raises(ValueError, match=r"x has 12 tokens, must have 15 for size \(3, 5\)"):
        match_tokens(x, size=(3, 5), stride=(1, 1))
    with pytest.raises(ValueError, match=r"stride is .*, must be at most size"):
        match_tokens(x, size=(3, 4), stride=(4, 4))
    with pytest.raises(ValueError, match="count is 11, must be from 0 to 10"):
        match_tokens(x, size=(3, 4), stride=(2, 2)).merge(x, 11)
    with pytest.raises(ValueError, match="phases is"):
        AgentSD(phases=())
    with pytest.raises(ValueError, match="Linear has no self-attention"), AgentSD()(nn.Linear(2, 2)):
        pass
