"""Images, COCO layout, the feature cache and the batches: bad input by its message, good input against other truths."""

import itertools
import json
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minblip2 import UserError
from minblip2.data.batches import Batch, PairBatches
from minblip2.data.coco import CocoCaptions
from minblip2.data.features import feature_cache, weights_checksum
from minblip2.data.pictures import MAX_PIXELS, load_image
from minblip2.data.transforms import Transform

from .pictures import BAD, noise, png_header, smooth

# ---------------------------------------------------------------- pictures


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to look at it
    upright = smooth(40, 30)
    upright.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "turned.png"), np.rot90(np.asarray(upright), -1))


def test_alpha_lies_over_white(tmp_path):
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[:, :, 0] = 200
    pixels[:2, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    loaded = np.asarray(load_image(tmp_path / "alpha.png"))
    assert (loaded[:2] == [200, 0, 0]).all() and (loaded[2:] == 255).all()


def test_transparent_palette_lies_over_white(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "palette.gif", transparency=0)
    loaded = np.asarray(load_image(tmp_path / "palette.gif"))
    assert loaded[0, 0].tolist() == [255, 255, 255] and loaded[1, 1].tolist() == [10, 20, 30]


def test_grey_in_8_and_16_bits(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    for name in ("8.png", "16.png"):
        loaded = np.asarray(load_image(tmp_path / name))
        assert loaded.shape == (16, 16, 3) and (loaded == grey[:, :, None]).all(), name


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures_are_refused_by_name(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"picture.jpg.*{message}|picture.jpg is {message}"):
        load_image(path)


def test_missing_picture_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="absent.jpg cannot be read: there is no such file"):
        load_image(tmp_path / "absent.jpg")


def test_a_bomb_is_refused_before_decoding_and_leaves_pillow_alone(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png_header(8000, MAX_PIXELS // 8000 + 1))
    (tmp_path / "good.png").write_bytes(png_header(10, 9))  # 100 bytes are what 10x9 needs, and one more
    limit = Image.MAX_IMAGE_PIXELS

    def no_decoding(*_):
        raise AssertionError("the bomb was decoded")

    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", no_decoding)
        with pytest.raises(UserError, match="bomb.png"):
            load_image(tmp_path / "bomb.png")
    refused, loaded = [], []

    def work():
        for _ in range(20):
            loaded.append(load_image(tmp_path / "good.png").size)
            try:
                load_image(tmp_path / "bomb.png")
            except UserError as error:
                refused.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 80 and loaded == [(10, 9)] * 80 and Image.MAX_IMAGE_PIXELS == limit


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200),
       st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"BM"]))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_the_bytes_the_error_is_ours(tmp_path_factory, body, start):
    path = tmp_path_factory.mktemp("fuzz") / "picture"
    path.write_bytes(start + body)
    try:
        assert load_image(path).mode == "RGB"
    except UserError as error:
        assert str(path) in str(error)


# ---------------------------------------------------------------- transforms

SIZES = [(640, 427), (427, 640), (224, 224), (100, 333), (257, 256), (31, 30)]


@pytest.mark.parametrize("size", SIZES)
def test_square_transform_is_blips(size):
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    original = BlipImageProcessorPil(size={"height": 224, "width": 224})
    image = smooth(*size)
    expected = original(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(Transform()(image), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("cut", "resize_to"), [(224, 256), (224, 224), (97, 160)])
def test_crop_transform_is_dinov2s(size, cut, resize_to):
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    original = BitImageProcessorPil(size={"shortest_edge": resize_to}, crop_size={"height": cut, "width": cut})
    image = noise(*size)
    expected = original(image, return_tensors="pt").pixel_values[0]
    ours = Transform(cut, mode="crop", resize_to=resize_to)(image)
    assert ours.dtype == torch.float32 and ours.shape == (3, cut, cut)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_transform_of_a_real_folder_is_its_processors(parts, coco_mini):
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    transform = Transform.from_folder(parts / "dinov2-small")
    original = BitImageProcessorPil.from_pretrained(parts / "dinov2-small")
    for record in CocoCaptions(coco_mini, "val", limit=5).images:
        image = load_image(record.path)
        expected = original(image, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(transform(image), expected, atol=1e-5, rtol=0)


MEANS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}


@pytest.mark.parametrize(("config", "size", "mode", "resize_to"), [
    ({"size": {"height": 364, "width": 364}}, 364, "square", None),  # BLIP-2
    ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3}, 224, "crop", 256),
    ({"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True}, 224, "crop", 224),
    ({"size": 224, "crop_size": 224, "do_center_crop": True}, 224, "crop", 224),  # the older CLIP files
    ({"size": 384}, 384, "square", None),
    ({"size": 32, "crop_size": 28, "image_processor_type": "BlipImageProcessor"}, 32, "square", None),
    ({"size": {"height": 28, "width": 28}, "crop_size": 28, "do_center_crop": True}, 28, "square", None),
    ({"size": 256, "image_processor_type": "CLIPImageProcessor"}, 224, "crop", 256),  # 224 is what they take as known
    ({"size": {"shortest_edge": 256}, "image_processor_type": "CLIPImageProcessor"}, 224, "crop", 256),
    ({"size": 224, "image_processor_type": "DeiTImageProcessor"}, 224, "square", None),
])
def test_from_folder_reads_every_form(tmp_path, config, size, mode, resize_to):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(MEANS | config), encoding="utf-8")
    assert Transform.from_folder(tmp_path) == Transform(size, (0.5,) * 3, (0.25,) * 3, mode, resize_to)


@pytest.mark.parametrize(("content", "message"), [
    (None, "preprocessor_config.json cannot be read"),
    ("{", "preprocessor_config.json is not JSON"),
    ("[1]", "holds a list, not an object"),
    (json.dumps(MEANS), "lacks or garbles 'size'"),
    (json.dumps({"size": 224}), "lacks or garbles 'image_mean'"),
    (json.dumps(MEANS | {"size": {"height": 224, "width": 200}}), "only squares"),
    (json.dumps(MEANS | {"size": 224, "resample": 2}), "^[^ ]+ asks for size .* resample 2: only squares and bicubic"),
    (json.dumps(MEANS | {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": False}), "crop None"),
    (json.dumps(MEANS | {"size": {"height": 336, "width": 336}, "image_processor_type": "CLIPImageProcessor"}),
     "crop .*224"),
    (json.dumps(MEANS | {"size": 224, "image_processor_type": "ViTImageProcessor"}), "resample 2"),
    (json.dumps(MEANS | {"size": {"shortest_edge": 224}, "crop_size": 256}), "^cannot cut 256 pixels out of 224"),
])
def test_from_folder_refuses(tmp_path, content, message):
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        Transform.from_folder(tmp_path)


@pytest.mark.parametrize("options", [{}, {"mode": "crop", "resize_to": 256}])
def test_flip_mirrors_and_shown_is_what_the_encoder_gets(options):
    image, plain, flipped = noise(300, 280), Transform(**options), Transform(flip=True, **options)
    torch.testing.assert_close(flipped(image), plain(image).flip(2), atol=0, rtol=0)
    shown = torch.from_numpy(np.array(plain.crop_and_resize(image))).permute(2, 0, 1) / 255
    mean, std = torch.tensor(plain.mean)[:, None, None], torch.tensor(plain.std)[:, None, None]
    torch.testing.assert_close(plain(image) * std + mean, shown, atol=1e-6, rtol=0)


def test_transform_refuses_an_unknown_mode():
    with pytest.raises(UserError, match="'squre': choose 'square' or 'crop'"):
        Transform(mode="squre")


# ---------------------------------------------------------------- COCO layout


def layout(root, images=3, names=("captions_train.json", "images"), content=None, **changes):
    """A tiny data set with two captions per picture; `changes` replaces keys of the captions file."""
    folder = root / names[1]
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    listed = [{"id": 10 + i, "file_name": f"{i}.png", "width": 20, "height": 10} for i in range(images)]
    for i, entry in enumerate(listed):
        smooth(20, 10, i).save(folder / entry["file_name"])
    notes = [{"image_id": 10 + i, "caption": f"picture {i}, told {j}"} for i in range(images) for j in range(2)]
    content = {"images": listed, "annotations": notes} | changes if content is None else content
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "annotations" / names[0]).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("names", [("captions_train.json", "images"), ("captions_train.json", "train"),
                                   ("captions_train2017.json", "train2017"), ("captions_train.json", "train2017")])
def test_every_layout_is_read(tmp_path, names, capsys):
    data = CocoCaptions(layout(tmp_path, names=names), "train")
    assert [(image.id, image.path.name, image.width, image.height) for image in data.images] == [
        (10, "0.png", 20, 10), (11, "1.png", 20, 10), (12, "2.png", 20, 10)]
    assert data.images[1].captions == ("picture 1, told 0", "picture 1, told 1")
    assert data.pairs == [(i, f"picture {i}, told {j}") for i in range(3) for j in range(2)]
    assert len(data) == 3 and not data.skipped and capsys.readouterr() == ("", "")


IMAGE = {"id": 1, "file_name": "0.png", "width": 20, "height": 10}
NOTE = {"image_id": 1, "caption": "a picture"}


@pytest.mark.parametrize(("content", "message"), [
    ("not json", r"captions_train.json is not JSON"),
    ("[" * 100_000, r"captions_train.json is not JSON"),
    ("[]", "captions_train.json holds a list"),
    ({"annotations": []}, "without 'images'"),
    ({"images": []}, "without 'annotations'"),
    ({"images": {}, "annotations": []}, "images = .*not list"),
    ({"images": [7], "annotations": []}, "without 'id': 7"),
    ({"images": [IMAGE, IMAGE], "annotations": []}, "image id 1 twice"),
    ({"images": [IMAGE], "annotations": [{"caption": "x"}]}, "without 'image_id'"),
    ({"images": [IMAGE], "annotations": [{"image_id": 1}]}, "without 'caption'"),
    ({"images": [IMAGE], "annotations": [{"image_id": 1, "caption": None}]}, "caption = 'None', which is not str"),
    ({"images": [IMAGE], "annotations": [{"image_id": 99, "caption": "x"}]}, "caption for image id 99"),
    ({"images": [IMAGE | {"id": "one"}], "annotations": []}, "id = 'one', which is not int"),
    ({"images": [{"id": 1, "width": 2, "height": 2}], "annotations": [NOTE]}, "without 'file_name'"),
    ({"images": [], "annotations": []}, "no usable image"),
    *[({"images": [IMAGE | {"file_name": name}], "annotations": [NOTE]}, "names the picture .*outside .*images")
      for name in ("../secret.png", "a/../../secret.png", "/etc/passwd", "link.png", "linked/secret.png", "0\0.png")],
])
def test_bad_annotations_are_refused(tmp_path, content, message):
    smooth(9, 9).save(tmp_path / "secret.png")
    layout(tmp_path, content=content)
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images" / "linked").symlink_to(tmp_path)
    with pytest.raises(UserError, match=message):
        CocoCaptions(tmp_path, "train")


def test_an_absent_split_names_those_that_are_there(tmp_path):
    layout(tmp_path, names=("captions_val2017.json", "val2017"))
    layout(tmp_path, names=("captions_train.json", "images"))
    with pytest.raises(UserError, match="no split 'test' in .*there are train, val2017"):
        CocoCaptions(tmp_path, "test")
    with pytest.raises(UserError, match="holds no annotations/captions_"):
        CocoCaptions(tmp_path / "images", "train")


def test_an_absent_picture_folder_is_named(tmp_path):
    layout(tmp_path, names=("captions_train.json", "pictures"))
    with pytest.raises(UserError, match="no picture folder .*images/ or train2017/"):
        CocoCaptions(tmp_path, "train")


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(tmp_path, limit):
    with pytest.raises(UserError, match=f"limit is {limit}"):
        CocoCaptions(layout(tmp_path), "train", limit=limit)


def damaged(root):
    """Six pictures: 0 good, 1 missing, 2 with one empty caption, 3 without captions, 4 truncated, 5 good."""
    layout(root, images=6)
    file = root / "annotations" / "captions_train.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["annotations"] = [note for note in content["annotations"] if note["image_id"] != 13]
    content["annotations"][4]["caption"] = " \n"
    file.write_text(json.dumps(content), encoding="utf-8")
    (root / "images" / "1.png").unlink()
    broken = root / "images" / "4.png"
    broken.write_bytes(broken.read_bytes()[:60])
    return root


def test_what_has_no_use_is_skipped_with_one_line(tmp_path, capsys):
    data = CocoCaptions(damaged(tmp_path), "train", check=True)
    assert [image.id for image in data.images] == [10, 12, 15]
    assert data.skipped == {"empty caption": 1, "missing picture": 1, "picture without caption": 1,
                            "unreadable picture": 1}
    assert data.rows == [0, 0, 1, 2, 2]
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(lines) == 1 and "captions_train.json: skipped 1 x empty caption, 1 x missing picture" in lines[0]


def test_without_check_pictures_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("minblip2.data.features.load_image", lambda path: pytest.fail(f"{path} was opened"))
    assert [image.id for image in CocoCaptions(damaged(tmp_path), "train").images] == [10, 12, 14, 15]


@pytest.mark.parametrize(("repaired", "message"), [
    ((), "empty caption: .*image id 12.*strict"),
    (("caption",), "missing picture: .*1.png"),
    (("caption", "missing"), "picture without caption: .*3.png"),
    (("caption", "missing", "without"), "unreadable picture: .*4.png cannot be read"),
])
def test_strict_refuses_by_name(tmp_path, repaired, message):
    file = damaged(tmp_path) / "annotations" / "captions_train.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    if "caption" in repaired:
        content["annotations"][4]["caption"] = "told"
    if "missing" in repaired:
        smooth(20, 10).save(tmp_path / "images" / "1.png")
    if "without" in repaired:
        content["annotations"].append({"image_id": 13, "caption": "told"})
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        CocoCaptions(tmp_path, "train", strict=True, check=True)


def test_limit_counts_usable_pictures(tmp_path):
    data = CocoCaptions(damaged(tmp_path), "train", limit=3, check=True)
    assert [image.id for image in data.images] == [10, 12, 15]
    assert [image.id for image in CocoCaptions(tmp_path, "train", limit=1).images] == [10]
    assert len(CocoCaptions(tmp_path, "train", limit=100)) == 4


def test_captions_are_one_clean_line(tmp_path):
    notes = [{"image_id": 10, "caption": "  a cat\n on\ta mat \ud800"}]
    assert CocoCaptions(layout(tmp_path, annotations=notes), "train", limit=1).pairs == [(0, "a cat on a mat")]


def test_captions_without_a_word_are_empty(tmp_path, capsys):
    """Of all of these nothing is left to train on, and measuring would refuse them."""
    captions = "...", "\u200b", "\ufeff \u0301", ' "!" ', "a cat", "7"
    notes = [{"image_id": 10, "caption": caption} for caption in captions]
    data = CocoCaptions(layout(tmp_path, images=1, content={"images": [IMAGE | {"id": 10}], "annotations": notes}),
                        "train")
    assert data.pairs == [(0, "a cat"), (0, "7")] and data.skipped == {"empty caption": 4}
    assert "skipped 4 x empty caption" in capsys.readouterr().err


def boxes_file(root, **changes):
    content = {"categories": [{"id": 3, "name": "cat"}],
               "annotations": [{"image_id": 11, "category_id": 3, "bbox": [1, 2, 3.5, 4], "iscrowd": 0},
                               {"image_id": 11, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1}]} | changes
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content), encoding="utf-8")


def test_boxes_are_read_without_crowds(tmp_path):
    boxes_file(layout(tmp_path))
    images = CocoCaptions(tmp_path, "train").images
    assert [[(box.label, box.x, box.y, box.w, box.h) for box in image.boxes] for image in images] == [
        [], [("cat", 1, 2, 3.5, 4)], []]


@pytest.mark.parametrize(("changes", "message"), [
    ({"annotations": [{"image_id": 99, "category_id": 3, "bbox": [1, 2, 3, 4]}]}, "box for image id 99"),
    ({"annotations": [{"image_id": 10, "category_id": 8, "bbox": [1, 2, 3, 4]}]}, "category 8"),
    ({"annotations": [{"image_id": 10, "category_id": 3, "bbox": [1, 2, 3]}]}, r"the box \[1, 2, 3\] for image id 10"),
    ({"annotations": [{"image_id": 10, "category_id": 3, "bbox": [1, 2, 3, 10**400]}]}, "the box .* for image id 10"),
    ({"annotations": [{"image_id": 10, "category_id": 3, "bbox": [float("nan"), 2, 3, 4]}]}, "the box .nan, 2, 3, 4."),
    ({"annotations": [{"image_id": 10, "category_id": 3, "bbox": [1, 2, 3, "4"]}]}, "the box .* for image id 10"),
    ({"annotations": [{"image_id": 10, "category_id": 3}]}, "without 'bbox'"),
    ({"images": 5}, "images = '5', which is not list"), ({"images": True}, "images = 'True', which is not list"),
    ({"categories": [{"id": 3}]}, "without 'name'"),
])
def test_bad_boxes_are_refused(tmp_path, changes, message):
    boxes_file(layout(tmp_path), **changes)
    with pytest.raises(UserError, match=f"instances_train.json.*{message}"):
        CocoCaptions(tmp_path, "train")


def test_real_photos(photos):
    data = CocoCaptions(photos, "val", strict=True, check=True)
    assert len(data) == 500 and len(data.pairs) == 2498 and not data.skipped
    assert load_image(data.images[0].path).size == (data.images[0].width, data.images[0].height) == (224, 224)


@pytest.mark.parametrize("split", ["train", "val2017"])
def test_real_coco_with_boxes(coco_mini, split):
    data = CocoCaptions(coco_mini, split, strict=True, check=True)
    assert len(data) == {"train": 80, "val2017": 79}[split] and len(data.pairs) == 5 * len(data)
    assert len({box.label for image in data.images for box in image.boxes}) > 40
    for image in data.images:
        assert load_image(image.path).size == (image.width, image.height)
        assert all(0 <= box.x and box.x + box.w <= image.width + 1 for box in image.boxes)
        assert all(0 <= box.y and box.y + box.h <= image.height + 1 for box in image.boxes)


# ---------------------------------------------------------------- frozen features


class Counting:
    """An encoder that counts the pictures it has seen and may fail at one of them."""

    def __init__(self, fail_at=None):
        self.seen, self.fail_at = 0, fail_at

    def __call__(self, images):
        if self.fail_at is not None and self.seen + len(images) > self.fail_at:
            raise KeyboardInterrupt
        self.seen += len(images)
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4)  # (b c 2 2 4 4)
        return patches.permute(0, 2, 3, 1, 4, 5).reshape(len(images), 4, 48)


SMALL = Transform(8)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(11)]
    for i, path in enumerate(paths):
        smooth(20, 10, i).save(path)
    return paths


def build(encode, paths, folder, key="weights", transform=SMALL, batch_size=4):
    return feature_cache(encode, transform, paths, folder, key, batch_size=batch_size, progress=False)


def direct(paths, transform=SMALL):
    return Counting()(torch.stack([transform(load_image(path)) for path in paths])).half().numpy()


def test_cache_equals_direct_encoding_and_is_used_again(pictures, tmp_path):
    encode = Counting()
    made = build(encode, pictures, tmp_path / "cache")
    assert isinstance(made, np.memmap) and made.dtype == np.float16 and np.array_equal(made, direct(pictures))
    again = build(Counting(fail_at=0), pictures, tmp_path / "cache")
    assert encode.seen == 11 and np.array_equal(again, made)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".npy"]
    note = json.loads(next((tmp_path / "cache").glob("*.json")).read_text(encoding="utf-8"))
    assert note["key"] == "weights" and note["done"] == 11 and note["shape"] == [11, 4, 48]


def test_a_killed_build_goes_on_where_it_stopped(pictures, tmp_path):
    killed = Counting(fail_at=9)
    with pytest.raises(KeyboardInterrupt):
        build(killed, pictures, tmp_path)
    assert killed.seen == 8 and not list(tmp_path.glob("*.npy")) and len(list(tmp_path.glob("*.npy.part"))) == 1
    rest = Counting()
    assert np.array_equal(build(rest, pictures, tmp_path, batch_size=2), direct(pictures)) and rest.seen == 3


def test_a_build_killed_between_data_and_counter_repeats_one_batch(pictures, tmp_path, monkeypatch):
    real, calls = os.replace, []

    def killed(source, target):
        calls.append(target)
        if len(calls) == 3:  # the note of done = 0, of the first batch, and now of the second
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("minblip2.data.files.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            build(Counting(), pictures, tmp_path)
    rest = Counting()
    assert np.array_equal(build(rest, pictures, tmp_path), direct(pictures)) and rest.seen == 7


def test_a_build_killed_before_the_rename_encodes_nothing_again(pictures, tmp_path):
    made = build(Counting(), pictures, tmp_path / "cache")
    file = next((tmp_path / "cache").glob("*.npy"))
    file.rename(file.with_suffix(".npy.part"))
    assert np.array_equal(build(Counting(fail_at=0), pictures, tmp_path / "cache"), made)


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "no note", "garbled note", "other key", "unfinished"])
def test_a_damaged_cache_is_built_again(pictures, tmp_path, damage):
    build(Counting(), pictures, tmp_path / "cache")
    file, note = (next((tmp_path / "cache").glob(f"*.{kind}")) for kind in ("npy", "json"))
    content, output = file.read_bytes(), json.loads(note.read_text(encoding="utf-8"))
    match damage:
        case "cut":
            file.write_bytes(content[:-100])
        case "longer":
            file.write_bytes(content + b"\0\0")
        case "empty":
            file.write_bytes(b"")
        case "no note":
            note.unlink()
        case "garbled note":
            note.write_text("{", encoding="utf-8")
        case "other key":
            note.write_text(json.dumps(output | {"key": "others"}), encoding="utf-8")
        case "unfinished":
            note.write_text(json.dumps(output | {"done": 5}), encoding="utf-8")
    encode = Counting()
    assert np.array_equal(build(encode, pictures, tmp_path / "cache"), direct(pictures)) and encode.seen == 11


def test_a_rebuild_killed_at_once_does_not_trust_the_old_note(pictures, tmp_path, monkeypatch):
    build(Counting(), pictures, tmp_path / "cache")
    file = next((tmp_path / "cache").glob("*.npy"))
    file.write_bytes(file.read_bytes()[:-2])
    real = np.lib.format.open_memmap

    def killed(*arguments):
        real(*arguments)  # the new file is there, of full length and full of zeros
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "open_memmap", killed)
        with pytest.raises(KeyboardInterrupt):
            build(Counting(), pictures, tmp_path / "cache")
    assert np.array_equal(build(Counting(), pictures, tmp_path / "cache"), direct(pictures))


@pytest.mark.parametrize("change", ["weights", "transform", "fewer", "order", "touched", "resized"])
def test_a_changed_question_is_answered_anew(pictures, tmp_path, change):
    build(Counting(), pictures, tmp_path / "cache")
    paths, key, transform = list(pictures), "weights", SMALL
    match change:
        case "weights":
            key = "other weights"
        case "transform":
            transform = replace(SMALL, mean=(0.0, 0.0, 0.0))
        case "fewer":
            paths = paths[:10]
        case "order":
            paths = paths[::-1]
        case "touched":
            os.utime(paths[3], (1, 1))
        case "resized":
            stat = paths[3].stat()
            noise(20, 10, 77).save(paths[3])
            os.utime(paths[3], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    encode = Counting()
    made = build(encode, paths, tmp_path / "cache", key, transform)
    assert encode.seen == len(paths) and np.array_equal(made, direct(paths, transform))


def test_cache_may_move_with_its_pictures(pictures, tmp_path):
    build(Counting(), pictures, tmp_path / "cache")
    (tmp_path / "pictures").rename(tmp_path / "moved")
    build(Counting(fail_at=0), [tmp_path / "moved" / path.name for path in pictures], tmp_path / "cache")


def test_cache_refuses(pictures, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    with pytest.raises(UserError, match="list of paths is empty"):
        build(Counting(), [], folder)
    with pytest.raises(UserError, match="absent.png cannot be read"):
        build(Counting(), [*pictures, tmp_path / "absent.png"], folder)
    with pytest.raises(UserError, match=r"encoder made \(4, 192\) of 4 images"):
        build(lambda images: images.flatten(1), pictures, folder)
    with pytest.raises(UserError, match="float16 cannot hold between .*0.png and .*3.png"):
        build(lambda images: images.flatten(2) * 1e6, pictures, folder)
    with monkeypatch.context() as patch:
        patch.setattr("minblip2.data.features.shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
        with pytest.raises(UserError, match="features need 4.2e.03 bytes .* but 1.0e.02 are free"):
            build(Counting(), pictures, folder)
    with monkeypatch.context() as patch:
        patch.setattr("minblip2.data.features.os.posix_fallocate",
                      lambda *_: (_ for _ in ()).throw(OSError(28, "full")), raising=False)
        with pytest.raises(UserError, match="features cannot be kept in .*full"):
            build(Counting(), pictures, folder)
    pictures[7].write_bytes(b"")
    with pytest.raises(UserError, match="7.png cannot be read"):
        build(Counting(), pictures, folder)
    assert not list(folder.glob("*.npy"))


def test_cache_with_a_real_encoder(parts, coco_mini, tmp_path):
    from minblip2.weights.pretrained import load_vit

    vit = load_vit(parts / "dinov2-small").eval()
    transform = Transform.from_folder(parts / "dinov2-small")
    paths = [image.path for image in CocoCaptions(coco_mini, "val", limit=4).images]
    made = feature_cache(vit, transform, paths, tmp_path, weights_checksum(vit), batch_size=2, progress=False)
    with torch.no_grad():
        expected = torch.cat([vit(transform(load_image(path))[None]) for path in paths])
    assert made.shape == (4, 257, 384)
    torch.testing.assert_close(torch.from_numpy(np.array(made)).float(), expected, atol=5e-3, rtol=2e-3)


def test_checksum_sees_every_change():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    first = weights_checksum(model)
    assert weights_checksum(model) == first and len(first) == 64
    model(torch.randn(5, 3))  # running statistics are state
    second = weights_checksum(model)
    with torch.no_grad():
        model[0].weight.view(-1)[11] = torch.nextafter(model[0].weight.view(-1)[11], torch.tensor(9.0))
    third = weights_checksum(model)
    assert len({first, second, third, weights_checksum(model.bfloat16())}) == 4
    assert weights_checksum(torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2, bias=False)})) != first


# ---------------------------------------------------------------- batches


def pairs(images=40, each=5, shuffle=1, tokens=2, views=1, keep=None):
    """Batches over random captions, in which the first token id tells the pair and features tell picture and view."""
    random = np.random.default_rng(0)
    ids = [[1000 + i, *random.integers(5, 50, random.integers(3, 30)).tolist()] for i in range(images * each)]
    rows = [i // each for i in range(images * each)]
    features = np.arange(images * tokens * 3, dtype=np.float32).reshape(images, tokens, 3)
    return PairBatches([features + view / 4 for view in range(views)], rows, ids, [500 + i for i in range(images)],
                       batch_size=8, seed=shuffle, pad_id=0, keep_tokens=keep), ids


def test_an_epoch_visits_every_pair_once():
    batches, ids = pairs()
    assert len(batches) == 25
    for epoch in range(2):
        seen = []
        for step in range(epoch * 25, epoch * 25 + 25):
            batch = batches.batch(step)
            for row in range(8):
                pair = int(batch.text_ids[row, 0]) - 1000
                seen.append(pair)
                assert batch.text_ids[row, batch.text_mask[row]].tolist() == ids[pair]
                assert (batch.text_ids[row, ~batch.text_mask[row]] == 0).all()
                assert batch.image_ids[row] == 500 + pair // 5
                assert batch.image_features[row].flatten().tolist() == list(range(pair // 5 * 6, pair // 5 * 6 + 6))
            assert batch.text_mask.any(dim=0).all(), "a column of nothing but padding"
        assert sorted(seen) == list(range(200))


def test_the_remainder_is_dropped_and_differs_by_epoch():
    batches, _ = pairs(images=41, each=5)  # 205 = 25 * 8 + 5
    left = []
    for epoch in range(3):
        seen = [int(i) for step in range(25) for i in batches.batch(25 * epoch + step).text_ids[:, 0]]
        assert len(seen) == len(set(seen)) == 200
        left.append(frozenset(range(1000, 1205)) - frozenset(seen))
    assert len(set(left)) == 3


def test_types_and_device():
    batch = pairs()[0].batch(3)
    assert batch.image_features.dtype == torch.float32 and batch.text_mask.dtype == torch.bool
    assert batch.text_ids.dtype == batch.image_ids.dtype == torch.long
    moved = batch.to("meta")
    assert isinstance(moved, Batch) and {moved.image_features.device.type, moved.text_ids.device.type,
                                         moved.text_mask.device.type, moved.image_ids.device.type} == {"meta"}


def test_a_pair_draws_one_of_the_views():
    batches, _ = pairs(views=3)
    drawn = torch.cat([batches.batch(step).image_features for step in range(25)])
    views = drawn[:, 0, 0] % 1 * 4
    assert torch.equal(drawn % 1, views[:, None, None].expand_as(drawn) / 4), "a picture made of several views"
    counts = views.long().bincount(minlength=3)
    assert counts.sum() == 200 and counts.min() > 40  # 66.7 expected, standard deviation 6.7
    assert torch.equal(pairs(views=3)[0].batch(7).image_features, batches.batch(7).image_features)


def test_kept_tokens_hold_the_first_and_change():
    whole, _ = pairs(tokens=9)
    kept, _ = pairs(tokens=9, keep=4)
    seen = set()
    for step in range(25):
        image = kept.batch(step).image_features
        place = (image[:, :, 0] - whole.batch(step).image_features[:, :1, 0]) / 3  # which token each one was
        assert image.shape == (8, 4, 3) and (place == place[:1]).all() and place[0, 0] == 0
        assert (place[0].diff() > 0).all() and place[0, -1] < 9
        seen.add(tuple(place[0].tolist()))
    assert len(seen) > 10 and {token for places in seen for token in places} == set(range(9))
    assert torch.equal(pairs(tokens=9, keep=9)[0].batch(3).image_features, whole.batch(3).image_features)
    assert pairs(tokens=9, keep=1)[0].batch(3).image_features.shape == (8, 1, 3)


def same(first, second):
    return all(torch.equal(getattr(first, name), getattr(second, name))
               for name in ("image_features", "text_ids", "text_mask", "image_ids"))


def test_a_batch_depends_on_seed_and_step_only():
    batches, _ = pairs()
    np.random.seed(3), torch.manual_seed(4)
    forwards = [batches.batch(step) for step in range(60)]
    np.random.seed(5), torch.manual_seed(6)
    other, _ = pairs()
    assert all(same(other.batch(step), forwards[step]) for step in reversed(range(60)))
    assert not same(forwards[0], forwards[25]), "two epochs in the same order"
    assert not same(pairs(shuffle=2)[0].batch(0), forwards[0]), "two seeds in the same order"


def test_iterate_goes_on_from_any_step():
    batches, _ = pairs()
    for step, batch in zip(range(23, 55), batches.iterate(23), strict=False):
        assert same(batch, pairs()[0].batch(step))


def test_iterate_hands_on_errors():
    batches, _ = pairs()
    batches.views = None
    with pytest.raises(TypeError):
        next(batches.iterate())


def test_batches_by_length_halve_the_padding():
    batches, ids = pairs(images=400)
    padded = sum(batches.batch(step).text_ids.numel() for step in range(len(batches)))
    lengths = np.random.default_rng(0).permutation([len(text) for text in ids])
    unsorted = sum(8 * chunk.max() for chunk in lengths.reshape(-1, 8))
    words = lengths.sum()
    assert padded - words < 0.25 * (unsorted - words), (padded, unsorted, words)
    longest = [batches.batch(step).text_ids.shape[1] for step in range(len(batches))]
    place_in_window = np.arange(len(longest)) % 16
    assert abs(np.corrcoef(longest, place_in_window)[0, 1]) < 0.3, "batches must not come in the order of length"


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(2, 6), st.integers(0, 5))
def test_no_batch_has_one_picture_only(rows, batch_size, epoch):
    """Either the data cannot give it, by counting, or every batch has two pictures, whatever the shuffle."""
    ids = [[i + 1] * (1 + i % 3) for i in range(len(rows))]
    most = max(rows.count(row) for row in rows)
    fits = len(rows) >= batch_size and len(rows) - most >= len(rows) // batch_size
    try:
        batches = PairBatches([np.zeros((5, 1, 1))], rows, ids, range(5), batch_size, seed=0, pad_id=0)
    except UserError:
        assert not fits
        return
    assert fits
    seen = []
    for step in range(epoch * len(batches), (epoch + 1) * len(batches)):
        batch = batches.batch(step)
        assert len(batch.image_ids.unique()) > 1
        seen += batch.text_ids[:, 0].tolist()
    assert len(seen) == len(set(seen)) == len(rows) // batch_size * batch_size


def test_the_same_picture_twice_counts_as_one():
    with pytest.raises(UserError, match="one picture has 4 of the 4 pairs"):
        PairBatches([np.zeros((2, 1, 1))], [0, 0, 1, 1], [[1]] * 4, [7, 7], 2, seed=0, pad_id=0)


@pytest.mark.parametrize(("changes", "message"), [
    ({"batch_size": 1}, "batch size is 1 for 4 pairs"),
    ({"batch_size": 5}, "batch size is 5 for 4 pairs"),
    ({"pairs_image": [0, 1, 2]}, "3 picture rows for 4 captions"),
    ({"image_ids": [1]}, r"\[3\] features for 1 image ids"),
    ({"views": []}, r"\[\] features for 3 image ids"),
    ({"views": [np.zeros((3, 4, 1)), np.zeros((2, 4, 1))]}, r"\[2, 3\] features for 3 image ids"),
    ({"keep_tokens": 0}, "keep_tokens is 0 of 4 visual tokens"),
    ({"keep_tokens": 5}, "keep_tokens is 5 of 4 visual tokens"),
    ({"pairs_image": [0, 1, 2, 3]}, r"outside 0..2"),
    ({"pairs_image": [0, 1, 2, -1]}, r"outside 0..2"),
    ({"pairs_ids": [[1], [1], [], [1]]}, "no tokens"),
    ({"pairs_image": [0, 0, 0, 0]}, "one picture has 4 of the 4 pairs, too many for 2 batches of 2"),
    ({"pairs_image": [0, 0, 0, 1]}, "one picture has 3 of the 4 pairs"),
])
def test_impossible_batches_are_refused(changes, message):
    good = {"views": [np.zeros((3, 4, 1))], "pairs_image": [0, 0, 1, 2], "pairs_ids": [[1]] * 4,
            "image_ids": [7, 8, 9], "batch_size": 2, "seed": 0, "pad_id": 0}
    assert len(PairBatches(**good)) == 2
    with pytest.raises(UserError, match=message):
        PairBatches(**good | changes)


def test_real_captions_make_batches(photos):
    data = CocoCaptions(photos, "val")
    ids = [[ord(letter) for letter in caption] for caption in data.texts]
    batches = PairBatches([np.zeros((len(data), 2, 3), np.float16)], data.rows, ids,
                          [image.id for image in data.images], 64, seed=0, pad_id=0)
    share = np.mean([batches.batch(step).text_mask.float().mean() for step in range(len(batches))])
    assert len(batches) == 39 and share > 0.9
    assert list(itertools.islice((len(batch.image_ids) for batch in batches.iterate()), 3)) == [64] * 3
