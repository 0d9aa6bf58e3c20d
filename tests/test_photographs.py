"""The photographs that ship: small, whole, and credited wherever their files or captions go."""

import importlib.util
import json
import re

import pytest
from PIL import Image

from minblip2 import UserError
from minblip2.data.coco import CocoCaptions

from .conftest import ROOT

FOLDER = ROOT / "data" / "photographs"


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_they_are_sixteen_small_and_credited(make):
    data = CocoCaptions(FOLDER, "val", strict=True, check=True)
    assert data.ids == list(make.CAPTIONS) and len(data) == 16
    assert sorted(path.name for path in (FOLDER / "images").iterdir()) == sorted(path.name for path in data.paths)
    credits = (FOLDER / "CREDITS.md").read_text(encoding="utf-8")
    for record in data.images:
        assert record.path.stat().st_size <= make.LARGEST and max(Image.open(record.path).size) == make.SIDE
        assert (record.width, record.height) == Image.open(record.path).size
        assert record.captions == (make.CAPTIONS[record.id],)
        source, licence, url = record.credit.split(", ")
        assert "flickr" in source and licence == "CC BY 2.0 (resized)" and url == make.LICENCE_URL
        assert re.search(rf"\| \[{record.path.name}].*{re.escape(make.CAPTIONS[record.id])}.*<{re.escape(source)}>",
                         credits)
    assert make.LICENCE_URL in credits and "resized" in credits


def test_they_are_coco_s_under_the_licence_that_is_told(make, coco_mini):
    found = make.find(coco_mini)
    credits = (FOLDER / "CREDITS.md").read_text(encoding="utf-8")
    assert list(found) == list(make.CAPTIONS) and all(source in credits for _, source in found.values())
    for number, (path, _) in found.items():
        assert len(small := make.small_jpeg(Image.open(path).convert("RGB"))) <= make.LARGEST
        assert abs(len(small) - (FOLDER / "images" / f"{number:012d}.jpg").stat().st_size) < make.LARGEST / 4


def test_another_licence_is_refused_and_so_is_a_missing_picture(make, coco_mini, tmp_path):
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        name = f"captions_{split}.json"
        content = json.loads((coco_mini / "annotations" / name).read_text(encoding="utf-8"))
        if split == "train2017":
            next(entry for entry in content["images"] if entry["id"] == 129648)["license"] = 3
        (tmp_path / "annotations" / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="picture 129648 is not under CC BY 2.0"):
        make.find(tmp_path)
    content = json.loads((tmp_path / "annotations" / "captions_train2017.json").read_text(encoding="utf-8"))
    content["images"] = [entry for entry in content["images"] if entry["id"] != 129648]
    (tmp_path / "annotations" / "captions_train2017.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"lacks the pictures \[129648\]"):
        make.find(tmp_path)
