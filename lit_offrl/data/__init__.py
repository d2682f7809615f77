"""From a source file to blocks of minibatches on the training device.

Nothing is imported here: `lit_offrl.data.info` must stay light for `data list`.
"""
