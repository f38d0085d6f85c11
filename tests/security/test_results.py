"""Who writes to the result storage: what this package keeps there is JSON, and it reads nothing from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.results import ResultStore
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

from prefect_eachlabs import (
    Prediction,
    StoredImage,
    await_result,
    create_prediction,
    generate_and_store,
    generate_rows,
    store_image,
)
from prefect_eachlabs.flows import generate_batch, generate_image, scheduled_image, settle_leftovers
from tests.flows.flow_fixtures import Studio

pytestmark = pytest.mark.usefixtures("prefect_server")

TASKS = (create_prediction, await_result, store_image, generate_and_store, generate_rows)
FLOWS = (generate_batch, generate_image, scheduled_image, settle_leftovers)


def kept(folder: Path) -> dict[str, Any]:
    """What is in the storage: kind → results. Prefect writes the result alone, or with what is to be known of it."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            try:
                record = json.loads(path.read_bytes())
                told = record.get("metadata") if isinstance(record, dict) else None
                kind = told["serializer"]["type"] if told else "json"
            except ValueError:
                kind, record = "something else", path.read_bytes()
            found.setdefault(kind, []).append(record)
    return found


def test_no_task_keeps_its_result_or_reads_one(studio: Studio, tmp_path: Path) -> None:
    @flow
    def steps() -> str:
        finished = await_result(create_prediction("a fox", destination=studio.destination))
        store_image(finished, studio.destination)
        return str(generate_and_store("an owl", destination=studio.destination).uri)

    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path}):
        steps.with_options(persist_result=True, result_serializer="json")()
    (results,) = kept(tmp_path).values()
    assert len(results) == 1, "the flow's own, as it asked for"


def test_a_prediction_and_a_picture_come_back_whole_from_json(studio: Studio, tmp_path: Path) -> None:
    @flow
    def steps() -> list[Any]:
        kept_by = ({"persist_result": True, "cache_policy": None, "result_storage_key": one.name} for one in TASKS)
        create, wait, store = (one.with_options(**how) for one, how in zip(TASKS[:3], kept_by, strict=False))
        created = create("a fox", destination=studio.destination, return_state=True)
        finished = wait(created, return_state=True)
        return [created, finished, store(finished, studio.destination, return_state=True)]

    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path}):
        states = steps()
        assert set(kept(tmp_path)) == {"json"}, kept(tmp_path)
        created, finished, image = (read_again(state) for state in states)
    assert isinstance(created, Prediction)
    assert (finished.id, finished.status.value, len(finished.output_urls)) == (created.id, "succeeded", 1)
    assert isinstance(image, StoredImage)
    assert image.prediction_id == created.id


def read_again(state: Any) -> Any:
    """As another process would: from the storage, not from the memory."""
    store = ResultStore(serializer=state.data.metadata.serializer)
    return store.read(Path(state.data.metadata.storage_key).name).result


def test_every_task_and_flow_would_keep_json() -> None:
    assert {one.result_serializer for one in (*TASKS, *FLOWS)} == {"json"}
    assert {one.persist_result for one in TASKS} == {False}
    assert {one.persist_result for one in FLOWS} == {None}, "it is the operator's to say"


def test_a_flow_whose_result_is_kept_keeps_json(studio: Studio, tmp_path: Path) -> None:
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path}):
        state = generate_image.with_options(persist_result=True)("a fox", studio.destination, return_state=True)
        assert set(kept(tmp_path)) == {"json"}, kept(tmp_path)
        image = read_again(state)
    assert isinstance(image, StoredImage)
