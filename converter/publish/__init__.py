"""What the Hub gets: the model card, and pushing a checkpoint."""
