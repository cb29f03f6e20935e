"""Baseline rankers, and the untuned language model: each is a Scorer, for the same tables"""
