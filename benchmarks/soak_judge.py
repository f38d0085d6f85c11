"""What came of the soak: from the emulator's ledger and from the bucket, never from what buyers say of themselves."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import boto3
from botocore.config import Config
from soak_faults import MAX_IN_FLIGHT, REQUESTS_PER_MINUTE
from soak_world import BUCKET, DESTINATION, Wanted, World

from prefect_eachlabs.images.png import verify_png
from prefect_eachlabs.ledger.records import Record, RecordState
from prefect_eachlabs.models import Destination

THREADS = 8
OVER = ("over_requests_per_minute", "over_max_in_flight")


@dataclass
class Verdict:
    """The numbers, and under `named` whom those that must be 0 are about."""

    wanted: int
    accepted: int
    """Orders that the API took; of those some failed or were cancelled, which costs nothing."""
    billed: int
    stored: int
    worst_window: int
    worst_in_flight: int
    must_be_zero: dict[str, int]
    named: dict[str, list[str]] = field(default_factory=dict)

    @property
    def is_well(self) -> bool:
        return not any(self.must_be_zero.values())


def judge(world: World, wanted: list[Wanted], tracebacks: list[str]) -> Verdict:
    """Reads the whole ledger, and every record and picture of the bucket."""
    predictions = {one["id"]: one for one in world.predictions() if not one["foreign"]}
    tallies = world.emulator.tallies()
    billed = {id for id, one in predictions.items() if one["status"] == "success" and one["cost_usd"] > 0}
    records, faults = _bucket(world)
    stored: dict[str, str] = {}
    for item in wanted:
        if (fault := _fault_of(item, records.get(item.item_id), predictions)) is not None:
            faults.setdefault(item.item_id, fault)
        if item.item_id not in faults:
            stored[item.item_id] = records[item.item_id].prediction_id or ""
    not_stored = [f"{item.item_id}: {faults[item.item_id]}" for item in wanted if item.item_id in faults]
    owners = Counter(stored.values())
    wanted_of, billed_of = Counter(item.prompt for item in wanted), Counter(_prompt(predictions[id]) for id in billed)
    twice = {prompt: count - wanted_of[prompt] for prompt, count in billed_of.items() if count > wanted_of[prompt]}
    accounted = {id for record in records.values() for id in record.named_predictions}
    lost = sorted(billed - owners.keys() - accounted)
    violations = tallies["violations"]
    over = max(0, tallies["worst_window"] - REQUESTS_PER_MINUTE, tallies["worst_in_flight"] - MAX_IN_FLIGHT)
    return Verdict(
        wanted=len(wanted),
        accepted=len(predictions),
        billed=len(billed),
        stored=len(stored),
        worst_window=tallies["worst_window"],
        worst_in_flight=tallies["worst_in_flight"],
        must_be_zero={
            "wanted and not stored": len(not_stored),
            "billed twice": sum(twice.values()),
            "paid and lost": len(lost),
            "two items with one picture": sum(count - 1 for count in owners.values()),
            "limits exceeded": over + sum(violations.get(name, 0) for name in OVER),
            "keys sent to the file host, other offences": sum(
                count for name, count in violations.items() if name not in OVER
            ),
            "exceptions outside the tree of errors": len(tracebacks),
        },
        named={
            "not stored": not_stored,
            "billed twice": [_told(world, prompt, predictions, records) for prompt in twice],
            "lost": [f"{id}: {_prompt(predictions[id])}" for id in lost],
            "exceptions": tracebacks,
        },
    )


def _prompt(prediction: dict[str, Any]) -> str:
    return str(prediction["input"].get("prompt"))


def _told(world: World, prompt: str, predictions: dict[str, Any], records: dict[str, Record]) -> str:
    """All that is known of a picture that was billed too often."""
    theirs = [one for one in predictions.values() if _prompt(one) == prompt]
    asked = [
        {name: entry[name] for name in ("at", "endpoint", "status", "fault", "seconds", "prediction_id")}
        for entry in world.emulator.journal()
        if entry["prediction_id"] in {one["id"] for one in theirs}
    ]
    named = [record.model_dump_json() for record in records.values() if record.input.get("prompt") == prompt]
    return json.dumps({"prompt": prompt, "predictions": theirs, "requests": asked, "records": named}, indent=1)


def _fault_of(item: Wanted, record: Record | None, predictions: dict[str, Any]) -> str | None:
    """Why an item is not stored, as far as its record tells."""
    if record is None:
        return "no record"
    if record.state is not RecordState.STORED:
        return f"its record says {record.state.value}: {record.error.message if record.error else ''}"
    prediction = predictions.get(record.prediction_id or "")
    if prediction is None:
        return f"the API knows no prediction {record.prediction_id}"
    return None if _prompt(prediction) == item.prompt else f"it has the picture of {_prompt(prediction)!r}"


def _bucket(world: World) -> tuple[dict[str, Record], dict[str, str]]:
    """Every record by item; and of each whose picture is not there, whole and its own, why."""
    config = Config(max_pool_connections=THREADS, retries={"max_attempts": 3, "mode": "standard"})
    keys = {"aws_access_key_id": "local", "aws_secret_access_key": "local", "region_name": "us-east-1"}
    s3 = boto3.client("s3", endpoint_url=world.s3_url, config=config, **keys)
    destination = Destination.parse(DESTINATION)
    records: dict[str, Record] = {}
    faults: dict[str, str] = {}

    def body(key: str) -> tuple[bytes, dict[str, str]]:
        answer = s3.get_object(Bucket=BUCKET, Key=key)
        with answer["Body"] as stream:
            return stream.read(), answer["Metadata"]

    def look(key: str) -> None:
        record = Record.model_validate_json(body(key)[0])
        records[record.item_id] = record
        if record.state is not RecordState.STORED:
            return
        try:
            picture, metadata = body(destination.image_key(record.item_id))
            if verify_png(picture).sha256 != record.sha256:
                faults[record.item_id] = "its picture is not what its record says"
            elif metadata.get("prediction-id") != record.prediction_id:
                faults[record.item_id] = f"its picture is of prediction {metadata.get('prediction-id')}"
        except Exception as error:
            faults[record.item_id] = f"its picture cannot be read: {error}"

    try:
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=destination.key("records/"))
        names = [row["Key"] for page in pages for row in page.get("Contents", [])]
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(look, names))
    finally:
        s3.close()
    return records, faults
