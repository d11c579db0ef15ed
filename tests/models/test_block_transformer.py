"""Block Transformer: its decoders are GPT-NeoX, what sees what, generation, counts, the authors' names."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from heedful import authors
from heedful.models.block_transformer import BlockTransformer
from heedful.models.neox import NeoX

DIM, TOKEN_DIM, VOCABULARY, LENGTH = 32, 24, 13, 4


def small(strategy: str = "prefix", seed: int = 0) -> BlockTransformer:
    torch.manual_seed(seed)
    model = BlockTransformer(
        VOCABULARY,
        DIM,
        depth=2,
        heads=4,
        token_dim=TOKEN_DIM,
        token_depth=1,
        token_heads=3,
        expansion=2 if strategy == "prefix" else LENGTH,
        strategy=strategy,
        begin=5,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def theirs(dim: int, depth: int, heads: int) -> nn.Module:
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        attn_implementation="eager",
    )
    model = transformers.GPTNeoXForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def released(block: nn.Module, token: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint as the authors' code would write it."""
    names = {f"block_decoder.{k}": v for k, v in block.gpt_neox.state_dict().items() if "embed_in" not in k}
    # The head was called embed_out in the transformers of the authors.
    names |= {f"token_decoder.{k}".replace("lm_head", "embed_out"): v for k, v in token.state_dict().items()}
    return {
        **{k: v for k, v in names.items() if "rotary_emb" not in k},
        "embedder.embeddings.weight": torch.randn(VOCABULARY, DIM // LENGTH).double(),
        "token_decoder.expansion_layer.weight": torch.randn(2 * TOKEN_DIM, DIM, 1).double(),
        "token_decoder.expansion_layer.bias": torch.randn(2 * TOKEN_DIM).double(),
    }


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_authors_weights_through_gpt_neox():
    """Both decoders are transformers' GPT-NeoX, whose angles are float32; the rest is written out here."""
    torch.manual_seed(0)
    block, token = theirs(DIM, 2, 4), theirs(TOKEN_DIM, 1, 3)
    weights = released(block, token)
    model = authors.load(small(), weights)
    ids = torch.randint(1, VOCABULARY, (3, 20))
    logits = model(ids).logits
    assert logits.shape == (3, 4, LENGTH, VOCABULARY)

    table = weights["embedder.embeddings.weight"]
    for b in range(3):
        vectors = [torch.cat([table[ids[b, LENGTH * t + i]] for i in range(LENGTH)]) for t in range(5)]
        context = block.gpt_neox(inputs_embeds=torch.stack(vectors)[None]).last_hidden_state[0]
        for t in range(4):
            wide = weights["token_decoder.expansion_layer.weight"][..., 0] @ context[t]
            wide = wide + weights["token_decoder.expansion_layer.bias"]
            prefix = [wide[:TOKEN_DIM], wide[TOKEN_DIM:]]
            own = [token.gpt_neox.embed_in.weight[i] for i in ids[b, 4 * t + 4 : 4 * t + 7]]
            wanted = token(inputs_embeds=torch.stack(prefix + own)[None]).logits[0, 1:]
            torch.testing.assert_close(logits[b, t], wanted, rtol=1e-5, atol=1e-6)


def test_summation_starts_with_a_token_of_its_own():
    model = small("summation")
    decoder = model.token_decoder
    context = torch.randn(2, DIM).double()
    ids = torch.randint(VOCABULARY, (2, LENGTH))
    sequence = torch.stack(
        [
            torch.stack(
                [
                    decoder.embedding.weight[5 if i == 0 else ids[b, i - 1]]
                    + decoder.expansion.conv.weight[i * TOKEN_DIM : (i + 1) * TOKEN_DIM, :, 0] @ context[b]
                    + decoder.expansion.conv.bias[i * TOKEN_DIM : (i + 1) * TOKEN_DIM]
                    for i in range(LENGTH)
                ]
            )
            for b in range(2)
        ]
    )
    wanted = decoder.neox(sequence)[0] @ decoder.head.weight.T
    torch.testing.assert_close(decoder(context, ids), wanted)


@pytest.mark.parametrize("strategy", ["prefix", "summation"])
def test_a_token_moves_its_own_block_behind_it_and_all_later_blocks(strategy):
    model = small(strategy)
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (1, 16))
    logits = model(ids).logits[0].flatten(0, 1)  # of the tokens 4 .. 15
    for place in range(16):
        other = ids.clone()
        other[0, place] = ids[0, place] % (VOCABULARY - 1) + 1
        moved = (model(other).logits[0].flatten(0, 1) - logits).abs().amax(-1) > 1e-9
        wanted = torch.arange(4, 16) > place
        assert torch.equal(moved, wanted), place


@pytest.mark.parametrize("strategy", ["prefix", "summation"])
def test_generation_with_caches_is_that_of_full_passes(strategy):
    model = small(strategy)
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (2, 10))
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, :5] = False
    made = model.generate(ids, 9, mask=mask)
    assert made.shape == (2, 19)
    assert torch.equal(model.generate(ids[1:, 5:], 9), made[1:, 5:])
    sequence, seen = ids, mask
    for i in range(9):
        # The prompt ends with a block, so fill the open block up; what stands there later does not matter.
        fill = 4 - i % 4
        seen = torch.cat([mask, torch.ones(2, i + fill, dtype=torch.bool)], 1)
        open_block = torch.cat([sequence, torch.randint(1, VOCABULARY, (2, fill))], 1)
        logits = model(open_block, mask=seen).logits.flatten(1, 2)
        sequence = torch.cat([sequence, logits[:, -fill].argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, sequence)
    eos = int(made[0, 13])
    ended = model.generate(ids, 9, mask=mask, eos=eos)
    stop = 10 + int((made[0, 10:] == eos).nonzero()[0])
    assert torch.equal(ended[0, : stop + 1], made[0, : stop + 1]) and ended[0, stop:].eq(eos).all()


def test_pieces_of_blocks_are_the_whole():
    torch.manual_seed(0)
    decoder = NeoX(16, depth=2, heads=2).double()
    x = torch.randn(2, 9, 16).double()
    whole, _ = decoder(x)
    first, states = decoder(x[:, :4])
    rest, states = decoder(x[:, 4:], None, states)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    assert states[0].length == 9


def test_the_loss_counts_what_has_a_block_before_it():
    model = small()
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (2, 14))
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[1, :7] = False  # with the two pads in front: nine, so its first block ends at 12
    labels = ids.clone()
    labels[0, 9] = -100
    logits, loss = model(ids, mask=mask, labels=labels)
    terms = []
    for b, first in ((0, 2), (1, 10)):  # the first token that is predicted
        terms += [
            -logits[b].flatten(0, 1)[i + 2 - 4].log_softmax(-1)[ids[b, i]]
            for i in range(first, 14)
            if labels[b, i] >= 0
        ]
    assert len(terms) == 11 + 4
    torch.testing.assert_close(loss.double(), torch.stack(terms).mean(), rtol=1e-6, atol=1e-6)
    assert model(ids[:, :3], labels=ids[:, :3]).loss == 0


def test_random_start():
    model = small()
    ids = torch.arange(1, 13).repeat(200, 1)
    moved, mask = model.random_start(ids, torch.Generator().manual_seed(0))
    by = (~mask).sum(1)
    assert by.unique().tolist() == [0, 1, 2, 3]
    for row, seen, pads in zip(moved, mask, by.tolist(), strict=True):
        assert row[pads:].tolist() == list(range(1, 13 - pads)) and row[:pads].eq(0).all()
        assert seen[pads:].all()


def test_parameter_counts():
    d, v, t, r = DIM, VOCABULARY, TOKEN_DIM, 2
    layer = {c: 12 * c * c + 13 * c for c in (d, t)}  # qkv, out, 4 c and back with biases, two norms
    blocks, tokens = 2 * layer[d] + 2 * d, layer[t] + 2 * t
    wanted = v * d // LENGTH + blocks + d * r * t + r * t + v * t + tokens + v * t
    assert count(small()) == wanted
    # Published sizes without embeddings, in millions: the layers of both decoders.
    for width, depth, heads, published in (
        (256, 3, 8, 5),
        (512, 3, 8, 19),
        (768, 6, 12, 85),
        (1024, 12, 16, 300),
    ):
        model = BlockTransformer(50304, width, depth=depth, heads=heads, device="meta")
        layers = count(model.block_decoder) + count(model.token_decoder.neox)
        assert round(layers / 1e6, -2 if published == 300 else 0) == published
        rest = 50304 * width // 4 + 2 * 50304 * width + 2 * width * width + 2 * width
        assert count(model) == layers + rest


def test_it_learns_a_tiny_text():
    torch.manual_seed(0)
    text = "the cat sat on the mat and the dog sat on the log. " * 8
    letters = ["", *sorted(set(text))]  # 0 is the padding
    ids = torch.tensor([[letters.index(c) for c in text[i : i + 64]] for i in range(0, 256, 32)])
    model = BlockTransformer(len(letters), 32, depth=1, heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(80):
        moved, mask = model.random_start(ids)
        loss = model(moved, mask=mask, labels=moved).loss
        if step == 0:
            first = loss.item()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step()
    assert loss < 0.2 * first
    made = model.generate(torch.tensor([[letters.index(c) for c in text[:16]]]), 20)[0]
    assert "".join(letters[i] for i in made) == text[:36]


@pytest.mark.door
def test_errors():
    model = small()
    ids = torch.ones(2, 8, dtype=torch.long)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 3] = False
    for call, message in (
        (lambda: model(ids[0]), r"ids has shape \(8,\), must be \(batch, tokens\)"),
        (lambda: model(ids, mask=mask), "mask hides tokens behind others"),
        (lambda: model(ids, labels=ids[:, 1:]), r"labels has shape \(2, 7\)"),
        (lambda: model.generate(ids, 0), "max_new_tokens is 0"),
        (lambda: model.generate(ids[:, :0], 2), "ids has no tokens"),
        (
            lambda: BlockTransformer(9, 30, heads=2),
            "block_length / tokens is 4, must divide dim, which is 30",
        ),
        (lambda: BlockTransformer(9, 32, heads=5), "heads is 5, must divide dim, which is 32"),
        (lambda: BlockTransformer(9, 32, heads=4, strategy="sum"), "strategy is 'sum'"),
        (lambda: BlockTransformer(9, 32, heads=4, strategy="summation"), "expansion is 2, must be 4"),
        (lambda: BlockTransformer(9, 32, heads=4, rotary_share=0.4), "turns 3 channels a head"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
