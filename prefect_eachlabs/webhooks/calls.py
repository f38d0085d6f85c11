"""What a call is worth and what it says. Pure.

Each order has a secret of its own, made of `EACHLABS_WEBHOOK_SECRET` and the `write_id` of its claim. Whoever knows it
is the vendor, or was told by it; it opens that one order and no other. It is compared in constant time before anything
of the body is read.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from prefect_eachlabs.models import (
    Callback,
    Failure,
    Prediction,
    PredictionStatus,
    parse_prediction,
    parse_prediction_id,
)
from prefect_eachlabs.net import safe_json
from prefect_eachlabs.net.redaction import visible
from prefect_eachlabs.net.urls import has_odd_host

MAX_BODY_BYTES = 256 * 1024
"""A call is some hundred bytes; older ones repeat the input."""
MAX_HANDED_ON_BYTES = 64 * 1024
PARAMETER = "write_id"
SECRET_HEADER = "x-webhook-secret"
SIGNATURE_HEADERS = ("x-webhook-signature", "x-webhook-signature-256", "x-signature")
"""The vendor's older text promises an HMAC-SHA256 of the body and names no header."""

_WRITE_ID = re.compile(r"[0-9a-f]{32}")
_PROOF_CHARACTERS = 200


@dataclass(frozen=True)
class Call:
    """A call as it came: nothing of it is believed yet.

    Attributes:
        body: At most `MAX_BODY_BYTES`, unread.
        write_id: The order that its URL names; None: it names none (Prefect Cloud's webhooks have no query).
        secret, signature: What its headers give as proof.
    """

    body: bytes = field(repr=False)
    write_id: str | None = None
    secret: str = field(default="", repr=False)
    signature: str = field(default="", repr=False)

    @classmethod
    def received(cls, query: str, headers: Mapping[str, str], body: bytes) -> Call:
        """Of an HTTP request; header names in lower case."""
        signature = next((headers[name] for name in SIGNATURE_HEADERS if name in headers), "")
        return cls(body, write_id_in(f"?{query}"), headers.get(SECRET_HEADER, ""), signature)

    def is_proven_by(self, secret: str) -> bool:
        """Whether it comes from somebody who knows this secret of an order; in constant time."""
        said = self.secret.strip()[:_PROOF_CHARACTERS].encode("utf-8", "surrogatepass")
        signed = self.signature.strip()[:_PROOF_CHARACTERS].removeprefix("sha256=").encode("utf-8", "surrogatepass")
        by_secret = hmac.compare_digest(said, secret.encode())
        by_signature = hmac.compare_digest(signed.lower(), signature_of(secret, self.body).encode())
        return by_secret or by_signature


def secret_of(master: str, write_id: str) -> str:
    """The secret of one order. Its form is known to `net.redaction`, which shows it nowhere."""
    return "whs_" + hmac.new(master.encode(), write_id.encode(), hashlib.sha256).hexdigest()


def signature_of(secret: str, body: bytes) -> str:
    """HMAC-SHA256 of a body, in hex."""
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def callback_of(url: str, master: str, write_id: str) -> Callback:
    """What an order tells the vendor: where to call, by which name, and with which secret."""
    return Callback(f"{url}?{PARAMETER}={write_id}", secret_of(master, write_id))


def write_id_in(url: str) -> str | None:
    """The order that a URL of ours names; None: it is not one of ours."""
    if has_odd_host(url):
        return None
    try:
        names = parse_qs(urlsplit(url).query, max_num_fields=20).get(PARAMETER, [])
    except ValueError:
        return None
    return names[0] if len(names) == 1 and _WRITE_ID.fullmatch(names[0]) else None


def parse_end(body: bytes) -> Prediction | None:
    """What a call's body says, of either form and in any vocabulary; None: it is unreadable or names no prediction.

    `{"exec_id", "status": "succeeded", "output", "error"}` of 2026, or `{"id", "status": "success", "output", ...}`.
    """
    said = _object_in(body)
    if said is None:
        return None
    named = (parse_prediction_id(said.get(name)) for name in ("exec_id", "predictionID", "prediction_id", "id"))
    prediction_id = next((found for found in named if found is not None), None)
    if prediction_id is None:
        return None
    end = parse_prediction(said, prediction_id=prediction_id)
    if end.status is PredictionStatus.FAILED and not (end.failure and end.failure.message):
        output = said.get("output")
        first = output[0] if isinstance(output, list) and output else None
        reason = first.get("error") if isinstance(first, Mapping) else None  # `output[0].error`: why it failed
        failure = Failure(message=visible(reason[:500]) if isinstance(reason, str) else "")
        end = end.model_copy(update={"failure": failure})
    # What a call tells of input, cost and time is not asked for: GET and the list are.
    return end.model_copy(update={"input": None, "cost_usd": None, "predict_time_seconds": None})


def _object_in(body: bytes) -> Mapping[str, Any] | None:
    try:
        said = safe_json.loads(body)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, Mapping) else None


def event_payload(call: Call, secret: str) -> dict[str, Any] | None:
    """A call that was found good, as an event may show it: what it says, and a proof that opens nothing else.

    None: its body is unreadable.
    """
    said = _object_in(call.body)
    if said is None or parse_end(call.body) is None:
        return None
    told = {name: said[name] for name in ("exec_id", "id", "status", "output", "error") if name in said}
    body = json.dumps(told)
    if len(body) > MAX_HANDED_ON_BYTES:  # without its output it is asked about by id
        body = json.dumps({name: value for name, value in told.items() if name != "output"})[:MAX_HANDED_ON_BYTES]
    return {"write_id": call.write_id, "body": body, "signature": signature_of(secret, body.encode())}


def parse_call(payload: object) -> Call | None:
    """The call in an event's payload, of `event_payload` or of Prefect Cloud's template; None: it is not one."""
    if not isinstance(payload, Mapping):
        return None
    body = payload.get("body")
    if isinstance(body, (Mapping, list)):
        body = json.dumps(body)
    if not isinstance(body, str) or len(body) > MAX_BODY_BYTES:
        return None
    texts = {name: text for name in ("write_id", "secret", "signature") if isinstance(text := payload.get(name), str)}
    write_id = texts.get("write_id", "")
    return Call(
        body.encode("utf-8", "surrogatepass"),
        write_id if _WRITE_ID.fullmatch(write_id) else None,
        texts.get("secret", ""),
        texts.get("signature", ""),
    )
