"""Scripts that reproduce the published figures."""
