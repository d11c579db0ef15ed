"""StreamingVLM: what stays of a chat round by round; positions and rotation of what stayed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from heedful.cache.mrope import MultiRotation, mrope_positions
from heedful.cache.streaming_vlm import Round, Stream, cut_stream
from tests.parity.harness import Tensors, adapter

START, END, USER, ASSISTANT, LF = 151644, 151645, 872, 77091, 198
VISION, NO_VISION, PAD, TIME, SILENT = 151652, 151653, 151656, 1462, 2503
PREVIOUS = (19702, 1467)


def read(ids: list[int]) -> Stream:
    """The segments of a chat, found by their marks."""
    starts = [i for i, x in enumerate(ids) if x == START] + [len(ids)]
    stream, rounds = None, []
    for start, stop in pairwise(starts):
        turn, end = ids[start:stop], start + ids[start:stop].index(END)
        places = tuple(range(start, stop))
        if tuple(turn[1:3]) == PREVIOUS:
            stream = Stream(places[:4], tuple(range(start + 4, end)), tuple(range(end, stop)))
        elif turn[1] == USER:
            open_ = start + turn.index(VISION) if VISION in turn else end
            close = start + turn.index(NO_VISION) + 1 if VISION in turn else end
            time = start + turn.index(TIME) if TIME in turn else open_
            rounds.append(
                Round(
                    before=tuple(range(start, time)),
                    time=tuple(range(time, open_)),
                    vision=tuple(range(open_, close)),
                    after=tuple(range(close, stop)),
                )
            )
        else:
            words = range(start + 3, end - 1)
            answer = {"opening": places[:3], "words": tuple(words), "closing": tuple(range(end - 1, stop))}
            # Answers are fewer than user turns at times, never more: they belong to the last of these.
            rounds[-1] = Round(**{**vars(rounds[-1]), **answer})
    assert stream is not None
    return Stream(stream.head, stream.text, stream.tail, tuple(rounds))


def made(config: Any, drawn: Tensors) -> Tensors:
    """Chats of the recorded lengths."""
    inputs = {}
    for name, case in config.items():
        words = list(range(1000, 1005))
        ids = torch.tensor([START, *PREVIOUS, LF, *words, END, LF])
        for number in range(case["rounds"]):
            if number > 0:
                ids = ids[list(cut(ids, number, case).places)]
            query = [3000] if number == 0 else []
            user = [START, USER, LF, TIME, 2000 + number, VISION, PAD, PAD, PAD, NO_VISION, *query, END, LF]
            said = [5000 + 100 * number + j for j in range(4)]
            ids = torch.cat([ids, torch.tensor([*user, START, ASSISTANT, LF, *said, SILENT, END, LF])])
            inputs |= {f"{name}.r{number}.ids": ids, f"{name}.r{number}.kvid": torch.arange(len(ids))}
    return inputs


def cut(ids: Tensor, number: int, case: Any) -> Stream:
    return cut_stream(
        read(ids.tolist()),
        number,
        text_rounds=case["text_round"],
        visual_rounds=case["visual_round"],
        text_sink=case["text_sink"],
        text_window=case["text_window"],
    )


@adapter("streaming-vlm", inputs=made)
def streaming_vlm(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    outputs = {}
    for name, case in config.items():
        for number in range(1, case["rounds"]):
            ids, entries = (inputs[f"{name}.r{number - 1}.{x}"] for x in ("ids", "kvid"))
            kept = list(cut(ids, number, case).places)
            outputs |= {f"{name}.r{number}.ids": ids[kept], f"{name}.r{number}.kvid": entries[kept]}
    return outputs


@adapter("streaming-vlm-rope")
def rope(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    positions = mrope_positions(
        inputs["input_ids"][0] == PAD,
        inputs["video_grid_thw"].tolist(),
        merge=config["spatial_merge_size"],
        step=2 / config["FPS"] * config["tokens_per_second"],
    )[:, None]
    dim = config["head_dim"]
    frequency = config["theta"] ** -(torch.arange(0, dim, 2) / dim)
    rotation = MultiRotation(frequency, tuple(config["mrope_section"]))
    query, key = inputs["q"], inputs["k"]
    return {
        "position_ids": positions,
        "q_rot": rotation.turn(query, positions[..., -query.shape[2] :]),
        "k_rot": rotation.turn(key, positions),
    }
