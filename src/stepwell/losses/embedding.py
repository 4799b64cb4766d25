"""What stands in the place of the loss on the logits where a model returns an embedding."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from stepwell.run.distributed import mean_


def embedding_loss(
    student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch dim"]
) -> Float[Tensor, ""]:
    """Mean squared error, divided by the teacher's mean square: 1 for a student that returns zeros.

    Args:
        student: Embeddings of the model that learns.
        teacher: Those that it learns; no gradient flows there unless they carry one.
    """
    student, teacher = student.float(), teacher.float()
    power = teacher.square().mean()
    mean_([power])  # of the whole batch, of which several processes have parts
    return (student - teacher).square().mean() / power
