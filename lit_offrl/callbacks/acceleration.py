"""Updates as compiled functions, or as CUDA graphs: the same training at another speed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import lightning
import torch
from torch import Tensor

from lit_offrl.algorithms.base import OfflineAlgorithm
from lit_offrl.algorithms.loop import Named, Phase, run_eagerly
from lit_offrl.algorithms.noise import Draw
from lit_offrl.batch import Batch
from lit_offrl.callbacks.base import AlgorithmCallback, print_note
from lit_offrl.errors import UserError, one_line

Kind = tuple[str, tuple[str, ...], tuple[bool, ...]]  # phase, what is active, which targets move


def kind_of(algorithm: OfflineAlgorithm, phase: Phase) -> Kind:
    """Return the kind of the next update: updates of one kind run the same operations."""
    main_step = algorithm.gradient_step + 1 - algorithm.main_start
    active = algorithm.active_at(main_step) if main_step > 0 else ()
    return phase.name, active, tuple(target.moves_at(main_step) for target in algorithm.targets())


class Acceleration(AlgorithmCallback):
    """Runs updates compiled, or replays them as CUDA graphs; where that fails, one line says why, and they run eagerly.

    Noise comes from the algorithm's stream in the same order, so that a run can be resumed with or without
    acceleration. A resumed run equals an uninterrupted one bit for bit if both have the same settings; compiled and
    eager updates differ by the rounding of fused operations. On several devices updates run eagerly.

    Args:
        compile: Compile each kind of update by `torch.compile`, whole: losses, gradients and optimizers in one
            function. `auto` does so in runs of at least 10,000 gradient steps on a GPU or on one CPU thread. A cache on
            disk keeps the compiled code for later runs.
        cuda_graph: On a GPU, capture each kind of update, targets included, as one CUDA graph and replay it: the same
            kernels, so the same bits, without the cost of launching them. No effect on other devices.
        tf32: Let a GPU multiply matrices in TensorFloat-32, with 10 bits of mantissa, instead of float32. Divisions by
            small numbers (1 / c_out of EDM, 1 / alpha_t) are elementwise, and in float32 in any case.

    Raises:
        UserError: Both ways at once, or a torch that cannot compile gradients.
    """

    # A function of the settings alone, not of measured times: a resumed run must compile where an uninterrupted one
    # does. Compiling takes half a minute to some minutes, and saves a fifth to a half of a step of 10 to 500 ms.
    COMPILED_FROM = 10_000

    def __init__(self, compile: bool | Literal["auto"] = "auto", cuda_graph: bool = False, tf32: bool = False) -> None:
        if compile is True and cuda_graph:
            raise UserError("compile and cuda_graph: choose one of them")
        if compile is True and not can_compile():
            raise UserError(f"compile: needs torch 2.13, this is {torch.__version__}; leave it off")
        self.compile = compile
        self.cuda_graph = cuda_graph
        self.tf32 = tf32
        self._precision = ""

    def on_fit_start(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Let the algorithm run its updates in the chosen way."""
        self._precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")

        note = partial(print_note, trainer)
        is_long = can_compile() and trainer.max_steps >= self.COMPILED_FROM and trainer.world_size == 1
        # On several threads `ThreadFallback` may reduce their number, and each number is compiled anew.
        may_change = algorithm.device.type == "cpu" and torch.get_num_threads() > 1
        compiles = is_long and not may_change and not self.cuda_graph if self.compile == "auto" else self.compile
        if trainer.world_size > 1 and (compiles or self.cuda_graph):
            note("note: updates run eagerly on several devices")
        elif compiles:
            algorithm.run_update = CompiledUpdates(note)
        elif self.cuda_graph and algorithm.device.type != "cuda":
            note(f"note: cuda_graph has no effect on the device {algorithm.device.type}")
        elif self.cuda_graph and torch.is_autocast_enabled("cuda"):
            note("note: cuda_graph is off: it needs --trainer.precision 32-true")
        elif self.cuda_graph:
            algorithm.run_update = CapturedUpdates(note)

    def on_fit_end(self, trainer: lightning.Trainer, algorithm: OfflineAlgorithm) -> None:
        """Restore eager updates and the former precision."""
        algorithm.run_update = run_eagerly
        torch.set_float32_matmul_precision(self._precision)


def can_compile() -> bool:
    """Return whether this torch can compile updates, which compute gradients themselves."""
    return hasattr(torch._dynamo.config, "trace_autograd_ops")


class _Compiled(NamedTuple):
    names: tuple[str, ...]  # of the scalars that the update reports
    draws: list[Draw]  # the noise that it draws
    run: Callable[[Batch, list[Tensor]], Tensor]  # maps a batch and that noise to the values of the scalars


class CompiledUpdates:
    """Runs updates as compiled functions of batch and noise, one for each kind.

    Args:
        note: Called with one line when a kind of update has been compiled, or cannot be.
        backend: Of `torch.compile`.
    """

    def __init__(self, note: Callable[[str], None], backend: str = "inductor") -> None:
        self.note = note
        self.backend = backend
        self._kinds: dict[Kind, _Compiled] = {}
        self._succeeded: set[Kind] = set()  # kinds whose first call, which compiles them, has succeeded
        self._failed = False

    def __call__(self, algorithm: OfflineAlgorithm, phase: Phase, batch: Batch) -> Named:
        """Run an update and move the targets."""
        if self._failed:
            return run_eagerly(algorithm, phase, batch)
        kind = kind_of(algorithm, phase)
        if kind not in self._kinds:
            self._kinds[kind] = self._compile(algorithm, phase, batch, kind)
        names, draws, run = self._kinds[kind]
        noise = [algorithm.noise.draw_from_stream(draw) for draw in draws]
        started = time.perf_counter()
        try:
            with torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=64):
                values = run(batch, noise)
        except Exception as error:  # of the tracer, the compiler or what it calls
            if kind in self._succeeded:
                raise
            self._failed = True  # while compiling: no network has changed yet
            self.note(f"note: updates run eagerly: they could not be compiled ({one_line(error)[:200]})")
            with algorithm.noise.replaying(noise):
                return run_eagerly(algorithm, phase, batch)
        if kind not in self._succeeded:
            self._succeeded.add(kind)
            self.note(f"note: compiled an update of the phase {phase.name} in {time.perf_counter() - started:.0f} s")
        algorithm.update_targets()
        return names, values

    def _compile(self, algorithm: OfflineAlgorithm, phase: Phase, batch: Batch, kind: Kind) -> _Compiled:
        names, draws = rehearse(algorithm, phase, batch)
        update, (_, active, _) = phase.update, kind

        def run(batch: Batch, noise: list[Tensor]) -> Tensor:
            with algorithm.noise.replaying(noise), algorithm.tracing(active):
                return torch.stack(list(update(batch).values()))

        return _Compiled(names, draws, torch.compile(run, fullgraph=True, dynamic=False, backend=self.backend))


def rehearse(algorithm: OfflineAlgorithm, phase: Phase, batch: Batch) -> tuple[tuple[str, ...], list[Draw]]:
    """Perform an update and undo it; return the names of the scalars that it reports and the noise that it draws.

    So the first update of a kind can be compiled like all others, and a resumed run compiles the same updates as an
    uninterrupted one.
    """
    adams = algorithm.optimizer_set.adams.values()
    moments = [each for adam in adams for state in adam.state.values() for each in state.values()]
    tensors = [*algorithm.parameters(), *algorithm.buffers(), *moments]
    before, position = [each.detach().clone() for each in tensors], algorithm.noise.get_state()
    with algorithm.noise.recording() as draws:
        names = tuple(phase.update(batch))
    with torch.no_grad():
        for each, value in zip(tensors, before, strict=True):
            each.copy_(value)
    algorithm.noise.generator.set_state(position)
    return names, draws


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    batch: Batch  # the memory that the graph reads
    names: tuple[str, ...]  # of the scalars that the update reports
    values: Tensor  # the memory that the graph writes them to


class CapturedUpdates:
    """Replays updates as CUDA graphs, one for each kind.

    A graph reads its batch from memory into which each update's batch is copied, learning rates from tensors that the
    algorithm fills, and noise from the algorithm's generator, which is registered with the graph: a replay advances the
    stream as an eager update does.

    Args:
        note: Called with one line if capturing fails.
    """

    WARM_UP = 3  # eager updates of a kind, on the stream of capture: libraries allocate their memory in the first calls

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note
        self._graphs: dict[Kind, _Captured] = {}
        self._seen: dict[Kind, int] = defaultdict(int)
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._failed = False

    def __call__(self, algorithm: OfflineAlgorithm, phase: Phase, batch: Batch) -> Named:
        """Run an update and move the targets."""
        kind = kind_of(algorithm, phase)
        if self._failed or self._seen[kind] < self.WARM_UP:
            self._seen[kind] += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                named = run_eagerly(algorithm, phase, batch)
            torch.cuda.current_stream().wait_stream(self._stream)
            return named
        if kind not in self._graphs:
            try:
                self._graphs[kind] = self._capture(algorithm, phase, batch)
            except RuntimeError as error:  # capturing performs nothing: the update is still to be done
                self._failed = True
                self.note(f"note: updates run eagerly: they could not be captured ({one_line(error)[:200]})")
                return run_eagerly(algorithm, phase, batch)
        captured = self._graphs[kind]
        pairs = [(a, b) for a, b in zip(captured.batch, batch, strict=True) if a is not None and b is not None]
        for dtype in {a.dtype for a, _ in pairs}:  # one copying kernel for each
            same = [(a, b) for a, b in pairs if a.dtype == dtype]
            torch._foreach_copy_([a for a, _ in same], [b for _, b in same])
        captured.graph.replay()
        return captured.names, captured.values

    def _capture(self, algorithm: OfflineAlgorithm, phase: Phase, batch: Batch) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(algorithm.noise.generator)
        static = Batch._make(None if each is None else each.clone() for each in batch)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=self._stream):
            names, values = run_eagerly(algorithm, phase, static)
        return _Captured(graph, static, names, values)
