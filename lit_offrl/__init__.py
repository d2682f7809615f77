"""Offline reinforcement learning with diffusion policies on PyTorch Lightning."""

__version__ = "0.1.0"
