"""Reference scores: which return counts as 0 and which as 100, and who says so."""

from __future__ import annotations

from dataclasses import dataclass

from lit_offrl.data.info import DatasetInfo


@dataclass(frozen=True)
class ScoreReference:
    """A scale for returns; scores on scales of different names must not be compared.

    Attributes:
        name: Who measured it: `d4rl`, `minari`, or `local` (this package, in the environment of evaluation).
        minimum: Return of a score of 0, as a rule that of a random policy.
        maximum: Return of a score of 100, as a rule that of an expert.
    """

    name: str
    minimum: float
    maximum: float

    def normalize(self, episode_return: float) -> float:
        """Return the normalized score, `100 (return - minimum) / (maximum - minimum)`; not clipped."""
        return 100 * (episode_return - self.minimum) / (self.maximum - self.minimum)


def reference_for(info: DatasetInfo) -> ScoreReference | None:
    """Return the reference of the dataset's own source; None where that is unknown or no scale."""
    if info.source == "d4rl":
        name, bounds = "d4rl", _D4RL.get(info.id)
    else:
        name, bounds = {"offrl": "local", "minari": "minari"}.get(info.source, ""), info.reference
    if not name or bounds is None or not bounds[0] < bounds[1]:
        return None
    return ScoreReference(name, *bounds)


# ------------------------------------------------ D4RL's table (d4rl/infos.py, maze2d v0 and eval: d4rl/pointmaze)


def _names(kinds: str, versions: str) -> list[str]:
    return [f"{kind}-{version}" for version in versions.split() for kind in kinds.split()]


_LOCOMOTION = _names("random medium expert medium-replay medium-expert", "v0 v1 v2") + _names("full-replay", "v1 v2")
_ADROIT = _names("human cloned expert", "v0 v1")
_FAMILIES: tuple[tuple[str, list[str], float, float], ...] = (
    ("halfcheetah", _LOCOMOTION, -280.178953, 12135.0),
    ("walker2d", _LOCOMOTION, 1.629008, 4592.3),
    ("hopper", _LOCOMOTION, -20.272305, 3234.3),
    ("ant", _LOCOMOTION, -325.6, 3879.7),
    ("pen", _ADROIT, 96.262799, 3076.8331017826877),
    ("hammer", _ADROIT, -274.856578, 12794.134825156867),
    ("relocate", _ADROIT, -6.425911, 4233.877797728884),
    ("door", _ADROIT, -56.512833, 2880.5693087298737),
    ("antmaze", _names("umaze umaze-diverse medium-play medium-diverse large-play large-diverse", "v0 v2"), 0.0, 1.0),
    ("kitchen", _names("complete partial mixed", "v0"), 0.0, 4.0),
    ("minigrid", _names("fourrooms fourrooms-random", "v0"), 0.01442, 2.89685),
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
)
_D4RL = {f"{family}-{name}": (low, high) for family, names, low, high in _FAMILIES for name in names}
