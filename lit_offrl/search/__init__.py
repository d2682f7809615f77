"""Hyper-parameter search with Optuna: the space, the study, the trials, the pictures."""
