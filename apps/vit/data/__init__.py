"""Gridded fields: read, normalised, cut into samples; and a simulation where there are none."""
