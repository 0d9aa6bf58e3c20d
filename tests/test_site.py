"""The site: links lead somewhere, the bridge in ONNX is the bridge, and the live page says what Python says."""

import os
import re
import shutil
import threading
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minblip2 import UserError
from minblip2.commands import demo
from minblip2.course import live, site
from minblip2.course.lesson import ROOT
from minblip2.data.scenes import draw_scenes
from minblip2.evaluation.scene_scores import QUESTIONS
from minblip2.training.bridge import load_bridge
from minblip2.training.shipping import SHIPPED
from minblip2.weights.onnx import Compare, Look, Write, export_onnx

from .browser import fetch_axe, phone, violations

CAPTIONS = int(os.environ.get("MINBLIP2_CAPTIONS", 60))  # 500 takes minutes
SITE = Path(os.environ.get("MINBLIP2_SITE", ROOT / "site" / "html"))  # as `make site` leaves it

# --- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page, text, turned", [
    ("README.md", "[a](notebooks/05_qformer.ipynb) [b](#x) [c](https://x.org)",
     "[a](notebooks/05_qformer.ipynb) [b](#x) [c](https://x.org)"),
    ("docs/FAQ.md", "[a](../notebooks/05_qformer.ipynb#two) [b](../README.md)",
     "[a](../notebooks/05_qformer.ipynb#two) [b](../index.md)"),
    ("notebooks/05_qformer.ipynb", "[a](../minblip2/qformer.py), [b](../exercises)",
     "[a](../code/minblip2/qformer.py.md), [b](../exercises/index.md)"),
    ("minblip2/README.md", "[`lm/`](lm) ![p](../notebooks/figures/bridge.png)",
     "[`lm/`](README.md) ![p](../notebooks/figures/bridge.png)"),
    ("README.md", "```\n[a](nowhere.md)\n```", "```\n[a](nowhere.md)\n```")])
def test_links_are_turned_to_where_the_site_has_them(tmp_path, page, text, turned):
    assert site.Stage(tmp_path).turned(text, page) == turned


def test_a_link_that_leads_nowhere_stops_the_site(tmp_path):
    with pytest.raises(ValueError, match="docs/FAQ.md: the link to ../no.md leads nowhere"):
        site.Stage(tmp_path).turned("[a](../no.md)", "docs/FAQ.md")


def test_every_page_and_notebook_is_on_the_site(tmp_path):
    site.write_sources(tmp_path)
    listed = "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("**/index.md"))
    for path in [*ROOT.glob("notebooks/[0-9]*.ipynb"), *ROOT.glob("notebooks/bonus/*.ipynb"), *ROOT.glob("docs/*.md"),
                 *ROOT.glob("solutions/*.ipynb")]:
        name = site.staged(path.relative_to(ROOT).as_posix())
        assert (tmp_path / name).exists() and name.removeprefix("exercises/") in listed, name
    assert "BEGIN SOLUTION" not in (tmp_path / "exercises" / "06_itc.ipynb").read_text(encoding="utf-8")
    assert (tmp_path / "code" / "minblip2" / "attention.py.md").exists()


def test_dead_links_of_pages_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="x"><a href="b.html#y"><a href="#x"><a href="#z"><img src="no.png">'
                                     '<code>&lt;a href="shown.html"></code>')
    (tmp_path / "b.html").write_text('<p id="y"><a href="https://x.org"><a href="a.html">')
    assert site.dead_links(tmp_path) == ["a.html: #z", "a.html: no.png"]


def test_tables_that_are_not_drawn_are_found(tmp_path):
    (tmp_path / "a.html").write_text("<p>| loss | seed 0 |\n| :——— | —–: |\n| ITC | 0.6 |</p>")
    (tmp_path / "b.html").write_text("<table><tr><td>ITC</td></tr></table><p>|x| is a length | and so on</p>")
    assert [one.split(":")[0] for one in site.undrawn_tables(tmp_path)] == ["a.html"]


def test_pages_of_a_book_that_no_reader_opens_are_found(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.epub", "w") as book:
        book.writestr("good.xhtml", "<html><img src='a.png'/></html>")
        book.writestr("bad.xhtml", "<html><img src='a.png'></html>")
    assert [one.split(":")[0] for one in site.broken_pages(tmp_path / "a.epub")] == ["bad.xhtml"]


def test_the_demo_serves_the_built_page_to_this_machine_alone(tmp_path):
    with pytest.raises(UserError, match="build it with `make site`"):
        demo.server(tmp_path, 0)
    (tmp_path / "index.html").write_text("drawn")
    with demo.server(tmp_path, 0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        host, port = serving.server_address
        assert host == "127.0.0.1"
        with urllib.request.urlopen(f"http://{host}:{port}/") as answer:
            assert answer.read() == b"drawn"
        serving.shutdown()


# --- the bridge in ONNX -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bridge():
    found = load_bridge(SHIPPED)
    found.blip2, found.retriever  # noqa: B018 (both put their parts into evaluation mode)
    return found


@pytest.fixture(scope="module")
def writer(bridge):
    """What writes in Python, in float32 as in a browser, also where a CPU would take bfloat16."""
    return replace(bridge.blip2, precision="float32")


@pytest.fixture(scope="module")
def exported(bridge, tmp_path_factory):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed: it comes with the extra test")
    if torch.__version__.startswith("2.6."):
        pytest.skip("PyTorch 2.6 cannot export the bridge for a browser")
    return export_onnx(bridge.backbones.encoder, bridge.stage1, bridge.stage2, tmp_path_factory.mktemp("live"))


def test_a_pytorch_that_cannot_export_is_named(bridge, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.6.0+debian")
    with pytest.raises(UserError, match="PyTorch 2.6.0.debian cannot export the bridge .*install a newer one"):
        export_onnx(bridge.backbones.encoder, bridge.stage1, bridge.stage2, tmp_path)


def test_only_a_bridge_to_an_opt_runs_in_a_browser(bridge, tmp_path):
    with pytest.raises(UserError, match="a bridge to an OPT, not to a Identity"):
        export_onnx(bridge.backbones.encoder, bridge.stage1, SimpleNamespace(lm=torch.nn.Identity()), tmp_path)


@pytest.fixture(scope="module")
def sessions(exported):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: it comes with the extra test")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return {name: runtime.InferenceSession(str(path), options) for name, path in exported.items()}


@pytest.fixture(scope="module")
def pictures():
    return [image for _, image, _ in draw_scenes(CAPTIONS, "on the site")]


def captions_by_onnx(bridge, sessions, pictures):
    """Greedy captions as the page writes them."""
    tokenizer, said = bridge.backbones.lm_tokenizer, []
    for picture in pictures:
        pixels = bridge.backbones.transform(picture)[None].numpy()
        soft = sessions["look"].run(["soft"], {"pixels": pixels})[0]
        ids, shown = tokenizer.encode_prompt(QUESTIONS["things"]), np.ones(soft.shape[:2], dtype=bool)
        start = len(ids)
        while len(ids) < start + live.CAPTION["max_length"]:
            log_p = sessions["write"].run(["log_p"], {"soft": soft, "shown": shown, "ids": np.array([ids])})[0]
            ids.append(int(log_p.argmax()))
            if ids[-1] == tokenizer.eos_id:
                break
        said.append(tokenizer.decode(ids[start:]))
    return said


def test_captions_are_those_of_python(bridge, writer, sessions, pictures):
    assert captions_by_onnx(bridge, sessions, pictures) == writer.caption(pictures, QUESTIONS["things"], beams=1)


@torch.no_grad()
def test_maps_words_and_scores_are_those_of_python(bridge, sessions, pictures):
    pixels = bridge.backbones.transform(pictures[0])[None]
    features, soft, maps = Look(bridge.backbones.encoder, bridge.stage2)(pixels)
    looked = sessions["look"].run(None, {"pixels": pixels.numpy()})
    for ours, theirs in zip((features, soft, maps), looked, strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-4)
    ids = torch.tensor([bridge.backbones.lm_tokenizer.encode_prompt("a red circle and"), [3, 5, 7, 9, 11]])
    shown = torch.ones(soft.shape[:2], dtype=torch.bool)
    shown[0, 2] = False
    given = {"soft": soft.numpy(), "shown": shown.numpy(), "ids": ids.numpy()}
    log_p, looked = Write(bridge.stage2)(soft, shown, ids)
    assert looked[0, 2] == 0 and (looked[0, :2] > 0).all()
    for ours, theirs in zip((log_p, looked), sessions["write"].run(None, given), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-4)
    ids = torch.tensor([bridge.backbones.tokenizer.encode("a red circle and a blue star")])
    cosines, match = Compare(bridge.stage1)(features, ids)
    given = {"features": features.numpy(), "ids": ids.numpy()}
    for ours, theirs in zip((cosines, match), sessions["compare"].run(None, given), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-4)


# --- the page in a browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(bridge, exported):
    """The live page, open in Chromium."""
    with phone() as opened:
        folder = next(iter(exported.values())).parent
        shutil.copytree(site.HERE / "live", folder, dirs_exist_ok=True)
        live.write_json(folder / "data.json", live.page_data(bridge))
        live.fetch_runtime(folder)
        serving = demo.server(folder, 0)
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        opened.goto(f"http://127.0.0.1:{serving.server_address[1]}/index.html")
        opened.wait_for_function("document.getElementById('status').textContent.startsWith('Ready')")
        yield opened
        serving.shutdown()


def rgba(picture):
    """A picture's pixels as a canvas holds them."""
    return list(picture.convert("RGBA").tobytes())


def test_the_page_captions_as_python_does(page, writer, pictures):
    said = [page.evaluate("(pixels) => captionOf(pixels)", rgba(picture)) for picture in pictures[:50]]
    assert said == writer.caption(pictures[:50], QUESTIONS["things"], beams=1)


def test_what_is_drawn_in_the_page_is_captioned_as_python_captions_its_pixels(page, writer):
    from PIL import Image

    page.click("#clear")
    for shape, colour, place in (("circle", "red", "top left"), ("square", "blue", "bottom right")):
        page.click(f"#shapes button[value={shape}]")
        page.click(f"#colours button[value={colour}]")
        page.click(f"#places button:text-is('{place}')")
    page.evaluate("() => window.bridge")
    canvas = "document.getElementById('scene').getContext('2d')"
    pixels = page.evaluate(f"Array.from({canvas}.getImageData(0, 0, 64, 64).data)")
    image = Image.frombytes("RGBA", (64, 64), bytes(pixels)).convert("RGB")
    said = page.evaluate("document.getElementById('caption').dataset.text")
    assert said == writer.caption(image, QUESTIONS["things"], beams=1)
    assert "red circle" in said and "blue square" in said
    page.fill("#question", "What colour is the square?")
    page.click("#asking button")
    page.evaluate("() => window.bridge")
    answer = re.sub(r"\d.*", "", page.inner_text("#answer button"))
    assert answer == writer.ask(image, "what colour is the square")


def test_the_page_needs_nobody_and_excludes_nobody(page, tmp_path):
    assert page.errors == [] and all("127.0.0.1" in url or url.startswith("data:") for url in page.asked)
    assert violations(page, fetch_axe(tmp_path)) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # a phone


@pytest.mark.skipif(not (SITE / "index.html").exists(), reason="the site is not built: `make site`")
def test_pages_of_the_built_site_exclude_nobody(tmp_path):
    axe, serving = fetch_axe(tmp_path), demo.server(SITE, 0)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    with phone() as page:
        page.route("**/*", lambda route: route.continue_() if "127.0.0.1" in route.request.url else route.abort())
        for name in ("index", "notebooks/05_qformer", "docs/GLOSSARY", "ko/index", "ko/notebooks/00_the_bridge",
                     "ko/paper"):
            page.goto(f"http://127.0.0.1:{serving.server_address[1]}/{name}.html", wait_until="load")
            assert violations(page, axe) == [], name
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    serving.shutdown()
