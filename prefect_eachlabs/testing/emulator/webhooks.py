"""The emulator calls: each prediction that was ordered with a `webhook_url`, at its end, three times at most."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import ssl
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import httpx

from prefect_eachlabs.testing.emulator.clock import rfc3339
from prefect_eachlabs.testing.emulator.faults import Fault
from prefect_eachlabs.testing.emulator.predictions import Job, prediction_view

if TYPE_CHECKING:
    from prefect_eachlabs.testing.emulator.state import Emulator

logger = logging.getLogger(__name__)

ATTEMPTS = 3
ATTEMPT_SECONDS = 10.0
FORGED_URL = "http://127.0.0.1:1/forged.png"


@lru_cache(maxsize=1)
def _trusted() -> ssl.SSLContext:
    """Made once: that takes longer than a call."""
    return httpx.create_ssl_context()


class Webhooks:
    """Who is to be called, who was, and what they answered.

    Args:
        emulator: Whose predictions these are.
        transport: Carries the calls; the network when None.
    """

    def __init__(self, emulator: Emulator, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._emulator = emulator
        self._transport = transport
        self._calling: set[asyncio.Task[None]] = set()
        self.rows: list[dict[str, Any]] = []
        self.answers: Counter[str] = Counter()
        """`real 202`, `forged 401`, `real unreachable`: how often."""

    def watch(self, job: Job, url: str, secret: str) -> None:
        """Calls when the job ends."""
        task = asyncio.ensure_future(self._call_at_the_end(job, url, secret))
        self._calling.add(task)
        task.add_done_callback(self._calling.discard)

    async def _call_at_the_end(self, job: Job, url: str, secret: str) -> None:
        clock = self._emulator.clock
        if job.ends == float("inf"):
            return
        await clock.sleep(job.ends - clock.now())
        if job.cancelled is not None:  # no call on cancel
            return
        faults = {
            fault.kind: fault for fault in self._emulator.faults.draw_all("webhook", text=job.prompt, subject=job.id)
        }
        if "late" in faults:
            await clock.sleep(faults["late"].wait_seconds)
        body = self._body(job)
        attempts: list[dict[str, Any]] = []
        self.rows.append(
            {
                "execution_id": job.id,
                "url": url,
                "request": body.decode(),
                "headers": self._headers(body, secret),
                "source": "prediction",
                "created_at": rfc3339(clock.date(clock.now())),
                "attempts": attempts,
            }
        )
        network = self._transport or httpx.AsyncHTTPTransport(verify=_trusted())
        async with httpx.AsyncClient(transport=network, timeout=ATTEMPT_SECONDS) as http:
            await self._forge(http, job, url, secret, faults)
            for attempt in range(ATTEMPTS):
                if attempt:
                    await clock.sleep(self._emulator.options.webhook_retry_seconds)
                is_lost = "lost" in faults or ("attempt_lost" in faults and not attempt)
                status = None if is_lost else await self._post(http, url, self._spoilt(body, faults), secret, "real")
                is_good = status is not None and 200 <= status < 300
                said = {"status": "SUCCESS" if is_good else "FAILED", "status_code": status}
                attempts.append({**said, "created_at": rfc3339(clock.date(clock.now()))})
                if is_good:
                    break
            if "twice" in faults:
                await self._post(http, url, body, secret, "repeated")
            if "stolen" in faults:
                await self._steal(http, job, url, secret)

    def _body(self, job: Job) -> bytes:
        view = prediction_view(job, self._emulator.options, at=job.end)
        is_good = view["status"] == "success"
        if self._emulator.options.webhooks == "older":
            return json.dumps(
                {
                    "id": job.id,
                    **{name: view[name] for name in ("output", "logs", "metrics")},
                    "input": job.input,
                    "status": view["status"],
                }
            ).encode()
        output = view.get("output")
        if not is_good:
            said = output if isinstance(output, Mapping) else {}
            output = [{"error": said.get("error_message") or view["logs"] or "it failed"}]
        told = {"exec_id": job.id, "flow_id": None, "status": "succeeded" if is_good else "failed", "output": output}
        return json.dumps({**told, "error": ""}).encode()

    @staticmethod
    def _spoilt(body: bytes, faults: Mapping[str, Fault]) -> bytes:
        if "malformed" in faults:
            return body[: len(body) // 2]
        if "huge" in faults:
            return body + b" " * int(faults["huge"].value or 10_000_000)
        return body

    async def _forge(
        self, http: httpx.AsyncClient, job: Job, url: str, secret: str, faults: Mapping[str, Fault]
    ) -> None:
        if "forged" in faults:
            body = json.dumps({"exec_id": job.id, "status": "succeeded", "output": FORGED_URL}).encode()
            for guess in (None, "", "a guess", secret[:-1] + ("0" if secret[-1:] != "0" else "1")):
                await self._post(http, url, body, guess, "forged")
        if "stolen" in faults:
            await self._steal(http, job, url, secret)

    async def _steal(self, http: httpx.AsyncClient, job: Job, url: str, secret: str) -> None:
        other = next((one for one in self._emulator.ledger.newest_first(job.end) if one is not job), None)
        if other is not None:
            body = json.dumps({"exec_id": other.id, "status": "succeeded", "output": FORGED_URL}).encode()
            await self._post(http, url, body, secret, "stolen")

    def _headers(self, body: bytes, secret: str | None) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if secret is not None and self._emulator.options.webhooks == "older":
            headers["X-Webhook-Signature"] = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
        elif secret is not None:
            headers["X-Webhook-Secret"] = secret
        return headers

    async def _post(self, http: httpx.AsyncClient, url: str, body: bytes, secret: str | None, what: str) -> int | None:
        try:
            answer = await http.post(url, content=body, headers=self._headers(body, secret))
        except httpx.HTTPError:
            self.answers[f"{what} unreachable"] += 1
            return None
        self.answers[f"{what} {answer.status_code}"] += 1
        return answer.status_code

    def page(self, *, limit: int, offset: int) -> dict[str, Any]:
        """GET /v1/webhooks: newest first, without their attempts."""
        newest = self.rows[::-1][offset : offset + limit]
        shown = [{name: value for name, value in row.items() if name != "attempts"} for row in newest]
        return {"webhooks": shown, "limit": limit, "offset": offset, "total_count": len(self.rows)}

    def one(self, execution_id: str) -> dict[str, Any] | None:
        """GET /v1/webhooks/{execution_id}, with its attempts."""
        return next((row for row in reversed(self.rows) if row["execution_id"] == execution_id), None)

    def stop(self) -> None:
        """Calls nobody any more."""
        for task in list(self._calling):
            task.cancel()
