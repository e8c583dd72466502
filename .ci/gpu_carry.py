"""Fill .gpu with what `make gpu` needs on a machine without network: wheels, and the recorded steps of other codebases.

    python3 .ci/gpu_carry.py

The wheels are those of diffusers and of what it needs that a machine with torch does not have, of pytest's plugin for
running tests side by side, and of setuptools, which builds the library. They are pure Python, for 3.12. The recordings
are copied from the folder that FASTDIFF_REPLAY_DIR names, if it does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / ".gpu"
WHEELS = [
    *("diffusers==0.42.1", "importlib_metadata==10.2.0", "zipp==4.1.2", "lazy-importer==0.1.0"),
    *("pytest-xdist==3.8.0", "execnet==2.1.2"),
    "setuptools==80.9.0",  # pyproject.toml needs 77, torch 2.11 less than 82
]
MOST_BYTES = 40 * 2**20


def main() -> None:
    wheels, recorded = FOLDER / "wheels", FOLDER / "reference"
    shutil.rmtree(FOLDER, ignore_errors=True)
    wheels.mkdir(parents=True)
    options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    options += ["--platform", "manylinux_2_28_x86_64", "--platform", "any", "--dest", str(wheels)]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, *WHEELS], check=True)
    source = os.environ.get("FASTDIFF_REPLAY_DIR")
    if source:
        # contents only: the recordings may be read-only, and .gpu must be removable
        shutil.copytree(source, recorded, copy_function=shutil.copyfile)
        for folder in [recorded, *(path for path in recorded.rglob("*") if path.is_dir())]:
            folder.chmod(0o755)
    else:
        print("gpu-carry: FASTDIFF_REPLAY_DIR is not set: the recorded steps are left out")
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    names = ", ".join(path.name for path in sorted(wheels.iterdir()))
    print(f"gpu-carry: {size / 2**20:.1f} MiB in {FOLDER}: {names}{', recorded steps' if source else ''}")
    if size > MOST_BYTES:
        sys.exit(f"gpu-carry: that is more than {MOST_BYTES >> 20} MiB")


if __name__ == "__main__":
    main()
