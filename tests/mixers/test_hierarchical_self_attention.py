"""Attention on a tree: the dynamic programme by recursion, that it is optimal, and its causal form."""

from __future__ import annotations

import math

import pytest
import torch

from heedful.mixers.sparse.hierarchical_self_attention import HierarchicalSelfAttention
from heedful.ops.hierarchical import Tree, causal_hierarchical_attention, hierarchical_attention

F64 = torch.float64
TREES = [
    [0, 1, 2, 3, 4, 5, 6, 7],
    [[0, 1, 2], [3, 4], [5, 6, 7]],
    [[0, [1, 2]], 3, [[4, 5, 6], [7]]],
    [[[7, 2], [0]], [[1, 3], [4, [5, 6]]]],
    [[0], [1], [[2, 3], [4, 5]], [6, 7]],
]


def leaves(node):
    return [node] if isinstance(node, int) else [i for child in node for i in leaves(child)]


def weights_by_hand(q, k, tree, *, causal=False, self_term=True):
    """The card's steps on nested lists for one head: potentials bottom up, weights along paths; (n, n)."""
    d, n = q.shape[-1], len(q)

    def mean(x, node):
        return x[leaves(node)].mean(0)

    def siblings(children, at):
        return children[:at] if causal else children[:at] + children[at + 1 :]

    def psi(b, c):
        return -(mean(q, b) @ mean(k, c)) / math.sqrt(d)

    def phi(node):
        if isinstance(node, int):
            return -(q[node] @ k[node]) / math.sqrt(d)
        size = len(leaves(node))
        return -sum(len(leaves(b)) / size * z(node, at).log() for at, b in enumerate(node))

    def stay(node):
        while not isinstance(node, int) and len(node) == 1:
            node = node[0]  # a lone child has no siblings to give weight to
        return torch.zeros((), dtype=F64) if isinstance(node, int) and not self_term else (-phi(node)).exp()

    def z(parent, at):
        b = parent[at]
        return stay(b) + sum(len(leaves(c)) * (-psi(b, c)).exp() for c in siblings(parent, at))

    rows = [[torch.zeros((), dtype=F64)] * n for _ in range(n)]

    def walk(node, mass):
        for at, b in enumerate(node):
            total = z(node, at)
            if not total:
                continue
            for c in siblings(node, at):
                for i in leaves(b):
                    for j in leaves(c):
                        rows[i][j] = mass * (-psi(b, c)).exp() / total
            inside = mass * stay(b) / total
            if isinstance(b, int):
                rows[b][b] = inside
            else:
                walk(b, inside)

    walk(tree, torch.ones((), dtype=F64))
    return torch.stack([torch.stack(row) for row in rows]), None if not self_term else phi(tree)


def draw(n=8, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 1, n, d, dtype=F64, generator=generator)
    return [x.requires_grad_() for x in (q, k, v)]


@pytest.mark.parametrize("self_term", [True, False])
@pytest.mark.parametrize("nodes", TREES)
def test_equals_the_recursion(nodes, self_term):
    q, k, v = draw()
    y, root = hierarchical_attention(q, k, v, Tree.nested(nodes), self_term=self_term, return_potential=True)
    weights, potential = weights_by_hand(q[0, 0], k[0, 0], nodes, self_term=self_term)
    torch.testing.assert_close(y[0, 0], weights @ v[0, 0])
    if self_term:
        torch.testing.assert_close(root[0, 0], potential)
    signs = torch.randn_like(y)
    ours = torch.autograd.grad((y * signs).sum(), (q, k, v))
    theirs = torch.autograd.grad(((weights @ v[0, 0]) * signs[0, 0]).sum(), (q, k, v))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("n", [1, 2, 9, 14])
def test_regular_trees_are_nested_ones(n):
    q, k, v = draw(n)
    nodes = list(range(n))
    while len(nodes) > 3:
        nodes = [nodes[i : i + 3] for i in range(0, len(nodes), 3)]
    ours = hierarchical_attention(q, k, v, Tree.regular(n, 3))
    weights, _ = weights_by_hand(q[0, 0], k[0, 0], nodes)
    torch.testing.assert_close(ours[0, 0], weights @ v[0, 0])


def test_one_level_is_softmax_attention():
    q, k, v = draw()
    expected = (q @ k.mT * 5**-0.5).softmax(-1) @ v
    torch.testing.assert_close(hierarchical_attention(q, k, v, Tree.regular(8, 8)), expected)


def tied(nodes, n):
    """Which entries of the matrix share one number: labels (n, n)."""
    label = torch.zeros(n, n, dtype=torch.long)
    count = 0

    def walk(node):
        nonlocal count
        for b in node:
            for c in node:
                if b is not c or isinstance(b, int):
                    for i in leaves(b):
                        for j in leaves(c):
                            label[i, j] = count
                    count += 1
            if not isinstance(b, int):
                walk(b)

    walk(nodes)
    return label, count


def implied(q, k, nodes):
    n = q.shape[2]
    return hierarchical_attention(q, k, torch.eye(n, dtype=F64)[None, None], Tree.nested(nodes))[0, 0]


@pytest.mark.parametrize("nodes", TREES[1:4])
def test_rows_sum_to_one_and_siblings_share_weights(nodes):
    q, k, _ = draw(seed=1)
    weights = implied(q, k, nodes)
    torch.testing.assert_close(weights.sum(-1), torch.ones(8, dtype=F64))
    label, count = tied(nodes, 8)
    for number in range(count):
        entries = weights[label == number]
        torch.testing.assert_close(entries, entries[:1].expand_as(entries))


@pytest.mark.parametrize("nodes", [[[0, 1], [2, 3, 4], 5], [[0, [1, 2]], [[3, 4], 5]]])
def test_no_tied_matrix_is_nearer_to_softmax_attention(nodes):
    """An optimiser that knows the ties alone finds the same matrix, and the closed form its distance."""
    q, k, v = draw(6, seed=2)
    logits = (q @ k.mT * 5**-0.5)[0, 0].detach()
    log_p = logits.log_softmax(-1)
    label, count = tied(nodes, 6)
    free = torch.zeros(count, dtype=F64, requires_grad=True)

    # Row sums are equations between the ties; the penalty's weight grows until they hold.
    optimizer = torch.optim.LBFGS([free], max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-15,
                                  line_search_fn="strong_wolfe")  # fmt: skip
    multiplier = torch.zeros(6, dtype=F64)

    def closure():
        optimizer.zero_grad()
        log_q = free[label]
        excess = log_q.exp().sum(-1) - 1
        loss = (
            (log_q.exp() * (log_q - log_p)).sum() + (multiplier * excess).sum() + 50 * excess.square().sum()
        )
        loss.backward()
        return loss

    for _ in range(30):
        optimizer.step(closure)
        with torch.no_grad():
            multiplier += 100 * (free[label].exp().sum(-1) - 1)
    found = free.detach()[label].exp()
    weights = implied(q, k, nodes).detach()
    torch.testing.assert_close(weights, found, rtol=1e-5, atol=1e-6)
    _, root = hierarchical_attention(q, k, v, Tree.nested(nodes), return_potential=True)
    distance = (weights * (weights.log() - log_p)).sum()
    torch.testing.assert_close(distance, 6 * root[0, 0].detach() + logits.logsumexp(-1).sum())


def test_what_is_constant_in_every_subtree_is_softmax_attention():
    for nodes in TREES[1:]:
        groups = torch.zeros(8, dtype=torch.long)
        for number, child in enumerate(nodes):
            groups[leaves(child)] = number
        q, k, _ = draw(len(nodes), seed=3)
        q, k = q[:, :, groups], k[:, :, groups]
        v = torch.randn(1, 1, 8, 5, dtype=F64)
        expected = (q @ k.mT * 5**-0.5).softmax(-1) @ v
        torch.testing.assert_close(hierarchical_attention(q, k, v, Tree.nested(nodes)), expected)


def test_the_order_of_siblings_does_not_matter():
    q, k, v = draw(seed=4)
    one = hierarchical_attention(q, k, v, Tree.nested([[0, [1, 2]], 3, [[4, 5, 6], [7]]]))
    other = hierarchical_attention(q, k, v, Tree.nested([[[7], [6, 4, 5]], [[2, 1], 0], 3]))
    torch.testing.assert_close(one, other)


def test_masked_leaves_are_not_in_the_tree():
    q, k, v = draw(seed=5)
    mask = torch.tensor([[True, False, True, True, False, False, True, True]])
    full = Tree.nested([[0, 1, 2], [3, [4, 5]], [6, 7]])
    kept = mask[0].nonzero()[:, 0]
    expected = hierarchical_attention(*(x[:, :, kept] for x in (q, k, v)), Tree.nested([[0, 1], [2], [3, 4]]))
    torch.testing.assert_close(hierarchical_attention(q, k, v, full, mask=mask)[:, :, kept], expected)


# -- causal ------------------------------------------------------------------------------------------


def cut(tree, last):
    """The tree of the leaves up to `last`."""
    if isinstance(tree, int):
        return tree if tree <= last else None
    kept = [c for c in (cut(child, last) for child in tree) if c is not None]
    return kept or None


@pytest.mark.parametrize("n", [1, 3, 9, 14])
def test_causal_rows_are_those_of_the_tree_so_far(n):
    q, k, v = draw(n, seed=6)
    nodes = list(range(n))
    while len(nodes) > 3:
        nodes = [nodes[i : i + 3] for i in range(0, len(nodes), 3)]
    ours = causal_hierarchical_attention(q, k, v, 3)
    rows = []
    for i in range(n):
        part = slice(0, i + 1)
        weights, _ = weights_by_hand(q[0, 0, part], k[0, 0, part], cut(nodes, i), causal=True)
        rows.append(weights[i] @ v[0, 0, part])
    expected = torch.stack(rows)
    torch.testing.assert_close(ours[0, 0], expected)
    signs = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((ours[0, 0] * signs).sum(), (q, k, v)),
        torch.autograd.grad((expected * signs).sum(), (q, k, v)),
    )


def test_causal_with_one_level_is_causal_softmax_attention():
    q, k, v = draw(seed=7)
    logits = (q @ k.mT * 5**-0.5).masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(causal_hierarchical_attention(q, k, v, 8), logits.softmax(-1) @ v)


# -- the mixer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_mixer_is_its_operator_between_projections(qk_norm, causal):
    torch.manual_seed(0)
    mixer = HierarchicalSelfAttention(12, heads=2, branching=3, qk_norm=qk_norm, causal=causal, dtype=F64)
    x = torch.randn(2, 11, 12, dtype=F64)
    nodes = [[[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[9, 10]]]
    rows = []
    for b in range(2):
        heads = []
        for h in range(2):
            own = slice(6 * h, 6 * h + 6)
            q, k, v = (layer(x[b])[:, own] for layer in (mixer.query, mixer.key, mixer.value))
            if qk_norm:
                q, k = (
                    (t - t.mean(-1, keepdim=True)) / (t.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
                    for t in (q, k)
                )
            if causal:
                out = [
                    weights_by_hand(q[: i + 1], k[: i + 1], cut(nodes, i), causal=True)[0][i] @ v[: i + 1]
                    for i in range(11)
                ]
                heads.append(torch.stack(out))
            else:
                heads.append(weights_by_hand(q, k, nodes)[0] @ v)
        rows.append(mixer.out(torch.cat(heads, 1)))
    torch.testing.assert_close(mixer(x), torch.stack(rows))


def test_a_tree_of_sentences():
    mixer = HierarchicalSelfAttention(12, heads=2, branching=16, dtype=F64)
    x = torch.randn(2, 8, 12, dtype=F64)
    flat = mixer(x)
    torch.testing.assert_close(mixer(x, tree=Tree.nested(list(range(8)))), flat)
    assert not torch.allclose(mixer(x, tree=Tree.nested(TREES[1])), flat)


def test_parameter_counts():
    assert sum(p.numel() for p in HierarchicalSelfAttention(64).parameters()) == 4 * (64**2 + 64)


@pytest.mark.door
def test_door():
    q = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="tree has 2 leaves, must have 3"):
        hierarchical_attention(q, q, q, Tree.nested([0, 1]))
    with pytest.raises(ValueError, match="nodes has the leaves"):
        Tree.nested([[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="nodes has an empty list"):
        Tree.nested([[0, 1], []])
    with pytest.raises(ValueError, match="branching is 1"):
        Tree.regular(4, 1)
    with pytest.raises(ValueError, match="leaves is 0"):
        Tree.regular(0, 2)
    with pytest.raises(ValueError, match="branching is 1"):
        causal_hierarchical_attention(q, q, q, 1)
    with pytest.raises(ValueError, match="branching is 1"):
        HierarchicalSelfAttention(8, branching=1)
    with pytest.raises(ValueError, match="self_term is False"):
        HierarchicalSelfAttention(8, causal=True, self_term=False)
    with pytest.raises(ValueError, match="tree is given"):
        HierarchicalSelfAttention(8, heads=2, causal=True)(torch.zeros(1, 2, 8), tree=Tree.nested([0, 1]))
    with pytest.raises(ValueError, match="causal is False"):
        HierarchicalSelfAttention(8).init_state(1)
