"""The data road: crops as the originals draw them, worker processes, a cache that survives SIGKILL, a whole epoch."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import download
from minblip2 import UserError
from minblip2.data import features, files
from minblip2.data.batches import PairBatches
from minblip2.data.coco import CocoCaptions
from minblip2.data.features import feature_cache, weights_checksum
from minblip2.data.files import one_at_a_time
from minblip2.data.pictures import check_image, load_image
from minblip2.data.transforms import Transform
from minblip2.data.workers import prefetch
from minblip2.qformer import QFormerConfig
from minblip2.stage1 import Stage1
from minblip2.training.bridge import stage1_losses
from minblip2.training.loop import TrainConfig, train
from minblip2.training.texts import text_tokenizer
from minblip2.vit import ViT, ViTConfig

from .coco_server import KARPATHY, CocoServer, coco_files
from .pictures import BAD, smooth

# ---------------------------------------------------------------- random crops


def places(width, height):
    """A picture whose red tells the column and whose green the row, in 255 steps."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).round().astype(np.uint8))


def seen(crop, width=510, height=382):
    """The part of `places` that a crop shows: left, top, right, bottom as shares of the sides; and whether mirrored."""
    pixels = np.asarray(Transform(64, crop=crop).crop_and_resize(places(width, height))).astype(float) / 255
    half = (pixels[:, 1, 0] - pixels[:, 0, 0]).mean() / 2, (pixels[1, :, 1] - pixels[0, :, 1]).mean() / 2
    left, right = pixels[:, 0, 0].mean() - half[0], pixels[:, -1, 0].mean() + half[0]
    top, bottom = pixels[0, :, 1].mean() - half[1], pixels[-1, :, 1].mean() + half[1]
    return min(left, right), top, max(left, right), bottom, left > right


def test_random_crops_are_the_originals():
    found = np.array([seen(crop) for crop in range(300)])
    left, top, right, bottom, mirrored = found.T
    area, ratio = (right - left) * (bottom - top), (right - left) * 510 / ((bottom - top) * 382)
    assert found.min() > -0.02 and found[:, :4].max() < 1.02
    # What torchvision's RandomResizedCrop draws: shares of area and ratios of sides, those that fit into the picture.
    drawn = np.random.default_rng(0).uniform([0.5, np.log(3 / 4)], [1, np.log(4 / 3)], (20_000, 2))
    fits = (drawn[:, 0] * np.exp(drawn[:, 1]) < 510 / 382) & (drawn[:, 0] / np.exp(drawn[:, 1]) < 382 / 510)
    for ours, theirs in ((area, drawn[fits, 0]), (np.log(ratio), drawn[fits, 1])):
        for share in (0.02, 0.25, 0.5, 0.75, 0.98):
            assert np.quantile(ours, share) == pytest.approx(np.quantile(theirs, share), abs=0.05)
    assert 0.4 < mirrored.mean() < 0.6
    assert np.ptp(left) > 0.2 and np.ptp(top) > 0.1, "the crops do not move"


def test_a_crop_is_the_pictures_own():
    image = smooth(300, 200)
    one = np.asarray(Transform(32, crop=1).crop_and_resize(image))
    assert np.array_equal(one, Transform(32, crop=1).crop_and_resize(image.copy()))
    assert not np.array_equal(one, Transform(32, crop=2).crop_and_resize(image))
    assert len({seen(5, width, 382)[:2] for width in (505, 510, 515)}) == 3, "each picture draws its own"
    assert Transform(32, crop=3)(image).shape == (3, 32, 32)


@pytest.mark.parametrize("size", [(900, 20), (20, 900), (1, 1), (3, 2)])
def test_no_picture_is_too_long_for_a_crop(size):
    crops = [np.asarray(Transform(32, crop=crop).crop_and_resize(smooth(*size))) for crop in range(5)]
    assert {crop.shape for crop in crops} == {(32, 32, 3)}
    if max(size) == 900:  # the largest part in the middle, mirrored or not
        long = round(20 * 4 / 3)
        box = [(side - min(side, long)) // 2 for side in size]
        middle = smooth(*size).crop((*box, *(left + min(side, long) for left, side in zip(box, size, strict=True))))
        right = middle.resize((32, 32), Image.Resampling.BICUBIC)
        assert all(any(np.array_equal(crop, one) for one in (right, ImageOps.mirror(right))) for crop in crops)


# ---------------------------------------------------------------- pictures are checked whole


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_loaded_does_not_pass_the_check(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / "picture.jpg").write_bytes(content)
    with pytest.raises(UserError, match=f"picture.jpg.*{message}|picture.jpg is {message}"):
        check_image(tmp_path / "picture.jpg")


def test_what_can_be_loaded_passes_the_check(coco_mini, tmp_path):
    for record in CocoCaptions(coco_mini, "val").images[:20]:
        assert check_image(record.path) == (record.width, record.height)
    smooth(40, 30).save(tmp_path / "picture.png")
    assert check_image(tmp_path / "picture.png") == (40, 30)


# ---------------------------------------------------------------- workers


def identify(item):
    return item, os.getpid()


def fail(item):
    raise UserError(f"item {item} is bad")


def die(item):
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_give_everything_in_order():
    found = list(prefetch(identify, range(200), 3, 16, processes=True))
    assert [item for item, _ in found] == list(range(200))
    assert os.getpid() not in {process for _, process in found}


def test_what_fails_in_a_process_fails_here():
    with pytest.raises(UserError, match="item 0 is bad"):
        list(prefetch(fail, range(3), 2, processes=True))
    with pytest.raises(UserError, match="a worker process died"):
        list(prefetch(die, range(3), 2, processes=True))


def test_an_iterator_that_is_left_ends_its_workers():
    stream = prefetch(identify, range(10**6), 2, 4, processes=True)
    _, process = next(stream)
    stream.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


# ---------------------------------------------------------------- the cache at work in processes


def slow(images):
    """An encoder that takes its time: (b 4 48)."""
    time.sleep(0.03)
    return images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(len(images), 4, 48)


def build(paths, folder, from_=1, transform=Transform(8)):
    """Build a cache with worker processes, however few the pictures are."""
    features.PROCESSES_FROM = from_
    return feature_cache(slow, transform, paths, folder, "key", batch_size=8, workers=2, progress=False)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Paths of 80 small pictures."""
    monkeypatch.setattr(features, "PROCESSES_FROM", features.PROCESSES_FROM)  # put back what `build` sets
    (tmp_path / "pictures").mkdir()
    paths = [tmp_path / "pictures" / f"{i}.png" for i in range(80)]
    for i, path in enumerate(paths):
        smooth(20, 10, i).save(path)
    return paths


@pytest.mark.parametrize("transform", [Transform(8), Transform(8, crop=2), Transform(8, flip=True)], ids=str)
def test_processes_and_threads_make_the_same_cache(pictures, tmp_path, transform):
    made = build(pictures, tmp_path / "processes", 1, transform)
    assert np.array_equal(made, build(pictures, tmp_path / "threads", 10**9, transform))
    expected = slow(torch.stack([transform(load_image(path)) for path in pictures])).half().numpy()
    assert np.array_equal(made, expected)


def test_a_broken_picture_is_named_from_a_process(pictures, tmp_path):
    pictures[50].write_bytes(b"no picture")
    with pytest.raises(UserError, match="50.png cannot be read"):
        build(pictures, tmp_path / "cache")
    smooth(20, 10, 50).save(pictures[50])
    assert len(build(pictures, tmp_path / "cache")) == 80


def test_a_cache_killed_again_and_again_ends_as_if_it_had_not(pictures, tmp_path):
    whole = np.array(build(pictures, tmp_path / "whole"))
    context = multiprocessing.get_context("fork")

    def count():
        notes = list((tmp_path / "killed").glob("*.json"))
        return json.loads(notes[0].read_text(encoding="utf-8"))["done"] if notes else -1

    done = []
    for reached in (0, 8, 24, 48):
        process = context.Process(target=build, args=(pictures, tmp_path / "killed"))
        process.start()
        deadline = time.monotonic() + 60
        while count() < reached:
            assert time.monotonic() < deadline and process.is_alive()
            time.sleep(0.002)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        orphans = [int(child) for child in workers.read_text(encoding="utf-8").split()] if workers.exists() else []
        process.kill()
        process.join()
        done.append(count())
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{orphan}").exists() for orphan in orphans):
            assert time.monotonic() < deadline, "worker processes outlive a killed parent"
            time.sleep(0.01)
    assert done == sorted(done) and 48 <= done[-1] < 80, done
    assert np.array_equal(build(pictures, tmp_path / "killed"), whole)
    assert sorted(path.suffix for path in (tmp_path / "killed").iterdir()) == [".json", ".npy"]


def test_of_two_processes_that_ask_at_once_one_builds_and_the_other_reads(pictures, tmp_path):
    """Each counts what it encodes: together they encode each picture once, and both get all features."""
    context, folder = multiprocessing.get_context("fork"), tmp_path / "cache"
    start, results = context.Barrier(2), context.Queue()

    def ask():
        seen = []
        start.wait(60)
        made = feature_cache(lambda images: seen.append(len(images)) or slow(images), Transform(8), pictures, folder,
                             "key", batch_size=8, workers=1, progress=False)
        results.put((sum(seen), np.array(made)))

    processes = [context.Process(target=ask) for _ in range(2)]
    for process in processes:
        process.start()
    output = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sorted(seen for seen, _ in output) == [0, 80]
    expected = slow(torch.stack([Transform(8)(load_image(path)) for path in pictures])).half().numpy()
    assert all(np.array_equal(made, expected) for _, made in output)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".npy"]


def test_who_waits_goes_on_where_a_killed_process_stopped(pictures, tmp_path):
    """The lock dies with its process: the one that waits takes over, and repeats nothing that is counted."""
    context, folder, seen, waited = multiprocessing.get_context("fork"), tmp_path / "cache", [], []

    def build_and_stop():
        calls = itertools.count()
        feature_cache(lambda images: time.sleep(600 if next(calls) == 3 else 0) or slow(images), Transform(8), pictures,
                      folder, "key", batch_size=8, workers=1, progress=False)

    process = context.Process(target=build_and_stop)
    process.start()
    deadline = time.monotonic() + 60
    while not any(json.loads(note.read_text(encoding="utf-8"))["done"] == 24 for note in folder.glob("*.json")):
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.002)

    def kill():
        waited.append(process.is_alive())
        process.kill()
        process.join()

    with one_at_a_time(next(folder.glob("*.lock")), kill, pause=0.01):
        assert waited == [True], "nobody had to wait for a process that was building"
    made = feature_cache(lambda images: seen.append(len(images)) or slow(images), Transform(8), pictures, folder, "key",
                         batch_size=8, workers=1, progress=False)
    assert sum(seen) == 56
    assert np.array_equal(made, build(pictures, tmp_path / "whole"))
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".npy"]


def test_what_another_machine_writes_is_let_be(tmp_path, monkeypatch):
    """On a disk that machines share, the name of one may be the beginning of another's."""
    for host, survives in (("node-2", True), ("node", False)):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        monkeypatch.setattr("os.getpid", lambda: 999_999_999)  # nobody's
        half = files._own(tmp_path / "run.json", "part")
        half.write_text("half")
        monkeypatch.undo()
        monkeypatch.setattr("socket.gethostname", lambda: "node")
        files.write_json(tmp_path / "run.json", {})
        monkeypatch.undo()
        assert half.exists() == survives, host


def test_a_lock_is_held_by_one_at_a_time_and_left_by_what_it_raises(tmp_path):
    """Threads that ask again and again are never two inside, though each removes the file when it leaves."""
    inside, most, entered = 0, 0, 0

    def work():
        nonlocal inside, most, entered
        for _ in range(30):
            with pytest.raises(KeyError), one_at_a_time(tmp_path / "a.lock", pause=0.0005):
                inside, entered = inside + 1, entered + 1
                most = max(most, inside)
                time.sleep(0.0005)
                inside -= 1
                raise KeyError

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (most, entered) == (1, 120) and not list(tmp_path.iterdir())


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Between opening and locking, the holder leaves and another takes a new file of the same name."""
    fcntl, path, others = pytest.importorskip("fcntl"), tmp_path / "a.lock", []
    real = fcntl.flock

    def flock(file, how):
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()
        others.append(files._lock(path))
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert files._lock(path) is None and others[0] is not None
    others[0].close()
    last = files._lock(path)
    assert last is not None
    last.close()


# ---------------------------------------------------------------- from the site to a trained stage 1


def test_the_whole_road_from_the_site_to_an_epoch_of_stage_1(coco_mini, tmp_path):
    """All 159 captioned images of the excerpt: fetched, loaded, cached (whole and one crop), one epoch trained."""
    with CocoServer(coco_files(coco_mini)) as site:
        assert download.main(["coco", "--out", str(tmp_path), "--base-url", site.url, "--split", "karpathy",
                              "--karpathy-url", site.url + KARPATHY]) == 0
    splits = {name: CocoCaptions(tmp_path, name, strict=True) for name in ("train", "val", "test")}
    assert sum(len(data) for data in splits.values()) == 159
    torch.manual_seed(0)
    vit = ViT(ViTConfig(image_size=56, patch_size=14, width=48, layers=2, heads=4, mlp_width=96)).eval()
    tokenizer, data = text_tokenizer(), splits["train"]
    caches = []
    for name, view in (("train", {}), ("train", {"crop": 0}), ("val", {}), ("test", {})):
        paths = [record.path for record in splits[name].images]
        made = feature_cache(vit, replace(Transform(56), **view), paths, tmp_path / "cache", weights_checksum(vit),
                             progress=False)
        assert made.shape == (len(paths), 17, 48) and np.isfinite(made).all()
        caches.append(made)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 4
    ids = [tokenizer.encode(caption) for caption in data.texts]
    batches = PairBatches(caches[:2], data.rows, ids, data.ids, 16, 0,
                          tokenizer.pad_id)
    config = QFormerConfig(width=48, layers=2, heads=4, mlp_width=96, num_queries=4, max_positions=32, dropout=0.0,
                           image_width=48, vocab_size=len(tokenizer))
    log = train(Stage1(config, 32), stage1_losses, batches, TrainConfig(steps=len(batches), batch_size=16, warmup=5),
                tmp_path / "run")
    assert len(log) == len(batches) == 127 * 5 // 16
    first, last = (np.mean([record["itg"] for record in part]) for part in (log[:5], log[-5:]))
    assert last < 0.75 * first, (first, last)
    shutil.rmtree(tmp_path / "cache")
