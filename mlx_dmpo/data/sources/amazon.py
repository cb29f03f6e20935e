"""Amazon reviews and metadata of 2014, 2018 and 2023."""

from __future__ import annotations

import re
from pathlib import Path

from ...config import PrepareSettings
from ...errors import UserError
from . import files
from .columns import collect, rows_of, titles_of
from .contract import BadRows, Ratings
from .folder import listed, one, stem
from .json_rows import NUMBER, TEXT, json_batches

CATEGORIES = {
    "video_games": "game",
    "movies_and_tv": "movie",
    "books": "book",
    "digital_music": "music",
    "cds_and_vinyl": "music",
}


def amazon(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """2014 and 2018: reviewerID, asin, overall, unixReviewTime; 2023: user_id, parent_asin, rating, timestamp (ms)."""
    if path.is_dir() or not path.exists():
        found = [p for p in listed(path, "Amazon") if re.search(r"\.jsonl?(\.gz)?$", p.name)]
        reviews = one(
            [p for p in found if not p.name.startswith("meta")],
            path,
            "reviews",
            "CATEGORY_5.json.gz or CATEGORY.jsonl.gz",
        )
    else:
        reviews = path
    category = re.sub(r"_\d+$", "", stem(reviews).removeprefix("reviews_"))
    beside = [p for p in listed(reviews.parent, "Amazon") if p.name.startswith("meta")]
    metadata = one(
        [p for p in beside if stem(p) == f"meta_{category}"],
        reviews.parent,
        f"titles of {category}",
        f"meta_{category}.json.gz",
    )
    first = files.start(reviews).partition("\n")[0]
    if "user_id" in first:
        name, item, columns = "Amazon reviews 2023", "parent_asin", ("user_id", "parent_asin", "rating", "timestamp")
    elif "reviewerID" in first:
        name, item, columns = "Amazon reviews 2014 or 2018", "asin", ("reviewerID", "asin", "overall", "unixReviewTime")
    else:
        raise UserError(
            f"{reviews}:1: not an Amazon review (no reviewerID, no user_id): use the file as it was downloaded"
        )
    kinds = (TEXT, TEXT, NUMBER, NUMBER)
    interactions = collect(json_batches(reviews, dict(zip(columns, kinds, strict=True)), bad), bad)
    fields = {item: TEXT, "title": TEXT}
    titles = titles_of(rows_of(json_batches(metadata, fields, bad, optional=["title"])), interactions.items)
    scraped = [i for i, title in titles.items() if "getTime" in title]  # page source, as the data's authors warn
    for i in scraped:
        del titles[i]
    notes = [f"{len(scraped)} titles are page source (getTime): taken as missing"] if scraped else []
    return Ratings(
        interactions,
        titles,
        [reviews, metadata],
        f"{name}, {category}",
        CATEGORIES.get(category.lower(), "product"),
        scale=(1, 5),
        notes=notes,
    )
