"""Datasets: from the files of a source to blocks of minibatches on the training device. See README.md beside this file.

This file imports nothing, so that `lit_offrl.data.sources` can be imported without torch.
"""
