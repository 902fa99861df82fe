"""A ViT that forecasts gridded climate fields: ``python -m apps.vit.train --help``."""
