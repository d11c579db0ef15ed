"""The segmentation network of MHS-VM: what is added where, how tokens become more, any size of image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful import authors
from heedful.models.mhs_vm import Expand, MHSVMUNet


def build(**how):
    torch.manual_seed(0)
    model = MHSVMUNet(**{**MHSVMUNet.example, **how}).double().eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def norm2d(x, layer):
    return norm(x.movedim(1, -1), layer).movedim(-1, 1)


def test_equals_transcription():
    model = build(classes=3)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    y = norm2d(F.conv2d(x, model.embed[0].weight, model.embed[0].bias, stride=4), model.embed[1])
    entered = []
    for stage in range(4):
        entered.append(y)
        (block,) = model.down[stage]
        y = y + block.mixer(norm2d(y, block.norm))
        if stage < 3:
            m = model.merges[stage]
            four = [y[:, :, 0::2, 0::2], y[:, :, 1::2, 0::2], y[:, :, 0::2, 1::2], y[:, :, 1::2, 1::2]]
            y = (norm(torch.cat(four, 1).movedim(1, -1), m.norm) @ m.reduction.weight.T).movedim(-1, 1)
    for stage in range(4):
        if stage:
            y = model.expands[stage - 1](y + entered[4 - stage])
        (block,) = model.up[stage]
        y = y + block.mixer(norm2d(y, block.norm))
    y = model.last(y)
    torch.testing.assert_close(model(x), F.conv2d(y, model.head.weight, model.head.bias))


def test_expand_token_by_token():
    torch.manual_seed(0)
    expand = Expand(8, 4).double()
    x = torch.randn(1, 8, 2, 3, dtype=torch.float64)
    y = expand(x)
    assert y.shape == (1, 2, 8, 12)
    for row in range(2):
        for column in range(3):
            wide = expand.expand.weight @ x[0, :, row, column]
            for i in range(4):
                for j in range(4):
                    part = wide[(4 * i + j) * 2 : (4 * i + j) * 2 + 2]
                    torch.testing.assert_close(y[0, :, 4 * row + i, 4 * column + j], norm(part, expand.norm))


def test_one_class_is_a_probability_and_any_size_will_do():
    model = build()
    x = torch.randn(1, 3, 37, 50, dtype=torch.float64)
    y = model(x)
    assert y.shape == (1, 1, 37, 50)
    padded = F.pad(x, (0, 14, 0, 27))
    torch.testing.assert_close(y, model(padded)[:, :, :37, :50])
    two = build(classes=2)
    two.load_state_dict(
        {n: torch.cat([t, t]) if n.startswith("head") else t for n, t in model.state_dict().items()}
    )
    torch.testing.assert_close(y, two(x)[:, :1].sigmoid())


def test_every_parameter_gets_a_gradient():
    model = build().train()
    model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_stochastic_depth_grows_towards_the_smallest_map():
    model = MHSVMUNet(**{**MHSVMUNet.example, "decoder_depths": (2, 1, 1, 1), "drop_path": 0.4})
    rates = [[block.drop_path.rate for block in stage] for stage in (*model.down, *model.up)]
    expected = [[0.0], [0.4 / 3], [0.8 / 3], [0.4], [0.4, 0.3], [0.2], [0.1], [0.0]]
    assert [pytest.approx(r) for r in expected] == rates


def test_the_authors_names():
    model = build(heads=4)
    letters, parts = (
        "CXSZ",
        {"read": "x_proj_weight", "step": "dt_projs_weight", "step_bias": "dt_projs_bias"},
    )
    theirs = {}
    for name, value in model.state_dict().items():
        side, _, rest = name.partition(".")
        if side in ("down", "up"):
            stage, place, rest = rest.split(".", 2)
            start = f"{'layers' if side == 'down' else 'layers_up'}.{stage}.blocks.{place}."
            if rest.startswith("norm."):
                theirs[start + rest.replace("norm", "ln_1")] = value
                continue
            start, rest = start + "self_attention.", rest.removeprefix("mixer.")
            if rest.startswith("scan.ssm."):
                leaf = rest.rsplit(".", 1)[1]
                for h, letter in enumerate(letters):
                    own = value[4 * h : 4 * h + 4]
                    own = own if leaf in parts else own.flatten(0, 1)
                    told = parts.get(leaf, "A_logs" if leaf == "log_rate" else "Ds")
                    for twice in ("mambaeng", "scanning.seq2seq_engine"):
                        theirs[f"{start}mhs.scanhead_{letter}.{twice}.{told}"] = own
                continue
            for ours, told in (
                ("scan.enter.weight", "mhs.x_ssproj.weight"),
                ("scan.norm", "mhs.cat_norm"),
                ("scan.out", "mhs.y_proj"),
                ("enter", "in_proj"),
                ("conv", "conv2d"),
                ("norm", "out_norm"),
            ):
                if rest.startswith(ours):
                    theirs[start + rest.replace(ours, told)] = value
                    break
        elif side == "merges":
            theirs[f"layers.{rest.replace('.', '.downsample.', 1)}"] = value
        elif side == "expands":
            theirs[f"layers_up.{int(rest[0]) + 1}.upsample.{rest[2:]}"] = value
        else:
            told = {"embed.0": "patch_embed.proj", "embed.1": "patch_embed.norm", "last": "final_up"}
            told["head"] = "final_conv"
            ours = next(o for o in told if name.startswith(o))
            theirs[name.replace(ours, told[ours], 1)] = value
    other = MHSVMUNet(**{**MHSVMUNet.example, "heads": 4}).double().eval()
    theirs = {f"vmunet.{name}": value for name, value in theirs.items()}
    authors.load(other, theirs, prefix_strip=("vmunet.",))
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(other(x), model(x))


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="must double"):
        MHSVMUNet(dims=(8, 16, 24, 48))
    with pytest.raises(ValueError, match="x has shape"):
        build()(torch.zeros(1, 4, 32, 32, dtype=torch.float64))
