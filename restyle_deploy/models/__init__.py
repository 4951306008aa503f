"""The official architecture in torch; state-dict names as upstream."""
