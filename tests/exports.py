"""Generated exports of one person, in the layouts of each service: 400 ratings whose taste depends on the first word of
a title.
"""

import csv
import gzip
import json
import random
from datetime import date, timedelta

WORDS = ["Lantern", "River", "Amber", "Winter", "Copper", "Velvet", "Harbour", "Paper"]
LIKED = {"Lantern", "Amber", "Velvet"}


def films(number, seed=5):
    """(title, year, stars in halves, date) of films that are all different, oldest first; some awkward titles."""
    draw = random.Random(seed)
    day, found = date(2015, 1, 3), []
    for n in range(number):
        word = draw.choice(WORDS)
        name = f"{word} {n}, again" if n % 17 == 0 else f'{word} "{n}"' if n % 23 == 0 else f"{word} {n}"
        stars = draw.choice([3.5, 4, 4.5, 5] if word in LIKED else [0.5, 1.5, 2, 2.5, 3])
        day += timedelta(days=draw.randrange(1, 9))
        found.append((name, 1950 + n % 70, stars, day))
    return found


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def letterboxd(folder, number=400, unrated=20):
    """ratings.csv and watched.csv, as the unpacked export has them; the last `unrated` films of watched.csv have no
    rating.
    """
    found = films(number + unrated)
    rows = [(d.isoformat(), name, year, f"https://boxd.it/{n:04x}") for n, (name, year, _, d) in enumerate(found)]
    stars = [f"{s:g}" for _, _, s, _ in found]
    write_csv(
        folder / "ratings.csv",
        ["Date", "Name", "Year", "Letterboxd URI", "Rating"],
        [(*row, s) for row, s in zip(rows[:number], stars, strict=False)],
    )
    write_csv(folder / "watched.csv", ["Date", "Name", "Year", "Letterboxd URI"], rows)
    write_csv(folder / "profile.csv", ["Date Joined", "Username", "Given Name"], [("2015-01-01", "viewer", "")])
    return folder


IMDB = (
    "Const,Your Rating,Date Rated,Title,Original Title,URL,Title Type,IMDb Rating,Runtime (mins),Year,Genres,Num Votes,"
    "Release Date,Directors"
).split(",")


def imdb(folder, number=60):
    rows = [
        (f"tt{n:07}", int(2 * s), d.isoformat(), name, name, "u", "Movie", 7.1, 99, year, "Drama", 9, "", "")
        for n, (name, year, s, d) in enumerate(films(number))
    ]
    rows.append(("tt9999999", 9, "2020-02-02", "One Episode", "", "u", "TV Episode", 8, 40, 2020, "", 9, "", ""))
    return write_csv(folder / "ratings.csv", IMDB, rows)


GOODREADS = (
    "Book Id,Title,Author,Author l-f,Additional Authors,ISBN,ISBN13,My Rating,Average Rating,Publisher,Binding,"
    "Number of Pages,Year Published,Original Publication Year,Date Read,Date Added,Bookshelves,Bookshelves with "
    "positions,"
    "Exclusive Shelf,My Review,Spoiler,Private Notes,Read Count,Owned Copies"
).split(",")


def goodreads(folder, number=60):
    rows = []
    for n, (name, year, s, d) in enumerate(films(number)):
        stars, shelf = (round(s + 0.1), "read") if n % 10 else (0, "to-read" if n % 20 else "read")
        read = d.strftime("%Y/%m/%d") if shelf == "read" and n % 3 else ""
        isbn = f'="{n:010}"'
        rows.append(
            (
                n,
                name,
                "A B",
                "B, A",
                "",
                isbn,
                "",
                stars,
                3.9,
                "P",
                "Paperback",
                200,
                year,
                year,
                read,
                d.strftime("%Y/%m/%d"),
                "",
                "",
                shelf,
                "fine,\nreally",
                "",
                "",
                1,
                0,
            )
        )
    return write_csv(folder / "goodreads_library_export.csv", GOODREADS, rows)


def myanimelist(folder, number=60):
    """The XML, gzipped as it is downloaded."""
    entries = []
    for n, (name, _, s, d) in enumerate(films(number)):
        score, status = (int(2 * s), "Completed") if n % 12 else (0, "Plan to Watch" if n % 24 else "Watching")
        finished = d.isoformat() if n % 4 else "0000-00-00"
        entries.append(
            f"<anime><series_animedb_id>{n}</series_animedb_id><series_title><![CDATA[{name}]]></series_title>"
            f"<my_watched_episodes>12</my_watched_episodes><my_start_date>0000-00-00</my_start_date>"
            f"<my_finish_date>{finished}</my_finish_date><my_score>{score}</my_score><my_status>{status}</my_status></anime>"
        )
    info = "<myinfo><user_id>1</user_id><user_name>viewer</user_name><user_export_type>1</user_export_type></myinfo>"
    text = f'<?xml version="1.0" encoding="UTF-8" ?>\n<myanimelist>{info}\n' + "\n".join(entries) + "\n</myanimelist>"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "animelist.xml.gz").write_bytes(gzip.compress(text.encode()))
    return folder / "animelist.xml.gz"


def trakt(folder, number=60):
    folder.mkdir(parents=True, exist_ok=True)
    found = films(number + 5)
    about = [{"title": name, "year": year, "ids": {"trakt": n}} for n, (name, year, _, _) in enumerate(found)]
    rated = [
        {"rated_at": f"{d}T20:00:00.000Z", "rating": int(2 * s), "type": "movie", "movie": about[n]}
        for n, (_, _, s, d) in enumerate(found[:number])
    ]
    part = {"rated_at": "2020-01-01T00:00:00.000Z", "rating": 9, "type": "episode", "episode": {"title": "Pilot"}}
    (folder / "ratings-movies.json").write_text(json.dumps([*rated, part], indent=1))
    watched = [
        {"plays": 1, "last_watched_at": f"{d}T20:00:00.000Z", "movie": about[n]} for n, (_, _, _, d) in enumerate(found)
    ]
    (folder / "watched-movies.json").write_text(json.dumps(watched))
    return folder


def netflix(folder, number=40):
    rows = [(name, d.strftime("%-m/%-d/%y")) for name, _, _, d in films(number)]
    rows += [(f"Dark Water: Season {s}: Episode {e}", f"12/{s + e}/20") for s in (1, 2) for e in range(1, 9)]
    rows.append(("Spider Tale: Into the Web", "1/9/21"))
    return write_csv(folder / "NetflixViewingHistory.csv", ["Title", "Date"], rows[::-1])


def scrobbles(folder, artists=40):
    draw = random.Random(3)
    rows = [
        (1_700_000_000 + 86_400 * n + 300 * k, "14 Nov 2023, 22:13", f"Band {n}", "", f"LP {n}", "", f"Song {k}", "")
        for n in range(artists)
        for k in range(draw.choice([1, 2, 3, 9, 20, 30]))
    ]
    draw.shuffle(rows)
    header = ["uts", "utc_time", "artist", "artist_mbid", "album", "album_mbid", "track", "track_mbid"]
    return write_csv(folder / "scrobbles.csv", header, rows)


ALL = {
    "letterboxd": letterboxd,
    "imdb": imdb,
    "goodreads": goodreads,
    "myanimelist": myanimelist,
    "trakt": trakt,
    "netflix": netflix,
    "scrobbles": scrobbles,
}


def catalogue(path, number=300):
    """A public catalogue: titles with votes."""
    return write_csv(path, ["title", "votes"], [(f"Public Film {n} (19{n % 100:02})", 1000 - n) for n in range(number)])
