"""No key, S3 secret or signature is in any output: all of it is searched, after runs that went well and ill."""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import httpx
import pytest

from prefect_eachlabs.testing.emulator import EmulatorOptions, EmulatorServer
from prefect_eachlabs.testing.s3 import Fault, LocalS3
from tests.batch.cli_process import emptied
from tests.conftest import ROOT
from tests.net.leak_runs import LOGGERS, OF_PREFECT_TOO, QUOTING
from tests.security.hostile import hostile_api
from tests.ui.stage import Stage, until

BUCKET = "leak-search"
SECRETS = {
    "the key": "sk-LEAK-key-7f3a9c1e5b",
    "a wrong key": "sk-LEAK-wrong-2b8d6e4a",
    "a block's key": "sk-LEAK-block-91c5d7f3",
    "the S3 secret": "LEAKsecret/Zz81+mPqT4vX",
    "the session token": "LEAKtoken//9abc+DEF==0123456789",
    "a block's S3 secret": "LEAKblocksecret/Qq72+wNs",
    "a block's session token": "LEAKblocktoken//77+x==",
    "the reference picture's signature": "1eaf5160" * 8,
    "the picture's signature": "1eaf9aff" * 8,
    "the picture's session token": "LEAKpicturetoken%2F4411",
}
GOOD_KEYS = frozenset((SECRETS["the key"], SECRETS["a block's key"]))


class Scene:
    """An API and a bucket, and what came of runs against them."""

    def __init__(
        self, api_url: str, s3: LocalS3, server: Stage, folder: Path, key: str, api: EmulatorServer | None = None
    ) -> None:
        self.api, self.s3, self.server = api, s3, server
        self.home = folder / "searched"
        self.home.mkdir()
        self.signatures = folder / "signatures.txt"
        self.said = ""
        self.environment = {
            **os.environ,
            "EACHLABS_API_KEY": key,
            "EACHLABS_BASE_URL": api_url,
            "EACHLABS_REQUESTS_PER_MINUTE": "none",
            "EACHLABS_REFERENCE_ROOTS": f"s3://{BUCKET}:{folder}",
            "AWS_ENDPOINT_URL_S3": s3.url,
            "AWS_ACCESS_KEY_ID": "AKIALEAKSEARCH",
            "AWS_SECRET_ACCESS_KEY": SECRETS["the S3 secret"],
            "AWS_SESSION_TOKEN": SECRETS["the session token"],
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_LOGGING_LEVEL": "DEBUG",
            "PREFECT_LOGGING_EXTRA_LOGGERS": ",".join(name for name in LOGGERS if name not in OF_PREFECT_TOO),
            "LEAK_SIGNATURES": str(self.signatures),
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.home),
        }

    def run(self, kind: str, facts: dict[str, Any], **environment: str) -> None:
        """One process's runs, whose stdout and stderr are kept; those of flows are at the server."""
        if kind != "commands":
            environment["PREFECT_API_URL"] = self.server.url
        done = subprocess.run(
            [sys.executable, "-m", "tests.net.leak_runs", kind, str(self.home), json.dumps(facts)],
            env={**self.environment, **environment},
            cwd=self.home,
            capture_output=True,
            check=False,
            timeout=600,
        )
        self.said += done.stdout.decode() + done.stderr.decode()
        assert done.returncode == 0, self.said[-5_000:]

    def commands(self, *words: list[str]) -> list[int]:
        """The exit statuses of commands of one process."""
        self.run("commands", {"commands": words})
        said: list[int] = json.loads(re.findall(r'^\{"statuses": (.*)\}$', self.said, re.MULTILINE)[-1])
        return said

    def signed(self) -> str:
        """The signed URL of a picture that the API has made, good as a reference picture."""
        query = f"X-Amz-Signature={SECRETS['the reference picture' + chr(39) + 's signature']}&v=1"
        assert self.api is not None, "it is the emulator's"
        made = self.api.add_foreign({"model": "nano-banana", "version": "0.0.1", "input": {"prompt": "a reference"}})
        url = f"{self.api.url}/files/{made}.png?{query}"
        until(lambda: httpx.get(url).is_success, 60, "the picture is there")
        return url

    # ------------------------------------------------------------------ what is searched

    @functools.cached_property
    def outputs(self) -> list[tuple[str, bytes]]:
        """Everything that runs have left behind, by name, once all have ended."""
        return list(self._left_behind())

    def _left_behind(self) -> Iterator[tuple[str, bytes]]:
        yield "stdout and stderr", self.said.encode()
        for folder in (self.home, self.server.folder):
            for path in sorted(folder.rglob("*")):
                with suppress(FileNotFoundError, IsADirectoryError):  # the server is at work
                    yield str(path.relative_to(folder)), path.read_bytes()
                    yield from unpacked(path)
        with closing(boto3.client("s3", endpoint_url=self.s3.url)) as s3:
            for page in s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
                for row in page.get("Contents", []):
                    found = s3.get_object(Bucket=BUCKET, Key=row["Key"])
                    with found["Body"] as body:
                        yield f"s3 {row['Key']}", body.read() + json.dumps(found["Metadata"]).encode()

    def database(self) -> sqlite3.Connection:
        """The server's."""
        return sqlite3.connect(f"file:{self.server.folder / 'server' / 'prefect.db'}?mode=ro", uri=True)

    def read_by_people(self) -> Iterator[tuple[str, str]]:
        """What a person reads at a terminal, in a file or on a page of the Prefect UI, by name."""
        for where, data in self.outputs:
            if where in ("stdout and stderr", "debug.log") or where.endswith((".html", ".txt")):
                yield where, data.decode(errors="replace")
        with closing(self.database()) as database:
            for kind in ("flow_run_state.message", "task_run_state.message", "log.message", "artifact.description"):
                table, _, column = kind.partition(".")
                for (text,) in database.execute(f"select {column} from {table} where {column} is not null"):
                    yield kind, text

    def unshown(self) -> list[str]:
        """Where a sign that moves terminals, or a forged line, stands in what a person reads."""
        return [
            f"{where}: {text[max(0, found.start() - 90) : found.end() + 20]!r}"
            for where, text in self.read_by_people()
            for found in re.finditer("[\x1b\x07\x9b\u202e\u2066\u2028]|^2026-11-24", text, re.MULTILINE)
        ]

    def leaks(self, secrets: Mapping[str, str] = SECRETS) -> list[str]:
        """Where a secret or a signature stands that should not."""
        made = set(self.signatures.read_text().encode().split())
        assert made, "botocore has signed nothing"
        wanted = {
            spelling.encode(): name
            for name, secret in secrets.items()
            for spelling in {secret, quote(secret, safe=""), *(base64_inside(secret.encode()))}
        }
        pattern = re.compile(b"|".join(re.escape(spelling) for spelling in wanted))
        leaks = []
        for where, text in self._left_behind():  # the server may have been told more by now
            is_there = any(spelling in text for spelling in wanted)  # which is much faster
            spans = [(wanted[found[0]], *found.span()) for found in pattern.finditer(text)] if is_there else []
            # Signatures are many: looked for where something of their kind stands.
            spans += [("a signature", *span) for span in signatures_in(text, made)]
            for run in re.finditer(rb"[A-Za-z0-9+/]{80,}", text):
                for start in range(4):  # wherever it stands in what is encoded
                    decoded = base64.b64decode(run[0][start:] + b"A" * (-len(run[0][start:]) % 4))
                    if any(signatures_in(decoded, made)):
                        spans.append(("a signature in base64", *run.span()))
            leaks += [f"{where}: {name}: {text[max(0, start - 90) : end]!r}" for name, start, end in spans]
        return leaks


def signatures_in(text: bytes, made: Collection[bytes]) -> Iterator[tuple[int, int]]:
    """Where one of these stands: 64 hexadecimal digits each."""
    for run in re.finditer(rb"[0-9a-f]{64,}", text):
        for end in range(run.start() + 64, run.end() + 1):
            if text[end - 64 : end] in made:
                yield end - 64, end


def base64_inside(secret: bytes) -> set[str]:
    """What base64 makes of a secret wherever it stands in what is encoded: results are kept in base64."""
    found = set()
    for before in range(3):
        whole = base64.b64encode(b"x" * before + secret).decode()
        found.add(whole[-(-before * 4 // 3) : (before + len(secret)) // 3 * 4].strip("="))
    return found


def unpacked(path: Path) -> Iterator[tuple[str, bytes]]:
    """What stands in a file that a search of its bytes may miss: rows over several pages, pickles in base64."""
    if path.suffix == ".db":
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            for (table,) in database.execute("select name from sqlite_master where type = 'table'").fetchall():
                for row in database.execute(f'select * from "{table}"'):
                    yield f"{path.name} {table}", repr(row).encode()
    if "storage" in path.parts:
        written = path.read_bytes()
        with suppress(ValueError):
            written = str(json.loads(written)["result"]).encode()
        yield f"the result in {path.name}", base64.b64decode(written)


@pytest.fixture
def scene(local_s3: LocalS3, server_process: Stage, tmp_path: Path) -> Iterator[Scene]:
    options = EmulatorOptions(
        service_seconds=0.05,
        requests_per_minute=None,
        image_size_px=64,
        api_keys=GOOD_KEYS,
        picture_query=f"?X-Amz-Signature={SECRETS['the picture' + chr(39) + 's signature']}"
        f"&X-Amz-Security-Token={SECRETS['the picture' + chr(39) + 's session token']}",
        faults=(
            "prediction:fail_moderation,matching=refused by moderation",
            "picture:not_found,matching=gone from its host",
            "picture:html,matching=spoilt on its way",
        ),
    )
    local_s3.create_bucket(BUCKET)
    emptied(local_s3, BUCKET)  # another test may have left there what is leaked on purpose
    refuse = Fault("refuse", key_contains="images/refused-by-s3", times=1_000, status=403, code="AccessDenied")
    local_s3.set_faults(refuse)
    with EmulatorServer(options) as api:
        try:
            yield Scene(api.url, local_s3, server_process, tmp_path, SECRETS["the key"], api)
        finally:
            local_s3.set_faults()


def quoted(s3: LocalS3, server: Stage, folder: Path, key: str, quoting: Sequence[str], **environment: str) -> Scene:
    """What came of an API that quotes the key in all its answers."""
    s3.create_bucket(BUCKET)
    emptied(s3, BUCKET)  # what another test has ordered is not ordered again, and quotes nothing
    table = folder / "table.csv"
    table.write_text("\n".join(["prompt,id", *(f"{how} fox,{how}" for how in quoting), ""]))
    facts = {"destination": f"s3://{BUCKET}/quoted", "table": str(table), "quoting": quoting}
    settings = {"EACHLABS_DEADLINE_SECONDS": "3", "EACHLABS_CLAIM_SECONDS": "12", "EACHLABS_SETTLING_SECONDS": "2"}
    with hostile_api() as url:
        scene = Scene(url, s3, server, folder, key)
        scene.run("quoted", facts, **settings, **environment)
    return scene


PLACES = (
    "stdout",
    "prefect.db flow_run_state",
    "prefect.db log",
    "s3 quoted/records",
    "s3 quoted-cli/batches/table/runs",
    "report.jsonl",
    ".html",
)


@pytest.mark.slow
def test_a_key_that_answers_quote_is_written_down_nowhere(
    local_s3: LocalS3, server_process: Stage, tmp_path: Path
) -> None:
    scene = quoted(local_s3, server_process, tmp_path, SECRETS["the key"], QUOTING)
    places = [where for where, _ in scene.outputs]
    for place in (*PLACES, "prefect.db artifact", "s3 quoted-cli/records"):
        assert any(place in where for where in places), place
    assert "upstream refused" in scene.said
    read = {kind for kind, text in scene.read_by_people() if "upstream refused" in text}
    assert {"flow_run_state.message", "task_run_state.message", "log.message"} <= read
    assert scene.leaks() == []
    assert scene.unshown() == []


@pytest.mark.slow
def test_the_search_finds_a_key_that_answers_quote_where_nothing_takes_it_out(
    local_s3: LocalS3, server_process: Stage, tmp_path: Path
) -> None:
    key = "sk-LEAK-control-5e0c2a8f"  # no other search looks for it in what the server keeps
    scene = quoted(local_s3, server_process, tmp_path, key, ["error"], LEAK_CONTROL="1")
    found = {leak.partition(": ")[0] for leak in scene.leaks({"the control's key": key})}
    for place in PLACES:
        assert any(place in where for where in found), (place, found, scene.said[:9_000])


def generate(prompt: str, *more: str) -> list[str]:
    return ["generate", prompt, "--to", f"s3://{BUCKET}/cli", *more]


@pytest.mark.slow
def test_no_output_of_the_command_line_holds_a_secret(scene: Scene, tmp_path: Path) -> None:
    signed, table = scene.signed(), tmp_path / "table.csv"
    lines = [f"{prompt},{signed}" for prompt in ("a hare", "a lynx", "refused by moderation again")]
    table.write_text("\n".join(["prompt,image_url", *lines, "bad row,ftp://x?X-Amz-Signature=1", ""]))
    assert scene.commands(
        generate("a fox", "--image-url", signed),
        generate("a stoat", "--image-url", signed, "--json"),
        generate("an owl", "--image-url", f"s3://{BUCKET}/cli/images/fox.png"),  # there is none
        generate("refused by moderation", "--image-url", signed, "--json"),
        generate("refused by s3", "--item-id", "refused-by-s3"),
        generate("gone from its host", "--deadline-seconds", "5"),
        ["batch", str(table), "--to", f"s3://{BUCKET}/batch"],
        [f"EACHLABS_API_KEY={SECRETS['a wrong key']}", *generate("a wrong key")],
    ) == [0, 0, 2, 1, 2, 1, 1, 2]
    assert "botocore.auth" in scene.said, "nothing was logged at debug level"
    assert "Traceback" not in scene.said
    assert scene.leaks() == []


@pytest.mark.slow
def test_no_output_of_flow_runs_holds_a_secret(scene: Scene, tmp_path: Path) -> None:
    signed = scene.signed()
    with closing(boto3.client("s3", endpoint_url=scene.s3.url)) as s3:
        s3.put_object(Bucket=BUCKET, Key="cli/images/reference.png", Body=httpx.get(signed).content)
    table = tmp_path / "table.csv"
    table.write_text(f"prompt,image_url\na hare,{signed}\na lynx,s3://{BUCKET}/flows/images/reference.png\n")
    facts = {
        "destination": f"s3://{BUCKET}/flows",
        "signed": signed,
        "object": f"s3://{BUCKET}/cli/images/reference.png",
        "wrong_key": SECRETS["a wrong key"],
        "block_key": SECRETS["a block's key"],
        "block_secret": SECRETS["a block's S3 secret"],
        "block_token": SECRETS["a block's session token"],
        "table": str(table),
    }
    scene.run("flows", facts)
    said = json.loads(next(line for line in scene.said.splitlines() if line.startswith('{"well"')))
    assert None not in (said["well"], said["by_blocks"]), scene.said[-20_000:]
    failed = ("refused by moderation", "refused by s3", "gone from its host", "spoilt on its way", "wrong key")
    assert [said[name] for name in failed] == [None] * len(failed)
    places = [where for where, _ in scene.outputs]
    for kind in (
        "debug.log",
        "prefect.db log",
        "prefect.db artifact",
        "the result in",
        "s3 flows/records",
        "s3 flows/batches",
    ):
        assert any(kind in where for where in places), kind
    with closing(scene.database()) as database:
        logged = {name for (name,) in database.execute("select distinct name from log")}
    assert {"httpx", "botocore.auth", "httpcore.http11"} <= logged, "Prefect was sent no logs of the libraries"
    assert scene.leaks() == []
