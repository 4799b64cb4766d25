"""Options of what is cut: which kinds of units, how much of each, and what is done to a model right after."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from stepwell.config.options import Options


class CutOptions(Options):
    """What is cut, and how much of each kind."""

    cut: Literal["heads,neurons", "all"] = "heads,neurons"
    """`heads,neurons`: what lies inside of blocks (the paper's; in a CNN its filters), so that every block
    returns the teacher's width. `all`: the channels of the residual stream too, from the first layer to the
    head. At equal operations small networks were slower by it; `doctor` shows what each would leave."""
    shares: Literal["equal", "search"] = "equal"
    """`equal`: every kind of unit keeps the same share. `search`: more of that kind which keeps the most
    importance for a budget of --macs, --params or --latency-ms; nothing is trained for it. For milliseconds
    models of a few widths are timed on this machine first."""
    drop_blocks: bool = False
    """Let the search give up whole blocks, whose input then passes through on the shortcut, where a few of
    them hold little of the importance. Needs --shares search."""
    whole_last: bool = False
    """Cut nothing in the last block, or in the last stage of a pyramid, whose states the head reads
    (WideLast). With --cut all the channels of that stage stay too; a ViT has one stream, which is cut."""
    uniform: bool = False
    """The same widths in every block, so that the student of a ViT is one that timm builds by name, or
    transformers from a configuration: its weights load there without stepwell. Needs --cut all."""
    repair: bool = False
    """After each cut of a single model, fit the layers that lost inputs to what they returned before, by
    least squares on some training images; for paths whose models share no weights."""

    @property
    def cuts_channels(self) -> bool:
        """Whether the residual stream is cut."""
        return self.cut == "all"

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.uniform and not self.cuts_channels:
            raise ValueError("--uniform needs --cut all: a plain ViT is as wide as its heads together")
        if self.uniform and self.shares == "search":
            raise ValueError("--uniform ties the channels to the heads: leave --shares equal")
        if self.uniform and self.whole_last:
            raise ValueError(
                "--uniform makes all blocks alike, --whole-last keeps the last one: leave one out"
            )
        if self.drop_blocks and self.shares != "search":
            raise ValueError("--drop-blocks is a part of the search: give --shares search, and a budget")
        return self
