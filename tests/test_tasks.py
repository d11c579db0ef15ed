"""The tasks of `heedful compare`: right answers, clean splits, and clear words about unfit data."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from heedful.bench.tasks import IGNORE, Images, Recall, Text, make_tasks
from heedful.bench.tasks.images import folder
from heedful.bench.train import evaluate

ENGLISH = b"It was the best of times, it was the worst of times. " * 200


def test_recall_answers_are_the_values_shown_with_the_keys() -> None:
    task = Recall(length=40, pairs=5, queries=11, keys=9, values=7, batch_size=20)
    inputs, targets = task.batch(torch.Generator().manual_seed(3))
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        shown = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        assert len(shown) == 5
        assert all(1 <= key <= 9 < value <= 16 for key, value in shown.items())
        assert wanted[:10] == [IGNORE] * 10
        for token, answer in zip(row[10:], wanted[10:], strict=True):
            assert (token == 0 and answer == IGNORE) or answer == shown[token]
        asked = [token for token in row[10:] if token]
        assert len(asked) == 11
        assert set(asked) == set(shown)


def test_recall_holds_out_the_same_sequences_and_trains_on_others() -> None:
    task = Recall(length=40, pairs=5, queries=11, keys=9, values=7, batch_size=4, held_out_batches=3)
    first, again = list(task.held_out()), list(task.held_out())
    assert len(first) == 3
    assert all(
        torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True)
    )
    seen = {
        tuple(row) for seed in range(5) for row in task.batch(torch.Generator().manual_seed(seed))[0].tolist()
    }
    assert not seen & {tuple(row) for inputs, _ in first for row in inputs.tolist()}


def test_accuracy_counts_asked_positions_alone() -> None:
    task = Recall(length=40, pairs=5, queries=11, keys=9, values=7, batch_size=4, held_out_batches=2)

    class Oracle(nn.Module):
        """Looks the answer up; says nonsense where nothing is asked."""

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*tokens.shape, task.classes)
            for b, row in enumerate(tokens.tolist()):
                shown = dict(zip(row[0:10:2], row[1:10:2], strict=True))
                for n, token in enumerate(row):
                    logits[b, n, shown.get(token, 0)] = 1.0
            return logits

    assert evaluate(Oracle(), task, torch.device("cpu")) == 1.0


def test_text_splits_without_overlap_and_predicts_the_next_byte() -> None:
    data = bytes(torch.randint(256, (4000,), generator=torch.Generator().manual_seed(0)).tolist())
    task = Text(data, "noise", length=16, batch_size=8)
    train, held = task.parts
    assert bytes(train.tolist()) + bytes(held.tolist()) == data
    assert len(held) == 400
    inputs, targets = task.batch(torch.Generator().manual_seed(1))
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert row[1:] == wanted[:-1]
        assert bytes([*row, wanted[-1]]) in data[:3600]
    windows = [
        bytes([*x, y[-1]]) for a, b in task.held_out() for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    places = [data.index(window, 3600) for window in windows]
    assert places == sorted(places)
    assert all(b - a >= 16 for a, b in pairwise(places))


def test_text_references_are_the_counts_of_bytes_and_pairs() -> None:
    task = Text(ENGLISH, "dickens", length=16)
    cut = len(ENGLISH) * 9 // 10
    train, held = ENGLISH[:cut], ENGLISH[cut:]
    one, first = Counter(train), Counter(train[:-1])
    two = Counter(pairwise(train))
    order0 = [-math.log2((one[x] + 1) / (len(train) + 256)) for x in held]
    order1 = [-math.log2((two[a, x] + 0.1) / (first[a] + 25.6)) for a, x in pairwise(held)]
    assert task.references == pytest.approx((np.mean(order0), np.mean(order1)), rel=1e-9)


def test_an_ignorant_network_needs_eight_bits_a_byte() -> None:
    class Ignorant(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*tokens.shape, 256)

    assert evaluate(Ignorant(), Text(ENGLISH, "dickens", length=16), torch.device("cpu")) == pytest.approx(
        8.0
    )


def test_digits_hold_out_the_same_third_of_every_class() -> None:
    (task,), (again,) = make_tasks("images"), make_tasks("images")
    assert isinstance(task, Images)
    assert isinstance(again, Images)
    train, held = task.split
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(1797))
    assert torch.equal(held, again.split[1])
    for digit in range(10):
        assert int((task.labels[held] == digit).sum()) == int((task.labels == digit).sum()) // 3
    inputs, labels = task.batch(torch.Generator().manual_seed(0))
    known = {tuple(image): label for image, label in zip(
        task._normalised(train).flatten(1).tolist(), task.labels[train].tolist(), strict=True)}  # fmt: skip
    assert [known[tuple(x)] for x in inputs.flatten(1).tolist()] == labels.tolist()


def _photo(path: Path, red: int) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    pixels = np.full((30, 50, 3), (red, 40, 90), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_photographs_are_read_by_class_and_cut_to_a_square(tmp_path: Path) -> None:
    for i in range(3):
        _photo(tmp_path / "rose" / f"{i}.png", 250)
        _photo(tmp_path / "violet" / f"{i}.jpg", 100)
    (tmp_path / "rose" / "notes.txt").write_text("not an image")
    task = folder(tmp_path, side=32)
    assert task.names == ("rose", "violet")
    assert task.pixels.shape == (6, 3, 32, 32)
    assert task.side == 16
    assert task.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert task.pixels[0, 0].mean() == pytest.approx(250 / 255, abs=0.02)
    assert len(task.split[1]) == 2


@pytest.mark.door
def test_unfit_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no task 'rekall'; the tasks are recall, text, images"):
        make_tasks("rekall")
    with pytest.raises(ValueError, match="does not exist"):
        make_tasks("text", tmp_path / "none.txt")
    with pytest.raises(ValueError, match="makes its own data"):
        make_tasks("recall", tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(ValueError, match=r"short\.txt has 9 bytes, must have at least"):
        make_tasks("text", short)
    with pytest.raises(ValueError, match="is not a file"):
        make_tasks("text", tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        make_tasks("images", short)
    empty = tmp_path / "photos"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        make_tasks("images", empty)
    for i in range(3):
        _photo(empty / "rose" / f"{i}.png", 250)
    with pytest.raises(ValueError, match="one class 'rose'; there must be at least two"):
        make_tasks("images", empty)
    _photo(empty / "violet" / "0.png", 9)
    with pytest.raises(ValueError, match="'violet' has 1 images, must have at least 3"):
        make_tasks("images", empty)
    for i in range(3):
        (empty / "violet" / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"0\.png cannot be read as an image"):
        make_tasks("images", empty)


def test_recall_takes_numbers_behind_its_name() -> None:
    assert make_tasks("recall:length=512,pairs=4") == [Recall(length=512, pairs=4)]
    assert make_tasks("recall") == [Recall()]


@pytest.mark.door
def test_recall_sizes_must_fit() -> None:
    with pytest.raises(
        ValueError, match="'window=3' does not fit the task recall, which takes whole numbers"
    ):
        make_tasks("recall:window=3")
    with pytest.raises(ValueError, match="'length=long' does not fit"):
        make_tasks("recall:length=long")
    with pytest.raises(ValueError, match="the task 'text' takes no numbers"):
        make_tasks("text:length=512")
    with pytest.raises(ValueError, match="pairs is 8, must be at most keys, which is 7"):
        Recall(keys=7)
    with pytest.raises(ValueError, match="queries is 5, must lie between"):
        Recall(queries=5)
