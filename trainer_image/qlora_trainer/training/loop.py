"""The training loop: step, border, evaluation, checkpoint, until done or asked to stop.

`train` builds it, restores it from a checkpoint and runs it. Rules:

- A step is a function of the state at the border before it: rows, noise and dropout come from seeds that depend on the
  job's seed and the step alone, the learning rate from the step. So a resumed run goes on bit for bit.
- From border to border the adapter, the optimizer and the journal stay as they are; they change together, under a lock,
  when a step is complete. So whoever holds the lock may save a checkpoint at any instant, in the middle of a step too:
  it is the one of the last border.
- Asked to stop, the loop ends at the next border if the notice allows for that, and at once if not.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from statistics import median
from time import monotonic, perf_counter

import torch
from torch import Tensor

from orchestrator.api.formats import Metric
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.results import ProgressReport, TrainResult
from orchestrator.api.task import StageTask
from qlora_trainer.data.micro_batch import PreparedRows, Schedule, micro_batches, supervised_tokens
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.outcome import DivergedError, Preempted
from qlora_trainer.storage.checkpoint import (
    BestEvaluation,
    Checkpointer,
    Snapshot,
    TrainingState,
    memory_versions,
    on_host,
)
from qlora_trainer.storage.journal import Journal
from qlora_trainer.storage.journal_summary import losses, values
from qlora_trainer.training.evaluation import evaluate, is_due
from qlora_trainer.training.optimizer import AdapterOptimizer, learning_rate
from qlora_trainer.training.stop import AgentClient, Stop, Watchdog
from qlora_trainer.training.telemetry import Arithmetic, Card, PhaseClock

STEP_TIMES_KEPT = 20
SLOWEST_STORE_BYTES_PER_SECOND = 50e6
"""Assumed until a checkpoint has been written."""

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Position:
    """Where training is: all of its state that is neither in the model nor in the optimizer nor in the journal."""

    step: int = 0
    best: BestEvaluation | None = None
    best_adapter: dict[str, Tensor] | None = None
    """On the host; kept where the job ends with its best adapter."""
    evaluations_without_gain: int = 0


class Loop:
    """One attempt's way through the steps."""

    def __init__(
        self,
        *,
        task: StageTask,
        model: TrainingModel,
        train_rows: PreparedRows,
        eval_rows: PreparedRows | None,
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
        self._plan: MemoryPlan = task.plan
        self.steps = task.prepared.steps
        self._model = model
        self._train_rows = train_rows
        self._eval_rows = eval_rows
        self._schedule = Schedule(
            rows=len(train_rows), global_batch_size=task.spec.training.global_batch_size, seed=task.spec.training.seed
        )
        self._optimizer = AdapterOptimizer(model.trainable(), task.spec.training)
        self._parameters = [parameter for _, parameter in model.trainable()]
        self._checkpointer = checkpointer
        self._saves = 0
        self._last_save = monotonic()
        self._stall_seconds = 0.0  # for which saving held up training, since a step was recorded
        self._stop = stop
        self._agent = agent
        self._announced_step = 0
        self._leave = leave
        self._lock = threading.RLock()
        self._step_seconds: deque[float] = deque(maxlen=STEP_TIMES_KEPT)
        self._step_started = perf_counter()
        self.journal = Journal(resumed.journal if resumed else ())
        self._position = self._restore(resumed)
        self._arithmetic = arithmetic(model)
        self._card = Card(model.device, _last(self.journal, Metric.ENERGY_JOULES) or 0.0)
        self.clock = PhaseClock(model.device)

    # --- the way

    def run(self) -> None:
        """Train to the end; raises Preempted, with a durable checkpoint, when asked to stop."""
        watchdog = Watchdog(self._stop, self._lock, seconds_needed=self._seconds_to_save, rescue=self._rescue)
        with watchdog.watching():
            self._border()
            self._evaluate_if_due()
            while not self._done():
                self._train_one_step()
                self._border()
                self._evaluate_if_due()
            with self._lock:  # the end is reached: from here on the result is finished, whoever asks to stop
                pass

    def _done(self) -> bool:
        patience = self._spec.evaluation.early_stopping_patience
        if 0 < patience <= self._position.evaluations_without_gain:
            log.info("stopped early at step %d: %d evaluations without a better loss", self._position.step, patience)
            return True
        return self._position.step >= self.steps

    def _train_one_step(self) -> None:
        step, training = self._position.step, self._spec.training
        self._step_started = perf_counter()
        self.clock.enter("data")
        rows = self._schedule.rows_of_step(step)
        batches = list(micro_batches(self._train_rows, rows, self._plan.micro_batch_size))
        supervised = max(1, supervised_tokens(self._train_rows, rows))
        torch.manual_seed(step_seed(training.seed, step))
        self._model.train()
        total = torch.zeros((), device=self._model.device)
        for batch in batches:
            self.clock.enter("forward")
            total += self._model.accumulate(batch, divisor=supervised, between=lambda: self.clock.enter("backward"))
            self._stop_inside_a_step_if_need_be()
        self.clock.enter("optimizer")
        norm = gradient_norm(self._parameters)
        self._refuse_to_diverge(step, total.item(), norm.item())
        rate = learning_rate(step, self.steps, training)
        with self._lock:
            clip(self._parameters, norm.item(), float(training.max_grad_norm))
            self._optimizer.step(rate)
            self.clock.close()
            seconds = perf_counter() - self._step_started
            self._step_seconds.append(seconds)
            self._position.step = step + 1
            metrics = {
                Metric.TRAIN_LOSS: total.item(),
                Metric.LEARNING_RATE: rate,
                Metric.GRADIENT_NORM: norm.item(),
                Metric.TOKENS_PER_SECOND: sum(batch.tokens for batch in batches) / seconds,
                Metric.CHECKPOINT_STALL_SECONDS: self._stall_seconds,
            }
            self._stall_seconds = 0.0
            metrics |= self._card.metrics(self._arithmetic.operations(batches), seconds)
            self.journal.record(step + 1, metrics)
        log.info("step %d of %d: loss %.4f, %.2f s", step + 1, self.steps, metrics[Metric.TRAIN_LOSS], seconds)

    def _refuse_to_diverge(self, step: int, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        self._checkpointer.finish()  # the one that is being written is kept too, and the message is to name it
        last = self._checkpointer.last
        kept = f"the checkpoint of step {last.step} is kept at {last.uri}" if last else "there is no checkpoint yet"
        raise DivergedError(
            f"training diverged in step {step + 1}: loss {loss}, gradient norm {norm}; {kept}; "
            "lower training.learningRate, raise warmupRatio, or look for broken records in the dataset"
        )

    def _evaluate_if_due(self) -> None:
        step = self._position.step
        if self._eval_rows is None or not is_due(step, self.steps, self._spec.evaluation, self.journal.records()):
            return
        self.report(f"evaluating after step {step}")
        self.clock.enter("evaluation")
        loss = evaluate(self._model, self._eval_rows, self._plan.micro_batch_size, between=self._stop_if_asked)
        self.clock.close()
        with self._lock:
            self.journal.record(step, {Metric.EVAL_LOSS: loss})
            if step > 0:  # the untouched base is what is to be beaten, not a result
                self._judge(step, loss)
        log.info("held-out loss after step %d: %.4f", step, loss)
        self.report("training")

    def _judge(self, step: int, loss: float) -> None:
        if self._position.best is None or loss < self._position.best.loss:
            self._position.best = BestEvaluation(step=step, loss=loss)
            self._position.evaluations_without_gain = 0
            if self._spec.evaluation.keep_best:
                self._position.best_adapter = on_host(self._model.adapter())
        else:
            self._position.evaluations_without_gain += 1

    # --- stopping and saving

    def _border(self) -> None:
        self._stop_if_asked()
        self._checkpointer.raise_if_failed()
        if self._checkpoint_due():
            self.clock.enter("checkpoint")
            with self._lock:
                self._save(wait=False)
            self.clock.close()
        self._announce()
        self.report("training")

    def _checkpoint_due(self) -> bool:
        step, spec = self._position.step, self._spec.checkpoint
        asked = self._stop.take_checkpoint_request()
        if step == 0 or step == self._durable_step():
            return False
        on_step = spec.every_steps is not None and step % spec.every_steps == 0
        return asked or on_step or monotonic() - self._last_save >= spec.every_seconds

    def _stop_if_asked(self) -> None:
        if self._stop.asked.is_set():
            self._preempt()

    def _stop_inside_a_step_if_need_be(self) -> None:
        if not self._stop.asked.is_set() or not self._step_seconds:
            return
        to_border_seconds = median(self._step_seconds) - (perf_counter() - self._step_started)
        if to_border_seconds + self._seconds_to_save() > self._stop.seconds_left():
            log.warning("the notice is shorter than the rest of step %d, which is given up", self._position.step + 1)
            self._preempt()

    def _preempt(self) -> None:
        with self._lock:
            self.save_durably()
        self._announce()
        raise Preempted(self.result(complete=False))

    def _rescue(self) -> None:
        """The watchdog's way out: the main thread is busy, perhaps for longer than the notice lasts."""
        log.warning("the notice runs out inside step %d; the last border's state is saved", self._position.step + 1)
        try:
            # A stream of its own does not queue behind the step that is still running.
            with torch.cuda.stream(torch.cuda.Stream()) if self._model.device.type == "cuda" else nullcontext():
                self.save_durably()
            self._announce()
        except Exception:
            log.exception("the last border's state could not be saved; the checkpoint before it counts")
        self._leave(self.result(complete=False))

    def save_durably(self) -> None:
        """Return when the present border's state is durable; step 0 needs no saving."""
        if self._position.step > self._durable_step():
            self._save(wait=True)
        else:
            self._checkpointer.finish()

    def _save(self, *, wait: bool) -> None:
        started = perf_counter()
        self._checkpointer.save(self._snapshot(), wait=wait)
        self._stall_seconds += perf_counter() - started
        self._saves += 1
        self._last_save = monotonic()

    def _snapshot(self) -> Snapshot:
        position = self._position
        is_best = position.best is not None and position.best.step == position.step
        return Snapshot(
            state=TrainingState(
                step=position.step,
                cursor={"epoch": self._schedule.epoch(position.step)},
                random={"seed": self._spec.training.seed},
                optimizer={"name": self._spec.training.optimizer},
                loss_window=[],
                best=position.best,
                evaluations_without_gain=position.evaluations_without_gain,
            ),
            adapter=self._model.adapter(),
            optimizer=self._optimizer.export_state(),
            journal=self.journal.records(),
            best_adapter=None if is_best else position.best_adapter,
        )

    def _restore(self, snapshot: Snapshot | None) -> Position:
        if snapshot is None:
            return Position()
        self._model.load_adapter(snapshot.adapter)
        self._optimizer.import_state(snapshot.optimizer)
        state = snapshot.state
        is_best = state.best is not None and state.best.step == state.step
        best_adapter = snapshot.adapter if is_best else snapshot.best_adapter
        return Position(
            step=state.step,
            best=state.best,
            best_adapter=dict(best_adapter) if best_adapter is not None else None,
            evaluations_without_gain=state.evaluations_without_gain,
        )

    def _seconds_to_save(self) -> float:
        """Twice what a checkpoint took so far, and a second for the way out."""
        if self._saves and self._checkpointer.background_seconds:
            return 2 * self._checkpointer.background_seconds / self._saves + 1
        state = [*self._model.adapter().values(), *self._optimizer.export_state().values()]
        return 2 * sum(tensor.nbytes for tensor in state) / SLOWEST_STORE_BYTES_PER_SECOND + 1

    def _durable_step(self) -> int:
        return self._checkpointer.last.step if self._checkpointer.last else 0

    # --- telling

    def final_adapter(self) -> dict[str, Tensor]:
        """What the job ends with: the last step's adapter, or the best evaluation's where the spec says so."""
        return self._position.best_adapter or on_host(self._model.adapter())

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
            **asdict(losses(self.journal.records(), keep_best=self._spec.evaluation.keep_best)),
        )

    def report(self, detail: str) -> None:
        """Hand the latest figures to the agent."""
        if self._agent is None:
            return
        last, step = self._checkpointer.last, self._position.step
        self._agent.report(
            ProgressReport(
                stage="train",
                step=step,
                steps=self.steps,
                detail=detail,
                loss=_last(self.journal, Metric.TRAIN_LOSS),
                eval_loss=_last(self.journal, Metric.EVAL_LOSS),
                tokens_per_second=_last(self.journal, Metric.TOKENS_PER_SECOND),
                eta_seconds=median(self._step_seconds) * (self.steps - step) if self._step_seconds else None,
                checkpoint_step=last.step if last else None,
                checkpoint_uri=last.uri if last else None,
                time=datetime.now(tz=UTC),
            )
        )

    def _announce(self) -> None:
        last = self._checkpointer.last
        if self._agent is not None and last is not None and last.step > self._announced_step:
            self._announced_step = last.step
            self._agent.announce_checkpoint(last.step, last.uri)


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's dropout and noise. Hashed, because torch's CPU generator reads 32 bits of it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:7])


def gradient_norm(parameters: list[torch.nn.Parameter]) -> Tensor:
    """The norm of all gradients together, in float32: bfloat16 would round it to three digits."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(_gradients(parameters), 2, torch.float32)))


def clip(parameters: list[torch.nn.Parameter], norm: float, largest_norm: float) -> None:
    """Scale all gradients down to the largest norm, if they exceed it (Pascanu et al., 2013).

    torch's own takes a tensor for the norm, which costs a launch for every parameter.
    """
    if norm > largest_norm:
        torch._foreach_mul_(_gradients(parameters), largest_norm / norm)


def _gradients(parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def arithmetic(model: TrainingModel) -> Arithmetic:
    """How many operations a step of this model takes."""
    config = model.base.config.get_text_config()
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Arithmetic(
        linear_weights=model.linear_weights(),
        layers=config.num_hidden_layers,
        attention_width=config.num_attention_heads * head_width,
    )


def _last(journal: Journal, metric: Metric) -> float | None:
    found = values(journal.records(), metric)
    return found[-1] if found else None
