"""`stepwell train`: get a teacher by fine-tuning a timm model on a folder of images."""

from __future__ import annotations

from stepwell.config.commands import TrainConfig
from stepwell.paths.from_labels import train


def run(config: TrainConfig) -> str:
    """Fine-tune, save to `OUT/teacher`, and return one line that says how good it is."""
    return train(config)
