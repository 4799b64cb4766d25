"""The teacher as `doctor` looks at it: without a download, and without memory where shapes will do."""

from __future__ import annotations

from pathlib import Path

from stepwell.config.commands import CompressConfig
from stepwell.config.own_code import is_own_code
from stepwell.data.splits import Data
from stepwell.models import segmenters
from stepwell.models.card import Architecture
from stepwell.models.input import input_spec
from stepwell.models.teacher import Teacher, load_teacher, named_segmenter
from stepwell.models.timm_folder import LOCAL
from stepwell.models.timm_models import create_timm, create_without_memory, parse_model_args
from stepwell.pruning.families import names_by_family


def teacher_to_look_at(config: CompressConfig, data: Data | None, *, with_weights: bool = False) -> Teacher:
    """What is looked at; a model of timm by name is built without its weights, and has no digest.

    Args:
        config: Names it.
        data: The images, whose number of classes it gets.
        with_weights: Whether it shall run: its weights are then random ones.
    """
    num_classes = len(data.classes) if data and not config.probe else 0
    source = config.teacher
    # Weights that are here are loaded: whether they fit is what is asked.
    if is_own_code(source) or Path(source).exists() or source.startswith(LOCAL) or config.teacher_weights:
        return load_teacher(
            source, config.teacher_weights, config.model_args, num_classes, config.weights_key
        )
    args = parse_model_args(config.model_args)
    if segmenters.is_named(source):
        return named_segmenter(source, {"num_classes": num_classes or 2, **args})
    model = create_without_memory(config.teacher, args)
    # Shapes are enough to count, but not to time, nor to try cuts.
    if with_weights or config.latency_ms is not None or not names_by_family(model):
        model = create_timm(config.teacher, args, pretrained=False)
    architecture = Architecture(source="timm", name=config.teacher, args=args)
    return Teacher(model.eval(), architecture, input_spec(model, args), None, {}, config.teacher, digest="")
