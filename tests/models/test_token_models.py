"""DecoderLM and Encoder: counts, equations, decoding, hybrids, saving, training, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from heedful.mixers.heads.self_attention import SelfAttention
from heedful.models.block import Block
from heedful.models.decoder_lm import DecoderLM
from heedful.models.encoder import Encoder
from heedful.models.sampling import sample
from heedful.models.stack import spread
from heedful.patterns.window import Window
from heedful.registry import index

SEQUENCE = {e.name: e for e in index().values() if e.kind == "sequence"}
# Of these it does not matter where in the padded sequence a token stands; others count places.
ANYWHERE = {"aaren", "flowformer", "gated-attention", "gated-deltanet", "mamba", "self-attention", "sqa"}
DECODERS = sorted(name for name, e in SEQUENCE.items() if e.causal != "never" and e.decode)
HYBRID = [*3 * ["gated-deltanet"], ("self-attention", {"kv_heads": 2})]


def small(name: str) -> tuple[str, dict]:
    """The mixer with the sizes of its example."""
    given = SEQUENCE[name].load().example
    return name, {k: v for k, v in given.items() if k not in ("dim", "heads", "causal")}


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode and float64, with no parameter at a special value."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def by_full_passes(model: DecoderLM, ids: torch.Tensor, new: int, mask: torch.Tensor) -> torch.Tensor:
    for _ in range(new):
        token = model(ids, mask=mask).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        mask = torch.cat([mask, torch.ones_like(token, dtype=torch.bool)], 1)
    return ids


@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_states_is_that_of_full_passes(name):
    model = shaken(DecoderLM(17, 16, depth=2, heads=4, mixers=small(name)))
    torch.manual_seed(1)
    ids = torch.randint(17, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :3] = False
    made = model.generate(ids, 7, mask=mask)
    assert torch.equal(made, by_full_passes(model, ids, 7, mask))
    if name in ANYWHERE:
        assert torch.equal(model.generate(ids[1:, 3:], 7), made[1:, 3:])


def test_hybrid_states_and_beams():
    model = shaken(DecoderLM(17, 16, depth=8, heads=4, mixers=HYBRID))
    assert [m.entry.name for m in model.mixers].count("self-attention") == 2
    torch.manual_seed(1)
    ids = torch.randint(17, (3, 12))
    whole = model(ids)
    first = model(ids[:, :7], state=model.init_state(3))
    assert first.state.length == 7 and first.state.nbytes() > 0
    rows = torch.tensor([2, 0, 0])
    rest = model(ids[rows, 7:], state=first.state.reorder(rows))
    # float64: the forms of one sum differ in rounding alone.
    torch.testing.assert_close(first.logits, whole.logits[:, :7], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rest.logits, whole.logits[rows, 7:], rtol=1e-9, atol=1e-9)


def test_spread():
    assert spread("a", 3) == ["a", "a", "a"]
    assert spread(["a", "a", "b"], 7) == ["a", "a", "b", "a", "a", "b", "a"]
    assert spread(("a", {"heads": 2}), 2) == 2 * [("a", {"heads": 2})]
    assert spread([("a", {}), "b"], 2) == [("a", {}), "b"]


def test_a_block_is_its_equations():
    torch.manual_seed(0)
    block = Block(SelfAttention(16, heads=4, causal=True)).double()
    with torch.no_grad():
        block.norm1.weight.normal_()
        block.norm2.weight.normal_()
    x = torch.randn(2, 5, 16, dtype=torch.float64)

    def rms(v, weight):
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    y = x + block.mixer(rms(x, block.norm1.weight))
    z = rms(y, block.norm2.weight)
    gate = z @ block.mlp.gate.weight.T
    wanted = y + (gate * gate.sigmoid() * (z @ block.mlp.up.weight.T)) @ block.mlp.down.weight.T
    torch.testing.assert_close(block(x), wanted)

    block = Block(SelfAttention(16, heads=4, causal=True), mlp="gelu", norm="layer").double()
    y = x + block.mixer(F.layer_norm(x, (16,), eps=1e-6))
    h = F.layer_norm(y, (16,), eps=1e-6) @ block.mlp.wide.weight.T + block.mlp.wide.bias
    h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    torch.testing.assert_close(block(x), y + h @ block.mlp.narrow.weight.T + block.mlp.narrow.bias)


@pytest.mark.parametrize("model", [DecoderLM, Encoder])
def test_parameter_counts(model):
    mixer = 4 * (16 * 16 + 16)  # q, k, v, out with biases
    swiglu, gelu = 3 * 16 * 48, 2 * 16 * 64 + 64 + 16  # 48 = 8/3 * 16 rounded up to 8
    made = model(50, 16, depth=3, heads=4)
    assert count(made) == 50 * 16 + 3 * (mixer + swiglu + 2 * 16) + 16
    assert count(model(50, 16, depth=3, heads=4, tied=False)) == count(made) + 50 * 16
    made = model(50, 16, depth=2, heads=4, mlp="gelu", norm="layer")
    assert count(made) == 50 * 16 + 2 * (mixer + gelu + 4 * 16) + 32
    made = model(50, 16, depth=1, heads=4, hidden=10)
    assert count(made) == 50 * 16 + mixer + 3 * 16 * 10 + 2 * 16 + 16


def test_the_loss_is_of_the_next_token():
    model = shaken(DecoderLM(11, 16, depth=1, heads=4))
    torch.manual_seed(0)
    ids = torch.randint(11, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False
    labels = ids.clone()
    labels[0, 3] = -100
    logits, loss, state = model(ids, mask=mask, labels=labels)
    assert state is None
    wanted = []
    for b in range(2):
        for i in range(1, 6):
            if mask[b, i] and labels[b, i] >= 0:
                wanted.append(-logits[b, i - 1].log_softmax(-1)[ids[b, i]])
    assert len(wanted) == 8
    torch.testing.assert_close(loss, torch.stack(wanted).mean().to(loss.dtype))
    nothing = model(ids, labels=torch.full_like(ids, -100)).loss
    assert nothing == 0
    assert model(ids.int(), mask=mask, labels=labels.int()).loss == loss


def test_the_encoder_sees_both_ways_and_no_padding():
    model = shaken(Encoder(11, 16, depth=2, heads=4))
    torch.manual_seed(0)
    ids = torch.randint(11, (2, 6))
    logits = model(ids).logits
    other = ids.clone()
    other[:, 5] = (ids[:, 5] + 1) % 11
    assert (model(other).logits[:, 0] - logits[:, 0]).abs().min() > 1e-8
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 5] = False
    torch.testing.assert_close(model(other, mask=mask).logits[:, :5], model(ids[:, :5]).logits)
    labels = torch.full_like(ids, -100)
    labels[0, 2] = 3
    torch.testing.assert_close(model(ids, labels=labels).loss, -logits[0, 2].log_softmax(-1)[3].float())


def test_rotary_and_none():
    assert all(m.rotary for m in DecoderLM(11, 16, depth=2, heads=4).mixers)
    assert not any(m.rotary for m in DecoderLM(11, 16, depth=2, heads=4, rotary=False).mixers)
    bag = shaken(Encoder(11, 16, depth=2, heads=4, rotary=False))
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(bag(ids.flip(1)).logits, bag(ids).logits.flip(1))
    ordered = shaken(Encoder(11, 16, depth=2, heads=4))
    assert (ordered(ids.flip(1)).logits - ordered(ids).logits.flip(1)).abs().max() > 1e-4


@pytest.mark.parametrize("made", [Encoder, DecoderLM])
@pytest.mark.parametrize("mixers", ["flowformer", HYBRID[2:]])
def test_save_and_load(made, mixers, tmp_path):
    model = shaken(made(17, 16, depth=4, heads=4, mixers=mixers, tied=False, norm="layer", mlp="gelu"))
    model.save(tmp_path / "model")
    again = made.load(tmp_path / "model", dtype=torch.float64).eval()
    ids = torch.randint(17, (2, 9))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert sorted(f.name for f in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_a_hybrid_learns_a_tiny_text():
    torch.manual_seed(0)
    text = "the cat sat on the mat and the dog sat on the log. " * 8
    letters = sorted(set(text))
    ids = torch.tensor([[letters.index(c) for c in text[i : i + 64]] for i in range(0, 256, 32)])
    model = DecoderLM(len(letters), 32, depth=2, heads=4, mixers=["gated-deltanet", "self-attention"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = None
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    # It starts at the entropy of a uniform guess, since the embedding is small.
    assert abs(first - torch.tensor(float(len(letters))).log()) < 0.2
    assert loss < 0.3
    prompt = text[:20]
    made = model.eval().generate(torch.tensor([[letters.index(c) for c in prompt]]), 20)[0]
    assert "".join(letters[i] for i in made) == text[:40]


def test_aux_losses_are_gathered():
    choice = ("flux-attention", {"block_size": 2, "local_blocks": 1, "pool": 3})
    model = DecoderLM(11, 16, depth=3, heads=4, mixers=[choice, "self-attention"])
    assert model.aux_losses == {}
    model(torch.zeros(2, 12, dtype=torch.long))
    assert sorted(model.aux_losses) == ["0.full_share", "2.full_share"]


def test_sampling():
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, 4.0, 3.0, -2.0, 2.0]]).repeat(2000, 1)
    assert sample(logits).eq(1).all()

    def shares(**how):
        return torch.bincount(sample(logits, **how), minlength=5) / 2000

    # 2000 draws: a share errs by about 0.011.
    torch.testing.assert_close(shares(temperature=1.0), logits[0].softmax(-1), atol=0.05, rtol=0)
    torch.testing.assert_close(shares(temperature=2.0), (logits[0] / 2).softmax(-1), atol=0.05, rtol=0)
    two = torch.where(torch.tensor([0, 1, 1, 0, 0]).bool(), logits[0], -torch.inf).softmax(-1)
    torch.testing.assert_close(shares(temperature=1.0, top_k=2), two, atol=0.05, rtol=0)
    # Probabilities are 0.033, 0.643, 0.236, 0.002, 0.087: 0.7 needs the first two, 0.6 only the first.
    torch.testing.assert_close(shares(temperature=1.0, top_p=0.7), two, atol=0.05, rtol=0)
    assert shares(temperature=1.0, top_p=0.6)[1] == 1
    # After top_k=2 the first has 0.73 of what is left.
    assert shares(temperature=1.0, top_k=2, top_p=0.7)[1] == 1
    assert shares(temperature=1.0, top_k=9)[1] > 0.5


def test_eos_fills_and_stops():
    model = shaken(DecoderLM(5, 16, depth=1, heads=4))
    ids = torch.tensor([[1, 2], [3, 4]])
    free = model.generate(ids, 12)
    eos = int(free[0, 4])
    made = model.generate(ids, 12, eos=eos)
    for row, whole in zip(made, free, strict=True):
        hits = (whole[2:] == eos).nonzero()
        stop = 2 + int(hits[0]) if len(hits) else len(whole)
        assert torch.equal(row[: stop + 1], whole[: len(row)][: stop + 1])
        assert row[stop:].eq(eos).all()
    generator = torch.Generator().manual_seed(1)
    a = model.generate(ids, 5, temperature=1.0, generator=generator)
    assert torch.equal(a, model.generate(ids, 5, temperature=1.0, generator=generator.manual_seed(1)))


def test_a_factory_serves():
    model = DecoderLM(
        11, 16, depth=2, mixers=lambda dim: SelfAttention(dim, heads=2, causal=True, pattern=Window(3, 0))
    )
    assert [m.heads for m in model.mixers] == [2, 2]
    with pytest.raises(ValueError, match="mixers holds what JSON cannot"):
        model.save("nowhere")


def test_what_cannot_serve_is_refused():
    for mixers, message in (
        ("ninformer", "mixers names 'ninformer', which sees the future as it is built; must be causal"),
        (("self-attention", {"causal": False}), "mixers names 'self-attention', which sees the future"),
        ("eca", "mixers names 'eca', a channel; must name sequence mixers"),
        ("self-atention", "no mechanism is called 'self-atention'"),
        (["sqa"] * 3, "mixers has 3 entries, must have 1 to 2, the depth"),
        (lambda dim: nn.Linear(dim, dim), "mixers has a factory that gives Linear"),
        (lambda dim: SelfAttention(8, heads=2, causal=True), "must give a sequence mixer of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            DecoderLM(11, 16, depth=2, heads=4, mixers=mixers)
    assert Encoder(11, 16, depth=2, heads=4, mixers="gaam").mixers[0].entry.name == "gaam"
    model = DecoderLM(11, 16, depth=2, heads=4)
    model.mixers[1].entry = SEQUENCE["l2vit"]
    with pytest.raises(ValueError, match="mixers has 'l2vit' in layer 1, which does not decode step by step"):
        model.generate(torch.zeros(1, 2, dtype=torch.long), 2)


@pytest.mark.door
def test_errors():
    model, deeper = (DecoderLM(11, 16, depth=depth, heads=4) for depth in (1, 2))
    ids = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 2] = False
    for call, message in (
        (lambda: model(ids[0]), r"ids has shape \(3,\), must be \(batch, tokens\)"),
        (lambda: model(ids, mask=ids), r"mask has shape \(2, 3\) and dtype torch.int64"),
        (lambda: model(ids.float()), "ids has dtype torch.float32, must be torch.int64 or torch.int32"),
        (lambda: model(ids, labels=ids[:, 1:]), r"labels has shape \(2, 2\), must be \(2, 3\)"),
        (lambda: model.generate(ids[0], 2), r"ids has shape \(3,\), must be \(batch, tokens\)"),
        (lambda: model.generate(ids, 2, eos=[1, 2]), r"eos is \[1, 2\], must be one token"),
        (lambda: model.generate(ids, 2, temperature=float("nan")), "temperature is nan"),
        (lambda: deeper(ids, state=model.init_state(2)), "state has 1 layers, must have 2"),
        (lambda: DecoderLM(11, 16, heads=4, mixers=None), "mixers is None, must be a name, a pair"),
        (lambda: DecoderLM(11, 16, heads=4, mixers={"mamba": 2}), "mixers is {'mamba': 2}, must be a name"),
        (lambda: DecoderLM(11, 16, mixers=model.mixers[0]), r"mixers has SelfAttention\("),
        (lambda: model.generate(ids, 0), "max_new_tokens is 0"),
        (lambda: model.generate(ids[:, :0], 2), "ids has no tokens"),
        (lambda: model.generate(ids, 2, mask=mask), "mask is False at the last token of a row"),
        (lambda: model.generate(ids, 2, temperature=-1.0), "temperature is -1.0, must be at least 0"),
        (lambda: model.generate(ids, 2, temperature=1.0, top_p=0.0), "top_p is 0.0, must be above 0"),
        (lambda: model.generate(ids, 2, temperature=1.0, top_k=0), "top_k is 0"),
        (lambda: DecoderLM(11, 16, heads=4, depth=0), "depth is 0"),
        (
            lambda: DecoderLM(11, 16, heads=4, mlp="relu"),
            "mlp is 'relu', must be one of 'swiglu', 'gelu', 'polynorm'",
        ),
        (lambda: DecoderLM(11, 16, heads=4, norm="batch"), "norm is 'batch'"),
        (lambda: DecoderLM(0, 16), "vocabulary is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.door
def test_loading_another_model(tmp_path):
    Encoder(11, 16, depth=1, heads=4).save(tmp_path)
    with pytest.raises(ValueError, match=r"model in config.json is 'Encoder', must be one of 'DecoderLM'"):
        DecoderLM.load(tmp_path)
