"""Who may no longer act."""
