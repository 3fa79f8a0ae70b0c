"""The host of served models: loading, memory budget, hand-over from version to version, and restart."""

import asyncio
import contextlib
import logging
import math
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from slmops.infra import errors
from slmops.infra.foundry.model_process import ModelProcess
from slmops.infra.foundry.served_model import Busy, ModelSource, NotLoaded, NotServed, RunningModel, ServedVersion
from slmops.infra.server_settings import ServeSettings
from slmops.infra.storage.holders import name_prefix
from slmops.infra.storage.leftovers import leftovers_in, remove

LOG = logging.getLogger("slmops.serve")
FIRST_BACK_OFF_S = 0.5
LONGEST_BACK_OFF_S = 30.0
STEADY_S = 60.0  # a process that ran this long had started correctly
# Weights and the runtime itself; in use, the KV cache needs additional memory.
MEMORY_PER_SIZE = 1.2
MEMORY_OF_RUNTIME_BYTES = 100_000_000
PROBE = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1, "temperature": 0}


class ModelHost:
    """Runs one process per served version; all methods belong to one event loop."""

    def __init__(self, source: ModelSource, settings: ServeSettings, work_dir: Path, log_dir: Path) -> None:
        self.champions: dict[str, ServedVersion] = {}
        self._source = source
        self._settings = settings
        self._work_dir = work_dir
        self._log_dir = log_dir
        self._models: dict[ServedVersion, RunningModel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Lock()
        self._is_closing = False

    @property
    def models(self) -> list[RunningModel]:
        """The versions that are or were loaded, except those that were dropped."""
        return list(self._models.values())

    @property
    def is_ready(self) -> bool:
        """Whether a model is loaded and the server is not stopping."""
        return bool(self.champions) and not self._is_closing and any(model.is_loaded for model in self.models)

    @property
    def failing(self) -> list[str]:
        """The ids of champions that could not be loaded at the last attempt."""
        return [model.served.model_id for model in self.models if model.fault and self._is_champion(model)]

    def state_of(self, served: ServedVersion) -> dict[str, str]:
        """Return whether a version is loaded, and why it cannot be loaded."""
        running = self._models.get(served)
        if running and running.fault:
            return {"state": "failed", "reason": running.fault}
        return {"state": "loaded" if running and running.is_loaded else "not loaded"}

    async def start(self, names: Sequence[str] = ()) -> None:
        """Read the champions of these names, and load as many as the memory allows.

        Without names, it loads the champion of every name, without those that cannot be read. A champion that cannot be
        loaded is tried again. Raises what the source raises, and `StageFailed` when none can be loaded.
        """
        remove(leftovers_in(self._work_dir))  # of servers that were killed
        failures = await self._read_champions(names)
        for served in self.champions.values():
            running = self._model(served)
            try:
                await self.ensure_loaded(running)
            except Busy:
                break
            except Exception as error:  # a version of others may have any fault
                LOG.warning("%s cannot be loaded: %s", served.model_id, error)
                failures.append(error)
        if failures and not any(model.is_loaded for model in self.models):
            raise failures[0]
        for running in self.models:
            if running.fault:
                self._keep(self._start_again(running))

    async def _read_champions(self, names: Sequence[str]) -> list[Exception]:
        failures: list[Exception] = []
        for name in names or await asyncio.to_thread(self._source.names):
            try:
                self.champions[name] = await asyncio.to_thread(self._source.champion, name)
            except Exception as error:
                if names:
                    raise
                LOG.warning("%s cannot be served: %s", name, error)
                failures.append(error)
        return failures

    async def close(self) -> None:
        """Wait for running requests, at most for the time in the settings; then end all processes."""
        self._is_closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_s):
                for model in self.models:
                    await model.unused.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for model in self.models:
            try:
                await self._unload(model)
                await model.client.aclose()
            except Exception:
                LOG.exception("%s could not be ended", model.served.model_id)

    async def resolve(self, model: str) -> ServedVersion:
        """Return what a request's `model` names: `NAME` (its champion), `NAME:VERSION` or `NAME@VERSION`.

        Raises `NotServed`.
        """
        if model in self.champions:
            return self.champions[model]
        name, _, number = model.replace("@", ":").rpartition(":")
        if name in self.champions and number.isdecimal() and len(number) < 10:
            if self.champions[name].version == int(number):
                return self.champions[name]
            known = next((model for model in self._models if model.model_id == f"{name}:{number}"), None)
            if known:
                return known
            with contextlib.suppress(errors.SlmopsError):
                return await asyncio.to_thread(self._source.version, name, int(number))
        raise NotServed(
            f"The model {model[:100]!r} does not exist.", f"Served are: {', '.join(sorted(self.champions))}."
        )

    @asynccontextmanager
    async def turn(self, model: str) -> AsyncIterator[RunningModel]:
        """Wait for a turn with a model and load it if necessary; the version stays loaded until the turn ends.

        Raises `NotServed`; `Busy` when too many wait; `StageFailed` when it cannot be loaded.
        """
        if self._is_closing:
            raise Busy("The server is stopping.", "Try again after its next start.")
        running = self._model(await self.resolve(model))
        if running.waiting >= self._settings.max_queue:
            raise Busy(f"{running.waiting} requests already wait for {model}.", "Try again later.")
        running.waiting += 1
        running.unused.clear()
        try:
            try:
                await running.turns.acquire()
            finally:
                running.waiting -= 1
            running.active += 1
            try:
                await self.ensure_loaded(running)
                yield running
            finally:
                running.active -= 1
                running.used_at = time.monotonic()
                running.turns.release()
                if self._memory_bytes() > (self._settings.max_memory_bytes or math.inf):
                    self._keep(self._free_memory(running))
        finally:
            if not running.active and not running.waiting:
                running.unused.set()

    async def hand_over(self, name: str, version: int) -> tuple[ServedVersion, ServedVersion | None]:
        """Make `name` mean another version, after that version was loaded and has answered.

        Running requests finish on the former version, which is unloaded then. Returns the new and the former one;
        raises `NotServed`, and `StageFailed` or `BadInput` with nothing changed.
        """
        former = self.champions.get(name)
        if former is None:
            raise NotServed(f"{name} is not served here.", f"Served are: {', '.join(sorted(self.champions))}.")
        served = await asyncio.to_thread(self._source.version, name, version)
        await self.go_over(served)
        return served, former

    async def go_over(self, served: ServedVersion) -> None:
        """Make the version's name mean this version, as `hand_over` does; the name may be new."""
        former = self.champions.get(served.name)
        running = self._model(served)
        if served == former and running.is_loaded:
            return
        try:
            await self.ensure_loaded(running)
            await self._probe(running)
        except BaseException:
            if served != former:
                self._retire(running)
            raise
        self.champions[served.name] = served
        running.is_retired = False
        LOG.info("%s is %s now", served.name, served.model_id)
        if former is not None and former != served and former in self._models:
            self._retire(self._models[former])

    def _model(self, served: ServedVersion) -> RunningModel:
        if served not in self._models:
            self._models[served] = RunningModel(served, self._settings)
        return self._models[served]

    async def ensure_loaded(self, running: RunningModel) -> None:
        """Load a model if needed, after a back-off if it crashed.

        Raises `StageFailed`; `NotLoaded` during the back-off after a failed attempt; `Busy` without memory.
        """
        async with running.loading:
            if running.is_loaded:
                return
            delay_s = running.not_before - time.monotonic()
            if delay_s > 0 and running.fault:
                raise NotLoaded(running.served.model_id, delay_s)
            await asyncio.sleep(max(0, delay_s))
            try:
                await self._load(running)
            except Busy:
                raise
            except Exception as error:
                running.fault = str(error)
                self._put_off(running)
                raise
            running.fault = None

    def _put_off(self, running: RunningModel) -> None:
        running.failures += 1
        back_off_s = min(LONGEST_BACK_OFF_S, FIRST_BACK_OFF_S * 2 ** min(running.failures - 1, 16))
        running.not_before = time.monotonic() + back_off_s

    def _is_champion(self, running: RunningModel) -> bool:
        return running.served in self.champions.values()

    async def _load(self, running: RunningModel) -> None:
        served = running.served
        folder = self._work_dir / f"{name_prefix()}{served.name}-{served.version}-{uuid.uuid4().hex[:8]}"
        try:
            running.placed = await asyncio.to_thread(self._source.place, served, folder / "model")
            await self._make_room(running)
            running.process = await ModelProcess.start(
                folder,
                served.model_id,
                running.placed.size_bytes,
                marks=running.placed.abilities.simple_marks,
                deadline_s=self._settings.load_timeout_s,
                log_path=self._log_dir / f"serve-{served.name}.log",
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            running.reserved_bytes = 0
        LOG.info("%s is loaded (%.0f ms)", served.model_id, running.process.load_ms)
        self._keep(self._watch(running, running.process, folder))

    async def _watch(self, running: RunningModel, process: ModelProcess, folder: Path) -> None:
        """Clean up after a process, and start it again if it crashed."""
        began = time.monotonic()
        try:
            status = await process.ended()
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        if running.process is not process or self._is_closing:
            return
        running.process = None
        if time.monotonic() - began > STEADY_S:
            running.failures = 0
        self._put_off(running)
        LOG.error("the process of %s ended with status %d", running.served.model_id, status)
        await self._start_again(running)

    async def _start_again(self, running: RunningModel) -> None:
        """Load a champion whose process crashed, with a growing delay, until it is loaded or no longer a champion."""
        while self._is_champion(running) and not running.is_loaded and not self._is_closing:
            await asyncio.sleep(max(0, running.not_before - time.monotonic()))
            try:
                await self.ensure_loaded(running)
            except Busy:  # the next request loads it
                return
            except Exception as error:
                LOG.warning("%s cannot be started again: %s", running.served.model_id, error)

    async def _probe(self, running: RunningModel) -> None:
        body = {**PROBE, "model": running.served.model_id}
        try:
            answer = await running.client.post(f"{running.url}/v1/chat/completions", json=body)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise errors.StageFailed(
                f"{running.served.model_id} does not answer: {error}.", "See the server's log; deploy it again."
            ) from None

    def _memory_bytes(self) -> int:
        return sum(model.memory_bytes for model in self.models) if self._settings.max_memory_bytes else 0

    async def _make_room(self, wanted: RunningModel) -> None:
        """Reserve memory for a model, and unload others for it; raises `Busy`, and `StageFailed` if it never fits."""
        budget_bytes = self._settings.max_memory_bytes
        if budget_bytes is None:
            return
        needed_bytes = int(wanted.placed.size_bytes * MEMORY_PER_SIZE) + MEMORY_OF_RUNTIME_BYTES
        if needed_bytes > budget_bytes:
            raise errors.StageFailed(
                f"{wanted.served.model_id} needs about {needed_bytes:,} bytes of memory, and all models may use "
                f"{budget_bytes:,}.",
                "Raise SLMOPS_SERVE__MAX_MEMORY_BYTES.",
            )
        async with self._room:
            while self._memory_bytes() + needed_bytes > budget_bytes:
                if not await self._unload_least_recent():
                    raise Busy(
                        f"There is not enough memory for {wanted.served.model_id} while other models answer.",
                        "Try again later, or raise SLMOPS_SERVE__MAX_MEMORY_BYTES.",
                    )
            wanted.reserved_bytes = needed_bytes

    async def _free_memory(self, used: RunningModel) -> None:
        """Unload models that are not in use while all need too much memory, but not the one that just answered."""
        async with self._room:
            while self._memory_bytes() > (self._settings.max_memory_bytes or math.inf):
                if not await self._unload_least_recent(spared=used):
                    return

    async def _unload_least_recent(self, spared: RunningModel | None = None) -> bool:
        idle = [model for model in self.models if model.is_loaded and model.unused.is_set() and model is not spared]
        if not idle:
            return False
        least_recent = min(idle, key=lambda model: model.used_at)
        LOG.info("%s is unloaded as the least recently used model", least_recent.served.model_id)
        await self._unload(least_recent)
        return True

    def _retire(self, running: RunningModel) -> None:
        running.is_retired = True
        self._keep(self._unload_when_unused(running))

    async def _unload_when_unused(self, running: RunningModel) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(running.unused.wait(), self._settings.drain_s)
        if running.is_retired:
            await self._unload(running)
            if self._models.get(running.served) is running and running.unused.is_set():
                del self._models[running.served]
                await running.client.aclose()

    async def _unload(self, running: RunningModel) -> None:
        process, running.process = running.process, None
        if process:
            await process.stop()

    def _keep(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._let_go)

    def _let_go(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            LOG.error("the supervision of a model failed", exc_info=error)
