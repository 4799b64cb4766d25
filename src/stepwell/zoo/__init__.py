"""Models that timm lacks: importing this registers them, and `timm.create_model` knows their names."""

from stepwell.zoo import cifar as cifar
