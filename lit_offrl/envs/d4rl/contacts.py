"""MuJoCo 2's contacts in today's MuJoCo.

D4RL's data and all published scores come from MuJoCo 2. Since then MuJoCo has changed how it finds contacts and how
hard they are. Some of it can be undone by settings of the model: with them, hopper, ant, antmaze, maze2d and pen follow
MuJoCo 2.3.2 to 1e-8, hammer and relocate to 1e-5. The collision of capsules with boxes (door, deep contacts of the ant
with walls) and parts of the kitchen stay those of today.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

# From 3.5 on MuJoCo adds up the margins of the two geoms of a pair; before, the larger of the two counted.
MARGINS_ADD_UP = tuple(int(part) for part in mujoco.__version__.split(".")[:2]) >= (3, 5)
CONVEX_COLLISION_FLAGS = ("mjDSBL_NATIVECCD", "mjDSBL_MULTICCD", "mjDSBL_ISLAND")


def restore_margins(model: Any, margin: float | None = None) -> None:
    """Let the margin of a pair be what it was where MuJoCo adds up the margins of its geoms.

    Args:
        model: The model.
        margin: Half the margin of every pair, for models in which some colliding geoms have none; None where all
            margins are equal, and are halved.
    """
    if not MARGINS_ADD_UP:
        return
    if margin is None:
        model.geom_margin[:] *= 0.5
    else:
        model.geom_margin[(model.geom_contype | model.geom_conaffinity) > 0] = margin


def restore_convex_collisions(model: Any) -> None:
    """Leave out the collision detection for convex geoms and the constraint islands that came after MuJoCo 2."""
    for name in CONVEX_COLLISION_FLAGS:
        if flag := getattr(mujoco.mjtDisableBit, name, None):  # older versions lack what need not be left out
            model.opt.disableflags |= int(flag)


def restore_slide_weights(model: Any) -> None:
    """Give bodies on two slide joints the inverse weight that MuJoCo 2 computed, which decides how walls push back."""
    model.body_invweight0[:, 0] *= 2 / 3


def unit_quaternion(positions: NDArray[np.float64], first: int) -> NDArray[np.float64]:
    """Return positions with the four numbers from `first` on normalized, as MuJoCo 2 did before the first step."""
    positions = positions.copy()
    positions[first : first + 4] /= np.linalg.norm(positions[first : first + 4])
    return positions
