"""Video chats: what is cut, positions on three axes, and keys moved in the cache."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from heedful.cache import StreamingVLMCache, cut_stream, mrope_positions
from heedful.cache.streaming_vlm import Round, Stream
from tests.cache_families import GROUPED, made, tokens


def chat(rounds, *, text=5, words=4):
    """A block of `text` tokens and rounds of 12 + 6 + `words`; the names of the tokens, and their places."""
    names, made_rounds = [], []

    def take(*named):
        names.extend(named)
        return tuple(range(len(names) - len(named), len(names)))

    head, body, tail = take("h0", "h1", "h2", "h3"), take(*(f"t{i}" for i in range(text))), take("e", "n")
    for r in range(rounds):
        made_rounds.append(
            Round(
                before=take(f"u{r}", f"u{r}'", f"u{r}''"),
                time=take(f"time{r}", f"time{r}'"),
                vision=take(*(f"v{r}.{i}" for i in range(5))),
                after=take(f"q{r}", f"q{r}'"),
                opening=take(f"a{r}", f"a{r}'", f"a{r}''"),
                words=take(*(f"w{r}.{i}" for i in range(words))),
                closing=take(f"c{r}", f"c{r}'", f"c{r}''"),
            )
        )
    return Stream(head, body, tail, tuple(made_rounds)), names


def said(stream, names):
    return [names[i] for i in stream.places]


def test_answers_move_and_rounds_leave():
    stream, names = chat(2)
    assert said(stream, names) == names
    told = {"text_rounds": 2, "visual_rounds": 2, "text_sink": 3, "text_window": 4}
    assert cut_stream(stream, 1, **told) == stream  # 3 + 2 words of 5: nothing lies between
    after = cut_stream(stream, 2, **told)
    assert said(after, names) == [
        *("h0", "h1", "h2", "h3"),
        *("t0", "t1", "t2", "w0.2", "w0.3"),
        *("e", "n"),
        *names[33:],  # round 1 as it was
    ]
    assert after.renumbered().places == tuple(range(len(after.places)))


def test_vision_leaves_before_text_and_text_before_vision():
    stream, names = chat(3)
    early = cut_stream(stream, 2, text_rounds=3, visual_rounds=2, text_sink=2, text_window=2)
    assert said(early, names) == ["h0", "h1", "h2", "h3", "t0", "t1", "e", "n"] + [
        x for x in names[11:] if not x.startswith("v0")
    ]
    late = cut_stream(stream, 2, text_rounds=2, visual_rounds=3, text_sink=None, text_window=None)
    gone = ("time0", "time0'", "a0", "a0'", "a0''", "c0", "c0'", "c0''")
    moved = [f"w0.{i}" for i in range(4)]
    assert said(late, names) == [
        *names[:9],
        *moved,
        *("e", "n"),
        *(x for x in names[11:] if x not in (*gone, *moved)),
    ]
    both = cut_stream(late, 3, text_rounds=2, visual_rounds=3, text_sink=None, text_window=None)
    assert not any(x.startswith(("u0", "v0", "q0", "time1")) for x in said(both, names))
    assert "v1.0" in said(both, names)


def test_lengths_become_constant():
    told = {"text_rounds": 2, "visual_rounds": 2, "text_sink": 3, "text_window": 4}
    lengths, stream = [], chat(0)[0]
    for number in range(8):
        stream = cut_stream(stream, number, **told).renumbered()
        lengths.append(len(stream.places))
        new = chat(1)[0].rounds[0]
        shift = len(stream.places) - 11
        new = Round(**{name: tuple(p + shift for p in part) for name, part in vars(new).items()})
        stream = Stream(stream.head, stream.text, stream.tail, (*stream.rounds, new))
        assert stream.places == tuple(range(len(stream.places)))
    assert lengths == [11, 33, *[33] * 6]


def test_positions_of_text_and_videos():
    video = torch.tensor([0, 0, *[1] * 12, 0, *[1] * 2, 0, 0], dtype=torch.bool)
    got = mrope_positions(video, [(2, 4, 6), (1, 2, 4)], step=3.0)
    wanted = [[i] * 3 for i in range(2)]
    wanted += [[2 + 3 * t, 2 + h, 2 + w] for t in range(2) for h in range(2) for w in range(3)]
    wanted += [[6] * 3, [7, 7, 7], [7, 7, 8], [9] * 3, [10] * 3]
    assert got.T.tolist() == wanted
    plain = mrope_positions(torch.zeros(4, dtype=torch.bool), [])
    assert plain.T.tolist() == [[i] * 3 for i in range(4)]


def qwen():
    torch.manual_seed(0)
    text = GROUPED | {"num_hidden_layers": 1, "vocab_size": 64}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 2}
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"intermediate_size": 16})
    return hf.AutoModelForImageTextToText.from_config(config).eval()


def test_moved_keys_are_those_of_the_kept_tokens_alone():
    """One layer, so that keys depend on the token and its positions alone."""
    model = qwen().model.language_model
    video = torch.tensor([0] * 5 + [1] * 8 + [0] * 4 + [1] * 4 + [0] * 3, dtype=torch.bool)
    before = mrope_positions(video, [(2, 4, 4), (1, 4, 4)])
    ids = tokens(1, 24)
    cache, alone = StreamingVLMCache(model), StreamingVLMCache(model)
    kept = [0, 1, 14, 2, *range(16, 24)]  # the first video is gone, a word has moved
    after = mrope_positions(video[kept], [(1, 4, 4)])
    more = after.max() + 1 + torch.arange(3).expand(3, 1, 3)
    with torch.no_grad():
        model(ids, position_ids=before[:, None], past_key_values=cache)
        cache.rearrange(kept, before[:, kept], after)
        model(ids[:, kept], position_ids=after[:, None], past_key_values=alone)
        torch.testing.assert_close(cache.layers[0].keys, alone.layers[0].keys, rtol=1e-5, atol=1e-5)
        assert cache.get_seq_length() == 12 and cache.nbytes() == alone.nbytes()
        next_ids = tokens(1, 3, seed=1)
        got = model(next_ids, position_ids=more, past_key_values=cache).last_hidden_state
        wanted = model(next_ids, position_ids=more, past_key_values=alone).last_hidden_state
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_text_alone_and_nothing_cut(family):
    model, ids = made(family, num_hidden_layers=1, implementation="sdpa"), tokens(1, 14)
    cache = StreamingVLMCache(model)
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        place = torch.arange(12)[None]
        kept = [0, 1, *range(6, 12)]
        cache.rearrange(kept, place[:, kept], torch.arange(8)[None])
        got = model(ids[:, 12:], past_key_values=cache).logits
        wanted = model(torch.cat([ids[:, kept], ids[:, 12:]], 1)).logits[:, -2:]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)  # float32, weights * 4
    how = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        model.generate(ids, past_key_values=StreamingVLMCache(model), **how), model.generate(ids, **how)
    )


@pytest.mark.door
def test_errors_say_what_to_do():
    model, ids = made(), tokens(1, 6)
    cache = StreamingVLMCache(model)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"before has shape \(1, 6\), must be \(1 or 3, 2\)"):
        cache.rearrange([0, 1], torch.arange(6)[None], torch.arange(2)[None])
    with pytest.raises(ValueError, match="video marks 2 tokens, must mark the 4 of the grids"):
        mrope_positions(torch.tensor([True, True, False]), [(1, 4, 4)])
    with pytest.raises(ValueError, match="without rotary positions"):
        StreamingVLMCache(hf.GPT2Config(n_layer=1, n_embd=8, n_head=2))
    with pytest.raises(ValueError, match="text_rounds is 0, must be"):
        cut_stream(chat(1)[0], 1, text_rounds=0)
