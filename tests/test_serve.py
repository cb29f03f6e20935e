"""The server: statuses and limits, many clients, hang-ups, draining, an existing client, and the page in a browser."""

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

from mlx_dmpo.config import ServeSettings  # noqa: E402
from mlx_dmpo.scores import Scores  # noqa: E402
from mlx_dmpo.use import serve  # noqa: E402
from mlx_dmpo.use.inputs import DataSet, read_data  # noqa: E402
from mlx_dmpo.use.match import Catalogue  # noqa: E402
from mlx_dmpo.use.rank import Job  # noqa: E402
from mlx_dmpo.use.ranker import Ranker  # noqa: E402
from mlx_dmpo.use.scoring import Scoring  # noqa: E402
from mlx_dmpo.use.worker import QueueFull, Task, Worker  # noqa: E402


@contextlib.contextmanager
def running(server):
    """The app on a free port, in a thread; its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        port = listening.getsockname()[1]
        uvicorn_server = uvicorn.Server(uvicorn.Config(server.app, log_level="error", lifespan="on", ws="none"))
        thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            wait_for(lambda: uvicorn_server.started)
            yield f"http://127.0.0.1:{port}"
        finally:
            uvicorn_server.should_exit = True
            thread.join(60)


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def post(address, path, body, **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(
        address + path, content=content, headers={"Content-Type": "application/json", **headers}, timeout=120
    )


class Gated:
    """A scorer that likes long titles; it waits at a gate, so that requests pile up."""

    name = "gated"

    def __init__(self):
        self.gate, self.entered, self.scored = threading.Event(), threading.Event(), []

    def score(self, examples):
        self.entered.set()
        assert self.gate.wait(60)
        for e in examples:
            self.scored.append(e.history)
            if "broken" in e.history:
                raise ValueError("out of luck")
            margins = np.array([float(len(e.positive) - len(n)) for n in e.negatives])
            yield Scores(e, margins)


class FakeRanker:
    name, method, prompt = "fake", "pairs", "pairwise"

    def __init__(self, scorer):
        self.scorer, self.scoring = scorer, Scoring(scorer)

    def count_tokens(self, texts):
        return sum(len(t.split()) for t in texts)

    def job(self, history, candidates):
        return Job(tuple(history), list(candidates), "pairs")


@contextlib.contextmanager
def fake_server(key="", **settings):
    scorer = Gated()
    made = ServeSettings(**{"max_queue": 3, **settings})
    worker = Worker(lambda: FakeRanker(scorer), made.max_queue, made.max_request_tokens)
    data = DataSet("none", Catalogue(("Vertigo", "Casablanca")), "movie", {})
    server = serve.Server(worker.start(), worker, data, made, key)
    try:
        with running(server) as address:
            yield address, scorer, server
    finally:
        scorer.gate.set()


# --- statuses


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not JSON"),
        (b'{"query": NaN}', 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        ([], 400, "not a JSON object"),
        ({"documents": ["a"]}, 400, "query: is missing"),
        ({"query": [], "documents": ["a"]}, 400, "query: is missing"),
        ({"query": "\n \n", "documents": ["a"]}, 400, "query: is missing"),
        ({"query": ["x"], "documents": []}, 400, "documents: is missing"),
        ({"query": ["x"], "documents": ["a", 5]}, 400, "documents[1]: is not a title"),
        ({"query": ["x"], "documents": ["a", {"title": "b"}]}, 400, "documents[1]: is not a title"),
        ({"query": ["x", " "], "documents": ["a"]}, 400, "query[1]: is not a title"),
        ({"query": ["\ud800"], "documents": ["a"]}, 400, "surrogate"),
        ({"query": ["x"], "documents": ["a"], "top_n": 0}, 400, "top_n: is not a whole number"),
        ({"query": ["x"], "documents": ["a"], "top_n": True}, 400, "top_n: is not a whole number"),
        ({"query": ["x"], "documents": ["a"], "return_documents": 1}, 400, "return_documents"),
        ({"query": ["x"], "documents": ["a"] * 60}, 413, "at most 50 are allowed"),
        ({"query": ["x"] * 60, "documents": ["a"]}, 413, "at most 50 are allowed"),
        ({"query": ["x"], "documents": ["a " * 300]}, 413, "tokens, and at most 200"),
        ({"query": ["x"], "documents": ["a" * 200_000]}, 413, "the body is larger than"),
    ],
)
def test_what_is_refused_and_how(body, status, said):
    with fake_server(max_items=50, max_request_tokens=200, max_body=150_000) as (address, scorer, _):
        scorer.gate.set()
        answer = post(address, "/v1/rerank", body)
        assert answer.status_code == status
        assert said in answer.json()["error"]["message"] and answer.json()["error"]["code"] == status
        assert post(address, "/v1/rerank", {"query": ["x"], "documents": ["a", "bb"]}).status_code == 200


def test_other_refusals():
    with fake_server() as (address, scorer, _):
        scorer.gate.set()
        assert httpx.get(address + "/nothing").status_code == 404
        assert "no such endpoint" in httpx.get(address + "/nothing").json()["error"]["message"]
        assert httpx.get(address + "/v1/rerank").status_code == 405
        plain = httpx.post(address + "/v1/rerank", content=b"{}", headers={"Content-Type": "text/plain"})
        assert plain.status_code == 415
        rebound = httpx.get(address + "/healthz", headers={"Host": "evil.example"})
        assert rebound.status_code == 400
        for limit in ("0", "x", "-1", "99999999"):
            assert httpx.get(address + f"/v1/items?limit={limit}").status_code == 400
        # without a length: chunks are counted
        chunked = httpx.post(
            address + "/v1/rerank",
            content=(b" " * 100_000 for _ in range(15)),
            headers={"Content-Type": "application/json"},
        )
        assert chunked.status_code == 413


def test_the_key():
    with fake_server(key="s3cret") as (address, scorer, _):
        scorer.gate.set()
        body = {"query": ["x"], "documents": ["a", "bb"]}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            answer = post(address, "/v1/rerank", body, **headers)
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "unauthorized"
        assert post(address, "/v1/rerank", body, Authorization="Bearer s3cret").status_code == 200
        assert httpx.get(address + "/v1/items").status_code == httpx.get(address + "/metrics").status_code == 401
        assert httpx.get(address + "/healthz").status_code == httpx.get(address + "/").status_code == 200


def in_threads(calls):
    found = [None] * len(calls)

    def run(i):
        found[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for t in threads:
        t.start()
    return threads, found


def test_a_full_queue_is_429_and_recovers():
    with fake_server(max_queue=3) as (address, scorer, server):
        body = {"query": ["x"], "documents": ["a", "bb"]}
        threads, found = in_threads([lambda: post(address, "/v1/rerank", body)])
        wait_for(scorer.entered.is_set)
        more, rest = in_threads(
            [lambda i=i: post(address, "/v1/rerank", {**body, "query": [f"y{i}"]}) for i in range(3)]
        )
        wait_for(lambda: server.worker.waiting == 3)
        full = post(address, "/v1/rerank", body)
        assert full.status_code == 429 and full.headers["retry-after"] == "1"
        assert full.json()["error"]["type"] == "queue_full"
        scorer.gate.set()
        for t in threads + more:
            t.join()
        assert [a.status_code for a in found + rest] == [200] * 4
        assert post(address, "/v1/rerank", body).status_code == 200


def test_a_client_that_hangs_up_frees_its_place():
    with fake_server(max_queue=1) as (address, scorer, server):
        host, port = address.removeprefix("http://").split(":")

        def send(query):
            body = json.dumps({"query": [query], "documents": ["a", "bb"]}).encode()
            head = (
                f"POST /v1/rerank HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
                f"{len(body)}\r\n\r\n"
            )
            s = socket.create_connection((host, int(port)))
            s.sendall(head.encode() + body)
            return s

        with send("first"):
            wait_for(scorer.entered.is_set)
            waiting = send("second")
            wait_for(lambda: server.worker.waiting == 1)
            assert post(address, "/v1/rerank", {"query": ["z"], "documents": ["a"]}).status_code == 429
            waiting.close()
            wait_for(lambda: server.worker.waiting == 0)
            third = send("third")
            wait_for(lambda: server.worker.waiting == 1)
            scorer.gate.set()
            assert b"200 OK" in third.recv(4096)
            third.close()
        assert {h for h in scorer.scored} == {("first",), ("third",)}


def test_one_request_cannot_spoil_another():
    """Both advance together; the one that fails gets 500, the other its answer."""
    with fake_server(max_queue=5) as (address, scorer, server):
        threads, found = in_threads([lambda: post(address, "/v1/rerank", {"query": ["w"], "documents": ["a", "bb"]})])
        wait_for(scorer.entered.is_set)
        more, rest = in_threads(
            [
                lambda q=q: post(address, "/v1/rerank", {"query": [q], "documents": ["a", "bb", "ccc"]})
                for q in ("broken", "fine")
            ]
        )
        wait_for(lambda: server.worker.waiting == 2)
        scorer.gate.set()
        for t in threads + more:
            t.join()
        assert [a.status_code for a in found + rest] == [200, 500, 200]
        assert [r["index"] for r in rest[1].json()["results"]] == [2, 1, 0]
        assert "out of luck" not in rest[0].text  # the inside of an error is for the server's terminal


def test_a_closed_worker_answers_what_waits_and_takes_nothing_new():
    scorer = Gated()
    worker = Worker(lambda: FakeRanker(scorer), 10)
    worker.start()
    tasks = [worker.submit(Task([], lambda r, i=i: r.job([f"h{i}"], ["a", "bb"]))) for i in range(3)]
    wait_for(scorer.entered.is_set)
    closing = threading.Thread(target=worker.close)
    closing.start()
    wait_for(lambda: worker._closing)
    with pytest.raises(QueueFull):
        worker.submit(Task([], lambda r: 0))
    scorer.gate.set()
    closing.join()
    assert [t.future.result(0).titles for t in tasks] == [["bb", "a"]] * 3


def test_results_and_ties():
    with fake_server() as (address, scorer, _):
        scorer.gate.set()
        found = post(
            address, "/v1/rerank", {"query": "x\ny", "documents": ["a", "ccc", {"text": "bb"}, "a"], "model": "m"}
        ).json()
        assert [r["index"] for r in found["results"]] == [1, 2, 0, 3]  # equal documents in the order in which they came
        assert [r["document"]["text"] for r in found["results"]] == ["ccc", "bb", "a", "a"]
        shares = [r["relevance_score"] for r in found["results"]]
        assert (
            shares == sorted(shares, reverse=True) and shares[2] == shares[3] and 0 <= min(shares) <= max(shares) <= 1
        )
        assert set(found["usage"]) == {"total_tokens", "prompt_tokens"}
        short = post(
            address, "/v1/rerank", {"query": ["x"], "documents": ["a", "bb"], "top_n": 1, "return_documents": False}
        )
        assert [set(r) for r in short.json()["results"]] == [{"index", "relevance_score", "score"}]
        alone = post(address, "/v1/rerank", {"query": ["x"], "documents": ["a"]}).json()
        assert alone["results"][0]["relevance_score"] == 1.0


def test_metrics_are_prometheus_text():
    with fake_server() as (address, scorer, _):
        scorer.gate.set()
        post(address, "/v1/rerank", {"query": ["x"], "documents": ["a", "bb"]})
        text = httpx.get(address + "/metrics").text
        assert 'mlx_dmpo_requests_total{path="/v1/rerank",status="200"} 1' in text
        assert "mlx_dmpo_pairs_scored_total 1" in text
        values = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        assert all(float(value) >= 0 for _, value in values)


# --- the embedded model


@pytest.fixture(scope="module")
def embedded():
    """(address, a ranker of the same model, data), served by the embedded model."""
    settings = ServeSettings(batch_size=32)
    data = read_data("")
    hostile = Catalogue((*data.catalogue.titles, *HOSTILE))
    data = DataSet(data.source, hostile, data.domain, data.users)
    worker = Worker(lambda: Ranker.load(batch_size=32), settings.max_queue)
    server = serve.Server(worker.start(), worker, data, settings)
    with running(server) as address:
        yield address, Ranker.load(batch_size=32), data


HOSTILE = (
    "<img src=x onerror=document.title='owned'>",
    "</script><script>document.title='owned'</script>",
    "\"'&amp; {{7*7}} ${1}",
)


def test_eight_clients_and_fifty_requests_each(embedded):
    address, ranker, data = embedded
    users, rng = list(data.users.values()), np.random.default_rng(0)
    titles = data.catalogue.titles[:200]
    asked = [(users[i][:5], [titles[j] for j in rng.permutation(200)[:3]]) for i in range(40)]
    expected = [ranker.rank(h, c) for h, c in asked]
    wrong, done = [], []

    def client(number):
        with httpx.Client(timeout=120) as http:
            draw = np.random.default_rng([1, number])
            for i in draw.integers(0, len(asked), 50):
                history, documents = asked[i]
                answer = http.post(address + "/v1/rerank", json={"query": list(history), "documents": documents})
                order = [documents[r["index"]] for r in answer.json().get("results", [])]
                scores = [r["score"] for r in answer.json().get("results", [])]
                done.append(answer.status_code)
                if order != expected[i].titles or scores != pytest.approx(
                    [r.score for r in expected[i].ranking], abs=1e-3
                ):
                    wrong.append((i, order, expected[i].titles))

    started = time.monotonic()
    threads, _ = in_threads([lambda n=n: client(n) for n in range(8)])
    for t in threads:
        t.join()
    print(f"400 requests in {time.monotonic() - started:.1f} s")
    assert done == [200] * 400 and wrong == []


def test_explain_over_http_is_the_rankers_own(embedded):
    address, ranker, data = embedded
    history = next(iter(data.users.values()))[:4]
    a, b = data.catalogue.titles[:2]
    found = post(address, "/v1/explain", {"query": list(history), "chosen": a, "rejected": b}).json()
    own = ranker.explain(history, a, b)
    assert found["margin"] == pytest.approx(own.margin, abs=1e-3)
    assert [h["title"] for h in found["history"]] == list(history)
    assert sum(t["difference"] for t in found["tokens"]) == pytest.approx(found["margin"], abs=1e-4)
    for body in ({"chosen": a, "rejected": a}, {"chosen": a}, {"chosen": a, "rejected": b, "max_flip": 4}):
        assert post(address, "/v1/explain", {"query": list(history), **body}).status_code == 400


def test_titles_that_the_prompt_cannot_hold_and_control_tokens(embedded):
    """Too long is 400; a control token is taken as text, its angle brackets replaced as in every title."""
    address, _, data = embedded
    documents = list(data.catalogue.titles[:2])
    answer = post(address, "/v1/rerank", {"query": ["word " * 3000], "documents": documents})
    assert answer.status_code == 400 and "max_seq_length" in answer.json()["error"]["message"]
    answer = post(address, "/v1/rerank", {"query": ["a <|im_end|> b"], "documents": documents})
    assert answer.status_code == 200


def test_typed_titles_are_matched_and_documents_come_back_as_sent(embedded):
    address, ranker, data = embedded
    title, other = data.catalogue.titles[:2]
    history = [data.catalogue.titles[5]]
    found = post(address, "/v1/rerank", {"query": [history[0].upper()], "documents": [title.lower(), other]}).json()
    assert {r["document"]["text"] for r in found["results"]} == {title.lower(), other}
    own = ranker.rank(history, [title, other])
    assert [r["score"] for r in found["results"]] == pytest.approx([r.score for r in own.ranking], abs=1e-3)


def test_items(embedded):
    address, _, data = embedded
    found = httpx.get(address + "/v1/items", params={"q": data.catalogue.titles[7].lower(), "limit": 3}).json()
    assert found["items"][0] == {"title": data.catalogue.titles[7]} and len(found["items"]) <= 3
    assert found["total"] == len(data.catalogue.titles)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # its clients leave their connections to the garbage collector
def test_coheres_client_works_unchanged(embedded):
    """cohere 7.3.1 from PyPI, both of its clients, pointed at this server."""
    cohere = pytest.importorskip("cohere")
    address, ranker, data = embedded
    history, documents = list(next(iter(data.users.values()))[:4]), list(data.catalogue.titles[:4])
    expected = ranker.rank(history, documents).titles
    for client in (cohere.Client, cohere.ClientV2):
        found = client("key", base_url=address).rerank(
            model="any", query="\n".join(history), documents=documents, top_n=3
        )
        assert [documents[r.index] for r in found.results] == expected[:3]
        assert all(0 <= r.relevance_score <= 1 for r in found.results)
        del found
    del client
    gc.collect()


# --- the process


def start_process(*arguments, **environment):
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "mlx_dmpo", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    line = process.stdout.readline()
    assert "http://" in line, process.stderr.read()
    return process, line.split(" on ")[1].split(" ")[0]


def test_sigterm_drains():
    """A request that has come in is answered after SIGTERM; the process ends with 143."""
    process, address = start_process()
    try:
        data = read_data("")
        body = {"query": list(data.users["test-0000"]), "documents": list(data.catalogue.titles[:12])}
        threads, found = in_threads([lambda: post(address, "/v1/rerank", body)])
        wait_for(lambda: httpx.get(address + "/healthz").json()["running"] == 1)
        process.send_signal(signal.SIGTERM)
        threads[0].join(60)
        assert found[0].status_code == 200 and len(found[0].json()["results"]) == 12
        _, err = process.communicate(timeout=60)
        assert process.returncode == 143 and "every accepted request was answered" in err
    finally:
        process.kill()


def test_a_taken_port_and_a_missing_model_are_one_line(capsys):
    from mlx_dmpo.cli.main import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit) as stop:
            main(["serve", "--port", str(taken.getsockname()[1])])
    assert stop.value.code == 2 and "cannot be listened on" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--port", "0", "--model", "runs/typo/model/x"])
    assert stop.value.code == 2 and "runs/typo/model/x" in capsys.readouterr().err


# --- the page


@contextlib.contextmanager
def opened(browser, address, **how):
    """A page of which every console error, uncaught error and foreign request is recorded."""
    context = browser.new_context(**how)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.faults = []
    page.on("console", lambda m: m.type in ("error", "warning") and page.faults.append(m.text))
    page.on("pageerror", lambda e: page.faults.append(str(e)))
    page.on("request", lambda r: r.url.startswith((address, "data:")) or page.faults.append(r.url))
    page.goto(address)
    page.wait_for_selector("#found button")
    yield page
    context.close()


def pick(page, title):
    page.fill("#search", title)
    page.locator("#found button", has_text=title).first.click()
    page.locator("#liked button", has_text=title).wait_for()


def ranked(page):
    page.locator("#status", has_text="ranked in").wait_for()
    return page.locator("#ranking .title").all_text_contents()


def shoot(page, name):
    folder = os.environ.get("MLX_DMPO_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_search_pick_rank_and_explain_in_a_browser(embedded, browser, width, scheme):
    address, ranker, data = embedded
    with opened(browser, address, viewport={"width": width, "height": 844}, color_scheme=scheme) as page:
        liked = list(data.catalogue.titles[20:22])
        pick(page, liked[0])
        first = ranked(page)
        pick(page, liked[1])
        shown = ranked(page)
        pool = [t for t in data.catalogue.titles if t not in liked][:12]
        assert shown == ranker.rank(liked, pool).titles and len(first) == 12
        page.locator("#ranking button").first.click()
        page.locator("#whystatus", has_text="Margin").wait_for()
        assert shown[0] in page.inner_text("#h-why")
        assert page.locator("#answer .effect").count() == 2
        own = ranker.explain(liked, shown[0], shown[1])
        assert f"{abs(own.margin):.2f}" in page.inner_text("#whystatus")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shoot(page, f"page-{width}-{scheme}")
        assert page.faults == []


def test_the_page_by_keyboard_alone(embedded, browser):
    address, _, data = embedded
    with opened(browser, address) as page:
        page.focus("#search")
        page.keyboard.type(data.catalogue.titles[30])
        page.locator(f"#found li:first-child button[data-title={json.dumps(data.catalogue.titles[30])}]").wait_for()
        page.keyboard.press("ArrowDown")
        page.evaluate("search()")  # an answer that comes late replaces the list, and not the place in it
        assert page.evaluate("document.activeElement.dataset.title") == data.catalogue.titles[30]
        page.keyboard.press("Enter")
        assert len(ranked(page)) == 12
        for _ in range(80):
            if page.evaluate("document.activeElement.closest('#ranking') !== null"):
                break
            page.keyboard.press("Tab")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.locator("#whystatus", has_text="Margin").wait_for()
        assert page.evaluate("document.activeElement.id") == "why" and page.faults == []


def test_hostile_titles_are_text(embedded, browser):
    address, _, _ = embedded
    with opened(browser, address) as page:
        title = page.title()
        for hostile in HOSTILE:
            page.fill("#search", hostile)
            page.locator(f"#found button[data-title={json.dumps(hostile)}]").click()
        assert ranked(page)
        page.locator("#ranking button").first.click()
        page.locator("#whystatus", has_text="Margin").wait_for()
        text = page.inner_text("#liked")
        assert all(hostile in text for hostile in HOSTILE)
        assert page.title() == title and page.locator("img").count() == 0 and page.faults == []
        shoot(page, "page-hostile")


# --- slow clients, and keys that are not ASCII


def test_a_body_that_does_not_arrive_ends_with_408_and_holds_nothing_up(monkeypatch):
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.2)
    with fake_server() as (address, scorer, server):
        scorer.gate.set()
        slow = socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])))
        slow.settimeout(60)
        head = "POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        slow.sendall(head.encode())
        assert post(address, "/v1/rerank", {"query": ["x"], "documents": ["a", "bb"]}).status_code == 200
        answer = b""
        while part := slow.recv(65536):  # head and body may come apart; the server closes the connection
            answer += part
        slow.close()
    assert answer.startswith(b"HTTP/1.1 408 ") and b"did not arrive within" in answer


def test_a_key_of_any_alphabet():
    with fake_server(key="ключ é") as (address, scorer, server):
        scorer.gate.set()
        statuses = [
            httpx.get(address + "/v1/items", headers=[(b"Authorization", given)]).status_code
            for given in ("Bearer ключ é".encode(), "Bearer ключ e".encode(), "Bearer é".encode("latin-1"))
        ]
    assert statuses == [200, 401, 401]


def test_limits_that_are_no_ascii_number_are_400_and_a_wrong_method_names_the_right_one():
    with fake_server() as (address, scorer, server):
        for limit in ("²", "٣", "9" * 5000, "", "1e3", "-1"):
            assert httpx.get(address + "/v1/items", params={"limit": limit}).status_code == 400
        found = httpx.get(address + "/v1/rerank")
    assert found.status_code == 405 and found.headers["allow"] == "POST"
