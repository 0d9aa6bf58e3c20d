"""Our fetching against curl --parallel: python -m benchmarks.download FOLDER [--latency 0 0.02] [--rounds 5]

FOLDER is an excerpt of COCO in the official layout. A server on loopback, in a process of its own, serves its pictures;
both fetch all of them over 16 connections, in turns. Ours checks each picture, curl checks nothing.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from fetch import Fetcher, Item  # noqa: E402
from minblip2.data.entry import run_command
from minblip2.data.files import write_json  # noqa: E402
from minblip2.data.pictures import check_image  # noqa: E402
from tests.coco_server import CocoServer, coco_files  # noqa: E402

CONNECTIONS = 16


def serve(files: dict[str, bytes], latency: float, amazon: bool, port) -> None:
    """Serve until killed; tells its port through a pipe."""
    server = CocoServer(files, latency=latency)
    server.amazon = amazon
    port.send(server.server_port)
    server.serve_forever()


def ours(urls: list[str], folder: Path, check) -> None:
    """Fetch with `Fetcher`, a connection pool made anew as curl makes its own."""
    items = [Item(url, folder / url.rpartition("/")[2], 2**25, check) for url in urls]
    assert len(list(Fetcher(CONNECTIONS).all(items))) == len(urls)


def curl(urls: list[str], folder: Path, check) -> None:
    """Fetch with curl, which reads the list from its standard input."""
    listed = "".join(f'url = "{url}"\noutput = "{folder / url.rpartition("/")[2]}"\n' for url in urls)
    subprocess.run(["curl", "--silent", "--no-progress-meter", "--fail", "--parallel", "--parallel-max",
                    str(CONNECTIONS), "--config", "-"], stderr=subprocess.DEVNULL,
                   input=listed, text=True, check=True, encoding="utf-8")


def main() -> None:
    """Print and keep bytes per second of each way, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, nargs="+", default=[0.0, 0.02], help="seconds before each answer")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    files = {path: body for path, body in coco_files(options.folder).items() if path.endswith(".jpg")}
    megabytes, results = sum(map(len, files.values())) / 1e6, {}
    ways = {"curl": (curl, None), "ours": (ours, lambda path, proven: check_image(path, not proven)),
            "ours, unchecked": (ours, lambda path, proven: None)}
    for latency, amazon in itertools.product(options.latency, (False, True)):
        here, there = multiprocessing.Pipe()
        server = multiprocessing.get_context("fork").Process(target=serve, args=(files, latency, amazon, there),
                                                             daemon=True)
        server.start()
        base, rates = f"http://127.0.0.1:{here.recv()}", {name: [] for name in ways}
        for turn in range(options.rounds + 1):
            for name, (way, check) in ways.items():
                folder = Path(tempfile.mkdtemp())
                started = time.perf_counter()
                way([base + path for path in files], folder, check)
                if turn:  # the first warms up
                    rates[name].append(megabytes / (time.perf_counter() - started))
                assert sum(path.stat().st_size for path in folder.iterdir()) == sum(map(len, files.values()))
                shutil.rmtree(folder)
        server.kill()
        medians = {name: statistics.median(found) for name, found in rates.items()}
        results[f"latency {latency}, md5 {amazon}"] = medians
        print(f"{len(files)} files, {megabytes:.0f} MB, {latency * 1000:.0f} ms before each answer, "
              f"{'with' if amazon else 'without'} MD5: " + ", ".join(
            f"{name} {rate:.0f} MB/s ({rate / medians['curl']:.2f})" for name, rate in medians.items()))
    path = Path("runs/benchmarks/download.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.download", main))
