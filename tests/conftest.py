"""What every test stands on: an empty Prefect home, no credentials of the outer world, no network but loopback."""

from __future__ import annotations

import functools
import gc
import inspect
import ipaddress
import os
import re
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.seaweed import SeaweedFS
    from tests.ui.conftest import Studio
    from tests.ui.stage import Stage

ROOT = Path(__file__).resolve().parent.parent
IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")

# ------------------------------------------------------------------ environment
# Set before anything imports prefect or boto3: both read it once.

_SCRATCH = Path(tempfile.mkdtemp(prefix="prefect-eachlabs-tests-"))
_OUTER = ("AWS_", "BOTO_", "EACHLABS_", "PREFECT_")
_PROXIES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")

for _name in list(os.environ):
    if _name.startswith(_OUTER) or _name.upper() in _PROXIES:
        del os.environ[_name]

os.environ.update(
    {
        "PREFECT_HOME": str(_SCRATCH / "prefect"),
        "XDG_STATE_HOME": str(_SCRATCH / "state"),
        "PREFECT_SERVER_MEMO_STORE_PATH": str(_SCRATCH / "prefect" / "memo_store.toml"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_LOGGING_COLORS": "false",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_CLI_COLORS": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
        # The embedded server runs its migrations first: up to 20 s on a busy machine, and the default waits 20 s.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
)
(_SCRATCH / "prefect").mkdir()

# Making one takes 30 ms, and each of thousands of HTTP clients, Prefect's too, makes its own.
ssl.create_default_context = functools.cache(ssl.create_default_context)

# A script that starts the tests in the background makes them, and all that they start, deaf to Ctrl-C.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if IN_CI else "here")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Four thousand tests stay until the end: looking for garbage among them would be a fifth of collecting them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_unconfigure() -> None:
    shutil.rmtree(_SCRATCH, ignore_errors=True)


# ------------------------------------------------------------------- virtual time


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """An async test runs in virtual time: see `tests.virtual_time`."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    from tests.protocol.kit import play  # the emulator, which many files need not load

    given = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    play(lambda: pyfuncitem.obj(**given))
    return True


# ------------------------------------------------- which process of several runs what


SLOW = (
    ("ui/test_shards.py", "ui/test_workers.py"),
    (
        "net",
        "webhooks",
        "limits/test_limits_server.py",
        "flows/test_illustrate_postgresql.py",
        "docs/test_docs_code.py",
        "flows/test_automations.py",
        "cli/test_deployments.py",
    ),
    ("ui/test_browser.py", "security/test_runs.py", "ui/test_builders.py"),
    ("docs/test_docs_tutorial.py",),
    ("docs/test_soak.py",),
    ("limits/test_machine_processes.py",),
    ("security/test_small_inputs.py",),
    ("batch/test_interrupts.py",),
    ("cli",),
    ("protocol/test_real_processes.py", "storage"),
)
"""Slow tests that share a server or a store, what takes longest first; each other file is a group of its own.

A process is given its next group before the last test of the one it has: long tests do not come last in a group.
"""


@functools.cache
def _group_of(file: str) -> str:
    """A file keeps to one process, and all that needs the Prefect server too: starting one takes 12 s of CPU."""
    return "server" if re.search(r"\bprefect_server\b", (ROOT / file).read_text(encoding="utf-8")) else file


def _slow_place_of(file: str) -> tuple[int, int]:
    """In SLOW: its group's, and its own in that."""
    name = file.removeprefix("tests/")
    found = ((at, n) for at, group in enumerate(SLOW) for n, one in enumerate(group) if name.startswith(one))
    return next(found, (len(SLOW), 0))


def _is_slow_run(config: pytest.Config) -> bool:
    return bool(config.getoption("markexpr") == "slow")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """For `--dist loadfile`; xdist's own groups are lost on pytest 9.2, which has no `_nodeid` to write them into."""
    from xdist.scheduler import LoadFileScheduling

    class LoadGroupsOfFiles(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            if not _is_slow_run(config):
                return _group_of(file)
            place, _ = _slow_place_of(file)
            return file if place == len(SLOW) else str(place)

    return LoadGroupsOfFiles(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Importing all tests takes each process 8 s of CPU: for the slow ones alone, only files that have some."""
    is_in_question = _is_slow_run(config) and collection_path.name.startswith("test_") and collection_path.is_file()
    return True if is_in_question and "mark.slow" not in collection_path.read_text(encoding="utf-8") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes longest comes first, as what needs the server; other files keep their order."""

    def place(item: pytest.Item) -> tuple[int, int]:
        file = item.nodeid.partition("::")[0]
        return _slow_place_of(file) if _is_slow_run(config) else (_group_of(file) != "server", 0)

    items.sort(key=place)


# ---------------------------------------------------------------------- network


class NetworkUsed(Exception):
    """A test reached for a host that is not this machine."""


_reached: list[str] = []


def _is_here(host: str | bytes | None) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if not name or name.lower() in ("localhost", socket.gethostname().lower()):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _refuse(host: str | bytes | None) -> None:
    where = host.decode() if isinstance(host, bytes) else str(host)
    _reached.append(where)
    raise NetworkUsed(f"this test reached for {where}: use 127.0.0.1, or a name under .invalid for a host that is not")


def _guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
    def guard(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_here(address[0]):
            _refuse(address[0])
        return connect(self, address)

    return guard


def _guarded_lookup(lookup: Callable[..., Any]) -> Callable[..., Any]:
    def guard(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else str(host or "")
        if name.rstrip(".").endswith(".invalid"):  # RFC 6761: never resolves, so nobody needs to be asked
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        try:
            ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            if not _is_here(name):
                _refuse(name)
        return lookup(host, *args, **kwargs)

    return guard


@pytest.fixture(scope="session", autouse=True)
def _loopback_alone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", _guarded(socket.socket.connect_ex))
        patch.setattr(socket, "getaddrinfo", _guarded_lookup(socket.getaddrinfo))
        yield


@pytest.fixture(autouse=True)
def _no_network(_loopback_alone: None) -> Iterator[None]:
    """Fails a test whose code swallowed the refusal, too."""
    _reached.clear()
    yield
    assert not _reached, f"reached for {sorted(set(_reached))}: tests talk to this machine alone"


# ------------------------------------------------------ what a machine may lack


def _missing(what: str) -> None:
    """Skips on a person's machine; fails in CI, where a test that silently never runs would go unnoticed."""
    if IN_CI:
        pytest.fail(f"{what} (in CI this must be there)", pytrace=False)
    pytest.skip(what)


@pytest.fixture(scope="session")
def require_tool() -> Callable[[str], Path]:
    """`require_tool("chromium")`: the path of a program; the test is skipped where it is not installed."""

    def require(name: str) -> Path:
        debian_postgresql = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
        beside_python = str(Path(sys.executable).parent)
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), beside_python, *map(str, debian_postgresql)])
        found = shutil.which(name, path=path)
        if found is None:
            _missing(f"{name} is not installed")
        return Path(str(found))

    return require


@pytest.fixture(scope="session")
def require_shared() -> Callable[[str], Path]:
    """`require_shared("PartiPrompts.tsv")`: a file of the data folder beside the repository, which a clone may lack."""

    def require(name: str) -> Path:
        path = ROOT.parent / "shared" / "data" / name
        if not path.parent.is_dir() and "GITHUB_ACTIONS" in os.environ:
            pytest.skip(f"{path.parent} is not there")  # a clone alone
        if not path.is_file():
            _missing(f"{path} is not there")
        return path

    return require


@pytest.fixture(scope="session")
def seaweedfs(require_tool: Callable[[str], Path]) -> Iterator[SeaweedFS]:
    """A second S3, once for all tests (of a process), with the bucket `pictures`; for slow tests."""
    weed = require_tool("weed")
    from tests.seaweed import SeaweedFS

    with tempfile.TemporaryDirectory(prefix="weed-") as folder, SeaweedFS(weed, Path(folder), bucket="pictures") as s3:
        yield s3


@pytest.fixture(scope="session")
def kept_database(request: pytest.FixtureRequest) -> Path:
    """Where the SQLite database of Prefect's servers is kept as migrations leave it: in pytest's cache."""
    return Path(request.config.cache.mkdir(f"prefect-{version('prefect')}"))


@pytest.fixture(scope="session")
def server_process(kept_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A Prefect server with all its services, on SQLite, once (in a process); tests may start it again."""
    from tests.ui.stage import opened

    with opened(tmp_path_factory.mktemp("server"), kept_database, {}) as stage:
        yield stage


@pytest.fixture
def at_server_process(server_process: Stage) -> Iterator[Stage]:
    """The same, as the server of this process, too."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: server_process.url}):
        yield server_process


@pytest.fixture(scope="session")
def studio_on_sqlite(kept_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """A server, an API, a bucket and a worker, set up as operators do; it starts in half the time of PostgreSQL's."""
    from tests.ui.conftest import made

    with made(tmp_path_factory.mktemp("stage"), kept_database) as opened:
        yield opened


from tests.flows.flow_fixtures import local_s3, prefect_server, studio  # noqa: E402, F401 - fixtures; after the environment is set
