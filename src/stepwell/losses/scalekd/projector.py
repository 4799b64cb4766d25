"""The cross-attention projector (CAP) of ScaleKD: a map of the student becomes tokens of the teacher.

K = relu(BN(conv3x3(F_S))) + P          keys and values, one for each position of the student; P is learned
Q = relu(conv1x1(queries))              one for each position of the teacher
A = softmax(scale / sqrt(d) * (Q W_q)(K W_k)^T) (K W_v) W_o      for each head, d channels wide
Y = A' + FFN(A'),  A' = LayerNorm(A)    there is no way past the attention

Queries are learned, or given: then they may say something of the image. What is for training alone is thrown
away with the loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import LayerNorm2d
from torch import Tensor, nn

PUBLISHED_SCALE = 5.0
"""Of most published pairs; of students with the teacher's grids that are no CNN with BatchNorm it is 1."""


class CrossAttentionProjector(nn.Module):
    """From maps of the student to tokens of the teacher; in training mode maps of 1 x 1 need two images.

    Args:
        student: Channels, height and width of the student's map.
        teacher: Channels, height and width of what is predicted.
        num_heads: Of the attention; divides the teacher's channels.
        softmax_scale: Factor of the logits of the attention, besides 1 / sqrt(channels of a head).
        has_queries: Whether it has queries of its own; if not, they are given.
        layer_norm: Normalise the student's map by a LayerNorm of its channels instead of a BatchNorm.
    """

    def __init__(
        self,
        student: tuple[int, int, int],
        teacher: tuple[int, int, int],
        num_heads: int,
        softmax_scale: float = PUBLISHED_SCALE,
        has_queries: bool = True,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        ours, (theirs, height, width) = student[0], teacher
        assert theirs % num_heads == 0, f"{num_heads} heads in {theirs} channels"
        self.num_heads = num_heads
        self.scale = softmax_scale * (theirs / num_heads) ** -0.5
        norm = LayerNorm2d(ours) if layer_norm else nn.BatchNorm2d(ours)
        self.student = nn.Sequential(nn.Conv2d(ours, ours, kernel_size=3, padding=1), norm, nn.ReLU())
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, *student), std=0.02))
        self.queries = nn.Parameter(torch.randn(1, height * width, theirs)) if has_queries else None
        # A 1 x 1 convolution of the queries, which lie in a row here.
        self.asking = nn.Sequential(nn.Linear(theirs, theirs), nn.ReLU())
        self.to_query, self.out = nn.Linear(theirs, theirs), nn.Linear(theirs, theirs)
        self.to_key, self.to_value = nn.Linear(ours, theirs), nn.Linear(ours, theirs)
        self.norm = nn.LayerNorm(theirs)
        self.ffn = nn.Sequential(nn.Linear(theirs, 4 * theirs), nn.ReLU(), nn.Linear(4 * theirs, theirs))

    def forward(
        self,
        student_map: Float[Tensor, "batch ours height width"],
        queries: Float[Tensor, "batch positions theirs"] | None = None,
    ) -> Float[Tensor, "batch positions theirs"]:
        """The teacher's tokens, as they are predicted from the student's map.

        Args:
            student_map: Of the size that it was made for.
            queries: Instead of its own, if it has any.
        """
        if queries is None:
            assert self.queries is not None, "it was made for queries that are given"
            queries = self.queries.expand(len(student_map), -1, -1)
        seen = (self.student(student_map) + self.positions).flatten(2).transpose(1, 2)
        asked = self._heads(self.to_query(self.asking(queries)))
        keys, values = self._heads(self.to_key(seen)), self._heads(self.to_value(seen))
        found = F.scaled_dot_product_attention(asked, keys, values, scale=self.scale)
        tokens = self.norm(self.out(found.transpose(1, 2).flatten(2)))
        return tokens + self.ffn(tokens)

    def no_weight_decay(self) -> set[str]:
        """The tables of positions and queries."""
        return {"positions"} | ({"queries"} if self.queries is not None else set())

    def _heads(self, tokens: Float[Tensor, "batch n theirs"]) -> Float[Tensor, "batch heads n per_head"]:
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
