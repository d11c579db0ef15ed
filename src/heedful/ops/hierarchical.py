"""Attention on a tree: what the leaves of one subtree give to those of a sibling is one number.

Of all such tied attention matrices it takes the one nearest to softmax attention, in the sum over rows of
KL(Q_i || P_i), by a dynamic programme over the tree instead of N^2 scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heedful.checks import check_mask, check_positive

Nested = Sequence[Any] | int  # a token number, or a node: its children, each a Nested


@dataclass(frozen=True, eq=False)
class Tree:
    """A tree over `leaves` tokens, level by level from the leaves up; the last level is the root alone.

    children: for each level above the leaves, (nodes, most), the numbers of a node's children in the level
    below, -1 where it has fewer. All leaves stand at one depth; a node with one child changes nothing.
    """

    leaves: int
    children: tuple[Int[Tensor, "_ _"], ...]

    @classmethod
    def regular(cls, leaves: int, branching: int, *, device: torch.device | None = None) -> Tree:
        """Neighbouring tokens, `branching` at a time, then neighbouring nodes, up to one root."""
        check_positive("branching", branching)
        if branching < 2:
            raise ValueError(f"branching is {branching}, must be at least 2")
        check_positive("leaves", leaves)
        children: list[Tensor] = []
        count = leaves
        while count > 1 or not children:
            below = torch.arange(count, device=device)
            children.append(F.pad(below, (0, -count % branching), value=-1).view(-1, branching))
            count = len(children[-1])
        return cls(leaves, tuple(children))

    @classmethod
    def nested(cls, nodes: Nested, *, device: torch.device | None = None) -> Tree:
        """From nested lists whose leaves are the token numbers 0, 1, 2, ..., each once: [[0, 1], [2]]."""
        depth = _depth(nodes)
        levels: list[list[list[int]]] = [[] for _ in range(depth)]
        tokens: list[int] = []

        def add(node: Nested, height: int) -> int:
            """The number of the node in its level; leaves are brought down by nodes with one child."""
            if height == 0:
                assert isinstance(node, int)
                tokens.append(node)
                return node
            below = [node] if isinstance(node, int) else node
            if not below:
                raise ValueError("nodes has an empty list, every node must have a child")
            levels[height - 1].append([add(child, height - 1) for child in below])
            return len(levels[height - 1]) - 1

        add([nodes] if isinstance(nodes, int) else nodes, depth)
        if sorted(tokens) != list(range(len(tokens))):
            raise ValueError(f"nodes has the leaves {sorted(tokens)}, must have 0, 1, 2, ..., each once")
        children = []
        for level in levels:
            most = max(map(len, level))
            children.append(torch.tensor([row + [-1] * (most - len(row)) for row in level], device=device))
        return cls(len(tokens), tuple(children))


def _depth(node: Nested) -> int:
    """Levels above the leaves; a lone leaf stands below a root of its own."""
    if isinstance(node, int):
        return 1
    return 1 + max((_depth(child) for child in node if not isinstance(child, int)), default=0)


def hierarchical_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n e"],
    tree: Tree,
    *,
    scale: float | None = None,
    self_term: bool = True,
    mask: Bool[Tensor, "b n"] | None = None,
    return_potential: bool = False,
) -> Float[Tensor, "b h n e"] | tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h"]]:
    """Softmax attention whose weights are tied by a tree, as near to it as tied weights can be.

        Z_B = exp(-phi(B)) + sum over siblings C of |C| exp(s mean q_B . mean k_C)       for each node B
        phi(leaf) = -s q . k,   phi(A) = -sum over children B of |B| / |A| log Z_B
        y(B) = exp(-phi(B)) / Z_B y'(B) + sum over siblings C of |C| exp(s mean q_B . mean k_C) / Z_B mean v_C

    y' is what the ancestors below add, down to the leaf's own value; a leaf gets the y of all its ancestors,
    each times the exp(-phi) / Z of those above it. |B| counts leaves. With one level it is softmax
    attention. N KL = N phi(root) + sum_i logsumexp_j(s q_i . k_j) is the distance that is left.

    scale             s, default d ** -0.5
    self_term         False: no token gives weight to itself
    mask              False: the leaf is not in the tree
    return_potential  also phi(root), (b, h)

    Without a self term a leaf alone in its subtrees gives all its weight further up, and zeros if there is
    nothing. Raises ValueError where the tree does not have n leaves.
    Source: Hierarchical Self-Attention, arXiv 2509.15448.
    """
    b, h, n, d = query.shape
    if n == 0:
        return (value, query.new_zeros(b, h)) if return_potential else value
    if tree.leaves != n:
        raise ValueError(f"tree has {tree.leaves} leaves, must have {n}, one a token")
    check_mask("mask", mask, b, n)
    scale = d**-0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    query_mean, key_mean, value_mean = query.to(wide), key.to(wide), value.to(wide)
    count = _counts(mask, b, n, query_mean)
    inside = (query_mean * key_mean).sum(-1) * scale  # -phi: the logit of staying inside the node
    if not self_term:
        inside = torch.full_like(inside, -torch.inf)

    # Bottom up: weights among siblings; then the means and potentials of their parents.
    steps = []
    for children in tree.children:
        children = children.to(query.device)
        size = _take(count, children) * (children >= 0)
        there = size > 0
        q, k, v = (_take(x, children) for x in (query_mean, key_mean, value_mean))
        logits = q @ k.mT * scale + size.clamp(min=1).log()[..., None, :]
        own = torch.eye(children.shape[1], dtype=torch.bool, device=query.device)
        logits = torch.where(own, _take(inside, children)[..., None], logits)
        weights, log_z = _softmax(logits, there[..., None, :] & there[..., None])
        steps.append((children, weights.diagonal(dim1=-2, dim2=-1), weights.masked_fill(own, 0.0) @ v))
        count = size.sum(-1)
        share = size / count.clamp(min=1)[..., None]
        inside = (share * torch.where(there, log_z, 0.0)).sum(-1)
        query_mean, key_mean, value_mean = ((share[..., None] * x).sum(-2) for x in (q, k, v))

    # Top down: what the siblings of a node and of its ancestors give, and how much stays inside.
    given, stays = torch.zeros_like(value_mean), torch.ones_like(value_mean[..., :1])
    below = [n, *(len(children) for children in tree.children)]
    for (children, mu, outside), nodes in zip(reversed(steps), reversed(below[:-1]), strict=True):
        given = given[..., None, :] + stays[..., None, :] * outside
        stays = stays[..., None, :] * mu[..., None]
        given, stays = _put(given, children, nodes), _put(stays, children, nodes)
    y = (given + stays * value.to(wide)).to(query.dtype)
    return (y, -inside[..., 0]) if return_potential else y


def causal_hierarchical_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n e"],
    branching: int,
    *,
    scale: float | None = None,
    mask: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b h n e"]:
    """The same for generation, on a regular tree: a node sees the siblings before it.

    Row i is that of the tree of the tokens up to i alone, in which every sum over siblings runs over earlier
    ones: means of queries and potentials on the way from leaf i to the root end with i. So what a token gets
    depends on nothing after it. Cost O(n branching log n).

    Raises ValueError unless branching is at least 2. A form of heedful: the paper's is bidirectional.
    Source: Hierarchical Self-Attention, arXiv 2509.15448.
    """
    check_positive("branching", branching)
    if branching < 2:
        raise ValueError(f"branching is {branching}, must be at least 2")
    b, n, d = query.shape[0], *query.shape[2:]
    check_mask("mask", mask, b, n)
    if n == 0:
        return value
    scale = d**-0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    count = _counts(mask, b, n, query.to(wide))[..., None]
    q_mean, k_mean, v_mean = (x.to(wide) for x in (query, key, value))
    y = v_mean
    inside = (q_mean * k_mean).sum(-1, keepdim=True) * scale
    earlier = torch.ones(branching, branching, dtype=torch.bool, device=query.device).tril(-1)

    inner = 1  # leaves of a child
    while inner == 1 or inner < n:
        # Per leaf i: (b, h, parents, children, leaves of a child, .), the child being the one that holds i.
        nodes = k_mean.shape[2]
        children = min(nodes, branching)
        more = -nodes % children  # children without leaves
        q, own, mine, y = (_more(x, more * inner) for x in (q_mean, inside, count, y))
        q, own, mine, y = (x.unflatten(2, (-1, children, inner)) for x in (q, own, mine, y))
        k, v = (_more(x, more).unflatten(2, (-1, children)) for x in (k_mean, v_mean))
        size = mine[..., -1, :]  # whole children
        logits = torch.einsum("bhpcld,bhpsd->bhpcls", q, k) * scale
        logits = logits + size.clamp(min=1).log()[..., None, None, :, 0]
        seen = earlier[:children, None, :children] & (size > 0)[..., None, None, :, 0]
        logits = torch.cat([logits.masked_fill(~seen, -torch.inf), own], dim=-1)
        weights, log_z = _softmax(logits, None)
        y = torch.einsum("bhpcls,bhpsd->bhpcld", weights[..., :-1], v) + weights[..., -1:] * y
        # The parent up to i: its whole children before, and the child of i as far as it goes.
        log_z = log_z[..., None]
        parts = []
        for x in (q, log_z):
            total = x * mine
            whole = total[..., -1, :]
            parts.append(total + (whole.cumsum(3) - whole)[..., None, :])
        count = mine + (size.cumsum(3) - size)[..., None, :]
        q_mean, inside = (x / count.clamp(min=1) for x in parts)
        share = size / size.sum(3, keepdim=True).clamp(min=1)
        k_mean, v_mean = ((share * x).sum(3) for x in (k, v))
        q_mean, inside, count, y = (x.flatten(2, 4) for x in (q_mean, inside, count, y))
        inner *= branching
    return y[:, :, :n].to(query.dtype)


def _more(x: Tensor, more: int) -> Tensor:
    """x with that many further zeros on axis 2."""
    return F.pad(x, (0, 0, 0, more)) if more else x


def _counts(mask: Tensor | None, b: int, n: int, like: Tensor) -> Float[Tensor, "b 1 n"]:
    return like.new_ones(b, 1, n) if mask is None else mask.to(like.dtype)[:, None]


def _softmax(logits: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp over the last axis; zeros and -inf where nothing is seen."""
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    top = logits.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    return weights / total, (top + total.log()).masked_fill(empty, -torch.inf)[..., 0]


def _take(x: Tensor, children: Tensor) -> Tensor:
    """x (b, h, nodes, ...) to (b, h, parents, children, ...); some node for pads."""
    return x[:, :, children.clamp(min=0)]


def _put(x: Tensor, children: Tensor, nodes: int) -> Tensor:
    """x (b, h, parents, children, d) to (b, h, nodes, d)."""
    slot = children.flatten().argsort(stable=True)[children.numel() - nodes :]  # pads stand first
    return x.flatten(2, 3)[:, :, slot]
