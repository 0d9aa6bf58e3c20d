"""A subset of COCO: the annotations, then the chosen pictures, then a manifest of what is there."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from annotations import check_archive, choose, entries, read_images, short_name
from fetch import Fetcher, Item, sha256_of
from minblip2 import UserError
from minblip2.data.coco import has_word, read_box
from minblip2.data.files import field, one_at_a_time, read_json, whole, write_json
from minblip2.data.pictures import check_image
from minblip2.data.progress import progress_bar
from minblip2.data.workers import prefetch

OFFICIAL = "http://images.cocodataset.org"  # as COCO publishes it: no certificate is valid for this host
ARCHIVE = "annotations/annotations_trainval2017.zip"
ARCHIVE_SHA256 = "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
KARPATHY_MEMBER = "dataset_coco.json"
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
SOURCES, KINDS = ("train2017", "val2017"), ("captions", "instances")
TERMS = "annotations: COCO Consortium, CC BY 4.0; pictures: by their authors at flickr_url, under the licence of each"
LARGEST_PICTURE, LARGEST_ARCHIVE, TYPICAL_PICTURE = 2**25, 2**30, 170_000  # bytes
LONGEST_CAPTION = 2_000  # characters; COCO's longest has 250


def download(out: Path, splits: list[str], number: int | None = None, seed: int = 0, base_url: str = OFFICIAL,
             karpathy_url: str = KARPATHY, licences: list[str] | None = None, fetcher: Fetcher | None = None) -> None:
    """Fetch `number` pictures of the first split and a tenth as many of each other, or all, into `out` in COCO layout.

    splits: train2017, val2017, or karpathy, which stands for train, val and test. Written last for each split is
    manifest-SPLIT.json. Raises UserError with what went wrong; what is there by then is kept.
    """
    if number is not None and number < 1:
        raise UserError(f"--images is {number}: ask for at least 1")
    if len(set(splits)) < len(splits) or ("karpathy" in splits and len(splits) > 1):
        raise UserError(f"--split is {' '.join(splits)}: name each once, and karpathy, which is made of both, alone")
    fetcher, base_url = fetcher or Fetcher(), base_url.rstrip("/")
    (out / "annotations").mkdir(parents=True, exist_ok=True)

    def busy() -> None:
        raise UserError(f"another download writes into {out}: wait for its end or choose another --out")

    with one_at_a_time(out / ".lock", busy):
        sources = SOURCES if "karpathy" in splits else splits
        members = {kind: [f"annotations/{kind}_{source}.json" for source in sources] for kind in KINDS}
        archive = _archive(fetcher, f"{base_url}/{ARCHIVE}", out, [*members["captions"], *members["instances"]],
                           ARCHIVE_SHA256 if base_url == OFFICIAL else None)
        known, table = {}, []
        for source, member in zip(sources, members["captions"], strict=True):
            images, table = read_images(archive, member)
            if both := known.keys() & images:
                raise UserError(f"{archive} lists the picture {min(both)} in two splits: do not use it")
            known |= {image: entry | {"source": source, "coco_url": f"{base_url}/{source}/{entry['file_name']}"}
                      for image, entry in images.items()}
        known = _allowed(known, table, licences)
        if "karpathy" in splits:
            split_of = _karpathy(_archive(fetcher, karpathy_url, out, [KARPATHY_MEMBER]))
            splits = list(dict.fromkeys(KARPATHY_SPLITS.values()))
        else:
            split_of = {image: entry["source"] for image, entry in known.items()}
        groups = {name: {image: known[image] for image in known if split_of.get(image) == name} for name in splits}
        if empty := [name for name in splits if not groups[name]]:
            raise UserError(f"{archive} lists no picture of the split {empty[0]} under the licences asked for")
        chosen = {name: choose(group, number if number is None or name == splits[0] else max(1, number // 10), seed)
                  for name, group in groups.items()}
        record = _annotations(archive, members, {entry["id"]: name for name in chosen for entry in chosen[name]})
        for name, images in chosen.items():
            _split(fetcher, out, name, images, table, record[name], {"seed": seed, "asked for": number or "all"})


def verify(out: Path) -> int:
    """Compare every file in a folder with its manifests, without a network. Returns how many there are."""
    manifests = sorted(out.glob("manifest-*.json"))
    if not manifests:
        raise UserError(f"{out} has no manifest-*.json: no download into it has come to its end, run it again")
    listed = [(path, entry) for path in manifests for entry in field(read_json(path), "files", list, path)]

    def problem(item: tuple[Path, Any]) -> str | None:
        manifest, entry = item
        path = (out / field(entry, "file", str, manifest)).resolve()
        if not path.is_relative_to(out.resolve()):
            return f"{manifest} lists {entry['file']!r}, which is outside {out}"
        if not path.is_file():
            return f"{path} is missing"
        found = path.stat().st_size, sha256_of(path)
        record = field(entry, "bytes", int, manifest), field(entry, "sha256", str, manifest)
        return None if found == record else (f"{path} has {found[0]} bytes and sha256 {found[1][:12]}..., not "
                                             f"{record[0]} and {record[1][:12]}...")

    answers = progress_bar(prefetch(problem, listed, os.cpu_count() or 1), total=len(listed), desc="verify",
                           unit="file")
    if problems := [answer for answer in answers if answer]:
        raise UserError(f"{len(problems)} of {len(listed)} files are not as they were fetched, first {problems[0]}: "
                        "run the same download again")
    return len(listed)


def _archive(fetcher: Fetcher, url: str, out: Path, members: list[str], sha256: str | None = None) -> Path:
    """The archive of that URL, fetched unless it is there. It stays, for choices that are made later."""
    (out / "archives").mkdir(exist_ok=True)
    path = out / "archives" / url.rpartition("/")[2]
    item = Item(url, path, LARGEST_ARCHIVE, lambda part, proven: check_archive(part, members, sha256))
    if not _is_there(item):
        with progress_bar(desc=path.name, unit="B", unit_scale=True) as bar:
            def progress(done: int, total: int | None) -> None:
                bar.total = total
                bar.update(done - bar.n)
            fetcher.get(item, progress)
    return path


def _allowed(known: dict[int, dict], table: list[dict], licences: list[str] | None) -> dict[int, dict]:
    """The images under one of `licences`, given as ids or short names."""
    if not licences:
        return known
    names = {name: str(entry["id"]) for entry in table for name in (str(entry["id"]), short_name(entry))}
    if strange := [name for name in licences if name not in names]:
        raise UserError(f"--licenses has {strange[0]!r}: choose among {', '.join(names)}")
    wanted = {names[name] for name in licences}
    return {image: entry for image, entry in known.items() if str(entry.get("license")) in wanted}


def _karpathy(archive: Path) -> dict[int, str]:
    """The split of each image id, as the captioning papers use them (train holds restval)."""
    where, found = f"{archive.name}, {KARPATHY_MEMBER}", {}
    for _, entry in entries(archive, KARPATHY_MEMBER, "images"):
        image, split = field(entry, "cocoid", int, where), field(entry, "split", str, where)
        if image in found or split not in KARPATHY_SPLITS:
            raise UserError(f"{where} has the image {image} twice or in a split {split[:40]!r}: do not use it")
        found[image] = KARPATHY_SPLITS[split]
    return found


def _annotations(archive: Path, members: dict[str, list[str]], split_of: dict[int, str]) -> dict[str, dict[str, list]]:
    """Captions, boxes (without outlines, most of their bytes) and categories of the chosen images, by split."""
    record: dict[str, dict[str, list]] = {name: {"captions": [], "instances": [], "categories": []}
                                          for name in dict.fromkeys(split_of.values())}
    for kind in KINDS:
        for member in members[kind]:
            where, categories = f"{archive.name}, {member}", []
            for key, entry in progress_bar(entries(archive, member, "annotations", "categories"),
                                           desc=Path(member).name, unit=" entries", leave=False):
                if key == "categories":
                    categories.append(entry)
                elif (name := split_of.get(field(entry, "image_id", int, where))) is not None:
                    if kind == "captions" and len(caption := field(entry, "caption", str, where)) > LONGEST_CAPTION:
                        raise UserError(f"{where} has a caption of {len(caption)} characters for the image "
                                        f"{entry['image_id']}, {caption[:40]!r}...: do not use it")
                    record[name][kind].append({key: value for key, value in entry.items() if key != "segmentation"})
            for group in record.values():
                group["categories"] = categories or group["categories"]
    captioned, boxed = (f"{archive.name}, {' and '.join(members[kind])}" for kind in KINDS)
    for name, group in record.items():  # what the loader would refuse when all pictures are there
        label = {whole(entry, "id", boxed): field(entry, "name", str, boxed) for entry in group["categories"]}
        for entry in group["instances"]:
            read_box(entry, split_of, label, boxed)
        if not any(has_word(entry["caption"]) for entry in group["captions"]):
            raise UserError(f"{captioned} has no caption for the pictures that were chosen of {name}: do not use it")
    return record


def _split(fetcher: Fetcher, out: Path, name: str, images: list[dict], table: list[dict], record: dict[str, list],
           request: dict) -> None:
    """Have the pictures of a split, then write its annotations, then its manifest."""
    manifest, folder = out / f"manifest-{name}.json", out / name
    folder.mkdir(exist_ok=True)
    trusted = {}
    with contextlib.suppress(UserError):
        for entry in field(read_json(manifest), "files", list, manifest):
            trusted[out / field(entry, "file", str, manifest)] = field(entry, "sha256", str, manifest)
    items = [_picture(entry, folder) for entry in images]
    there = prefetch(lambda item: sha256_of(item.path) == trusted[item.path] if item.path in trusted
                     and item.path.exists()
                     else _is_there(item), items, os.cpu_count() or 1)
    looked = progress_bar(zip(items, there, strict=True), hidden=not any(folder.iterdir()), total=len(items),
                          desc=f"{name}: look at what is there", leave=False)
    missing = [item for item, found in looked if not found]
    needed, free = len(missing) * TYPICAL_PICTURE, shutil.disk_usage(out).free
    if needed > free:
        raise UserError(f"{len(missing)} pictures need about {needed / 1e6:,.0f} MB but {free / 1e6:,.0f} are free in "
                        f"{out}: make room, choose another --out or fewer --images")
    with progress_bar(total=len(items), initial=len(items) - len(missing), desc=name, unit="image") as bar:
        started, received = time.perf_counter(), fetcher.received
        for _ in fetcher.all(missing):
            rate = (fetcher.received - received) / (time.perf_counter() - started) / 1e6
            bar.set_postfix_str(f"{rate:.1f} MB/s", refresh=False)
            bar.update()
    for partial in folder.glob("*.part"):  # of a choice that was given up
        partial.unlink()
    listed = [{key: value for key, value in entry.items() if key != "source"} for entry in images]
    captions = {"info": TERMS, "licenses": table, "images": listed, "annotations": record["captions"]}
    write_json(out / "annotations" / f"captions_{name}.json", captions)
    write_json(out / "annotations" / f"instances_{name}.json", captions | {
        "annotations": record["instances"], "categories": record["categories"]})
    notes = [{"file": f"annotations/{kind}_{name}.json", "url": None, "license": "CC BY 4.0"}
             for kind in KINDS]
    pictures = [{"file": f"{name}/{entry['file_name']}", "url": entry["coco_url"], "license": entry.get("license"),
                 "flickr_url": entry.get("flickr_url")} for entry in images]
    digests = prefetch(lambda entry: {"bytes": (out / entry["file"]).stat().st_size,
                                      "sha256": sha256_of(out / entry["file"])}, [*notes, *pictures],
                       os.cpu_count() or 1)
    files = [entry | found for entry, found in zip([*notes, *pictures], digests, strict=True)]
    write_json(manifest, {"terms": TERMS, "split": name, **request, "licenses": table, "files": files})
    short = {str(entry["id"]): short_name(entry) for entry in table}
    counts = Counter(short.get(str(entry.get("license")), "unknown") for entry in images)
    print(f"{folder}: {len(images)} pictures, {len(record['captions'])} captions; licences: "
          + ", ".join(f"{count} {licence}" for licence, count in counts.most_common()))


def _picture(entry: dict, folder: Path) -> Item:
    def check(path: Path, proven: bool) -> None:
        found, output = check_image(path, decode=not proven), (entry["width"], entry["height"])
        if sorted(found) != sorted(output):  # a camera may have lain on its side
            raise UserError(f"{path} is {found[0]}x{found[1]} pixels, not {output[0]}x{output[1]} as in the "
                            "annotations")

    return Item(entry["coco_url"], folder / entry["file_name"], LARGEST_PICTURE, check)


def _is_there(item: Item) -> bool:
    with contextlib.suppress(UserError):
        if item.path.exists():
            item.check(item.path, False)
            return True
    return False
