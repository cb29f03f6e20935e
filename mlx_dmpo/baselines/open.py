"""A baseline's name and settings -> a fitted Scorer"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .. import assets
from ..config.baseline import LANGUAGE, SEQUENTIAL, BaselineSettings, check_baseline
from ..data import formats
from ..data.rows import has_split
from ..errors import UserError
from ..machine import console
from ..prompts import pairwise
from ..records import Example, RankingExample
from ..scores import Scorer
from .corpus import Corpus, build_corpus, ranking
from .scorer import FirstListed, ItemScorer

EPOCHS = {"als": 15, "bpr": 100}
DROS_WEIGHT = 0.1


def load_examples(data: str, split: str, settings: BaselineSettings) -> list[Any]:
    """A split's examples. Raises UserError for data without pairs."""
    domains = pairwise.with_domains(settings.domains)
    loaded = formats.load(data, split, domains, settings.skip_bad_rows, console.notice, settings.domain)
    if not loaded.has_pairs:
        raise UserError(f"{loaded.name}: holds {loaded.format}, one answer per prompt: give data with rejected answers")
    return loaded.examples


def fitting_examples(settings: BaselineSettings) -> list[Example]:
    """The training users', and with --fit all the validation users'. Raises UserError where --data brings none."""
    data = settings.data or str(assets.data_dir())
    if settings.train_data:
        return load_examples(settings.train_data, "train", settings)
    splits = [s for s in ("train", *(["valid"] if settings.fit == "all" else [])) if has_split(data, s)]
    examples = [e for split in splits if split != settings.split for e in load_examples(data, split, settings)]
    if not examples and settings.fit == "train":
        raise UserError(f"{data}: has no train split: give the training users (--train-data), or --fit all")
    return examples


def open_baseline(name: str, settings: BaselineSettings, tested: Sequence[Example]) -> tuple[Scorer, dict[str, Any]]:
    """The fitted scorer, and what the manifest says of the fit.  tested: the examples that will be scored.

    Raises UserError for a name or setting that does not fit, and for data without titles.
    """
    check_baseline(name, settings)
    if name == "first-listed":
        if not any(isinstance(e, RankingExample) and e.positive_first for e in tested):
            console.notice("note: the data fixes no printed order: every pair is a tie for first-listed")
        return FirstListed(), {}
    if name in LANGUAGE:
        return _language(name, settings), {"shots": settings.shots if name == "in-context" else 0}
    fitting = fitting_examples(settings)
    corpus = build_corpus(fitting, tested, with_histories=settings.fit == "all", matching=settings.match_titles)
    facts = {
        "fit": settings.fit,
        "fitted_users": len(corpus.sequences),
        "fitted_items": len(corpus.keys),
        "fitted_interactions": int(corpus.likes.sum()),
        "left_out_targets": corpus.left_out,
    }
    return ItemScorer(name, corpus, _ranker(name, corpus, settings)), facts


def _ranker(name: str, corpus: Corpus, settings: BaselineSettings) -> Any:
    from . import counts, factors  # here, so that a counter needs no array library beyond numpy

    epochs = settings.epochs or EPOCHS.get(name, 50)
    shared: dict[str, Any] = {"factors": settings.factors, "epochs": epochs, "seed": settings.seed}
    if name == "popularity":
        return counts.Popularity(corpus)
    if name == "like-ratio":
        return counts.LikeRatio(corpus)
    if name == "als":
        return factors.Als(corpus, **shared)
    if name == "bpr":
        return factors.Bpr(corpus, **shared, learning_rate=settings.learning_rate or 0.01)
    if name == "item-knn":
        return factors.ItemKnn(corpus, neighbours=settings.neighbours)
    assert name in SEQUENTIAL
    from . import fit

    how = fit.Training(
        dim=settings.factors,
        length=settings.max_history,
        epochs=epochs,
        batch_size=64,
        learning_rate=settings.learning_rate or 1e-3,
        dropout=settings.dropout,
        seed=settings.seed,
        dros=settings.dros_weight or (DROS_WEIGHT if name == "dros-sasrec" else 0.0),
    )
    embeddings = None
    if settings.text_embeddings:
        from ..model import loading
        from .titles import title_embeddings

        embeddings = title_embeddings(loading.load(settings), corpus.keys, how.dim)
    return fit.Sequential(name.removeprefix("dros-"), corpus, how, embeddings)


def _language(name: str, settings: BaselineSettings) -> Scorer:
    """The untuned language model, with worked examples of training users where asked for."""
    from ..model.open import LanguageModelScorer, open_scorer

    scorer = open_scorer(settings)
    if name == "zero-shot":
        return scorer
    from .in_context import in_context

    training: Sequence[RankingExample] = ranking(fitting_examples(replace(settings, fit="train")))
    template = in_context(scorer.template, training, settings.shots, settings.seed)
    return LanguageModelScorer(scorer.base, scorer.settings, name, template)
