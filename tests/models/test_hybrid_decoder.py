from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from heedful.mixers.linear.gated_deltanet import GatedDeltaNet
from heedful.mixers.sparse.streaming_llm import StreamingAttention
from heedful.models.decoder_lm import DecoderLM
from heedful.models.hybrid_decoder import hybrid_decoder


def build(**arguments) -> DecoderLM:
    torch.manual_seed(0)
    size = {"depth": 5, "heads": 2, "kv_heads": 1, "head_dim": 4, "window": 4, "hidden": 12}
    return hybrid_decoder(20, 8, **{**size, **arguments}, dtype=torch.float64).eval()


def test_published_layers_and_parameters():
    model = hybrid_decoder(device="meta")
    kinds = [type(mixer) for mixer in model.mixers]
    assert kinds == 9 * [StreamingAttention, GatedDeltaNet, GatedDeltaNet, GatedDeltaNet]
    local, linear = model.mixers[:2]
    assert (local.sinks, local.window, local.rotary, local.kv_heads) == (0, 8192, True, 2)
    assert sum(p.numel() for p in linear.parameters()) == 33_653_024
    attention = 2048 * 2048 * 2 + 2048 * 256 * 2 + 2048 + 2 * 256  # biases in q, k, v
    assert sum(p.numel() for p in local.parameters()) == attention + 2048  # and here in the last map
    total = 151936 * 2048 + 9 * (attention + 2048) + 27 * 33_653_024
    total += 36 * (3 * 2048 * 11008 + 2 * 2048) + 2048
    assert sum(p.numel() for p in model.parameters()) == total


def test_decodes_in_constant_memory():
    model = build()
    ids = torch.randint(20, (2, 30))
    state, parts, sizes = model.init_state(2), [], []
    for piece in ids.split([3, 1, 9, 1, 1, 7, 8], dim=1):
        out = model(piece, state=state)
        state = out.state
        parts.append(out.logits)
        sizes.append(state.nbytes())
    assert_close(torch.cat(parts, 1), model(ids).logits)
    assert len(set(sizes)) == 1  # from the first piece on, which fills the window
    assert state.layers[1].matrix.shape == (2, 2, 4, 8)


def test_the_window_ends_attention_and_the_memory_does_not():
    ids = torch.randint(20, (1, 12))
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 20
    local = build(depth=1)
    assert_close(local(ids).logits[0, 4:], local(other).logits[0, 4:])
    assert not torch.allclose(build()(ids).logits[0, -1], build()(other).logits[0, -1])


def test_saves_and_loads(tmp_path):
    model = build()
    model.save(tmp_path)
    ids = torch.randint(20, (1, 6))
    assert torch.equal(DecoderLM.load(tmp_path, dtype=torch.float64).eval()(ids).logits, model(ids).logits)


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="linear_layers is 0"):
        build(linear_layers=0)
