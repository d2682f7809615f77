"""Episodes of a policy in several copies of an environment, with one policy call per step for all copies."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector.utils import CloudpickleWrapper
from numpy.typing import NDArray

from lit_offrl.errors import RunFailure, SimulatorFailure, UserError, one_line
from lit_offrl.system.cores import available_cores
from lit_offrl.system.signals import STOP_SIGNALS

Array = NDArray[np.float32]
Policy = Callable[[Array, Sequence[int]], Array]
"""Observations `[batch, observation_dim]` and the index of each one's episode -> actions `[batch, action_dim]`."""


@dataclass(frozen=True)
class Episode:
    """One finished episode.

    Attributes:
        seed: Seed of the reset.
        episode_return: Undiscounted sum of the environment's own rewards.
        length: Number of environment steps.
        success: Whether the environment reported success at any step; None if it never reports success.
    """

    seed: int
    episode_return: float
    length: int
    success: bool | None


class StoppedEarly(Exception):  # noqa: N818 (it is not an error)
    """`should_stop` returned True before all episodes were finished."""


@dataclass
class _Running:
    index: int  # in the order of seeds
    seed: int
    observation: Array
    episode_return: float = 0.0
    length: int = 0
    success: bool | None = None


class Rollouts:
    """Runs episodes in copies of an environment, which exist until `close`; a context manager.

    Each episode begins with a reset by its own seed, and a copy whose episode ends starts the next episode at once. So
    episodes do not depend on `num_envs`, if an action does not depend on the other rows of the policy's batch.
    `gymnasium.vector` does not serve: it steps idle copies, too.

    Args:
        make: Builds one copy; its observations are float32 vectors and its actions a bounded or unbounded box.
        num_envs: Number of copies.
        processes: Distribute the copies over worker processes, at most one per CPU core. This saves time for slow
            simulators (ant mazes, hands) if several cores are idle, and costs time for fast ones: one exchange takes as
            long as a step of a fast simulator. A script that uses it needs `if __name__ == "__main__":`.

    Raises:
        UserError: `num_envs` is not positive, actions are not vectors of real numbers, or `make` fails.
    """

    def __init__(self, make: Callable[[], gym.Env[Any, Any]], num_envs: int, processes: bool = False) -> None:
        if num_envs < 1:
            raise UserError(f"the number of environments must be at least 1, not {num_envs}")
        self.num_envs = num_envs
        copies = _Copies(make, 1 if processes else num_envs)
        action_space = copies.envs[0].action_space
        if not isinstance(action_space, Box) or len(action_space.shape) != 1:
            copies.close()
            raise UserError(f"only actions that are vectors of real numbers can be played, not {action_space}")
        self._low, self._high = action_space.low, action_space.high
        self._make, self._processes = make, processes
        self._pool: _Pool | None = copies
        if processes:
            copies.close()  # this copy gave the action space, and shows errors here instead of in a worker
            self._pool = self._build()

    def run(
        self,
        policy: Policy,
        seeds: Sequence[int],
        should_stop: Callable[[], bool] | None = None,
        on_episode: Callable[[Episode], None] | None = None,
        memories: Mapping[int, dict[str, Any]] | None = None,
    ) -> list[Episode]:
        """Run one episode per seed.

        Args:
            policy: Called once per step with the observations of all running episodes, one row each, and the indices of
                these episodes in `seeds`, so that several policies can share the call. Actions are clipped to the
                action space.
            seeds: Seeds of the resets.
            should_stop: Called before each step.
            on_episode: Called with each finished episode.
            memories: What the policy keeps of each episode, by its index in `seeds`; after each step `reward` in it is
                the reward of the step.

        Returns:
            The episodes in the order of `seeds`.

        Raises:
            StoppedEarly: `should_stop` returned True; the environments can be used again.
            SimulatorFailure: An environment raised, its process died, or rewards or observations are not finite; the
                next call builds the environments anew.
            RunFailure: Actions are not finite.
            ValueError: Actions have a wrong shape.
        """
        if self._pool is None:
            self._pool = self._build()
        try:
            return self._run(self._pool, policy, seeds, should_stop, on_episode, memories)
        except SimulatorFailure:
            self.close()
            raise

    def _build(self) -> _Pool:
        return _Workers(self._make, self.num_envs) if self._processes else _Copies(self._make, self.num_envs)

    def _run(
        self,
        pool: _Pool,
        policy: Policy,
        seeds: Sequence[int],
        should_stop: Callable[[], bool] | None,
        on_episode: Callable[[Episode], None] | None,
        memories: Mapping[int, dict[str, Any]] | None,
    ) -> list[Episode]:
        finished: dict[int, Episode] = {}
        running: dict[int, _Running] = {}
        free = list(range(self.num_envs))
        queue = iter(enumerate(seeds))
        while len(finished) < len(seeds):
            starting = {env: (index, int(seed)) for env, (index, seed) in zip(free, queue, strict=False)}
            resets = pool.advance({env: seed for env, (_, seed) in starting.items()})
            for env, (index, seed) in starting.items():
                running[env] = _Running(index, seed, resets[env].observation)
            free = []

            if should_stop is not None and should_stop():
                raise StoppedEarly
            envs = list(running)
            observations = np.stack([running[env].observation for env in envs])
            actions = self._checked(policy(observations, [running[env].index for env in envs]), len(envs))
            for env, step in pool.advance(dict(zip(envs, actions, strict=True))).items():
                episode = running[env]
                episode.observation = step.observation
                episode.episode_return += step.reward
                episode.length += 1
                if not (np.isfinite(step.reward) and np.isfinite(step.observation).all()):
                    raise SimulatorFailure(
                        f"the environment returned a reward or an observation that is not finite, in step "
                        f"{episode.length} of the episode with seed {episode.seed}"
                    )
                if memories is not None:
                    memories[episode.index]["reward"] = step.reward
                if step.success is not None:
                    episode.success = step.success or bool(episode.success)
                if step.done:
                    del running[env]
                    free.append(env)
                    done = Episode(episode.seed, episode.episode_return, episode.length, episode.success)
                    finished[episode.index] = done
                    if on_episode is not None:
                        on_episode(done)
        return [finished[index] for index in range(len(seeds))]

    def close(self) -> None:
        """Close the environments and end the worker processes; a second call does nothing."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _checked(self, actions: Array, batch: int) -> Array:
        actions = np.asarray(actions)
        if actions.shape != (batch, *self._low.shape):
            raise ValueError(f"the policy returned actions {actions.shape} instead of {(batch, *self._low.shape)}")
        if not np.isfinite(actions).all():
            raise RunFailure("the policy returned actions that are not finite: training has diverged")
        clipped: Array = np.clip(actions, self._low, self._high).astype(self._low.dtype)
        return clipped


# ------------------------------------------------------------------------------- the copies

_Command = int | Array  # the seed of a reset, or the action of a step


@dataclass(frozen=True)
class _Outcome:
    observation: Array
    reward: float = 0.0
    done: bool = False
    success: bool | None = None


class _Pool(Protocol):
    def advance(self, commands: Mapping[int, _Command]) -> dict[int, _Outcome]: ...

    def close(self) -> None: ...


class _Copies:
    """Copies of an environment in this process."""

    def __init__(self, make: Callable[[], gym.Env[Any, Any]], number: int) -> None:
        self.envs = [make() for _ in range(number)]

    def advance(self, commands: Mapping[int, _Command]) -> dict[int, _Outcome]:
        """Reset or step the named copies."""
        try:
            return {index: self._advance(self.envs[index], command) for index, command in commands.items()}
        except Exception as error:  # whatever a simulator raises
            raise SimulatorFailure(f"the environment raised {type(error).__name__}: {one_line(error)[:300]}") from error

    def close(self) -> None:
        while self.envs:
            self.envs.pop().close()

    @staticmethod
    def _advance(env: gym.Env[Any, Any], command: _Command) -> _Outcome:
        if isinstance(command, int):
            return _Outcome(env.reset(seed=command)[0])
        observation, reward, terminated, truncated, info = env.step(command)
        success = bool(info["success"]) if "success" in info else None
        return _Outcome(observation, float(reward), bool(terminated or truncated), success)


class _Workers:
    """Copies of an environment in worker processes: copy i is in worker i modulo the number of workers."""

    def __init__(self, make: Callable[[], gym.Env[Any, Any]], number: int) -> None:
        workers = min(number, available_cores())
        # Not fork, because this process has threads of torch, and a fork leaves their locks in an undefined state.
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for worker in range(workers):
            ours, theirs = context.Pipe()
            copies = len(range(worker, number, workers))
            process = context.Process(target=_work, args=(theirs, CloudpickleWrapper(make), copies), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._exchange({worker: {} for worker in range(workers)})  # wait until all are built

    def advance(self, commands: Mapping[int, _Command]) -> dict[int, _Outcome]:
        workers = len(self._pipes)
        shares: dict[int, dict[int, _Command]] = {}
        for env, command in commands.items():
            shares.setdefault(env % workers, {})[env // workers] = command
        answers = self._exchange(shares)
        return {copy * workers + worker: out for worker, answer in answers.items() for copy, out in answer.items()}

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # the worker's `recv` raises EOFError, and it returns
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        self._pipes, self._processes = [], []

    def _exchange(self, shares: Mapping[int, Mapping[int, _Command]]) -> dict[int, dict[int, _Outcome]]:
        answers: dict[int, dict[int, _Outcome]] = {}
        try:
            for worker, share in shares.items():
                self._pipes[worker].send(share)
            for worker in shares:
                answer = self._pipes[worker].recv()
                if isinstance(answer, str):
                    raise SimulatorFailure(answer)
                answers[worker] = answer
        except BaseException as error:
            self.close()  # the next step would read answers that are still in the pipes
            if isinstance(error, (EOFError, OSError)):
                raise SimulatorFailure("a worker process with environments died") from error
            raise
        return answers


def _work(pipe: Connection, make: Callable[[], gym.Env[Any, Any]], copy_count: int) -> None:
    """Build `copy_count` environments and execute commands until the other end of the pipe is closed."""
    for stop_signal in STOP_SIGNALS:  # a terminal and a scheduler send them to all; the main process handles them
        signal.signal(stop_signal, signal.SIG_IGN)
    copies = None
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            commands = pipe.recv()
            try:
                copies = copies or _Copies(make, copy_count)
                answer: dict[int, _Outcome] | str = copies.advance(commands)
            except Exception as error:
                answer = one_line(error)
            pipe.send(answer)
    if copies is not None:
        copies.close()
