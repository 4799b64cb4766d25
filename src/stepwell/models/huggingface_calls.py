"""Models of Hugging Face's transformers, called as we call every model: images in, one tensor out.

A classifier returns its logits. A model without a head returns its embedding, as transformers defines it:
`image_embeds` of a CLIP tower with its projection; else `pooler_output`; else, where the folder has no
weights of a pooler (DINO's ViT), the class token of `last_hidden_state`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stepwell.errors import UnsupportedModelError

BACKBONES: dict[str, tuple[str, ...]] = {
    "beit": ("BeitModel",),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "convnext": ("ConvNextModel",),
    "convnextv2": ("ConvNextV2Model",),
    "deit": ("DeiTModel",),
    "dinov2": ("Dinov2Model",),
    "dinov2_with_registers": ("Dinov2WithRegistersModel",),
    "dinov3_vit": ("DINOv3ViTModel",),
    "resnet": ("ResNetModel",),
    "siglip_vision_model": ("SiglipVisionModel",),
    "swin": ("SwinModel",),
    "swinv2": ("Swinv2Model",),
    "vit": ("ViTModel",),
}
"""By `model_type` the classes without a head, as transformers exports them."""

SEGMENTERS = {
    "segformer": "SegformerForSemanticSegmentation",
    "upernet": "UperNetForSemanticSegmentation",
}
"""By `model_type` the classes that tell each pixel."""

NO_POOLER = {"add_pooling_layer": False}
"""Of a model whose folder has no weights of a pooler: for its constructor, and in a card."""

# Models of images and texts: the type of their image tower, its class, and where its tensors lie.
_TWO_TOWERS = {
    "clip": ("clip_vision_model", "CLIPVisionModelWithProjection", ("vision_model.", "visual_projection.")),
    "siglip": ("siglip_vision_model", "SiglipVisionModel", ("vision_model.",)),
}


class Wrapped(nn.Module):
    """A model of transformers.

    Args:
        model: Kept as attribute `model`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:  # noqa: ANN401  (a class of transformers)
        """What transformers builds the model from."""
        return self.model.config


class Classifier(Wrapped):
    """An image classifier."""

    @property
    def num_classes(self) -> int:
        """As timm calls it."""
        return self.config.num_labels

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, channels, height, width) to logits (batch, classes)."""
        return self.model(images, return_dict=True).logits


class Segmenter(Wrapped):
    """A model that tells each pixel, without its auxiliary head."""

    @property
    def num_classes(self) -> int:
        """As timm calls it."""
        return self.config.num_labels

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, channels, height, width) to logits (batch, classes, h, w), smaller in part."""
        return self.model(images, return_dict=True).logits


class Backbone(Wrapped):
    """A model without a head."""

    @property
    def num_classes(self) -> int:
        """None: as timm says it."""
        return 0

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, channels, height, width) to embeddings (batch, dim)."""
        output = self.model(images, return_dict=True)
        found = output.get("image_embeds")
        if found is None:
            found = output.get("pooler_output")
        if found is None:
            found = output.last_hidden_state[:, 0]
        return found.flatten(1)  # a ResNet's is (batch, dim, 1, 1)


def backbone_named(config: Mapping[str, Any]) -> str | None:
    """The class without a head, or of a model for masks, that a configuration was saved from; None if it was
    another one."""
    names, kind = config.get("architectures"), str(config.get("model_type"))
    known = (*BACKBONES.get(kind, ()), *([SEGMENTERS[kind]] if kind in SEGMENTERS else []))
    return names[0] if isinstance(names, list) and names and names[0] in known else None


def image_tower(config: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Of a model of images and texts the configuration of its image tower.

    Returns:
        The configuration, and what the names of the tower's tensors begin with; `config` itself and nothing
        for other models.
    """
    vision, named = config.get("vision_config"), config.get("architectures") or []
    classifies = any("ForImageClassification" in str(name) for name in named)
    if config.get("model_type") not in _TWO_TOWERS or not isinstance(vision, dict) or classifies:
        return config, ()
    kind, name, prefixes = _TWO_TOWERS[config["model_type"]]
    projected = {"projection_dim": config["projection_dim"]} if "projection_dim" in config else {}
    return {**vision, **projected, "model_type": kind, "architectures": [name]}, prefixes


def check_segmenter(model_type: str, name: str, where: str) -> None:
    """Check that a model of a type that tells pixels is of the class that does.

    Raises:
        UnsupportedModelError: It is another.
    """
    if name != SEGMENTERS[model_type]:
        raise UnsupportedModelError(
            f"{where} is a {name or 'model without a named class'}, and of this type "
            f"{SEGMENTERS[model_type]} is supported"
        )


def channels_of(config: Any) -> int:  # noqa: ANN401  (a class of transformers)
    """Of the images that a model takes."""
    inner = getattr(config, "backbone_config", None)  # of UperNet, which says it there alone
    return getattr(config, "num_channels", None) or getattr(inner, "num_channels", 3)
