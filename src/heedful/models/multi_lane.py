"""MULTI-LANE: a frozen vision transformer with a light lane for every task that comes along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_positive
from heedful.mixers.cross.multi_lane import SummarizedPathwayAttention
from heedful.models.parts import Mlp, init_linear, resize_table
from heedful.registry import register


@register("multi-lane-vit", kind="model", paper="multi-lane", tags=("image", "prompts", "continual learning"))
class MultiLaneViT(nn.Module):
    """Vision transformer whose frozen weights also carry [class token, selectors] of every task.

        x += attention(LN(x));   x += mlp(LN(x))                                 without gradients
        lane_t += lane(LN(lane_t), LN(x));   lane_t += mlp(LN(lane_t))
        logits of task t's classes = head(c / |c|),  c = LN(lane_t)_0

    lane is `SummarizedPathwayAttention`. Only prompts, selectors and the head learn. In training the lane of
    the current task runs alone, in eval those of all tasks so far; logits of classes without a lane in play
    are 0. `next_task()` goes on to the next one, whose prompts and selectors start as copies.

    classes        of all tasks together, or how many each task has
    tasks          number of tasks; classes in a number are shared out as evenly as can be, in order
    in_channels    of the image
    dim, depth, heads, mlp_ratio, image_size, patch  of the vision transformer
    selectors      of each task
    prompts        of each task, in each of the first `prompt_layers` blocks

    forward: images (b, in_channels, height, width), padded with zeros to whole patches; gives (b, classes).
    The loss of the paper is binary cross entropy of the current task's columns, `model.columns(model.task)`.
    Raises ValueError on numbers that do not fit, and where there is no next task.
    Source: Less is more: Summarizing Patch Tokens for efficient Multi-Label Class-Incremental Learning,
    arXiv 2405.15633.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 7,
        "tasks": 3,
        "dim": 12,
        "depth": 3,
        "heads": 3,
        "image_size": 16,
        "patch": 4,
        "selectors": 2,
        "prompts": 2,
        "prompt_layers": 2,
    }

    def __init__(
        self,
        *,
        classes: int | Sequence[int] = 80,
        tasks: int = 10,
        in_channels: int = 3,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4,
        image_size: int = 224,
        patch: int = 16,
        selectors: int = 20,
        prompts: int = 20,
        prompt_layers: int = 5,
    ) -> None:
        super().__init__()
        check_positive("tasks", tasks)
        check_positive("selectors", selectors)
        check_divides("patch", patch, "image_size", image_size)
        if isinstance(classes, int):
            classes = [classes * (t + 1) // tasks - classes * t // tasks for t in range(tasks)]
        if len(classes) != tasks or min(classes) < 1:
            raise ValueError(f"classes is {list(classes)}, must have at least 1 for each of {tasks} tasks")
        self.shares, self.tasks, self.task = tuple(classes), tasks, 0
        self.in_channels, self.patch, self.side = in_channels, patch, image_size // patch
        self.embed = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + self.side**2, dim))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                heads=heads,
                hidden=int(mlp_ratio * dim),
                prompts=prompts if layer < prompt_layers else 0,
                tasks=tasks,
            )
            for layer in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_linear)
        for table in (self.class_token, self.positions):
            nn.init.trunc_normal_(table, std=0.02)
        self.requires_grad_(False)
        self.selectors = nn.Parameter(torch.empty(tasks, selectors, dim).uniform_(-1, 1))
        self.head = nn.Linear(dim, sum(classes))
        init_linear(self.head)
        for block in self.blocks:
            if block.attn.prompts is not None:  # type: ignore[union-attr]
                block.attn.prompts.requires_grad_()  # type: ignore[union-attr]

    def columns(self, task: int) -> slice:
        """Which logits are of the classes of a task."""
        start = sum(self.shares[:task])
        return slice(start, start + self.shares[task])

    @torch.no_grad()
    def next_task(self) -> None:
        """Go on to the next task, which starts from the prompts and selectors of this one."""
        if self.task + 1 == self.tasks:
            raise ValueError(f"task is {self.task}, the last of {self.tasks}: there is no next one")
        now, self.task = self.task, self.task + 1
        self.selectors[self.task] = self.selectors[now]
        for block in self.blocks:
            if (prompts := block.attn.prompts) is not None:  # type: ignore[union-attr]
                prompts[:, self.task] = prompts[:, now]  # type: ignore[index, operator]

    def lanes(self, x: Float[Tensor, "b c height width"]) -> tuple[Float[Tensor, "t b d"], int]:
        """The normed class token of every lane in play, and the task of the first of them."""
        check_map("x", x, self.in_channels, (2,))
        first = self.task if self.training else 0
        with torch.no_grad():
            x = self.embed(F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch)))
            size = (x.shape[2], x.shape[3])
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
            grid = resize_table(self.positions[:, 1:], (self.side, self.side), size)
            x = x + torch.cat([self.positions[:, :1], grid], dim=1)
        selectors = self.selectors[first : self.task + 1, None].expand(-1, len(x), -1, -1)
        lanes = torch.cat([self.class_token.expand(*selectors.shape[:2], -1, -1), selectors], dim=2)
        for block in self.blocks:
            x, lanes = block(x, lanes, first)
        return self.norm(lanes[:, :, 0]), first

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b k"]:
        tokens, first = self.lanes(x)
        logits = self.head(F.normalize(tokens, dim=-1))
        played = logits.new_zeros(logits.shape[1:])
        for task, own in enumerate(logits, start=first):
            columns = self.columns(task)
            played[:, columns] = own[:, columns]
        return played

    def example_inputs(
        self, *, batch: int = 2, size: tuple[int, int] = (16, 16), dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, self.in_channels, *size, generator=generator, dtype=torch.float64)
        return {"x": x.to(dtype)}


class Block(nn.Module):
    """A block of the vision transformer for the frozen stream (no gradients) and the lanes beside it."""

    def __init__(
        self, dim: int, *, heads: int, hidden: int, prompts: int, tasks: int, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = SummarizedPathwayAttention(dim, heads=heads, prompts=prompts, tasks=tasks)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden)

    def forward(
        self, x: Float[Tensor, "b n c"], lanes: Float[Tensor, "t b s c"], first: int = 0
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "t b s c"]]:
        with torch.no_grad():
            seen = self.norm1(x)
            x = x + self.attn.stream(seen)
            x = x + self.mlp(self.norm2(x))
        lanes = lanes + self.attn.lanes(self.norm1(lanes), seen, first=first)
        return x, lanes + self.mlp(self.norm2(lanes))
