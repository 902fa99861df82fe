"""Trainers built on ringx.

Run them from the repository's root: ``python -m apps.gpt.train --help``."""
