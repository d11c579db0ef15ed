"""Loading the authors' released parameters: names, layouts, strictness, and the outputs that follow."""

from __future__ import annotations

import pytest
import torch

import heedful
from heedful import authors
from heedful.authors import Table
from heedful.mixers.channel.eca import ECA
from heedful.mixers.grid.agent_attention import AgentAttentionDeiT
from heedful.routing.layer_router import LayerRouter
from tests.parity.harness import Golden
from tests.test_parity import GOLDEN

golden_needed = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden files are not there")


def read(file: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The authors' parameters, an input, and what they give for it."""
    golden = Golden.read(GOLDEN / f"{file}.json")
    assert golden.arrays is not None
    return golden.part("param", golden.arrays), golden.arrays["in.x"], golden.arrays["out.y"]


@golden_needed
def test_sqa():
    params, x, wanted = read("sqa")
    assert "rope.inv_freq" in params  # dropped by the table
    mixer = heedful.create("sqa", 32, heads=8, query_heads=4, kv_heads=2, causal=True, rotary=True)
    torch.testing.assert_close(authors.load(mixer, params).eval()(x), wanted, atol=1e-5, rtol=1e-4)


@golden_needed
def test_gated_attention():
    params, x, wanted = read("gated-attention-elementwise")
    mixer = heedful.create("gated-attention", 24, heads=4, kv_heads=2, qkv_bias=True)
    torch.testing.assert_close(authors.load(mixer, params).eval()(x), wanted, atol=1e-5, rtol=1e-4)


def test_grouped_differential_attention_of_motif():
    mixer = heedful.create(
        "grouped-differential-attention", 24, heads=8, noise_heads=2, kv_heads=4, head_dim=4
    )
    sizes = {"q_proj": (32, 24), "k_proj": (16, 24), "v_proj": (16, 24), "o_proj": (24, 48), "subln": (8,)}
    given = {f"{name}.weight": torch.randn(size) for name, size in sizes.items()}
    given |= {f"lambda_{name}": torch.randn(4) for name in ("q1", "k1", "q2", "k2")}
    authors.load(mixer, given)
    assert torch.equal(mixer.out.weight, given["o_proj.weight"])
    assert torch.equal(mixer.norm.weight, given["subln.weight"])


@golden_needed
def test_biformer():
    params, x, wanted = read("biformer-bra")
    mixer = heedful.create("biformer", 16, heads=4, regions=4, topk=3, lepe_kernel=5)
    y = authors.load(mixer, params).eval()(x.movedim(-1, 1))
    torch.testing.assert_close(y.movedim(1, -1), wanted, atol=1e-5, rtol=1e-4)


@golden_needed
def test_biformer_nchw_has_convolutions_for_linear_maps():
    params = Golden.read(GOLDEN / "biformer-bra-nchw.json")
    drawn = params.part("param", params.draw())
    mixer = heedful.create("biformer-nchw", 16, heads=4, regions=4, topk=3, lepe_kernel=5)
    authors.load(mixer, drawn)
    assert torch.equal(mixer.qkv.weight, drawn["qkv_linear.weight"][:, :, 0, 0])
    assert torch.equal(mixer.out.bias, drawn["output_linear.bias"])


@golden_needed
def test_landmark_attention_has_one_projection_for_three():
    golden = Golden.read(GOLDEN / "landmark-attention.json")
    params = golden.part("param", golden.draw())
    mixer = heedful.create("landmark-attention", 16, heads=2, block_size=4, insert=False)
    authors.load(mixer, params)
    joined = torch.cat([mixer.query.weight, mixer.key.weight, mixer.value.weight])
    assert torch.equal(joined, params["c_attn.weight"])
    assert torch.equal(mixer.out.weight, params["c_proj.weight"])
    with pytest.raises(ValueError, match=r"does not fit LandmarkAttention: missing: landmark$"):
        authors.load(heedful.create("landmark-attention", 16, heads=2), params)


@golden_needed
def test_agent_attention_deit():
    params, x, wanted = read("agent-attention-deit")
    mixer = AgentAttentionDeiT(24, heads=3, agents=9, size=(5, 5))
    torch.testing.assert_close(authors.load(mixer, params).eval()(x), wanted, atol=1e-5, rtol=1e-4)


@golden_needed
@pytest.mark.parametrize("name", ["eca", "eca-ns"])
def test_eca(name):
    params, x, wanted = read(name)
    mixer = heedful.create(name, x.shape[1], kernel=params["conv.weight"].shape[-1])
    y = authors.load(mixer, params).eval()(x)
    torch.testing.assert_close(y, wanted, atol=1e-6, rtol=1e-5)


@golden_needed
def test_layer_router_of_one_layer_of_a_released_model():
    golden = Golden.read(GOLDEN / "flux-attention.json")
    inside = "model.layers.3.self_attn.mask_allocator."
    given = {inside + name: value for name, value in golden.part("param", golden.draw()).items()}
    given[inside + "log_temp"] = torch.zeros(())
    router = LayerRouter(golden.config["d_feature"])
    authors.load(router, given, prefix_strip=(inside,))
    assert torch.equal(router.head[4].bias, given[inside + "cls_router_head_agnostic.4.bias"])
    assert torch.equal(router.features[0].weight, given[inside + "cls_feat_extractor.0.weight"])


def test_prefixes_of_wrappers_are_stripped():
    weight = torch.randn(1, 1, 3)
    for name, extra in (("module.conv.weight", {}), ("net.conv.weight", {"prefix_strip": ("net.",)})):
        mixer = ECA(8, kernel=3)
        assert authors.load(mixer, {name: weight}, **extra) is mixer
        assert torch.equal(mixer.conv.weight, weight)


def test_loading_is_strict_and_leaves_the_model_alone_when_it_fails():
    mixer = ECA(8, kernel=3)
    before = mixer.conv.weight.clone()
    good = torch.randn(1, 1, 3)
    for state, message in (
        ({"conv.weight": good, "fc.weight": good}, "does not fit ECA: not used: fc.weight"),
        ({}, "does not fit ECA: missing: conv.weight"),
        ({"conv.weight": good[..., :2]}, r"conv.weight has shape \(1, 1, 2\), must be \(1, 1, 3\)"),
        ({"epoch": 3, "model": {}}, "state_dict holds epoch, model, which are no tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            authors.load(mixer, state)
    assert torch.equal(mixer.conv.weight, before)
    with pytest.raises(ValueError, match="no table of the authors' names is known for Linear"):
        authors.load(torch.nn.Linear(2, 2), {})


def test_table():
    table = Table(
        rename=((r"a\.(\d+)\.w", r"layers.\1.weight"), (r"b", "c")),
        drop=(r".*\.cache",),
        relayout=lambda state: {name: value + 1 for name, value in state.items()},
    )
    one = torch.ones(())
    assert table.apply({"a.12.w": one, "x.cache": one, "a.12.wx": one}) == {
        "layers.12.weight": one + 1,
        "a.12.wx": one + 1,
    }
    with pytest.raises(ValueError, match="two entries for 'c', one of them 'c'"):
        table.apply({"b": one, "c": one})
