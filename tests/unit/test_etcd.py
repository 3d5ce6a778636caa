"""The etcd client: one call, one connection, one deadline; who does not answer is passed over."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from common import etcd
from common.config import Etcd
from common.etcd import EtcdClient
from common.lease_calls import Claim, Granted, LeaseKeys, Look, Seen, Unanswered
from outlive.lab_etcd import TlsFiles
from tests.certificates import Authority
from tests.sim import etcd as simulated


class Users:
    """The authentication of an etcd: who logs in with the password gets a token, until it is forgotten."""

    def __init__(self, password: str, *, enabled: bool = True) -> None:
        self._password = password
        self.enabled = enabled
        self.logins = 0
        self.token = ""

    def answer(self, path: str, head: bytes, body: bytes) -> bytes | None:
        """Return an error, or a token; None: the call may go on."""
        if path != "/v3/auth/authenticate":
            known = not self.enabled or (
                self.token != "" and f"Authorization: {self.token}\r\n".encode() in head
            )
            return None if known else b'{"error":"etcdserver: invalid auth token","code":16}'
        if not self.enabled:
            return b'{"error":"etcdserver: authentication is not enabled","code":9}'
        if json.loads(body) != {"name": "outlive", "password": self._password}:
            return b'{"error":"etcdserver: authentication failed, invalid user ID or password","code":3}'
        self.logins += 1
        self.token = f"token-{self.logins}"
        return json.dumps({"token": self.token}).encode()


@asynccontextmanager
async def member(
    store: simulated.Etcd | None,
    *,
    status: str = "200 OK",
    tls: ssl.SSLContext | None = None,
    users: Users | None = None,
) -> AsyncIterator[str]:
    """Serve a simulated etcd over HTTP; None: take connections, and never answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split()[1].decode()
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        if store is None:
            await reader.read()
        else:
            answer = users.answer(path, head, body) if users is not None else None
            said = "400 Bad Request" if answer is not None and b"error" in answer else status
            answer = answer or store.answer(path, body, time.monotonic())
            writer.write(f"HTTP/1.0 {said}\r\nContent-Type: application/json\r\n\r\n".encode() + answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        scheme = "http" if tls is None else "https"
        yield f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def server_tls(files: TlsFiles) -> ssl.SSLContext:
    """Show that certificate, and want one of the same authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    context.load_verify_locations(files.authority)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def by_tls(url: str, authority: Path, own: TlsFiles | None) -> Etcd:
    return Etcd(
        endpoints=(url,),
        ca_file=str(authority),
        cert_file=str(own.certificate) if own is not None else "",
        key_file=str(own.key) if own is not None else "",
    )


def keys() -> LeaseKeys:
    return LeaseKeys("w", node="a", boot_id="x", ttl_s=2, clock=time.monotonic)


async def test_a_question_is_answered_over_http() -> None:
    async with member(simulated.Etcd()) as url:
        client = EtcdClient(Etcd(endpoints=(url,)), 1.0)
        assert isinstance(await client.ask(keys(), Claim(term=1, known=0, over=False, blank=True)), Granted)
        looked = await client.ask(keys(), Look())
        assert isinstance(looked, Seen)
        assert looked.standing.leader is not None
        assert looked.standing.leader.node == "a"


async def test_a_member_that_hangs_costs_one_deadline_and_is_asked_last_from_then_on() -> None:
    async with member(None) as hanging, member(simulated.Etcd()) as good:
        client = EtcdClient(Etcd(endpoints=(hanging, good)), 0.2)
        began_s = time.monotonic()
        assert isinstance(await client.ask(keys(), Look()), Seen)
        assert 0.2 <= time.monotonic() - began_s < 1.0
        began_s = time.monotonic()
        assert isinstance(await client.ask(keys(), Look()), Seen)
        assert time.monotonic() - began_s < 0.2


async def test_nobody_answers_is_unanswered_with_the_reason() -> None:
    client = EtcdClient(Etcd(endpoints=("http://127.0.0.1:1",)), 0.2)
    answer = await client.ask(keys(), Look())
    assert isinstance(answer, Unanswered)
    assert "127.0.0.1:1" in answer.reason


async def test_an_answer_that_is_an_error_is_no_answer() -> None:
    async with member(simulated.Etcd(), status="503 Service Unavailable") as url:
        answer = await EtcdClient(Etcd(endpoints=(url,)), 1.0).ask(keys(), Look())
        assert isinstance(answer, Unanswered)


async def test_without_endpoints_the_reason_says_so() -> None:
    answer = await EtcdClient(Etcd(), 1.0).ask(keys(), Look())
    assert isinstance(answer, Unanswered)
    assert "no etcd is configured here" in answer.reason


async def seen(client: EtcdClient) -> bool:
    """Ask until there is an answer, some times: what is in files is read beside the calls."""
    for _ in range(20):
        if isinstance(await client.ask(keys(), Look()), Seen):
            return True
        await asyncio.sleep(0.01)
    return False


def put(path: Path, password: str, mode: int = 0o600) -> None:
    path.write_text(password)
    path.chmod(mode)


async def test_a_question_is_answered_over_tls_by_who_shows_the_right_certificate(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    server, own = ours.issue("server", ["127.0.0.1"]), ours.issue("node")
    async with member(simulated.Etcd(), tls=server_tls(server)) as url:
        assert isinstance(await EtcdClient(by_tls(url, ours.file, own), 1.0).ask(keys(), Look()), Seen)
        nameless = await EtcdClient(by_tls(url, ours.file, None), 1.0).ask(keys(), Look())
        assert isinstance(nameless, Unanswered), "it has shown no certificate"


@pytest.mark.parametrize("wrong", ["authority", "address"])
async def test_a_member_that_cannot_be_believed_is_told_nothing(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "theirs").mkdir()
    ours, theirs = Authority(tmp_path), Authority(tmp_path / "theirs")
    server = (theirs if wrong == "authority" else ours).issue(
        "server", ["127.0.0.1" if wrong == "authority" else "127.0.0.2"]
    )
    store = simulated.Etcd()
    async with member(store, tls=server_tls(server)) as url:
        client = EtcdClient(by_tls(url, ours.file, ours.issue("node")), 1.0)
        answer = await client.ask(keys(), Claim(term=1, known=0, over=False, blank=True))
        assert isinstance(answer, Unanswered)
        assert "certificate verify failed" in answer.reason


async def test_a_certificate_that_is_replaced_is_used_without_a_restart(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    old, new = Authority(tmp_path / "old"), Authority(tmp_path)
    server, own = new.issue("server", ["127.0.0.1"]), new.issue("node")
    authority = tmp_path / "used.pem"
    authority.write_bytes(old.file.read_bytes())
    async with member(simulated.Etcd(), tls=server_tls(server)) as url:
        client = EtcdClient(by_tls(url, authority, own), 1.0)
        assert isinstance(await client.ask(keys(), Look()), Unanswered)
        authority.write_bytes(new.file.read_bytes())
        assert await seen(client)


async def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    answer = await EtcdClient(by_tls("https://127.0.0.1:1", missing, None), 1.0).ask(keys(), Look())
    assert isinstance(answer, Unanswered)
    assert str(missing) in answer.reason


def as_user(url: str, password: Path) -> Etcd:
    return Etcd(endpoints=(url,), user="outlive", password_file=str(password))


async def test_it_logs_in_once_and_again_when_etcd_has_forgotten_it(tmp_path: Path) -> None:
    password, users = tmp_path / "password", Users("secret")
    put(password, "secret\n")
    async with member(simulated.Etcd(), users=users) as url:
        client = EtcdClient(as_user(url, password), 1.0)
        claim = Claim(term=1, known=0, over=False, blank=True)
        assert isinstance(await client.ask(keys(), claim), Granted)
        assert users.logins == 1
        users.token = ""
        granted = await client.ask(keys(), Claim(term=2, known=1, over=False, blank=True))
        assert isinstance(granted, Granted), "what etcd refused it has not done: it may be said again"
        assert users.logins == 2


async def test_a_wrong_password_is_said_and_a_file_that_is_mended_is_read_again(tmp_path: Path) -> None:
    password, users = tmp_path / "password", Users("secret")
    put(password, "guessed")
    async with member(simulated.Etcd(), users=users) as url:
        client = EtcdClient(as_user(url, password), 1.0)
        answer = await client.ask(keys(), Look())
        assert isinstance(answer, Unanswered)
        assert "user outlive cannot log in" in answer.reason
        assert "guessed" not in answer.reason
        put(password, "secret")
        assert await seen(client)


async def test_a_user_is_no_obstacle_before_authentication_is_turned_on(tmp_path: Path) -> None:
    password, users = tmp_path / "password", Users("secret", enabled=False)
    put(password, "secret")
    async with member(simulated.Etcd(), users=users) as url:
        client = EtcdClient(as_user(url, password), 1.0)
        assert isinstance(await client.ask(keys(), Look()), Seen)
        users.enabled = True
        assert isinstance(await client.ask(keys(), Look()), Seen)


async def test_who_would_have_to_log_in_is_told(tmp_path: Path) -> None:
    async with member(simulated.Etcd(), users=Users("secret")) as url:
        answer = await EtcdClient(Etcd(endpoints=(url,)), 1.0).ask(keys(), Look())
        assert isinstance(answer, Unanswered)
        assert "give etcd.user and etcd.password_file" in answer.reason


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [("", 0o600, "holds no password"), ("\n", 0o600, "no password"), ("secret", 0o644, "read by others")],
)
async def test_a_password_that_cannot_be_used_is_said_and_ends_nothing(
    tmp_path: Path, content: str, mode: int, says: str
) -> None:
    password, users = tmp_path / "password", Users("secret")
    put(password, content, mode)
    async with member(simulated.Etcd(), users=users) as url:
        client = EtcdClient(as_user(url, password), 1.0)
        answer = await client.ask(keys(), Look())
        assert isinstance(answer, Unanswered)
        assert says in answer.reason
        put(password, "secret")
        assert await seen(client)


async def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    server, own = ours.issue("server", ["127.0.0.1"]), ours.issue("node")
    own.key.chmod(0o640)
    async with member(simulated.Etcd(), tls=server_tls(server)) as url:
        answer = await EtcdClient(by_tls(url, ours.file, own), 1.0).ask(keys(), Look())
        assert isinstance(answer, Unanswered)
        assert "read by others" in answer.reason


async def test_many_questions_log_in_once(tmp_path: Path) -> None:
    password, users = tmp_path / "password", Users("secret")
    put(password, "secret")
    async with member(simulated.Etcd(), users=users) as url:
        client = EtcdClient(as_user(url, password), 1.0)
        for logins in (1, 2):
            answers = await asyncio.gather(*(client.ask(keys(), Look()) for _ in range(8)))
            assert all(isinstance(answer, Seen) for answer in answers)
            assert users.logins == logins
            users.token = ""


async def test_a_disk_that_hangs_holds_up_nothing_that_was_read_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, on = Authority(tmp_path), threading.Event()
    server, own = ours.issue("server", ["127.0.0.1"]), ours.issue("node")
    read = etcd._tls_context

    def hangs(config: Etcd) -> ssl.SSLContext:
        on.wait(20)
        return read(config)

    async with member(simulated.Etcd(), tls=server_tls(server)) as url:
        client = EtcdClient(by_tls(url, ours.file, own), 0.5)
        assert await seen(client)
        monkeypatch.setattr(etcd, "_tls_context", hangs)
        client._tls.doubt()
        began_s = time.monotonic()
        assert isinstance(await client.ask(keys(), Look()), Seen)
        fresh = await EtcdClient(by_tls(url, ours.file, own), 0.1).ask(keys(), Look())
        assert isinstance(fresh, Unanswered)
        assert time.monotonic() - began_s < 5
        on.set()


async def test_only_who_was_asked_loses_its_place(tmp_path: Path) -> None:
    """Several questions find out at once that a member hangs: they do not come round to it again."""
    async with (
        member(None) as hanging,
        member(simulated.Etcd()) as good,
        member(simulated.Etcd()) as other,
    ):
        client = EtcdClient(Etcd(endpoints=(hanging, good, other)), 0.2)
        began_s = time.monotonic()
        answers = await asyncio.gather(*(client.ask(keys(), Look()) for _ in range(3)))
        assert all(isinstance(answer, Seen) for answer in answers)
        assert time.monotonic() - began_s < 0.39
