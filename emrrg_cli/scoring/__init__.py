"""Scores of texts against references, pair by pair, and the rewards made of them."""
