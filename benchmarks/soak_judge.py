"""What came of the soak. Money is counted on the API's side alone: what was billed, prompt by prompt, against the
pictures that are in the bucket, byte for byte as they were sold. What buyers say of themselves (reports) is what is
judged by it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import boto3
from botocore.config import Config
from soak_faults import BUDGET_USD, LATE, MAX_IN_FLIGHT, PICTURE_PX, POISON, PRICE_USD, REQUESTS_PER_MINUTE
from soak_world import BUCKET, DESTINATION, Buyer, Wanted, World

from prefect_eachlabs.models import Destination
from prefect_eachlabs.testing.emulator.pictures import plain_png

THREADS = 8
OVER = ("over_requests_per_minute", "over_max_in_flight")
CENT_USD = 1e-6
REFUSED = 2
"""Exit status of what could not be run as it was asked for: a soak of such batches proves nothing."""
POSTS_OF_THE_HOPELESS = 2
"""The order, and the one further that may follow the conclusion that it bought nothing."""


@dataclass
class Verdict:
    """The numbers, and under `named` whom those that must be 0 are about."""

    wanted: int
    accepted: int
    """Orders that the API took; of those some failed or were cancelled, which costs nothing."""
    billed: int
    stored: int
    left_open: int
    """Without a picture: two lost orders left no trace, or a list later than settling shows one; a person decides."""
    replaced: int
    """Billed, and replaced by a picture of another text, as was asked."""
    once_too_many: int
    """Billed beside the picture that is stored, where the list was later than the assumption says."""
    worst_window: int
    worst_in_flight: int
    must_be_zero: dict[str, int]
    named: dict[str, list[str]] = field(default_factory=dict)

    @property
    def is_well(self) -> bool:
        return not any(self.must_be_zero.values())


@dataclass(frozen=True)
class Sold:
    """What the API sold: its predictions in the order of their POSTs, each with its prompt and what it cost."""

    predictions: Mapping[str, dict[str, Any]]

    @classmethod
    def by(cls, world: World) -> Sold:
        return cls({one["id"]: one for one in world.predictions() if not one["foreign"]})

    def prompt(self, prediction_id: str) -> str:
        return str(self.predictions[prediction_id]["input"].get("prompt"))

    @property
    def billed(self) -> set[str]:
        return {id for id, one in self.predictions.items() if one["cost_usd"] > 0}

    def bill_usd(self, prompts: Collection[str], *, since: int = 0, until: int | None = None) -> float:
        """What was billed for some prompts; of the n-th order to before another."""
        orders = list(self.predictions)[since:until]
        return sum(self.predictions[id]["cost_usd"] for id in orders if self.prompt(id) in prompts)


def judge(world: World, wanted: Sequence[Wanted], tracebacks: Sequence[str], seen: Sequence[Sequence[str]]) -> Verdict:
    """Reads the API's whole ledger and every picture of the bucket.

    Args:
        world: Which.
        wanted: Every row of the sources that were begun, but for those of replacing runs.
        tracebacks: What buyers wrote that looks like an error of ours.
        seen: Predictions that nobody asked to cancel at a Ctrl-C, and batches that did not end.
    """
    sold, tallies = Sold.by(world), world.emulator.tallies()
    replaced, in_the_end = world.replaced()
    hopeless = [item for item in wanted if POISON in item.prompt]
    items = [item for item in (*wanted, *in_the_end) if POISON not in item.prompt]
    pictures, records = _bucket(world)
    stored, faults = _stored(items, pictures, sold)
    left_open = {item_id for item_id in faults if _is_open(json.loads(records.get(item_id, "{}")))}
    not_stored = [
        f"{one}: {fault}; its record: {records.get(one)}" for one, fault in faults.items() if one not in left_open
    ]
    may_be_billed = Counter(item.prompt for item in (*items, *replaced))
    billed_of = Counter(map(sold.prompt, sold.billed))
    late = {item.prompt for item in items if LATE in item.prompt}
    over = {prompt: count - may_be_billed[prompt] for prompt, count in billed_of.items()}
    twice = {prompt: count - (prompt in late) for prompt, count in over.items() if count - (prompt in late) > 0}
    overwritten = {item.prompt for item in replaced}
    unstored = sorted(id for id in sold.billed - stored.keys() if sold.prompt(id) not in overwritten)
    told = " ".join(records[one] for one in left_open)
    lost = [id for id in unstored if id not in told and (sold.prompt(id) not in late or over[sold.prompt(id)] <= 0)]
    posts = tallies["faults"].get("create:empty_error", 0) - POSTS_OF_THE_HOPELESS * len(hopeless)
    costs, budgets = [*_wrong_costs(world, sold, stored)], [*_exceeded(world, sold)]
    disagreements = [*_disagreements(world.audit(), sold, stored)]
    refused = [
        f"{one['buyer']}, source {one['source']}: {(one.get('answer') or {}).get('error')}"
        for one in world.batches()
        if one.get("status") == REFUSED and one["buyer"] != world.on_a_full_disk.name
    ]
    violations = tallies["violations"]
    limits = max(0, tallies["worst_window"] - REQUESTS_PER_MINUTE, tallies["worst_in_flight"] - MAX_IN_FLIGHT)
    not_asked, not_ended = seen
    return Verdict(
        wanted=len(items),
        accepted=len(sold.predictions),
        billed=len(sold.billed),
        stored=len(stored),
        left_open=len(left_open),
        replaced=sum(sold.prompt(id) in overwritten for id in sold.billed),
        once_too_many=sum(sold.prompt(id) in late and over[sold.prompt(id)] > 0 for id in unstored),
        worst_window=tallies["worst_window"],
        worst_in_flight=tallies["worst_in_flight"],
        must_be_zero={
            "wanted and not stored": len(not_stored),
            "billed twice": sum(twice.values()),
            "paid and not in the bucket": len(lost),
            "two items with one picture": len(items) - len(faults) - len(stored),
            "orders beyond the second of what is answered 500 for ever": max(0, posts),
            "reports whose cost is not the bill": len(costs),
            "budgets exceeded": len(budgets),
            "sums and names that the audit has otherwise": len(disagreements),
            "in flight at a Ctrl-C and not asked to cancel": len(not_asked),
            "batches that did not end in time": len(not_ended),
            "batches refused as wrong": len(refused),
            "limits exceeded": limits + sum(violations.get(name, 0) for name in OVER),
            "keys sent to the file host, other offences": sum(
                count for name, count in violations.items() if name not in OVER
            ),
            "exceptions outside the tree of errors": len(tracebacks),
        },
        named={
            "not stored": not_stored,
            "billed twice": [_told(world, prompt, sold, records) for prompt in twice],
            "paid and not in the bucket": [f"{id}: {sold.prompt(id)}" for id in lost],
            "reports": costs,
            "budgets": budgets,
            "audit": disagreements,
            "not asked": list(not_asked),
            "not ended": list(not_ended),
            "refused": refused,
            "exceptions": list(tracebacks),
        },
    )


def _stored(
    items: Sequence[Wanted], pictures: Mapping[str, bytes], sold: Sold
) -> tuple[dict[str, str], dict[str, str]]:
    """Prediction → item, of pictures that are there as they were sold; and of the other items, why not."""
    made: dict[bytes, str] = {}
    for id in sold.billed:
        made[plain_png(PICTURE_PX, f"{id}/1")] = id
    stored: dict[str, str] = {}
    faults: dict[str, str] = {}
    for item in items:
        picture = pictures.get(item.item_id)
        id = made.get(picture or b"")
        if picture is None:
            faults[item.item_id] = "no picture"
        elif id is None:
            faults[item.item_id] = "its picture is not one that was sold"
        elif sold.prompt(id) != item.prompt:
            faults[item.item_id] = f"it has the picture of {sold.prompt(id)!r}"
        else:
            stored[id] = item.item_id
    return stored, faults


def _is_open(record: Mapping[str, Any]) -> bool:
    """Whether the record waits for a person, as it should; what may be its prediction is named in it."""
    is_late = LATE in str(record.get("input", {}).get("prompt"))
    return record.get("state") == "ambiguous" and (
        is_late or record.get("orders_without_trace") == POSTS_OF_THE_HOPELESS
    )


def _told(world: World, prompt: str, sold: Sold, records: Mapping[str, str]) -> str:
    """All that is known of a picture that was billed too often."""
    theirs = [one for one in sold.predictions.values() if one["input"].get("prompt") == prompt]
    asked = [
        {name: entry[name] for name in ("at", "endpoint", "status", "fault", "seconds", "prediction_id")}
        for entry in world.emulator.journal()
        if entry["prediction_id"] in {one["id"] for one in theirs}
    ]
    named = [record for record in records.values() if prompt in record]
    return json.dumps({"prompt": prompt, "predictions": theirs, "requests": asked, "records": named}, indent=1)


# ------------------------------------------------------------- reports and budgets


def _orders_of(world: World, buyer: Buyer) -> Iterator[tuple[dict[str, Any], int, int | None]]:
    """A buyer's batches, each with the number of the first order that may be its own, and of the first that may not."""
    batches = [one for one in world.batches() if one["buyer"] == buyer.name]
    for number, one in enumerate(batches):
        following = [int(later["accepted"]) for later in batches[number + 1 :] if later["source"] == one["source"]]
        yield one, int(one["accepted"]), following[0] if following else world.accepted_before_the_last_run


def _wrong_costs(world: World, sold: Sold, stored: Collection[str]) -> Iterator[str]:
    """Batches of who was alone with its rows, and told another cost than the API billed meanwhile."""
    for buyer in (world.steady, world.hopeless, world.interrupted):
        for one, since, until in _orders_of(world, buyer):
            said = one.get("answer")
            if said is None or "cost_usd" not in said:
                said = _report_of(world, one)
            if said is None:
                if one.get("status") in (0, 1):
                    yield f"{one['buyer']}, source {one['source']}: no report"
                continue
            prompts = {row.prompt for row in buyer.group.wanted_of(int(one["source"]))}
            bill = sold.bill_usd(prompts, since=since, until=until)
            unknown = int(said.get("cost_unknown", 0)) * PRICE_USD
            if not said["cost_usd"] - CENT_USD <= bill <= said["cost_usd"] + unknown + CENT_USD:
                yield f"{one['buyer']}, source {one['source']}, run {one['run_id']}: {_costs(said)}, billed {bill:.4f}"
    last = next((one.get("answer") for one in world.batches() if one["buyer"] == world.last.name), None)
    whole = sum(sold.predictions[id]["cost_usd"] for id in stored if not _is_replaced(world, sold.prompt(id)))
    report = _read(world, str(last["report_uri"]).partition(f"{BUCKET}/")[2]) if last and "report_uri" in last else {}
    # Of what was stored before the vendor told its cost, a later run knows the picture alone, and says so.
    untold = report.get("pictures_without_a_told_cost", 0)
    said_usd = report.get("pictures_cost_usd")
    if said_usd is None or abs(said_usd + untold * PRICE_USD - whole) > CENT_USD:
        yield f"the last run: its pictures cost {said_usd} and {untold} of untold cost, billed {whole:.4f}"


def _costs(said: Mapping[str, Any]) -> str:
    return f"cost_usd {said['cost_usd']}, cost_unknown {said.get('cost_unknown')}"


def _is_replaced(world: World, prompt: str) -> bool:
    return prompt in {row.prompt for row in world.replaced()[1]}


def _report_of(world: World, batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report that a batch that was interrupted left in the bucket."""
    with _s3(world) as s3:
        prefix = Destination.parse(DESTINATION).key("batches/")
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        for page in pages:
            for row in page.get("Contents", []):
                if row["Key"].endswith(f"-{batch['run_id'][:12]}/report.json"):
                    return _read(world, row["Key"])
    return None


def _read(world: World, key: str) -> dict[str, Any]:
    with _s3(world) as s3, s3.get_object(Bucket=BUCKET, Key=key)["Body"] as body:
        found: dict[str, Any] = json.load(body)
        return found


def _disagreements(audited: Mapping[str, Any], sold: Sold, stored: Collection[str]) -> Iterator[str]:
    """What `prefect-eachlabs audit` says, and these books do not: both read the same account and the same bucket."""
    bill_usd = sold.bill_usd({*map(sold.prompt, sold.billed)})
    told_usd = audited["billed_usd"] + audited["unsettled"] * PRICE_USD
    # A failure that the list calls a success has no cost, and after another order no record says that it failed.
    free = sum(one["status"] == "success" and not one["cost_usd"] for one in sold.predictions.values())
    unsettled_free = min(max(0, round((told_usd - bill_usd) / PRICE_USD)), free, audited["unsettled"])
    told_usd -= unsettled_free * PRICE_USD
    kinds = ("in_flight", "not_stored", "one_too_many", "replaced", "without_record", "unknown_orders", "foreign")
    sums_usd = audited["recorded_usd"] + sum(audited[kind]["usd"] for kind in kinds[-3:])
    elsewhere = {one["prediction_id"] for kind in kinds for one in audited[kind]["named"]} & sold.billed
    for what, theirs, ours in (
        ("executions", audited["executions"], len(sold.predictions)),
        ("billed", round(told_usd, 4), round(bill_usd, 4)),
        ("the sum of its parts", round(sums_usd, 4), round(audited["billed_usd"], 4)),
        ("stored", audited["stored"]["count"], len(stored)),
        ("of other tools", audited["foreign"]["count"], 0),
        ("recorded and not listed", audited["not_listed"]["count"], 0),
    ):
        if theirs != ours:
            yield f"{what}: {theirs}, by these books {ours}"
    for id in sorted(elsewhere ^ (sold.billed - set(stored))):
        who = "the audit" if id in elsewhere else "the judge"
        yield f"{id}, {sold.prompt(id)}: only {who} has it as not stored"


def _exceeded(world: World, sold: Sold) -> Iterator[str]:
    """Runs with a budget that were billed more, from their first life to their last."""
    buyer = world.budgeted
    for source in {int(one["source"]) for one in world.batches() if one["buyer"] == buyer.name}:
        prompts = {row.prompt for row in buyer.group.wanted_of(source)}
        bill = sold.bill_usd(prompts, until=world.accepted_before_the_last_run)
        if bill > BUDGET_USD + CENT_USD:
            yield f"source {source}: {bill:.4f} USD billed on {BUDGET_USD:.4f}"


# ----------------------------------------------------------------------- the bucket


class _S3:
    """A client that is closed with its block."""

    def __init__(self, url: str) -> None:
        config = Config(max_pool_connections=THREADS, retries={"max_attempts": 3, "mode": "standard"})
        keys = {"aws_access_key_id": "local", "aws_secret_access_key": "local", "region_name": "us-east-1"}
        self.client = boto3.client("s3", endpoint_url=url, config=config, **keys)

    def __enter__(self) -> Any:
        return self.client

    def __exit__(self, *_: object) -> None:
        self.client.close()


def _s3(world: World) -> _S3:
    return _S3(world.s3_url)


def _bucket(world: World) -> tuple[dict[str, bytes], dict[str, str]]:
    """Every picture, and every record as text (to be shown), by item."""
    destination = Destination.parse(DESTINATION)
    with _s3(world) as s3, ThreadPoolExecutor(THREADS) as pool:

        def read(key: str) -> tuple[str, bytes]:
            with s3.get_object(Bucket=BUCKET, Key=key)["Body"] as body:
                return key.rpartition("/")[2].rpartition(".")[0], body.read()

        def all_under(folder: str) -> dict[str, bytes]:
            pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=destination.key(folder))
            return dict(pool.map(read, [row["Key"] for page in pages for row in page.get("Contents", [])]))

        records = {item_id: body.decode() for item_id, body in all_under("records/").items()}
        return all_under("images/"), records
