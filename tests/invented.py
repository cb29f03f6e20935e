"""Invented ratings, written in the form of every source: 12 users, 24 items, each user likes 8 and dislikes 7."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet

USERS = [str(u) for u in range(1, 13)]
ITEMS = [str(100 + i) for i in range(24)]
TITLES = {
    item: f"{word} {n}, The ({1960 + n})"
    for n, (item, word) in enumerate(zip(ITEMS, ["Lantern", "River", "Amber"] * 8, strict=True))
}


def rows():
    """(user, item, rating 1 to 5, time), users mixed, times neither sorted nor all different."""
    draw = random.Random(7)
    found = []
    for user in USERS:
        for n, item in enumerate(draw.sample(ITEMS, 15)):
            found.append(
                (user, item, draw.choice([4, 5]) if n < 8 else draw.choice([1, 2, 3]), 1_000_000 + draw.randrange(40))
            )
    draw.shuffle(found)
    return found


ROWS = rows()


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def lines(rows, separator, header=""):
    return header + "".join(separator.join(map(str, row)) + "\n" for row in rows)


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def movielens_100k(folder):
    write(folder / "u.data", lines(ROWS, "\t"))
    write(folder / "u.item", lines([(i, t, "01-Jan-1995", "") for i, t in TITLES.items()], "|"), "latin-1")


def movielens_1m(folder, suffix=""):
    write(folder / f"ratings.dat{suffix}", lines(ROWS, "::"))
    write(folder / "movies.dat", lines([(i, t, "Drama") for i, t in TITLES.items()], "::"), "latin-1")


def movielens_1m_gz(folder):
    movielens_1m(folder, ".gz")


def movielens_20m(folder):
    write(folder / "ratings.csv", lines(ROWS, ",", "userId,movieId,rating,timestamp\n"))
    write(
        folder / "movies.csv", lines([(i, f'"{t}"', "Drama") for i, t in TITLES.items()], ",", "movieId,title,genres\n")
    )


def amazon_2018(folder):
    reviews = [
        {"overall": float(r), "reviewerID": u, "asin": i, "unixReviewTime": t, "reviewText": "fine\n"}
        for u, i, r, t in ROWS
    ]
    write(folder / "Lamps_5.json.gz", json_lines(reviews))
    write(
        folder / "meta_Lamps.json.gz", json_lines({"asin": i, "title": t, "also_buy": ["x"]} for i, t in TITLES.items())
    )


def amazon_2014(folder):
    reviews = [{"reviewerID": u, "asin": i, "overall": float(r), "unixReviewTime": t} for u, i, r, t in ROWS]
    write(folder / "reviews_Lamps_5.json.gz", json_lines(reviews))
    write(
        folder / "meta_Lamps.json.gz",
        "".join(str({"asin": i, "title": t, "price": 3.5}) + "\n" for i, t in TITLES.items()),
    )


def amazon_2023(folder):
    reviews = [{"rating": float(r), "user_id": u, "asin": "x", "parent_asin": i, "timestamp": t} for u, i, r, t in ROWS]
    write(folder / "Lamps.jsonl", json_lines(reviews))
    write(
        folder / "meta_Lamps.jsonl.gz",
        json_lines({"parent_asin": i, "title": t, "main_category": None} for i, t in TITLES.items()),
    )


def bookcrossing_dump(folder):
    rated = lines([(f'"{u}"', f'"{i}"', f'"{2 * r}"') for u, i, r, _ in ROWS], ";", '"User-ID";"ISBN";"Book-Rating"\n')
    write(folder / "BX-Book-Ratings.csv", rated + '"1";"999";"0"\n', "latin-1")
    books = lines(
        [(f'"{i}"', f'"{t}"', '"caf\u00e9 \\"x\\"; y"') for i, t in TITLES.items()],
        ";",
        '"ISBN";"Book-Title";"Book-Author"\n',
    )
    write(folder / "BX-Books.csv", books, "latin-1")


def bookcrossing_copy(folder):
    write(folder / "Ratings.csv", lines([(u, i, 2 * r) for u, i, r, _ in ROWS], ",", "User-ID,ISBN,Book-Rating\n"))
    write(
        folder / "Books.csv",
        lines([(i, f'"{t}"', "caf\u00e9") for i, t in TITLES.items()], ",", "ISBN,Book-Title,Book-Author\n"),
    )


def lastfm(folder, header="userID\tartistID\tweight\n"):
    write(folder / "user_artists.dat", lines([(u, i, 10 * r) for u, i, r, _ in ROWS], "\t", header))
    write(
        folder / "artists.dat",
        lines([(i, t, "http://x", "") for i, t in TITLES.items()], "\t", "id\tname\turl\tpictureURL\n"),
    )


def lastfm_bare(folder):
    lastfm(folder, "")


def table_csv(folder):
    write(folder / "ratings.csv", lines(ROWS, ",", "user_id,item_id,rating,timestamp\n"))
    write(folder / "items.csv", lines([(i, f'"{t}"') for i, t in TITLES.items()], ",", "item_id,title\n"))


def table_tsv(folder):
    write(
        folder / "ratings.tsv.gz", lines([(t, r, i, u) for u, i, r, t in ROWS], "\t", "time\tscore\tbookId\tUser-ID\n")
    )
    write(folder / "items.tsv", lines(TITLES.items(), "\t", "bookId\tname\n"))


def table_bare(folder):
    write(folder / "ratings.txt", lines(ROWS, "::"))
    write(folder / "items.txt", lines(TITLES.items(), "|", "item|title\n"))


def table_json(folder):
    keys = ("uid", "itemId", "rating", "ts")
    write(
        folder / "ratings.jsonl",
        json_lines(dict(zip(keys, (int(u), int(i), r, t), strict=True)) for u, i, r, t in ROWS),
    )
    write(folder / "items.jsonl", json_lines({"itemId": int(i), "title": t} for i, t in TITLES.items()))


def table_parquet(folder):
    folder.mkdir(parents=True, exist_ok=True)
    user, item, rating, time = zip(*ROWS, strict=True)
    columns = {
        "user": list(map(int, user)),
        "item": item,
        "rating": pa.array(rating, pa.float32()),
        "date": pa.array(time, pa.timestamp("s")),
    }
    pa.parquet.write_table(pa.table(columns), folder / "ratings.parquet")
    pa.parquet.write_table(pa.table({"item": list(TITLES), "title": list(TITLES.values())}), folder / "items.parquet")


FORMS = {
    f.__name__: f
    for f in (
        movielens_100k, movielens_1m, movielens_1m_gz, movielens_20m, amazon_2018, amazon_2014, amazon_2023,
        bookcrossing_dump, bookcrossing_copy, lastfm, lastfm_bare, table_csv, table_tsv, table_bare, table_json, table_parquet,
    )
}  # fmt: skip


def form(name, folder):
    """(source, path, further arguments) of a form written to `folder`."""
    FORMS[name](folder)
    source = name.split("_")[0]
    if source != "table":
        return source, folder, []
    path, items = (next(p for p in folder.iterdir() if p.name.startswith(start)) for start in ("ratings", "items"))
    return source, path, ["--items", str(items)]
