"""The dashboard on loopback refuses whatever a browser could be made to send by somebody else."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
import trio
from starlette.datastructures import Headers

from nextgpu_node.api import server
from nextgpu_node.api.web import HEADERS, Web, refusal, static_files
from tests.unit.api.backend import MemoryBackend
from tests.unit.api.desk import MemoryDesk


class Site:
    """A dashboard that is open, and what a request needs to pass."""

    def __init__(self, backend: MemoryBackend, web: Web, token_file: Path) -> None:
        self.backend = backend
        self.web = web
        self.token_file = token_file
        self.url, _, self.token = web.open().url.partition("/#token=")
        self.host = self.url.removeprefix("http://")

    @property
    def browser(self) -> dict[str, str]:
        """What our own page sends with a request that changes something."""
        return {
            "authorization": f"Bearer {self.token}",
            "origin": self.url,
            "sec-fetch-site": "same-origin",
            "sec-fetch-mode": "cors",
            "sec-fetch-dest": "empty",
        }


@pytest.fixture
async def site(nursery: trio.Nursery) -> AsyncIterator[Site]:
    backend, desk = MemoryBackend(), MemoryDesk()
    with TemporaryDirectory(prefix="ngpu-") as directory:
        token_file = Path(directory) / "run" / "web.token"
        web = Web(lambda host: server.build_app(backend, desk, host), 0, token_file)
        await nursery.start(web.run)
        yield Site(backend, web, token_file)
        nursery.cancel_scope.cancel()


@pytest.fixture
async def http(site: Site) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=site.url, trust_env=False) as client:
        yield client


async def share(http: httpx.AsyncClient, headers: dict[str, str]) -> int:
    reply = await http.put("/v1/sharing", json={"enabled": True}, headers=headers)
    assert "access-control-allow-origin" not in reply.headers
    return reply.status_code


async def test_our_own_page_may_ask_and_change(site: Site, http: httpx.AsyncClient) -> None:
    assert await share(http, site.browser) == 200
    assert site.backend.sharing is True
    assert (await http.get("/v1/status", headers=site.browser)).status_code == 200


async def test_a_program_with_the_token_may_ask_too(site: Site, http: httpx.AsyncClient) -> None:
    bearer = {"authorization": f"Bearer {site.token_file.read_text()}"}
    assert site.token_file.stat().st_mode & 0o777 == 0o600
    assert (await http.get("/metrics", headers=bearer)).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/status", "/v1/units", "/v1/jobs", "/v1/data", "/v1/events", "/metrics", "/x"]
)
async def test_without_the_token_nothing_can_be_read(
    site: Site, http: httpx.AsyncClient, path: str
) -> None:
    wrong = (
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer " + "a" * 43},
        {"authorization": site.token},
        {"authorization": f"Basic {site.token}"},
        {"cookie": f"token={site.token}"},
    )
    for headers in wrong:
        reply = await http.get(path, headers=headers)
        assert reply.status_code == 401, headers
        assert reply.headers["www-authenticate"] == "Bearer"
    assert (await http.get(f"{path}?token={site.token}")).status_code == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost:{port}", "127.0.0.1", "127.0.0.1.nip.io:{port}", "nextgpu"]
)
async def test_a_name_that_was_rebound_to_loopback_is_refused(
    site: Site, http: httpx.AsyncClient, host: str
) -> None:
    port = site.host.rpartition(":")[2]
    headers = site.browser | {"host": host.format(port=port)}
    assert await share(http, headers) == 421
    for path in ("/", "/v1/status"):
        assert (await http.get(path, headers=headers)).status_code == 421
    assert site.backend.sharing is False


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "https://{host}", "http://localhost:1", "http://{host}.evil"],
)
async def test_another_origin_is_refused_even_with_the_token(
    site: Site, http: httpx.AsyncClient, origin: str
) -> None:
    headers = site.browser | {"origin": origin.format(host=site.host)}
    assert await share(http, headers) == 403
    assert site.backend.sharing is False
    assert (await http.get("/v1/status", headers=headers)).status_code == 403
    preflight = {"origin": origin, "access-control-request-method": "PUT"}
    reply = await http.options("/v1/sharing", headers=preflight)
    assert reply.status_code == 403


@pytest.mark.parametrize("where", ["cross-site", "same-site", "none"])
async def test_what_the_browser_says_comes_from_elsewhere_is_refused(
    site: Site, http: httpx.AsyncClient, where: str
) -> None:
    headers = site.browser | {"sec-fetch-site": where}
    assert await share(http, headers) == 403
    assert (await http.get("/v1/status", headers=headers)).status_code == 403
    assert site.backend.sharing is False


async def test_a_form_of_another_site_changes_nothing(site: Site, http: httpx.AsyncClient) -> None:
    """CSRF: a form or a simple fetch reaches us, without the token, which no browser adds."""
    form = {"content-type": "text/plain", "sec-fetch-site": "cross-site", "origin": "null"}
    for path in ("/v1/sharing", "/v1/audit", "/v1/data/jobs/delete"):
        reply = await http.post(path, content=b'{"enabled": true}', headers=form)
        assert reply.status_code == 403
        assert (await http.post(path, content=b"{}")).status_code == 401
    # An old browser that says nothing about itself, in a page that somehow has the token.
    del form["sec-fetch-site"], form["origin"]
    form["authorization"] = f"Bearer {site.token}"
    reply = await http.put("/v1/sharing", content=b'{"enabled": true}', headers=form)
    assert reply.status_code == 415
    assert site.backend.sharing is False


async def test_a_browser_that_hides_where_a_change_comes_from_is_refused(
    site: Site, http: httpx.AsyncClient
) -> None:
    headers = {k: v for k, v in site.browser.items() if k != "origin"}
    assert await share(http, headers) == 403


async def test_the_page_may_be_opened_from_anywhere_and_loaded_by_nobody_else(
    site: Site, http: httpx.AsyncClient
) -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert (await http.get("/", headers=link | {"sec-fetch-dest": "document"})).status_code == 200
    assert (await http.get("/", headers=link | {"sec-fetch-dest": "iframe"})).status_code == 403
    script = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert (await http.get("/app.js", headers=script)).status_code == 403
    assert (await http.post("/")).status_code == 405


async def test_every_answer_has_the_policy_and_none_sets_a_cookie(
    site: Site, http: httpx.AsyncClient
) -> None:
    asked = [await http.get(path) for path in ("/", "/app.js", "/v1/status", "/nowhere")]
    asked.append(await http.get("/v1/status", headers=site.browser))
    asked.append(await http.get("/", headers={"host": "evil.example"}))
    for reply in asked:
        assert "set-cookie" not in reply.headers
        for name, value in HEADERS.items():
            assert reply.headers[name] == value, (reply.url, name)
    policy = HEADERS["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy


def test_the_files_name_no_other_machine_and_have_no_inline_code() -> None:
    for path, (content, kind) in static_files().items():
        text = content.decode()
        if path.startswith("/vendor/") or kind.startswith("image/"):
            continue
        assert "://" not in text.replace("http://www.w3.org/2000/svg", ""), path
        for word in ("localStorage", "sessionStorage", "indexedDB", "document.cookie", "eval("):
            assert word not in text, (path, word)
    page = static_files()["/"][0].decode()
    assert " style=" not in page
    assert " on" not in page.replace(" on this", "").replace(" one", "")
    assert "<script>" not in page


async def test_the_dashboard_is_only_there_while_it_is_open(
    site: Site, http: httpx.AsyncClient
) -> None:
    assert site.web.open().url.partition("#")[2] == f"token={site.token}"
    assert len(site.token) >= 43
    site.web.close()
    await trio.testing.wait_all_tasks_blocked(0.05)
    with pytest.raises(httpx.TransportError):
        await http.get("/")
    assert not site.token_file.exists()
    assert site.web.view().url == ""


async def test_where_the_port_is_taken_another_one_is_used(nursery: trio.Nursery) -> None:
    with TemporaryDirectory(prefix="ngpu-") as directory, socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        app = server.build_app(MemoryBackend(), None)
        web = Web(lambda _host: app, port, Path(directory) / "run" / "token")
        await nursery.start(web.run)
        assert f":{port}/" not in web.open().url
        nursery.cancel_scope.cancel()


def test_two_headers_of_one_name_are_refused() -> None:
    def said(*pairs: tuple[str, str]) -> int | None:
        raw = [(name.encode(), value.encode()) for name, value in pairs]
        found = refusal("GET", "/v1/status", Headers(raw=raw), host="127.0.0.1:1", token="t")
        return found.status if found else None

    good = (("host", "127.0.0.1:1"), ("authorization", "Bearer t"))
    assert said(*good) is None
    assert said(*good, ("host", "127.0.0.1:1")) == 421
    assert said(*good, ("authorization", "Bearer t")) == 401
    assert said(*good, ("origin", "http://127.0.0.1:1"), ("origin", "http://evil")) == 403
    assert said(("authorization", "Bearer t")) == 421
    assert said(("host", "127.0.0.1:1"), ("authorization", "Bearer \u00fc")) == 401
