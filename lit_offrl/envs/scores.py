"""Reference returns that turn a raw return into a normalized score; every reference says where it comes from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from lit_offrl.data.info import DatasetInfo


@dataclass(frozen=True)
class ScoreReference:
    """The returns of a score of 0 and of 100, and whose table they are from.

    Attributes:
        name: `local` (measured for a dataset collected by this package), `minari` (the dataset's metadata) or `d4rl`.
        minimum: Return of a score of 0.
        maximum: Return of a score of 100.
    """

    name: str
    minimum: float
    maximum: float

    def normalize(self, episode_return: float) -> float:
        """Return `100 * (episode_return - minimum) / (maximum - minimum)`."""
        return 100.0 * (episode_return - self.minimum) / (self.maximum - self.minimum)


def reference_for(info: DatasetInfo) -> ScoreReference | None:
    """Return the reference of the dataset's own source; None where that source has none.

    The tables are never mixed: D4RL's numbers do not apply to Minari's recordings in other versions of the
    environments, nor to mazes collected here.
    """
    if info.source == "d4rl":
        returns = d4rl_reference(info.id)
        return ScoreReference("d4rl", *returns) if returns else None
    name = {"offrl": "local", "minari": "minari"}.get(info.source)
    if name is None or info.reference is None or info.reference[0] == info.reference[1]:
        return None
    return ScoreReference(name, *info.reference)


def d4rl_reference(dataset_id: str) -> tuple[float, float] | None:
    """Return D4RL's (min, max) return of a dataset id, e.g. `hopper-medium-v2`; None where it has none."""
    return _D4RL.get(dataset_id)


def _expand(prefix: str, names: str, versions: str) -> list[str]:
    return [f"{prefix}-{name}-{version}" for name, version in itertools.product(names.split(), versions.split())]


# Names of D4RL's locomotion sets; full-replay exists from v1 on.
_LOCOMOTION_V0 = "random medium expert medium-replay medium-expert"
_LOCOMOTION = _LOCOMOTION_V0 + " full-replay"
_MAZES = "umaze umaze-diverse medium-play medium-diverse large-play large-diverse"

# d4rl/infos.py (REF_MIN_SCORE, REF_MAX_SCORE) and, for maze2d v0 and eval, d4rl/pointmaze/__init__.py.
_D4RL: dict[str, tuple[float, float]] = {
    "maze2d-open-v0": (0.01, 20.66),
    "maze2d-umaze-v0": (0.94, 62.6),
    "maze2d-medium-v0": (5.77, 85.14),
    "maze2d-large-v0": (4.83, 191.99),
    "maze2d-umaze-v1": (23.85, 161.86),
    "maze2d-medium-v1": (13.13, 277.39),
    "maze2d-large-v1": (6.7, 273.99),
    "maze2d-eval-umaze-v1": (36.63, 141.4),
    "maze2d-eval-medium-v1": (13.07, 204.93),
    "maze2d-eval-large-v1": (16.4, 302.22),
    "maze2d-open-dense-v0": (11.17817, 27.166538620695782),
    "maze2d-umaze-dense-v0": (23.249793, 81.78995240126592),
    "maze2d-medium-dense-v0": (19.47762, 96.03474232952358),
    "maze2d-large-dense-v0": (27.38831, 215.09965671563742),
    "maze2d-umaze-dense-v1": (68.537689, 193.66285642381482),
    "maze2d-medium-dense-v1": (44.264742, 297.4552547777125),
    "maze2d-large-dense-v1": (30.569041, 303.4857382709002),
    "minigrid-fourrooms-v0": (0.01442, 2.89685),
    "minigrid-fourrooms-random-v0": (0.01442, 2.89685),
} | {
    name: (minimum, maximum)
    for minimum, maximum, names in (
        (96.262799, 3076.8331017826877, _expand("pen", "human cloned expert", "v0 v1")),
        (-274.856578, 12794.134825156867, _expand("hammer", "human cloned expert", "v0 v1")),
        (-6.425911, 4233.877797728884, _expand("relocate", "human cloned expert", "v0 v1")),
        (-56.512833, 2880.5693087298737, _expand("door", "human cloned expert", "v0 v1")),
        (
            -280.178953,
            12135.0,
            _expand("halfcheetah", _LOCOMOTION_V0, "v0") + _expand("halfcheetah", _LOCOMOTION, "v1 v2"),
        ),
        (1.629008, 4592.3, _expand("walker2d", _LOCOMOTION_V0, "v0") + _expand("walker2d", _LOCOMOTION, "v1 v2")),
        (-20.272305, 3234.3, _expand("hopper", _LOCOMOTION_V0, "v0") + _expand("hopper", _LOCOMOTION, "v1 v2")),
        (-325.6, 3879.7, _expand("ant", _LOCOMOTION_V0, "v0") + _expand("ant", _LOCOMOTION, "v1 v2")),
        (0.0, 1.0, _expand("antmaze", _MAZES, "v0 v2")),
        (0.0, 4.0, _expand("kitchen", "complete partial mixed", "v0")),
    )
    for name in names
}
