"""Released checkpoints: their config.json, their weights, and where they come from."""
