"""The Store contract on SQLite, and what only a database file can get wrong."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.adapters.sqlite.store import SqliteStore
from orchestrator.api.job import RELEASE_FINALIZER, QLoRAJobStatus
from orchestrator.api.reasons import Reason
from orchestrator.api.sweep import QLoRASweepStatus, TrialStatus
from orchestrator.core.commands import Event
from orchestrator.core.sweep.search import trial_job
from orchestrator.errors import InvalidObject, NotFound, StoreUnavailable
from orchestrator.settings import Settings
from tests.adapters.store_contract import StoreContract, with_attempt
from tests.builders import submitted_job, submitted_sweep


class TestSqliteStore(StoreContract):
    @pytest.fixture(autouse=True)
    def _home(self, tmp_path: Path) -> None:
        self.settings = Settings(home=tmp_path, events_limit=5, store_poll_seconds=0.02)

    def open(self) -> SqliteStore:
        return SqliteStore(self.settings)

    def test_events_are_bounded_and_the_newest_stay(self) -> None:
        store = self.open()
        job, other = store.create_job(submitted_job("a")), store.create_job(submitted_job("b"))
        store.record_event(other, Event(reason=Reason.TRAINING, message="other"))
        for number in range(12):
            store.record_event(job, Event(reason=Reason.TRAINING, message=str(number)))
        assert [event.message for _, event in store.list_events("team-a", "a")] == ["7", "8", "9", "10", "11"]
        assert [event.message for _, event in store.list_events("team-a", "b")] == ["other"]

    def test_a_deleted_sweep_takes_its_trials_with_it_and_gets_no_new_ones(self) -> None:
        """As the garbage collector of a cluster does."""
        store = self.open()
        sweep = store.create_sweep(submitted_sweep())
        busy = store.create_job(trial_job(sweep, 0))
        store.create_job(trial_job(sweep, 1))
        store.create_job(submitted_job("other"))
        store.update_status(busy, with_attempt())
        store.delete_sweep("team-a", "search")
        [left, other] = sorted(store.list_jobs(), key=lambda job: job.metadata.name != "search-0")
        assert (left.metadata.name, left.cancelled) == ("search-0", True), "it goes once its stage has stopped"
        assert other.metadata.name == "other"
        with pytest.raises(NotFound, match="there is no sweep team-a/search"):
            store.create_job(trial_job(sweep, 2))
        store.create_sweep(submitted_sweep())
        with pytest.raises(NotFound, match="another has its name"):
            store.create_job(trial_job(sweep, 2))

    @pytest.mark.parametrize("parses", [True, False], ids=["read", "not read by this version"])
    def test_a_marked_sweep_goes_with_its_trials_when_it_is_released(self, parses: bool) -> None:
        store = self.open()
        sweep = store.create_sweep(submitted_sweep())
        store.create_job(trial_job(sweep, 0))
        trial = TrialStatus(index=0, job="search-0", parameters={})
        store.update_sweep_status(sweep, QLoRASweepStatus(trials=(trial,)))
        store.delete_sweep("team-a", "search")
        assert len(store.list_jobs()) == 1, "they are cancelled first"
        if parses:
            [marked] = store.list_sweeps()
        else:
            with sqlite3.connect(self.settings.database) as database:
                database.execute("UPDATE objects SET body = json_remove(body, '$.spec') WHERE kind = 'QLoRASweep'")
            database.close()
            assert store.list_sweeps() == []
            [marked] = store.list_unreadable_sweeps()
        assert marked.metadata.deletion_timestamp is not None
        assert marked.metadata.finalizers == (RELEASE_FINALIZER,)
        store.release_sweep(marked)
        assert (store.list_sweeps(), store.list_unreadable_sweeps(), store.list_jobs()) == ([], [], [])

    def test_a_row_that_no_longer_parses_is_reported_and_kept(self, caplog: pytest.LogCaptureFixture) -> None:
        store = self.open()
        for name in ("broken", "sound"):
            store.create_job(submitted_job(name))
        with sqlite3.connect(self.settings.database) as database:
            database.execute("UPDATE objects SET body = '{\"kind\": \"QLoRAJob\"}' WHERE name = 'broken'")
        database.close()
        with caplog.at_level(logging.ERROR):
            assert [job.metadata.name for job in store.list_jobs()] == ["sound"]
            store.list_jobs()
        assert [record.message for record in caplog.records if "team-a/broken" in record.message].__len__() == 1
        assert [job.key for job in store.list_unreadable()] == ["team-a/broken"]
        with pytest.raises(InvalidObject, match="team-a/broken"):
            store.get_job("team-a", "broken")
        with sqlite3.connect(self.settings.database) as database:
            rows = database.execute("SELECT body FROM objects WHERE name = 'broken'").fetchall()
        database.close()
        assert rows == [('{"kind": "QLoRAJob"}',)]

    @pytest.mark.parametrize(
        "body", ['{"metadata": {"uid": "u", "deletionTimestamp": null}}', "[]", "{", '{"metadata": 3}']
    )
    def test_a_row_that_no_longer_parses_can_be_deleted(self, body: str) -> None:
        """It is marked, so that its stage is stopped first; one that is no object at all goes at once."""
        store = self.open()
        store.create_job(submitted_job("broken"))
        with sqlite3.connect(self.settings.database) as database:
            database.execute("UPDATE objects SET body = ? WHERE name = 'broken'", (body,))
        database.close()
        store.delete_job("team-a", "broken")
        for job in store.list_unreadable():
            assert (job.key, job.uid, job.stop, job.deleted, job.held) == ("team-a/broken", "u", True, True, True)
            store.release_unreadable("team-a", "broken", "another")
            assert store.list_unreadable() == [job]
            store.release_unreadable("team-a", "broken", job.uid)
        assert store.list_unreadable() == []

    def test_a_file_that_is_no_database_is_named(self) -> None:
        self.settings.database.write_text("not a database, but long enough to be looked at as one" * 10)
        with pytest.raises(StoreUnavailable, match=str(self.settings.database)):
            self.open()

    def test_a_locked_database_is_a_transient_error(self) -> None:
        settings = self.settings.model_copy(update={"store_busy_seconds": 0.1})
        store = SqliteStore(settings)
        holder = sqlite3.connect(settings.database, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked"):
            store.create_job(submitted_job())
        holder.execute("ROLLBACK")
        holder.close()
        store.create_job(submitted_job())

    def test_a_writer_killed_at_any_time_leaves_whole_objects(self) -> None:
        store = self.open()
        store.create_job(submitted_job())
        program = (
            "from orchestrator.adapters.sqlite.store import SqliteStore\n"
            "from orchestrator.api.job import QLoRAJobStatus\n"
            "from orchestrator.settings import Settings\n"
            "store = SqliteStore(Settings())\n"
            "print('ready', flush=True)\n"
            "n = 0\n"
            "while True:\n"
            "    n += 1\n"
            "    store.update_status(store.get_job('team-a', 'medical'), QLoRAJobStatus(attempts_total=n))\n"
        )
        environment = {**os.environ, **self.settings.environment()}
        last = 0
        for delay_seconds in (0.03, 0.11, 0.07):
            writer = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE)
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(delay_seconds)
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            writer.stdout.close()
            job = store.get_job("team-a", "medical")
            assert int(job.metadata.resource_version) > last
            last = int(job.metadata.resource_version)
            store.update_status(job, QLoRAJobStatus(summary="still writable"))
