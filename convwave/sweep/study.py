"""The trials of a sweep on an Optuna storage: any number of workers, on any number of machines, killed at any moment.

A worker claims a trial by adding it to the study as running, which a storage does in one step, then looks whether
another worker that lives claimed the same before it. A worker lives while it holds the lock of its file in
``DIR/workers``, which the system releases however it ends; where workers share no folder with locks, while its running
trial goes on changing. Results are keyed by configuration and seed: should two workers train the same after all, the
first trial counts, and the other is left out.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from convwave.files import write_atomic
from convwave.runs.plots import block_means
from convwave.sweep.plan import Pair, Plan, Range, held_out
from convwave.train.config import Config, Diverged, Interrupted, UsageError
from convwave.train.recipes import Recipe

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

    from convwave.data.packing import Corpus

JOURNAL, RESULTS, WORKERS = "journal.log", "results.json", "workers"
_POINTS = 40  # of a curve
_WAIT = 0.3  # seconds, until a worker without work looks again
_BEAT, _DEAD = 20.0, 120.0  # seconds between signs of life, and without any
_TRIES = 20  # suggestions of a sampler that were tried already, before the sweep is taken to be complete


class Row(NamedTuple):
    """The result of a trial.

    Attributes:
        parameters, seed: what was trained.
        loss: held-out, in nats; None unless it is complete.
        seconds, cpu_seconds: of the training, from the packed names to the network.
        state: "complete", "pruned" or "diverged".
        curve: training losses, means of some 40 blocks of steps, each with its last step.
    """

    parameters: dict[str, Any]
    seed: int
    loss: float | None
    seconds: float
    cpu_seconds: float
    state: str
    curve: list[list[float]]


class Progress:
    """What a worker reports; does nothing by itself."""

    def trial(self, rows: Sequence[Row], plan: Plan) -> None:
        """After every trial, and before the first."""

    def message(self, text: str) -> None:
        """One line of text for the user."""


class _Lock:
    """A lock for Optuna's journal that no killed process keeps, and that cuts off a line which one left unfinished."""

    def __init__(self, journal: Path) -> None:
        self._journal, self._path = journal, journal.with_suffix(".lock")

    def acquire(self) -> bool:
        self._file = open(self._path, "a")  # noqa: SIM115 (until release)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        with open(self._journal, "rb+") as journal:
            if journal.seek(0, os.SEEK_END):
                journal.seek(-1, os.SEEK_END)
                if journal.read(1) != b"\n":
                    journal.seek(0)
                    journal.truncate(journal.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._file.close()


def _has_locks(journal: Path) -> bool:
    """Whether the folder's file system has locks."""
    if fcntl is None:
        return False
    try:
        with open(journal.with_suffix(".lock"), "a") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
    except OSError:
        return False
    return True


def open_storage(out: Path, url: str | None) -> BaseStorage:
    """The journal in a sweep's folder, or the storage of a URL: ``grpc://HOST:PORT`` or one of SQLAlchemy's or Redis.

    Raises:
        UsageError: Optuna is missing, or the URL cannot be opened.
    """
    try:
        import optuna
        from optuna.storages import GrpcStorageProxy, JournalStorage, get_storage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise UsageError(f"sweep: needs optuna, pip install 'convwave[sweep]' ({error})") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url is None:
        journal = out / JOURNAL
        try:
            lock: Any = _Lock(journal) if _has_locks(journal) else None  # None is Optuna's own, by links
            return JournalStorage(JournalFileBackend(str(journal), lock))
        except ValueError as error:
            raise UsageError(f"{journal}: is no journal of a sweep: {error}") from None
    try:
        if url.startswith("grpc://"):
            host, _, port = url.removeprefix("grpc://").rpartition(":")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                proxy = GrpcStorageProxy(host=host, port=int(port))
            proxy.wait_server_ready(timeout=30)
            return proxy
        return get_storage(url)
    except Exception as error:  # of Optuna, SQLAlchemy, its driver, gRPC
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(f"--storage: cannot be opened: {type(error).__name__}: {reason}") from None


def open_study(out: Path, storage: BaseStorage, plan: Plan | None = None, data_sha256: str = "") -> tuple[Study, Plan]:
    """The study of a sweep, which `plan` begins or continues; without a plan, the one that is there.

    Raises:
        UsageError: no study there, or the plan is of another sweep than the study.
    """
    import optuna

    name = out.resolve().name
    try:
        if plan is None:
            study = optuna.load_study(study_name=name, storage=storage)
        else:
            study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
    except KeyError:
        raise UsageError(f"{out}: holds no sweep") from None
    begun = study.user_attrs
    if plan is None:
        if "plan" not in begun:
            raise UsageError(f"{out}: holds no sweep")
        return study, Plan.from_json(begun["plan"])
    ours = {**plan.to_json(), "data_sha256": data_sha256}
    theirs = {**begun["plan"], "data_sha256": begun["data_sha256"]} if "plan" in begun else ours
    for field, value in ours.items():
        if value != theirs[field] and field not in ("trials", "seconds", "seeds"):
            before = theirs[field]
            raise UsageError(f"{field}: the sweep in {out} was begun with {before}, cannot continue with {value}")
    if set(theirs["seeds"]) - set(plan.seeds):
        raise UsageError(f"seeds: the sweep in {out} has {theirs['seeds']}, more can be added, none taken away")
    if begun.get("plan") != plan.to_json():
        study.set_user_attr("data_sha256", data_sha256)
        study.set_user_attr("plan", plan.to_json())
    return study, plan


def rows_of(study: Study) -> list[Row]:
    """The results so far, one for each configuration and seed."""
    return list(_results(study.get_trials(deepcopy=False)).values())


def _results(trials: Sequence[FrozenTrial]) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for trial in trials:  # in the order of their numbers
        found = trial.user_attrs.get("result")
        if found is not None:
            pair = _pair(trial)
            rows.setdefault(pair.key, Row(pair.parameters, pair.seed, **found))
    return rows


def _pair(trial: FrozenTrial) -> Pair:
    return Pair(dict(trial.params), trial.user_attrs["seed"])


class Prepared:
    """The names of a sweep: packed once, with the graphs and the evaluation that all its trainings share.

    Args:
        corpus: the words; its validation and test splits are not looked at.
    """

    def __init__(self, corpus: Corpus) -> None:
        from convwave.data.packing import pack

        rest, self.held_out = held_out(corpus.splits.train)
        self.corpus, self.vocabulary = corpus, corpus.vocabulary
        self.train = pack(rest, self.vocabulary)
        self._evaluations: dict[tuple[Any, ...], Any] = {}

    def loss(self, config: Config, model: Any) -> float:
        """Of a network on the names held out."""
        from convwave.data.packing import Splits
        from convwave.infer.score import EvaluationSet

        key = (config.factors, config.device)
        if key not in self._evaluations:
            splits = Splits([], self.held_out, [])
            self._evaluations[key] = EvaluationSet(splits, self.vocabulary, *key)
        return float(self._evaluations[key].losses(model)["val"].loss)


class Training:
    """One training of a sweep.

    Args:
        config: what and how.
        prepared: the names.

    Attributes:
        losses: of the steps done.
        seconds, cpu_seconds: of the training so far, without evaluations.
    """

    def __init__(self, config: Config, prepared: Prepared) -> None:
        self.config, self.prepared = config, prepared
        self.losses: list[float] = []
        self.seconds = self.cpu_seconds = 0.0

    def loss(
        self,
        points: Sequence[int] = (),
        seen: Callable[[int, float], bool] = lambda step, loss: False,
        tick: Callable[[], None] = lambda: None,
    ) -> float | None:
        """Train; the network's loss on the names held out, None for a training that was ended.

        Args:
            points: steps after which `seen` gets step and held-out loss, and ends the training by True.
            tick: called after every step, or block of them; may raise.

        Raises:
            Diverged: a loss that is not finite.
        """
        from convwave.train.loop import blocks, few_threads
        from convwave.train.tiers import begin

        config, prepared = self.config, self.prepared
        with self._timed():
            run = begin(config, prepared.train, prepared.vocabulary)
        run.prepare(lambda text: None)
        with few_threads(config, run.model().num_parameters, prepared.train):
            for stop in (*(point for point in points if point < config.steps), config.steps):
                with self._timed():
                    for losses in blocks(run, len(self.losses), stop):
                        self.losses += losses
                        tick()
                if stop < config.steps and seen(stop, prepared.loss(config, run.finish())):
                    return None
            with self._timed():
                model = run.finish()
            return prepared.loss(config, model)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began
            self.cpu_seconds += time.process_time() - cpu

    def result(self) -> dict[str, Any]:
        """Times and curve, as in `Row`."""
        curve = [[block.last_step, round(block.mean_loss, 4)] for block in block_means(self.losses, _POINTS)]
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "curve": curve}


class Worker:
    """One process of a sweep.

    Args:
        plan: what to try.
        prepared: on which names.
        out: the sweep's folder.
        url: of the storage; None is the journal in `out`.
        progress: of this worker.
        interrupted: says whether the user has asked to stop.
        source: where the results come from, to be stored with them; see `registry.provenance`.
    """

    def __init__(
        self,
        plan: Plan,
        prepared: Prepared,
        out: Path,
        url: str | None = None,
        progress: Progress | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        source: dict[str, Any] | None = None,
    ) -> None:
        import optuna

        self.plan, self.prepared, self.out, self.source = plan, prepared, out, source
        self.progress, self.interrupted = progress or Progress(), interrupted
        self.storage = open_storage(out, url)
        self.study, _ = open_study(out, self.storage, plan, prepared.corpus.sha256)
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        trials = len(self.study.get_trials(deepcopy=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.sampler = optuna.samplers.TPESampler(seed=trials, constant_liar=True)
        self.study.pruner = optuna.pruners.MedianPruner() if plan.prune_at else optuna.pruners.NopPruner()
        self._distributions = {name: distribution(name, values) for name, values in plan.parameters.items()}
        self._queue = None if plan.sampler == "tpe" else plan.pairs()
        self._beats: dict[int, tuple[Any, float]] = {}  # by running trial, its last sign of life and when it came

    def work(self) -> list[Row]:
        """Do trials until all are done; returns all results, this worker's and others'.

        Raises:
            Interrupted: the user has asked to stop.
        """
        with self._alive():
            while True:
                trials = self.study.get_trials(deepcopy=False)
                results = _results(trials)
                self.progress.trial(list(results.values()), self.plan)
                if self.interrupted():
                    raise self._stopped()
                if len(results) >= self.plan.number or self._out_of_time(results):
                    break
                running = {_pair(trial).key for trial in trials if self._lives(trial)}
                number = self._claim(results, running, trials)
                if number is not None:
                    self._do(number)
                elif running:
                    time.sleep(_WAIT)  # for workers that may be killed yet
                else:
                    break
        rows = rows_of(self.study)
        self.write(rows)
        return rows

    def write(self, rows: Sequence[Row]) -> None:
        """The results so far, into the folder."""
        write_results(self.out, self.plan, rows, self.source)

    def _stopped(self) -> Interrupted:
        """What to raise when the user asks to stop; the results so far are written."""
        rows = rows_of(self.study)
        self.write(rows)
        return Interrupted(f"{len(rows)} of {self.plan.number} trials are done")

    def _out_of_time(self, results: dict[str, Row]) -> bool:
        return self.plan.seconds is not None and sum(r.seconds for r in results.values()) >= self.plan.seconds

    def _claim(self, results: dict[str, Row], running: set[str], trials: Sequence[FrozenTrial]) -> int | None:
        """The number of a trial that is now this worker's; None where nothing is left to begin."""
        pruned = {json.dumps(row.parameters, sort_keys=True) for row in results.values() if row.state == "pruned"}
        for pair in self._pending(results, running, trials):
            if json.dumps(pair.parameters, sort_keys=True) in pruned or pair.key in results or pair.key in running:
                continue
            number = self._add(pair)
            if number is not None:
                return number
        return self._suggest(results, running) if self._queue is None else None

    def _pending(self, results: dict[str, Row], running: set[str], trials: Sequence[FrozenTrial]) -> Iterator[Pair]:
        """Trials that are known, done or not, in order."""
        if self._queue is not None:
            yield from self._queue
            return
        begun = {
            json.dumps(dict(trial.params), sort_keys=True): dict(trial.params) for trial in trials if _keyed(trial)
        }
        if self.plan.own is not None:
            begun = {json.dumps(self.plan.own, sort_keys=True): self.plan.own, **begun}
        room = self.plan.number - len(results.keys() | running)
        for parameters in begun.values():  # TPE: the other seeds of a configuration before a new one
            for seed in self.plan.seeds:
                if room <= 0:
                    return
                yield Pair(parameters, seed)

    def _add(self, pair: Pair) -> int | None:
        """Claim a trial; None where another worker was first."""
        import optuna

        claim = secrets.token_hex(8)
        attributes = {"seed": pair.seed, "worker": self.name, "claim": claim}
        self.study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=pair.parameters,
                distributions=self._distributions,
                user_attrs=attributes,
            )
        )
        trials = self.study.get_trials(deepcopy=False)
        mine = next(trial.number for trial in trials if trial.user_attrs.get("claim") == claim)
        return mine if self._first(mine, pair) else None

    def _first(self, mine: int, pair: Pair) -> bool:
        """Whether no other worker has claimed it before, nor the last trial that was left; else it is given up."""
        before = self.study.get_trials(deepcopy=False)[:mine]
        keys = {_pair(trial).key for trial in before if "result" in trial.user_attrs or self._lives(trial)}
        if pair.key in keys or len(keys) >= self.plan.number:
            self._release(mine)
            return False
        return True

    def _suggest(self, results: dict[str, Row], running: set[str]) -> int | None:
        """A new configuration of the sampler, with the first seed."""
        import optuna

        if len(results.keys() | running) >= self.plan.number:
            return None
        blank = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
        sampler = self.study.sampler
        for _ in range(_TRIES):
            suggested = {
                name: sampler.sample_independent(self.study, blank, name, of)
                for name, of in self._distributions.items()
            }
            pair = Pair(suggested, self.plan.seeds[0])
            if pair.key not in results and pair.key not in running:
                number = self._add(pair)
                if number is not None:
                    return number
        return None

    def _do(self, number: int) -> None:
        """Train a claimed trial and write its result."""
        import optuna

        frozen = self.study.get_trials(deepcopy=False)[number]
        trial = optuna.trial.Trial(self.study, frozen._trial_id)
        beat = time.monotonic()

        def tick() -> None:
            nonlocal beat
            if self.interrupted():
                raise Interrupted("stopped")
            if time.monotonic() - beat > _BEAT:
                beat = time.monotonic()
                trial.set_user_attr("beat", secrets.token_hex(4))

        def seen(step: int, loss: float) -> bool:
            trial.report(loss, step)
            return trial.should_prune()

        states = optuna.trial.TrialState
        training = Training(self.plan.config(_pair(frozen), self.prepared.corpus), self.prepared)
        loss = None
        try:
            loss = training.loss(self.plan.prune_at, seen, tick)
            state, told = ("complete", states.COMPLETE) if loss is not None else ("pruned", states.PRUNED)
        except Diverged:
            state, told = "diverged", states.FAIL
        except (Interrupted, KeyboardInterrupt):
            self._release(number)
            raise self._stopped() from None
        trial.set_user_attr("result", {"loss": loss, "state": state, **training.result()})
        self.study.tell(number, loss, told)

    def _release(self, number: int) -> None:
        """Give a trial up that has no result: another worker may claim it."""
        import optuna

        with suppress(Exception):  # another worker did so already
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)

    def _lives(self, trial: FrozenTrial) -> bool:
        """Whether a trial is running, and its worker lives; the trial of one that does not is given up."""
        if trial.state.is_finished() or not _keyed(trial) or "result" in trial.user_attrs:
            return False
        worker = trial.user_attrs["worker"]
        alive = True if worker == self.name else self._holds_lock(worker)
        if alive is None:
            beat, now = trial.user_attrs.get("beat"), time.monotonic()
            before = self._beats.get(trial.number)
            if before is None or before[0] != beat:
                self._beats[trial.number] = before = (beat, now)
            alive = now - before[1] < _DEAD
        if not alive:
            self._release(trial.number)
        return alive

    def _holds_lock(self, worker: str) -> bool | None:
        """Whether a worker holds the lock of its file; None where that cannot be told from here."""
        if fcntl is None:
            return None
        try:
            with open(self.out / WORKERS / worker) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no such file, or no locks
            return None
        return False

    @contextmanager
    def _alive(self) -> Iterator[None]:
        path = self.out / WORKERS / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _keyed(trial: FrozenTrial) -> bool:
    """Whether it says what it trains and whose it is, as all trials of workers do."""
    return "seed" in trial.user_attrs and "worker" in trial.user_attrs


def distribution(name: str, values: tuple[Any, ...] | Range) -> Any:
    """Optuna's distribution of a parameter."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(values, Range):
        return CategoricalDistribution(values)
    if Recipe.__dataclass_fields__[name].type == "int":
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def write_results(out: Path, plan: Plan, rows: Sequence[Row], source: dict[str, Any] | None) -> None:
    """Write a sweep's results into its folder, a trial a line."""
    values = results_json(plan, rows)
    trials = ",\n".join(json.dumps(row) for row in values.pop("trials"))
    head = json.dumps({"provenance": source, **values}, indent=1).removesuffix("\n}")
    write_atomic(out / RESULTS, f'{head},\n "trials": [\n{trials}\n ]\n}}\n'.encode())


def results_json(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """A sweep and its results as plain JSON values, trials in the order of the plan's configurations and seeds."""
    if plan.sampler != "tpe":
        places = {pair.key: number for number, pair in enumerate(plan.pairs())}
        rows = sorted(rows, key=lambda row: places.get(Pair(row.parameters, row.seed).key, len(places)))
    return {"plan": plan.to_json(), "trials": [row._asdict() for row in rows]}
