"""D4RL's reference returns, of a random policy and of an expert.

They are those of d4rl/infos.py; those of antmaze v1, eval mazes, maze2d v0 and ant-random-expert stand only in the
registrations of d4rl/locomotion, d4rl/pointmaze and d4rl/gym_mujoco.
"""

from __future__ import annotations


def _names(kinds: str, versions: str) -> list[str]:
    return [f"{kind}-{version}" for version in versions.split() for kind in kinds.split()]


_LOCOMOTION_NAMES = [
    *_names("random medium expert medium-replay medium-expert", "v0 v1 v2"),
    *_names("full-replay", "v1 v2"),
]
_ANT_MAZES = "umaze umaze-diverse medium-play medium-diverse large-play large-diverse"
_HAND_NAMES = _names("human cloned expert", "v0 v1")
_FAMILY_REFERENCES: tuple[tuple[str, list[str], float, float], ...] = (
    ("halfcheetah", _LOCOMOTION_NAMES, -280.178953, 12135.0),
    ("walker2d", _LOCOMOTION_NAMES, 1.629008, 4592.3),
    ("hopper", _LOCOMOTION_NAMES, -20.272305, 3234.3),
    ("ant", [*_LOCOMOTION_NAMES, "random-expert-v0"], -325.6, 3879.7),
    ("pen", _HAND_NAMES, 96.262799, 3076.8331017826877),
    ("hammer", _HAND_NAMES, -274.856578, 12794.134825156867),
    ("relocate", _HAND_NAMES, -6.425911, 4233.877797728884),
    ("door", _HAND_NAMES, -56.512833, 2880.5693087298737),
    ("antmaze", _names(_ANT_MAZES, "v0 v1 v2"), 0.0, 1.0),
    ("antmaze-eval", _names(_ANT_MAZES, "v0"), 0.0, 1.0),
    ("kitchen", _names("complete partial mixed", "v0"), 0.0, 4.0),
    ("maze2d", ["open-v0"], 0.01, 20.66),
    ("maze2d", ["umaze-v1"], 23.85, 161.86),
    ("maze2d", ["medium-v1"], 13.13, 277.39),
    ("maze2d", ["large-v1"], 6.7, 273.99),
    ("maze2d", ["open-dense-v0"], 11.17817, 27.166538620695782),
    ("maze2d", ["umaze-dense-v1"], 68.537689, 193.66285642381482),
    ("maze2d", ["medium-dense-v1"], 44.264742, 297.4552547777125),
    ("maze2d", ["large-dense-v1"], 30.569041, 303.4857382709002),
    ("maze2d", ["umaze-v0"], 0.94, 62.6),
    ("maze2d", ["medium-v0"], 5.77, 85.14),
    ("maze2d", ["large-v0"], 4.83, 191.99),
    ("maze2d", ["umaze-dense-v0"], 23.249793, 81.78995240126592),
    ("maze2d", ["medium-dense-v0"], 19.47762, 96.03474232952358),
    ("maze2d", ["large-dense-v0"], 27.38831, 215.09965671563742),
    ("maze2d", ["eval-umaze-v1"], 36.63, 141.4),
    ("maze2d", ["eval-medium-v1"], 13.07, 204.93),
    ("maze2d", ["eval-large-v1"], 16.4, 302.22),
    ("maze2d", ["eval-umaze-dense-v1"], 56.95455, 178.21373133248397),
    ("maze2d", ["eval-medium-dense-v1"], 42.28578, 235.5658957482388),
    ("maze2d", ["eval-large-dense-v1"], 56.95455, 326.09647655082637),
)
REFERENCES: dict[str, tuple[float, float]] = {
    f"{family}-{name}": (low, high) for family, names, low, high in _FAMILY_REFERENCES for name in names
}
"""Returns that score 0 and 100, by dataset."""
