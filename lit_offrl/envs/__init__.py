"""Environments: which one belongs to a dataset, vectorised episodes in it, and reference scores."""
