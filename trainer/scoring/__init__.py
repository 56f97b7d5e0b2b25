"""Scores: how well a model predicts texts."""
