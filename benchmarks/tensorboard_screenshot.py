"""Show a real run in tensorboard in a real browser, and keep the picture.

Trains the tiny preset for some hundred steps (unless a run is given), starts tensorboard on a free
port of this machine and lets headless Chromium open the tabs of custom scalars and images. The
pictures go below one another into `results/tensorboard.png`, in few colours, below 200 KB.

    python benchmarks/tensorboard_screenshot.py
    python benchmarks/tensorboard_screenshot.py --run runs/first --out first.png
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from record import RESULTS
from runs import corpus, environment, free_port, pretrain

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Height of the window for each tab, so that forecasts, the last of the images, are in it.
TABS = {"custom_scalars": 900, "images": 1240}
WIDTH = 1280
MOST_BYTES = 200_000
_START_SECONDS, _BROWSER_SECONDS = 90, 180


def main() -> int:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="folder of a run (default: train one)")
    parser.add_argument("--steps", type=int, default=300, help="of the run that is trained")
    parser.add_argument("--out", type=Path, default=RESULTS / "tensorboard.png")
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(
            f"tensorboard_screenshot: no browser here (looked for {', '.join(BROWSERS)}); install "
            "one, on Debian: apt-get install --no-install-recommends chromium",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        run = args.run or train(Path(folder), steps=args.steps)
        with tensorboard(run.resolve()) as url:
            shots = [
                shoot(browser, f"{url}/#{tab}", Path(folder) / f"{tab}.png", height=height)
                for tab, height in TABS.items()
            ]
        size = save_below_one_another(shots, args.out)
    print(f"{args.out}: {size:,} bytes")
    return 0


def train(folder: Path, *, steps: int) -> Path:
    """Pretrain the tiny preset in one process."""
    settings = [
        f"corpus={corpus(folder / 'corpus')}", f"run={folder / 'run'}", "engine.type=plain",
        f"training.steps={steps}", "training.validate_every_steps=25",
    ]  # fmt: skip
    pretrain(settings, ranks=1)
    return folder / "run"


@contextmanager
def tensorboard(run: Path) -> Iterator[str]:
    """Serve a run's event files on a free port until the block is left; yield the address."""
    port = free_port()
    command = [
        sys.executable, "-m", "tensorboard.main", "--logdir", run.name, "--host", "127.0.0.1",
        "--port", str(port), "--load_fast=false", "--samples_per_plugin", "images=20",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=run.parent, stderr=subprocess.DEVNULL, env=environment()
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/data/plugin/custom_scalars/layout", process)
        yield url
    finally:
        process.terminate()
        process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until tensorboard has read the files: before that the layout is empty."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                if b"category" in answer.read():
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            pass
        time.sleep(0.5)
    raise RuntimeError(f"{address}: no layout within {_START_SECONDS} s; is it a run's folder?")


def shoot(browser: str, address: str, path: Path, *, height: int) -> Path:
    """Open an address in a window of some height and save what the browser shows."""
    command = [
        browser, "--headless", "--disable-gpu", "--hide-scrollbars",
        f"--window-size={WIDTH},{height}", "--virtual-time-budget=20000",
        f"--user-data-dir={path.parent / 'profile'}", f"--screenshot={path}", address,
    ]  # fmt: skip
    if os.geteuid() == 0:
        command.insert(1, "--no-sandbox")  # Chromium refuses to start as root otherwise
    subprocess.run(command, check=True, capture_output=True, timeout=_BROWSER_SECONDS)
    return path


def save_below_one_another(shots: list[Path], path: Path) -> int:
    """Put pictures together in as many colours as fit the size; return its bytes."""
    pictures = [Image.open(shot).convert("RGB") for shot in shots]
    height = sum(picture.height for picture in pictures)
    sheet = Image.new("RGB", (max(picture.width for picture in pictures), height))
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    for colours in (256, 128, 64, 32, 16):
        sheet.quantize(colours).save(path, optimize=True)
        if path.stat().st_size < MOST_BYTES:
            break
    return path.stat().st_size


if __name__ == "__main__":
    sys.exit(main())
