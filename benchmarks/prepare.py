"""Times `mlx-dmpo prepare movielens` on generated ratings in the form of MovieLens 25M, and says how much memory it
took.

python benchmarks/prepare.py [--ratings 25000000] [--folder DIR]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from tqdm import tqdm

USERS, ITEMS, BLOCK = 162_500, 59_000, 1_000_000  # users and rated movies of MovieLens 25M


def generate(folder: Path, ratings: int) -> None:
    """ratings.csv, user by user, movies drawn by a power law; movies.csv with articles, quotes and years."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    share = np.sort(draw.pareto(1.2, USERS) + 0.2)
    users = np.repeat(np.arange(1, USERS + 1), draw.multinomial(ratings, share / share.sum())[draw.permutation(USERS)])
    with pa.OSFile(str(folder / "ratings.csv"), "wb") as file:
        for start in tqdm(range(0, ratings, BLOCK), desc="generate", unit="million", disable=None):
            user = users[start : start + BLOCK]
            block = {
                "userId": user,
                "movieId": (ITEMS * draw.random(len(user)) ** 3).astype(np.int64) * 3 + 1,
                "rating": draw.choice(
                    np.arange(0.5, 5.5, 0.5), len(user), p=[0.02, 0.03, 0.02, 0.07, 0.05, 0.2, 0.13, 0.26, 0.08, 0.14]
                ),
                "timestamp": draw.integers(789_652_004, 1_574_327_703, len(user)),
            }
            pa.csv.write_csv(pa.table(block), file, pa.csv.WriteOptions(include_header=start == 0))
    rows = [f'{n * 3 + 1},"Film {n}, The ({1930 + n % 90})",Drama|Comedy' for n in range(ITEMS)]
    (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *rows]) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=int, default=25_000_000, help="how many ratings [25000000]")
    parser.add_argument(
        "--folder", type=Path, help="where the generated files are put and kept (else a temporary folder)"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary) / "ml-generated"
        if not (folder / "movies.csv").is_file():
            generate(folder, given.ratings)
        began = time.perf_counter()
        command = [sys.executable, "-m", "mlx_dmpo", "prepare", "movielens", str(folder), "--out", f"{temporary}/out"]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )  # bytes there, KiB here
        size = (folder / "ratings.csv").stat().st_size
        print(f"{given.ratings:,} ratings ({size / 1e6:,.0f} MB): {seconds:.1f} s, peak memory {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
