"""Evaluation: log-probabilities to margins to metrics"""
