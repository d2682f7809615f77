"""Lightning must not cost what it is not worth."""

import pytest
from conftest import DATASET
from tiny import load_tool


@pytest.mark.slow  # a measurement: alone on the machine
def test_less_than_a_tenth_of_a_block_is_spent_outside_update(minari_root):
    parts = load_tool("profile_block").profile(DATASET, batch_size=256, blocks=2)
    assert 1 - parts["update"] / parts["block"] < 0.1
