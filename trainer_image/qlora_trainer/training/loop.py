"""The training loop: step, evaluation, checkpoint, until done or asked to stop. Rules:

- A step is a function of the state at the step boundary before it: rows, noise and dropout come from seeds that depend
  on the job's seed and the step alone, the learning rate from the step. So a resumed run goes on bit for bit.
- A step whose update would do harm makes none (`stability`), and its rows are not trained again: data and learning
  rate go by the step, whatever became of it, and what is told of a step stays.
- Between step boundaries the adapter, the optimizer and the journal stay as they are; they change together, under a
  lock, when a step is complete. So whoever holds the lock may save a checkpoint at any instant, in the middle of a step
  too: it is the one of the last step boundary.
- A checkpoint goes to the store while training goes on, but not for longer than the task allows: then, and where the
  next one is due before, training waits for it at a step boundary. So what may be lost is bounded.
- Asked to stop, the loop ends at the next step boundary if the grace period allows for that, and at once if not.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import reduce
from statistics import median
from time import monotonic, perf_counter

import torch
from torch import Tensor

from orchestrator.api.formats import EVALUATED, TRAINED, JournalRecord, Metric, Sample
from orchestrator.api.losses import Standing, losses
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.results import TrainResult
from orchestrator.api.task import StageTask
from qlora_trainer.data.micro_batch import MicroBatch, PreparedRows, Schedule, micro_batches
from qlora_trainer.model.arithmetic import arithmetic
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.outcome import DivergedError, Preempted
from qlora_trainer.storage.checkpoint import (
    Checkpointer,
    OnItsWay,
    Snapshot,
    TrainingState,
)
from qlora_trainer.storage.journal import Journal, latest
from qlora_trainer.storage.tensors import on_host
from qlora_trainer.storage.versions import memory_versions
from qlora_trainer.training.evaluation import evaluate, is_due
from qlora_trainer.training.gradients import clip, gradient_norm
from qlora_trainer.training.objectives.objective import objective_of
from qlora_trainer.training.optimizer import AdapterOptimizer, learning_rate
from qlora_trainer.training.reports import Reports
from qlora_trainer.training.samples import Sampler, is_sampled
from qlora_trainer.training.stability import Response, Stability, numbered
from qlora_trainer.training.stop import AgentClient, Stop, Watchdog
from qlora_trainer.training.telemetry import Card, PhaseClock

STEP_TIMES_KEPT = 20
LONG_STEP_SECONDS = 5.0
"""Of a step that takes longer, its micro-batches are told of."""
POLL_SECONDS = 0.5
SLOWEST_STORE_BYTES_PER_SECOND = 50e6
"""Assumed until a checkpoint has been written."""

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Position:
    """Where training is, beside model, optimizer and journal."""

    step: int = 0
    standing: Standing = field(default_factory=Standing)
    best_adapter: dict[str, Tensor] | None = None
    """Of `standing.best_step`, copied to the host; kept where the job ends with its best adapter."""


class Loop:
    """One attempt's way through the steps."""

    def __init__(
        self,
        *,
        task: StageTask,
        model: TrainingModel,
        train_rows: PreparedRows,
        eval_rows: PreparedRows | None,
        sampler: Sampler | None,
        checkpointer: Checkpointer,
        resumed: Snapshot | None,
        stop: Stop,
        agent: AgentClient | None,
        leave: Callable[[TrainResult], None],
    ) -> None:
        """`leave` ends the process with a result, from a thread that is not the main one."""
        assert task.plan is not None, "train.run checks it"
        assert task.prepared is not None, "train.run checks it"
        self._spec = task.spec
        self._grace_seconds = task.grace_seconds
        self._lag_limit_seconds = task.checkpoint_lag_seconds
        self._plan: MemoryPlan = task.plan
        self.steps = task.prepared.steps
        self._model = model
        self._train_rows = train_rows
        self._eval_rows = eval_rows
        self._sampler = sampler
        self._schedule = Schedule(
            rows=len(train_rows), global_batch_size=task.spec.training.global_batch_size, seed=task.spec.training.seed
        )
        self._optimizer = AdapterOptimizer(model.trainable(), task.spec.training)
        self._parameters = [parameter for _, parameter in model.trainable()]
        self._objective = objective_of(
            task.spec.training.objective, model, train_rows, eval_rows, resumed.objective if resumed else None
        )
        self._checkpointer = checkpointer
        self._last_save = monotonic()
        self._stall_seconds = 0.0  # for which saving held up training, since a step was recorded
        self._stop = stop
        self._leave = leave
        self._lock = threading.RLock()
        self._step_seconds: deque[float] = deque(maxlen=STEP_TIMES_KEPT)
        self._step_started = perf_counter()
        self.journal = Journal(resumed.journal if resumed else ())
        self._reports = Reports(agent, self.journal, self.steps)
        self._warning: str | None = None
        self._position = self._restore(resumed)
        self._stability = Stability(task.spec.training, self.journal.records())
        self._arithmetic = arithmetic(model)
        self._card = Card(model.device, latest(self.journal, Metric.ENERGY_JOULES) or 0.0)
        self.clock = PhaseClock(model.device)

    # --- steps

    def run(self) -> None:
        """Train to the end; raises Preempted, with a durable checkpoint, when asked to stop."""
        watchdog = Watchdog(self._stop, self._lock, seconds_needed=self._seconds_to_save, rescue=self._rescue)
        with watchdog.watching():
            self._at_step_boundary()
            self._evaluate_if_due()
            while not self._done():
                self._train_one_step()
                self._at_step_boundary()
                self._evaluate_if_due()
            with self._lock:  # the end is reached: from here on the result is finished, whoever asks to stop
                pass

    def _done(self) -> bool:
        spec, standing = self._spec.evaluation, self._position.standing
        if 0 < spec.early_stopping_patience <= standing.without_gain:
            log.info(
                "stopped early at step %d: %d evaluations without a better %s; the best was %s, after step %s",
                self._position.step,
                standing.without_gain,
                spec.metric,
                standing.best,
                standing.best_step,
            )
            return True
        return self._position.step >= self.steps

    def _train_one_step(self) -> None:
        step, training = self._position.step, self._spec.training
        self._step_started = perf_counter()
        self.clock.enter("data")
        rows = self._schedule.rows_of_step(step)
        batches = list(micro_batches(self._train_rows, rows, self._plan.micro_batch_size))
        count = max(1, self._objective.count(self._train_rows, rows))
        torch.manual_seed(step_seed(training.seed, step))  # pyright: ignore[reportUnknownMemberType]  # torch's own
        parts = self._accumulate_gradients(batches, count)
        self.clock.enter("optimizer")
        norms = gradient_norm(self._parameters)
        found = parts.cpu()  # the GPU is waited for once, with everything queued
        figures, norm = [float(figure) for figure in reduce(torch.add, found)], norms.item()
        loss = figures[0]
        response = self._response(batches, found, loss, norm)
        way_back = self._way_back() if response == "rollback" else None
        with self._lock:
            told = self._update(norm) if response is None else self._leave_out(response, way_back)
            seconds = perf_counter() - self._step_started
            self._complete_step(batches, figures, norm=norm, seconds=seconds, told=told)
        log.info("step %d of %d: loss %.4f, %.2f s", step + 1, self.steps, loss, seconds)

    def _accumulate_gradients(self, batches: Sequence[MicroBatch], count: int) -> Tensor:
        """Figures [micro-batches, figures], the loss first, whose sums are means over what the objective counts.

        Gradients are added up.
        """
        self._model.train()
        parts = torch.zeros(len(batches), len(self._objective.figures), device=self._model.device)
        for number, batch in enumerate(batches, start=1):
            if not self._step_seconds or self._step_seconds[-1] > LONG_STEP_SECONDS:
                self.report(f"step {self._position.step + 1}: micro-batch {number} of {len(batches)}")
            self.clock.enter("forward")
            parts[number - 1] = self._objective.accumulate(
                batch, divisor=count, between=lambda: self.clock.enter("backward")
            )
            self._stop_inside_a_step_if_need_be()
        return parts

    def _update(self, norm: float) -> dict[str, float]:
        """Change the adapter; there is nothing else to tell of it."""
        clip(self._parameters, norm, float(self._spec.training.max_grad_norm))
        self._optimizer.step(self._learning_rate())
        self.clock.close()
        return {}

    def _response(self, batches: Sequence[MicroBatch], parts: Tensor, loss: float, norm: float) -> Response | None:
        """What there is to do instead of an update; raises DivergedError where that is to stop."""
        trouble = self._stability.trouble(loss, norm)
        if trouble is None:
            return None
        (response, what), step = trouble, self._position.step + 1
        # Those whose own loss is no number, where there are such: a gradient may be none though all losses are.
        broken = [batch for batch, part in zip(batches, parts, strict=True) if not math.isfinite(float(part[0]))]
        records = numbered(self._train_rows.samples(number for each in broken or batches for number in each.records))
        where = f"; {records}" if records else ""
        if response == "stop":
            raise self._divergence(f"training diverged in step {step}: {what}{where}")
        done = (
            "its update is left out" if response == "skip" else "training goes back to a checkpoint, and leaves it out"
        )
        log.warning("step %d is unstable: %s%s; %s", step, what, where, done)
        return response

    def _way_back(self) -> Snapshot:
        found = self._checkpointer.way_back(self._position.step)
        if found is None:
            raise self._divergence(
                f"step {self._position.step + 1} is unstable, and no checkpoint to go back to is whole"
            )
        return found

    def _leave_out(self, response: Response, way_back: Snapshot | None) -> dict[str, float]:
        """Go on without the step's update, from the `way_back` where there is one; what there is to tell of it."""
        self._optimizer.drop_gradients()
        if way_back is not None:
            self._model.load_adapter(way_back.adapter)
            self._optimizer.import_state(way_back.optimizer)
            log.warning("adapter and optimizer are those of step %d again", way_back.state.step)
        self.clock.close()
        return self._stability.note_response(response)

    def _complete_step(
        self,
        batches: Sequence[MicroBatch],
        figures: Sequence[float],
        *,
        norm: float,
        seconds: float,
        told: Mapping[str, float],
    ) -> None:
        """Bring position and journal up to the adapter; `told` is what else there is to tell of the step."""
        metrics: dict[str, float] = {
            **told,
            **{f"{TRAINED}/{name}": figure for name, figure in zip(self._objective.figures, figures, strict=True)},
            Metric.LEARNING_RATE: self._learning_rate(),
            Metric.GRADIENT_NORM: norm,
            Metric.TOKENS_PER_SECOND: sum(batch.tokens for batch in batches) / seconds,
            Metric.CHECKPOINT_STALL_SECONDS: self._stall_seconds,
            **self._card.metrics(self._arithmetic.operations(batches), seconds),
        }
        self._stability.note(norm)
        self._step_seconds.append(seconds)
        self._stall_seconds = 0.0
        self._position.step += 1
        self.journal.record(self._position.step, metrics)

    def _learning_rate(self) -> float:
        return learning_rate(self._position.step, self.steps, self._spec.training)

    def _divergence(self, what: str) -> DivergedError:
        self._checkpointer.finish()  # the one that is being written is kept too, and the message is to name it
        last = self._checkpointer.last
        kept = f"the checkpoint of step {last.step} is kept at {last.uri}" if last else "there is no checkpoint yet"
        return DivergedError(
            f"{what}; {kept}; lower training.learningRate, raise warmupRatio, or look for broken records in the dataset"
        )

    def _evaluate_if_due(self) -> None:
        step = self._position.step
        if self._eval_rows is None or not is_due(step, self.steps, self._spec.evaluation, self.journal.records()):
            return
        self.report(f"evaluating after step {step}")
        self.clock.enter("evaluation")
        figures = evaluate(
            self._model,
            self._objective,
            self._eval_rows,
            self._plan.micro_batch_size,
            between=self._stop_if_asked,
        )
        loss = figures["loss"]
        samples: Sequence[Sample] = ()
        if self._sampler is not None and math.isfinite(loss) and is_sampled(step, self.steps, self._spec.evaluation):
            self.report(f"answering samples after step {step}")
            samples = self._sampler.ask(self._model, between=self._stop_if_asked)
        self.clock.close()
        if not math.isfinite(loss):
            raise self._divergence(f"the held-out loss after step {step} is {loss}")
        metrics = {f"{EVALUATED}/{name}": value for name, value in figures.items()}
        with self._lock:
            self._judge(self.journal.record(step, metrics, samples))
        log.info("held-out loss after step %d: %.4f", step, loss)
        self.report("training")

    def _judge(self, evaluation: JournalRecord) -> None:
        position, spec = self._position, self._spec.evaluation
        position.standing = position.standing.after(evaluation, spec)
        if spec.keep_best and position.standing.best_step == evaluation.step > 0:
            position.best_adapter = on_host(self._model.adapter())

    # --- stopping and saving

    def _at_step_boundary(self) -> None:
        self._stop_if_asked()
        self._checkpointer.raise_if_failed()
        self._warn()
        is_due, on_its_way = self._checkpoint_due(), self._checkpointer.on_its_way
        if on_its_way is not None and (is_due or on_its_way.seconds > self._lag_limit_seconds):
            self._wait_for_the_store(on_its_way)
        if is_due:
            self.clock.enter("checkpoint")
            with self._lock:
                self._save(wait=False)
            self.clock.close()
        self._reports.announce(self._checkpointer.last)
        self.report("training")

    def _checkpoint_due(self) -> bool:
        step, spec = self._position.step, self._spec.checkpoint
        asked = self._stop.take_checkpoint_request()
        if step == 0:  # nothing is lost with it, but there may have to be a way back to it
            return self._spec.training.rolls_back and self._checkpointer.last is None
        if step == self._durable_step():
            return False
        on_step = spec.every_steps is not None and step % spec.every_steps == 0
        return asked or on_step or monotonic() - self._last_save >= spec.every_seconds

    def _wait_for_the_store(self, checkpoint: OnItsWay) -> None:
        """Let the store catch up; whoever asks to stop meanwhile is heard."""
        words = f"waiting until the checkpoint of step {checkpoint.step} is stored"
        log.warning("%s, which it has not been for %.1f s", words, checkpoint.seconds)
        self.report(words)
        self.clock.enter("checkpoint")
        started = perf_counter()
        while not self._checkpointer.is_written_within(POLL_SECONDS):
            self._warn()
            self.report(words)
            self._stop_if_asked()
        self._stall_seconds += perf_counter() - started
        self.clock.close()

    def _warn(self) -> None:
        """Say once what is wrong with the way of checkpoints to the store, and until it is no longer so."""
        warning = self._trouble_with_the_store()
        if warning is not None and self._warning is None:
            log.warning("%s", warning)
        self._warning = warning

    def _trouble_with_the_store(self) -> str | None:
        """By the speed of the last checkpoint, or of the one that takes longer."""
        on_its_way, seconds = self._checkpointer.on_its_way, self._seconds_of_a_checkpoint()
        if on_its_way is not None and on_its_way.seconds > self._lag_limit_seconds:
            return (
                f"the store has not taken the checkpoint of step {on_its_way.step} for longer than the "
                f"{self._lag_limit_seconds:g} s that it may lag behind; training waits for it"
            )
        if seconds is not None and seconds > self._grace_seconds:
            return (
                f"a checkpoint takes {seconds:.0f} s to reach the store, and a signal to stop leaves "
                f"{self._grace_seconds} s: such a stop may cost the steps since the last one that is there"
            )
        return None

    def _stop_if_asked(self) -> None:
        if self._stop.asked.is_set():
            self._preempt()

    def _stop_inside_a_step_if_need_be(self) -> None:
        if not self._stop.asked.is_set() or not self._step_seconds:
            return
        remaining_seconds = median(self._step_seconds) - (perf_counter() - self._step_started)
        if remaining_seconds + self._seconds_to_save() > self._stop.seconds_left():
            step = self._position.step + 1
            log.warning("the grace period is shorter than the rest of step %d, which is given up", step)
            self._preempt()

    def _preempt(self) -> None:
        self._say_if_there_is_no_time()
        with self._lock:
            self.save_durably()
        self._reports.announce(self._checkpointer.last)
        raise Preempted(self.result(complete=False))

    def _say_if_there_is_no_time(self) -> None:
        """Before it is tried all the same."""
        needed, left, durable = self._seconds_to_save(), self._stop.seconds_left(), self._durable_step()
        if self._position.step > durable and needed > left:
            log.warning(
                "%.0f s are left, and saving step %d may take %.0f s at the speed of the last checkpoint; if it is not "
                "stored in time, the job goes on from step %d",
                max(0.0, left),
                self._position.step,
                needed,
                durable,
            )

    def _rescue(self) -> None:
        """The watchdog's way out: the main thread is busy, perhaps for longer than the grace period lasts."""
        step = self._position.step + 1
        log.warning("the grace period runs out inside step %d; the last step boundary's state is saved", step)
        try:
            # A stream of its own does not queue behind the step that is still running.
            with torch.cuda.stream(torch.cuda.Stream()) if self._model.device.type == "cuda" else nullcontext():
                self.save_durably()
            self._reports.announce(self._checkpointer.last)
        except Exception:
            log.exception("the last step boundary's state could not be saved; the checkpoint before it counts")
        self._leave(self.result(complete=False))

    def save_durably(self) -> None:
        """Return when the state of the last step boundary is durable; step 0 needs no saving."""
        if self._position.step > self._durable_step():
            self._save(wait=True)
        else:
            self._checkpointer.finish()

    def _save(self, *, wait: bool) -> None:
        started = perf_counter()
        self._checkpointer.save(self._snapshot(), wait=wait)
        self._stall_seconds += perf_counter() - started
        self._last_save = monotonic()

    def _snapshot(self) -> Snapshot:
        position = self._position
        is_best = position.standing.best_step == position.step
        return Snapshot(
            state=TrainingState(step=position.step),
            adapter=self._model.adapter(),
            optimizer=self._optimizer.export_state(),
            journal=self.journal.records(),
            best_adapter=None if is_best else position.best_adapter,
            objective=self._objective.memory(),
        )

    def _restore(self, snapshot: Snapshot | None) -> Position:
        if snapshot is None:
            return Position()
        self._model.load_adapter(snapshot.adapter)
        self._optimizer.import_state(snapshot.optimizer)
        step, standing = snapshot.state.step, Standing.of(snapshot.journal, self._spec.evaluation)
        is_best = self._spec.evaluation.keep_best and standing.best_step == step
        best_adapter = snapshot.adapter if is_best else snapshot.best_adapter
        return Position(
            step=step,
            standing=standing,
            best_adapter=dict(best_adapter) if best_adapter is not None else None,
        )

    def _seconds_to_save(self) -> float:
        """Twice what the state and the rest of a checkpoint on its way will take, and a second for the way out."""
        on_its_way, seconds = self._checkpointer.on_its_way, self._seconds_of_a_checkpoint()
        if seconds is None:
            state = [*self._model.adapter().values(), *self._optimizer.export_state().values()]
            seconds = sum(tensor.nbytes for tensor in state) / SLOWEST_STORE_BYTES_PER_SECOND
        rest = max(0.0, seconds - on_its_way.seconds) if on_its_way is not None else 0.0
        return 2 * (seconds + rest) + 1

    def _seconds_of_a_checkpoint(self) -> float | None:
        """What the last one took, or the one on its way has taken already; None before the first."""
        on_its_way = self._checkpointer.on_its_way
        known = (self._checkpointer.last_seconds, on_its_way.seconds if on_its_way is not None else None)
        return max((seconds for seconds in known if seconds is not None), default=None)

    def _durable_step(self) -> int:
        return self._checkpointer.last.step if self._checkpointer.last else 0

    # --- results

    def final_adapter(self) -> dict[str, Tensor]:
        """What the job ends with: the last step's adapter, or the best evaluation's where the spec says so.

        Raises DivergedError where a weight is not finite: the last update is followed by no loss that would show it.
        """
        adapter = self._position.best_adapter or on_host(self._model.adapter())
        broken = [name for name, tensor in adapter.items() if not tensor.isfinite().all()]
        if broken:
            step = self._position.step
            raise self._divergence(f"{len(broken)} adapter weights are not finite after step {step}: {broken[0]}")
        return adapter

    def result(self, *, complete: bool) -> TrainResult:
        """How far training came."""
        last = self._checkpointer.last
        allocated, reserved = self._card.peak_bytes()
        return TrainResult(
            step=self._position.step if complete else self._durable_step(),
            checkpoint_uri=last.uri if last else None,
            complete=complete,
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            versions=memory_versions() if allocated is not None else None,
            **asdict(losses(self.journal.records(), self._spec.evaluation)),
        )

    def report(self, detail: str) -> None:
        """Hand the latest figures to the agent."""
        self._reports.report(
            detail,
            step=self._position.step,
            step_seconds=self._step_seconds,
            skips=self._stability.skips,
            rollbacks=self._stability.rollbacks,
            checkpoint=self._checkpointer.last,
            warning=self._warning,
        )


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's dropout and noise. Hashed, because torch's CPU generator reads 32 bits of it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:7])
