"""The live page with Python behind it: it says what the model says, and a hostile upload gets a sentence."""

import io
import json
import os
import re
import socket
import sys
import threading
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image

from minblip2 import UserError, masks
from minblip2.__main__ import main
from minblip2.attention import capture_attention
from minblip2.commands import demo_server
from minblip2.commands.demo_server import KIND, MOST_BYTES, Model, Server, with_queries
from minblip2.data.pictures import load_image
from minblip2.data.scenes import draw_scenes
from minblip2.lm.llama import Llama, LlamaConfig
from minblip2.training.shipping import SHIPPED

from .browser import fetch_axe, phone, violations
from .pictures import BAD, encoded

WRITING, WRITTEN = threading.Event(), []
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd" width="9" height="9"/></svg>'


def note_writes(event, arguments):
    """An audit hook: files that are opened for writing while WRITING is set."""
    if event == "open" and WRITING.is_set() and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        WRITTEN.append(arguments[0])


sys.addaudithook(note_writes)  # there is no way to take it back, so it listens to a flag


@pytest.fixture(scope="module")
def picture():
    return next(iter(draw_scenes(1, "a photograph")))[1]


@pytest.fixture(scope="module")
def uploaded(picture):
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def server():
    with Server(demo_server.open_model(SHIPPED, None, None), 0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving
        serving.shutdown()


def talk(server, request, then_close=True):
    """What the server answers to these bytes: its status, and its text."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as line:
        line.sendall(request)
        if then_close:
            line.shutdown(socket.SHUT_WR)
        answer = b""
        while part := line.recv(2**16):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


def post(server, body, path="/caption", length=None, host=None, kind=KIND, method="POST", **headers):
    """A request as a browser sends it, or nearly so; a header that is None is left out."""
    given = {"Host": host or f"127.0.0.1:{server.server_port}", "Content-Type": kind,
             "Content-Length": len(body) if length is None else length,
             **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value is not None)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


# --- what it says -----------------------------------------------------------------------------------------------------


def test_it_says_what_the_model_says(server, picture, uploaded):
    model = server.model
    status, said = talk(server, post(server, uploaded, Origin=f"http://127.0.0.1:{server.server_port}",
                                     Sec_Fetch_Site="same-origin"))
    said = json.loads(said)
    assert status == 200 and said["text"] == model.blip2.caption(picture, beams=1)
    assert [step["text"] for step in said["steps"]] == [*re.findall(r"\w+|,", said["text"]), "(end)"]
    blocks, queries, cells = said["maps"]["dims"]
    assert (blocks, queries) == (len(model.data()["blocks"]), model.data()["queries"])
    assert np.allclose(np.reshape(said["maps"]["data"], (blocks, queries, cells)).sum(axis=2), 1, atol=1e-4)
    for step in said["steps"]:  # greedy: what was chosen is the likeliest
        assert step["best"][0][2] and step["p"] == step["best"][0][1] and len(step["looked"]) == queries
    _, answer = talk(server, post(server, uploaded, "/ask?question=how+many+things+are+there"))
    assert json.loads(answer)["text"] == model.blip2.ask(picture, "how many things are there")
    _, found = talk(server, post(server, uploaded, "/match?sentence=a+red+circle"))
    found = json.loads(found)
    assert found["match"] == pytest.approx(model.retriever.match(picture, ["a red circle"]).item(), abs=1e-5)
    cosine = model.retriever.similarity(picture, ["a red circle"]).item()
    assert max(found["cosines"]) == pytest.approx(cosine, abs=1e-5)
    assert found["tokens"] == ["a", "red", "circle"]


def test_a_hidden_query_is_given_no_attention(server, picture):
    said = server.model.caption(picture, hidden="0,3")
    assert all(step["looked"][0] == step["looked"][3] == 0 < step["looked"][1] for step in said["steps"])
    features = server.model.blip2.encode_images(picture)
    everything = with_queries(server.model.blip2, range(server.model.data()["queries"]))
    assert everything.caption(picture, beams=1) == server.model.blip2.caption(picture, beams=1)
    assert with_queries(server.model.blip2, [1, 2]).stage2.soft_prompt(features).shape[1] == 2


@torch.no_grad()
def test_attention_is_watched_whoever_computes_it(server):
    lm = server.model.blip2.stage2.lm
    x, mask = torch.randn(1, 5, lm.width), torch.ones(1, 5, dtype=torch.bool)
    with demo_server.Watch() as watch:
        lm(x, masks.causal(mask), masks.token_positions(mask))
    with capture_attention(*(block.attention for block in lm.blocks)) as weights:
        lm(x, masks.causal(mask), masks.token_positions(mask))
    for ours, theirs in zip(watch.weights, weights, strict=True):
        torch.testing.assert_close(ours, theirs)
    llama = Llama(LlamaConfig(vocab_size=20, width=16, layers=2, heads=4, kv_heads=2, mlp_width=32)).eval()
    with demo_server.Watch() as watch:
        llama(torch.randn(1, 5, 16), masks.causal(mask), masks.token_positions(mask))
    assert [layer.shape for layer in watch.weights] == [(1, 4, 5, 5)] * 2
    assert all(torch.allclose(layer.sum(dim=3), torch.ones(())) and layer[0, 0, 0, 1] == 0 for layer in watch.weights)


def test_a_picture_in_memory_is_decoded_as_a_file_is(tmp_path, uploaded):
    for name, content in {"photo.png": uploaded, "photo.jpg": encoded("JPEG"), "photo.gif": encoded("GIF")}.items():
        (tmp_path / name).write_bytes(content)
        memory, file = load_image(demo_server.Upload(content)), load_image(tmp_path / name)
        assert np.array_equal(np.array(memory), np.array(file))


def test_an_upload_is_never_written(server, uploaded):
    WRITTEN.clear()
    WRITING.set()
    try:
        for path in ("/caption", "/ask?question=what+is+there", "/match?sentence=a+circle"):
            assert talk(server, post(server, uploaded, path))[0] == 200
    finally:
        WRITING.clear()
    assert WRITTEN == []


def test_it_listens_to_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"


def test_the_page_is_served_and_says_what_it_may_load(server):
    for path, begins in {"/": "<!doctype html>", "/live.js": "// The live page", "/live.css": ":root",
                         "/data.json": "{"}.items():
        status, text = talk(server, post(server, b"", path, method="GET"))
        assert status == 200 and text.startswith(begins), path


# --- what it refuses --------------------------------------------------------------------------------------------------

GIF_BOMB = b"GIF89a" + b"\xff\xff\xff\xff" + b"\x80\x00\x00" + b"\0" * 6 + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;"
HOSTILE = {  # body, how it is sent, and what the sentence says
    **{name: (body, {}, "cannot be read|pixels") for name, (body, _) in BAD.items() if body},
    "nothing": (b"", {}, "is empty"),
    "SVG with a file of this machine in it": (SVG, {}, "cannot be read: none of JPEG"),
    "GIF bomb": (GIF_BOMB, {}, "cannot be read|pixels"),
    "the name of a file": (b"/etc/passwd", {}, "cannot be read: none of JPEG"),
    "a file of this machine": (b"", dict(method="GET", path="/../../../../etc/passwd"), "no such page"),
    "the same, escaped": (b"", dict(method="GET", path="/%2e%2e/%2e%2e/etc/passwd"), "no such page"),
    "a method of the model that is no answer": (b"x", dict(path="/data"), "there is no '/data' here"),
    "a private one": (b"x", dict(path="/_seen"), "there is no '/_seen' here"),
    "21 MB": (b"x", dict(length=MOST_BYTES + 1), "larger than 20 MB"),
    "a length beyond all numbers": (b"x", dict(length="9" * 5000), "larger than 20 MB"),
    "a negative length": (b"x", dict(length="-1"), "say once in Content-Length"),
    "a length that is no number": (b"x", dict(length="٣"), "say once in Content-Length"),
    "two lengths": (b"x", dict(Content_length=3), "say once in Content-Length"),
    "fewer bytes than announced": (b"x", dict(length=1000), "ended before"),
    "more bytes than announced": (encoded("PNG"), dict(length=100), "cannot be read"),
    "chunks": (b"1\r\nx\r\n0\r\n\r\n", dict(Transfer_Encoding="chunked"), "in one piece"),
    "a compressed body": (b"x", dict(Content_Encoding="gzip"), "in one piece"),
    "another site's page": (b"x", dict(Origin="http://evil.example"), "another site's page"),
    "a page of another port": (b"x", dict(Origin="http://127.0.0.1:1"), "another site's page"),
    "a page without an address": (b"x", dict(Origin="null"), "another site's page"),
    "another site's page, by the browser's word": (b"x", dict(Sec_Fetch_Site="cross-site"), "another site's page"),
    "a name that was bound to this machine": (b"x", dict(host="evil.example"), "its own address only"),
    "the same, to read what is here": (b"", dict(method="GET", path="/data.json", host="evil.example:80"),
                                       "its own address only"),
    "a form": (b"x", dict(kind="multipart/form-data; boundary=x"), "as they are"),
    "a form that needs no leave": (b"x", dict(kind="text/plain"), "as they are"),
    "a question that is too long": (b"x", dict(path="/ask?question=" + "a" * 301), "longer than 300 letters"),
    "an address that is too long": (b"x", dict(path="/ask?question=" + "a" * 70_000), "."),
    "a text that is none": (b"x", dict(path="/ask?question=%ff"), "cannot be read"),
    "a text twice": (b"x", dict(path="/ask?question=a&question=b"), "once each"),
    "what is no option": (b"x", dict(path="/caption?beams=1000"), "takes hidden and way"),
    "a leave for another site": (b"", dict(method="OPTIONS"), "."),
    "a method for files": (b"x", dict(method="PUT", path="/live.js"), "."),
    "a header without an end": (b"x", dict(X_Long="a" * 100_000), "."),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_gets_a_sentence(server, name):
    body, how, says = HOSTILE[name]
    status, text = talk(server, post(server, body, **how))
    assert 400 <= status < 600 and status != 500, text
    assert text.count("\n") == 1 and "Traceback" not in text and re.search(says, text), text


def test_whoever_sends_too_much_still_hears_why(server):
    """All of it on its way before anything is read: a connection closed on unread bytes would lose the answer."""
    for _ in range(20):
        status, text = talk(server, post(server, b"x" * (2 * 2**20), length=MOST_BYTES + 1))
        assert status == 413 and "larger than" in text


def test_what_the_model_cannot_use_gets_a_sentence(server, uploaded):
    for path, says in {"/caption?hidden=99": "queries are numbered", "/caption?hidden=a": "queries are numbered",
                       "/caption?way=fast": "there is no way", "/ask": "write a question",
                       "/match?sentence=...": "no word"}.items():
        status, text = talk(server, post(server, uploaded, path))
        assert status == 422 and says in text, text


def test_a_question_beyond_the_positions_of_the_language_model_gets_a_sentence(server, monkeypatch, uploaded):
    monkeypatch.setattr(demo_server, "MOST_LETTERS", 3000)
    status, text = talk(server, post(server, uploaded, "/ask?question=" + "+".join(["star"] * 300)))
    assert status == 422 and "shorten the prompt" in text, text


def test_who_sends_nothing_more_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(demo_server.Handler, "timeout", 0.5)
    status, text = talk(server, post(server, b"x", length=1000), then_close=False)
    assert status == 408 and "ended before" in text


def test_many_at_once_are_asked_to_wait(server, monkeypatch, uploaded):
    monkeypatch.setattr(demo_server.Handler, "timeout", 300)  # they keep their places while others are answered
    monkeypatch.setattr(demo_server, "LONGEST", 300)
    read, placed = demo_server.Handler.body, threading.Semaphore(0)
    monkeypatch.setattr(demo_server.Handler, "body", lambda handler: placed.release() or read(handler))
    with ExitStack() as stack:
        fresh = stack.enter_context(Server(server.model, 0))  # nobody of an earlier test has a place here
        threading.Thread(target=fresh.serve_forever, daemon=True).start()
        stack.callback(fresh.shutdown)
        lines = [stack.enter_context(socket.create_connection(("127.0.0.1", fresh.server_port)))
                 for _ in range(demo_server.AT_ONCE)]
        for line in lines:  # the next asks when this one has its place: whoever is refused would leave one free
            line.sendall(post(fresh, b"x", length=1000))
            assert placed.acquire(timeout=60)
        for _ in range(3):
            status, text = talk(fresh, post(fresh, uploaded))
            assert status == 503 and "try again" in text
        lines[0].close()
        while talk(fresh, post(fresh, uploaded))[0] == 503:
            pass


def test_after_all_that_it_still_answers(server, picture, uploaded):
    status, said = talk(server, post(server, uploaded))
    assert status == 200 and server.model.blip2.caption(picture, beams=1) in said


def test_a_model_that_only_writes_says_so(server, uploaded):
    writing = Model("a model", server.model.blip2)
    assert writing.data()["compares"] is False
    with pytest.raises(UserError, match="does not compare"):
        writing.match(Image.open(io.BytesIO(uploaded)), "a circle")


# --- in a browser -----------------------------------------------------------------------------------------------------


def test_a_photograph_in_the_page(server, picture, uploaded, tmp_path):
    with phone() as page:
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_function("() => document.getElementById('status').textContent.startsWith('Ready')")
        page.set_input_files("#file", dict(name="../photo.png", mimeType="image/png", buffer=uploaded))
        page.wait_for_function("() => document.getElementById('caption').dataset.text")
        page.evaluate("() => window.bridge")
        assert page.evaluate("document.getElementById('caption').dataset.text") == server.model.blip2.caption(
            picture, beams=1)
        page.click("#queries button >> nth=0")
        page.fill("#question", "how many things are there?")
        page.click("#asking button")
        page.evaluate("() => window.bridge")
        answer = server.model.blip2.ask(picture, "how many things are there?")
        assert re.sub(r"\d.*", "", page.inner_text("#answer button >> nth=0")) == answer
        assert page.inner_text("#match").startswith("ITM: it matches")
        page.set_input_files("#file", dict(name="x.png", mimeType="image/png", buffer=b"no picture"))
        page.wait_for_function("() => document.getElementById('caption').textContent.includes('cannot be read')")
        assert page.errors == [] and all("127.0.0.1" in url or url.startswith("data:") for url in page.asked)
        assert violations(page, fetch_axe(tmp_path)) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_port_that_cannot_be_had_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "index.html").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port in (99999, -1, taken.getsockname()[1]):
            monkeypatch.setattr(sys, "argv", ["minblip2", "demo", "--no-browser", "--page", str(tmp_path), "--port",
                                              str(port)])
            assert main() == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and f"--port {port} cannot be served" in said
