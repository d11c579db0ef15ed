"""Step-3's block and model: the experts in loops, counts at full size, decoding with states."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful import authors
from heedful.mixers.heads.step3_mfa import MultiMatrixFactorizationAttention
from heedful.mixers.heads.swiglu import SwiGLU
from heedful.models import step3
from heedful.models.step3 import Step3Block, Step3Experts, Step3LM


def experts(**options):
    torch.manual_seed(0)
    sizes = {"experts": 6, "topk": 3, "hidden": 5, "shared_hidden": 7}
    return Step3Experts(8, **{**sizes, **options}, dtype=torch.float64)


def model(**options):
    torch.manual_seed(0)
    made = Step3LM(**{**Step3LM.example, **options}, dtype=torch.float64)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def silu(z):
    return z / (1 + (-z).exp())


def one_token(layer, x):
    """The card's sum for one token: all experts in a loop, the chosen ones kept."""
    logits = [float(row @ x) for row in layer.router.weight]
    p = torch.tensor(logits, dtype=x.dtype).exp()
    p = p / p.sum()
    best = sorted(range(len(p)), key=lambda e: -float(p[e]))[: layer.topk]
    total = sum(p[e] for e in best) if layer.norm_expert_weight else 1.0
    shared = layer.shared
    y = shared.down.weight @ (silu(shared.gate.weight @ x) * (shared.up.weight @ x))
    for e in best:
        y = y + p[e] / total * (layer.down[e] @ (silu(layer.gate[e] @ x) * (layer.up[e] @ x)))
    return y


@pytest.mark.parametrize("norm", [True, False])
@torch.no_grad()
def test_experts_are_the_card(norm):
    layer = experts(norm_expert_weight=norm)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    wanted = torch.stack([torch.stack([one_token(layer, token) for token in row]) for row in x])
    torch.testing.assert_close(layer(x), wanted)


def test_gradients_are_those_of_computing_every_expert():
    layer = experts(norm_expert_weight=True)
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    p = (x @ layer.router.weight.T).softmax(-1)
    weight = torch.where(p >= p.sort(-1).values[..., -3, None], p, 0.0)
    weight = weight / weight.sum(-1, keepdim=True)
    inner = F.silu(torch.einsum("bnc,ehc->bneh", x, layer.gate))
    inner = inner * torch.einsum("bnc,ehc->bneh", x, layer.up)
    dense = layer.shared(x) + torch.einsum("bne,bneh,ech->bnc", weight, inner, layer.down)
    torch.testing.assert_close(layer(x), dense)
    probe, inputs = torch.randn_like(dense), [x, *layer.parameters()]
    grads = torch.autograd.grad((layer(x) * probe).sum(), inputs)
    for grad, want in zip(grads, torch.autograd.grad((dense * probe).sum(), inputs), strict=True):
        torch.testing.assert_close(grad, want)


def test_an_expert_computes_the_tokens_that_chose_it(monkeypatch):
    layer, counts = experts(), []

    class Counted:
        silu = staticmethod(F.silu)

        @staticmethod
        def linear(x, weight):
            counts.append(len(x))
            return F.linear(x, weight)

    monkeypatch.setattr(step3, "F", Counted)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    layer(x)
    listed = (x @ layer.router.weight.T).topk(3, -1).indices.flatten().bincount(minlength=6)
    assert counts == [n for n in listed.tolist() for _ in range(3)]  # gate, up and down of each expert
    assert sum(counts) == 3 * 3 * 14


def test_load_balance():
    layer = experts()
    assert layer.aux_losses == {}
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    mask = torch.rand(2, 7) > 0.3
    layer(x, mask=mask)
    p = (x @ layer.router.weight.T).softmax(-1)[mask]
    used = p.topk(3, -1).indices.flatten().bincount(minlength=6) / len(p)
    torch.testing.assert_close(layer.aux_losses["load_balance"], 6 * (used * p.mean(0)).sum())
    layer.eval()(x)
    assert layer.aux_losses == {}
    with torch.no_grad():
        layer.train().router.weight.zero_()
    layer(x)
    assert abs(layer.aux_losses["load_balance"].item() - 3) < 1e-12  # evenly: topk


def test_block_is_its_equations():
    mixer = MultiMatrixFactorizationAttention(8, heads=2, head_dim=4, query_rank=5, dtype=torch.float64)
    for mlp in (experts(), SwiGLU(8, hidden=6, dtype=torch.float64)):
        block = Step3Block(mixer, mlp, dtype=torch.float64)
        for norm in (block.norm1, block.norm2):
            torch.nn.init.normal_(norm.weight)
        x = torch.randn(2, 5, 8, dtype=torch.float64)

        def rms(v, norm):
            return v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight

        y = x + mixer(rms(x, block.norm1))
        torch.testing.assert_close(block(x), y + mlp(rms(y, block.norm2)))


def count(dim, heads, head_dim, rank, depth, dense, hidden, experts, wide, shared, vocabulary):
    """Parameters, with `dense` of the layers without experts and a head of its own."""
    attention = dim * rank + 2 * dim * head_dim + rank * heads * head_dim + heads * head_dim * dim + rank
    mixture = dim * experts + 3 * dim * (experts * wide + shared)
    layers = depth * (attention + 2 * dim) + dense * 3 * dim * hidden + (depth - dense) * mixture
    return layers + 2 * vocabulary * dim + dim


def test_parameters():
    small = model(moe_layers=(1,), depth=4)
    assert sum(p.numel() for p in small.parameters()) == count(16, 4, 8, 12, 4, 3, 24, 6, 10, 10, 32)
    tied = model(moe_layers=(1,), depth=4, tied=True)
    assert sum(p.numel() for p in small.parameters()) - sum(p.numel() for p in tied.parameters()) == 32 * 16
    narrow = model(query_rank=None)
    assert narrow.mixers[0].query_down.weight.shape == (8, 16)


def test_parameters_at_full_size():
    made = Step3LM(moe_layers=range(4, 60), device="meta")
    kinds = [type(layer.mlp) for layer in made.layers]
    assert kinds == [*4 * [SwiGLU], *56 * [Step3Experts], SwiGLU]
    assert all(sum(p.numel() for p in mixer.parameters()) == 169_347_072 for mixer in made.mixers)
    total = sum(p.numel() for p in made.parameters())
    assert total == count(7168, 64, 256, 2048, 61, 5, 18432, 48, 5120, 5120, 128815)
    assert round(total / 1e9) == 316
    # A token reads one row of the embedding, three experts of 48, and all the rest.
    active = total - 128815 * 7168 - 56 * 45 * 3 * 7168 * 5120
    assert round(active / 1e9) == 38


def test_all_layers_but_the_first_have_experts_where_nothing_is_said():
    assert [isinstance(layer.mlp, Step3Experts) for layer in model().layers] == [False, True, True]


def test_generates_with_its_own_state():
    made = model().eval()
    ids = torch.randint(32, (2, 9))
    state, parts = made.init_state(2), []
    for piece in ids.split((4, 1, 1, 3), 1):
        out = made(piece, state=state)
        state = out.state
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), made(ids).logits)
    assert state.nbytes() == 3 * 2 * 2 * 9 * 8 * 8  # layers, batch, key and value, tokens, width, bytes
    whole = ids
    for _ in range(5):
        whole = torch.cat([whole, made(whole).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made.generate(ids, 5), whole)


def test_padding_has_no_influence():
    made = model().eval()
    ids = torch.randint(32, (1, 6))
    mask = torch.tensor([[False, False, True, True, True, True]])
    other = ids.clone()
    other[:, :2] = (other[:, :2] + 1) % 32
    torch.testing.assert_close(made(ids, mask=mask).logits[:, 2:], made(other, mask=mask).logits[:, 2:])
    torch.testing.assert_close(made(ids, mask=mask).logits[:, 2:], made(ids[:, 2:]).logits)


def test_trains_all_that_it_has():
    made = model()
    ids = torch.randint(32, (4, 16))
    loss = made(ids, labels=ids).loss
    assert sorted(made.aux_losses) == ["1.load_balance", "2.load_balance"]
    (loss + 0.01 * sum(made.aux_losses.values())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


def test_takes_the_authors_attention():
    made, ids = model().eval(), torch.randint(32, (1, 7))
    names = {"query_down": "q_proj", "query_norm": "inter_norm", "query_up": "wq", "key": "k_proj"}
    names |= {"value": "v_proj", "out": "o_proj"}
    theirs = {
        f"model.layers.{i}.self_attn.{name}.weight": getattr(mixer, ours).weight.detach().clone()
        for i, mixer in enumerate(made.mixers)
        for ours, name in names.items()
    }
    before = made(ids).logits
    for i, mixer in enumerate(made.mixers):
        for parameter in mixer.parameters():
            torch.nn.init.zeros_(parameter)
        place = f"model.layers.{i}.self_attn."
        part = {name: value for name, value in theirs.items() if name.startswith(place)}
        authors.load(mixer, part, prefix_strip=(place,))
    assert torch.equal(made(ids).logits, before)


def test_saves_and_loads(tmp_path):
    made = model(moe_layers=range(1, 2), norm_expert_weight=True).eval()
    made.save(tmp_path)
    again = Step3LM.load(tmp_path, dtype=torch.float64).eval()
    ids = torch.randint(32, (1, 6))
    assert torch.equal(again(ids).logits, made(ids).logits)


def test_half_precision():
    made = Step3LM(**Step3LM.example, dtype=torch.bfloat16)
    ids = torch.randint(32, (2, 5))
    assert made(ids).logits.dtype == torch.bfloat16
    single = Step3LM(**Step3LM.example)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert single(ids, labels=ids).loss.isfinite()


@pytest.mark.door
def test_errors():
    for call, message in (
        (lambda: experts(topk=7), "topk is 7, must be at most experts, which is 6"),
        (lambda: experts(hidden=0), "expert_hidden is 0"),
        (lambda: experts()(torch.zeros(2, 8)), "x has shape"),
        (lambda: model(moe_layers=(1, 3)), "moe_layers has 3, must have numbers of layers, 0 to 2"),
        (lambda: model(depth=0), "depth is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
