"""data/download.py against a COCO site on loopback that misbehaves: the right files, or one sentence that names one."""

import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import coco
import download
import fetch
from minblip2.data.coco import CocoCaptions
from minblip2.data.files import one_at_a_time

from .coco_server import ARCHIVE, KARPATHY, CocoServer, coco_files, packed
from .pictures import png_header

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(scope="module")
def files(coco_mini):
    """What the site serves, by path."""
    return coco_files(coco_mini)


@pytest.fixture
def site(files):
    """The whole excerpt under COCO's paths."""
    with CocoServer(dict(files)) as server:
        yield server


@pytest.fixture
def quick(monkeypatch):
    """No pauses before another try, and a short patience with silence."""
    made = fetch.Fetcher
    monkeypatch.setattr(download, "Fetcher", lambda workers, timeout: made(workers, min(timeout, 0.5), pause=0.01))


def run(server, out, *words):
    """The command line in this process: its exit code."""
    urls = ["--base-url", server.url, "--karpathy-url", server.url + KARPATHY]
    return download.main(["coco", "--out", str(out), *urls, *map(str, words)])


def few(server, out, *words):
    """Twelve pictures of one split, over a single connection so that the order is known."""
    return run(server, out, "--split", "val2017", "--images", 12, "--workers", 1, *words)


def chosen(server, out):
    """The twelve pictures' paths on the server, in the order of fetching."""
    assert few(server, out) == 0
    listed = json.loads((out / "manifest-val2017.json").read_text(encoding="utf-8"))["files"]
    return [entry["url"].removeprefix(server.url) for entry in listed if entry["url"]]


def tree(folder):
    """Every file below a folder and its content."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def pictures(folder):
    """The final names of all pictures."""
    return {path.name for path in folder.rglob("*.jpg")}


# ---------------------------------------------------------------- what arrives


def test_everything_arrives_and_the_loader_reads_it(site, files, tmp_path, capsys):
    assert run(site, tmp_path, "--split", "train2017", "val2017", "--images", 80) == 0
    said = capsys.readouterr()
    assert "train2017: 80 pictures, 400 captions; licences: 27 by-nc-nd" in said.out and "MB/s" in said.err
    for split, count in (("train2017", 80), ("val2017", 8)):
        data = CocoCaptions(tmp_path, split, strict=True, check=True)
        assert len(data) == count and len(data.pairs) == 5 * count
        assert sum(len(record.boxes) for record in data.images) > 3 * count
        assert all(record.path.read_bytes() == files[f"/{split}/{record.path.name}"] for record in data.images)
    manifest = json.loads((tmp_path / "manifest-train2017.json").read_text(encoding="utf-8"))
    assert len(manifest["files"]) == 82 and manifest["licenses"][3]["name"] == "Attribution License"
    for entry in manifest["files"]:
        content = (tmp_path / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    last = manifest["files"][-1]
    assert last["url"] == f"{site.url}/{last['file']}" and 1 <= last["license"] <= 8 and "flickr" in last["flickr_url"]
    assert not list(tmp_path.rglob("*.part")) and site.connections <= 17, "connections are kept alive"


def test_again_fetches_nothing_and_more_fetches_only_the_rest(site, tmp_path):
    assert run(site, tmp_path, "--images", 20) == 0
    before, asked = tree(tmp_path), sum(site.asked.values())
    assert run(site, tmp_path, "--images", 20) == 0
    assert tree(tmp_path) == before and sum(site.asked.values()) == asked
    assert run(site, tmp_path, "--images", 50) == 0
    assert max(site.asked.values()) == 1 and sum(site.asked.values()) == asked + 33
    assert len(CocoCaptions(tmp_path, "train2017")) == 50 and len(CocoCaptions(tmp_path, "val2017")) == 5
    few_first = [image.id for image in CocoCaptions(tmp_path, "train2017", limit=20).images]
    assert run(site, tmp_path / "new", "--images", 20) == 0
    assert few_first == [image.id for image in CocoCaptions(tmp_path / "new", "train2017").images]


def test_the_seed_chooses(site, tmp_path):
    names = {}
    for seed in (0, 1, 0):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert few(site, tmp_path / "out", "--seed", seed) == 0
        names.setdefault(seed, set()).add(frozenset(pictures(tmp_path / "out")))
    assert len(names[0]) == 1 and names[0] != names[1]


def test_karpathys_split_is_made_of_both(site, coco_mini, tmp_path):
    assert run(site, tmp_path, "--split", "karpathy") == 0
    sizes = {split: len(CocoCaptions(tmp_path, split, strict=True)) for split in ("train", "val", "test")}
    assert sizes == {"train": 127, "val": 16, "test": 16}
    listed = json.loads(zipfile.ZipFile(tmp_path / "archives" / "caption_datasets.zip").read("dataset_coco.json"))
    output = {entry["cocoid"]: entry["split"].replace("restval", "train") for entry in listed["images"]}
    for split in sizes:
        data = CocoCaptions(tmp_path, split)
        assert all(output[image.id] == split for image in data.images) and any(image.boxes for image in data.images)
    assert run(site, tmp_path / "few", "--split", "karpathy", "--images", 40) == 0
    assert [len(CocoCaptions(tmp_path / "few", split)) for split in sizes] == [40, 4, 4]


def test_licences_are_filtered_and_carried(site, tmp_path, capsys):
    assert run(site, tmp_path, "--licenses", "by", "5") == 0
    manifest = json.loads((tmp_path / "manifest-val2017.json").read_text(encoding="utf-8"))
    assert {entry["license"] for entry in manifest["files"]} == {4, 5, "CC BY 4.0"}
    data = CocoCaptions(tmp_path, "val2017")
    assert len(data) == 25 and all("Attribution" in image.credit and "flickr" in image.credit for image in data.images)
    assert run(site, tmp_path, "--licenses", "cc0") == 2
    assert "--licenses has 'cc0': choose among 1, by-nc-sa" in capsys.readouterr().err


def test_verify_needs_no_network_and_names_what_changed(site, tmp_path, capsys):
    names = [path.rpartition("/")[2] for path in chosen(site, tmp_path)]
    asked = sum(site.asked.values())
    def verify(out):
        return download.main(["coco", "--out", str(out), "--verify"])

    assert verify(tmp_path) == 0 and "14 files are as they were" in capsys.readouterr().out
    (tmp_path / "val2017" / names[3]).write_bytes(b"other")
    (tmp_path / "val2017" / names[5]).unlink()
    assert verify(tmp_path) == 2
    assert f"2 of 14 files are not as they were fetched, first {tmp_path}/val2017/{names[3]}" in capsys.readouterr().err
    assert sum(site.asked.values()) == asked
    assert few(site, tmp_path) == verify(tmp_path) == 0 and sum(site.asked.values()) == asked + 2
    assert verify(tmp_path / "none") == 2 and "no manifest-*.json" in capsys.readouterr().err


# ---------------------------------------------------------------- what goes wrong and comes right


@pytest.mark.parametrize("tricks", [
    ["cut 0.5"], ["truncated 0"], ["cut 0.9", "cut 0.5", "cut 0.1"], ["busy 0"], ["busy 1"], ["busy soon"],
    ["status 500", "status 429"], ["garbage"], ["html"], ["stall 2"], ["cut 0.5", "no ranges"],
    ["moved /val2017/../val2017/000000397133.jpg"]], ids=" then ".join)
def test_one_file_in_trouble_comes_right(site, files, quick, tmp_path, tricks):
    paths = chosen(site, tmp_path / "calm")
    troubled = paths[4]
    if tricks[0].startswith("moved"):
        site.files["/elsewhere.jpg"], tricks = files[troubled], ["moved /elsewhere.jpg"]
    site.tricks[troubled], site.ranges[:] = list(tricks), []
    started = time.perf_counter()
    assert few(site, tmp_path / "out") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "calm") and not site.tricks[troubled]
    if tricks == ["busy 1"]:
        assert time.perf_counter() - started > 1
    if tricks == ["cut 0.5"]:
        assert site.ranges == [(troubled, len(files[troubled]) // 2)], "only the missing half was asked for"
    assert all(count == 2 for path, count in site.asked.items() if path not in (troubled, "/elsewhere.jpg"))


def test_a_flipped_bit_is_noticed_where_the_server_tells_the_md5(site, quick, tmp_path):
    site.amazon = True
    paths = chosen(site, tmp_path / "calm")
    site.tricks[paths[2]] = ["flipped"]
    assert few(site, tmp_path / "out") == 0 and tree(tmp_path / "out") == tree(tmp_path / "calm")


TROUBLE = {
    "status 404": "the server says 404 Not Found", "status 403": "the server says 403 Forbidden",
    "busy 0": "the server says 503", "busy 3600": "asks to wait 3600 s", "garbage": "none of JPEG",
    "html": "the server called it text/html", "loop": "too many redirects", "cut 0": "IncompleteRead",
    "stall 2": "Read timed out", "endless": "more than the 33554432 bytes that make sense",
}


@pytest.mark.parametrize("trick", TROUBLE)
def test_one_hopeless_file_is_named_and_the_others_arrive(site, quick, tmp_path, capsys, trick):
    paths = chosen(site, tmp_path / "calm")
    hopeless = paths[4]
    if trick == "stall 2":
        site.files[hopeless] = site.files[hopeless][:20]
    site.tricks[hopeless] = trick
    capsys.readouterr()
    assert few(site, tmp_path / "out") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("download: ")]
    assert f"{site.url}{hopeless} " in line and TROUBLE[trick] in line and "run the same command again" in line, line
    assert pictures(tmp_path / "calm") - pictures(tmp_path / "out") == {hopeless.rpartition("/")[2]}
    assert not list((tmp_path / "out").glob("manifest-*")), "a manifest vouches for what is not there"
    site.tricks.clear()
    site.files[hopeless] = (tmp_path / "calm" / hopeless[1:]).read_bytes()
    asked = dict(site.asked)
    assert few(site, tmp_path / "out") == 0 and tree(tmp_path / "out") == tree(tmp_path / "calm")
    assert {path for path in site.asked if site.asked[path] > asked.get(path, 0)} == {hopeless}


def test_a_404_is_not_asked_again(site, quick, tmp_path):
    paths = chosen(site, tmp_path / "calm")
    site.tricks[paths[0]] = "status 404"
    asked = site.asked[paths[0]]
    assert few(site, tmp_path / "out") == 2 and site.asked[paths[0]] == asked + 1


def test_the_server_is_gone_for_five_seconds(files, tmp_path):
    with CocoServer(dict(files)) as first:
        port, leaving, gone = first.server_port, threading.Lock(), threading.Event()
        back: list[CocoServer] = []

        def leave(path):
            if sum(first.asked.values()) >= 7 and leaving.acquire(blocking=False):  # nobody leaves twice
                threading.Thread(target=vanish).start()
                assert gone.wait(60)
            if gone.is_set():  # connections that were kept end, too
                raise ConnectionAbortedError

        def vanish():
            first.shutdown()
            first.server_close()
            gone.set()
            time.sleep(5)
            back.append(CocoServer(dict(files), port=port))
            back[0].__enter__()

        first.on_request = leave
        assert run(first, tmp_path, "--split", "val2017", "--images", 20, "--workers", 4) == 0
        try:
            assert len(CocoCaptions(tmp_path, "val2017", strict=True, check=True)) == 20
            assert sum(back[0].asked.values())
        finally:
            back[0].__exit__()


def test_a_dead_server_ends_the_download_soon(files, quick, tmp_path, capsys):
    with CocoServer(dict(files)) as server:
        assert few(server, tmp_path / "archive") == 0
    shutil.copytree(tmp_path / "archive" / "archives", tmp_path / "out" / "archives")
    assert few(server, tmp_path / "out") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("download: ")]
    assert "2 files in a row failed, so the rest was not tried" in line and "refused" in line.lower()


@pytest.mark.parametrize(("tricks", "code"), [(["cut 0.5"] * 4, 0), (["garbage"], 0), ("garbage", 2),
                                              ("status 404", 2)])
def test_the_archive_in_trouble(site, quick, tmp_path, capsys, tricks, code):
    site.tricks[ARCHIVE] = tricks
    assert few(site, tmp_path) == code
    if code:
        assert "annotations_trainval2017.zip cannot be fetched" in capsys.readouterr().err
        assert not list((tmp_path / "archives").glob("*.zip"))
    elif "cut 0.5" in str(tricks):
        assert len(site.ranges) == 4


def test_the_official_archive_must_have_the_published_hash(site, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(coco, "OFFICIAL", site.url)
    assert few(site, tmp_path) == 2
    assert f"instead of {coco.ARCHIVE_SHA256}" in capsys.readouterr().err


# ---------------------------------------------------------------- kills and full disks


def test_killed_at_twenty_moments_it_ends_with_the_same_bytes(files, tmp_path):
    """SIGKILL, each time at another request; what had its final name by then is never asked for again."""
    draw = random.Random(4)
    with CocoServer(dict(files), latency=0.01) as server:
        words = ["coco", "--base-url", server.url, "--workers", "4", "--out", str(tmp_path / "out")]
        fork = multiprocessing.get_context("forkserver")  # twenty processes that import everything but once
        fork.set_forkserver_preload(["pytest", "download"])
        server.tricks[ARCHIVE] = [f"cut {draw.random()}" for _ in range(2)]
        kept, kills, broken = set(), 0, set()
        for _ in range(20):
            state = {"countdown": draw.randint(1, 15), "there": pictures(tmp_path)}

            def count(path, state=state):
                if path.rpartition("/")[2] in state["there"]:
                    broken.add(path)
                state["countdown"] -= 1
                if state["countdown"] == 0:
                    threading.Timer(draw.uniform(0, 0.02), state["process"].kill).start()

            server.on_request = count
            state["process"] = fork.Process(target=download.main, args=[words])
            state["process"].start()
            state["process"].join()
            kills += state["process"].exitcode == -signal.SIGKILL
            assert kept <= pictures(tmp_path)
            kept = pictures(tmp_path)
        assert kills >= 15 and 60 < len(kept), (kills, len(kept))
        server.on_request, server.latency = (lambda path: None), 0.0
        assert run(server, tmp_path / "out") == 0
        assert not broken and sum(server.served.values()) <= 160 + 4 * kills, "only what was under way comes again"
        assert run(server, tmp_path / "calm") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "calm") and len(pictures(tmp_path / "calm")) == 159


@pytest.mark.parametrize("rename", [0, 1, 7, 12, 13, 14, 15])  # archive, 12 pictures, captions, boxes, manifest
def test_stopped_at_any_rename_it_ends_with_the_same_bytes(site, tmp_path, monkeypatch, rename):
    assert chosen(site, tmp_path / "calm")
    real, renames = os.replace, []

    def stop(source, target):
        renames.append(target)
        if len(renames) > rename:
            raise MemoryError  # which nobody expects, as little as a kill
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stop)
        with pytest.raises(MemoryError):
            few(site, tmp_path / "out")
    assert few(site, tmp_path / "out") == 0 and tree(tmp_path / "out") == tree(tmp_path / "calm")
    again = [path for path, count in site.served.items() if count > 2]
    assert len(again) <= 1, "only the file that was under way beside it may be asked for again"


def test_a_full_disk_is_one_sentence_and_room_mends_it(site, tmp_path, monkeypatch, capsys):
    assert chosen(site, tmp_path / "calm")
    room = [700_000]

    class Quota(io.FileIO):
        def write(self, data):
            room[0] -= len(data)
            if room[0] < 0:
                raise OSError(28, "No space left on device")
            return super().write(data)

    real = open
    monkeypatch.setattr(fetch, "open", lambda path, mode: Quota(path, mode) if "b" in mode else real(path, mode),
                        raising=False)
    capsys.readouterr()
    assert few(site, tmp_path / "out") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("download: ")]
    assert "the disk is full" in line and ".jpg cannot be written" in line and "it goes on where it stopped" in line
    assert 0 < len(pictures(tmp_path / "out")) < 12
    room[0] = 10**9
    assert few(site, tmp_path / "out") == 0 and tree(tmp_path / "out") == tree(tmp_path / "calm")


def test_too_small_a_disk_is_told_before_the_first_picture(site, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    assert few(site, tmp_path) == 2
    assert "12 pictures need about 2 MB but 1 are free" in capsys.readouterr().err
    assert not any("val2017/" in path for path in site.asked)


@pytest.mark.parametrize("name", ["captions_val2017.json", "manifest-val2017.json"])
def test_a_disk_that_is_full_at_the_end_is_one_sentence_too(site, tmp_path, monkeypatch, capsys, name):
    real = Path.write_text

    def full(path, *arguments, **options):
        if path.name.startswith(name):
            raise OSError(28, "No space left on device", str(path))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert few(site, tmp_path / "out") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("download: ")]
    assert re.search(rf"{name}\.[^ ]+-\d+\.part cannot be written or read \(No space left on device\)", line)
    asked = sum(site.asked.values())
    assert few(site, tmp_path / "out") == 0 and sum(site.asked.values()) == asked


def test_a_folder_that_cannot_be_made_is_named(site, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert few(site, tmp_path / "file" / "out") == 2
    assert f"{tmp_path}/file/out" in capsys.readouterr().err and not site.asked


def test_two_at_once_in_one_folder(site, tmp_path, capsys):
    (tmp_path / "annotations").mkdir()
    with one_at_a_time(tmp_path / ".lock"):
        assert few(site, tmp_path) == 2
    assert "another download writes into" in capsys.readouterr().err and not site.asked
    assert few(site, tmp_path) == 0


# ---------------------------------------------------------------- hostile content


def changed(files, kind="captions", **changes):
    """The site with other captions or instances of val2017; a change takes the content and gives another, or text."""
    with zipfile.ZipFile(io.BytesIO(files[ARCHIVE])) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = f"annotations/{kind}_val2017.json"
    content = json.loads(members[name])
    for change in changes.values():
        content = change(content) or content
    members[name] = content if isinstance(content, bytes) else json.dumps(content).encode()
    return packed(members)


def image(**fields):
    return lambda content: content["images"][3].update(fields)


HOSTILE = {
    "climbing name": (image(file_name="../../evil.jpg"), "'../../evil.jpg', which is no plain file name"),
    "absolute name": (image(file_name="/tmp/evil.jpg"), "'/tmp/evil.jpg', which is no plain file name"),
    "Windows name": (image(file_name="C:\\evil.jpg"), "evil.jpg', which is no plain file name"),
    "name of a program": (image(file_name="evil.py"), "'evil.py', which is no plain file name"),
    "hidden name": (image(file_name=".jpg"), "'.jpg', which is no plain file name"),
    "duplicate id": (lambda content: content["images"][3].update(id=content["images"][4]["id"]), "twice"),
    "duplicate name": (lambda content: content["images"][3].update(file_name=content["images"][4]["file_name"]),
                       "twice"),
    "NaN id": (image(id=float("nan")), "holds NaN, which is no number"),
    "infinite width": (image(width=float("inf")), "holds Infinity, which is no number"),
    "text as id": (image(id="12"), "id = '12', which is not int"),
    "true as id": (image(id=True), "id = 'True', which is not int"),
    "no name": (lambda content: content["images"][3].pop("file_name") and None, "without 'file_name'"),
    "bomb told": (image(width=10**4, height=10**4), "10000x10000 pixels, which cannot be"),
    "negative size": (image(width=-3, height=-4), "-3x-4 pixels, which cannot be"),
    "list as image": (lambda content: content["images"].append([1]), "[1]' among its images"),
    "caption of 50 MB": (lambda content: content["annotations"][7].update(caption="a" * 50_000_000), "has more than"),
    "caption of 10 kB": (lambda content: content["annotations"][7].update(caption="a" * 10**4),
                         "a caption of 10000 characters"),
    "number as caption": (lambda content: content["annotations"][7].update(caption=1), "caption = '1', which is not"),
    "no JSON": (lambda content: b"<html>", "is not what COCO's annotations are"),
    "a list": (lambda content: b"[1, 2]", "is not what COCO's annotations are"),
    "cut JSON": (lambda content: json.dumps(content).encode()[:-500], "is not what COCO's annotations are"),
    "deep JSON": (lambda content: b'{"images": ' + b"[" * 100_000, "is not what COCO's annotations are"),
    "no UTF-8": (lambda content: b'{"images": ["\xff\xfe"]}', "is not what COCO's annotations are"),
    "id of 70 bits": (image(id=2**70), f"id = '{2**70}', which is not int, or not one of 64 bits"),
    "no caption": (lambda content: content.update(annotations=[]), "has no caption for the pictures that were chosen"),
    "no word": (lambda content: [note.update(caption="...") for note in content["annotations"]] and None,
                "has no caption for the pictures that were chosen of val2017"),
    "no images": (lambda content: {"images": [], "annotations": []}, "annotations_trainval2017.zip lists no picture"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_annotations_are_refused_by_name(site, files, tmp_path, capsys, name):
    change, message = HOSTILE[name]
    site.files[ARCHIVE] = changed(files, change=change)
    out = tmp_path / "a" / "b" / "out"
    assert run(site, out, "--split", "val2017") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("download: ")]
    assert message in line and ("captions_val2017.json" in line or name == "no images") and len(line) < 700, line
    assert not pictures(tmp_path) and set(tmp_path.rglob("*.j*")) == set()
    assert {path.relative_to(tmp_path).parts[:3] for path in tmp_path.rglob("*")} <= {
        ("a",), ("a", "b"), ("a", "b", "out")}


def boxes(**fields):
    return lambda content: [note.update(fields) for note in content["annotations"]] and None


BOXES = {
    "text as box": (boxes(bbox="1 2 3 4"), "bbox = '1 2 3 4', which is not list"),
    "box of three": (boxes(bbox=[1, 2, 3]), "has the box [1, 2, 3] for image id"),
    "box of text": (boxes(bbox=[1, 2, 3, "4"]), "has the box [1, 2, 3, '4'] for image id"),
    "no box": (lambda content: [note.pop("bbox") for note in content["annotations"]] and None, "without 'bbox'"),
    "unknown category": (boxes(category_id=1000), "category 1000, which it does not list"),
    "no category": (lambda content: [note.pop("category_id") for note in content["annotations"]] and None,
                    "without 'category_id'"),
    "no categories": (lambda content: content.pop("categories") and None, "which it does not list"),
    "category of 70 bits": (lambda content: content["categories"][0].update(id=2**70), "not one of 64 bits"),
    "category without name": (lambda content: content["categories"][0].pop("name") and None, "without 'name'"),
}


@pytest.mark.parametrize("name", BOXES)
def test_what_the_loader_would_refuse_is_refused_before_a_picture_is_fetched(site, files, tmp_path, capsys, name):
    change, message = BOXES[name]
    site.files[ARCHIVE] = changed(files, "instances", change=change)
    assert few(site, tmp_path) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("download: ")]
    assert message in line and "instances_val2017.json" in line and not pictures(tmp_path), line


def test_a_licence_that_is_none_is_unknown(site, files, tmp_path, capsys):
    """What is no number of a licence hindered the manifest, after all pictures had come."""
    strange = [{"id": 4}, [4], None, "by"]
    site.files[ARCHIVE] = changed(files, change=lambda content: [
        entry.update(license=some) for entry, some in zip(content["images"], strange, strict=False)] and None)
    assert run(site, tmp_path / "all", "--split", "val2017") == 0 and "4 unknown" in capsys.readouterr().out
    assert len(CocoCaptions(tmp_path / "all", "val2017", strict=True)) == 79
    assert run(site, tmp_path / "by", "--split", "val2017", "--licenses", "by") == 0
    data = CocoCaptions(tmp_path / "by", "val2017")
    assert all(image.licence.startswith("Attribution License") for image in data.images)


def archive_with(name, content=b"x", mode=0, size=None):
    def make(files):
        stream = io.BytesIO(files[ARCHIVE])
        with zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED) as archive:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
        return stream.getvalue()
    return make


def damaged(files):
    content = bytearray(files[ARCHIVE])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        content[archive.getinfo("annotations/captions_val2017.json").header_offset + 1000] ^= 0xFF
    return bytes(content)


ARCHIVES = {
    "climbing member": (archive_with("../evil.json"), "'../evil.json', which would climb"),
    "absolute member": (archive_with("/tmp/evil.json"), "'/tmp/evil.json', which would climb"),
    "Windows member": (archive_with("a\\..\\..\\evil"), "evil', which would climb"),
    "symbolic link": (archive_with("annotations/link", b"/etc", stat.S_IFLNK | 0o777), "a symbolic link"),
    "zip bomb": (archive_with("bomb", b"\0" * 30_000_000), "bytes that unpack to 30000000, which no annotations do"),
    "no captions": (lambda files: packed({"a.txt": b"hello"}), "no item named 'annotations/captions_val2017.json'"),
    "no zip": (lambda files: b"hello", "not a whole zip archive"),
    "cut zip": (lambda files: files[ARCHIVE][:-30], "not a whole zip archive"),
    "damaged zip": (damaged, "not a whole zip archive"),
    "empty": (lambda files: b"", "not a whole zip archive"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_hostile_archives_are_refused_by_name(site, files, quick, tmp_path, capsys, name):
    make, message = ARCHIVES[name]
    site.files[ARCHIVE] = make(files)
    assert run(site, tmp_path / "out", "--split", "val2017") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("download: ")]
    assert message in line and "annotations_trainval2017.zip" in line, line
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def encoded(image, kind):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("amazon", [False, True])  # the right MD5 of a wrong picture saves nothing
@pytest.mark.parametrize(("content", "message"), [
    (png_header(10**4, 10**4), "10000x10000 pixels, beyond 50 million"),
    (encoded(Image.new("RGB", (10, 10)), "JPEG"), "is 10x10 pixels, not"),
    (b"<html>hello</html>", "none of JPEG"),
    (b"", "none of JPEG"),
])
def test_hostile_pictures_are_refused_by_name(site, quick, tmp_path, capsys, content, message, amazon):
    site.amazon = amazon
    paths = chosen(site, tmp_path / "calm")
    site.files[paths[5]] = content
    capsys.readouterr()
    assert few(site, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and paths[5] in error and len(pictures(tmp_path / "out")) == 11


def test_a_truncated_picture_without_a_length_is_noticed(site, quick, tmp_path, capsys):
    paths = chosen(site, tmp_path / "calm")
    site.files[paths[5]] = site.files[paths[5]][:-2000]  # the header tells this length: only decoding can notice
    assert few(site, tmp_path / "out") == 2 and "truncated" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--images", "0"], ["--workers", "0"], ["--split", "val2017", "val2017"],
                                   ["--split", "karpathy", "val2017"]])
def test_bad_options_are_refused_before_anything_is_asked(site, tmp_path, capsys, words):
    assert run(site, tmp_path, *words) == 2
    assert words[0] in capsys.readouterr().err and not site.asked


def test_help_says_what_there_is():
    shown = subprocess.run([sys.executable, ROOT / "data" / "download.py", "coco", "--help"], check=True, text=True,
                           capture_output=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                           encoding="utf-8").stdout
    assert all(option in shown for option in ("--split", "--images", "--seed", "--out", "--base-url", "--workers",
                                              "--licenses", "--verify"))
