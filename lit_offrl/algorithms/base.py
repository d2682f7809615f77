"""The training contract every algorithm keeps; nothing algorithm-specific."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from lit_offrl.algorithms.optimizers import Adam, clip_
from lit_offrl.algorithms.optimizers import OptimizerSpec as OptimizerSpec  # algorithms find all they need here
from lit_offrl.batch import Batch
from lit_offrl.errors import RunFailure, UserError, require
from lit_offrl.system.progress import progress_bar

if TYPE_CHECKING:
    from tqdm import tqdm

Info = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)
Actor = Callable[[Tensor, torch.Generator | None], Tensor]
Draw = Callable[..., Tensor]  # torch.randn or torch.rand
Noise = Callable[[Draw, tuple[int, ...], bool], Tensor]  # from one of these, a shape, and whether ranks share it


@dataclass(frozen=True)
class Target:
    """A slowly following copy: target <- target + rate * (online - target).

    Attributes:
        online: What is followed.
        target: What follows.
        rate: Share of the distance covered in one step.
        every: Follow at the gradient steps of the main phase, counted from 1, that this divides.
        after: Follow only at steps of the main phase beyond this one.
        early: Follow before the main phase, at every step, instead of in it.
        early_steps: Where `early`, follow in the last so many steps before the main phase only; None for all of them.
    """

    online: nn.Module
    target: nn.Module
    rate: float
    every: int = 1
    after: int = 0
    early: bool = False
    early_steps: int | None = None

    def due(self, main_step: int) -> bool:
        """Return whether to follow after step `main_step` of the main phase, counted from 1; below, before it."""
        if self.early or main_step < 1:
            return self.early and main_step < 1 and (self.early_steps is None or main_step > -self.early_steps)
        return main_step > self.after and main_step % self.every == 0


@dataclass(frozen=True)
class Phase:
    """A stretch of the training.

    Attributes:
        name: What the progress bar says.
        update: Performs one gradient step.
        steps: Its length in gradient steps; the last phase, the main one, has what is left of `max_steps`.
        begin: Called once before its first update, with all that the phases before it have learned.
        prepare: Called before each update with its batch, for work that is done now and then: it may read scalars and
            the gradient step, which `update`, that may be compiled or captured, must not.
    """

    name: str
    update: Callable[[Batch], Info]
    steps: int = 0
    begin: Callable[[], None] = lambda: None
    prepare: Callable[[Batch], None] | None = None


class OfflineAlgorithm(lightning.LightningModule):
    """An offline reinforcement-learning algorithm with several optimizers, trained on blocks of minibatches.

    A subclass builds its networks in `__init__` and defines `optimizer_specs`, `update` and `sample_actions`; where
    it has them, `targets`, `pretrain_update`, `begin_main` or `phases` of its own, and further `actors`. Inside
    `update` it calls `minimize` for each loss and draws noise from `normal` and `uniform` only.

    One gradient step is one `update(batch)`: `max_steps`, schedules, checkpoint names and every x axis count these.

    Attributes:
        dataset_observations: All observations of the training data as the networks see them, `[n, observation_dim]`,
            in the order that `Batch.rows` counts; set when training starts.
        ranks: Processes that share each batch: the one number `rank` has its rows `rank`, `rank + ranks`, ..., so that
            the rows of each are in their order and spread evenly over the whole.
        reduce_gradients: Averages each of some tensors over the ranks; None where there is one.
        gather_rows: Returns the rows of all ranks in the order of the batch that they share; None where there is one.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        pretrain_steps: Length of the pretraining phase, in gradient steps; `max_steps` includes it.
        pretrained: Checkpoint of another run whose networks of the same names and shapes start this one.
        seed: Seed of the module's noise.
    """

    observation_mean: Tensor
    observation_std: Tensor
    action_center: Tensor
    action_scale: Tensor
    action_limit: Tensor
    candidates: int = 1  # actions that are sampled per state when acting

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        pretrain_steps: int = 0,
        pretrained: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require(pretrain_steps >= 0, "model.init_args.pretrain_steps", "at least 0", pretrain_steps)
        if pretrained is not None and not Path(pretrained).is_file():
            raise UserError(f"model.init_args.pretrained: no checkpoint at {pretrained}")
        self.automatic_optimization = False
        self.observation_dim = observation_dim
        self.action_dim = action_dim
        self.pretrain_steps = pretrain_steps
        self.pretrained = pretrained
        self.seed = seed
        self.gradient_step = 0
        self.main_steps: int | None = None
        self.dataset_observations: Tensor | None = None
        self.dataset_next_observations: Tensor | None = None
        # Called after every update with the count of main updates done; before the main phase it is not positive.
        self.update_hooks: list[Callable[[int], None]] = []
        self.run_update: RunUpdate = run_eagerly
        # `DistributedTraining` sets these four; what follows from them is in `normal`, `own`, `whole` and `head`.
        self.rank, self.ranks = 0, 1
        self.reduce_gradients: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None
        self.gather_rows: Callable[[Tensor], Tensor] | None = None
        self._optimizers: dict[str, Adam] = {}
        self._specs: dict[str, OptimizerSpec] = {}
        self._rates: dict[str, Tensor] = {}  # present learning rates, on the device
        self._due: tuple[str, ...] | None = None
        self._noise: Noise | None = None
        self._generator: torch.Generator | None = None
        self._noise_state: Tensor | None = None
        self.register_buffer("observation_mean", torch.zeros(observation_dim))
        self.register_buffer("observation_std", torch.ones(observation_dim))
        self.register_buffer("action_center", torch.zeros(action_dim))
        self.register_buffer("action_scale", torch.ones(action_dim))
        self.register_buffer("action_limit", torch.ones(()))

    # ---------------------------------------------------------------- what an algorithm defines

    @abstractmethod
    def optimizer_specs(self) -> Mapping[str, OptimizerSpec]:
        """Return the optimizers by the names that `minimize` uses."""

    @abstractmethod
    def update(self, batch: Batch) -> Info:
        """Perform one gradient step on every network; return detached scalars to log."""

    def pretrain_update(self, batch: Batch) -> Info:
        """Perform one gradient step of the pretraining phase."""
        raise NotImplementedError(f"{type(self).__name__} has no pretraining phase")

    def begin_main(self) -> None:
        """Do what is due once, between pretraining and the main phase."""

    def phases(self) -> tuple[Phase, ...]:
        """Return the phases of the training in their order; the last is the main one."""
        return (
            Phase("pretraining", self.pretrain_update, self.pretrain_steps),
            Phase("training", self.update, begin=self.begin_main),
        )

    def targets(self) -> tuple[Target, ...]:
        """Return the pairs of online and target networks that the `EMATargets` callback maintains."""
        return ()

    def validation_losses(self, batch: Batch) -> Info:
        """Return what is worth knowing of transitions that training does not see; nothing is updated."""
        return {}

    @abstractmethod
    def sample_actions(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return actions `[batch, action_dim]` at normalised `observations` `[batch, observation_dim]`.

        In [-1, 1], or as wide as the data module's `action_limit` says; what lies beyond is clamped.
        """

    def actors(self) -> dict[str, Actor]:
        """Return what can act, by name; the first is the policy whose score is the run's score."""
        return {"policy": self.sample_actions}

    def sample_each(
        self, observations: Tensor, actors: Sequence[str], generators: Mapping[str, torch.Generator | None]
    ) -> Tensor:
        """Return actions of several of `actors()`, one for each row of normalised `observations`.

        They take turns here; an algorithm whose networks can serve them all at once does so.
        """
        every = self.actors()
        rows = {name: [i for i, each in enumerate(actors) if each == name] for name in dict.fromkeys(actors)}
        parts = [every[name](observations[index], generators[name]) for name, index in rows.items()]
        actions = parts[0].new_empty(len(observations), self.action_dim)
        for index, part in zip(rows.values(), parts, strict=True):
            actions[index] = part
        return actions

    def value_of(self, observations: Tensor, actions: Tensor) -> Tensor | None:
        """Return the critic's value of each action, `[batch]`; None where there is no critic.

        Arguments are normalised as in `sample_actions`. TensorBoard shows how the values are distributed.
        """
        return None

    def figure_maps(self, observations: Tensor, actions: Tensor) -> dict[str, Tensor]:
        """Return functions of the action worth looking at on a 2-D bandit, by title, each `[batch]`.

        Arguments are normalised as in `sample_actions`. `BanditEvaluation` draws the values on a grid of actions.
        """
        return {}

    def figure_paths(self, observations: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return ways of actions to draw upon the maps of these titles, `[points of the way, batch, action_dim]`.

        `observations` are normalised, `[batch, observation_dim]`; actions are as the networks see them.
        """
        return {}

    # ---------------------------------------------------------------- what an algorithm uses

    def minimize(self, name: str, loss: Tensor) -> None:
        """Step the optimizer `name` on `loss`, with gradients for that optimizer's own parameters and no others."""
        optimizer, spec = self._optimizers[name], self._specs[name]
        gradients: Sequence[Tensor] = torch.autograd.grad(loss, optimizer.parameters)
        if self.reduce_gradients is not None:
            gradients = self.reduce_gradients(gradients)
        # An expanded gradient, a sum's, has less memory than elements: the fused Adam would read past its end.
        gradients = [each.contiguous() for each in gradients]
        if spec.clip_norm is not None:
            clip_(gradients, spec.clip_norm)
        for parameter, gradient in zip(optimizer.parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.apply(gradients, self._rates[name])

    @property
    def due(self) -> tuple[str, ...]:
        """What is due at the present update, see `due_at`."""
        return self.due_at(self.gradient_step - self.main_start + 1) if self._due is None else self._due

    def due_at(self, main_step: int) -> tuple[str, ...]:
        """Return names of what is due at a step of the main phase, counted from 1: of optimizers that step at it.

        What an update does may depend on the gradient step in this way only: updates at which the same is due are
        alike, and can be compiled or captured once.
        """
        return tuple(name for name, spec in self._specs.items() if spec.due(main_step))

    def scheduled_rate(self, spec: OptimizerSpec) -> float:
        """Return the step size at the present gradient step, a function of the step alone: nothing to restore."""
        if not spec.cosine or not self.main_steps:
            return spec.learning_rate
        own_steps = max(self.gradient_step - self.main_start - spec.after, 0) / spec.every
        progress = min(own_steps / self.main_steps, 1.0)
        return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def stratified(self, count: int) -> Tensor:
        """Draw one number uniformly from each of `count` equal parts of [0, 1), in their order, in float64.

        Each of a batch's rows, which are exchangeable, gets a uniform number; spread evenly, they vary a loss less.
        """
        parts = count * self.ranks
        return (self.own(torch.arange(parts, device=self.device)) + self.uniform(1, shared=True).double()) / parts

    def normal(self, *shape: int, shared: bool = False) -> Tensor:
        """Draw standard normal noise from the module's own stream.

        Args:
            *shape: The first dimension counts rows of the batch at hand.
            shared: The noise belongs to no rows: it is the same on all ranks.
        """
        return self._draw(torch.randn, shape, shared)

    def uniform(self, *shape: int, shared: bool = False) -> Tensor:
        """Draw noise uniform in [0, 1) from the module's own stream, see `normal`."""
        return self._draw(torch.rand, shape, shared)

    def _draw(self, draw: Draw, shape: tuple[int, ...], shared: bool) -> Tensor:
        return self.fresh(draw, shape, shared) if self._noise is None else self._noise(draw, shape, shared)

    def fresh(self, draw: Draw, shape: tuple[int, ...], shared: bool) -> Tensor:
        """Draw from the module's own stream, whatever `drawing` says."""
        rows, *rest = shape
        if shared or self.ranks == 1:
            return draw(rows, *rest, generator=self.generator, device=self.device)
        # All ranks draw the noise of all rows: their streams stay the same, and are those of one process.
        return self.own(draw(rows * self.ranks, *rest, generator=self.generator, device=self.device))

    def own(self, rows: Tensor) -> Tensor:
        """Return this rank's of the rows `[batch, ...]` of the batch that all ranks share."""
        return rows[self.rank :: self.ranks]

    def whole(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks, `[batch, ...]`, in the order of the batch that they share; the same on each."""
        return rows if self.gather_rows is None else self.gather_rows(rows)

    def head(self, batch: Batch, count: int) -> Batch:
        """Return this rank's of the first `count` transitions of the batch that all ranks share, or of all of them."""
        return batch.head(count // self.ranks)

    @contextmanager
    def drawing(self, noise: Noise, due: tuple[str, ...] | None = None) -> Iterator[None]:
        """Let updates draw their noise from `noise`, and take `due` for what is due; for those who record or trace."""
        self._noise, self._due = noise, due
        try:
            yield
        finally:
            self._noise = self._due = None

    @property
    def generator(self) -> torch.Generator:
        """The stream of training noise, on the module's device; saved with the checkpoint."""
        if self._generator is None:
            self._generator = torch.Generator(device=self.device).manual_seed(self.seed)
            if self._noise_state is not None:
                self._generator.set_state(self._noise_state)
        return self._generator

    @property
    def main_start(self) -> int:
        """The gradient step at which the main phase begins."""
        return sum(phase.steps for phase in self.phases()[:-1])

    def phase_at(self, gradient_step: int) -> tuple[Phase, int]:
        """Return the phase in which the update after `gradient_step` updates falls, and the step it begins at."""
        *early, main = self.phases()
        begins = 0
        for phase in early:
            if gradient_step < begins + phase.steps:
                return phase, begins
            begins += phase.steps
        return main, begins

    def progress(self, description: str, total: int, unit: str) -> tqdm[Any]:
        """Return a bar for work within an update that may take minutes; hidden where the run shows none."""
        hidden = self._trainer is None or self.trainer.progress_bar_callback is None or self.rank > 0
        return progress_bar(description, total, unit=unit, disable=hidden)

    # ---------------------------------------------------------------- acting

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator | None = None, actor: str = "policy") -> Tensor:
        """Return actions, in the dataset's units, at observations as the environment gives them.

        Args:
            observations: `[batch, observation_dim]`.
            generator: Stream of the policy's noise; the global one where None.
            actor: One of `actors()`.

        Returns:
            Actions, `[batch, action_dim]`.
        """
        return self.act_each(observations, [actor] * len(observations), {actor: generator})

    @torch.no_grad()
    def act_each(
        self, observations: Tensor, actors: Sequence[str], generators: Mapping[str, torch.Generator | None]
    ) -> Tensor:
        """Return actions like `act`, row by row of the actor that is named, with the noise of that actor's stream."""
        normalised = (observations.to(self.observation_mean) - self.observation_mean) / self.observation_std
        actions = self.sample_each(normalised, actors, generators).clamp(-self.action_limit, self.action_limit)
        return self.action_center + self.action_scale * actions

    def predict_step(self, batch: Tensor | Batch, batch_idx: int) -> Tensor:
        """Return actions for a batch of raw observations."""
        return self.act(batch.observations if isinstance(batch, Batch) else batch)

    # ---------------------------------------------------------------- the loop

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Make one fused Adam per spec."""
        self._specs = dict(self.optimizer_specs())
        self._optimizers = {
            name: Adam([p for module in spec.modules for p in module.parameters()], spec.learning_rate)
            for name, spec in self._specs.items()
        }
        self._rates = {
            name: torch.tensor(spec.learning_rate, device=self._optimizers[name].parameters[0].device)
            for name, spec in self._specs.items()
        }
        return list(self._optimizers.values())

    def on_fit_start(self) -> None:
        """Check what must hold before the first update."""
        check_trainer(self.trainer)
        if self.trainer.world_size != self.ranks:
            raise UserError("training on several devices needs the DistributedTraining callback")
        self.main_steps = max(self.trainer.max_steps - self.main_start, 1)
        if self.targets() and not self.update_hooks:
            raise UserError(
                f"{type(self).__name__} has target networks but nothing updates them: add the EMATargets callback"
            )
        if self.pretrained is not None and self.gradient_step == 0:
            self.load_pretrained(self.pretrained)

    def on_train_start(self) -> None:
        """Find the dataset's observations in the table that minibatches are drawn from."""
        table = self.trainer.train_dataloader
        self.dataset_observations = getattr(table, "observations", None)
        self.dataset_next_observations = getattr(table, "next_observations", None)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Forget what was logged of the block before: until its epoch ends Lightning would log it with this one, too.

        Losses of a phase that is over would go on, and be missing where a run was resumed.
        """
        results = self.trainer._results
        if results is not None:
            results.reset()

    def training_step(self, block: Batch, batch_idx: int) -> None:
        """Perform the updates of one block, then log the means of what they returned, with one host sync."""
        sums: dict[tuple[str, ...], Tensor] = {}  # by the names of what is summed: updates may differ in what they tell
        counts: dict[tuple[str, ...], int] = {}
        for batch in block.updates():
            names, values = self.advance(batch)
            sums[names] = sums.get(names, 0) + values
            counts[names] = counts.get(names, 0) + 1
        self._count_updates(len(block.rewards))
        means = self._block_means(sums, counts)
        for name, value in means.items():
            if not math.isfinite(value):
                raise RunFailure(
                    f"train/{name} became {value} by gradient step {self.gradient_step}; "
                    "lower the learning rates, or check the data with `data check`"
                )
        self.log_dict({f"train/{name}": value for name, value in means.items()})
        self.log("step", float(self.gradient_step))  # the loggers' x axis

    def advance(self, batch: Batch) -> tuple[tuple[str, ...], Tensor]:
        """Perform the next gradient step, of whatever phase it falls into, and let the targets follow.

        Returns:
            Names of what it tells, and the values, detached, `[names]`.
        """
        phase, begins = self.phase_at(self.gradient_step)
        if self.gradient_step == begins:
            phase.begin()
        if phase.prepare is not None:
            phase.prepare(batch)
        for name, spec in self._specs.items():
            if spec.cosine:
                self._rates[name].fill_(self.scheduled_rate(spec))
        told = self.run_update(self, phase, batch)
        self.gradient_step += 1
        return told

    def follow_update(self) -> None:
        """Do what follows an update, while its gradient step is still counted as the present one: targets follow."""
        main_step = self.gradient_step + 1 - self.main_start
        for hook in self.update_hooks:
            hook(main_step)

    def _block_means(self, sums: dict[tuple[str, ...], Tensor], counts: dict[tuple[str, ...], int]) -> dict[str, float]:
        totals: dict[str, float] = {}
        updates: dict[str, int] = {}
        every = torch.cat(list(sums.values()))
        if self.reduce_gradients is not None:
            (every,) = self.reduce_gradients([every])
        values = every.tolist()
        for name, value in zip((name for names in sums for name in names), values, strict=True):
            totals[name] = totals.get(name, 0.0) + value
        for names, count in counts.items():
            updates |= {name: updates.get(name, 0) + count for name in names}
        return {name: total / updates[name] for name, total in totals.items()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the losses of held-out transitions, where there are any; rollouts are `RolloutEvaluation`'s."""
        if not isinstance(batch, Batch):
            return
        # The same noise in every validation: what differs are the networks. Training goes on as if there had been none.
        noise = torch.Generator(device=self.device).manual_seed(batch_idx)
        ranks = self.rank, self.ranks, self.gather_rows
        self.rank, self.ranks, self.gather_rows = 0, 1, None  # each looks at all the rows, as one process does
        try:
            with self.drawing(lambda draw, shape, shared: draw(*shape, generator=noise, device=self.device)):
                losses = self.validation_losses(batch)
        finally:
            self.rank, self.ranks, self.gather_rows = ranks
        rows = len(batch.rewards)
        self.log_dict({f"val/{name}": value for name, value in losses.items()}, batch_size=rows)
        self.log("step", float(self.gradient_step), batch_size=rows)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: the `RolloutEvaluation` callback does the work, this lets `test` run."""

    def _count_updates(self, updates: int) -> None:
        # Lightning's global_step counts calls of its own optimizer wrapper, once per optimizer. The raw optimizers
        # stepped in `minimize` are invisible to it, so the block's updates are entered here: global_step is then the
        # number of gradient steps, whatever the number of optimizers. tests/test_steps.py guards this.
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        for counter in (progress.total, progress.current):
            counter.ready += updates
            counter.completed += updates

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the step count and the noise stream."""
        checkpoint["offrl"] = {"gradient_step": self.gradient_step, "noise": self.generator.get_state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the step count and the noise stream."""
        self.gradient_step = checkpoint["offrl"]["gradient_step"]
        # A checkpoint is loaded before the module moves to its device: the stream is made there when first used.
        self._generator, self._noise_state = None, checkpoint["offrl"]["noise"].cpu()

    def load_pretrained(self, path: str) -> None:
        """Copy from another run's checkpoint every network entry that has the same name and shape here.

        Raises:
            UserError: The file is broken, or has nothing in common with this algorithm.
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)["state_dict"]
        except Exception as error:
            raise UserError(f"model.init_args.pretrained: {path} is not a readable checkpoint ({error})") from error
        own = dict(self.named_parameters())  # the observation statistics are this run's
        common = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
        if not common:
            raise UserError(f"model.init_args.pretrained: {path} has no network of the same name and shape")
        self.load_state_dict(common, strict=False)


RunUpdate = Callable[[OfflineAlgorithm, Phase, Batch], tuple[tuple[str, ...], Tensor]]


def run_eagerly(algorithm: OfflineAlgorithm, phase: Phase, batch: Batch) -> tuple[tuple[str, ...], Tensor]:
    """Perform one update of a phase and what follows each; return names and values, `[names]`, of what it tells."""
    info = phase.update(batch)
    algorithm.follow_update()
    return tuple(info), torch.stack(list(info.values()))


def check_trainer(trainer: lightning.Trainer) -> None:
    """Refuse what would go wrong or have no effect.

    A run needs an end; parameters that are sharded over devices cannot be stepped here; float16 gradients would
    underflow; and Lightning neither clips nor accumulates gradients of optimizers that it does not step.
    """
    if trainer.max_steps < 1:
        raise UserError("trainer.max_steps must say how many gradient steps to train, e.g. --trainer.max_steps 20000")
    # Exact types: what derives from these shards, or starts its processes in ways that the run folder knows nothing of.
    strategy = trainer.strategy
    started = getattr(strategy, "_start_method", "popen")
    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy) or started != "popen":
        raise UserError(f"trainer.strategy: {type(strategy).__name__} ({started}) cannot train here; use auto or ddp")
    if str(trainer.precision).startswith("16"):
        raise UserError(f"trainer.precision: {trainer.precision} needs loss scaling; use 32-true or bf16-mixed")
    if trainer.gradient_clip_val or trainer.accumulate_grad_batches != 1:
        raise UserError("trainer.gradient_clip_val and accumulate_grad_batches have no effect here: leave them out")


def frozen_copy(module: M) -> M:
    """Return a deep copy of `module` that takes no gradients: a target network."""
    return copy.deepcopy(module).requires_grad_(False)


def select(actions: Tensor, q: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Return one of the candidate `actions` `[batch, candidates, action_dim]` per row, `[batch, action_dim]`.

    Args:
        actions: Candidates.
        q: Their values, `[batch, candidates]`.
        temperature: Of the softmax over `q` that draws one; 0 takes the highest.
        generator: Stream of the draw.
    """
    if temperature:
        chosen = torch.multinomial((q / temperature).softmax(dim=-1), 1, generator=generator)[:, 0]
    else:
        chosen = q.argmax(dim=-1)
    return actions[torch.arange(len(actions), device=actions.device), chosen]
