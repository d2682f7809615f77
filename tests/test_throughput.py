"""Lightning must not cost what it is not worth."""

import importlib.util

from conftest import DATASET, REPOSITORY


def test_less_than_a_tenth_of_a_block_is_spent_outside_update(minari_root):
    specification = importlib.util.spec_from_file_location("profile_block", REPOSITORY / "tools" / "profile_block.py")
    assert specification is not None
    assert specification.loader is not None
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    parts = tool.profile(DATASET, batch_size=256, blocks=2)
    assert 1 - parts["update"] / parts["block"] < 0.1
