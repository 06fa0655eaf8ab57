"""Evaluation: item ranks over the full catalogue, their metrics, slices and significance."""
