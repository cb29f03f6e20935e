"""Which column is which: names that people and data sets give to user, item, rating, time and title."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...errors import UserError
from .tables import plain

# names as `plain` writes them: without case, accents and punctuation; the most telling first
GUESSES = {
    "user": (
        "user userid uid username reviewerid reviewer customerid customer memberid member readerid reader listenerid "
        "listener viewerid viewer profilename profile accountid visitorid personid raterid authorid useridx "
        "usernumber u benutzer benutzerid nutzer nutzerid kunde kundenid utilisateur utilisateurid idutilisateur "
        "usuario usuarioid idusuario utente idutente utenteid usuarioid gebruiker gebruikerid uzytkownik пользователь "
        "用户 用户id ユーザー"
    ).split(),
    "item": (
        "item itemid iid movieid filmid movie film parentasin asin isbn isbn13 bookid book productid product gameid "
        "game songid song trackid track artistid artist albumid album animeid anime mangaid recipeid placeid venueid "
        "businessid articleid docid documentid showid appid sku ean tconst imdbid tmdbid goodsid offerid storyid "
        "beerid i artikel artikelid produkt produktid buch filmtitel filmnr livre livreid produit produitid pelicula "
        "peliculaid libro libroid producto productoid filme filmeid livro produto prodotto boek elemento objet фильм "
        "книга товар 电影 电影id 物品 商品 映画 作品"
    ).split(),
    "rating": (
        "rating ratings bookrating overall score stars star rate rated value vote grade points userrating myrating "
        "yourrating preference weight plays playcount playcounts count hours hoursplayed playtime scrobbles listens "
        "views liked like r bewertung note wertung sterne punkte puntuacion calificacion valoracion nota avaliacao "
        "classificacao voto valutazione punteggio beoordeling cijfer ocena оценка рейтинг 评分 评价 得分 評価 スコア"
    ).split(),
    "time": (
        "timestamp time unixreviewtime datetime date ts unixtime createdat created updatedat ratedat daterated "
        "watcheddate watchedat dateread dateadded reviewtime reviewdate eventtime playedat t when epoch datum zeit "
        "zeitstempel uhrzeit horodatage heure fecha hora data dataora tijd tijdstip дата время 时间 日期 日付 時間 日時"
    ).split(),
    "title": (
        "title titles itemtitle movietitle filmtitle booktitle producttitle gametitle songtitle tracktitle albumtitle "
        "originaltitle primarytitle itemname productname moviename filmname bookname gamename trackname songname "
        "artistname albumname bandname animename recipename appname name label titel filmtitel buchtitel titre titulo "
        "titolo nazwa tytul название 标题 片名 书名 名称 タイトル 題名"
    ).split(),
}
ITEM_IDS = [*GUESSES["item"], "id", "key", "index", "code", "nr", "no", "number", "identifier", "row"]

# columns that only one export has -> (the source to use, what it is)
EXPORTS = (
    ({"letterboxduri", "name", "year"}, "letterboxd", "a Letterboxd export"),
    ({"const", "yourrating"}, "imdb", "an IMDb ratings export"),
    ({"bookid", "myrating", "exclusiveshelf"}, "goodreads", "a Goodreads library export"),
    ({"profilename", "starttime", "supplementalvideotype"}, "netflix", "a Netflix viewing history"),
    ({"uts", "artist", "track"}, "scrobbles", "Last.fm scrobbles"),
    ({"userid", "movieid", "rating", "timestamp"}, "movielens", "MovieLens ratings (name its folder)"),
    ({"userid", "isbn", "bookrating"}, "bookcrossing", "Book-Crossing ratings (name their folder)"),
    ({"reviewerid", "asin", "overall"}, "amazon", "Amazon reviews"),
    ({"parentasin", "userid", "rating"}, "amazon", "Amazon reviews of 2023"),
)


def looks_like(names: Iterable[str]) -> tuple[str, str] | None:
    """(source, what it is) of a file with these columns, where only one export has them."""
    found = {plain(name) for name in names}
    if found == {"title", "date"}:
        return "netflix", "a Netflix viewing history"
    return next(((source, what) for columns, source, what in EXPORTS if columns <= found), None)


def pick(names: Sequence[str], given: str, flag: str, where: object, header: bool) -> str:
    """The column that a flag names: by its name, by its name without case and punctuation, or by its place.

    Raises UserError.
    """
    if given in names:
        return given
    alike = [name for name in names if plain(name) == plain(given)]
    if len(alike) == 1 and not given.isdecimal():
        return alike[0]
    if given.isdecimal() and 1 <= int(given) <= len(names):
        return names[int(given) - 1]
    counted = "it has" if header else "without a header line they are"
    raise UserError(f'{flag}: {where} has no column "{given}": {counted} {", ".join(names)}')


def guess(names: Sequence[str], role: str, taken: Iterable[str] = ()) -> str:
    """The first guess that the table has, "" for none."""
    candidates = ITEM_IDS if role == "item id" else GUESSES[role]
    found = {plain(name): name for name in reversed(names) if name not in set(taken)}
    return next((found[g] for g in candidates if g in found), "")
