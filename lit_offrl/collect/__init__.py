"""Behavior policies and the recorder that make offline datasets in the real environments."""
