"""Judging policies without an environment: fitted Q evaluation on held-out episodes."""
