"""Rankers that are no language model, and the untuned language model: each a Scorer, for the same tables"""
