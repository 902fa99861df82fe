"""A small Llama trained on text, its sequence cut over the ranks by ringx.

``python -m apps.gpt.train --help``."""
