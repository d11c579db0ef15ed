"""GC ViT: the two window attentions, the generator of queries, and a stage with what halves its map."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import nn

from heedful import authors
from heedful.authors.gcvit import TABLES
from heedful.mixers.grid.gcvit import (
    GCViTWindowAttention,
    GlobalQueryGenerator,
    GlobalQueryWindowAttention,
)
from heedful.models.gcvit import Reduce, Stage
from tests.parity.harness import Tensors, adapter

PARTS = {4: 3, 8: 2, 16: 0, 32: 0}  # how often the map is halved, by the part of the image it is


@adapter("gcvit-window-attention")
def window_attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    """The authors' module takes windows: each is a map of its own."""
    side = config["window_size"]
    mixer = GCViTWindowAttention(config["dim"], heads=config["num_heads"], window=side)
    authors.load(mixer, params).eval()
    return {"y": mixer(inputs["x"].mT.unflatten(2, (side, side))).flatten(2).mT}


@adapter("gcvit-global-attention")
def global_attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    """The windows of an image come one after the other; they stand in a row here."""
    side, batch = config["window_size"], len(inputs["q_global"])
    mixer = GlobalQueryWindowAttention(config["dim"], heads=config["num_heads"], window=side)
    authors.load(mixer, params).eval()
    x = rearrange(inputs["x"], "(b w) (y x) c -> b c y (w x)", b=batch, y=side)
    query = rearrange(inputs["q_global"], "b 1 h (y x) d -> b (h d) y x", y=side)
    return {"y": rearrange(mixer(x, query=query), "b c y (w x) -> (b w) (y x) c", x=side)}


@adapter("gcvit-query-gen")
def generator(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    pools = PARTS[config["image_resolution"] // config["input_resolution"]]
    made = GlobalQueryGenerator(config["dim"], window=config["window_size"], pools=pools)
    y = authors.load(made, params).eval()(inputs["x"])
    return {"y": rearrange(y, "b (h d) y x -> b 1 h (y x) d", h=config["num_heads"])}


@adapter("gcvit-layer")
def layer(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    dim = config["dim"]
    stage = Stage(
        dim,
        heads=config["num_heads"],
        window=config["window_size"],
        pools=PARTS[config["image_resolution"] // config["input_resolution"]],
        hidden=int(config["mlp_ratio"] * dim),
        layer_scale=config["layer_scale"],
        drop_path=[0.0] * config["depth"],
    )
    both = nn.ModuleDict(
        {"stages": nn.ModuleList([stage]), "downsample": nn.ModuleDict({"1": Reduce(dim, 2 * dim)})}
    )
    both.load_state_dict(TABLES["GCViT"].apply({f"levels.0.{n}": t for n, t in params.items()}), strict=True)
    both.eval()
    y = both["downsample"]["1"](stage(inputs["x"].movedim(-1, 1)))
    return {"y": y.movedim(1, -1)}
