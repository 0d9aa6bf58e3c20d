"""What the commands do with many pictures, with options that have no effect, and with runs that have moved."""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from minblip2 import UserError, __main__
from minblip2.commands import rules
from minblip2.commands.caption import Table, find_pictures
from minblip2.commands.options import LARGEST_SEED
from minblip2.commands.retrieve import short_paths
from minblip2.course import figures
from minblip2.data.batches import PairBatches
from minblip2.data.coco import CocoCaptions
from minblip2.data.entry import run_command
from minblip2.data.scene_dataset import write_scenes
from minblip2.data.transforms import Transform
from minblip2.training import records
from minblip2.training.bridge import train_bridge
from minblip2.training.checks import foreign_group
from minblip2.training.distributed import env_rank_and_size
from minblip2.training.experts import SceneImages
from minblip2.training.loop import train
from minblip2.training.recipes import LAPTOP, SCENES
from minblip2.training.records import read_record, recorded_data, recorded_parts, with_batch_size, write_record
from minblip2.training.shipping import SHIPPED

from . import tiny_training
from .pictures import smooth

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ("red", "blue", "green")


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Run the command line in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["minblip2", *map(str, words)])
        code = __main__.main()
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def drawings(tmp_path):
    """A folder with a drawing of each colour and one in a folder below, and what else may lie there."""
    folder = tmp_path / "drawings"
    (folder / "more").mkdir(parents=True)
    (folder / ".thumbnails").mkdir()
    for i, colour in enumerate((*COLOURS, "yellow")):
        drawing = Image.new("RGB", (64, 64), "black")
        ImageDraw.Draw(drawing).ellipse((24, 24, 40, 40), fill=colour)
        drawing.save(folder / ("more" if i == 3 else "") / f"{colour}.png")
    drawing.save(folder / ".thumbnails" / "a.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


# --- options ----------------------------------------------------------------------------------------------------------


def options_of(parser):
    """Command -> what its options are called, as a rule calls them."""
    subs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
    return {name: {option.lstrip("-").replace("-", "_") for action in sub._actions for option in action.option_strings}
            for name, sub in subs.items()}


def test_rules_speak_of_options_that_there_are():
    there = options_of(__main__.parser())
    for command, some in rules.RULES.items():
        assert some and {name for rule in some for name in (rule.option, rule.other)} <= there[command], command


@pytest.mark.parametrize("words", [
    ("caption", "--stage1", "--prompt", "a", "x.png"), ("caption", "--stage1", "--model", "m", "x.png"),
    ("caption", "--model", "m", "--run", "r", "x.png"), ("caption", "--top-p", "0.9", "--beams", "5", "x.png"),
    ("caption", "--seed", "0", "x.png"), ("caption", "--parts", "p", "--model", "m", "x.png"),
    ("ask", "--model", "m", "--run", "r", "x.png", "?"), ("attend", "--model", "m", "--run", "r", "x.png", "a"),
    ("retrieve", "--model", "m", "--run", "r", "--data", "d", "a"), ("evaluate", "--model", "m", "--parts", "p"),
    ("train", "--prompt", ""), ("train", "--steps", "3"), ("train", "--learning-rate", "1e-5"),
    ("train", "--train-split", "train"), ("train", "--from", "m", "--recipe", "scenes"),
    ("train", "--from", "m", "--parts", "p"), ("train", "--resume", "--restart")], ids=" ".join)
def test_an_option_without_effect_is_refused_even_at_its_default(cli, words):
    code, out, err = cli(*words)
    assert code == 2 and out == "" and err.count("\n") == 1 and " effect " in err
    first, second = re.findall(r"--[\w-]+", err)[:2]
    assert {first, second} & {word for word in words if word.startswith("--")}


@pytest.mark.parametrize("words", [("train", "--from", "m", "--dry-run"), ("evaluate",), ("retrieve", "a star")],
                         ids=" ".join)
def test_data_that_are_not_there_are_said_to_be_missing(cli, words):
    code, out, err = cli(*words, "--data", "mine.csv")
    assert (code, out) == (2, "") and err.startswith("minblip2: mine.csv does not exist: ") and err.count("\n") == 1


def test_a_download_refuses_them_too(capsys):
    import download

    assert download.main(["coco", "--verify", "--images", "3"]) == 2
    assert "--images has no effect beside --verify" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "1.5", str(2**32), str(2**64), "x"])
def test_a_seed_out_of_range_is_refused(seed, cli, capsys):
    for words in (("train",), ("caption", "--top-p", "0.9", "x.png")):
        with pytest.raises(SystemExit, match="2"):
            cli(*words, "--seed", seed)
        assert "is no seed: give a whole number from 0 to 4294967295" in capsys.readouterr().err or seed == "-1"


def test_the_largest_seed_trains(tmp_path):
    config = replace(tiny_training.CONFIG, steps=3, warmup=1, seed=LARGEST_SEED)
    log = train(tiny_training.Toy(), tiny_training.toy_losses, tiny_training.Numbers(), config, tmp_path)
    assert len(log) == 3
    PairBatches([np.zeros((4, 2, 3), np.float16)], range(4), [[1, 2]] * 4, range(4), 2, LARGEST_SEED, 0).batch(5)
    next(SceneImages(2, LARGEST_SEED, scenes=2).iterate())


# --- texts ------------------------------------------------------------------------------------------------------------


def test_what_is_not_read_of_a_text_is_told(cli, drawings):
    picture, long = drawings / "red.png", "a red circle " * 12
    code, _, err = cli("attend", picture, long, "--to", "a.png")
    assert code == 0 and err.count("\n") == 1 and "longer than the 32 ids that are read of it" in err
    code, _, err = cli("caption", picture, "--prompt", "a photo of")
    assert code == 0 and "unknown words, read as one and the same: photo\n" in err
    code, _, err = cli("ask", picture, "is it a zebra")
    assert code == 0 and "zebra" in err
    code, _, err = cli("attend", picture, "", "--to", "b.png")
    assert code == 2 and "holds no word" in err and not Path("b.png").exists()


def test_a_prompt_beyond_the_positions_is_a_sentence(cli, drawings):
    picture = drawings / "red.png"
    for words, said in ((("--prompt", "red " * 218), "has 256 positions, but 16 queries, 219 ids"),
                        (("--max-length", "248"), "has 256 positions"),
                        (("--stage1", "--max-length", "33"), "positions for 32 ids, not for 33")):
        code, out, err = cli("caption", picture, *words)
        assert code == 2 and out == "" and said in err and err.count("\n") == 1, words
    assert cli("caption", picture, "--max-length", "110")[0] == 0
    assert cli("caption", picture, "--stage1", "--max-length", "32")[0] == 0


# --- captions of many -------------------------------------------------------------------------------------------------


def test_folders_and_patterns_are_pictures(drawings):
    names = [path.relative_to(drawings).as_posix() for path in find_pictures([str(drawings)])]
    assert names == ["blue.png", "green.png", "more/yellow.png", "red.png"]
    assert find_pictures([str(drawings / "*r*.png"), str(drawings / "red.png")]) == [
        drawings / "green.png", drawings / "red.png"]
    assert len(find_pictures([str(drawings / "**" / "*.png")])) == 4
    (drawings / "a[1].png").touch()
    assert find_pictures([str(drawings / "a[1].png")]) == [drawings / "a[1].png"], "a name that is there is no pattern"
    (drawings.parent / "empty").mkdir()
    for name, said in ((drawings / "*.gif", "nothing is called like"), (drawings.parent / "empty", "no pictures")):
        with pytest.raises(UserError, match=said):
            find_pictures([str(name)])


def test_one_broken_picture_of_many_is_named_and_the_rest_is_captioned(cli, drawings):
    (drawings / "bad.png").write_bytes(b"no picture")
    alone = {colour: cli("caption", drawings / f"{colour}.png")[1].split(": ")[1] for colour in COLOURS}
    code, out, err = cli("caption", drawings, "absent.png")
    assert code == 1 and len(out.splitlines()) == 4
    for colour in COLOURS:
        assert f"{drawings / f'{colour}.png'}: {alone[colour]}" in out, "each picture has its own caption"
    assert "bad.png cannot be read" in err and "absent.png cannot be read" in err
    assert err.endswith("minblip2: 2 of 6 pictures could not be read\n")
    code, out, err = cli("caption", drawings / "bad.png", "absent.png")
    assert code == 2 and out == "" and "none of the 2 pictures could be read" in err


@pytest.mark.parametrize("option", ["--csv", "--jsonl"])
def test_a_table_grows_and_goes_on(cli, drawings, option):
    def rows(path):
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file)) if option == "--csv" else list(map(json.loads, file))

    table, whole = Path("out", "captions.txt"), Path("whole.txt")
    assert cli("caption", drawings, option, whole)[0] == 0
    expected = rows(whole)
    assert [row["file_name"] for row in expected] == [str(path) for path in find_pictures([str(drawings)])]
    assert all(f"{Path(row['file_name']).stem} circle" in row["caption"] for row in expected)
    assert cli("caption", drawings / "blue.png", option, table)[0] == 0
    with open(table, "ab") as file:
        file.write(b'{"file_name": "x' if option == "--jsonl" else b'"x.png","a re')  # a kill has cut this line
    code, out, err = cli("caption", drawings, option, table)
    assert code == 0 and out.count("\n") == 3 and "holds 1 of these 4 pictures already" in err
    assert rows(table) == expected
    code, out, _ = cli("caption", drawings, option, table)
    assert code == 0 and out == "" and rows(table) == expected
    for content in ("a,b\n1,2\n", '{"a": 1}\n', "[1]\n", "file_name,caption\n1,2,3\n", '{"images": [1]}', "my notes",
                    '{"file_name": ["a"], "caption": "b"}\n'):
        table.write_text(content)
        code, out, err = cli("caption", drawings, option, table)
        assert code == 2 and out == "" and "name another file" in err and table.read_text() == content, content
    shutil.copy(drawings / "blue.png", "a\u2028b.png")  # what cuts a text into lines elsewhere is no end of a line here
    for _ in range(2):
        assert cli("caption", "a\u2028b.png", option, "other.txt")[0] == 0
    assert [row["file_name"] for row in rows("other.txt")] == ["a\u2028b.png"]
    code, _, err = cli("caption", drawings, option, "/dev/null")
    assert code == 2 and "no regular file" in err


def test_a_table_of_captions_can_be_trained_on(cli, drawings, monkeypatch):
    monkeypatch.chdir(drawings)
    assert cli("caption", "red.png", "more", "--csv", "captions.csv")[0] == 0
    assert [image.path.name for image in CocoCaptions(drawings, "train").images] == ["red.png", "yellow.png"]


def test_names_of_any_kind_survive_the_table(tmp_path):
    names = ['a,"b".png', "zwei\nZeilen.png", "ü.png"]
    for lines in (False, True):
        path = tmp_path / f"{lines}.txt"
        table = Table(path, lines)
        for name in names:
            table.add(Path(name), "x")
        assert Table(path, lines).known == set(names)


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    """All at once, these would be 430 MB."""
    for i in range(12):
        smooth(400, 300, seed=i).resize((4000, 3000)).save(tmp_path / f"{i}.jpg", quality=50)
    code = ("import resource, sys\nfrom minblip2.__main__ import main\nassert main() == 0\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)")

    def peak(*names):
        done = subprocess.run([sys.executable, "-c", code, "caption", *names], cwd=tmp_path, capture_output=True,
                              text=True, encoding="utf-8", env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
        return int(done.stderr.split()[-1]) / 1024

    one, many = peak("0.jpg"), peak(".")
    assert many - one < 200, f"{one:.0f} MB for one picture, {many:.0f} MB for 12"


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_a_map_says_whether_its_text_matches_and_squashes_nothing(cli, drawings, monkeypatch):
    seen = {}
    draw = figures.attention_maps

    def watched(image, maps, **more):
        seen.update(size=image.size, figure=draw(image, maps, **more))
        return seen["figure"]

    monkeypatch.setattr(figures, "attention_maps", watched)
    wide = Image.new("RGB", (192, 64), "black")
    wide.paste(Image.open(drawings / "red.png"), (64, 0))
    wide.save("wide.png")
    code, out, _ = cli("attend", "wide.png", "a red circle", "a blue star")
    told = dict(re.findall(r"^(a \w+ \w+) +matches to (\d+)%$", out, re.MULTILINE))
    assert code == 0 and list(told) == ["a red circle", "a blue star"] and int(told["a blue star"]) < 5
    assert seen["size"] == (192, 64), "the picture keeps its proportions"
    for panel, (text, percent) in zip(seen["figure"].axes[1:], told.items(), strict=True):
        assert panel.get_title(loc="left").startswith(f"{text}\nmatches to {percent}%, maximum ")
    Image.new("RGB", (5000, 100)).save("long.png")
    assert cli("attend", "long.png", "a red circle")[0] == 0 and seen["size"] == (800, 16), "its own figure may go"
    before = Path("long.png").read_bytes()
    code, _, err = cli("attend", "wide.png", "a red circle", "--to", "long.png")
    assert code == 2 and "not marked as a figure" in err and Path("long.png").read_bytes() == before


def test_the_part_that_is_seen_keeps_its_proportions():
    picture = smooth(300, 100)
    assert Transform(64).part_seen(picture).size == (300, 100)
    cut = Transform(224, mode="crop", resize_to=256)
    part = cut.part_seen(picture)
    assert part.size == (88, 88) or part.size == (87, 87)
    assert np.abs(np.asarray(part.resize((224, 224), Image.Resampling.BICUBIC), dtype=float)
                  - np.asarray(cut.crop_and_resize(picture), dtype=float)).mean() < 3


def test_what_is_found_fits_80_columns_and_is_told_in_percent(cli, tmp_path):
    deep = tmp_path / "a_folder_with_a_long_name" / "and_another_one_below_it" / "scenes"
    write_scenes(deep, train=4, val=12, test=4, progress=False)
    code, out, err = cli("retrieve", "a red circle", "--data", deep, "--show", 4)
    assert code == 0 and max(map(len, out.splitlines()[:-1])) <= 80
    shown = re.findall(r"^ +(\d+)%  +(-?\d\.\d+)  (\S+\.png)$", out, re.MULTILINE)
    assert len(shown) == 4 and all((deep / path).is_file() and 0 <= int(percent) <= 100 for percent, _, path in shown)
    code, out, err = cli("retrieve", "a red circle", "--data", deep, "--show", 4, "--top", 2)
    assert code == 0 and out.count(".png") == 2 and "no more than --top, which is 2" in err


def test_a_path_is_told_from_where_we_are_or_from_the_data(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    data, inside = tmp_path / "data", Path("data", "images", "1.png")
    assert short_paths([data / "images" / "1.png", data / "2.png"], data) == [str(Path("images", "1.png")), "2.png"]
    assert short_paths([inside, Path("a.png")], Path("data")) == [str(inside), "a.png"]
    long = Path("data", 70 * "x", "1.png")
    assert short_paths([long], Path("data")) == [str(long.relative_to("data"))]
    assert short_paths([tmp_path / "a.png"], data) == [str(tmp_path / "a.png")]


# --- runs that moved --------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path):
    """A run of the laptop recipe that is recorded, its data and its parts, all below one folder."""
    for name in ("runs/one", "data", "parts"):
        (tmp_path / "was" / name).mkdir(parents=True)
    write_record(tmp_path / "was" / "runs" / "one", LAPTOP.with_seed(3), tmp_path / "was" / "data",
                 tmp_path / "was" / "parts")
    return tmp_path


def test_a_run_finds_its_data_when_all_move_together(recorded):
    shutil.move(recorded / "was", recorded / "is")
    run = recorded / "is" / "runs" / "one"
    assert recorded_data(run) == recorded / "is" / "data"
    assert recorded_parts(read_record(run)) == recorded / "is" / "parts"
    assert read_record(run).recipe == LAPTOP.with_seed(3) and not read_record(run).skip_broken


def test_a_run_finds_its_data_when_it_moves_alone(recorded):
    shutil.move(recorded / "was" / "runs" / "one", recorded / "one")
    assert recorded_data(recorded / "one") == recorded / "was" / "data"
    assert recorded_parts(read_record(recorded / "one")) == recorded / "was" / "parts"


def test_a_run_that_is_reached_through_a_link_finds_its_data(recorded):
    shutil.move(recorded / "was", recorded / "is")
    (recorded / "elsewhere").mkdir()
    linked = recorded / "elsewhere" / "one"
    try:
        linked.symlink_to(recorded / "is" / "runs" / "one")
    except OSError:
        pytest.skip("this system makes no links")
    assert recorded_data(linked) == recorded / "is" / "data"


def test_what_is_not_there_any_more_is_told_with_its_option(recorded, cli, monkeypatch):
    shutil.rmtree(recorded / "was" / "data")
    shutil.rmtree(recorded / "was" / "parts")
    run = recorded / "was" / "runs" / "one"
    with pytest.raises(UserError, match=r"not in .*data any more: name their folder with --data"):
        recorded_data(run)
    monkeypatch.setattr(records, "FETCHED_PARTS", recorded / "nowhere")
    for words in (("caption", "--run", run, "x.png"), ("evaluate", "--run", run), ("export", run, "new")):
        code, _, err = cli(*words)
        assert code == 2 and "parts any more: name their folder with --parts" in err and err.count("\n") == 1, words
        code, _, err = cli(*words, "--parts", recorded)
        assert code == 2 and f"{recorded / 'dinov2-small'} does not exist" in err, words


def test_what_a_fork_has_changed_of_a_recipe_is_read_again(tmp_path):
    mine = replace(LAPTOP, prompt="a photo of", models=LAPTOP.models | {"lm": "another"},
                   qformer=LAPTOP.qformer | {"num_queries": 16})
    records.write_record(tmp_path, mine, tmp_path, None)
    assert records.read_record(tmp_path).recipe == mine
    with pytest.raises(UserError, match="there is no recipe 'mine'"):
        train_bridge(replace(mine, name="mine"), tmp_path, None, tmp_path / "run")


def test_the_scenes_take_no_parts(cli, drawings):
    code, _, err = cli("caption", "--parts", drawings, drawings / "red.png")
    assert code == 2 and "the recipe scenes trains its frozen models itself: leave --parts out" in err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"recipe": 3}', '{"recipe": "scenes", "seed": "x"}',
                                     '{"recipe": "scenes", "seed": 0, "data": 7}', '{"recipe": "cloud", "seed": 0}',
                                     '{"recipe": "scenes", "seed": 0, "batch_size": null}'])
def test_a_damaged_record_is_a_sentence(content, cli, drawings, tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(content)
    for words in (("caption", "--run", "run", drawings / "red.png"), ("evaluate", "--run", "run"),
                  ("export", "run", "new")):
        code, _, err = cli(*words)
        assert code == 2 and err.count("\n") == 1 and ("run.json" in err or "no recipe 'cloud'" in err), words


def test_a_batch_size_of_ones_own_is_kept(tmp_path):
    for size in (64, 32, 8):
        recipe = with_batch_size(LAPTOP, size)
        write_record(tmp_path, recipe, tmp_path, None)
        assert read_record(tmp_path).recipe == recipe
    write_record(tmp_path, with_batch_size(SCENES, None), tmp_path, None, skip_broken=True)
    assert read_record(tmp_path).recipe == SCENES and read_record(tmp_path).skip_broken
    assert "batch_size" not in json.loads((tmp_path / "run.json").read_text())


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, alone", [("2", True), ("x", True), ("1", False), ("", False), (None, False)])
def test_only_torchrun_starts_a_group(monkeypatch, size, alone):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert env_rank_and_size() == (0, 1) and bool(foreign_group()) == alone
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert foreign_group() is None
    if size and size.isdecimal():
        assert env_rank_and_size() == (1, int(size))


def test_a_world_size_that_is_left_over_hangs_nothing(cli, monkeypatch):
    for name, value in dict(WORLD_SIZE="2", RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29577").items():
        monkeypatch.setenv(name, value)
    code, _, err = cli("train", "--recipe", "desktop")
    assert code == 2 and "WORLD_SIZE=2 is in the environment, but torchrun has not started" in err
    assert "no recipe 'desktop'" in err and err.count("\n") == 2


def test_a_closed_output_is_no_fault(monkeypatch, capsys):
    """`>&-` in a shell: Python has no standard output then, and what is printed goes nowhere."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "__stdout__", None)
    assert run_command("minblip2", lambda: print("a caption")) == 0

    def full():
        raise OSError(28, "No space left on device", "captions.csv")

    assert run_command("minblip2", full) == 2
    assert capsys.readouterr().err == "minblip2: captions.csv: No space left on device\n"


# --- figures ----------------------------------------------------------------------------------------------------------


def test_what_was_measured_is_printed_where_it_cannot_be_written(cli, tmp_path, monkeypatch):
    from minblip2.commands import evaluate

    shutil.copytree(SHIPPED, tmp_path / "run")
    monkeypatch.setattr(evaluate, "measure_run", lambda *rest: {"images": 7, "itc_i2t_r1": 12.5})

    def full(*rest):
        raise OSError(28, "No space left on device", "results-val.json")

    monkeypatch.setattr("minblip2.evaluation.measure.write_json", full)
    code, out, err = cli("evaluate", "--run", "run")
    assert code == 2 and "pictures" in out and "12.5" in out and err == (
        "minblip2: results-val.json: No space left on device\n")


def test_other_data_has_figures_of_its_own(cli, tmp_path, monkeypatch):
    from minblip2.commands import evaluate

    shutil.copytree(SHIPPED, tmp_path / "run")
    (tmp_path / "mine").mkdir()
    asked = []
    monkeypatch.setattr(evaluate, "measure_run", lambda *rest: asked.append(rest) or {"images": 7})
    assert cli("evaluate", "--run", "run", "--data", tmp_path / "mine")[0] == 0
    assert asked[0][-1] == tmp_path / "mine" and json.loads(
        (tmp_path / "run" / "results-val-of-mine.json").read_text()) == {"images": 7}
