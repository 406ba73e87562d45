"""The queue, and the threads that run the model, a batch each.

Jobs come in from any thread; a batch takes the oldest question and others whose questions fit its bucket, of whatever
jobs they are. A job is done when all of its questions are.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
import dataclasses
import functools
import logging
import threading
import time
from typing import Any

from alto_jax.inference.decoding import ImageInputs
from alto_jax.inference.prediction import Answers
from alto_jax.inference.streaming import Grown
from alto_jax.serve.engine import Engine, Question, batch_size
from alto_jax.serve.metrics import Metrics

_log = logging.getLogger(__name__)
_ENDING = threading.Lock()  # Questions of one job may fail in two threads.


@dataclasses.dataclass(eq=False)
class Job:
    """Questions about one image.

    key: of the image, its own. inputs: of the model. listener: of (index of the question, a code of its mask), called
    in a thread of the model's while the answer is computed.
    """

    key: str
    inputs: ImageInputs
    questions: list[Question]
    listener: Callable[[int, Grown], None] | None = None
    given_up: bool = False
    future: Future = dataclasses.field(default_factory=Future)
    found: dict[int, "Found"] = dataclasses.field(default_factory=dict)
    batches: list[int] = dataclasses.field(default_factory=list)
    told: dict[int, int] = dataclasses.field(default_factory=dict)

    def tell(self, index: int, grown: Grown) -> None:
        """Tells the listener of a code, once: after a failure a batch is computed again."""
        if self.listener is not None and not self.given_up and len(grown.codes) > self.told.get(index, 0):
            self.told[index] = len(grown.codes)
            self.listener(index, grown)

    def give_up(self) -> None:
        """Nobody waits for it any more: what is still in the queue is not computed."""
        self.given_up = True


@dataclasses.dataclass(frozen=True)
class Found:
    """Where the answer to a question is: a row of a batch's answers."""

    answers: Answers
    row: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Waiting:
    job: Job
    index: int
    since: float

    @property
    def question(self) -> Question:
        return self.job.questions[self.index]


class Batcher:
    """Jobs in, answers out.

    Attributes:
      state: "new", "warming", "ready", "failed" or "stopped".
      failure: what ended the warm-up.
    """

    def __init__(self, engine: Engine, max_queue: int, window: float, at_once: int = 1):
        """Takes the model, the most questions in the queue, the seconds that a question waits for company, and how many
        batches are computed at the same time."""
        self.engine, self.window, self._max_queue = engine, window, max_queue
        self.state, self.failure = "new", ""
        self.metrics: Metrics | None = None
        self._reserved = 0
        self._pace = 0.1  # seconds a question, of the last batches
        self._waiting: deque[_Waiting] = deque()
        self._condition = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work if index else self._run, name=f"alto-model-{index}", daemon=True)
            for index in range(at_once)
        ]
        self._working = 0  # threads

    def start(self, on_state: Callable[[str], None] = lambda state: None) -> None:
        """Starts the threads: warm-up in the first, then batches; `on_state` hears of "ready" and "failed", in that
        one."""
        self._on_state, self.state = on_state, "warming"
        self._threads[0].start()

    @property
    def is_alive(self) -> bool:
        """Whether a thread runs."""
        return any(thread.is_alive() for thread in self._threads)

    @property
    def depth(self) -> int:
        """Questions that wait, are prepared or computed."""
        return self._reserved

    def reserve(self, count: int) -> float | None:
        """Takes places in the queue, to be given back with `release`.

        Returns:
          None; or, if there are not as many, the seconds after which there may be.
        """
        with self._condition:
            if self._reserved + count > self._max_queue:
                return max(1.0, self._reserved * self._pace)
            self._reserved += count
            return None

    def release(self, count: int) -> None:
        """Gives places back."""
        with self._condition:
            self._reserved -= count

    def submit(self, job: Job) -> Future:
        """Queues a job; when its future is done, `job.found` has the answer to each question."""
        now = time.monotonic()
        with self._condition:
            if self.state == "stopped" or not self.is_alive:
                job.future.set_exception(RuntimeError("the model's threads have ended"))
                return job.future
            self._waiting.extend(_Waiting(job, index, now) for index in range(len(job.questions)))
            self._condition.notify()
        return job.future

    def stop(self, seconds: float = 10.0) -> bool:
        """Ends the threads after their batches; returns whether they have ended. Jobs that wait fail."""
        with self._condition:
            self.state = "stopped"
            self._condition.notify_all()
        until = time.monotonic() + seconds
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(until - time.monotonic(), 0))
        return not self.is_alive

    def _run(self) -> None:
        """The first thread, which starts the others when all is compiled."""
        try:
            self.engine.warm_up(_log.info)
        except Exception as error:
            self.failure = f"the warm-up failed: {error}"
            _log.exception("the warm-up failed")
            self.state = "failed"
            self._on_state("failed")
            return
        with self._condition:
            is_ready = self.state == "warming"  # Note: it may have been stopped meanwhile.
            if is_ready:
                self.state = "ready"
                for thread in self._threads[1:]:
                    thread.start()
        if is_ready:
            self._on_state("ready")
        self._work()

    def _work(self) -> None:
        """Every thread: a batch after another."""
        with self._condition:
            self._working += 1
        while rows := self._take():
            try:
                self._answer(rows)
            except Exception as error:
                _log.exception("a batch of %d failed", len(rows))
                self._one_by_one(rows, error)
            del rows  # Note: else the last batch's images are kept until the next one comes.
        with self._condition:
            self._working -= 1
            left = [] if self._working else list(self._waiting)
        for row in left:
            _end(row.job, error=RuntimeError("the service has ended"))

    def _take(self) -> list[_Waiting]:
        """Waits for the next batch; [] when the thread is to end."""
        largest = self.engine.sizes[-1]
        with self._condition:
            while True:
                given_up = [row for row in self._waiting if row.job.given_up]
                if given_up:
                    self._waiting = deque(row for row in self._waiting if not row.job.given_up)
                    self._count("dropped", len(given_up))
                if self.state == "stopped":
                    return []
                if not self._waiting:
                    self._condition.wait()
                    continue
                left = self._waiting[0].since + self.window - time.monotonic()
                if left <= 0 or len(self._waiting) >= largest:
                    break
                self._condition.wait(left)
            rows = choose(list(self._waiting), self.engine.sizes)
            taken = set(map(id, rows))
            self._waiting = deque(row for row in self._waiting if id(row) not in taken)
            if self._waiting:
                self._condition.notify()  # Note: another thread that waits can take these.
            return rows

    def _answer(self, rows: list[_Waiting]) -> None:
        """Computes a batch and gives each job what is its own."""
        began = time.monotonic()
        engine = self.engine
        images = {row.job.key: row.job.inputs for row in rows}
        new = sum(not engine.has_seen(key) for key in images)
        encoded = dict(zip(images, engine.encode(list(images.items())), strict=True))
        listeners = [None if row.job.listener is None else functools.partial(row.job.tell, row.index) for row in rows]
        given = [encoded[row.job.key] for row in rows], [row.question for row in rows]
        answers = engine.answer(*given, listeners) if any(listeners) else engine.answer(*given)
        seconds = time.monotonic() - began
        self._pace = 0.8 * self._pace + 0.2 * seconds / len(rows)
        if self.metrics is not None:
            self.metrics.rows.observe(len(rows))
            self.metrics.computed.observe(seconds)
            for row in rows:
                self.metrics.waited.observe(began - row.since)
            self.metrics.images.labels("no").inc(new)
            self.metrics.images.labels("yes").inc(len(images) - new)
        self._count("masks", len(rows))
        self._count("padding", next(s for s in engine.sizes if s >= len(rows)) - len(rows))
        self._count("tokens", int(answers.length[: len(rows)].sum()))
        for at, row in enumerate(rows):
            self._give(row, answers, at, len(rows))

    def _give(self, row: _Waiting, answers: Answers, at: int, together: int) -> None:
        """Writes an answer into its job, whose other questions another thread may answer."""
        job = row.job
        with self._condition:
            job.found[row.index] = Found(answers, at)
            job.batches.append(together)
            is_whole = len(job.found) == len(job.questions)
        if is_whole:
            _end(job)

    def _one_by_one(self, rows: list[_Waiting], error: Exception) -> None:
        """After a batch that failed: each question alone, so that what one does is not the others' fault."""
        for row in rows:
            if row.index in row.job.found or row.job.future.done():
                continue
            try:
                if len(rows) == 1:
                    raise error
                self._answer([row])
            except Exception as own:
                row.job.give_up()
                _end(row.job, error=own)

    def _count(self, name: str, amount: int) -> None:
        if self.metrics is not None and amount:
            getattr(self.metrics, name).inc(amount)


def _end(job: Job, error: Exception | None = None) -> None:
    """Resolves a job's future, once; nobody may wait for it any more."""
    with _ENDING:
        if job.future.running() or job.future.done() or not job.future.set_running_or_notify_cancel():
            return
    if error is None:
        job.future.set_result(None)  # Note: not the job, which would be a circle of references.
    else:
        job.future.set_exception(error)


def choose(waiting: list[Any], sizes: tuple[int, ...]) -> list[Any]:
    """The next batch of what waits, oldest first.

    The bucket is that of the oldest. If there are places left that would be filled up, questions of shorter buckets,
    which that program can answer as well, take them.
    """
    width = waiting[0].question.width
    same = [row for row in waiting if row.question.width == width]
    size = batch_size(len(same), sizes)
    rows = same[:size]
    if len(rows) < size:
        rows += [row for row in waiting if row.question.width < width][: size - len(rows)]
    return rows
