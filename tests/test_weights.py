"""data/download.py weights against a model hub on loopback: only the files we read, of one revision, as published."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest

import weights
from minblip2 import UserError
from minblip2.weights.hub import MODELS, RECIPE_MODELS, find_models

from .coco_server import CocoServer

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = {"config.json": b'{"model_type": "dinov2"}', "preprocessor_config.json": b"{}", "README.md": b"hello",
              "model.safetensors": bytes(range(256)) * 300, "pytorch_model.bin": b"pickle", "tf_model.h5": b"other",
              "onnx/model.onnx": b"other", ".gitattributes": b""}


def serve(server, model, content):
    """Put a repository at its pinned revision onto the server."""
    siblings = []
    for name, body in content.items():
        path, sha256 = f"/{model.repository}/resolve/{model.revision}/{name}", hashlib.sha256(body).hexdigest()
        large = name.endswith((".safetensors", ".bin"))
        siblings.append({"rfilename": name, "size": len(body), "blobId": hashlib.sha1(body).hexdigest()}
                        | ({"lfs": {"sha256": sha256, "size": len(body), "pointerSize": 100}} if large else {}))
        server.files[path] = body
        server.headers[path] = {"ETag": f'"{sha256}"', "X-Repo-Commit": model.revision}
    server.files[f"/api/models/{model.repository}/revision/{model.revision}"] = json.dumps(
        {"id": model.repository, "sha": model.revision, "siblings": siblings}).encode()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with DINOv2-small, and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # loopback is no network
    with CocoServer({}) as server:
        serve(server, MODELS["dinov2-small"], REPOSITORY)
        yield server


def fetch(hub, out, name="dinov2-small", **options):
    weights.download([name], out, endpoint=hub.url, **{"yes": True} | options)


def test_only_what_is_read_arrives_and_sizes_are_told_before(hub, tmp_path, capsys):
    asked = []

    def ask(question):
        asked.append((question, capsys.readouterr().out, sum("/resolve/" in path for path in hub.asked)))
        return "y"

    fetch(hub, tmp_path / "parts", yes=False, ask=ask)
    ((question, output, fetched),) = asked
    assert question == "Fetch them? [y/N] " and output == "facebook/dinov2-small: 0.00 GB, licence: Apache 2.0\n"
    assert fetched == 0
    folder = tmp_path / "parts" / "dinov2-small"
    assert {path.name for path in folder.iterdir()} == {"config.json", "preprocessor_config.json", "model.safetensors",
                                                        "source.json"}
    assert (folder / "model.safetensors").read_bytes() == REPOSITORY["model.safetensors"]
    source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    assert source["revision"] == MODELS["dinov2-small"].revision and len(source["files"]) == 3
    assert source["files"][1]["sha256"] == hashlib.sha256(REPOSITORY["model.safetensors"]).hexdigest()


def test_what_is_there_is_not_asked_for_again(hub, tmp_path):
    fetch(hub, tmp_path / "parts")
    asked = dict(hub.asked)
    fetch(hub, tmp_path / "parts")
    assert hub.asked == asked
    fetch(hub, tmp_path / "other")  # from the hub's cache, without a second body
    assert all(hub.asked[path] == count for path, count in asked.items() if "/resolve/" in path)
    (tmp_path / "parts" / "dinov2-small" / "model.safetensors").unlink()
    fetch(hub, tmp_path / "parts")
    assert (tmp_path / "parts" / "dinov2-small" / "model.safetensors").exists()


def test_pickles_only_where_there_is_nothing_else(hub, tmp_path):
    model = MODELS["opt-125m"]
    serve(hub, model, {"config.json": b"{}", "pytorch_model.bin": b"pickle", "vocab.json": b"{}", "merges.txt": b"",
                       "flax_model.msgpack": b"other"})
    fetch(hub, tmp_path, "opt-125m")
    assert {path.name for path in (tmp_path / "opt-125m").iterdir()} == {
        "config.json", "pytorch_model.bin", "vocab.json", "merges.txt", "source.json"}


@pytest.mark.parametrize("answer", ["", "n", "no"])
def test_no_is_no(hub, tmp_path, answer):
    with pytest.raises(UserError, match="nothing was fetched"):
        fetch(hub, tmp_path / "parts", yes=False, ask=lambda question: answer)
    assert not any("/resolve/" in path for path in hub.asked) and not (tmp_path / "parts").exists()


def test_without_a_terminal_yes_is_needed(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", open(os.devnull, encoding="utf-8"))
    with pytest.raises(UserError, match="add --yes"):
        fetch(hub, tmp_path, yes=False)


def test_what_is_not_as_published_is_refused(hub, tmp_path):
    model = MODELS["dinov2-small"]
    path = f"/{model.repository}/resolve/{model.revision}/model.safetensors"
    hub.files[path] = b"x" * len(hub.files[path])
    with pytest.raises(UserError, match="model.safetensors came with .* it was removed, run the same command again"):
        fetch(hub, tmp_path / "parts")
    assert not (tmp_path / "parts" / "dinov2-small" / "source.json").exists()
    serve(hub, model, REPOSITORY)
    fetch(hub, tmp_path / "parts")


def test_offline_the_cache_serves(hub, tmp_path, monkeypatch):
    fetch(hub, tmp_path / "parts")
    asked = dict(hub.asked)
    program = ("import sys, weights; from pathlib import Path; from minblip2 import UserError\n"
               "try: weights.download(sys.argv[1:2], Path(sys.argv[2]), yes=True)\n"
               "except UserError as error: sys.exit(str(error))")

    def offline(name, folder):
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache"),
                                    "HF_ENDPOINT": hub.url, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'data'}"}
        return subprocess.run([sys.executable, "-c", program, name, tmp_path / folder], env=environment, text=True,
                              capture_output=True, encoding="utf-8")

    assert offline("dinov2-small", "again").returncode == 0
    again = tmp_path / "again" / "dinov2-small"
    assert (again / "model.safetensors").read_bytes() == REPOSITORY["model.safetensors"]
    refused = offline("opt-125m", "again")
    assert "not in the hub's cache, and HF_HUB_OFFLINE is set" in refused.stderr and hub.asked == asked


def test_a_missing_repository_or_network_is_one_sentence(hub, tmp_path):
    with pytest.raises(UserError, match="did not let facebook/opt-125m be looked up") as error:
        fetch(hub, tmp_path, "opt-125m")
    assert "\n" not in str(error.value)
    model = MODELS["dinov2-small"]
    del hub.files[f"/{model.repository}/resolve/{model.revision}/config.json"]
    with pytest.raises(UserError, match="did not let facebook/dinov2-small give config.json"):
        fetch(hub, tmp_path)


def test_every_model_is_pinned_and_every_recipe_has_its_models():
    assert all(len(model.revision) == 40 and int(model.revision, 16) and model.licence for model in MODELS.values())
    for recipe, roles in RECIPE_MODELS.items():
        assert [model.folder for model in find_models([recipe])] == list(roles.values())
    with pytest.raises(UserError, match="no weights 'blip3': choose a recipe .laptop, gpu. or among dinov2-small"):
        find_models(["blip3"])
