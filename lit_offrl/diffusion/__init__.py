"""The mathematics of diffusion models, torch only."""
