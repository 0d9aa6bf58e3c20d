"""Other people's lists of captions: every way in which they write them is read, or refused with the way out."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from minblip2 import UserError
from minblip2.data.coco import CocoCaptions
from minblip2.data.files import read_json

from .test_data import IMAGE, NOTE, boxes_file, layout, smooth

ROWS = [("a.jpg", "a dog, on the grass"), ("b 1.png", "a bus"), ("a.jpg", "it runs")]
FOUND = {"a.jpg": ("a dog, on the grass", "it runs"), "b 1.png": ("a bus",)}


def pictures(folder, names=("a.jpg", "b 1.png")):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        smooth(20, 10).save(folder / name)
    return folder


def captions(data):
    return {image.path.name: image.captions for image in data.images}


TABLES = {
    "commas": 'file_name,caption\na.jpg,"a dog, on the grass"\nb 1.png,a bus\na.jpg,it runs\n',
    "commas without quotes": "image,caption\na.jpg,a dog, on the grass\n\nb 1.png,a bus\na.jpg,it runs\n",
    "commas without a head": 'a.jpg,"a dog, on the grass"\nb 1.png,a bus\r\na.jpg,it runs',
    "semicolons": "Caption;File Name\na dog, on the grass;a.jpg\na bus;b 1.png\nit runs;a.jpg\n",
    "tabs": "filepath\ttext\na.jpg\ta dog, on the grass\nb 1.png\ta bus\na.jpg\tit runs\n",
    "tabs and numbers": "a.jpg#0\ta dog, on the grass\nb 1.png#0\ta bus\na.jpg#1\tit runs\n",
    "bars": "image_name| comment_number| comment\na.jpg| 0| a dog, on the grass\nb 1.png| 0| a bus\na.jpg| 1| it runs",
    "blanks": "a.jpg a dog, on the grass\nb 1.png: a bus\na.jpg  it runs\n",
    "more columns": 'n,image,caption,by\n0,a.jpg,"a dog, on the grass",x\n1,b 1.png,a bus,\n2,a.jpg,it runs,z\n',
    "split": 'image,caption,split\na.jpg,"a dog, on the grass",train\nb 1.png,a bus,train\na.jpg,it runs,train\n'
             "a.jpg,not this,val\n",
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_kind_of_table_is_read(tmp_path, name, encoding):
    (pictures(tmp_path) / "my.csv").write_bytes(TABLES[name].encode(encoding))
    data = CocoCaptions(tmp_path / "my.csv", "train", strict=True, check=True)
    assert captions(data) == FOUND and len(data.pairs) == 3 and [image.id for image in data.images] == [1, 2]


@pytest.mark.parametrize("text", [
    "".join(json.dumps(dict(file_name=name, text=text)) + "\n" for name, text in ROWS),
    json.dumps([dict(image=name, image_id=7, caption=text) for name, text in ROWS]),
    json.dumps([dict(image="a.jpg", caption=list(FOUND["a.jpg"])), dict(image="b 1.png", caption="a bus")])])
def test_json_lines_and_lists_are_read(tmp_path, text):
    (pictures(tmp_path) / "my.json").write_text(text)
    assert captions(CocoCaptions(tmp_path / "my.json", "train", strict=True)) == FOUND


@pytest.mark.parametrize("file", ["captions.txt", "captions.csv", "captions.tsv", "metadata.csv", "train.csv",
                                  "captions_train.txt", "train/metadata.csv"])
@pytest.mark.parametrize("folder", [".", "images"])
def test_a_folder_with_a_table_is_read(tmp_path, file, folder):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    pictures(path.parent / folder)
    path.write_text(TABLES["commas"])
    assert captions(CocoCaptions(tmp_path, "train", strict=True)) == FOUND


def test_quotes_and_letters_of_captions_stay(tmp_path):
    (pictures(tmp_path) / "a.txt").write_text('a.jpg\t"Hello" says a sign\nb 1.png\t"a ""big"" bus"\n', "utf-8")
    assert captions(CocoCaptions(tmp_path / "a.txt", "train")) == {"a.jpg": ('"Hello" says a sign',),
                                                                   "b 1.png": ('a "big" bus',)}
    (tmp_path / "b.csv").write_text('file,caption\na.jpg,"ein ""Hünd""\nauf 写真"\n', "utf-8")
    assert captions(CocoCaptions(tmp_path / "b.csv", "train")) == {"a.jpg": ('ein "Hünd" auf 写真',)}


@pytest.mark.parametrize("head", ["image,title,caption", "image_id,caption,file_name", "comment,image_id,name,text"])
def test_of_several_known_columns_the_likeliest_are_read(tmp_path, head):
    kinds = {"image": "a.jpg", "file_name": "a.jpg", "name": "a.jpg", "caption": "a dog", "text": "a dog"}
    names = head.split(",")
    row = {name: kinds.get(name, "17") for name in names} | ({} if "image" in names else {"image_id": "0001"})
    (pictures(tmp_path) / "a.csv").write_text(f"{head}\n{','.join(row.values())}\n")
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    for file in ("a.csv", "a.jsonl"):
        assert captions(CocoCaptions(tmp_path / file, "train")) == {"a.jpg": ("a dog",)}, file


@pytest.mark.parametrize("name, text", {
    "a.csv": "image,caption\r\na.jpg,{}\r\nb 1.png,a bus\r\n", "b.csv": "a.jpg,{}\nb 1.png,a bus",
    "a.tsv": "image\tcaption\r\na.jpg\t{}\r\nb 1.png\ta bus\r\n", "a.txt": "a.jpg: {}\rb 1.png: a bus\r",
    "c.csv": "{}|image|caption\nx|a.jpg|a dog runs\nx|b 1.png|a bus\n",
    "a.jsonl": '{{"image": "a.jpg", "text": "{}"}}\r\n{{"image": "b 1.png", "text": "a bus"}}\r\n'}.items(), ids=str)
@pytest.mark.parametrize("cut", ["\u2028", "\u2029", "\x85"])
def test_only_newlines_end_a_line(tmp_path, name, text, cut):
    (pictures(tmp_path) / name).write_bytes(text.format(f"a dog{cut}runs").encode())
    assert captions(CocoCaptions(tmp_path / name, "train")) == {"a.jpg": ("a dog runs",), "b 1.png": ("a bus",)}


def test_splits_of_tables(tmp_path):
    (pictures(tmp_path) / "my.csv").write_text("image,caption,split\na.jpg,x,train\nb 1.png,y,val\n")
    assert captions(CocoCaptions(tmp_path / "my.csv", "val")) == {"b 1.png": ("y",)}
    with pytest.raises(UserError, match="no split 'test' in .*my.csv: there are train, val;"):
        CocoCaptions(tmp_path / "my.csv", "test")
    (tmp_path / "captions.txt").write_text("a.jpg,x\n")
    with pytest.raises(UserError, match="no split 'val' in .*captions.txt: there are train;.*third column 'split'"):
        CocoCaptions(tmp_path, "val")
    (tmp_path / "val.csv").write_text("b 1.png,z\n")
    assert captions(CocoCaptions(tmp_path, "val")) == {"b 1.png": ("z",)}
    assert captions(CocoCaptions(tmp_path, "train")) == {"a.jpg": ("x",)}
    with pytest.raises(UserError, match="no split 'train' in .*val.csv: there are val;"):
        CocoCaptions(tmp_path / "val.csv", "train")


def test_a_caption_may_end_with_the_name_of_a_split(tmp_path):
    (pictures(tmp_path) / "my.csv").write_text(
        "a.jpg,a station, a platform, train\na.jpg,a station,train\nb 1.png,a dog\nb 1.png,a dog, brown\na.jpg,x\n")
    assert captions(CocoCaptions(tmp_path / "my.csv", "train")) == {
        "a.jpg": ("a station, a platform, train", "a station,train", "x"), "b 1.png": ("a dog", "a dog, brown")}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_third_column_is_the_split_without_a_head_as_well(tmp_path, delimiter):
    lines = ("a.jpg,a dog,train", "b 1.png,two cats, val")
    (pictures(tmp_path) / "my.csv").write_text("\n".join(lines).replace(",", delimiter))
    assert captions(CocoCaptions(tmp_path / "my.csv", "train")) == {"a.jpg": ("a dog",)}
    assert captions(CocoCaptions(tmp_path / "my.csv", "val")) == {"b 1.png": ("two cats",)}


@pytest.mark.parametrize("head", ["", "image,caption,split\n"])
def test_splits_are_named_in_many_ways(tmp_path, head):
    table = pictures(tmp_path) / "my.csv"
    table.write_text(head + "a.jpg,a dog,Train\na.jpg,a hare,restval\nb 1.png,two cats,Dev\n")
    assert captions(CocoCaptions(table, "train")) == {"a.jpg": ("a dog", "a hare")}
    assert captions(CocoCaptions(table, "dev")) == {"b 1.png": ("two cats",)}
    table.write_text(head + "a.jpg,a dog,\na.jpg,a hare,\nb 1.png,two cats,val\n")
    with pytest.raises(UserError, match="names no split, where others do"):
        CocoCaptions(table, "train")


def test_a_caption_in_quotes_may_stand_behind_a_blank(tmp_path):
    (pictures(tmp_path) / "my.csv").write_text('image, caption, split\na.jpg, "a dog, brown", train\n')
    assert captions(CocoCaptions(tmp_path / "my.csv", "train")) == {"a.jpg": ("a dog, brown",)}
    (tmp_path / "my.csv").write_text('a.jpg, "a dog, brown"\n')
    assert captions(CocoCaptions(tmp_path / "my.csv", "train")) == {"a.jpg": ("a dog, brown",)}


def test_quotes_within_a_caption_stay(tmp_path):
    (pictures(tmp_path) / "my.csv").write_text('a.jpg,a sign says, "stop", in red\n')
    assert captions(CocoCaptions(tmp_path / "my.csv", "train")) == {"a.jpg": ('a sign says, "stop", in red',)}


LINES = [f"{i}.png,a sign" for i in range(12)]


SWALLOWED = {
    "commas": ("\n".join(["image,caption", *LINES[:3], '3.png,"Stop: a red sign', *LINES[4:]]), 5),
    "no head": ("\r\n".join([*LINES[:3], '3.png,"Stop: a red sign', *LINES[4:]]), 4),
    "ended by the next quote": ('0.png,a\n1.png,"Stop: a sign\n2.png,"a dog, brown"\n', 2),
    "all in quotes": ('"0.png","a"\n"1.png","Stop: a sign\n"2.png","a dog"\n"3.png","a cat"\n', 2),
    "caption first": ('caption;image\na;0.png\n"Stop: a sign;1.png\n"a dog";"2.png"\n', 3),
    "three columns": ('n,image,caption,by\n0,0.png,a,x\n\n1,1.png,"Stop: a sign,x\n2,2.png,a dog,y\n', 4),
    "in the head": ('image,"caption\n0.png,a\n1.png,b\n', 1),
    "very long": ('0.png,a\n1.png,"Stop\n' + "2.png,a dog\n" * 20_000, 2),
}


@pytest.mark.parametrize("name", SWALLOWED)
def test_a_quote_that_does_not_end_is_refused_where_it_begins(tmp_path, name):
    """It took the rows below it into its caption, and nobody heard of their pictures again."""
    text, line = SWALLOWED[name]
    (pictures(tmp_path, [f"{i}.png" for i in range(12)]) / "my.csv").write_bytes(text.encode())
    with pytest.raises(UserError, match=f"my.csv, line {line} (begins a quote|is no line of a table)"):
        CocoCaptions(tmp_path / "my.csv", "train")


@pytest.mark.parametrize("text", [
    'a.jpg,"a sign:\nSlow, please\n(as in b 1.png)"\nb 1.png,"one\r\ntwo"\n',
    'caption,image\n"a sign:\nSlow, please\n(as in b 1.png)",a.jpg\n"one\ntwo",b 1.png\n',
    'image,caption,url\na.jpg,"a sign:\nSlow, please\n(as in b 1.png)",http://x/a.jpg\nb 1.png,"one\ntwo",y/b.jpg',
    'by,image,caption\n"x\ny",a.jpg,"a sign:\nSlow, please\n(as in b 1.png)"\nz,b 1.png,"one\rtwo"'])
def test_captions_in_quotes_may_have_several_lines(tmp_path, text):
    (pictures(tmp_path) / "my.csv").write_bytes(text.encode())
    assert captions(CocoCaptions(tmp_path / "my.csv", "train")) == {
        "a.jpg": ("a sign: Slow, please (as in b 1.png)",), "b 1.png": ("one two",)}


def test_a_picture_may_be_named_by_its_full_path(tmp_path):
    (pictures(tmp_path) / "my.csv").write_text(f"{tmp_path.resolve() / 'a.jpg'},a dog\n")
    assert captions(CocoCaptions(tmp_path / "my.csv", "train")) == {"a.jpg": ("a dog",)}


@pytest.mark.parametrize(("text", "message"), [
    (b"image,caption\na.jpg,ein H\xfcnd\n", r"my.csv is not UTF-8 \(byte 25 is 0xfc\): save it as UTF-8"),
    (b"", "my.csv holds no line with a caption: give lines such as"),
    (b"image,caption\n", "my.csv holds no line with a caption: give lines such as"),
    (b"hello\nworld\n", "line 1 has no file name and caption: give lines such as `dog.jpg"),
    (b"image,caption,by\na.jpg,a dog, a cat,x\n", "line 2 has 4 columns, not 3: put a caption that holds ',' into quo"),
    (b"image,caption\na.jpg\n", "line 2 has 1 columns, not 2"), (b"image,caption\n,a dog\n", "line 2 has no file name"),
    (b"a.jpg a dog\n\nb.jpg\n", "line 3 has no file name"), (b"x,y\n1,2\n", "line 1 has no file name"),
    (b"image,caption\n/etc/a.jpg,a dog\n", "names the picture '/etc/a.jpg', which is outside"),
    (b"image,caption\n../a.jpg,a dog\n", "names the picture '../a.jpg', which is outside"),
    (b"image,caption,split\na.jpg,a dog,train\na.jpg,a cat\n", "line 3 names no split"),
    (b"a.jpg,a dog,train\nb.jpg,a dog,val\na.jpg,a cat\n", "line 3 names no split"),
    (b"a.jpg,a dog, big,train\n", "line 1 has 4 columns, not 3: put a caption that holds"),
    (b"a.jpg," + b"x" * 140_000, "line 1 is no line of a table"),
    (b"image,caption\nz.jpg,a dog\n", "no usable image"), (b"image,caption\na.jpg,\n", "no usable image")])
def test_bad_tables_are_refused(tmp_path, text, message):
    (pictures(tmp_path) / "my.csv").write_bytes(text)
    with pytest.raises(UserError, match=message) as error:
        CocoCaptions(tmp_path / "my.csv", "train")
    assert "my.csv" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ['{"images": []}', "[1]", '[{"image": "a.jpg"}]', '{"a": 1}\n{', "[" * 100_000])
def test_bad_json_lists_are_refused(tmp_path, text):
    (tmp_path / "my.json").write_text(text)
    with pytest.raises(UserError, match="my.json"):
        CocoCaptions(tmp_path / "my.json", "train")


# ---------------------------------------------------------------- COCO layout as other people write it


@pytest.mark.parametrize("changes", [
    {"licenses": None}, {"licenses": ["CC"]}, {"licenses": [{"id": [1]}]}, {"licenses": 7}, {"licenses": {"1": "CC"}},
    {"images": [IMAGE | {"license": [1], "id": 10}]}, {"images": [IMAGE | {"id": "10"}]},
    {"images": [IMAGE | {"id": 10.0, "width": 20.0, "height": "10"}]}, {"images": [{"id": 10, "file_name": "0.png"}]},
    {"images": [{"id": 10, "file_name": "0.png", "width": None, "height": [2]}]},
    {"images": [{"id": 10, "file_name": "0.png", "width": 1e999, "height": "wide"}]},
    {"images": [IMAGE | {"id": 10, "file_name": "images/0.png"}]},
    {"images": [IMAGE | {"id": 10, "file_name": "images\\0.png"}]}])
def test_what_training_does_not_need_may_be_anything(tmp_path, changes):
    notes = [{"image_id": number, "caption": "a cat"} for number in (10, "10", 10.0)]
    content = {"images": [IMAGE | {"id": 10}], "annotations": notes} | changes
    data = CocoCaptions(layout(tmp_path, images=1, content=content), "train", strict=True)
    assert data.images[0].id == 10 and data.images[0].captions == ("a cat",) * 3
    assert (data.images[0].width, data.images[0].height) in ((20, 10), (0, 0))


def test_sizes_that_boxes_need_are_read_from_the_pictures(tmp_path):
    listed = [{"id": 10 + i, "file_name": f"{i}.png"} for i in range(3)]
    boxes_file(layout(tmp_path))
    file = tmp_path / "annotations" / "captions_train.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"images": listed}))
    sizes = [(image.width, image.height) for image in CocoCaptions(tmp_path, "train").images]
    assert sizes == [(0, 0), (20, 10), (0, 0)]  # the one that has a box


@pytest.mark.parametrize("number", [2**70, -2**70, "x1", 1.5, 1e300, True, None, [1], "1" * 30, float("nan")])
def test_ids_that_are_no_numbers_of_64_bits_are_refused(tmp_path, number):
    notes = [{"image_id": number, "caption": "a cat"}]
    with pytest.raises(UserError, match="captions_train.json has id = .*give the images whole numbers"):
        CocoCaptions(layout(tmp_path, images=1, content={"images": [IMAGE | {"id": number}], "annotations": notes}),
                     "train")


def test_impossible_names_are_missing_pictures(tmp_path):
    names = ["a" * 300 + ".png", "x/" * 3000 + "a.png", "loop.png", "", "a\ud800.png", "a\udfff/b.png"]
    listed = [IMAGE | {"id": i, "file_name": name} for i, name in enumerate(names)]
    notes = [{"image_id": i, "caption": "a cat"} for i in range(len(names) + 1)]
    content = {"images": [*listed, IMAGE | {"id": len(names)}], "annotations": notes}
    layout(tmp_path, content=content)
    os.symlink("loop.png", tmp_path / "images" / "loop.png")
    data = CocoCaptions(tmp_path, "train")
    assert len(data) == 1 and data.skipped == {"missing picture": len(names)}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_in_any_unicode_is_read(tmp_path, encoding):
    file = layout(tmp_path) / "annotations" / "captions_train.json"
    file.write_bytes(file.read_text().replace("told 0", "Hünd").encode(encoding))
    assert CocoCaptions(tmp_path, "train").pairs[0] == (0, "picture 0, Hünd")


def test_a_name_that_is_no_text_is_read(tmp_path):
    """As Python names a file whose name is Latin-1."""
    name = os.fsdecode(b"caf\xe9.png")
    try:
        smooth(20, 10).save(tmp_path / name)
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    (tmp_path / "my.json").write_text(json.dumps([{"image": name, "text": "a cat"}]))
    assert captions(CocoCaptions(tmp_path / "my.json", "train", check=True)) == {name: ("a cat",)}


def test_json_in_other_encodings_is_refused(tmp_path):
    (tmp_path / "a.json").write_bytes('{"a": "Hünd"}'.encode("latin-1"))
    with pytest.raises(UserError, match="a.json is not JSON .*in UTF-8"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("folder", ["images", "train2014"])
def test_coco_2014_is_read_by_its_names(tmp_path, folder):
    layout(tmp_path, names=("captions_train2014.json", folder))
    for split in ("train", "train2014"):
        assert len(CocoCaptions(tmp_path, split, strict=True)) == 3


def test_of_two_years_the_one_that_is_asked_for_is_read(tmp_path):
    for year in ("2014", "2017"):
        layout(tmp_path, names=(f"captions_train{year}.json", f"train{year}"))
    for split, folder in (("train", "train2017"), ("train2014", "train2014"), ("train2017", "train2017")):
        assert {image.path.parent.name for image in CocoCaptions(tmp_path, split).images} == {folder}


def test_ids_reach_the_batches(tmp_path):
    ids = [2**63 - 1, -2**63, 0]
    listed = [IMAGE | {"id": number, "file_name": f"{i}.png"} for i, number in enumerate(ids)]
    notes = [NOTE | {"image_id": number} for number in ids]
    data = CocoCaptions(layout(tmp_path, content={"images": listed, "annotations": notes}), "train")
    assert np.asarray([image.id for image in data.images], dtype=np.int64).tolist() == ids
    assert all(Path(image.path).is_file() for image in data.images)
