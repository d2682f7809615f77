"""Shortest routes through grid mazes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

Cell = tuple[int, int]
"""Row and column of a maze cell."""

WALL = 1
_NEIGHBORS = ((1, 0), (-1, 0), (0, 1), (0, -1))


class MazeRoutes:
    """Shortest routes over the free cells of a maze, by breadth-first search from each goal.

    Cell (row, column) has its center at x = (column + 1/2 - columns/2) * size, y = (rows/2 - row - 1/2) * size: the
    convention of gymnasium-robotics' mazes.

    Args:
        maze_map: Rows of cells; `1` is a wall, every other cell is free.
        cell_size: Edge length of a cell in meters.

    Raises:
        ValueError: No cell is free.
    """

    def __init__(self, maze_map: Sequence[Sequence[int | str]], cell_size: float) -> None:
        self.cell_size = cell_size
        self._x_offset = len(maze_map[0]) / 2 * cell_size
        self._y_offset = len(maze_map) / 2 * cell_size
        self.free: tuple[Cell, ...] = tuple(
            (row, column) for row, line in enumerate(maze_map) for column, kind in enumerate(line) if kind != WALL
        )
        if not self.free:
            raise ValueError("the maze has no free cell")
        self._free_set = frozenset(self.free)
        self._distances: dict[Cell, dict[Cell, int]] = {}

    def center(self, cell: Cell) -> tuple[float, float]:
        """Return x and y of the center of `cell`, in meters."""
        row, column = cell
        return (column + 0.5) * self.cell_size - self._x_offset, self._y_offset - (row + 0.5) * self.cell_size

    def cell(self, x: float, y: float) -> Cell:
        """Return the free cell of a point, or the nearest free cell if the point is in a wall."""
        cell = (math.floor((self._y_offset - y) / self.cell_size), math.floor((x + self._x_offset) / self.cell_size))
        if cell in self._free_set:
            return cell
        return min(self.free, key=lambda free: math.dist(self.center(free), (x, y)))

    def distances(self, goal: Cell) -> dict[Cell, int]:
        """Return the number of cell steps to `goal` from every cell that can reach it.

        Raises:
            ValueError: `goal` is a wall.
        """
        if goal not in self._free_set:
            raise ValueError(f"cell {goal} is not free")
        if goal not in self._distances:
            steps = {goal: 0}
            queue = deque([goal])
            while queue:
                here = queue.popleft()
                for neighbor in self._around(here):
                    if neighbor not in steps:
                        steps[neighbor] = steps[here] + 1
                        queue.append(neighbor)
            self._distances[goal] = steps
        return self._distances[goal]

    def carrot(self, x: float, y: float, goal: tuple[float, float]) -> tuple[float, float]:
        """Return the next target point on the way from (x, y) to `goal`, in meters (the carrot of a carrot follower).

        In the goal's cell this is the goal. In other cells it is half a cell ahead on the line from the center of the
        cell to the center of the next cell, so that the body returns to the middle of the corridor.

        Raises:
            ValueError: No route leads from (x, y) to `goal`.
        """
        goal_cell = self.cell(*goal)
        here = self.cell(x, y)
        if here == goal_cell:
            return goal
        steps = self.distances(goal_cell)
        if here not in steps:
            raise ValueError(f"no route from cell {here} to cell {goal_cell}")
        following = min((cell for cell in self._around(here) if cell in steps), key=steps.__getitem__)
        (ax, ay), (bx, by) = self.center(here), self.center(following)
        dx, dy = (bx - ax) / self.cell_size, (by - ay) / self.cell_size
        along = (x - ax) * dx + (y - ay) * dy
        aside = abs((x - ax) * dy - (y - ay) * dx)
        if along < 0 and aside > 0.225 * self.cell_size:
            # Far from the line and before the center: a target ahead would pull the body into the corner of the wall.
            return ax, ay
        ahead = along + 0.5 * self.cell_size
        return ax + dx * ahead, ay + dy * ahead

    def _around(self, cell: Cell) -> list[Cell]:
        around = ((cell[0] + row, cell[1] + column) for row, column in _NEIGHBORS)
        return [neighbor for neighbor in around if neighbor in self._free_set]


class Route:
    """A route over waypoints; call `target` once per step, it advances at each arrival.

    Args:
        routes: The maze.
        waypoints: Points in meters, visited in order; the last one stays the target.
        arrival: Distance in meters at which a waypoint counts as visited.
    """

    def __init__(self, routes: MazeRoutes, waypoints: Sequence[tuple[float, float]], arrival: float) -> None:
        self._routes = routes
        self._waypoints = list(waypoints)
        self._arrival = arrival
        self._index = 0

    @property
    def finished(self) -> bool:
        """Whether the last waypoint has been reached."""
        return self._index >= len(self._waypoints)

    def target(self, x: float, y: float) -> tuple[float, float]:
        """Return the next target point from (x, y), in meters."""
        while not self.finished and math.dist((x, y), self._waypoints[self._index]) < self._arrival:
            self._index += 1
        return self._routes.carrot(x, y, self._waypoints[min(self._index, len(self._waypoints) - 1)])
