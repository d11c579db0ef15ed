"""MULTI-LANE's model: the frozen stream is a vision transformer, lanes, tasks one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful import authors
from heedful.models.multi_lane import MultiLaneViT


def build(**how):
    torch.manual_seed(0)
    model = MultiLaneViT(**{**MultiLaneViT.example, **how}).double()
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return model.eval()


def image(size=(16, 16), batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 3, *size, dtype=torch.float64)


def theirs(model):
    names = (("class_token", "cls_token"), ("positions", "pos_embed"), ("embed.", "patch_embed.proj."))
    state = {}
    for name, value in model.state_dict().items():
        for ours, told in names:
            name = told + name.removeprefix(ours) if name.startswith(ours) else name
        state[name] = value
    return state


def streams(model, x):
    """The frozen tokens that enter each block: those of timm's vision transformer."""
    timm = pytest.importorskip("timm")
    plain = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, num_classes=7, embed_dim=12, depth=3, num_heads=3
    ).double()
    own = {n: v for n, v in theirs(model).items() if "prompts" not in n and n != "selectors"}
    plain.load_state_dict(own, strict=True)
    plain.eval()
    found = []
    for block in plain.blocks:
        block.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    plain(x)
    return found


def test_equals_transcription():
    model = build()
    model.task = 1
    x = image()
    frozen = streams(model, x)
    expected = torch.zeros(2, 7, dtype=torch.float64)
    for t, columns in ((0, slice(0, 2)), (1, slice(2, 4))):
        lane = torch.cat([model.class_token, model.selectors[t : t + 1]], 1).expand(2, -1, -1)
        for block, z in zip(model.blocks, frozen, strict=True):
            lane = lane + block.attn(block.norm1(lane), context=block.norm1(z), task=t)
            lane = lane + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(lane))))
        token = model.norm(lane[:, 0])
        token = token / token.square().sum(-1, keepdim=True).sqrt()
        expected[:, columns] = (token @ model.head.weight.T + model.head.bias)[:, columns]
    torch.testing.assert_close(model(x), expected)
    assert not model(x)[:, 4:].any()


def test_training_runs_the_lane_of_the_current_task():
    model = build()
    model.task = 1
    x = image()
    every = model(x)
    model.train()
    alone = model(x)
    torch.testing.assert_close(alone[:, 2:4], every[:, 2:4])
    assert not alone[:, :2].any() and not alone[:, 4:].any()
    columns = model.columns(1)
    loss = F.binary_cross_entropy_with_logits(alone[:, columns], torch.ones(2, 2, dtype=torch.float64))
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == {
        "selectors",
        "head.weight",
        "head.bias",
        "blocks.0.attn.prompts",
        "blocks.1.attn.prompts",
    }
    assert all(grad.isfinite().all() for grad in grads.values())
    for tasks in (grads["selectors"], *(grads[f"blocks.{i}.attn.prompts"].transpose(0, 1) for i in (0, 1))):
        assert [bool(own.any()) for own in tasks] == [False, True, False]
    assert [bool(row.any()) for row in grads["head.weight"]] == [False] * 2 + [True] * 2 + [False] * 3


def test_the_next_task_starts_from_this_one():
    model = build()
    model.next_task()
    assert model.task == 1
    assert torch.equal(model.selectors[1], model.selectors[0])
    assert not torch.equal(model.selectors[2], model.selectors[0])
    for block in model.blocks[:2]:
        assert torch.equal(block.attn.prompts[:, 1], block.attn.prompts[:, 0])
    assert model.blocks[2].attn.prompts is None


def test_what_learns_is_what_the_paper_counts():
    with torch.device("meta"):
        model = MultiLaneViT()
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learned == 5 * 2 * 10 * 20 * 768 + 10 * 20 * 768 + 769 * 80
    assert [MultiLaneViT(**MultiLaneViT.example).columns(t) for t in range(3)] == [
        slice(0, 2),
        slice(2, 4),
        slice(4, 7),
    ]


def test_any_size_and_authors_names():
    model = build()
    x = image((13, 22))
    torch.testing.assert_close(model(x), model(F.pad(x, (0, 2, 0, 3))))
    other = authors.load(MultiLaneViT(**MultiLaneViT.example).double(), theirs(model)).eval()
    assert torch.equal(other(x), model(x))


@pytest.mark.door
def test_errors():
    model = build(tasks=1)
    for call, message in (
        (model.next_task, "task is 0, the last of 1"),
        (lambda: build(classes=(3, 4)), r"classes is \[3, 4\], must have at least 1 for each of 3 tasks"),
        (lambda: build(classes=2), "must have at least 1 for each of 3 tasks"),
        (lambda: model(image()[:, :2]), "x has shape"),
        (lambda: build(patch=5), "patch is 5, must divide image_size"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
